"""The base weights under LoRA layers, as the layers compute with them: quantised ones of any library included."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["BaseWeight", "Dequantize", "KnownWeight", "Requantize"]

Dequantize = Callable[[str, nn.Module], "Tensor | None"]
Requantize = Callable[[str, nn.Module, Tensor], object]

PROBED_ROWS = 512  # of the identity, at a time
CHECKED_COLUMNS = 4
LINEAR = nn.Linear.forward
AS_COMPUTED = 2.0**-5  # of the largest entry: what an 8-bit activation or a 16-bit output may round off


@dataclass(frozen=True)
class BaseWeight:
    """The base weight of one LoRA layer.

    Attributes:
        name: The layer's.
        module: What computes with it: the base layer, or a layer whose B is zero.
        in_features, out_features: Of the matrix.
        dtype: Of the inputs that the module is called with.
        fan_in_fan_out: Whether the module's own ``weight`` is (in, out).
        matrix_is_weight: Whether the module's ``weight``, if it is floating point, is the matrix (out, in), flattened;
            False: only its outputs tell.
        bias_beside: Whether the adapter has a bias beside B.
        part: Which of the site's parts it is multiplied with the inputs of.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    dtype: torch.dtype
    fan_in_fan_out: bool = False
    matrix_is_weight: bool = True
    bias_beside: bool = False
    part: int = 0

    @torch.no_grad()
    def read(self, dequantize: Dequantize | None = None) -> Tensor:  # (out, in) float32
        """The matrix that the layer multiplies its inputs with, on the layer's device.

        What ``dequantize`` gives; else a weight in floating point as it is, or what bitsandbytes, HQQ and torchao make
        of theirs, if some of its columns are what the layer computes with, which a plain ``nn.Linear`` is not asked;
        else what the layer makes of the identity, which every linear layer answers with its matrix.

        Raises:
            TypeError: what ``dequantize`` gives is no tensor.
            ValueError: what ``dequantize`` gives is not what the layer computes with, or the layer is not linear.
        """
        given = dequantize(self.name, self.module) if dequantize is not None else None
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(
                f"dequantize: expected a tensor or None for layer {self.name}, it returned a {type(given).__name__}"
            )
        weight = self._own() if given is None and self.matrix_is_weight else given
        if weight is not None and weight.ndim > 1:
            matrix = weight.detach().float().flatten(1)
            # A plain linear layer computes with nothing else; a convolution takes no rows.
            plain = not self.fan_in_fan_out and _is_plain(self.module)
            believed = given is None and (weight.ndim > 2 or plain)
            if matrix.shape == (self.out_features, self.in_features) and (believed or self._is_computed(matrix)):
                return matrix
        if given is not None:
            raise ValueError(
                f"dequantize: what it returned for layer {self.name}, {tuple(given.shape)}, is not the matrix "
                f"({self.out_features}, {self.in_features}) that the {type(self.module).__name__} multiplies its "
                "inputs with"
            )
        return self._probed()

    @torch.no_grad()
    def samples(self, count: int) -> tuple[float, ...]:
        """``count`` entries each of as many columns of that matrix: the same ones each time."""
        columns, rows = (
            [i * size // count for i in range(min(count, size))] for size in (self.in_features, self.out_features)
        )
        return tuple(self._images(columns, _device_of(self.module))[:, rows].flatten().tolist())

    def require_requantizable(self) -> None:
        """Raise ValueError unless :meth:`requantize` knows how, with no callable to do it."""
        if type(getattr(self.module, "weight", None)).__name__ != "Params4bit":
            raise ValueError(
                f"requantize: expected a callable for layer {self.name}, a {type(self.module).__name__}: only "
                "bitsandbytes' 4 bits are quantised anew without one"
            )

    @torch.no_grad()
    def requantize(self, matrix: Tensor, requantize: Requantize | None = None) -> None:  # (out, in)
        """Make the layer compute with another matrix, quantised as its own is: by ``requantize(name, layer, matrix)``,
        which changes the layer, or by bitsandbytes."""
        if requantize is not None:
            requantize(self.name, self.module, matrix)
            return
        self.require_requantizable()
        from bitsandbytes.functional import quantize_4bit

        module: Any = self.module
        weight, how = module.weight, module.weight.quant_state
        packed, state = quantize_4bit(
            matrix.to(weight.device, how.dtype), blocksize=how.blocksize, compress_statistics=how.nested,
            quant_type=how.quant_type, quant_storage=weight.quant_storage,
        )  # fmt: skip
        weight.data, weight.quant_state = packed, state
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = state

    def _own(self) -> Tensor | None:
        """The weight that the module keeps, as far as it is known how."""
        module: Any = self.module
        weight: Any = getattr(module, "weight", None)
        if hasattr(module, "W_q"):  # HQQ
            return cast(Tensor, module.dequantize())
        if type(weight).__name__ == "Params4bit":
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        if type(weight).__name__ == "Int8Params":
            scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
            return None if scales is None else weight.data.float() * (scales.float() / 127)[:, None]
        if type(weight).__module__.startswith("torchao."):
            return cast(Tensor, weight.dequantize())
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.device.type == "meta":
            return None
        return weight.T if self.fan_in_fan_out else weight

    def _probed(self) -> Tensor:
        device = _device_of(self.module)
        pieces = []
        for start in range(0, self.in_features, PROBED_ROWS):
            rows = range(start, min(start + PROBED_ROWS, self.in_features))
            pieces.append(self._images(rows, device))
        return torch.cat(pieces).T.contiguous()

    def _images(self, rows: Iterable[int], device: torch.device) -> Tensor:  # (rows, out)
        """What the layer makes of some unit vectors, its bias taken off."""
        index = [*rows]
        x = torch.zeros(len(index) + 1, self.in_features, dtype=self.dtype, device="cpu")
        x[range(len(index)), index] = 1
        x = x.to(device)
        batched = not self.matrix_is_weight  # some layers with a LoRA take (batch, tokens, features) only
        try:
            y = self.module.forward(x[None] if batched else x)  # past hooks, which may be reading this
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"layer {self.name}: a {type(self.module).__name__}, it does not take {tuple(x.shape)} of {x.dtype}, "
                f"by which it is seen what it computes with: {type(error).__name__}: {error}"
            ) from error
        y = y[0] if batched and isinstance(y, Tensor) else y
        if not isinstance(y, Tensor) or y.shape != (len(x), self.out_features):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"layer {self.name}: expected outputs of {self.out_features} features for inputs of "
                f"{self.in_features}, got {got}"
            )
        return y[:-1].float() - y[-1].float()

    def _is_computed(self, matrix: Tensor) -> bool:
        """Whether some columns of a matrix are what the layer computes with."""
        columns = sorted({i * self.in_features // CHECKED_COLUMNS for i in range(CHECKED_COLUMNS)})
        told, seen = matrix[:, columns].T, self._images(columns, matrix.device)
        largest = max(map(float, (matrix.max(), -matrix.min(), seen.abs().max())))
        return bool((told - seen).abs().max() <= AS_COMPUTED * largest)


@dataclass(frozen=True)
class KnownWeight(BaseWeight):
    """A matrix that a layer is known to multiply its rows with, and need not be asked.

    Attributes:
        matrix: Gives it, (out, in), in any floating dtype.
    """

    matrix: Callable[[], Tensor] = field(kw_only=True)

    @torch.no_grad()
    def read(self, dequantize: Dequantize | None = None) -> Tensor:  # (out, in) float32
        """The matrix; ``dequantize`` is not asked."""
        return self.matrix().detach().float()


def _is_plain(module: nn.Module) -> bool:
    """Whether a module multiplies with its weight as it is, and nobody has put another forward in place of its own."""
    if type(module) is not nn.Linear or "forward" in vars(module) or nn.Linear.forward is not LINEAR:
        return False
    return type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    hook = vars(module).get("_hf_hook")
    if getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)  # type: ignore[union-attr]
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
