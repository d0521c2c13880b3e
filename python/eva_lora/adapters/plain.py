"""Adapters that took part of their base into A and B: loading them, and ordinary ones made of these and of others."""

import copy
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_kernels._double import double
from eva_kernels.low_rank_update import Scratch

from .export import (
    WEIGHTS,
    AdapterLayer,
    changes_base,
    layers_of_folder,
    layers_of_model,
    owner_of,
    read_adapter,
)
from .peft import PeftAdapter
from .peft_layers import factors
from .peft_start import LOADED_BY, STARTS, begin, samples_of

__all__ = ["PlainExport", "export_plain", "load_adapter"]

LEAVING = ("true", "false", "gaussian", "orthogonal", "eva", "mica")  # PEFT's starts that leave the base as it is
SUMMED = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")
DETERMINISTIC = ("pissa", "olora")  # what PEFT takes from a base weight is the same each time
SAME_WEIGHT = 2.0**-6  # of the largest entry: what 16 bits round off, with room

Factors = tuple[Tensor, Tensor]  # A (r, in, …), B (out, r, …)


@dataclass(frozen=True)
class PlainExport:
    """The result of :func:`export_plain`.

    Attributes:
        folder: What was written.
        ranks: Layer → its rank there.
        errors: Layer → ‖ΔW − what was written‖ / ‖ΔW‖, of all its matrices together, by the singular values that were
            left out; 0 where none was, and B A is then the same product, of the same numbers.
    """

    folder: Path
    ranks: dict[str, int]
    errors: dict[str, float]


@torch.no_grad()
def export_plain(
    model_or_folder: nn.Module | str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    initial: str | Path | None = None,
    base: nn.Module | None = None,
) -> PlainExport:
    """Write an adapter as an ordinary LoRA on the base as it was, also one that took part of its base into A and B.

    With A₀, B₀ what it started from, ΔW = s (B A − B₀ A₀) = s [B, −B₀] [A; A₀]: of twice the rank, and nothing rounded.
    Each layer's scaling stays, whatever rsLoRA or patterns made it. An adapter that took nothing, such as one half of
    whose rank was held, is one already: it is written as it is, or cut down to ``rank``.

    Args:
        model_or_folder: A ``PeftModel`` with one active adapter, or an adapter folder: of
            :func:`eva_lora.initialize`, of an ordinary LoRA, or PEFT's own "pissa", "olora", "corda" or "lora_ga". An
            adapter on parameters (``target_parameters``: stacked experts) must come as a model.
        out: The folder to write; made if need be.
        rank: The largest rank of a layer there, of each expert's where it is a stack of them: the leading singular
            directions of ΔW, from QR decompositions of both factors and a singular value decomposition of as many
            rows and columns as the whole rank. None: all of it.
        initial: Of PEFT's own: the folder that the adapter was saved in before it was trained.
        base: Of PEFT's own "pissa" and "olora", without ``initial``: the model as it was, from which PEFT takes the
            same again. It is copied.

    Raises:
        TypeError: neither a ``PeftModel`` nor a path.
        FileNotFoundError: a folder holds no safetensors adapter.
        ValueError: an adapter that is no sum of products B A, or whose start is not known; nothing is written then.
    """
    from peft import PeftModel

    if isinstance(rank, bool) or not (rank is None or (isinstance(rank, int) and rank > 0)):
        raise ValueError(f"rank: expected None or an integer of at least 1, got {rank!r}")
    if isinstance(model_or_folder, nn.Module):
        model: Any = model_or_folder
        if not isinstance(model, PeftModel):
            raise TypeError(f"model_or_folder: expected a PeftModel or a folder, got {type(model).__name__}")
        name = model.active_adapter
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved, selected_adapters=[name])
            config, weights = read_adapter(Path(saved, "" if name == "default" else name))
        layers = layers_of_model(model, name)
    else:
        config, weights = read_adapter(Path(model_or_folder))
        layers = layers_of_folder(weights, config)
    if changes_base(config):
        weights = _beside_starts(weights, layers, _starts(config, weights, initial, base))
        layers = {owner: replace(layer, rank=2 * layer.rank) for owner, layer in layers.items()}
    elif str(config.init_lora_weights).lower() not in LEAVING:
        raise ValueError(
            f"model_or_folder: it is not known what init_lora_weights={config.init_lora_weights!r} leaves in the base"
        )
    elif initial is not None or base is not None:
        raise ValueError(
            f"model_or_folder: init_lora_weights={config.init_lora_weights!r} leaves the base as it is: expected "
            "neither initial nor base"
        )
    whole = rank is None or all(layer.rank <= rank for layer in layers.values())
    if changes_base(config) or not whole:
        strange = [key for key in weights if "lora_" in key and not key.endswith(SUMMED)]
        if strange:
            raise ValueError(f"model_or_folder: {strange[0]} is no part of a sum of products B A")
    left: dict[str, list[float]] = {layer.name: [0.0, 0.0] for layer in layers.values()}
    for owner, layer in layers.items():
        if rank is not None and layer.rank > rank:
            names = f"{owner}.lora_A.weight", f"{owner}.lora_B.weight"
            (weights[names[0]], weights[names[1]]), squares = _truncated(
                weights[names[0]], weights[names[1]], rank, layer.experts
            )
            left[layer.name] = [sum(both) for both in zip(left[layer.name], squares, strict=True)]
            layers[owner] = replace(layer, rank=len(weights[names[0]]) // layer.experts)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    (_plain_config(config, layers.values()) if changes_base(config) or not whole else config).save_pretrained(out)
    errors = {name: (lost / total) ** 0.5 if total else 0.0 for name, (lost, total) in left.items()}
    return PlainExport(out, {layer.name: layer.rank for layer in layers.values()}, errors)


def _beside_starts(
    weights: Mapping[str, Tensor], layers: Mapping[str, AdapterLayer], starts: Mapping[str, Factors]
) -> dict[str, Tensor]:
    """An adapter's weights with [A; A₀] for A and [B, −B₀] for B, without what only its start holds, and without what
    is left of a base weight, which PEFT saves of an output head."""
    left = tuple(f"{owner}.base_layer." for owner in layers)
    made = {key: value for key, value in weights.items() if f".{STARTS}." not in key and not key.startswith(left)}
    for owner in layers:
        names = f"{owner}.lora_A.weight", f"{owner}.lora_B.weight"
        if names[0] not in made:
            raise ValueError(f"model_or_folder: {owner} is an embedding's adapter, which is no sum of products B A")
        a, b = (made[name] for name in names)
        if owner not in starts or [part.shape for part in starts[owner]] != [a.shape, b.shape]:
            raise ValueError(f"initial: it holds no start for {owner}, or one of another shape")
        first, second = starts[owner]
        made[names[0]] = torch.cat([a, first.to(a)]).contiguous()
        made[names[1]] = torch.cat([b, -second.to(b)], 1).contiguous()
    return made


@torch.no_grad()
def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> Any:
    """Load a saved adapter onto its base: what it took from there is taken again, from A₀ and B₀ that it holds.

    An adapter that took nothing loads as with ``PeftModel.from_pretrained``.

    Args:
        model: The base, without LoRA layers, its weights as they were before :func:`eva_lora.initialize`.
        folder: The adapter's.
        adapter_name, is_trainable: As in ``PeftModel.from_pretrained``.

    Returns:
        The ``PeftModel``.

    Raises:
        FileNotFoundError: the folder holds no safetensors adapter.
        ValueError: no LoRA adapter, or a base that is not the one it was taken from. The base is then as it was.
    """
    from peft import PeftModel

    config, weights = read_adapter(Path(folder))
    init = config.init_lora_weights
    if not str(init).startswith(LOADED_BY):
        with _left_as_it_was(model):
            return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable)
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("model: expected a base without LoRA layers; load it anew")
    plain = copy.deepcopy(config)
    plain.init_lora_weights, plain.inference_mode = True, not is_trainable
    # PEFT saves what is left of an output head's weight, and loads it.
    named: dict[str, Any] = dict(model.named_modules())
    saved = {f"base_model.model.{name}.base_layer.weight": module for name, module in named.items()}
    heads = [(module, module.weight.detach().clone()) for key, module in saved.items() if key in weights]
    with _left_as_it_was(model):
        loaded: Any
        try:
            loaded = PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable, config=plain)
        finally:
            for module, whole in heads:
                module.weight.data.copy_(whole)
        adapter = PeftAdapter(loaded, adapter_name)
        adapter.require_movable()
        starts = {name: _start(name, layer, adapter_name, weights, folder) for name, layer in adapter.layers.items()}
        scratch = Scratch()
        try:
            for name, layer in adapter.layers.items():
                begin(layer, adapter_name, *starts[name], scratch)
        except BaseException:
            adapter.move_back()
            raise
        adapter.name_start(init)
    return loaded


def _start(name: str, layer: Any, adapter_name: str, weights: Mapping[str, Tensor], folder: str | Path) -> Factors:
    """A₀ and B₀ of a layer that was loaded.

    Raises:
        ValueError: the folder does not hold them, or A and B, or its base is another one.
    """
    path = f"base_model.model.{name}"
    a, b, w = (weights.get(f"{path}.{STARTS}.kept_{part}") for part in "abw")
    trained = all(f"{path}.lora_{part}.weight" in weights for part in "AB")
    matrices, modules = factors(layer, adapter_name)
    shapes = [matrices[0].shape, modules[0].weight.shape]
    if a is None or b is None or w is None or not trained or [a.shape, b.shape] != shapes:
        raise ValueError(f"model_or_folder: {folder} does not hold what the adapter of {name} started from")
    here = samples_of(layer.get_base_layer().weight).to(w)
    # Of NaN nothing is true.
    if here.shape != w.shape or not bool((w - here).abs().max() <= SAME_WEIGHT * w.abs().max()):
        raise ValueError(
            f"model: the weight of {name} is not the one that the adapter was taken from; load the base anew"
        )
    return a, b


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Within it, what fails leaves each module with all that it had, hooks and modes included: PEFT puts its layers in
    before it reads what they hold. What is in a parameter is not looked at."""

    def held(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
        """Each attribute, and where it is a table, what is in that."""
        return {key: (value, dict(value) if isinstance(value, dict) else None) for key, value in vars(module).items()}

    had = [(module, held(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in had:
            vars(module).clear()
            for key, (value, entries) in attributes.items():
                if entries is not None:
                    value.clear()
                    value.update(entries)
                vars(module)[key] = value
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _starts(
    config: Any, weights: Mapping[str, Tensor], initial: str | Path | None, base: nn.Module | None
) -> dict[str, Factors]:
    """Each layer's A₀ and B₀."""
    init = str(config.init_lora_weights)
    if init.startswith(LOADED_BY):
        owners = [key.removesuffix(f".{STARTS}.kept_a") for key in weights if key.endswith(f".{STARTS}.kept_a")]
        keys = {owner: [f"{owner}.{STARTS}.kept_{part}" for part in "ab"] for owner in owners}
        return {owner: (weights[a], weights[b]) for owner, (a, b) in keys.items() if b in weights}
    if initial is not None:
        _, first = read_adapter(Path(initial))
    elif base is not None and init.lower() in DETERMINISTIC:
        from peft import get_peft_model, get_peft_model_state_dict

        again = copy.deepcopy(config)
        again.inference_mode = False
        first = get_peft_model_state_dict(get_peft_model(copy.deepcopy(base), again))
    elif "_niter_" in init:
        raise ValueError(
            f"model_or_folder: init_lora_weights={init!r} draws what it takes from the base anew each time, and the "
            "saved adapter does not say what it was: pass initial=, the folder it was saved in before training"
        )
    else:
        also = ", or base=, the model as it was" if init.lower() in DETERMINISTIC else ""
        raise ValueError(
            f"initial: expected the folder that the {init} adapter was saved in before training{also}; got None"
        )
    owners = [owner_of(key) for key in first if key.endswith(".lora_A.weight")]
    return {owner: (first[f"{owner}.lora_A.weight"], first[f"{owner}.lora_B.weight"]) for owner in owners}


def _truncated(a: Tensor, b: Tensor, rank: int, experts: int) -> tuple[Factors, tuple[float, float]]:
    """The leading directions of B A, and ‖what is left out‖² and ‖B A‖²; of a stack of experts of each, all together.

    PEFT has A as (experts · r, …), an expert's rows together, and B as (out, r · experts), those of one rank together.
    """
    first = double(a).reshape(experts, len(a) // experts, -1)  # (experts, r, in)
    second = double(b).reshape(len(b), -1, experts).permute(2, 0, 1)  # (experts, out, r)
    down, up = torch.linalg.qr(first.mT), torch.linalg.qr(second)
    u, s, v = torch.linalg.svd(up.R @ down.R.mT, full_matrices=False)
    rank = min(rank, s.shape[1])
    root = s[:, :rank].sqrt()
    first, second = root[..., None] * (v[:, :rank] @ down.Q.mT), up.Q @ u[..., :rank] * root[:, None]
    shapes = (experts * rank, *a.shape[1:]), (len(b), rank * experts, *b.shape[2:])
    factors = first.flatten(0, 1), second.permute(1, 2, 0).flatten(1)
    kept = tuple(matrix.to(a).reshape(shape).contiguous() for matrix, shape in zip(factors, shapes, strict=True))
    return (kept[0], kept[1]), (float(s[:, rank:].square().sum()), float(s.square().sum()))


def _plain_config(config: Any, layers: Collection[AdapterLayer]) -> Any:
    """The config of the ordinary adapter: these ranks, and alphas that give these scalings."""
    ranks = {layer.name: layer.rank for layer in layers}
    alphas = {layer.name: layer.scaling * layer.rank for layer in layers}
    alphas = {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}
    plain = copy.deepcopy(config)
    plain.init_lora_weights, plain.use_rslora = True, False
    for option in ("eva_config", "corda_config", "lora_ga_config"):
        if hasattr(plain, option):
            setattr(plain, option, None)
    plain.r, plain.lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    plain.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != plain.r}
    plain.alpha_pattern = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != plain.lora_alpha}
    return plain
