"""The pass over the data: any loader, how the model is called, and when it ends."""

from dataclasses import dataclass

import peft
import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
from eva_lora.collecting.ending import ForwardEnd
from support.models import initialise, lora, lora_a_of, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


@dataclass
class DataclassBatch:
    input_ids: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batches: batches,
        lambda batches: iter(batches),
        lambda batches: (batch for batch in batches),
        lambda batches: [(batch["input_ids"],) for batch in batches],
        lambda batches: [[batch["input_ids"]] for batch in batches],
        lambda batches: [batch["input_ids"] for batch in batches],
        lambda batches: [DataclassBatch(**batch) for batch in batches],
        lambda batches: torch.utils.data.DataLoader([{"input_ids": r} for b in batches for r in b["input_ids"]], 4),
    ],
    ids=["list", "iterator", "generator", "tuples", "lists", "tensors", "dataclasses", "DataLoader"],
)
def test_any_loader_of_any_batches(wrap):
    expected, model = lora(tiny_llama()), lora(tiny_llama())
    initialise(expected)
    initialise(model, wrap(token_batches()))
    for name, a in lora_a_of(expected).items():
        assert torch.equal(lora_a_of(model)[name], a)


def test_a_forward_fn_replaces_the_call():
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(input_ids=batch["text"])

    model = lora(tiny_llama())
    batches = [{"text": batch["input_ids"]} for batch in token_batches(3)]
    report = eva_initialize(model, batches, EvaConfig(max_batches=3), forward_fn=forward, progress=False)
    assert len(seen) == report.num_batches == 3


def test_a_loader_that_ends_ends_the_pass_with_a_warning():
    model = lora(tiny_llama())
    with pytest.warns(UserWarning, match=r"end of the data, after 2 batches .* 21 of 21 layers not converged"):
        report = eva_initialize(model, iter(token_batches(2)), EvaConfig(tau=1.0), progress=False)
    assert (report.num_batches, report.stop_reason) == (2, "end of the data")
    assert not any(report.converged.values())


@pytest.mark.parametrize(("options", "batches"), [({"max_batches": 4}, 4), ({"max_rows": 200}, 3)])
def test_bounds_end_the_pass(options, batches):
    report = initialise(lora(tiny_llama()), tau=1.0, **{"max_batches": 9, **options})
    assert report.num_batches == batches


def test_without_bounds_the_pass_still_ends(monkeypatch):
    monkeypatch.setattr("eva_lora.collecting.run.DEFAULT_MAX_BATCHES", 11)
    report = initialise(lora(tiny_llama()), token_batches(2), tau=1.0, max_batches=None)
    assert (report.num_batches, report.stop_reason) == (11, "max_batches (11)")


def test_tau_zero_stops_at_the_second_update():
    report = initialise(lora(tiny_llama()), tau=0.0)
    assert (report.num_batches, report.stop_reason) == (2, "all layers converged")
    assert all(report.converged.values())


@pytest.mark.parametrize("criterion", ["component", "subspace"])
def test_repeating_the_data_converges(criterion):
    report = initialise(lora(tiny_llama()), convergence=criterion, max_batches=None, tau=0.9)
    assert all(report.converged.values())
    assert report.history[-1] == 21
    for name, rank in report.ranks.items():
        assert criterion == "subspace" or report.components_converged[name] >= rank


def test_the_heads_product_is_spared_from_the_second_forward_on():
    values = {}
    for early_stop in ("auto", True, False):
        model = lora(tiny_llama())
        seen = values[early_stop] = []
        model.base_model.model.lm_head.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.is_meta))
        initialise(model, early_stop=early_stop)
    spared = [False, True, True, True, True, True]
    assert values == {"auto": spared, True: spared, False: [False] * 6}


def test_a_share_of_the_later_forwards_runs_whole_and_the_seed_draws_which():
    whole = [[end._is_whole(number) for number in range(10_000)] for end in (ForwardEnd(seed=s) for s in (0, 0, 1))]
    assert whole[0] == whole[1] != whole[2]
    for drawn in whole:
        assert drawn[0]
        assert sum(drawn) <= 1 + 0.03 * 10_000 + 5 * (0.03 * 0.97 * 10_000) ** 0.5  # five standard deviations


def test_a_model_is_called_with_its_batch_and_nothing_else():
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x, labels="default", use_cache="default", logits_to_keep="default"):
            seen.append((labels, use_cache, logits_to_keep))
            return self.inner(x)

    labels = torch.ones(3, 10, dtype=torch.long)
    for more in ({}, {"use_cache": True, "logits_to_keep": 5}):
        model = peft.get_peft_model(Recorder(), peft.LoraConfig(r=2, target_modules=["inner"]))
        batches = [{"x": torch.randn(3, 10, 4), "labels": labels, **more}] * 4
        report = initialise(model, batches, max_batches=4)
        expected = (labels, more.get("use_cache", "default"), more.get("logits_to_keep", "default"))
        assert seen == [expected] * report.num_batches
        seen.clear()


def test_rows_are_counted_over_all_calls_of_a_layer():
    class PerImage(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.narrow = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

        def forward(self, images):
            return self.narrow(torch.stack([self.tower(image).mean(0) for image in images]))

    counts = [1, 1, 4, 2, 5]
    batches = [{"images": [torch.randn(7, 4) for _ in range(n)]} for n in counts]
    model = peft.get_peft_model(PerImage(), peft.LoraConfig(r=2, target_modules=["tower", "narrow"]))
    assert initialise(model, batches, max_batches=5, tau=1.0).num_rows == 7 * sum(counts)
    model = peft.get_peft_model(PerImage(), peft.LoraConfig(r=2, target_modules=["tower", "narrow"]))
    report = initialise(model, batches, max_rows=7 * 6, tau=1.0)
    assert (report.num_batches, report.num_rows) == (3, 7 * 6)
