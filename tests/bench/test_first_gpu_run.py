"""What `make first-gpu-run` writes down, whatever its steps do; the steps themselves need a GPU."""

import os
import signal
import sys
from dataclasses import replace

import pytest
import torch

from tools import first_gpu_run
from tools.first_gpu_run import Outcome, Step, run, run_all, shown, steps


def python(name, code, seconds=60.0):
    return Step(name, (sys.executable, "-c", code), seconds)


def test_every_step_is_written_down_whatever_becomes_of_it(tmp_path, capfd):
    chosen = [
        python("fine", "print('a | figure'); print('```')"),
        python("wrong", "import sys; print('said before'); sys.exit(3)"),
        Step("missing", ("no-such-program",), 60),
        python("crashed", "import os; os.abort()"),
        python("after", "import sys; print('to stderr', file=sys.stderr)"),
    ]
    path = tmp_path / "build" / "run.md"
    outcomes = run_all(chosen, path, dry=False)
    assert [outcome.status for outcome in outcomes] == [
        "passed", "failed with exit status 3", "not run: No such file or directory: no-such-program",
        "failed with exit status -6", "passed",
    ]  # fmt: skip
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# First run on a GPU\n")
    for outcome in outcomes:
        assert f"| {outcome.step.name} | {outcome.status} |" in text
        assert f"## {outcome.step.name}: {outcome.status}" in text
    assert "\n````text\na | figure\n```\n````\n" in text  # a fence longer than any within
    assert "said before" in text
    assert "| to stderr |" in text
    assert f"torch {torch.__version__}".split("+")[0] in text
    assert sys.executable not in text
    assert "[5/5] after ... passed" in capfd.readouterr().out


def test_the_file_is_there_after_each_step(tmp_path):
    path = tmp_path / "run.md"
    run_all(
        [python("first", ""), python("second", f"print(open({str(path)!r}).read().count('not run yet'))")],
        path,
        dry=True,
    )
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Dry run: nothing here was run on a GPU\n")
    assert "| second | passed | 0 | 1 |" in text


@pytest.mark.slow  # it waits
def test_a_step_that_hangs_is_asked_and_then_killed_with_all_that_it_started(tmp_path, monkeypatch):
    asked = python("asked", "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('2 failed so far')")
    heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        outcome = run(asked, 5)  # so long that Python has started by then
    finally:
        signal.signal(signal.SIGINT, heeded)
    assert (outcome.status, outcome.line) == ("stopped after 5 s", "2 failed so far")

    monkeypatch.setattr(first_gpu_run, "GRACE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"open({str(tmp_path / 'pipe')!r}, 'w'); {deaf}; import time; file = open({str(tmp_path / 'pipe')!r}, 'w')"
    hang = f"{deaf}; import subprocess, sys; subprocess.run([sys.executable, '-c', {child + '; time.sleep(600)'!r}])"
    assert run(python("deaf", hang), 2).status == "stopped after 2 s"
    os.set_blocking(reading, True)
    assert os.read(reading, 1) == b""  # the end: nobody holds the other side any more
    os.close(reading)


def test_time_that_is_left_goes_to_the_next_step_and_time_overdrawn_is_taken_from_it(tmp_path, monkeypatch):
    taken, given = iter([2.0, 25.0, 1.0]), []

    def pretend(step, seconds):
        given.append(seconds)
        return Outcome(step, "passed", next(taken), "")

    monkeypatch.setattr(first_gpu_run, "run", pretend)
    run_all([Step(str(number), (), 10) for number in range(3)], tmp_path / "run.md", dry=True)
    assert given == [10, 18, 3]


def test_the_whole_of_it_ends_within_ten_minutes():
    assert sum(step.seconds for step in steps(dry=False)) + first_gpu_run.GRACE < 600
    assert all(step.seconds > first_gpu_run.GRACE for step in steps(dry=False))
    assert [step.name for step in steps(dry=False)] == [step.name for step in steps(dry=True)]


def test_what_doctor_says_in_one_line_comes_first_even_where_a_kernel_is_wrong(tmp_path):
    path = tmp_path / "run.md"
    line = "torch 2.13.0; A card; 20 of 21 kernel checks passed; gram: error nan"
    doctor = next(step for step in steps(dry=False) if step.name == "doctor")
    command = (sys.executable, "-c", f"import sys; print({line!r}); sys.exit('Error: wrong')")
    run_all([replace(doctor, command=command)], path, dry=False)
    text = path.read_text(encoding="utf-8")
    assert text.index(f"```text\n{line}\n```") < text.index("| step |")


def test_output_is_kept_as_a_terminal_shows_it(monkeypatch):
    assert shown("\n0%\r50%\r100%\ndone\n") == "100%\ndone"
    monkeypatch.setattr(first_gpu_run, "MOST_LINES", 2)
    assert shown("a\nb\nc\nd") == "(2 lines left out)\nc\nd"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_gpu_run", "--output", str(tmp_path / "run.md")])
    assert first_gpu_run.main() == 1
    said = capsys.readouterr()
    assert said.err == "first-gpu-run: expected a CUDA or HIP device, torch finds none: nothing was run\n"
    assert said.out == ""
    assert not (tmp_path / "run.md").exists()


@pytest.mark.slow
def test_dry_every_step_runs_and_nothing_claims_a_gpu(tmp_path, monkeypatch):
    path = tmp_path / "run.md"
    outcomes = run_all(steps(dry=True), path, dry=True)
    assert [(outcome.step.name, outcome.output) for outcome in outcomes if outcome.status != "passed"] == []
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Dry run: nothing here was run on a GPU\n")
    assert first_gpu_run.DOCTOR not in text
    assert "E/F = " in text
