"""What the host of a GPU does in a pass: the same every time, and a growth is seen."""

import pytest

import host
from host import Counts, Figure, table

BEFORE = Counts(launches=6, operators=11, calls=100, instructions=1000)


def test_a_count_that_grew_by_more_than_a_tenth_is_named():
    assert Counts(6, 12, 110, 1100).grown(BEFORE) == []
    assert Counts(7, 11, 111, 900).grown(BEFORE) == ["launches", "calls"]
    assert Counts(0, 1, 0, 0).grown(Counts(0, 0, 0, 0)) == ["operators"]


def test_the_table_tells_more_from_fewer():
    figures = {"new": Figure(BEFORE, 2.0), "same": Figure(BEFORE, 2.0), "other": Figure(Counts(2, 11, 200, 1000), 1.0)}
    lines = table(figures, {"same": BEFORE, "other": BEFORE}).splitlines()[2:]
    assert lines == [
        "| new | 2.0 | 6 | 11 | 100 | 1,000 | new |",
        "| same | 2.0 | 6 | 11 | 100 | 1,000 |  |",
        "| other | 1.0 | 2 | 11 | 200 | 1,000 | **more calls**; fewer launches |",
    ]


def test_a_growth_fails_and_other_versions_are_not_compared(monkeypatch, capsys, tmp_path):
    figures = {f"{name}: {what}": Figure(BEFORE, 1.0) for name in host.SHOWN
               for what in ("a forward", "its hooks", "a batch beside it")}  # fmt: skip
    monkeypatch.setattr(host, "measure", lambda: figures)
    monkeypatch.setattr(host, "RECORDED", tmp_path / "host.json")
    monkeypatch.setattr("sys.argv", ["host.py", "--record"])
    assert host.main() == 0
    monkeypatch.setattr("sys.argv", ["host.py"])
    assert host.main() == 0
    figures["Llama-3-8B: a forward"] = Figure(Counts(6, 11, 100, 1101), 1.0)
    assert host.main() == 1
    monkeypatch.setattr(host, "versions", lambda: {"python": "4.0", "torch": "3.0", "triton": "4.0"})
    assert host.main() == 0
    assert "not compared" in capsys.readouterr().out


def test_counts_are_exact():
    """What a call of known steps does; twice the same."""
    torch = pytest.importorskip("torch")
    launches = host.Launches()
    x = torch.zeros(3)

    def call():
        launches.arguments.append(())
        x.add_(x).mul_(2)

    first, second = host.count(call, launches), host.count(call, launches)
    assert first == second
    assert (first.launches, first.operators, first.calls) == (1, 2, 3)
    assert first.instructions > 0
