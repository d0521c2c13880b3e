"""Counts of instructions: exact, compared with recorded ones, and honest where nothing can be counted."""

import shutil

import pytest

import instructions
from instructions import Count, table


def test_a_change_is_pointed_out():
    lines = table(
        {"a": Count(1000, "callgrind"), "b": Count(1030, "callgrind"), "c": Count(900, "callgrind"),
         "d": Count(1005, "callgrind"), "new": Count(5, "callgrind"), "none": Count(None, "not counted: why")},
        {name: Count(1000, "callgrind") for name in "abcd"},
    ).splitlines()[2:]  # fmt: skip
    assert lines == [
        "| a | 1,000 | 1,000 | 0 | callgrind |",
        "| b | 1,030 | 1,000 | +3.00% | **more**, callgrind |",
        "| c | 900 | 1,000 | -10.00% | fewer, callgrind |",
        "| d | 1,005 | 1,000 | +0.50% | callgrind |",
        "| new | 5 |  |  | new, callgrind |",
        "| none | | | | not counted: why |",
    ]


def test_counts_taken_in_different_ways_are_not_compared():
    (line,) = table({"a": Count(1000, "single steps")}, {"a": Count(500, "callgrind")}).splitlines()[2:]
    assert line == "| a | 1,000 |  |  | new, single steps |"


def test_without_a_compiler_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["instructions.py"])
    assert instructions.main() == 0
    assert "no C++ compiler, nothing counted" in capsys.readouterr().out


@pytest.mark.slow
def test_counts_are_the_same_every_time(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    program = instructions.compile_paths(tmp_path)
    names = instructions.paths(program)
    assert len(names) >= 8
    if shutil.which("valgrind"):
        one, other = (instructions.count_with_callgrind(program, "allocation, 224 x 32", tmp_path) for _ in range(2))
        assert one == other
        assert one > 224 * 32  # at least one instruction a ratio
    stepped = [instructions.count_steps(program, "allocation, 224 x 32", tmp_path) for _ in range(2)]
    assert stepped[0] == stepped[1]
    if shutil.which("valgrind") and stepped[0] is not None:
        assert stepped[0] == pytest.approx(one, rel=0.05)  # copies are done by other instructions there
