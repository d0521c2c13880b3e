"""B1: what EVA costs beside the forward passes it needs, and how much variance it captures, against PEFT.

    python benchmarks/end_to_end.py --dtype float32
    python benchmarks/end_to_end.py --dtype bfloat16
    python benchmarks/end_to_end.py --dtype bfloat16 --device cuda
    python benchmarks/end_to_end.py --batches 40 --tokens 336 --no-peft      (accuracy with more data)

SmolLM2-135M, real text packed to 4 × 256 tokens, LoRA r = 16 on all linear layers, rho 2, 12 batches, every layer sees
every batch. F is the median full forward, E is ``collect`` and ``plan`` per batch, P is a step of
``peft.get_eva_state_dict`` over the same batches, forward included, without the hashing pass it begins with; beside it,
what PEFT's ``IncrementalPCA`` alone takes, fed by hooks on the same distinct inputs. All are measured in one run,
several passes with forwards before and after each: E is their median, and E/F that of each one's ratio to the forwards
around it; P/E is the ratio to the passes around PEFT's. The shares of E's parts come from a further, instrumented pass.
The model is called alike in all of them, without labels; E/F with labels, a loss in both, is printed beside.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click
import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from eva_kernels.streaming_svd import Statistic
from eva_lora import EvaConfig, EvaPlan, EvaStatistics, collect, plan
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.collecting.capture import Capture
from harness.machine import synchronize
from harness.memory import resident_peak
from peers import variance_missed
from timing import time_calls

RANK, RHO = 16, 2.0
FIELDS = ("input_ids", "attention_mask")  # what models are called with, and "labels" where they compute a loss
Batches = list[dict[str, Tensor]]


def load_model(dtype: torch.dtype, count: int, tokens: int = 256, device: str = "cpu") -> tuple[Any, Batches]:
    """SmolLM2-135M with LoRA on all linear layers, and that many batches of real text, both on ``device``."""
    base, tokenizer = load_smollm2()
    packed = packed_text(tokenizer, sequences=4, tokens=tokens)[:count]
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in packed]
    eva = peft.EvaConfig(rho=RHO, tau=1.0)
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights="eva", eva_config=eva)
    return peft.get_peft_model(base.to(device, dtype).eval(), lora), batches


def recorded(model: Any, batches: Batches, name: str) -> list[Tensor]:
    """The rows, (n, d) float32 a batch, that the layer whose name ends so is fed."""
    layer = next(m for n, m in model.named_modules() if isinstance(m, LoraLayer) and n.endswith(name))
    rows: list[Tensor] = []
    with fed({name: layer}, lambda _, x: rows.append(x.clone())):
        full_forward(model, batches)
    return rows


def fields_of(batches: Batches, *, loss: bool = False) -> Batches:
    """What the model is called with: no labels, unless it is to compute its loss."""
    return [{name: batch[name] for name in (*FIELDS, *(["labels"] if loss else []))} for batch in batches]


def full_forward(model: Any, batches: Batches, *, loss: bool = False) -> list[float]:
    """Seconds of each full forward: adapters off, LM head included, no cache; the batch's loss too where asked for."""
    times = []
    with torch.no_grad(), model.disable_adapter():
        for batch in fields_of(batches, loss=loss):
            synchronize(model.device.type)
            start = time.perf_counter()
            model(**batch, use_cache=False)
            synchronize(model.device.type)
            times.append(time.perf_counter() - start)
    return times


def lora_inputs(model: Any, every: int) -> dict[str, LoraLayer]:
    """One layer per distinct input, of every ``every``-th block."""
    names = ("q_proj", "o_proj", "gate_proj", "down_proj")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and n.endswith(names)}
    return {n: m for n, m in layers.items() if int(n.split(".layers.")[1].split(".")[0]) % every == 0}


@contextmanager
def fed(layers: dict[str, LoraLayer], take: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Within it ``take`` is given the rows (n, d) float32 of every layer's input."""

    def hook(name: str) -> Any:
        return lambda _, args: (take(name, args[0].flatten(0, -2).float()), None)[1]

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    yield
    for handle in handles:
        handle.remove()


class ExactScatter:
    """Σ (x − s)(x − s)ᵀ in float64 about the first batch's mean, and what a basis captures of it."""

    def __init__(self) -> None:
        self.shift: Tensor | None = None
        self.moment, self.total, self.rows = torch.zeros(()), torch.zeros(()), 0

    def add(self, x: Tensor) -> None:
        z = x.double()
        self.shift = z.mean(0) if self.shift is None else self.shift
        z = z - self.shift
        self.moment, self.total, self.rows = self.moment + z.T @ z, self.total + z.sum(0), self.rows + len(z)

    def captured(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Variance along each of the orthonormal rows, and all eigenvalues of the scatter, descending."""
        scatter = self.moment - torch.outer(self.total, self.total) / self.rows
        v = components.to(scatter)
        return ((v @ scatter) * v).sum(1), torch.linalg.eigvalsh(scatter).flip(0)

    def losses(self, components: Tensor) -> list[float]:
        """Variance missed by the leading 16 and by the leading 32 components."""
        captured, values = self.captured(components[: round(RANK * RHO)])
        return [variance_missed(captured, values, r) for r in (RANK, round(RANK * RHO))]

    def missed_by(self, lora_a: Tensor) -> float:
        """Variance missed by the row space of A, (r, d), whose rows need not be orthonormal."""
        rows = torch.linalg.qr(lora_a.double().T).Q.T
        return variance_missed(*self.captured(rows), len(rows))


def eva_pass(
    model: Any, batches: Batches, statistic: str, oversampling: float | None, *, loss: bool = False
) -> tuple[EvaStatistics, EvaPlan]:
    collected = collect(
        model,
        fields_of(batches, loss=loss),
        EvaConfig(rho=RHO, tau=1.0, max_batches=len(batches), statistic=statistic, oversampling=oversampling),  # type: ignore[arg-type]
        progress=False,
    )
    return collected, plan(collected)


def parts(run: Callable[[], tuple[EvaStatistics, EvaPlan]]) -> dict[str, float]:
    """Seconds of a pass by part."""
    start = time.perf_counter()
    with time_calls(Capture, "_fold") as hooks, time_calls(Statistic, "accumulate_") as products:
        collected, _ = run()
    total = time.perf_counter() - start
    forward = collected.seconds["forward"] - hooks[0]
    algebra = collected.seconds["refresh"]
    rest = total - forward - products[0] - algebra
    return {"forward": forward, "products": products[0], "small algebra": algebra, "Python": rest}


def peft_pass(model: Any, batches: Batches) -> tuple[float, dict[str, IncrementalPCA]]:
    """Seconds of a batch under PEFT's statistic, forward included, and what it found of every input."""
    layers = lora_inputs(model, every=1)
    pca = {n: IncrementalPCA(n_components=round(RANK * RHO), lowrank=True, lowrank_seed=42) for n in layers}
    with fed(layers, lambda name, x: pca[name].partial_fit(x)):
        seconds = statistics.mean(full_forward(model, batches))
    return seconds, pca


class Enough(Exception):
    """Raised in the place of a forward, since PEFT's pass would go on until it has converged."""


def peft_steps(model: Any, batches: Batches) -> float:
    """Seconds of a step of PEFT's own pass, mean over one step a batch."""
    starts: list[float] = []

    def forward(inner: Any, inputs: dict[str, Tensor]) -> None:
        synchronize(inner.device.type)
        starts.append(time.perf_counter())
        if len(starts) == len(batches) + 2:  # the first call is for hashes
            raise Enough
        with torch.no_grad(), inner.disable_adapter():
            inner(**{name: inputs[name] for name in FIELDS}, use_cache=False)

    with suppress(Enough):
        peft.get_eva_state_dict(model, batches, forward_fn=forward, show_progress_bar=False)
    for module in model.modules():
        module._forward_hooks.clear()  # which PEFT leaves behind; the model has no others
    return (starts[-1] - starts[1]) / len(batches)


def exact_scatters(model: Any, batches: Batches) -> dict[str, ExactScatter]:
    """Of one input of every kind in every third block."""
    exact = {name: ExactScatter() for name in lora_inputs(model, every=3)}
    with fed(lora_inputs(model, every=3), lambda name, x: exact[name].add(x)):
        full_forward(model, batches)
    return exact


def losses_of(collected: EvaStatistics, exact: dict[str, ExactScatter]) -> list[list[float]]:
    input_of = {site.name: collected.inputs[site.input] for site in collected.sites}
    return [e.losses(input_of[name.removeprefix("base_model.model.")].components) for name, e in exact.items()]


def ranks_moved(one: EvaPlan, other: EvaPlan) -> tuple[float, int]:
    """Ranks that lie elsewhere in the other plan, and the budget."""
    moved = sum(abs(other.ranks[name] - rank) for name, rank in one.ranks.items()) / 2
    return moved, sum(one.ranks.values())


def summary(pairs: list[list[float]]) -> str:
    at_r, at_k = zip(*pairs, strict=True)
    return f"{statistics.mean(at_r):.1e} at r = 16, {statistics.mean(at_k):.1e} over the top 32"


@click.command()
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--statistic", type=click.Choice(["auto", "gram", "subspace"]), default="auto", show_default=True)
@click.option("--batches", "count", default=12, show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Per sequence; four sequences a batch.")
@click.option("--oversampling", type=float, default=None)
@click.option("--passes", default=3, show_default=True, help="Of ours, to take the median of.")
@click.option("--with-peft/--no-peft", default=True, show_default=True)
@click.option("--with-accuracy/--no-accuracy", default=True, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(
    dtype: str,
    statistic: str,
    count: int,
    tokens: int,
    oversampling: float | None,
    passes: int,
    with_peft: bool,
    with_accuracy: bool,
    device: str,
) -> None:
    warnings.simplefilter("ignore")
    model, batches = load_model(getattr(torch, dtype), count, tokens, device)
    name = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}, {dtype}, statistic={statistic}")
    print(f"{len(batches)} batches of 4 x {tokens} tokens")

    def run(kind: str = statistic, *, loss: bool = False) -> tuple[EvaStatistics, EvaPlan]:
        return eva_pass(model, batches, kind, oversampling, loss=loss)

    def timed(*, loss: bool = False) -> float:
        synchronize(device)
        start = time.perf_counter()
        run(loss=loss)
        synchronize(device)
        return (time.perf_counter() - start) / len(batches)

    full_forward(model, batches[:2])
    around = [full_forward(model, batches[:6])]  # before the first pass, and after each
    steps = []
    for _ in range(passes):
        steps.append(timed())
        around.append(full_forward(model, batches[:6]))
    forwards, step = [seconds for some in around for seconds in some], statistics.median(steps)
    forward = statistics.median(forwards)
    ratios, to_mean = (
        [step / middle(around[i] + around[i + 1]) for i, step in enumerate(steps)]
        for middle in (statistics.median, statistics.mean)
    )
    print(f"F  {forward:7.3f} s   full forward, median of {len(forwards)} ({min(forwards):.3f} to {max(forwards):.3f})")
    print(f"E  {step:7.3f} s   collect and plan, per batch, median of {passes} ({min(steps):.3f} to {max(steps):.3f})")
    print(f"E/F = {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"   over the mean forward, as E is a mean: {statistics.median(to_mean):.2f}")
    lossy = [full_forward(model, batches[:3], loss=True)]
    with_loss = timed(loss=True)
    lossy.append(full_forward(model, batches[:3], loss=True))
    print(f"   with labels, a loss in both: {with_loss / statistics.median(lossy[0] + lossy[1]):.2f}")
    shares = parts(run)
    print("   of it " + ", ".join(f"{part} {value / sum(shares.values()):.1%}" for part, value in shares.items()))

    full, full_with_loss = (
        resident_peak(lambda loss=loss: full_forward(model, batches[:3], loss=loss), device) or 0  # type: ignore[misc]
        for loss in (False, True)
    )
    peak = resident_peak(run, device) or 0
    collected, eva_plan = run()
    states = sum(entry.nbytes for entry in collected.inputs)
    widest = max(entry.components.shape[0] for entry in collected.inputs)
    projected = 4 * 4 * tokens * widest  # float32
    extra = f"{(peak - full) / 2**20:.0f} MiB; over one with its loss: {(peak - full_with_loss) / 2**20:.0f}"
    print(f"   peak memory over a full forward's: {extra}")
    print(f"   states {states / 2**20:.0f} MiB, P {projected / 2**20:.1f}")

    if with_peft:
        before = timed()
        peft_step = peft_steps(model, batches)
        between = timed()
        alone, pca = peft_pass(model, batches)
        ratio, alone_ratio = 2 * peft_step / (before + between), 2 * alone / (between + timed())
        print(f"P  {peft_step:7.3f} s   a step of PEFT's own pass                 P/E = {ratio:.1f}")
        print(f"   {alone:7.3f} s   its statistic and the forward alone       {alone_ratio:.1f}")
    if with_accuracy:
        exact = exact_scatters(model, batches)
        ours = losses_of(collected, exact)
        print(f"mean loss on {len(ours)} inputs: {summary(ours)}")
        if with_peft:
            theirs = [e.losses(pca[n].components_) for n, e in exact.items()]
            worse = sum(a[0] > b[0] + 1e-4 for a, b in zip(ours, theirs, strict=True))
            print(f"PEFT's mean loss: {summary(theirs)}; ours worse by more than 1e-4 on {worse} of {len(ours)}")
        moved, budget = ranks_moved(eva_plan, run("gram")[1])
        print(f"ranks moved against the plan from exact statistics: {moved:.0f} of {budget} ({moved / budget:.2%})")


if __name__ == "__main__":
    main()
