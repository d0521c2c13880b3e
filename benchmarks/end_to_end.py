"""B1: what EVA costs beside the forward passes it needs, and how much variance it captures, against PEFT.

    python benchmarks/end_to_end.py --dtype float32
    python benchmarks/end_to_end.py --dtype bfloat16 --no-peft

SmolLM2-135M, real text packed to 4 × 256 tokens, LoRA r = 16 on all linear layers, rho 2, 12 batches, every
layer sees every batch. F is the median full forward, E is ``collect`` and ``plan`` per batch, P is a step of
PEFT's ``IncrementalPCA`` fed by hooks on the same distinct inputs, forward included: its own pass, without the hashing
it begins with. All are measured in one run.
"""

import statistics
import time
import warnings
from typing import Any

import click
import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from eva_lora import EvaConfig, collect, plan
from eva_lora.demo import load_smollm2, packed_text

RANK, RHO = 16, 2.0


def full_forward(model: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    """Seconds of each full forward: adapters off, LM head included, no cache."""
    times = []
    with torch.no_grad(), model.disable_adapter():
        for batch in batches:
            start = time.perf_counter()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            times.append(time.perf_counter() - start)
    return times


def lora_inputs(model: Any, every: int) -> dict[str, LoraLayer]:
    """One layer per distinct input, of every ``every``-th block."""
    names = ("q_proj", "o_proj", "gate_proj", "down_proj")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and n.endswith(names)}
    return {n: m for n, m in layers.items() if int(n.split(".layers.")[1].split(".")[0]) % every == 0}


class PeftPass:
    """PEFT's statistic: one IncrementalPCA per distinct input, fed by hooks."""

    def __init__(self, layers: dict[str, LoraLayer]) -> None:
        k = round(RANK * RHO)
        self.layers = layers
        self.pca = {n: IncrementalPCA(n_components=k, lowrank=True, lowrank_seed=42) for n in layers}

    def run(self, model: Any, batches: list[dict[str, Tensor]]) -> float:
        """Mean seconds per batch."""

        def hook(pca: IncrementalPCA) -> Any:
            return lambda _, args: (pca.partial_fit(rows_of(args)), None)[1]

        handles = [layer.register_forward_pre_hook(hook(self.pca[n])) for n, layer in self.layers.items()]
        seconds = full_forward(model, batches)
        for handle in handles:
            handle.remove()
        return statistics.mean(seconds)


def rows_of(args: tuple[Tensor, ...]) -> Tensor:
    return args[0].flatten(0, -2).float()


def record(model: Any, layers: dict[str, LoraLayer], batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """The rows that layers are fed, per batch."""
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kept=rows[name]: kept.append(rows_of(args)))
        for name, layer in layers.items()
    ]
    full_forward(model, batches)
    for handle in handles:
        handle.remove()
    return rows


def losses(components: Tensor, rows: list[Tensor]) -> list[float]:
    """1 − captured / optimum over the top 16 and the top 32, against the exact float64 covariance of the rows."""
    x = torch.cat(rows).double()
    x -= x.mean(0)
    scatter = x.T @ x
    values = torch.linalg.eigvalsh(scatter).flip(0)
    result = []
    for r in (RANK, round(RANK * RHO)):
        v = components[:r].double()
        result.append(float(1 - torch.trace(v @ scatter @ v.T) / values[:r].sum()))
    return result


def summary(pairs: list[list[float]]) -> str:
    at_r, at_k = zip(*pairs, strict=True)
    return f"{statistics.mean(at_r):.1e} at r = 16, {statistics.mean(at_k):.1e} over the top 32"


@click.command()
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--statistic", type=click.Choice(["auto", "gram", "subspace"]), default="auto", show_default=True)
@click.option("--batches", "count", default=12, show_default=True)
@click.option("--oversampling", type=float, default=None)
@click.option("--with-peft/--no-peft", default=True, show_default=True)
@click.option("--with-accuracy/--no-accuracy", default=True, show_default=True)
def main(
    dtype: str, statistic: str, count: int, oversampling: float | None, with_peft: bool, with_accuracy: bool
) -> None:
    warnings.simplefilter("ignore")
    base, tokenizer = load_smollm2()
    batches = packed_text(tokenizer, sequences=4, tokens=256)[:count]
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights="eva")
    model = peft.get_peft_model(base.to(getattr(torch, dtype)).eval(), lora)
    layers = lora_inputs(model, every=1)
    config = EvaConfig(
        rho=RHO, tau=1.0, equal_data=True, max_batches=count, statistic=statistic, oversampling=oversampling
    )

    full_forward(model, batches[:2])
    forwards = full_forward(model, batches[:6])
    start = time.perf_counter()
    collected = collect(model, batches, config, progress=False)
    eva_plan = plan(collected)
    step = (time.perf_counter() - start) / count
    forwards += full_forward(model, batches[:6])
    forward = statistics.median(forwards)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}, statistic={statistic}, {count} batches"
    )
    print(f"F  {forward:7.3f} s   full forward, median of {len(forwards)} ({min(forwards):.3f} to {max(forwards):.3f})")
    print(f"E  {step:7.3f} s   collect and plan, per batch             E/F = {step / forward:.2f}")
    for part in ("forward", "refresh"):
        print(f"   {collected.seconds[part] / count:7.3f} s   of it {part}")
    megabytes = sum(entry.nbytes for entry in collected.inputs) / 2**20
    print(f"   states {megabytes:.0f} MiB, ranks {sum(eva_plan.ranks.values())}")

    if with_peft:
        recorder = PeftPass(layers)
        peft_step = recorder.run(model, batches if with_accuracy else batches[:3])
        print(f"P  {peft_step:7.3f} s   PEFT's statistic, forward included        P/E = {peft_step / step:.1f}")
    if with_peft and with_accuracy:
        input_of = {site.name: collected.inputs[site.input] for site in collected.sites}
        ours, theirs = [], []
        for name, rows in record(model, lora_inputs(model, every=3), batches).items():
            ours.append(losses(input_of[name.removeprefix("base_model.model.")].components, rows))
            theirs.append(losses(recorder.pca[name].components_, rows))
        worse = sum(a[0] > b[0] + 1e-4 for a, b in zip(ours, theirs, strict=True))
        print(f"mean loss: ours {summary(ours)}; PEFT {summary(theirs)}; ours worse on {worse} of {len(ours)} inputs")


if __name__ == "__main__":
    main()
