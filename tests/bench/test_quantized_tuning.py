"""The benchmark of fine-tuning from a quantised base: its short form, its summary, and that it goes on where it was."""

import json
import sys

import pytest

import quantized_tuning

FLOAT, OTHER = [3.0, 2.5, 2.0], [3.5, 2.0, 1.0]


def run_of(method, rate, seed, losses):
    return {"method": method, "rate": rate, "seed": seed, "losses": losses}


def test_each_method_is_shown_at_its_best_rate_over_the_seeds_that_all_have():
    runs = [
        run_of("float", 0.1, 0, FLOAT), run_of("float", 0.1, 1, [x + 1 for x in FLOAT]),
        run_of("float", 0.2, 0, [3.0, 3.0, 3.0]), run_of("qlora", 0.1, 0, [4.0, 3.0, 2.5]),
        run_of("qlora", 0.2, 0, OTHER), run_of("qlora", 0.2, 1, [0.0, 0.0, 0.0]),
    ]  # fmt: skip
    first, second = quantized_tuning.summary({"every": 5, "runs": runs})
    assert first == {
        "method": "float", "seeds": [0], "rates": [0.1, 0.2], "rate": 0.1, "losses": FLOAT, "steps_to_float": 10,
    }  # fmt: skip
    assert (second["method"], second["rate"], second["losses"], second["steps_to_float"]) == ("qlora", 0.2, OTHER, 5)
    assert quantized_tuning.summary({"every": 5, "runs": []}) == []


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    output = tmp_path / "tuning.json"

    def call(*options):
        monkeypatch.setattr(
            sys, "argv",
            ["x", "--short", "--steps", "2", "--every", "1", "--tokens", "16", "--output", str(output), *options],
        )  # fmt: skip
        quantized_tuning.main()
        return json.loads(output.read_text())["runs"]

    first = call("--methods", "float", "repair", "--rates", "1e-3", "--seeds", "0")
    assert [(one["method"], len(one["losses"])) for one in first] == [("float", 3), ("repair", 3)]
    second = call("--methods", "float", "repair", "loftq", "--rates", "1e-3", "--seeds", "0")
    assert second[:2] == first
    assert [one["method"] for one in second[2:]] == ["loftq"]
    starts = {one["method"]: one["losses"][0] for one in second}
    assert len(set(starts.values())) == 3
    assert "to float" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds runs of other steps"):
        call("--steps", "3")
