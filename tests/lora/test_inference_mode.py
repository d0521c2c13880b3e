"""EVA within ``torch.inference_mode()`` leaves ordinary tensors: what was initialised there can be trained."""

import peft
import pytest
import torch

from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from eva_lora.peft import get_eva_state_dict, initialize_lora_eva_weights
from support.models import lora, lora_a_of, tiny_llama, token_batches
from support.other_kinds import OTHER_KINDS

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

BATCHES = token_batches(3)
CONFIG = EvaConfig(max_batches=3)


def one_call(model):
    eva_initialize(model, BATCHES, CONFIG, progress=False)


def three_steps(model):
    statistics = collect(model, BATCHES, CONFIG, progress=False)
    assert not any(entry.components.is_inference() for entry in statistics.inputs)
    eva_plan = plan(statistics)
    assert not any(a.is_inference() for a in eva_plan.lora_a.values())
    apply(model, eva_plan)


def drop_in(model):
    initialize_lora_eva_weights(model, BATCHES, show_progress_bar=False)


def drop_in_with_a_state(model):
    state = get_eva_state_dict(model, BATCHES, show_progress_bar=False)
    assert not any(a.is_inference() for a in state.values())
    initialize_lora_eva_weights(model, eva_state_dict=state)


def require_trainable(model, outputs):
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    outputs(model).float().square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("call", [one_call, three_steps, drop_in, drop_in_with_a_state])
def test_what_is_initialised_in_inference_mode_is_what_it_is_outside_and_trains(call, dora):
    eva_config = peft.EvaConfig(tau=0.5)
    plain, model = (lora(tiny_llama(), init_lora_weights="eva", eva_config=eva_config, use_dora=dora) for _ in range(2))
    call(plain)
    with torch.inference_mode():
        call(model)
        assert torch.is_inference_mode_enabled()
    expected = lora_a_of(plain)
    assert len({len(a) for a in expected.values()}) > 1
    assert all(torch.equal(a, expected[name]) for name, a in lora_a_of(model).items())
    require_trainable(model, lambda model: model(**BATCHES[0]).logits)


@pytest.mark.parametrize("kind", OTHER_KINDS[:2])
def test_layers_of_other_libraries_stay_ordinary(kind):
    model = kind.model()
    with torch.inference_mode():
        eva_initialize(model, kind.batches(), EvaConfig(max_batches=2, **kind.config), progress=False)
    assert not any(parameter.is_inference() for parameter in (*model.parameters(), *kind.second(model)))


@pytest.mark.parametrize("call", [one_call, drop_in])
def test_a_model_that_was_made_in_inference_mode_is_refused(call):
    with torch.inference_mode():
        model = lora(tiny_llama(), init_lora_weights="eva")
        with pytest.raises(ValueError, match=r"^model: .* was made within torch\.inference_mode\(\)"):
            call(model)
