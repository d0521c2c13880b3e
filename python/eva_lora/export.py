"""An adapter that every serving engine loads and scales exactly: one rank, one scaling, no patterns."""

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["VLLM_RANKS", "export_uniform"]

#: Values of vLLM's ``max_lora_rank``; an adapter of one of these ranks wastes no memory there.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_WEIGHTS = "adapter_model.safetensors"


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
        model_or_folder: A ``PeftModel`` with one active adapter, or an adapter folder.
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
    from peft import LoraConfig, PeftConfig, PeftModel

    if rank is not None and buckets is not None:
        raise ValueError("rank: expected either rank or buckets, got both")
    if isinstance(model_or_folder, nn.Module):
        model: Any = model_or_folder
        if not isinstance(model, PeftModel):
            raise TypeError(f"model_or_folder: expected a PeftModel or a folder, got {type(model).__name__}")
        name = model.active_adapter
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved, selected_adapters=[name])
            return export_uniform(Path(saved, "" if name == "default" else name), out, rank=rank, buckets=buckets)

    folder = Path(model_or_folder)
    for file in ("adapter_config.json", _WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"model_or_folder: {folder} holds no {file}")
    config: Any = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"model_or_folder: expected a LoRA adapter, {folder} holds {config.peft_type}")
    try:
        weights = load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"model_or_folder: {folder / _WEIGHTS} is damaged: {error}") from error

    ranks = {key: a.shape[0] for key, a in weights.items() if _role(key) == "A"}
    if not ranks:
        raise ValueError(f"model_or_folder: {folder} holds no LoRA weights")
    target = _target(max(ranks.values()), rank, buckets)
    uniform = {key: _uniform(key, value, weights, config, target) for key, value in weights.items()}
    plain = copy.deepcopy(config)
    plain.r = plain.lora_alpha = target
    plain.rank_pattern, plain.alpha_pattern, plain.use_rslora = {}, {}, False
    plain.init_lora_weights, plain.eva_config = True, None
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(uniform, out / _WEIGHTS, metadata={"format": "pt"})
    plain.save_pretrained(out)
    return out


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


def _uniform(key: str, value: Tensor, weights: dict[str, Tensor], config: Any, target: int) -> Tensor:
    role = _role(key)
    if role is None:
        return value
    layer, factor = key.split(".lora_")[0], key.split(".lora_")[1]
    a = weights[f"{layer}.lora_{factor.replace('B', 'A', 1).replace('bias', 'weight')}"]
    rank = a.shape[0]
    if role == "A":
        return _padded(key, value, 0, rank, target)
    scaled = (value.double() * _scaling(layer, rank, config)).to(value.dtype)  # one rounding
    return scaled if role == "bias" else _padded(key, scaled, 1, rank, target)


def _padded(key: str, value: Tensor, dim: int, rank: int, target: int) -> Tensor:
    if value.ndim <= dim or value.shape[dim] != rank:
        raise ValueError(f"model_or_folder: {key} has shape {tuple(value.shape)}, expected size {rank} in dim {dim}")
    shape = list(value.shape)
    shape[dim] = target - rank
    return torch.cat([value, value.new_zeros(shape)], dim).contiguous()


def _scaling(layer: str, rank: int, config: Any) -> float:
    """What PEFT multiplies B A x with in this layer."""
    from peft.utils.other import get_pattern_key

    name = layer.removeprefix("base_model.model.")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    expected = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    if expected != rank:
        raise ValueError(f"model_or_folder: A of {name} has rank {rank}, its adapter_config.json says {expected}")
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
