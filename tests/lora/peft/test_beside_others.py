"""What PEFT can do with adapters, of which one took part of its base: each is right, or refused by name."""

import copy
import inspect
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import Linear, LoraModel
from peft.utils import hotswap
from torch import nn

from eva_lora import initialize, load_adapter
from support.models import lora, tiny_llama, token_batches

TARGETS = ["q_proj", "down_proj"]


class Case:
    """A started adapter "default" and two ordinary ones, all trained, and what each adds to its base's weights."""

    def __init__(self, folder):
        self.folder, self.base = folder, tiny_llama().eval()
        del self.base.model.layers[1:]
        model = lora(copy.deepcopy(self.base), target_modules=TARGETS).eval()
        initialize(model, method="pissa")
        model.save_pretrained(folder / "initial")
        model.add_adapter("other", self.config())
        model.add_adapter("third", self.config())
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / "all", selected_adapters=["default"])
        lora(copy.deepcopy(self.base), target_modules=TARGETS).save_pretrained(folder / "ordinary")
        self.model, self.deltas = model, {}
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                start = layer.lora_start["default"]
                taken = layer.scaling["default"] * start.kept_b.double() @ start.kept_a.double()
                for adapter in ("default", "other", "third"):
                    b, a = (part[adapter].weight.detach().double() for part in (layer.lora_B, layer.lora_A))
                    delta = layer.scaling[adapter] * b @ a - (taken if adapter == "default" else 0)
                    self.deltas.setdefault(adapter, {})[name] = delta

    @staticmethod
    def config(**options):
        return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})

    def expected(self, **shares):
        """The logits of the untouched base with so much of each adapter added to its weights."""
        model = copy.deepcopy(self.base)
        for adapter, share in shares.items():
            for name, delta in self.deltas[adapter].items():
                weight = model.get_submodule(name).weight
                weight.data = (weight.detach().double() + share * delta).float()
        return logits(model)


def logits(model, **options):
    with torch.no_grad():
        return model(**token_batches(1)[0], **options).logits


def near(one, other):
    """Logits as near as a forward in float32 with other products of the same numbers."""
    return (one - other).abs().max() <= 2.0**-16 * other.abs().max()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def case(made, tmp_path):
    """With a model of its own."""
    case = copy.copy(made)
    case.model, case.out = copy.deepcopy(made.model), tmp_path
    return case


def active(*names):
    def run(case):
        case.model.base_model.set_adapter([*names])
        return logits(case.model)

    return run


def switched_off(case):
    with case.model.disable_adapter():
        return logits(case.model)


def layers_switched_off(case):
    case.model.base_model.disable_adapter_layers()
    return logits(case.model)


def merged(*names):
    def run(case):
        case.model.merge_adapter(list(names))
        return logits(case.model)

    return run


def merged_scaled(case):
    for layer in layers(case.model):
        layer.set_scale("default", 0.5)
    case.model.merge_adapter()
    return logits(case.model)


def unmerged_again(case):
    case.model.merge_adapter(["default", "other"], safe_merge=True)
    case.model.unmerge_adapter()
    return logits(case.model)


def merged_and_unloaded(*names):
    return lambda case: logits(case.model.merge_and_unload(adapter_names=list(names) or None))


def unloaded(case):
    return logits(case.model.unload())


def deleted(case):
    case.model.delete_adapter("default")
    case.model.set_adapter("other")
    return logits(case.model)


def another_deleted(case):
    case.model.delete_adapter("other")
    return logits(case.model)


def scaled(case):
    with rescale_adapter_scale(case.model, 0.5):
        return logits(case.model)


def scaled_by_layers(case):
    for layer in layers(case.model):
        layer.set_scale("default", 0.5)
        layer.scale_layer(3)
        layer.unscale_layer(6)
    return logits(case.model)


def scaled_and_back(case):
    for layer in layers(case.model):
        layer.scale_layer(3)
        layer.unscale_layer()
    return logits(case.model)


def loaded_over(folder):
    def run(case):
        nn.init.ones_(next(layers(case.model)).lora_B["default"].weight)
        case.model.load_adapter(case.folder / folder, "default")
        case.model.set_adapter("default")
        return logits(case.model)

    return run


def loaded_beside(case):
    case.model.load_adapter(case.folder / "ordinary", "fourth")
    case.model.set_adapter("fourth")  # of which B is zero
    return logits(case.model)


def added(**options):
    def run(case):
        case.model.add_adapter("fourth", case.config(**options))
        case.model.set_adapter("fourth")
        return logits(case.model)

    return run


def saved_as_pickles(case):
    case.model.save_pretrained(case.out, safe_serialization=False, selected_adapters=["default"])
    return logits(load_adapter(copy.deepcopy(case.base), case.out))


def unconverted(case):
    return logits(PeftModel.from_pretrained(copy.deepcopy(case.base), case.folder / "all"))


def converted_as_peft_does(case):
    """As PEFT documents it for PiSSA: needs what was saved before training."""
    initial = str(initial_of(case))
    case.model.save_pretrained(
        case.out / "out", selected_adapters=["default"], path_initial_model_for_weight_conversion=initial
    )
    return logits(PeftModel.from_pretrained(copy.deepcopy(case.base), case.out / "out"))


def initial_of(case):
    """A copy, whose config PEFT overwrites."""
    (case.out / "initial").mkdir()
    for file in (case.folder / "initial").iterdir():
        (case.out / "initial" / file.name).write_bytes(file.read_bytes())
    return case.out / "initial"


def states_exchanged(case):
    state = {name: value.clone() for name, value in get_peft_model_state_dict(case.model).items()}
    nn.init.ones_(next(layers(case.model)).lora_B["default"].weight)
    set_peft_model_state_dict(case.model, state)
    return logits(case.model)


def combined(adapters, **options):
    def run(case):
        case.model.add_weighted_adapter(adapters, [0.5] * len(adapters), "sum", **options)
        case.model.set_adapter("sum")
        return logits(case.model)

    return run


def combined_past_the_wrapper(case):
    """By a model that was started without its wrapper."""
    model = lora(copy.deepcopy(case.base), target_modules=TARGETS)
    initialize(model.get_base_model(), method="pissa")
    model.add_weighted_adapter(["default"], [1.0], "sum")


def combined_after_deleting(case):
    case.model.delete_adapter("default")
    return combined(["other", "third"], combination_type="cat")(case)


def swapped(name, folder):
    def run(case):
        case.model.set_adapter(name)
        hotswap.hotswap_adapter(case.model, str(case.folder / folder), name, torch_device="cpu")
        return logits(case.model)

    return run


def swapped_where_compiled(case):
    case.model.base_model.set_adapter("default")
    hotswap.prepare_model_for_compiled_hotswap(case.model, target_rank=6, check_compiled="ignore")
    return logits(case.model)


def mixed(*names, only=None, **options):
    """The rows of a mixed batch, or those of one adapter."""

    def run(case):
        found = logits(case.model, adapter_names=[*names], **options)
        return found if only is None else found[only]

    return run


def converted(case):
    conversion = pytest.importorskip("peft.tuners.lora.conversion")
    assert not case.model.supports_lora_conversion()
    return conversion.convert_to_lora(case.model, 4)


def without_intruders(case):
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    intruders.reduce_intruder_dimension(case.model, logging_sink=None)


def inferred(case):
    with torch.inference_mode():
        return case.model(**token_batches(1)[0]).logits.clone()


def set_for_inference(case):
    case.model.set_adapter("default", inference_mode=True)
    return logits(case.model)


def base_taken(case):
    saving = pytest.importorskip("peft.utils.save_and_load")
    if not hasattr(saving, "get_base_model_state_dict"):
        pytest.skip("not in this PEFT")
    saving.get_base_model_state_dict(case.model)


def base_set(case):
    saving = pytest.importorskip("peft.utils.save_and_load")
    if not hasattr(saving, "set_base_model_state_dict"):
        pytest.skip("not in this PEFT")
    saving.set_base_model_state_dict(case.model, case.base.state_dict())


def base_loaded(case):
    state = {name: value for name, value in case.model.state_dict().items() if "lora_" not in name}
    case.model.load_state_dict(state, strict=False)


def all_loaded(case):
    state = copy.deepcopy(case.model.state_dict())
    nn.init.ones_(next(layers(case.model)).lora_B["default"].weight)
    case.model.load_state_dict(state)
    return logits(case.model)


def told(case):
    """What PEFT tells of a model."""
    assert case.model.get_model_status().available_adapters == ["default", "other", "third"]
    assert {tuple(layer.available_adapters) for layer in case.model.get_layer_status()} == {
        ("default", "other", "third")
    }
    return logits(case.model)


def layers(model):
    return (module for module in model.modules() if hasattr(module, "lora_A"))


EXPORT = r"eva_lora\.export_plain makes an ordinary adapter of it"
SWAP = f"adapter 'default' took part of its base weight: it cannot be swapped.*{EXPORT}"
REFUSED = {
    "merging, scaled": (merged_scaled, ValueError, "which may be since: unmerge it first"),
    "loading another over it": (loaded_over("ordinary"), ValueError, "comes without what it started from"),
    "saving without safetensors, loading": (saved_as_pickles, FileNotFoundError, "holds no adapter_model.safetensors"),
    "loading it unconverted": (unconverted, ValueError, r"Unknown initialization .*eva_lora\.load_adapter: pissa"),
    "adding PiSSA": (added(init_lora_weights="pissa"), ValueError, "computes with the base weight itself, of which"),
    "adding OLoRA": (added(init_lora_weights="olora"), ValueError, "computes with the base weight itself, of which"),
    "adding DoRA": (added(use_dora=True), ValueError, "DoRA computes with the base weight itself, of which"),
    "a sum": (combined(["other", "default"]), ValueError, EXPORT),
    "a sum, it first": (combined(["default", "other"], combination_type="cat"), ValueError, EXPORT),
    "a linear sum": (combined(["default"], combination_type="linear"), ValueError, EXPORT),
    "a sum past the wrapper": (combined_past_the_wrapper, ValueError, EXPORT),
    "swapping": (swapped("default", "ordinary"), ValueError, SWAP),
    "swapping for its like": (swapped("default", "all"), ValueError, SWAP),
    "converting": (converted, TypeError, "do not support LoRA conversion"),
    "taking the base's weights": (base_taken, ValueError, "these weights are what is left"),
    "setting the base's weights": (base_set, ValueError, "on these weights, from which nothing is taken"),
    "loading the base's weights": (base_loaded, ValueError, "base_layer comes without what it started from"),
    "intruders": (without_intruders, ValueError, r"eva_lora\.load_adapter: pissa"),
}
RIGHT = {
    "as it is": (lambda case: logits(case.model), {"default": 1}),
    "two adapters": (active("default", "other"), {"default": 1, "other": 1}),
    "another adapter": (active("other"), {"other": 1}),
    "no adapter": (active(), {}),
    "switched off": (switched_off, {}),
    "layers switched off": (layers_switched_off, {}),
    "merged": (merged("default"), {"default": 1}),
    "another merged": (merged("other"), {"other": 1}),
    "both merged": (merged("other", "default"), {"default": 1, "other": 1}),
    "unmerged again": (unmerged_again, {"default": 1}),
    "merged and unloaded": (merged_and_unloaded(), {"default": 1}),
    "another merged and unloaded": (merged_and_unloaded("other"), {"other": 1}),
    "both merged and unloaded": (merged_and_unloaded("default", "other"), {"default": 1, "other": 1}),
    "unloaded": (unloaded, {}),
    "deleted": (deleted, {"other": 1}),
    "another deleted": (another_deleted, {"default": 1}),
    "scaled": (scaled, {"default": 0.5}),
    "scaled by layers": (scaled_by_layers, {"default": 0.25}),
    "scaled and back": (scaled_and_back, {"default": 1}),
    "loaded over itself": (loaded_over("all"), {"default": 1}),
    "loaded beside": (loaded_beside, {}),
    "added": (added(), {}),
    "converted as PEFT does": (converted_as_peft_does, {"default": 1}),
    "states exchanged": (states_exchanged, {"default": 1}),
    "a sum of others": (combined(["other", "third"], combination_type="cat"), {"other": 0.5, "third": 0.5}),
    "a sum of others after it": (combined_after_deleting, {"other": 0.5, "third": 0.5}),
    "all loaded": (all_loaded, {"default": 1}),
    "told": (told, {"default": 1}),
    "another swapped": (swapped("other", "ordinary"), {}),
    "made ready for swapping": (swapped_where_compiled, {"default": 1}),
    "mixed, its rows": (mixed("other", "default", "__base__", "default", only=[1, 3]), {"default": 1}),
    "mixed, another's": (mixed("other", "default", "__base__", "third", only=[0]), {"other": 1}),
    "mixed, the base's": (mixed("other", "default", "__base__", "__base__", only=[2, 3]), {}),
    "inference": (inferred, {"default": 1}),
    "set for inference": (set_for_inference, {"default": 1}),
}  # fmt: skip


ROWS = {"mixed, its rows": [1, 3], "mixed, another's": [0], "mixed, the base's": [2, 3]}

#: Public members that the operations above call, and the others: questions, or what has no adapter in it.
CALLED = {
    "add_adapter", "add_weighted_adapter", "delete_adapter", "disable_adapter", "disable_adapter_layers",
    "enable_adapter_layers", "enable_adapters", "from_pretrained", "get_layer_status", "get_model_status",
    "hotswap_adapter", "hotswap_adapter_from_state_dict", "inject_adapter", "load_adapter", "merge",
    "merge_adapter", "merge_and_unload", "prepare_model_for_compiled_hotswap", "rescale_adapter_scale",
    "save_pretrained", "scale_layer", "set_adapter", "set_scale", "subtract_mutated_init",
    "supports_lora_conversion", "unload", "unmerge", "unmerge_adapter", "unscale_layer", "update_layer",
}  # fmt: skip
OTHERS = {
    "active_adapter", "active_adapters", "active_peft_config", "adapter_layer_names", "base_model_torch_dtype",
    "bias", "check_hotswap_configs_compatible", "check_if_peft_model", "create_or_update_model_card",
    "disable_adapters", "disable_input_dtype_casting", "find_kappa_target_modules", "frozen_peft_weight_names",
    "generate", "get_base_layer", "get_base_model", "get_base_weight", "get_delta_weight", "get_model_config",
    "get_nb_trainable_parameters", "get_prompt", "get_prompt_embedding_to_save", "has_active_enabled_adapter",
    "lora_variants", "merged", "merged_adapters", "modules_to_save", "other_param_names", "peft_config", "prefix",
    "prepare_model_for_gradient_checkpointing", "print_trainable_parameters", "push_to_hub", "quantization_backend",
    "resolve_lora_variant", "set_requires_grad", "target_module_mapping", "tuner_layer_cls",
    "update_forward_signature", "update_generate_signature", "update_signature", "uses_shared_state", "weight",
}  # fmt: skip
WRITTEN_BY_HAND = {"reset_lora_parameters", "set_base_weight"}  # one layer's tensors, as by anybody


@pytest.mark.skipif(not peft.__version__.startswith("0.21."), reason="the list is of PEFT 0.21")
def test_the_walk_is_over_all_that_there_is():
    members = {name for kind in (PeftModel, LoraModel, Linear) for name in dir(kind) if not hasattr(nn.Module, name)}
    for module in (hotswap, peft.helpers):
        functions = inspect.getmembers(module, inspect.isfunction)
        members |= {name for name, function in functions if function.__module__ == module.__name__}
    public = {name for name in members if not name.startswith("_")}
    assert {name for name in public if not name.endswith("_init")} | {"subtract_mutated_init"} == (
        CALLED | OTHERS | WRITTEN_BY_HAND
    )


@pytest.mark.filterwarnings("ignore:Already (found|unmerged)", "ignore:Adapter (cannot be set|default was)")
@pytest.mark.parametrize("name", RIGHT)
def test_it_is_right(case, name):
    run, shares = RIGHT[name]
    assert near(run(case), case.expected(**shares)[ROWS.get(name, slice(None))])


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(case, name):
    """By a copy and by a pickled model, too; and nothing is changed."""
    run, kind, message = REFUSED[name]
    for model in (case.model, copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        case.model, state = model, copy.deepcopy(model.state_dict())
        with pytest.raises(kind, match=message):
            run(case)
        case.model.load_state_dict(state) if name == "loading another over it" else None
        if name == "merging, scaled":
            case.model.unmerge_adapter()
            continue
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in state.items())
        assert set(model.peft_config) == {"default", "other", "third"}
