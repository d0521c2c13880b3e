"""PEFT's own functions, called as a script written for them is, in a process group."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model

from eva_lora.peft import get_eva_state_dict, initialize_lora_eva_weights
from support.agreement import rounding_of_scatters
from support.bounds import require_same_directions
from support.models import LINEARS, layer_inputs, lora_a_of, scatter, tiny_llama, token_batches
from support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = LoraConfig(r=4, target_modules=LINEARS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.9))
BATCHES = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in token_batches(4, (4, 24))]


def halves(rank):
    return [{name: value.chunk(2)[rank] for name, value in batch.items()} for batch in BATCHES]


def test_ranks_with_different_data_get_one_answer():
    def check(rank):
        model = get_peft_model(tiny_llama(), CONFIG)
        initialize_lora_eva_weights(model, halves(rank), show_progress_bar=False)
        return lora_a_of(model)

    first, second = on_ranks(2, check)
    model = get_peft_model(tiny_llama(), CONFIG)
    initialize_lora_eva_weights(model, BATCHES, show_progress_bar=False)
    alone, rows = lora_a_of(model), layer_inputs(model, BATCHES)
    rounding = rounding_of_scatters(lambda: get_peft_model(tiny_llama(), CONFIG), BATCHES)
    assert first.keys() == second.keys() == alone.keys()
    for name, a in alone.items():
        assert torch.equal(first[name], second[name])
        exact = scatter(rows[name])
        require_same_directions(first[name], a, torch.linalg.eigvalsh(exact).flip(0), rounding * exact.trace())


@pytest.mark.slow
def test_without_gathering_each_rank_is_for_itself_and_functions_of_ones_own_choose_its_rows():
    def first_sequence(inputs, peft_config):
        return torch.nonzero(torch.arange(len(inputs["input_ids"])) == 0)

    def its_rows(layer_input, chosen, name):
        return layer_input[0][chosen[:, 0]].flatten(0, 1)

    def check(rank):
        base = tiny_llama()
        alone = get_eva_state_dict(
            base, halves(rank), CONFIG, gather_distributed_inputs=False, show_progress_bar=False
        )  # fmt: skip
        own = get_eva_state_dict(
            base, halves(rank), CONFIG, prepare_model_inputs_fn=first_sequence, prepare_layer_inputs_fn=its_rows,
            show_progress_bar=False,
        )  # fmt: skip
        return alone, own

    (alone, own), (other_alone, other_own) = on_ranks(2, check)
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(alone[name], other_alone[name])
    assert all(torch.equal(other_own[n], a) for n, a in own.items())
