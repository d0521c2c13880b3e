"""An adapter that every serving engine loads and scales exactly: one rank, one scaling, no patterns."""

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .peft_start import LOADED_BY

__all__ = [
    "MUTATING",
    "VLLM_RANKS",
    "WEIGHTS",
    "AdapterLayer",
    "changes_base",
    "export_uniform",
    "layers_of_folder",
    "layers_of_model",
    "owner_of",
    "read_adapter",
]

#: Values of vLLM's ``max_lora_rank``; an adapter of one of these ranks wastes no memory there.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

WEIGHTS = "adapter_model.safetensors"
MUTATING = ("pissa", "olora", "corda", "lora_ga")  # PEFT's initialisations that leave W − s B A in the base


def export_uniform(
    model_or_folder: nn.Module | str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    buckets: Sequence[int] | None = None,
) -> Path:
    """Write a PEFT LoRA adapter anew with one rank everywhere and a scaling of exactly 1.

    EVA gives layers different ranks, and serving engines read one: vLLM drops ``alpha_pattern`` and scales
    all layers alike, SGLang refuses patterns, llama.cpp divides one alpha by each layer's rank. Here each
    layer's A and B are padded with zeros and its scaling goes into B, so that every layer's ΔW stays what it
    was to within one rounding of B's dtype. Layers without an adapter stay without.

    Args:
        model_or_folder: A ``PeftModel`` with one active adapter, or an adapter folder. An adapter on parameters
            (``target_parameters``: stacked experts) must come as a model.
        out: The folder to write; made if need be.
        rank: The rank to pad to, at least the largest there is. None: the largest there is.
        buckets: Ranks to choose from in place of ``rank``, the smallest that fits (:data:`VLLM_RANKS`).

    Returns:
        ``out``.

    Raises:
        TypeError: neither a ``PeftModel`` nor a path.
        FileNotFoundError: the folder holds no safetensors adapter.
        ValueError: no LoRA adapter, a damaged one, a layer that cannot be padded, or a rank that is too
            small; nothing is written then.
    """
    from peft import PeftModel

    if rank is not None and buckets is not None:
        raise ValueError("rank: expected either rank or buckets, got both")
    if isinstance(model_or_folder, nn.Module):
        model: Any = model_or_folder
        if not isinstance(model, PeftModel):
            raise TypeError(f"model_or_folder: expected a PeftModel or a folder, got {type(model).__name__}")
        name = model.active_adapter
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved, selected_adapters=[name])
            folder = Path(saved, "" if name == "default" else name)
            return _export(folder, layers_of_model(model, name), Path(out), rank, buckets)
    return _export(Path(model_or_folder), None, Path(out), rank, buckets)


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's rank (that of each expert, where it is a stack of them), and what PEFT multiplies B A x with.

    Attributes:
        name: What the patterns of a ``LoraConfig`` call it; an attention's output projection goes by the attention.
    """

    name: str
    rank: int
    scaling: float
    experts: int = 1


def _export(
    folder: Path, layers: dict[str, AdapterLayer] | None, out: Path, rank: int | None, buckets: Sequence[int] | None
) -> Path:
    config, weights = read_adapter(folder)
    if changes_base(config):
        raise ValueError(
            f"model_or_folder: init_lora_weights={config.init_lora_weights!r} has taken part of the base into A and B, "
            "which serve no other base: eva_lora.export_plain makes an ordinary adapter of it first"
        )
    if layers is None:
        layers = layers_of_folder(weights, config)
    target = _target(max(layer.rank for layer in layers.values()), rank, buckets)
    uniform = {key: _uniform(key, value, layers, target) for key, value in weights.items()}
    plain = copy.deepcopy(config)
    plain.r = plain.lora_alpha = target
    plain.rank_pattern, plain.alpha_pattern, plain.use_rslora = {}, {}, False
    plain.init_lora_weights, plain.eva_config = True, None
    out.mkdir(parents=True, exist_ok=True)
    save_file(uniform, out / WEIGHTS, metadata={"format": "pt"})
    plain.save_pretrained(out)
    return out


def read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The ``LoraConfig`` and the weights of an adapter folder.

    Raises:
        FileNotFoundError, ValueError: as :func:`export_uniform`.
    """
    from peft import LoraConfig, PeftConfig

    for file in ("adapter_config.json", WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"model_or_folder: {folder} holds no {file}")
    config: Any = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"model_or_folder: expected a LoRA adapter, {folder} holds {config.peft_type}")
    try:
        with torch.device("cpu"):  # whatever the process's default is
            weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"model_or_folder: {folder / WEIGHTS} is damaged: {error}") from error
    if not any(_role(key) for key in weights):
        raise ValueError(f"model_or_folder: {folder} holds no LoRA weights")
    return config, weights


def changes_base(config: Any) -> bool:
    """Whether a ``LoraConfig``'s initialisation takes part of the base weights into A and B."""
    init = str(config.init_lora_weights).lower()
    return init.startswith((LOADED_BY, *MUTATING))


def _target(largest: int, rank: int | None, buckets: Sequence[int] | None) -> int:
    if buckets is not None:
        fitting = [bucket for bucket in buckets if bucket >= largest]
        if not fitting:
            raise ValueError(f"buckets: expected one of at least {largest}, the largest rank, got {tuple(buckets)}")
        return min(fitting)
    if rank is not None and rank < largest:
        raise ValueError(f"rank: expected at least {largest}, the largest rank of a layer, got {rank}")
    return rank or largest


def _role(key: str) -> str | None:
    """Which of a layer's factors a weight is: "A", "B", the "bias" of B, or None for anything else."""
    owner, _, last = key.rpartition(".")
    if last in ("lora_embedding_A", "lora_embedding_B"):
        return last[-1]
    if owner.endswith((".lora_A", ".lora_B")):
        return "bias" if last == "bias" else owner[-1]
    return None


def _uniform(key: str, value: Tensor, layers: dict[str, AdapterLayer], target: int) -> Tensor:
    role = _role(key)
    if role is None:
        return value
    layer = layers[owner_of(key)]
    if role == "A":
        return _padded(key, value, role, layer, target)
    scaled = (value.double() * layer.scaling).to(value.dtype)  # one rounding
    return scaled if role == "bias" else _padded(key, scaled, role, layer, target)


def owner_of(key: str) -> str:
    return key.split(".lora_")[0]


def _padded(key: str, value: Tensor, role: str, layer: AdapterLayer, target: int) -> Tensor:
    """A [experts · rank, …], an expert's rows together, or B [out, rank · experts, …], those of one rank together."""
    dim, expected = (0 if role == "A" else 1), layer.rank * layer.experts
    if value.ndim <= dim or value.shape[dim] != expected:
        raise ValueError(
            f"model_or_folder: {key} has shape {tuple(value.shape)}, expected size {expected} in dim {dim}"
        )
    pair = (layer.experts, layer.rank) if role == "A" else (layer.rank, layer.experts)
    value = value.reshape(*value.shape[:dim], *pair, *value.shape[dim + 1 :])
    shape = list(value.shape)
    shape[1] = target - layer.rank  # where the rank stands in either
    return torch.cat([value, value.new_zeros(shape)], 1).flatten(dim, dim + 1).contiguous()


def layers_of_model(model: nn.Module, adapter: str) -> dict[str, AdapterLayer]:
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention

    layers, names = {}, dict[str, str]()
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        name = names.get(path) or path.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(layer, MultiheadAttention):
            names[f"{path}.base_layer.out_proj"] = name
        if hasattr(layer, "parameter_name"):
            name = f"{name}.{layer.parameter_name}"
        experts = getattr(layer, "num_experts", 1)
        layers[path] = AdapterLayer(name, layer.r[adapter], float(layer.scaling[adapter]), experts)
    return layers


def layers_of_folder(weights: dict[str, Tensor], config: Any) -> dict[str, AdapterLayer]:
    from peft.utils.other import get_pattern_key

    if config.target_parameters:
        raise ValueError(
            f"model_or_folder: the folder's adapter is on parameters ({sorted(config.target_parameters)}), whose ranks "
            "it does not tell; load it and pass the model"
        )
    layers = {}
    for key, a in weights.items():
        if _role(key) != "A":
            continue
        name = owner_of(key).removeprefix("base_model.model.").partition(".base_layer")[0]  # nested in an attention
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        if rank != a.shape[0]:
            raise ValueError(f"model_or_folder: A of {name} has rank {a.shape[0]}, its adapter_config.json says {rank}")
        scaling = float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
        layers[owner_of(key)] = AdapterLayer(name, rank, scaling)
    return layers
