"""What a saved adapter's config says: of its beginning, and of its layers' ranks."""

import json
import warnings

import peft
import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
from eva_lora.peft import initialize_lora_eva_weights
from support.models import lora, lora_a_of, tiny_gpt2, tiny_llama, token_batches
from support.peft_kinds import EXPERTS, STACKED_EXPERTS, Convolutions, gpt_oss, tensors
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at", "ignore:`init_lora_weights` is 'eva'")


def saved(model, folder):
    model.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("init", ["eva", True, "gaussian"])
@pytest.mark.parametrize("save_as", ["plain", "eva"])
def test_the_beginning_is_told_as_asked_and_the_weights_load_alike(save_as, init, tmp_path):
    model = lora(tiny_llama(), init_lora_weights=init)
    eva_initialize(model, token_batches(), EvaConfig(max_batches=3, save_as=save_as), progress=False)
    config = saved(model, tmp_path)
    if save_as == "plain":
        assert (config["init_lora_weights"], config["eva_config"]) == (True, None)
    else:
        assert (config["init_lora_weights"], config["eva_config"]["rho"]) == ("eva", 2.0)
    assert len(set(config["rank_pattern"].values())) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    found = lora_a_of(again)
    assert all(torch.equal(a, found[name]) for name, a in lora_a_of(model).items())


def test_plain_is_what_no_option_of_pefts_refuses(tmp_path):
    """With "eva" PEFT refuses to load these, so that there the configured value stays."""
    biased = lora(tiny_gpt2(), target_modules=["c_attn"], lora_bias=True)
    convolutions = peft.get_peft_model(Convolutions(2), peft.LoraConfig(r=2, target_modules=["first"]))
    for model, batches in ((biased, token_batches()), (convolutions, tensors(2, 3, 12, 12))):
        for number, save_as in enumerate(("plain", "eva")):
            eva_initialize(model, batches, EvaConfig(max_batches=2, save_as=save_as), progress=False)
            assert saved(model, tmp_path / str(number))["init_lora_weights"] is True


def test_pefts_own_functions_leave_what_they_ask_for(tmp_path):
    model = lora(tiny_llama(), init_lora_weights="eva", eva_config=peft.EvaConfig(tau=0.0))
    initialize_lora_eva_weights(model, token_batches(), show_progress_bar=False)
    assert saved(model, tmp_path)["init_lora_weights"] == "eva"


@needs(STACKED_EXPERTS)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_ranks_of_experts_are_those_that_were_saved_whatever_peft_says_of_their_patterns(tmp_path):
    """PEFT looks for keys among modules only, says that they were ignored, and gives the ranks that they name."""

    def make():
        return peft.get_peft_model(gpt_oss(), peft.LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS))

    model = make()
    report = eva_initialize(model, token_batches(3), EvaConfig(max_batches=3), progress=False)
    assert len(set(report.ranks.values())) > 1
    saved(model, tmp_path)
    again = peft.PeftModel.from_pretrained(gpt_oss(), tmp_path)
    ranks = [m.r["default"] for m in again.modules() if hasattr(m, "parameter_name")]
    assert sorted(ranks) == sorted(report.ranks.values())
    ours, theirs = (peft.get_peft_model_state_dict(one) for one in (model, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
