"""The cost model against the bytes that gloo sends, and the documentation's tables against model and results."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from eva_lora import EvaConfig, collect
from eva_lora.distributed.costs import InputShape, num_refreshes, traffic
from support.models import lora, tiny_llama, token_batches
from support.ranks import on_ranks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "distributed.md"
IO = Path("/proc/self/io")

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def written():
    return int(dict(line.split(": ") for line in IO.read_text().splitlines())["wchar"])


@pytest.mark.skipif(not IO.exists(), reason="the platform does not tell what a process has written")
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_of_batches_and_refreshes_are_those_that_are_sent(size):
    batches = token_batches(count=40, shape=(2, 48))
    inputs = [InputShape(width, 20) for width in (32, 32, 32, 48)] * 3
    before, after = 8, 40

    def check(rank):
        sent = []
        for count in (before, after):
            start = written()
            config = EvaConfig(statistic="subspace", oversampling=2.5, tau=1.0, max_batches=count)
            assert collect(lora(tiny_llama()), batches, config, progress=False).num_batches == count
            sent.append(written() - start)
        return sent[1] - sent[0]

    predicted = traffic(inputs, size, layers=21)
    expected = (after - before) * predicted.batch + (num_refreshes(after) - num_refreshes(before)) * predicted.refresh
    # On top come gloo's headers, which outweigh a message of few numbers, and what fills owners' shares up to one size.
    for sent in on_ranks(size, check):
        assert 0.95 * expected < sent < 1.35 * expected


def test_a_pass_refreshes_as_often_as_the_model_says():
    seen = [num_refreshes(n) for n in (1, 2, 3, 4, 5, 8, 12, 13)]
    for count, expected in zip((1, 2, 3, 4, 5, 8, 12, 13), seen, strict=True):
        config = EvaConfig(statistic="subspace", tau=1.0, max_batches=count)
        batches = token_batches(count=13, shape=(2, 48))
        assert len(collect(lora(tiny_llama()), batches, config, progress=False).trace.batch) == expected, count


@pytest.fixture
def script(monkeypatch):
    """What benchmarks/distributed.py defines."""
    monkeypatch.setattr(sys, "argv", ["distributed.py"])
    return runpy.run_path(str(ROOT / "benchmarks" / "distributed.py"))


def test_the_table_in_the_documentation_is_what_the_model_says(script):
    assert script["prediction_table"]() in PAGE.read_text(encoding="utf-8")


def test_the_measured_tables_in_the_documentation_are_the_committed_results(script):
    page, results = PAGE.read_text(encoding="utf-8"), json.loads(script["RESULTS"].read_text(encoding="utf-8"))
    assert script["scaling_table"](results["rows"]) in page
    assert script["forms_table"](results["refreshes"]) in page
