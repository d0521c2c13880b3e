"""`make bench` in its short form, and that nothing is measured where the gate fails."""

import json
import sys

import pytest

import run
from harness.results import Results


def started(monkeypatch, output, *options):
    monkeypatch.setattr(sys, "argv", ["benchmarks/run.py", "--quick", "--output", str(output), *options])
    return run.main()


def test_the_command_is_kept_without_places():
    arguments = ["--suite", "gram", "--output", "/somewhere", "--against=/there", "--quick"]
    assert run._without_paths(arguments) == ["--suite", "gram", "--quick"]


@pytest.mark.slow
def test_a_failing_gate_leaves_no_figure(tmp_path, monkeypatch, capfd):
    failing = tmp_path / "test_wrong.py"
    failing.write_text("def test_wrong():\n    assert False\n")
    monkeypatch.setattr(run, "QUICK_GATE", (str(failing),))
    assert started(monkeypatch, tmp_path / "out") == 1
    assert "the gate failed: nothing is measured" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_suite_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SUITES", ("missing", "allocation"))
    assert started(monkeypatch, tmp_path) == 1
    results = Results.load(tmp_path / "results.json")
    assert results.suites["missing"]["status"].startswith("failed")
    assert results.suites["allocation"]["status"] == "passed"
    assert results.groups == ["Rank allocation"]
    assert "suite missing: failed" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_suite_runs(tmp_path, monkeypatch):
    assert started(monkeypatch, tmp_path, "--device", "cpu") == 0
    results = Results.load(tmp_path / "results.json")
    assert results.quick
    assert results.groups == [
        "Gram",
        "Subspace product",
        "Orthonormalisation",
        "Low-rank update",
        "Eigenproblems",
        "Refresh",
        "Streams",
        "Convergence step",
        "Scaling",
        "Rank allocation",
        "Hooks",
        "Initialisations",
        "End to end",
    ]
    for record in results.records:
        assert record.seconds["median"] > 0
        assert record.peers or record.group in ("Scaling", "Hooks", "End to end")
        for value in record.error("ours").values():
            assert 0 <= value < 1
    machine = json.loads((tmp_path / "results.json").read_text())["machine"]["cpu"]
    assert machine["flop_rate"]["float32"] > 1e8
    assert "No peer was faster" not in (tmp_path / "report.md").read_text(encoding="utf-8")
