"""What a layer's rows are made of, and in which order they lie, where their shape does not tell: seen in a forward."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Origins", "order_of_view"]

OF_ENCODER, OF_DECODER, OF_OTHERS = 1, 2, 4

#: Operations whose results' rows are each made of the same row of one argument, and that argument's position; so are
#: those of all that PyTorch calls pointwise.
ROW_BY_ROW = {
    "mm": 0, "addmm": 1, "linear": 0, "embedding": 1, "native_layer_norm": 0, "_fused_rms_norm": 0, "_softmax": 0,
    "_log_softmax": 0, "native_dropout": 0, "_to_copy": 0, "detach": 0, "alias": 0, "clone": 0, "view": 0,
    "_unsafe_view": 0, "_reshape_alias": 0, "split": 0, "split_with_sizes": 0, "slice": 0, "unsqueeze": 0, "squeeze": 0,
}  # fmt: skip
VIEWS = ("view", "_unsafe_view", "_reshape_alias")


class Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, it is seen of every tensor which fields of the batch it is made of, and in which order flat rows lie.

    Args:
        encoder: The batch's tensors that hold tokens, of an encoder–decoder those of the encoder.
        decoder: Those that hold the decoder's.
        others: Those that hold something else than tokens, images for instance.
        shapes: (batch, tokens) of either side.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        encoder: Iterable[Tensor] = (),
        decoder: Iterable[Tensor] = (),
        others: Iterable[Tensor] = (),
        shapes: Iterable[Sequence[int]] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins: dict[int, tuple[int, StorageWeakRef]] = {}  # of storages; whose numbers no others get meanwhile
        self._batch_first: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # flat rows -> their order, if known
        pairs = {tuple(shape) for shape in shapes if len(shape) == 2 and 1 not in shape}
        self._shapes = [pair for pair in pairs if pair[::-1] not in pairs]  # else neither order shows
        for kind, tensors in ((OF_ENCODER, encoder), (OF_DECODER, decoder), (OF_OTHERS, others)):
            for tensor in tensors:
                self._add(tensor, kind)

    def of(self, x: Tensor) -> int:
        """Which kinds of fields a tensor is made of, ``OF_…`` added up; 0 where that was not seen."""
        storage = _storage(x)
        return 0 if storage is None else self._origins.get(storage._cdata, (0, None))[0]

    def is_batch_first(self, x: Tensor) -> bool | None:
        """Whether flat rows lie one sequence after another; False: one token of each after another. None: not seen."""
        return self._batch_first.get(x, None)  # type: ignore[no-untyped-call]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions run compiled within it; what they make is not seen."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        kind = 0
        for x in tree_leaves((args, dict(kwargs or {}))):
            kind |= self.of(x) if isinstance(x, Tensor) else 0
        if kind:
            for x in (*made, *_written(func, args)):
                self._add(x, kind)
        if isinstance(func, torch._ops.OpOverload):
            self._follow(func, args, made)
        return result

    def _add(self, x: Tensor, kind: int) -> None:
        storage = _storage(x)
        if storage is not None:
            known, reference = self._origins.get(storage._cdata, (0, None))
            if known | kind != known:
                self._origins[storage._cdata] = (known | kind, reference or StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    def _follow(self, func: "torch._ops.OpOverload", args: Sequence[Any], made: list[Tensor]) -> None:
        """Note in which order the rows of what was made lie."""
        name = func.overloadpacket.__name__
        if name in VIEWS and made[0].ndim < 3:
            order = self._flattened(tuple(args[0].shape), made[0].shape[0] if made[0].ndim else 0)
            if order is not None:
                self._batch_first[made[0]] = order
                return
        if name in ROW_BY_ROW:
            given = list(args[ROW_BY_ROW[name] :][:1])
        elif torch.Tag.pointwise in func.tags or name == "cat":
            given = tree_leaves(args)
        else:
            return
        tensors = [x for x in given if isinstance(x, Tensor)]
        orders = {self._batch_first[x] for x in tensors if x in self._batch_first}
        if len(orders) == 1:
            source = next(x for x in tensors if x in self._batch_first)
            for x in made:
                if x.ndim and len(x) == len(source) and (name in ROW_BY_ROW or x.ndim == source.ndim):
                    self._batch_first[x] = next(iter(orders))

    def _flattened(self, shape: tuple[int, ...], count: int) -> bool | None:
        for pair in self._shapes:
            if count == pair[0] * pair[1] and pair[0] != pair[1] and len(shape) > 1:
                if shape[:2] == pair:
                    return True
                if shape[:2] == pair[::-1]:
                    return False
        return None


def order_of_view(x: Tensor, shape: Sequence[int]) -> bool | None:
    """What :meth:`Origins.is_batch_first` says, of rows (batch·tokens, d) that are a view of (batch, tokens, …).

    None where they are none, or there are as many sequences as tokens.
    """
    base = x._base
    if base is None or base.ndim < 3 or x.ndim != 2 or shape[0] == shape[1]:
        return None
    one_after_another = base.stride(0) == base.shape[1] * base.stride(1) and x.stride(0) == base.stride(1)
    if not one_after_another or tuple(base.shape[:2]) not in (tuple(shape), tuple(shape)[::-1]):
        return None
    return base.shape[0] == shape[0]


def _storage(x: Tensor) -> Any:
    try:
        return x.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a sparse or nested tensor has none
        return None


def _written(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    pairs = zip(schema.arguments, args, strict=False)
    written = [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]
