import pytest

from support.benchmark_results import entry, results_of


@pytest.fixture
def results():
    missed = {name: {"variance missed by 16": 1e-3, "variance missed by 32": 2e-3} for name in ("ours", "PEFT", "svd")}
    losses = {"variance missed by 16": 5e-4, "variance missed by 32": 2e-3, "ranks moved": 0.004}
    facts = {"benchmark": "B1", "parts": {"forward": 0.7, "products": 0.3}, "bytes of states": 1 << 20,
             "inputs compared": 40, "inputs worse than PEFT by 1e-4": 0}  # fmt: skip
    theirs = {"variance missed by 16": 1e-3, "variance missed by 32": 1e-2}
    return results_of(
        entry(),
        entry(case="wide", peers={"full product": 0.4}),
        entry("Streams", "a stream", peers={"PEFT": 4.0, "svd": 0.5}, errors=missed),
        entry("Rank allocation", "sites", forward=None, peers={}),
        entry("End to end", "B1: float32", 11.0, forward=0.94, share=0.25, peers={"PEFT IncrementalPCA": 2.5},
              errors={"ours": losses, "PEFT IncrementalPCA": theirs}, facts=facts,
              memory={"ours": 300 << 20, "forward": 200 << 20}),
        *(entry("Scaling", f"{x} rows", x * 1e-6, peers={}, facts={"curve": "gram", "axis": "rows", "x": x})
          for x in (256, 512)),
    )  # fmt: skip
