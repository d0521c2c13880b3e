"""What a pass costs the host of a GPU, which launches while the device works: counted and timed, without a GPU.

    python benchmarks/host.py             # the table; exits 1 where a count is more than 10 % above the recorded one
    python benchmarks/host.py --record    # and keep these counts as the ones to compare with

Kernels are launched and do nothing (`null_device.py`). Updates are of real shapes; forwards are of real depths and tiny
widths, so that the host sets their pace, in bfloat16 with LoRA on all linear layers.

Counts decide, times are shown: on a shared machine the process time of one call moves by a quarter from minute to
minute, and a change of 10 % does not show. A count is the same in every run of the same Python, PyTorch and Triton;
with others nothing is compared. What is counted: launches of kernels, PyTorch's operators (allocations among them),
calls of functions that are not written in Python, and Python's instructions. Times are the least process time of one
thread; of hooks, in calls of modules that do nothing, with what a forward has brought.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench_hooks import nothing_folded
from eva_kernels import GramStatistic, Statistic, SubspaceStatistic
from eva_lora import EvaConfig
from eva_lora.adapters import ModelOutline, find_adapter
from eva_lora.collecting.forwards import Forwards
from eva_lora.collecting.masks import row_mask
from eva_lora.collecting.restoring import borrowed
from eva_lora.collecting.rows import RowMask
from eva_lora.collecting.run import Run
from harness.machine import processor
from null_device import Launches, null_device
from shapes import MODELS, Model

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "host.json"
SHOWN = ("Qwen2.5-0.5B", "Llama-3-8B", "Llama-3-70B")
ROWS, COLUMNS = 2048, 80  # of a batch; of a basis at r = 16 and rho 2
ALLOWED = 0.10  # what a count may grow by
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS, RANK = 96, 4  # of a batch of the tiny models; with rho 2 their bases have 48 columns
REPEATS, CALLS = 15, 20
HOOK_REPEATS = 300  # a difference of two short times: that either be undisturbed takes many


@dataclass(frozen=True)
class Counts:
    """What one call does; differences of two where something is taken out."""

    launches: int
    operators: int
    calls: int
    instructions: int

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(mine - its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def grown(self, before: "Counts") -> list[str]:
        """Which counts are more than ``ALLOWED`` above those before."""
        mine, its = asdict(self), asdict(before)
        return [name for name, value in mine.items() if value > its[name] + ALLOWED * abs(its[name])]


COUNTED = tuple(field.name for field in fields(Counts))


class _Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], object], launches: Launches) -> Counts:
    """Counts of one call, which should have been made before: what is made once is not in it."""
    before = launches.count
    with _Operators() as operators:
        call()
    launched = launches.count - before
    steps, nothing = _steps(call), _steps(lambda: None)
    return Counts(launched, operators.count, *(mine - its for mine, its in zip(steps, nothing, strict=True)))


def _steps(call: Callable[[], object]) -> tuple[int, int]:
    """Calls of functions that are not written in Python, and Python's instructions, of one call and what counts it."""
    steps = {"c_call": 0, "opcode": 0}

    def trace(frame: Any, event: str, argument: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps["opcode"] += event == "opcode"
        return trace

    def profile(frame: Any, event: str, argument: object) -> None:
        steps["c_call"] += event == "c_call"

    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.setprofile(profile)
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(tracing)
        sys.setprofile(profiling)
    return steps["c_call"], steps["opcode"]


def seconds(calls: list[Callable[[], object]], number: int, repeats: int = REPEATS) -> list[float]:
    """Least process time of each call, all of them taking turns: what disturbs one only adds to it."""
    least = [float("inf") for _ in calls]
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.process_time()
            for _ in range(number):
                call()
            least[i] = min(least[i], (time.process_time() - start) / number)
    return least


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    counts: Counts
    microseconds: float


def update_figures(name: str, launches: Launches) -> Iterator[tuple[str, Figure]]:
    """One update of one input, as the pass makes it."""
    kinds: tuple[tuple[type[Statistic], str], ...] = ((SubspaceStatistic, "attention"), (SubspaceStatistic, "down"))
    kinds += ((GramStatistic, "attention"),) * (MODELS[name].width <= 4096)
    for kind, fed in kinds:
        width = MODELS[name].input(fed).width
        statistic = kind(width, COLUMNS, impl="triton")
        x, mask = torch.zeros(8, ROWS // 8, width, dtype=torch.bfloat16), torch.ones(8, ROWS // 8, dtype=torch.bool)
        statistic.accumulate_(x[:1, :COLUMNS], num_rows=COLUMNS)  # it starts
        for masked in (False, True):

            def update(statistic: Statistic = statistic, x: Any = x, mask: Any = mask if masked else None) -> None:
                statistic.accumulate_(x, mask, num_rows=ROWS)

            for _ in range(3):
                update()
            counts = count(update, launches)
            (taken,) = seconds([update], CALLS)
            case = f"{name}: an update, {statistic.kind}, {ROWS} x {width}{', masked' if masked else ''}"
            yield case, Figure(counts, 1e6 * taken)


@contextmanager
def tiny(model: Model, dtype: torch.dtype) -> Iterator[tuple[Any, ModelOutline, Run]]:
    """A transformer of a model's depth, ready for a pass and not yet hooked, and the run that would hook it."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=model.blocks, vocab_size=128, **TINY)
    lora = peft.get_peft_model(
        transformers.LlamaForCausalLM(config).to(dtype), peft.LoraConfig(r=RANK, target_modules="all-linear")
    )
    adapter, settings, outline = find_adapter(lora), EvaConfig(impl="triton", statistic="subspace"), ModelOutline(lora)
    run = Run(adapter, settings)
    with borrowed(outline), adapter.disabled():
        yield lora, outline, run


def calls_of(run: Run, forward: Callable[[], object]) -> list[tuple[nn.Module, torch.Tensor]]:
    """The inputs of hooked layers in a forward, in order, each with a module that does nothing and is hooked alike."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    with ExitStack() as stack:
        for i, site in enumerate(run.sites):
            stand_in = nn.Identity()
            stand_in.register_forward_pre_hook(run.capture._hook(i), with_kwargs=True)
            take = lambda _, args, stand_in=stand_in: calls.append((stand_in, args[0]))  # noqa: E731
            stack.callback(site.module.register_forward_pre_hook(take).remove)
        with run.capture.batch(RowMask(None, 0), only=()):
            forward()
    return calls


def replay(calls: list[tuple[nn.Module, torch.Tensor]]) -> None:
    for module, x in calls:
        module(x)


def pass_figures(name: str, launches: Launches) -> Iterator[tuple[str, Figure]]:
    """A forward, what hooked layers and a batch add to it, and a refresh of all inputs.

    The forward is one in float32, of which a CPU makes less ado; what is added to it is of bfloat16 rows.
    """
    ids = torch.arange(TOKENS).view(2, TOKENS // 2)
    mask = torch.ones_like(ids)
    mask[1, TOKENS // 3 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with ExitStack() as stack:
        single, *_ = stack.enter_context(tiny(MODELS[name], torch.float32))
        model, outline, run = stack.enter_context(tiny(MODELS[name], torch.bfloat16))
        hooked = calls_of(run, lambda: model(**batch))
        bare = [(nn.Identity(), x) for _, x in hooked]
        rows = row_mask(batch, run.config, None)
        forwards = Forwards(model, outline, run, lambda *_: replay(hooked), None)

        def with_hooks() -> None:
            with nothing_folded(), run.capture.batch(rows):
                replay(hooked)

        def whole_batch() -> None:
            run.finish_batch(forwards.fold(batch))

        for _ in range(3):
            whole_batch()  # the first starts and refreshes
            for entry in run.capture.inputs:
                entry.pending_batches = -(2**40)  # no refresh is due any more
        calls: list[Callable[[], object]] = [
            lambda: single(**batch), whole_batch, lambda: replay(bare), with_hooks,
        ]  # fmt: skip
        for call in calls:
            call()
        forward, whole, nothing, hooks = (count(call, launches) for call in calls)
        taken = [1e6 * each for each in (*seconds(calls[:2], 1), *seconds(calls[2:], 1, HOOK_REPEATS))]
        shape = f"{len(run.sites)} layers, {len(run.capture.inputs)} inputs"
        yield f"{name}: a forward, {MODELS[name].blocks} blocks", Figure(forward, taken[0])
        yield f"{name}: its hooks, {shape}", Figure(hooks - nothing, taken[3] - taken[2])
        yield f"{name}: a batch beside it", Figure(whole - nothing, taken[1] - taken[2])

        def refresh() -> None:
            for entry in run.capture.inputs:
                statistic = entry.statistic
                statistic.image().copy_(statistic.sample)  # rows without a leading direction
                statistic.pending_rows = TOKENS
                statistic.square_sum.fill_(statistic.num_features)
                statistic.column_sum.zero_()
            run.statistics.refresh_(run.capture.inputs)

        refresh()
        counts = count(refresh, launches)
        yield f"{name}: a refresh, with its arithmetic", Figure(counts, 1e6 * seconds([refresh], 1)[0])


def table(figures: dict[str, Figure], recorded: dict[str, Counts]) -> str:
    lines = [
        "| | µs | launches | operators | calls into C | Python's instructions | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for case, figure in figures.items():
        before = recorded.get(case)
        if before is None:
            remark = "new"
        else:
            grown = figure.counts.grown(before)
            fewer = [name for name in before.grown(figure.counts) if name not in grown]
            remark = "; ".join([f"**more {name}**" for name in grown] + [f"fewer {name}" for name in fewer])
        cells = [f"{value:,}" for value in asdict(figure.counts).values()]
        lines.append(f"| {case} | {figure.microseconds:,.1f} | {' | '.join(cells)} | {remark} |")
    return "\n".join(lines)


def summary(name: str, figures: dict[str, Figure]) -> str:
    """A hook, and the pass over the forward, in time."""

    def of(what: str) -> float:
        return next(figure.microseconds for case, figure in figures.items() if case.startswith(f"{name}: {what}"))

    model, forward = MODELS[name], of("a forward")
    return (
        f"{name}: {of('its hooks') / model.layers:.1f} µs a hooked layer; "
        f"a pass takes {1 + of('a batch beside it') / forward:.2f} forwards of {forward / 1e3:.1f} ms host time"
    )


def versions() -> dict[str, str]:
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.partition("+")[0],
        "triton": triton.__version__,
    }


def measure(names: tuple[str, ...] = SHOWN) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    torch.set_num_threads(1)
    with null_device() as launches, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            figures.update(update_figures(name, launches))
            figures.update(pass_figures(name, launches))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    figures, here = measure(), versions()
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"versions": here, "figures": {}}
    recorded: dict[str, Counts] = {}
    if known["versions"] == here:
        recorded = {case: Counts(*(entry[name] for name in COUNTED)) for case, entry in known["figures"].items()}
    else:
        print(f"recorded with {known['versions']}, here {here}: not compared\n")
    print(table(figures, recorded), "", *(summary(name, figures) for name in SHOWN), sep="\n")
    if arguments.record:
        kept = {
            case: {**asdict(figure.counts), "microseconds": round(figure.microseconds, 1)}
            for case, figure in figures.items()
        }
        RECORDED.write_text(
            json.dumps({"versions": here, "processor": processor(), "figures": kept}, indent=1, ensure_ascii=False)
            + "\n"
        )
        return 0
    return int(any(figure.counts.grown(recorded[case]) for case, figure in figures.items() if case in recorded))


if __name__ == "__main__":
    sys.exit(main())
