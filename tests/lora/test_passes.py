"""The pass over the data: any loader, how the model is called, and when it ends."""

from dataclasses import dataclass

import peft
import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
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


def test_forwards_stop_at_the_last_layer_wanted():
    heads = []
    counts = {}
    for early_stop in (True, False):
        model = lora(tiny_llama())
        model.base_model.model.lm_head.register_forward_hook(lambda *_, key=early_stop: heads.append(key))
        initialise(model, early_stop=early_stop)
        counts[early_stop] = heads.count(early_stop)
    assert counts == {True: 0, False: 6}


def test_decoders_are_spared_cache_logits_and_loss():
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x, labels=None, use_cache=True, logits_to_keep=0):
            seen.append((labels, use_cache, logits_to_keep))
            return self.inner(x)

    model = peft.get_peft_model(Recorder(), peft.LoraConfig(r=2, target_modules=["inner"]))
    labels = torch.ones(3, 10, dtype=torch.long)
    initialise(model, [{"x": torch.randn(3, 10, 4), "labels": labels}], max_batches=1)
    assert seen == [(None, False, 1)]
    seen.clear()
    asked = {"x": torch.randn(3, 10, 4), "labels": labels, "use_cache": True, "logits_to_keep": 5}
    initialise(model, [asked], max_batches=1)
    assert seen == [(labels, True, 5)]  # what the caller asks for is left as it is
