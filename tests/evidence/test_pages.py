"""The pages say what the result files say, and their code runs."""

import re

import pytest

from benchmarks.evidence.page import PAGES, RESULTS, pages, updated, write_beside
from benchmarks.evidence.results import Results
from benchmarks.evidence.running import SEEDS, TUNING_SEED, best_rate

DOMAINS = sorted((PAGES / "domains").glob("*.md"))


def test_the_pages_tables_are_made_from_the_committed_results():
    found = list(pages())
    assert PAGES / "evidence.md" in found
    assert {*DOMAINS} <= {*found}
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert updated(text) == text, f"{path.name} is not what `python -m benchmarks.evidence.page` makes"
    shown = {name for path in found for name in re.findall(r"<!-- runs: (\w+) -->", path.read_text(encoding="utf-8"))}
    assert shown == {path.stem for path in RESULTS.glob("*.jsonl")}


def test_a_changed_result_changes_the_page(tmp_path):
    text = (PAGES / "domains" / "reinforcement-learning.md").read_text(encoding="utf-8")
    lines = (RESULTS / "reinforcement_learning.jsonl").read_text(encoding="utf-8").splitlines()
    lines[-1] = re.sub(r'"score": [\d.]+', '"score": 1.0', lines[-1])
    (tmp_path / "reinforcement_learning.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert updated(text, tmp_path) != text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_committed_runs_are_complete_and_under_the_rules(path):
    settings, provenance, runs = Results.load(path)
    assert not settings["short"]
    assert provenance["commit"]
    assert len(SEEDS) >= 5
    rates = settings["learning_rates"]
    for method in settings["methods"]:
        tuned = sorted(run.learning_rate for run in runs if run.seed == TUNING_SEED and run.method == method)
        if "first_rate" in settings:
            best = rates.index(best_rate(runs, method))
            assert {*rates[max(0, best - 1) : best + 2], settings["first_rate"]} <= {*tuned} <= {*rates}
        else:
            assert tuned == rates
            assert len(rates) == (7 if path.stem.startswith("gain_") else 3)
    final = sorted((run.method, run.seed) for run in runs if run.seed != TUNING_SEED)
    assert final == sorted((method, seed) for method in settings["methods"] for seed in SEEDS)
    assert all(run.curve[-1][0] == settings["steps"] for run in runs)


def test_results_elsewhere_get_their_summary_beside_them(tmp_path):
    source = RESULTS / "reinforcement_learning.jsonl"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    write_beside(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "reinforcement_learning.svg", "summary.md"}
    assert "| EVA, rho 2 |" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    picture = (tmp_path / "reinforcement_learning.svg").read_text(encoding="utf-8")
    assert "EVA, rho 2" in picture
    assert len(picture) < 60_000


def test_the_pictures_pages_show_are_there():
    for path in pages():
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name} shows {target}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", DOMAINS, ids=lambda path: path.stem)
def test_the_pages_code_runs(path):
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for code in blocks:
        scope = {}
        exec(compile(code, path.name, "exec"), scope)
        ranks = scope["report"].ranks
        assert sum(ranks.values()) == sum(scope["report"].configured_ranks.values())
        weights = {name: p for name, p in scope["model"].named_parameters() if "lora_B" in name}
        assert weights
        assert all(p.any() for p in weights.values())
