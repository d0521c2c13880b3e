"""The runner: equal conditions for every method, one pass per seed, and going on where it was stopped."""

import json
import statistics

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from benchmarks.evidence import methods
from benchmarks.evidence.methods import Initialiser
from benchmarks.evidence.results import Results
from benchmarks.evidence.running import SEEDS, TUNING_SEED, best_rate, kept_for_backward, run_task, search
from examples.domains.task import Task
from support.models import LINEARS, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ("eva_rho1", "eva_rho2", "eva_matched", "eva_global", "lora", "lora_scaled", "pissa", "olora")
FROZEN = ("frozen_lora", "frozen_orthonormal", "frozen_eva", "frozen_eva_matched", "frozen_eva_wider")


class Tiny(Task):
    name, metric, higher_is_better = "tiny", "loss", False
    targets, learning_rates, steps = LINEARS, (1e-3, 1e-2, 1e-1), 2

    def base(self, seed):
        return tiny_llama()

    def training(self, seed):
        return [{**batch, "labels": batch["input_ids"]} for batch in token_batches(self.steps, seed=seed)]

    @property
    def validation(self):
        return self.training(1000)

    def score(self, model):
        return self.validation_loss(model)


def test_every_method_has_one_budget_and_starts_from_the_base():
    task = Tiny(short=True)
    initialise = Initialiser(task)
    expected = task.validation_loss(task.base(0))
    # A loss moves by at most twice what a logit does, and a logit by as much as a float32 forward is off, twice; and
    # the sum over tokens rounds once for each.
    batch = task.validation[0]
    with torch.no_grad():
        plain, exact = (base.eval()(**batch).logits for base in (task.base(0), task.base(0).double()))
    rounding = float(2 * 2 * (plain - exact).abs().max())
    rounding += batch["labels"].numel() * torch.finfo(torch.float32).eps * expected
    made = {name: initialise(name, seed=1) for name in METHODS}
    ranks = {
        name: {n: m.r["default"] for n, m in one.model.named_modules() if isinstance(m, LoraLayer) and m.r}
        for name, one in made.items()
    }
    budget = task.rank * len(ranks["lora"])
    for name, one in made.items():
        assert sum(ranks[name].values()) == budget
        assert task.validation_loss(one.model.eval()) == pytest.approx(expected, abs=rounding)
        trained = {n for n, p in one.model.named_parameters() if p.requires_grad}
        assert all("lora_" in n for n in trained)
        assert one.parameters == sum(one.model.get_parameter(n).numel() for n in trained)
    assert ranks["eva_rho1"] == ranks["eva_matched"] == ranks["eva_global"] == ranks["lora_scaled"] == ranks["lora"]
    assert ranks["eva_rho2"] != ranks["lora"]
    assert made["eva_rho1"].parameters == made["lora"].parameters == made["pissa"].parameters
    assert made["eva_rho2"].forwards > 0
    assert made["lora"].forwards == 0


def test_matched_and_scaled_differ_from_their_originals_by_the_gain_of_eva():
    initialise = Initialiser(Tiny(short=True))
    a = {
        name: {n: p.detach() for n, p in initialise(name, seed=1).model.named_parameters() if "lora_A" in n}
        for name in ("eva_rho1", "eva_matched", "eva_global", "lora", "lora_scaled")
    }
    gains = {n: float(a["eva_rho1"][n].norm() / a["eva_matched"][n].norm()) for n in a["lora"]}
    assert len({round(gain, 3) for gain in gains.values()}) > 5
    for n, gain in gains.items():
        assert float(a["lora_scaled"][n].norm() / a["lora"][n].norm()) == pytest.approx(gain, rel=1e-5)
        middle = statistics.median(gains.values())
        assert float(a["eva_rho1"][n].norm() / a["eva_global"][n].norm()) == pytest.approx(middle, rel=1e-5)


def test_frozen_starts_train_b_alone_on_directions_of_their_own():
    task = Tiny(short=True)
    initialise = Initialiser(task)
    made = {name: initialise(name, seed=1).model for name in (*FROZEN, "lora", "eva_rho1", "eva_matched")}
    a = {name: {n: p for n, p in model.named_parameters() if "lora_A" in n} for name, model in made.items()}
    for name in FROZEN:
        assert {n for n, p in made[name].named_parameters() if p.requires_grad} == {
            n.replace("lora_A", "lora_B") for n in a[name]
        }
    for frozen, free in (("frozen_lora", "lora"), ("frozen_eva", "eva_rho1"), ("frozen_eva_matched", "eva_matched")):
        assert all(torch.equal(weight, a[free][n]) for n, weight in a[frozen].items())
    for n, weight in a["frozen_orthonormal"].items():
        torch.testing.assert_close(weight @ weight.mT, torch.eye(task.rank))
        assert len(a["frozen_eva_wider"][n]) == 2 * task.rank


def test_spending_as_many_parameters_stays_within_the_configured_ones_and_nearer_to_them():
    made = {n: Initialiser(Tiny(short=True))(n, 1) for n in ("lora", "eva_rho2", "eva_rho2_parameters")}
    parameters = {name: one.parameters for name, one in made.items()}
    widest = max(sum(m.base_layer.weight.shape) for m in made["lora"].model.modules() if isinstance(m, LoraLayer))
    assert parameters["lora"] - widest < parameters["eva_rho2_parameters"] <= parameters["lora"]


def test_starts_on_a_quantised_base_share_it_and_those_that_fit_begin_nearer_to_the_float_model():
    pytest.importorskip("bitsandbytes")
    task = Tiny(short=True)
    initialise = Initialiser(task)
    batch = task.validation[0]
    with torch.no_grad():
        whole = task.base(0).eval()(**batch).logits
        off = {}
        for name in ("nf4_lora", "nf4_eva", "nf4_loftq", "nf4_repair", "nf4_both"):
            model = initialise(name, 1).model.eval()
            off[name] = float((model(**batch).logits - whole).norm())
            with model.disable_adapter():
                torch.testing.assert_close(float((model(**batch).logits - whole).norm()), off["nf4_lora"])
    assert off["nf4_eva"] == pytest.approx(off["nf4_lora"], rel=1e-6)
    assert off["nf4_repair"] < off["nf4_both"] < off["nf4_lora"]


def test_starts_from_gradients_count_their_forwards_and_begin_at_the_base_or_a_step_below():
    task = Tiny(short=True)
    whole = task.validation_loss(task.base(0).eval())
    found = {name: Initialiser(task)(name, 1) for name in ("lora_ga", "lora_one")}
    losses = {name: task.validation_loss(one.model.eval()) for name, one in found.items()}
    assert losses["lora_ga"] == pytest.approx(whole, rel=1e-4)  # W less s B A, and s B A: a rounding of float32
    assert losses["lora_one"] < whole
    assert {one.forwards for one in found.values()} == {6 * task.steps}  # five passes, and the loss after a step


def test_the_search_tries_both_neighbours_of_what_it_finds_and_no_more():
    rates = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)

    def found(first, losses):
        tried = []
        best = search(rates, first, lambda rate: tried.append(rate) or (0.0, losses[rates.index(rate)]))
        return best, sorted({*tried})

    assert found(3.0, (9, 8, 7, 6, 5, 8)) == (5.0, [2.0, 3.0, 4.0, 5.0, 6.0])
    assert found(2.0, (9, 1, 7, 6, 5, 0)) == (2.0, [1.0, 2.0, 3.0])
    assert found(1.0, (1, 2, 3, 4, 5, 6)) == (1.0, [1.0, 2.0])


def test_a_searched_study_says_so_in_its_settings_and_runs_its_seeds_at_what_it_found(tmp_path):
    task = Tiny(short=True)
    task.learning_rates = (1e-3, 1e-2)
    results = run_task(task, ("frozen_lora",), tmp_path, lambda _: None, first=1e-2, baseline="frozen_lora")
    assert (results.settings["first_rate"], results.settings["baseline"]) == (1e-2, "frozen_lora")
    best = best_rate(results.runs, "frozen_lora")
    assert {run.learning_rate for run in results.runs if not run.tuning} == {best}


def test_what_is_kept_for_the_backward_is_counted_without_weights():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 4))

        def forward(self, x):
            return type("Output", (), {"loss": (x @ self.weight).square().sum()})  # keeps x, and the product once

    task, x = Tiny(short=True), torch.ones(3, 8)
    assert kept_for_backward(task, Square(), {"x": x}) == 4 * (3 * 8 + 3 * 4)
    frozen = Square().requires_grad_(False)
    assert kept_for_backward(task, frozen, {"x": x}) == 0


def test_one_pass_serves_both_rhos_of_a_seed(monkeypatch):
    passes = []
    monkeypatch.setattr(methods, "collect", lambda *a, **k: passes.append(1) or original(*a, **k))
    initialise = Initialiser(Tiny(short=True))
    for seed in (1, 1, 2):
        initialise("eva_rho1", seed)
        initialise("eva_rho2", seed)
    assert len(passes) == 2


original = methods.collect


def test_seeds_differ_and_a_run_repeats(tmp_path):
    first = run_task(Tiny(short=True), ("lora",), tmp_path / "a", echo=lambda _: None)
    again = run_task(Tiny(short=True), ("lora",), tmp_path / "b", echo=lambda _: None)
    assert [run.curve for run in first.runs] == [run.curve for run in again.runs]
    finals = [run for run in first.runs if not run.tuning]
    assert [run.seed for run in finals] == list(SEEDS[:2])
    assert finals[0].curve[0] == finals[1].curve[0]  # B = 0
    assert finals[0].curve[-1] != finals[1].curve[-1]
    assert {run.learning_rate for run in finals} == {
        min(first.runs[:2], key=lambda run: run.curve[-1][1]).learning_rate
    }
    assert all((run.score is None) == (run.seed == TUNING_SEED) for run in first.runs)


class Stop(Exception):
    pass


def test_it_goes_on_where_it_was_stopped(tmp_path):
    said = []

    def stop_at_four(line):
        said.append(line)
        if len(said) == 4:
            raise Stop

    with pytest.raises(Stop):
        run_task(Tiny(short=True), ("eva_rho2", "lora"), tmp_path, echo=stop_at_four)
    before = (tmp_path / "tiny.jsonl").read_text()
    assert len(before.splitlines()) == 5
    said.clear()
    run_task(Tiny(short=True), ("eva_rho2", "lora"), tmp_path, echo=said.append)
    after = (tmp_path / "tiny.jsonl").read_text()
    assert after.startswith(before)
    assert len(said) == 1 + 4  # the rates, and the four runs that were left
    run_task(Tiny(short=True), ("eva_rho2", "lora"), tmp_path, echo=said.append)
    assert (tmp_path / "tiny.jsonl").read_text() == after
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.jsonl"]
    settings, provenance, runs = Results.load(tmp_path / "tiny.jsonl")
    assert len(runs) == 8
    assert provenance["versions"]["torch"] == torch.__version__
    assert settings["methods"] == ["eva_rho2", "lora"]


def test_results_made_with_other_settings_are_refused(tmp_path):
    results = run_task(Tiny(short=True), ("lora",), tmp_path, echo=lambda _: None)
    before = results.path.read_text()
    other = Tiny(short=True)
    other.rank = 3
    with pytest.raises(ValueError, match=r"tiny\.jsonl was made with other settings \(rank\)"):
        run_task(other, ("lora",), tmp_path, echo=lambda _: None)
    assert results.path.read_text() == before
    assert json.loads(before.splitlines()[0])["settings"]["rank"] == 2
