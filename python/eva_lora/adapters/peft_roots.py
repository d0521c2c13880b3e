"""Where PEFT's adapters are in a model, whatever wraps it: the base models that their layers' names are relative to."""

from itertools import zip_longest

from torch import nn

from .outline import plain_modules

__all__ = ["base_models"]


def base_models(model: nn.Module) -> dict[str, nn.Module]:
    """The base models with PEFT LoRA layers in ``model``, relative to which these are named, by their paths there.

    PEFT gives each base model its adapters' configs as an attribute. Whatever wraps it may hand that on, and has none
    of its own: only the model itself says what its layers' names are relative to.

    Raises:
        ValueError: a LoRA layer is in none of them, or one of them is in another.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    roots: dict[str, nn.Module] = {}
    around: dict[int, str] = {}  # LoRA layer -> path of the base model that it is in
    for path, module in plain_modules(model):
        if not isinstance(vars(module).get("peft_config"), dict) or isinstance(module, BaseTuner):
            continue
        layers = [id(layer) for layer in module.modules() if isinstance(layer, LoraLayer)]
        outer = {around[layer] for layer in layers if layer in around}
        if outer:
            raise ValueError(
                f"model: the PEFT model {path!r} is part of another, {outer.pop()!r}, whose configuration does not "
                "describe its layers; adapt only one of them, or give the inner one's layers to the outer"
            )
        if layers:
            roots[path] = module
            around |= dict.fromkeys(layers, path)
    if not roots or any(isinstance(module, LoraLayer) and id(module) not in around for module in model.modules()):
        raise ValueError("model: it has PEFT LoRA layers, but no peft_config says how they were made")
    return _without_common(roots)


def _without_common(roots: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Paths from where they part: what wraps all of them is left out, and what PEFT puts between."""
    parts = {path: path.removesuffix("base_model.model").rstrip(".").split(".") for path in roots}
    common = 0
    if len(roots) > 1:
        common = next(i for i, names in enumerate(zip_longest(*parts.values())) if len(set(names)) > 1)
    return {".".join(parts[path][common:]): root for path, root in roots.items()}
