"""A small run's results, made up: what a report is to be made from."""

import copy

from harness.results import Record, Results


def spread(median, rounds=20):
    return {"median": median, "p10": 0.9 * median, "p90": 1.1 * median, "rounds": rounds}


def entry(group="Gram", case="SmolLM2-135M attention, 1024 x 576", ours=1e-3, *, forward=0.5, share=1.0, **more):
    """One case: ``forward`` is our part of it, peers are given by what they take of our time."""
    peers = more.pop("peers", {"full product": 2.0})
    measure = {"forward": spread(share / forward)} if forward else {"ruler": spread(2.0)}
    return {
        "group": group,
        "case": case,
        "device": "cpu",
        "dtype": "float32",
        "seconds": {"ours": spread(ours), **{name: spread(ours * ratio) for name, ratio in peers.items()}},
        "ratio": {**{name: spread(ratio) for name, ratio in peers.items()}, **measure},
        "forward_share": share,
        "errors": {"ours": {"gram": 1e-7}, **{name: {"gram": 2e-3} for name in peers}},
        "memory": {"ours": 3 << 20, **dict.fromkeys(peers, 5 << 20)},
        "facts": {},
        **more,
    }


MACHINE = {
    "cpu": {
        "device": "A processor",
        "kind": "cpu",
        "cores": 2,
        "threads": 2,
        "cpu_form": "avx2",
        "system": "Linux",
        **dict.fromkeys(("python", "torch", "numpy", "peft", "transformers", "scikit-learn"), "1.0"),
        "torch-incremental-pca": "0.1.0",
        "commit": "0123456789ab",
        "flop_rate": {"float32": 1e11, "bfloat16": 4e11},
        "copy_rate": 2e10,
    }
}


def results_of(*entries, machine=MACHINE, quick=False):
    suites = {"gram": {"status": "passed", "seconds": 60.0}}
    records = tuple(Record(one) for one in copy.deepcopy(entries))
    return Results(machine, suites, records, "python benchmarks/run.py", "tests passed in 60 s", quick)
