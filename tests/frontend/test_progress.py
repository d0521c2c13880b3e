"""The progress line: what it says, where it keeps quiet, and the trace it predicts from."""

import io
import re
from pathlib import Path

import numpy as np
import pytest

from eva_kernels.convergence import Decision
from eva_lora import EvaConfig
from eva_lora.collecting.measurements import agreement, peak_memory
from eva_lora.collecting.progress import Progress, predict_batches
from eva_lora.planning import Trace

STATUS = Path("/proc/self/status")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, screen, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", screen)
    with Progress(21, EvaConfig(max_batches=1000)) as bar:
        bar.update(1, 512, 0, Trace())
        bar.update(4, 2048, 5, Trace([4], [2048], [[0.96] * 21], [[0] * 21]))
    return screen.getvalue()


def test_a_terminal_is_told_rows_per_second_layers_and_the_end(monkeypatch):
    line = shown(monkeypatch, Terminal())
    for part in (" rows/s", "5/21 layers converged", "about ", " left", "4 batches"):
        assert part in line


def test_files_and_other_ranks_are_told_nothing(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""
    assert shown(monkeypatch, Terminal(), RANK="1") == ""
    assert "rows/s" in shown(monkeypatch, Terminal(), RANK="0")


@pytest.mark.parametrize(
    ("agreement", "converged", "options", "expected"),
    [
        ([0.96, 0.999], [0, 1], {}, 16),  # √(0.04 / 0.01) = twice as many batches
        ([0.96, 0.999], [0, 1], {"max_batches": 10}, 10),
        ([0.96, 0.999], [0, 1], {"max_rows": 900}, 9),
        ([0.99, 0.999], [1, 1], {}, 8),
        ([None, 0.999], [0, 1], {}, 1000),
        ([0.5, 0.5], [0, 0], {"tau": 1.0}, 1000),
    ],
)
def test_the_end_is_predicted_from_the_layer_furthest_from_tau(agreement, converged, options, expected):
    trace = Trace([8], [800], [agreement], [converged])
    assert predict_batches(8, 800, trace, EvaConfig(**options)) == expected


def decision(ranks, done):
    return Decision(np.array(ranks), np.array([0] * len(ranks)), np.array(done), np.array([False] * len(ranks)))


def test_agreement_is_the_criterions_measure_at_the_rank():
    cosines, overlaps = np.array([0.9, 0.8, 0.1]), np.array([0.9, 1.7, 1.8])
    assert agreement(cosines, overlaps, 2, "subspace") == pytest.approx(0.85)
    assert agreement(cosines, overlaps, 2, "component") == pytest.approx(0.8)
    assert agreement(cosines, overlaps, 0, "subspace") == 1.0


def test_the_trace_keeps_one_entry_a_batch():
    trace = Trace()
    trace.record(1, 10, [0.85, None], [0, 0])
    trace.record(1, 12, [0.8, None], [1, 0])
    trace.record(2, 20, [0.9, 1.0], [1, 1])
    assert (trace.batch, trace.rows) == ([1, 2], [12, 20])
    assert (trace.agreement, trace.converged) == ([[0.8, None], [0.9, 1.0]], [[1, 0], [1, 1]])


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's account of the process")
def test_peak_memory_is_what_the_system_counts():
    counted = int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) * 1024
    assert peak_memory()["cpu"] == pytest.approx(counted, rel=0.01)
