"""Adapters that took part of their base into A and B: loading them, and ordinary ones made of them."""

import copy
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_kernels._double import double

from .export import WEIGHTS, changes_base, layers_of_folder, owner_of, read_adapter
from .peft import PeftAdapter
from .peft_start import LOADED_BY, STARTS, Scratch, begin, samples_of

__all__ = ["PlainExport", "export_plain", "load_adapter"]

DETERMINISTIC = ("pissa", "olora")  # what PEFT takes from a base weight is the same each time
SAME_WEIGHT = 2.0**-6  # of the largest entry: what 16 bits round off, with room

Factors = tuple[Tensor, Tensor]  # A (r, in, …), B (out, r, …)


@dataclass(frozen=True)
class PlainExport:
    """The result of :func:`export_plain`.

    Attributes:
        folder: What was written.
        ranks: Layer → its rank there.
        errors: Layer → ‖ΔW − what was written‖ / ‖ΔW‖, by the singular values that were left out; 0 where none was, and
            B A is then the same product, of the same numbers.
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
    """Write an adapter that took part of its base into A and B as an ordinary LoRA on the base as it was.

    With A₀, B₀ what it started from, ΔW = s (B A − B₀ A₀) = s [B, −B₀] [A; A₀]: of twice the rank, and nothing rounded.
    Each layer's scaling stays, whatever rsLoRA or patterns made it.

    Args:
        model_or_folder: A ``PeftModel`` with one active adapter, or an adapter folder: of
            :func:`eva_lora.initialize`, or PEFT's own "pissa", "olora", "corda" or "lora_ga".
        out: The folder to write; made if need be.
        rank: The largest rank of a layer there: the leading singular directions of ΔW, from QR decompositions of both
            factors and a singular value decomposition of 2r × 2r. None: twice the rank.
        initial: Of PEFT's own: the folder that the adapter was saved in before it was trained.
        base: Of PEFT's own "pissa" and "olora", without ``initial``: the model as it was, from which PEFT takes the
            same again. It is copied.

    Raises:
        TypeError: neither a ``PeftModel`` nor a path.
        FileNotFoundError: a folder holds no safetensors adapter.
        ValueError: an adapter that took nothing from its base, that is no sum of products B A, or whose start is not
            known; nothing is written then.
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
    else:
        config, weights = read_adapter(Path(model_or_folder))
    if not changes_base(config):
        raise ValueError(
            f"model_or_folder: init_lora_weights={config.init_lora_weights!r} leaves the base as it is, or it is not "
            "known what it leaves there: there is nothing to give back"
        )
    layers = layers_of_folder(weights, config)
    starts = _starts(config, weights, initial, base)
    made: dict[str, Tensor] = {}
    ranks, scalings, errors = {}, {}, {}
    for owner, layer in layers.items():
        a, b = weights.pop(f"{owner}.lora_A.weight"), weights.pop(f"{owner}.lora_B.weight")
        if owner not in starts or [part.shape for part in starts[owner]] != [a.shape, b.shape]:
            raise ValueError(f"initial: it holds no start for {owner}, or one of another shape")
        first, second = starts[owner]
        both = torch.cat([a, first.to(a)]), torch.cat([b, -second.to(b)], 1)
        (a, b), error = (both, 0.0) if rank is None or rank >= len(both[0]) else _truncated(*both, rank)
        made |= {f"{owner}.lora_A.weight": a.contiguous(), f"{owner}.lora_B.weight": b.contiguous()}
        name = owner.removeprefix("base_model.model.")
        ranks[name], scalings[name], errors[name] = len(a), layer.scaling, error
    others = {key: value for key, value in weights.items() if f".{STARTS}." not in key}
    strange = [key for key in others if "lora_" in key]
    if strange:
        raise ValueError(f"model_or_folder: {strange[0]} is no part of a sum of products B A")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file({**made, **others}, out / WEIGHTS, metadata={"format": "pt"})
    _plain_config(config, ranks, scalings).save_pretrained(out)
    return PlainExport(out, ranks, errors)


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
        ValueError: no LoRA adapter, or a base that is not the one it was taken from. The base's weights are then as
            they were.
    """
    from peft import PeftModel

    config, weights = read_adapter(Path(folder))
    init = config.init_lora_weights
    if not str(init).startswith(LOADED_BY):
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable)
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("model: expected a base without LoRA layers; load it anew")
    plain = copy.deepcopy(config)
    plain.init_lora_weights, plain.inference_mode = True, not is_trainable
    loaded: Any = PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable, config=plain)
    adapter = PeftAdapter(loaded, adapter_name)
    adapter.require_movable()
    starts: dict[str, Factors] = {}
    for name, layer in adapter.layers.items():
        a, b, w = (weights.get(f"base_model.model.{name}.{STARTS}.kept_{part}") for part in "abw")
        if a is None or b is None or w is None:
            raise ValueError(f"model_or_folder: {folder} does not hold what the adapter of {name} started from")
        here = samples_of(layer.get_base_layer().weight).to(w)
        if here.shape != w.shape or bool((w - here).abs().max() > SAME_WEIGHT * w.abs().max()):
            raise ValueError(
                f"model: the weight of {name} is not the one that the adapter was taken from; load the base anew"
            )
        starts[name] = a, b
    scratch = Scratch()
    for name, layer in adapter.layers.items():
        begin(layer, adapter_name, *starts[name], scratch)
    adapter.name_start(init)
    return loaded


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


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Factors, float]:
    """The leading directions of B A, and ‖what is left out‖ / ‖B A‖."""
    down, up = (torch.linalg.qr(double(matrix)) for matrix in (a.flatten(1).T, b.flatten(1)))
    u, s, v = torch.linalg.svd(up.R @ down.R.T)
    root = s[:rank].sqrt()
    shapes = (rank, *a.shape[1:]), (b.shape[0], rank, *b.shape[2:])
    factors = root[:, None] * v[:rank] @ down.Q.T, up.Q @ u[:, :rank] * root
    kept = tuple(matrix.to(a).reshape(shape) for matrix, shape in zip(factors, shapes, strict=True))
    total = float(s.square().sum())
    return (kept[0], kept[1]), float((s[rank:].square().sum() / total).sqrt()) if total else 0.0


def _plain_config(config: Any, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> Any:
    """The config of the ordinary adapter: these ranks, and alphas that give these scalings."""
    alphas = {name: scalings[name] * rank for name, rank in ranks.items()}
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
