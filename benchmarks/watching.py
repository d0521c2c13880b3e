"""What watching adds to forwards that run anyway: an evaluation, and the reference pass of TRL's DPO trainer.

    python benchmarks/watching.py                          (SmolLM2-135M in bfloat16, both)
    python benchmarks/watching.py --dtype float32 --rounds 3
    python benchmarks/watching.py --of evaluation --json build/watching.json

SmolLM2-135M, LoRA r = 16 on all linear layers, rho 2, real text. Each round runs the same batches three times: as they
are, watched, and as they are again; every layer takes in every batch. What is added is the watched run over the mean of
the two around it, less 1, in processor time of all threads, which other programs on the machine disturb less than they
do wall time. ``statistics()`` at the end is told apart: it is paid once, however long the evaluation is.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from end_to_end import RANK, RHO, load_model
from eva_lora import EvaConfig, watching

CONFIG = EvaConfig(rho=RHO, tau=1.0)  # never converged: what a call costs at most

Run = Callable[[], object]


def evaluation(dtype: torch.dtype, count: int) -> tuple[Any, Run]:
    """Losses of batches of 4 × 256 tokens, as an evaluation computes them."""
    model, batches = load_model(dtype, count)

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False).loss.item()

    return model, run


def reference(dtype: torch.dtype, count: int) -> tuple[Any, Run]:
    """Reference log-probabilities of batches of two pairs, 4 × 256 tokens at most, as TRL's DPO trainer has them."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from eva_lora.cli.demo import load_smollm2, packed_text

    base, tokenizer = load_smollm2()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [row for batch in packed_text(tokenizer, sequences=4, tokens=256)[:count] for row in batch["input_ids"]]
    texts = [tokenizer.decode(row) for row in rows]
    entries = [
        {"prompt": one[: len(one) // 2], "chosen": one[len(one) // 2 :], "rejected": other[len(other) // 2 :]}
        for one, other in zip(texts[::2], texts[1::2], strict=True)
    ]
    arguments = DPOConfig(
        "build/watching", per_device_train_batch_size=2, max_length=256, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights="eva")
    trainer = DPOTrainer(
        base.to(dtype), args=arguments, train_dataset=Dataset.from_list(entries), processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    batches = [*trainer.get_train_dataloader()]
    trainer.model.eval()

    def run() -> None:
        for batch in batches:
            trainer.compute_ref_log_probs(trainer.model, batch)

    return trainer.model, run


def seconds(run: Run) -> float:
    """Processor time, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(model: Any, run: Run, rounds: int) -> dict[str, Any]:
    """What watching adds, as shares of the run without: each round's, and their medians."""
    run()
    with watching(model, CONFIG):  # what is loaded or compiled the first time
        run()
    plain = [seconds(run)]
    added, closing = [], []
    for _ in range(rounds):
        with watching(model, CONFIG) as watch:
            watched = seconds(run)
            end = seconds(watch.statistics)
        plain.append(seconds(run))
        around = statistics.mean(plain[-2:])
        added.append(watched / around - 1)
        closing.append(end / around)
    return {
        "seconds": statistics.median(plain),
        "added": statistics.median(added),
        "added_by_round": [round(share, 4) for share in added],
        "statistics": statistics.median(closing),
    }


OF: dict[str, Callable[[torch.dtype, int], tuple[Any, Run]]] = {"evaluation": evaluation, "reference": reference}


@click.command()
@click.option("--of", "names", type=click.Choice([*OF]), multiple=True, default=[*OF])
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16")
@click.option("--batches", default=12)
@click.option("--rounds", default=5)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], dtype: str, batches: int, rounds: int, out: Path | None) -> None:
    """Measure, and print a line for each."""
    found = {}
    for name in names:
        model, run = OF[name](getattr(torch, dtype), batches)
        found[name] = measure(model, run, rounds)
        one = found[name]
        print(
            f"{name} in {dtype}: {one['seconds']:.2f} s of {batches} batches, watching adds {one['added']:.3f} of it "
            f"(rounds {min(one['added_by_round']):.3f} to {max(one['added_by_round']):.3f}), statistics() "
            f"{one['statistics']:.3f} once",
            flush=True,
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
