"""Hook overhead: a forward whose layers are hooked as in a pass, with the folding of rows itself taken out.

The batch is so small that Python sets the pace; both forwards are those of the same weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from end_to_end import load_model
from eva_kernels import Statistic
from eva_lora import EvaConfig
from eva_lora.adapters import find_adapter
from eva_lora.collecting.masks import row_mask
from eva_lora.collecting.run import Run
from harness.paired import Candidate, Case
from until_converged import load, with_lora

TOKENS = 8


@contextmanager
def nothing_folded() -> Iterator[None]:
    fold = Statistic.accumulate_
    Statistic.accumulate_ = lambda *_arguments, **_options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Statistic.accumulate_ = fold  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["MiniLM", "SmolLM2-135M"])
def bench_hooks(compare: Callable[..., Any], quick: bool, name: str) -> None:
    if quick and name != "MiniLM":
        pytest.skip("--quick")
    models = [with_lora(load()[0]) if name == "MiniLM" else load_model(torch.float32, 1)[0] for _ in range(2)]
    plain, hooked = models
    ids = torch.arange(1000, 1000 + TOKENS)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapter, config = find_adapter(hooked), EvaConfig()
    run, mask = Run(adapter, config), row_mask(batch, config, None)

    def forward() -> Tensor:
        return next(iter(plain(**batch).values()))

    def with_hooks() -> Tensor:
        with run.capture.batch(mask):
            return next(iter(hooked(**batch).values()))

    def errors() -> Mapping[str, float]:
        return {"output": float((with_hooks() - forward()).abs().max())}

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(nothing_folded())
        stack.enter_context(plain.disable_adapter())
        stack.enter_context(adapter.disabled())
        stack.enter_context(run.capture.hooks())
        sites = len(adapter.sites)
        found = compare(
            Case(
                "Hooks",
                f"{name}, {sites} hooked layers, 1 x {TOKENS} tokens, float32",
                Candidate(with_hooks, errors),
                forward=Candidate(forward),
                facts={"model": name, "sites": sites},
            )
        )
        forward_seconds = found["seconds"]["forward"]["median"]
        found["facts"]["microseconds a hook"] = 1e6 * (found["seconds"]["ours"]["median"] - forward_seconds) / sites
