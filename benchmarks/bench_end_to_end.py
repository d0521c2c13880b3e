"""End to end: whole passes on real models and text, beside the forwards they need and PEFT's own.

B1 is SmolLM2-135M with every layer seeing every batch, B2 is MiniLM until its layers have converged;
`end_to_end.py` and `until_converged.py` measure the same and print it.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import end_to_end as b1
import until_converged as b2
from harness.paired import Candidate, Case

FORWARDS = 3  # of the pass' batches, timed beside every pass of B1
FORWARDS_OF_B2 = 40


def means(losses: list[list[float]]) -> Mapping[str, float]:
    """Variance missed, mean over inputs."""
    at_r, at_k = zip(*losses, strict=True)
    return {"variance missed by 16": statistics.mean(at_r), "variance missed by 32": statistics.mean(at_k)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def bench_b1(compare: Callable[..., Any], quick: bool, dtype: torch.dtype) -> None:
    """Every layer sees all 12 batches; the errors of both come from the passes that were timed."""
    count, tokens = (2, 32) if quick else (12, 256)
    model, batches = b1.load_model(dtype, count, tokens)
    last: dict[str, Any] = {}
    exact: dict[str, Any] = {}

    def scatters() -> dict[str, Any]:
        if not exact:
            exact.update(b1.exact_scatters(model, batches))
        return exact

    def one_pass() -> Any:
        last["ours"] = b1.eva_pass(model, batches, "auto", None)
        return last["ours"]

    def ours() -> None:
        if "parts" in last:
            one_pass()
        else:  # the first call, whose time is not used
            last["parts"] = b1.parts(one_pass)

    def peft() -> None:
        last["PEFT"] = b1.peft_pass(model, batches)[1]

    def our_errors() -> Mapping[str, float]:
        collected, plan = last["ours"]
        found = means(b1.losses_of(collected, scatters()))
        if dtype == torch.float32:
            return found
        moved, budget = b1.ranks_moved(plan, b1.eva_pass(model, batches, "gram", None)[1])
        return {**found, "ranks moved": moved / budget}

    def peft_errors() -> Mapping[str, float]:
        return means([e.losses(last["PEFT"][name].components_) for name, e in scatters().items()])

    forwards = batches[:FORWARDS]
    found = compare(
        Case(
            "End to end",
            f"B1: SmolLM2-135M, {len(batches)} x 4 x {tokens} tokens, {str(dtype).removeprefix('torch.')}",
            Candidate(ours, our_errors, long=True),
            {"PEFT IncrementalPCA": Candidate(peft, peft_errors, long=True)},
            Candidate(lambda: b1.full_forward(model, forwards), long=True),
            forward_share=len(forwards) / len(batches),
            dtype=dtype,
            facts={"model": "SmolLM2-135M", "benchmark": "B1", "batches": len(batches)},
        )
    )
    collected = last["ours"][0]
    parts = last["parts"]
    losses = {"ours": b1.losses_of(collected, exact)}
    losses["PEFT"] = [e.losses(last["PEFT"][name].components_) for name, e in exact.items()]
    worse = sum(a[0] > b[0] + 1e-4 for a, b in zip(losses["ours"], losses["PEFT"], strict=True))
    found["facts"] |= {
        "parts": {part: seconds / sum(parts.values()) for part, seconds in parts.items()},
        "bytes of states": sum(entry.nbytes for entry in collected.inputs),
        "inputs compared": len(exact),
        "inputs worse than PEFT by 1e-4": worse,
    }


def bench_b2(compare: Callable[..., Any], quick: bool) -> None:
    """The paper's criterion until done, beside PEFT; and every criterion on equal data, the default with ours."""
    base, batches = b2.load()
    options: dict[str, Any] = {"max_batches": 3} if quick else {}
    exact = b2.exact_scatters(b2.with_lora(base), batches[:3] if quick else batches)
    fresh = [b2.with_lora(base) for _ in range(3 if quick else 12)]  # every run needs a model of its own
    kept: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def candidate(name: str, run: Callable[[Any], int]) -> Candidate:
        def call() -> None:
            kept[name] = fresh.pop() if fresh else b2.with_lora(base)
            counts[name] = run(kept[name])

        def errors() -> Mapping[str, float]:
            shares = b2.captured(kept[name], exact)
            return {"variance missed": 1 - statistics.mean(shares), "at the worst layer": 1 - min(shares)}

        return Candidate(call, errors, long=True)

    peers = {} if quick else {"PEFT get_eva_state_dict": candidate("PEFT", b2.theirs(batches))}
    for criterion in () if quick else ("component", "subspace", "captured"):
        name = f"ours, {criterion}, equal data"
        peers[name] = candidate(name, b2.ours(batches, convergence=criterion, equal_data=True))
    ours = candidate("ours", b2.ours(batches, convergence="component", equal_data=False, **options))
    plain, forwards = b2.with_lora(base), batches[: 3 if quick else FORWARDS_OF_B2]
    found = compare(
        Case(
            "End to end",
            "B2: MiniLM until converged, component, 4 x 128 tokens, float32",
            ours,
            peers,
            Candidate(lambda: b2.seconds_of_a_forward(plain, forwards), long=True),
            forward_share=lambda: len(forwards) / counts["ours"],
            facts={"model": "MiniLM", "benchmark": "B2"},
        )
    )
    found["facts"]["batches"] = counts
