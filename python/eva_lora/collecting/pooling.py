"""What ranks hold of the same inputs, added up: starts, refreshes, checkpoints and the result.

Between two refreshes every rank folds its own rows into a share of each statistic. What a refresh needs of the shares
(q × d numbers of an input, and its totals) is added up on one rank, the input's owner, which does the small algebra
and hands the new basis to all. Together that sends the bytes of one all-reduce, after which every rank would have to
repeat the algebra. An owner holds all sums from then on and the others hold zeros, so that what all hold together is
the whole at any time.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eva_kernels.streaming_svd import GramStatistic, Refreshed, Sketch, finish_, refresh_

from ..distributed import BUCKET_BYTES, EVIDENCE, Ranks
from .inputs import BatchShare, DistinctInput
from .local import LocalStatistics
from .run import Run
from .tensor_parallel import TensorParallel

__all__ = ["PooledStatistics"]


class PooledStatistics(LocalStatistics):
    """The statistics of a run, shared by ranks.

    Args:
        run: The run of this rank.
        ranks: Those that make the pass together.
        parallel: Those among them that run each batch together with this one, if there are any.
    """

    def __init__(self, run: Run, ranks: Ranks, parallel: TensorParallel | None = None) -> None:
        self._run: Run = weakref.proxy(run)  # which holds this
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size
        #: For each rank, the one among those of its batches that counts their rows.
        self.leaders = ranks.gather(ranks.rank if parallel is None else ranks.rank_of(parallel.leader))
        run.capture.batch_share = BatchShare(0, 1)
        self._known: list[list[int]] = []  # the streams of each input, as all ranks know them

    @property
    def _inputs(self) -> list[DistinctInput]:
        return self._run.capture.inputs

    def count(self, has_batch: bool, num_rows: int) -> tuple[int, int, bool, list[int]]:
        """What all ranks saw together: how many had a batch, their rows, whether any layer's input is new or now
        another than that of the layers it shared with, and the rows of each stream's input."""
        changed = self._structure() != self._known or any(entry.sketch for entry in self._inputs)
        rows = [0] * len(self._run.capture.site_of)
        for entry in self._inputs:
            rows[min(entry.streams)] = entry.statistic.num_rows - entry.known_rows
        mine = num_rows if self.leaders[self.rank] == self.rank else 0
        had, all_rows, any_changed, *per_stream = self.ranks.agree([has_batch, mine, changed, *rows])
        return had, all_rows, bool(any_changed), per_stream

    def record(self, rows: Sequence[int]) -> None:
        """Take the rows of a batch, all ranks' together, into the counts that decide when to refresh."""
        for entry in self._inputs:
            statistic, new = entry.statistic, rows[min(entry.streams)]
            of_others = new - (statistic.num_rows - entry.known_rows)
            statistic.num_rows += of_others
            statistic.pending_rows += of_others
            entry.known_rows = statistic.num_rows
            entry.pending_batches += new > 0

    def unify(self) -> list[int]:
        """Bring all ranks to the same inputs, and let new ones start; returns the streams of those that did.

        Layers share an input where they do so on every rank that has run a batch.
        """
        own = [(e.streams, e.statistic.kind, e.statistic.num_components, e.reason) for e in self._inputs]
        everyone = self.ranks.exchange((own, self._run.maker.gram_bytes))
        structures = [structure for structure, _ in everyone if structure]
        self._run.maker.gram_bytes = max(num_bytes for _, num_bytes in everyone)
        homes = [{s: i for i, (streams, *_) in enumerate(of_rank) for s in streams} for of_rank in structures]
        together: dict[tuple[int | None, ...], list[int]] = {}
        for stream in sorted({stream for home in homes for stream in home}):
            together.setdefault(tuple(home.get(stream) for home in homes), []).append(stream)
        for signature, streams in together.items():
            rank, index = next((r, i) for r, i in enumerate(signature) if i is not None)
            self._settle(streams, *structures[rank][index][1:])
        self._inputs.sort(key=lambda entry: min(entry.streams))
        self._known = self._structure()
        self._assign()
        return self._start_()

    def share_out(self) -> None:
        """After a checkpoint was loaded, whole, on every rank: leave each sum on one of them."""
        self._inputs.sort(key=lambda entry: min(entry.streams))
        self._known = self._structure()
        self._assign()
        for entry in self._inputs:
            entry.known_rows = entry.statistic.num_rows
            self._leave_to_owner(entry, entry.statistic.summands())
        if self.rank:
            self._run.row_rules.skipped = {}

    def refresh_(self, inputs: Sequence[DistinctInput]) -> list[Refreshed]:
        """Refresh the statistics of some inputs from the rows of all ranks: what they become is the same everywhere."""
        results: list[Refreshed] = []
        for bucket in _buckets(inputs):
            summands = [entry.statistic.summands(whole=False) for entry in bucket]
            sums = self._to_owners(bucket, summands)
            for entry, own in zip(bucket, summands, strict=True):
                self._leave_to_owner(entry, own)
            solved = self.ranks.attempt(self._solve, bucket, sums, default={})
            results += self._from_owners(bucket, solved)
        return results

    def finish_(self, inputs: Sequence[DistinctInput]) -> None:
        """Final bases on every rank, and totals of all rows; the exact eigensolve of each Gram on its owner."""
        mine = [entry for entry in inputs if entry.owner == self.rank]
        for entry in inputs:
            if isinstance(entry.statistic, GramStatistic):
                self._reduce_gram_(entry, entry.statistic)

        def solve() -> dict[int, list[Tensor]]:
            finish_([entry.statistic for entry in mine])
            return {id(entry): [entry.statistic.basis, entry.statistic.eigenvalues] for entry in mine}

        solved = self.ranks.attempt(solve, default={})
        self.ranks.agree()
        for bucket in _buckets(inputs):
            like = [[entry.statistic.basis, entry.statistic.eigenvalues] for entry in bucket]
            received = self._gathered(bucket, [solved.get(id(entry)) for entry in bucket], like)
            for entry, (basis, eigenvalues) in zip(bucket, received, strict=True):
                entry.statistic.basis, entry.statistic.eigenvalues = basis, eigenvalues
            self.ranks.all_reduce_([t for e in bucket for t in (e.statistic.column_sum, e.statistic.square_sum)])

    def states(self) -> list[dict[str, Any]]:
        """The whole state of every statistic on rank 0; what is held of it changes hands, but does not change."""
        states = []
        for entry in self._inputs:
            state, summands = entry.statistic.state(), entry.statistic.summands()
            sums = {name: tensor.clone() for name, tensor in summands.items()}
            self.ranks.all_reduce_(list(sums.values()))
            if entry.owner == self.rank:
                entry.statistic.hold_({name: tensor.clone() for name, tensor in sums.items()})
            self._leave_to_owner(entry, summands)
            states.append({**state, **sums} if self.rank == 0 else {})
        return states

    def gather_facts(self, *, final: bool) -> None:
        """Bring together what each rank found out about its layers' rows; counts, but the last time, on rank 0."""
        own = self._run.row_rules
        everyone = self.ranks.exchange((own.rules, own.memory, own.skipped))
        own.skipped = {}
        for rules, memory, skipped in everyone:
            for name, of_rank in rules.items():
                own.rules.setdefault(name, set()).update(of_rank)
            own.memory.join(memory)
            for name, count in skipped.items() if final or self.rank == 0 else ():
                own.skipped[name] = own.skipped.get(name, 0) + count

    def _structure(self) -> list[list[int]]:
        return sorted(sorted(entry.streams) for entry in self._inputs)

    def _settle(self, streams: list[int], kind: str, columns: int, reason: str) -> None:
        """Let exactly these streams have one input here."""
        run, capture = self._run, self._run.capture
        entry = capture.input_of[streams[0]]
        if entry is None:
            statistic = run.maker.empty(streams[0], kind, columns)
            entry = DistinctInput(statistic, reason, list(streams), [], dict.fromkeys(streams, 0), is_new=False)
            capture.inputs.append(entry)
            for stream in streams:
                capture.input_of[stream] = entry
        elif len(entry.streams) > len(streams):
            capture.part_(entry, streams)
        elif entry.statistic.shift is None and (entry.statistic.kind, entry.statistic.num_components) != (
            kind,
            columns,
        ):
            entry.statistic, entry.reason, entry.sketch = run.maker.empty(streams[0], kind, columns), reason, None

    def _assign(self) -> None:
        """Give every input without an owner the rank that has least to do; in one order, so the same everywhere."""
        load = [0.0] * self.size
        for entry in self._inputs:
            if entry.owner >= 0:
                load[entry.owner] += _cost(entry)
        for entry in sorted((e for e in self._inputs if e.owner < 0), key=_cost, reverse=True):
            entry.owner = load.index(min(load))
            load[entry.owner] += _cost(entry)

    def _start_(self) -> list[int]:
        started = []
        for bucket in _buckets([entry for entry in self._inputs if entry.statistic.shift is None]):
            sketches = []
            for entry in bucket:
                empty = Sketch(
                    entry.statistic.basis.new_zeros(entry.statistic.basis.mT.shape),
                    entry.statistic.basis.new_zeros(entry.statistic.num_components, 1),
                    torch.zeros_like(entry.statistic.column_sum), 0,
                )  # fmt: skip
                sketches.append(entry.sketch or empty)
            counts = [sketch.total.new_full((), sketch.num_rows) for sketch in sketches]
            self.ranks.all_reduce_([t for s, n in zip(sketches, counts, strict=True) for t in (*s[:3], n)])
            for entry, sketch, count in zip(bucket, sketches, torch.stack(counts).tolist(), strict=True):
                entry.sketch = None
                if count > 0:
                    entry.statistic.start_(sketch._replace(num_rows=int(count)))
                    started += entry.streams
        return started

    def _leave_to_owner(self, entry: DistinctInput, summands: dict[str, Tensor]) -> None:
        if entry.owner != self.rank:
            for tensor in summands.values():
                tensor.zero_()

    def _to_owners(
        self, inputs: Sequence[DistinctInput], summands: Sequence[dict[str, Tensor]]
    ) -> dict[int, dict[str, Tensor]]:
        """The sums over all ranks of each input's summands, by its index, of the inputs that this rank owns."""
        result: dict[int, dict[str, Tensor]] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensors in summands for tensor in tensors.values()):
            places = [
                (i, name) for i, own in enumerate(summands) for name, tensor in own.items() if tensor.dtype == dtype
            ]
            rows: list[list[Tensor]] = [[] for _ in range(self.size)]
            for i, name in places:
                rows[inputs[i].owner].append(summands[i][name].reshape(-1).to(self.ranks.device))
            nothing = torch.empty(0, dtype=dtype, device=self.ranks.device)
            reduced = self.ranks.sum_up([torch.cat([nothing, *pieces]) for pieces in rows])
            for i, name in places:
                if inputs[i].owner == self.rank:
                    like = summands[i][name]
                    mine, reduced = reduced[: like.numel()], reduced[like.numel() :]
                    result.setdefault(i, {})[name] = mine.view(like.shape).to(like.device, copy=True)
        return result

    def _solve(self, inputs: Sequence[DistinctInput], sums: dict[int, dict[str, Tensor]]) -> dict[int, Refreshed]:
        for i, own in sums.items():
            inputs[i].statistic.hold_(own)
        refreshed = refresh_([inputs[i].statistic for i in sums])
        for i in sums:  # in memory as it will be on the other ranks, and after a restart
            inputs[i].statistic.basis = inputs[i].statistic.basis.contiguous()
        return dict(zip(sums, refreshed, strict=True))

    def _from_owners(self, inputs: Sequence[DistinctInput], solved: dict[int, Refreshed]) -> list[Refreshed]:
        """Every input's refresh, and its new basis in its statistic."""
        like: list[list[Tensor]] = []
        sent: list[list[Tensor] | None] = []
        for i, entry in enumerate(inputs):
            statistic = entry.statistic
            facts = torch.zeros(EVIDENCE * statistic.num_components + 1, dtype=torch.float64, device="cpu")
            like.append([statistic.basis, statistic.eigenvalues, facts])
            if i in solved:
                r = solved[i]
                numbers = np.concatenate([r.cosines, r.overlaps, r.explained_variance_ratio, r.gains, [r.finite]])
                sent.append([statistic.basis, statistic.eigenvalues, torch.from_numpy(numbers)])
            else:
                sent.append(None)
        received = self._gathered(inputs, sent, like)
        self.ranks.agree()  # an owner that failed has sent zeros
        results = []
        for i, (entry, (basis, eigenvalues, facts)) in enumerate(zip(inputs, received, strict=True)):
            cosines, overlaps, ratios, gains = facts[:-1].cpu().numpy().reshape(EVIDENCE, -1)
            result = Refreshed(cosines, overlaps, ratios, gains, finite=bool(facts[-1]))
            if i not in solved and result.finite:
                entry.statistic.adopt_(basis, eigenvalues)
            results.append(result)
        return results

    def _gathered(
        self, inputs: Sequence[DistinctInput], sent: Sequence[list[Tensor] | None], like: Sequence[list[Tensor]]
    ) -> list[list[Tensor]]:
        """On every rank, the tensors that each input's owner sends; ``like`` has their shapes, dtypes and devices."""
        rows: list[list[Tensor]] = [[] for _ in range(self.size)]
        for i, entry in enumerate(inputs):
            tensors = sent[i] if sent[i] is not None else like[i]
            assert tensors is not None
            mine = entry.owner == self.rank
            for tensor in tensors:
                raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                rows[entry.owner].append(raw.to(self.ranks.device) if mine else raw.new_empty(0))
        lengths = [0] * self.size
        for entry, tensors in zip(inputs, like, strict=True):
            lengths[entry.owner] += sum(tensor.nbytes for tensor in tensors)
        own = torch.zeros(max(lengths), dtype=torch.uint8, device=self.ranks.device)
        if rows[self.rank]:
            packed = torch.cat(rows[self.rank])
            own[: len(packed)] = packed
        everyone = self.ranks.all_gather(own)
        starts, result = [0] * self.size, []
        for entry, tensors in zip(inputs, like, strict=True):
            received = []
            for tensor in tensors:
                start = starts[entry.owner]
                raw = everyone[entry.owner, start : start + tensor.nbytes].clone()
                received.append(raw.view(tensor.dtype).view(tensor.shape).to(tensor.device))
                starts[entry.owner] += tensor.nbytes
            result.append(received)
        return result

    def _reduce_gram_(self, entry: DistinctInput, statistic: GramStatistic) -> None:
        """Add up a Gram matrix on its owner: one triangle of it, once."""
        upper = torch.ones_like(statistic.gram, dtype=torch.bool).triu_()
        triangle = self.ranks.reduce(statistic.gram[upper], entry.owner)
        if entry.owner == self.rank:
            statistic.gram.zero_()
            statistic.gram[upper] = triangle.to(statistic.gram.device)
            statistic.gram += statistic.gram.triu(1).mT


def _cost(entry: DistinctInput) -> float:
    """Of an input's algebra, relatively: products with d × q, and the d × d eigensolve of a Gram at the end."""
    d, q = entry.statistic.num_features, entry.statistic.num_components
    return float(d * q * q + (d**3 if entry.statistic.kind == "gram" else 0))


def _buckets(inputs: Sequence[DistinctInput]) -> Iterator[list[DistinctInput]]:
    """The inputs in order, so many at a time as ``BUCKET_BYTES`` of their bases hold."""
    bucket: list[DistinctInput] = []
    size = 0
    for entry in inputs:
        if bucket and size + entry.statistic.basis.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += entry.statistic.basis.nbytes
    if bucket:
        yield bucket
