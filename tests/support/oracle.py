"""The whole-forward oracle: the rows that a pass takes in, beside those that a plain call of the model brings."""

import copy
from contextlib import contextmanager

import pytest
import torch

from eva_kernels.streaming_svd import Statistic
from eva_lora import EvaConfig, EvaStatistics, collect
from eva_lora.adapters import find_adapter
from eva_lora.collecting import passing
from support.kinds import call

Rows = dict[tuple[str, int], torch.Tensor]  # layer and part -> its rows in the order they came, (n, d)


def rows_taken(model, batches, count, **options) -> tuple[Rows, EvaStatistics]:
    """What a pass over ``count`` batches, or fewer, folds into the statistic of every part of every layer."""
    with recording() as runs:
        statistics = collect(model, batches, EvaConfig(max_batches=count, tau=1.0, **options), progress=False)
    (run,) = runs
    found: Rows = {}
    for stream, entry in enumerate(run.capture.input_of):
        site = run.sites[run.capture.site_of[stream]]
        part = stream - run.capture.streams_of[run.capture.site_of[stream]][0]
        found[site.name, part] = together(entry.statistic.seen if entry is not None else [], site)
    return found, statistics


@contextmanager
def recording():
    """Within it every statistic keeps the rows it holds, and runs are noted as they close."""
    accumulate, clone, closed = Statistic.accumulate_, Statistic.clone, passing.statistics_of
    runs = []

    def accumulate_(self, x, row_mask=None, *, num_rows=None, sign=1):
        accumulate(self, x, row_mask, num_rows=num_rows, sign=sign)
        seen = vars(self).setdefault("seen", [])
        rows = x.detach().clone().reshape(-1, x.shape[-1])
        rows = rows if row_mask is None else rows[row_mask.reshape(-1)]
        if sign > 0:
            seen.append(rows)
        else:  # exactly these rows are in it
            del seen[max(i for i, piece in enumerate(seen) if torch.equal(piece, rows))]

    def clone_(self):
        other = clone(self)
        vars(other)["seen"] = list(vars(self).get("seen", []))
        return other

    def statistics_of(run):
        runs.append(run)
        return closed(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Statistic, "accumulate_", accumulate_)
        patch.setattr(Statistic, "clone", clone_)
        patch.setattr(passing, "statistics_of", statistics_of)
        yield runs


def rows_brought(model, batches, count, forward=call, keep=lambda batch: None) -> Rows:
    """What plain calls of the model bring every layer, adapters switched off; the batches are gone through in rounds.

    ``keep``: from a batch to which of its rows count, (batch, tokens) bool; None: all.
    """
    adapter = find_adapter(model)
    pieces = {(site.name, part): [] for site in adapter.sites for part in range(site.parts)}
    kept = None

    def see(site):
        def hook(module, args, kwargs):
            for given in site.inputs(args, kwargs):
                x = given.tensor.detach().clone()
                rows = torch.cat(list(site.rows.pieces(x))) if site.rows is not None else x.reshape(-1, x.shape[-1])
                pieces[site.name, given.part].append(rows if kept is None else rows[kept.reshape(-1)])

        return hook

    handles = [site.module.register_forward_pre_hook(see(site), with_kwargs=True) for site in adapter.sites]
    model.eval()
    with torch.no_grad(), adapter.disabled():
        for number in range(count):
            batch = batches[number % len(batches)]
            kept = keep(batch)
            forward(model, batch)
    for handle in handles:
        handle.remove()
    sites = {site.name: site for site in adapter.sites}
    return {key: together(rows, sites[key[0]]) for key, rows in pieces.items()}


def together(pieces, site):
    return torch.cat(pieces) if pieces else torch.empty(0, site.in_features)


def assert_rows_are_the_plain_calls(make, batches, count, *, forward=call, keep=lambda batch: None, **options) -> int:
    """Compare the two, bit by bit, on models and batches of their own; returns the pass's num_rows."""
    taken, statistics = rows_taken(make(), copy.deepcopy(batches), count, **options)
    expected = rows_brought(make(), copy.deepcopy(batches), statistics.num_batches, forward, keep)
    assert taken.keys() == expected.keys()
    for key, rows in expected.items():
        assert torch.equal(taken[key], rows), (key, taken[key].shape, rows.shape)
    return statistics.num_rows
