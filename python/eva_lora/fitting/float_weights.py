"""Float weights of a model that is quantised, one at a time: from a folder, a state dict or a module."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapters import BaseWeight, Dequantize, Requantize
from .rescaling import Scales, norm_ratios, scales_of

__all__ = ["FloatWeights", "LayerWeights"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAME_DIRECTION = 0.5  # cosine of a weight and what a quantiser made of it; that of two others is about 0

SAME_LENGTH = 2.0  # times: more is a scale that was left out

SAME_NORM = 2.0**-6  # of a norm's largest entry: what short dtypes round off


class FloatWeights:
    """The weights of a model's layers by the layers' names, read when they are asked for.

    Args:
        keys: Names of all tensors there are.
        get: Reads one by name.
        source: What they come from, for messages.
    """

    def __init__(self, keys: Collection[str], get: Callable[[str], Tensor], source: str) -> None:
        self._keys, self._get, self._source = frozenset(keys), get, source

    @classmethod
    def of(cls, weights: Any) -> "FloatWeights":
        """From a folder of safetensors (or one such file), the id of a model on the hub, a state dict or a module.

        Of a folder only the headers are read now; of a model on the hub its safetensors are loaded into the hub's
        cache.

        Raises:
            TypeError: none of these.
            FileNotFoundError: there are no safetensors.
        """
        if isinstance(weights, cls):
            return weights
        if isinstance(weights, nn.Module):
            whole: Any = weights
            inner = whole.get_base_model() if hasattr(weights, "get_base_model") else weights  # under PEFT's layers
            parameters = inner.named_parameters(remove_duplicate=False)  # tied ones by each of their names
            named = {name.replace(".base_layer.", "."): parameter for name, parameter in parameters}
            return cls(named, named.__getitem__, f"the {type(weights).__name__}")
        if isinstance(weights, Mapping):
            for name, value in weights.items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"float_weights: expected tensors in the state dict, {name!r} is a {type(value).__name__}"
                    )
            return cls(weights, weights.__getitem__, "the state dict")
        if not isinstance(weights, (str, Path)) or not str(weights):
            raise TypeError(
                "float_weights: expected a folder, a model's id, a state dict or a module, got "
                f"{type(weights).__name__}"
            )
        files = _files(Path(weights) if Path(weights).exists() else _from_hub(str(weights)))
        return cls(files, lambda key: _read(files[key], key), str(weights))

    def has(self, name: str) -> bool:
        """Whether there is a weight of that very name."""
        return f"{name}.weight" in self._keys

    def key_of(self, name: str) -> str:
        """The name that a layer's weight has there.

        It is the layer's own, or one of the two ends with the other: models with a head, and those in another model,
        have names that begin otherwise.

        Raises:
            ValueError: there is none, or several.
        """
        wanted = f"{name}.weight"
        if wanted in self._keys:
            return wanted
        found = [key for key in self._keys if key.endswith(f".{wanted}") or wanted.endswith(f".{key}")]
        longest = max(map(len, found), default=0)
        found = [key for key in found if len(key) == longest]
        if len(found) != 1:
            among = f"several: {sorted(found)}" if found else "none"
            raise ValueError(
                f"float_weights: expected a weight of layer {name} in {self._source}, there is {among}. Where the "
                "model was loaded under other names, pass the float model, or a state dict by the model's own names"
            )
        return found[0]

    def other_norm(self, name: str, weight: Tensor) -> Tensor | None:  # (n,) -> (n,) float32
        """The weight of a norm of that name, on the CPU, where it is another than this, beyond rounding."""
        try:
            here = self._get(self.key_of(name)).detach()
        except ValueError:
            return None
        if (
            here.shape != weight.shape
            or not here.is_floating_point()
            or "meta" in (here.device.type, weight.device.type)
        ):
            return None
        here, there = here.float().cpu(), weight.detach().float().cpu()
        return here if (here - there).abs().max() > SAME_NORM * here.abs().max() else None

    def matrix(self, name: str, quantized: Tensor, *, fan_in_fan_out: bool = False) -> Tensor:  # (out, in) float32
        """A layer's weight as it is there, on the device of what a quantiser made of it.

        Raises:
            ValueError: there is none, it has another shape or is quantised itself.
        """
        weight = self._get(self.key_of(name)).detach()
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise ValueError(
                f"float_weights: that of layer {name} in {self._source} is {weight.dtype}, quantised itself"
            )
        if weight.device.type == "meta":
            raise ValueError(
                f"float_weights: that of layer {name} in {self._source} is on the meta device; load it first"
            )
        matrix = (weight.T if fan_in_fan_out and weight.ndim == 2 else weight).flatten(1)
        if matrix.shape != quantized.shape:
            raise ValueError(
                f"float_weights: expected {tuple(quantized.shape)} for layer {name}, {self._source} has "
                f"{tuple(matrix.shape)}"
            )
        return matrix.to(quantized.device, torch.float32, copy=True)

    def read(
        self, name: str, quantized: Tensor, *, fan_in_fan_out: bool = False, scales: Scales | None = None
    ) -> Tensor:  # (out, in) float32
        """A layer's weight, on the device of what a quantiser made of it.

        Args:
            name: The layer's.
            quantized: (out, in), what the layer computes with.
            fan_in_fan_out: Whether weights are kept as (in, out).
            scales: Of its rows and columns, by which it becomes what the quantiser was given.

        Raises:
            ValueError: there is none, it has another shape or is quantised itself, or is no weight that this could be
                made of.
        """
        matrix = self.matrix(name, quantized, fan_in_fan_out=fan_in_fan_out)
        if scales is not None:
            scales.apply_(matrix)
        product = torch.dot(matrix.flatten(), quantized.flatten())  # without a third matrix
        cosine = float(product / (matrix.norm() * quantized.norm()).clamp_min(1e-30))
        longer = float(matrix.norm() / quantized.norm().clamp_min(1e-30))
        if not math.isfinite(longer):
            raise ValueError(
                f"float_weights: that of layer {name} in {self._source}, or what its base computes with, has NaN or Inf"
            )
        if quantized.any() and not (cosine > SAME_DIRECTION and 1 / SAME_LENGTH < longer < SAME_LENGTH):
            raise ValueError(
                f"float_weights: those of layer {name} in {self._source} are not what its base was made of: their "
                f"cosine is {cosine:.2f}, and they are {longer:.2g} times as long"
            )
        return matrix


class LayerWeights:
    """Layers' float weights and what their bases compute with, read one layer at a time.

    Where norms of the model are others than among the float weights, its weights were scaled before they were
    quantised, and norms and layers before them scaled back, as AWQ does it; the float weights are then scaled likewise.

    Args:
        model: Whose layers they are.
        bases: Layer → its base weight.
        floats: The weights before they were quantised.
        dequantize: As in :func:`eva_lora.fit_quantization_error`.

    Attributes:
        other_norm: The first norm that is another than among the float weights; None where all are the same.

    Raises:
        ValueError: a layer has no float weight.
    """

    def __init__(
        self,
        model: nn.Module,
        bases: Mapping[str, BaseWeight],
        floats: FloatWeights,
        dequantize: Dequantize | None = None,
    ) -> None:
        self._bases, self._floats, self._dequantize = bases, floats, dequantize
        wrapper: Any = model
        inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
        tied = _tied_weights(inner)
        self._kept_as = {name: name if floats.has(name) else tied.get(name, name) for name in bases}
        for name in self._kept_as.values():
            floats.key_of(name)
        norms = dict(_other_norms(inner, floats))
        self.other_norm = next(iter(norms), None)
        self._ratios = [ratio for ratios in norms.values() for ratio in ratios]
        self._scales: dict[str, Scales] | None = None if norms else {}

    def read(self, name: str) -> tuple[Tensor, Tensor]:  # (out, in) float32, both
        """W, and Q that the layer computes with, on the layer's device."""
        if self._scales is None:
            self._scales = scales_of(self._unscaled(), self._ratios)
        base = self._bases[name]
        quantized = base.read(self._dequantize)
        weight = self._floats.read(
            self._kept_as[name], quantized, fan_in_fan_out=base.fan_in_fan_out, scales=self._scales.get(name)
        )
        return weight, quantized

    def _unscaled(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, base in self._bases.items():
            quantized = base.read(self._dequantize)
            kept_as = self._kept_as[name]
            yield name, self._floats.matrix(kept_as, quantized, fan_in_fan_out=base.fan_in_fan_out), quantized

    def bias_beside(self, name: str) -> bool:
        """Whether a layer's adapter has a bias."""
        return self._bases[name].bias_beside

    def require_requantizable(self, requantize: Requantize | None) -> None:
        """Raise ValueError unless every layer's base can be quantised anew."""
        for base in self._bases.values() if requantize is None else ():
            base.require_requantizable()

    def requantize(self, name: str, matrix: Tensor, requantize: Requantize | None) -> None:  # (out, in)
        """Make a layer's base compute with another matrix, as near as its quantiser comes."""
        self._bases[name].requantize(matrix, requantize)

    def error_of(self, name: str) -> tuple[Tensor, Tensor]:  # (out, in) float32, both
        """W, and M = W − Q."""
        weight, quantized = self.read(name)
        return weight, weight - quantized


def _tied_weights(model: Any) -> dict[str, str]:
    """The output head's name → that of the input embedding whose weight it has, if it has: a file holds one of them."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {names[id(head)]: names[id(embedding)]} if id(head) in names and id(embedding) in names else {}


def _other_norms(model: nn.Module, floats: FloatWeights) -> Iterator[tuple[str, list[Tensor]]]:
    """Norms whose weight is another than among the float weights, and what the columns they feed may be scaled by."""
    for name, parameter in model.named_parameters():
        norm, _, kind = name.rpartition(".")
        before = floats.other_norm(norm, parameter) if kind == "weight" and parameter.ndim == 1 else None
        if before is not None:
            yield norm, norm_ratios(before, parameter.detach().cpu())


def _files(path: Path) -> dict[str, Path]:
    """Name of each tensor → the file that it is in. Of each file the header is read."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((path / name for name in (SINGLE, INDEX) if (path / name).is_file()), path)
    if path.name.endswith(".index.json"):
        return _indexed(path)
    files = [path] if path.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"float_weights: there are no safetensors in {folder}; of weights in other files pass the float model, or "
            "what its save_pretrained writes"
        )
    found: dict[str, Path] = {}
    for file in files:
        for key in _keys(file):
            if key in found:
                raise ValueError(f"float_weights: {found[key]} and {file} both hold {key}; name the file that is meant")
            found[key] = file
    return found


def _indexed(path: Path) -> dict[str, Path]:
    try:
        listed = {
            str(key): path.parent / name for key, name in json.loads(path.read_text("utf-8"))["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"float_weights: {path} is no index of safetensors: {type(error).__name__}: {error}"
        ) from error
    files = sorted(set(listed.values()))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"float_weights: {path} names files that are not there: {missing}")
    held = {file: _keys(file) for file in files}
    for key, file in listed.items():
        if key not in held[file]:
            raise ValueError(f"float_weights: {path} says that {key} is in {file.name}, which does not hold it")
    return listed


def _keys(file: Path) -> frozenset[str]:
    """The names of a file's tensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            return frozenset(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"float_weights: {file} is damaged or no safetensors file: {error}") from error


def _read(file: Path, key: str) -> Tensor:
    with torch.device("cpu"), safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise FileNotFoundError(f"float_weights: there is no folder or file {name}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"float_weights: there is no folder {name}, and no such model to be had: {error}"
        ) from error
