"""Where the values of a forward may end: what the model's output head gives is not computed for a layer's sake."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..adapters import LoraAdapter, LoraSite, ModelOutline, is_partitioned, wrapper_of
from ..config import EvaConfig
from .batches import ForwardFn

__all__ = ["WHOLE_AT_FIRST", "ForwardEnd", "output_head"]

WHOLE_AT_FIRST = 1  # forwards that run whole before any is spared its rest
WHOLE_SHARE = 0.03  # of the later ones, drawn


class CalledAfterHead(Exception):
    """Raised inside a forward that is spared its rest, where a layer is called in that rest."""


class NeedsValues(Exception):
    """Raised inside a forward that is spared its rest, where the rest cannot do without values."""


class ForwardEnd:
    """Spares forwards what the model's output head gives, logits and loss: they have shapes and no values.

    The model's code goes on to its end as ever (:class:`WithoutValues`). So it is not guessed but seen, in every
    forward, whether a layer is called after the head. Where one is, where the code asks for a value that is not there,
    or where something without values is kept (for the next forward, perhaps), the forward has to be run again, whole,
    and from then on all run whole.

    The first forward runs whole, and a drawn share of the later ones. Where a layer is called after the head in one of
    them, all further ones run whole. More than one at first would tell little: the others go to their end too.

    Args:
        head: The model's output head; None: every forward runs whole.
        seed: Of the draw, which keeps no state: it depends on the forward's number alone.

    Attributes:
        spares: Whether forwards are spared their rest, but for those that are to run whole.
        reason: Why they no longer are; "" as long as nothing has told against it.
        kept: Whether the last forward has left tensors without values behind.
    """

    def __init__(self, head: nn.Module | None = None, *, seed: int = 0) -> None:
        self.head, self.spares, self._seed = head, head is not None, seed
        self.reason, self.kept = "", False
        self._watches = self._spared = self._past_head = False
        self._rest: WithoutValues | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        outline: ModelOutline,
        adapter: LoraAdapter,
        config: EvaConfig,
        forward_fn: ForwardFn | None,
    ) -> "ForwardEnd":
        """Of a model's forwards as it stands."""
        is_safe = _is_safe(outline, forward_fn) if config.early_stop == "auto" else config.early_stop
        return cls(output_head(model, adapter.sites) if is_safe else None, seed=config.seed)

    def run(self, forward: Callable[[], Any], number: int, *, whole: bool = False) -> bool:
        """Run a forward. Returns whether it has to be run again, as it is, for what layers have missed.

        Args:
            forward: Calls the model.
            number: Of the forward, from 0.
            whole: Spare it nothing, whatever its number.
        """
        self._spared = self.spares and not (whole or self._is_whole(number))
        self._watches, self._past_head = True, False
        failed = False
        try:
            forward()
        except Exception:
            if self._rest is None:  # the model's own
                raise
            failed = True
        finally:
            self._watches = self._past_head = False
            rest, self._rest = self._rest, None
            if rest is not None:
                rest.__exit__(None, None, None)
        if (failed or (rest is not None and rest.has_failed)) and not self.reason:  # the code may have caught it
            self.reason = "what follows the output head needs its values"
        self.kept = rest is not None and rest.is_kept()
        if self.kept and not self.reason:
            self.reason = "something keeps what the output head gives"
        self.spares = self.spares and not self.reason
        return rest is not None and bool(self.reason)

    def called(self, name: str) -> None:
        """A layer is being called.

        Raises:
            CalledAfterHead: this forward is spared its rest, and the call is in it.
        """
        if self._past_head:
            self.reason = self.reason or f"layer {name} is called after the output head"
            if self._rest is not None:
                raise CalledAfterHead

    def reached_head(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output head is being called: its pre-hook. Returns what it is to be called with, None for what it is."""
        if not self._watches:
            return None
        if self._spared and self._rest is None:
            self._rest = WithoutValues()
            self._rest.__enter__()
        self._past_head = True
        return None if self._rest is None else self._rest.emptied((args, kwargs))

    def _is_whole(self, number: int) -> bool:
        return number < WHOLE_AT_FIRST or random.Random(f"{self._seed}/{number}").random() < WHOLE_SHARE


class WithoutValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it what is made of tensors on the meta device is on the meta device too: shapes, dtypes and no values.

    Operations on other tensors are as ever.

    Attributes:
        has_failed: Whether anything has asked such a tensor for what it has not, and was refused.

    Raises:
        NeedsValues: values are missing that would be written to a tensor that has some, or would move a random
            generator on. What asks for a value raises what PyTorch raises for tensors on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: list[StorageWeakRef] = []
        self._stand_ins: set[int] = set()  # storages of tensors that stand for some that have values
        self._questions, self.has_failed = Questions(self), False

    def __enter__(self) -> "WithoutValues":
        super().__enter__()  # type: ignore[no-untyped-call]
        self._questions.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self._questions.__exit__(*raised)  # type: ignore[no-untyped-call]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return self._made_by(func, args, dict(kwargs or {}))
        except Exception:
            self.note_failure((args, kwargs))
            raise

    def note_failure(self, given: Any) -> None:
        """An operation has raised: noted if it was given any tensor without values, for the code may catch it."""
        self.has_failed |= any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(given))

    def _made_by(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = (args, kwargs)
        tensors = [tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            return func(*given[0], **given[1])
        schema = func._schema
        if schema.is_mutable and any(map(self._has_values, tensors)):
            raise NeedsValues
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NeedsValues
        positional, named = self.emptied(given)
        if any(argument.name == "device" for argument in schema.arguments):
            named["device"] = torch.device("meta")
        return tree_map_only(Tensor, self._note, func(*positional, **named))

    def emptied(self, values: Any) -> Any:
        """The same nested values, with tensors on the meta device for all others."""
        return tree_map_only(Tensor, self._emptied, values)

    def is_kept(self) -> bool:
        """Whether any tensor that was made within it is still alive."""
        return not all(storage.expired() for storage in self._storages)  # type: ignore[no-untyped-call]

    def _emptied(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self._stand_ins.add(empty.untyped_storage()._cdata)
        return self._note(empty)

    def _has_values(self, tensor: Tensor) -> bool:
        return not tensor.is_meta or tensor.untyped_storage()._cdata in self._stand_ins

    def _note(self, tensor: Tensor) -> Tensor:
        torch._C._set_throw_on_mutable_data_ptr(tensor)  # a kernel that asks for its address is refused, not given null
        self._storages.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        return tensor


class Questions(TorchFunctionMode):
    """Sees what is asked of tensors besides operations, for numbers, lists and arrays for instance.

    Args:
        rest: It is told where that fails.
    """

    def __init__(self, rest: WithoutValues) -> None:
        super().__init__()
        self._rest = rest

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self._rest.note_failure((args, kwargs))
            raise


def _is_safe(outline: ModelOutline, forward_fn: ForwardFn | None) -> bool:
    if forward_fn is not None:
        return False
    if any(map(is_partitioned, outline.parameters)) or any("_hf_hook" in vars(module) for module in outline.modules):
        return False
    return wrapper_of(outline) is None


def output_head(model: nn.Module, sites: Collection[LoraSite]) -> nn.Module | None:
    """The output embedding of a transformers model, unless a LoRA layer is in it."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module) or {*head.modules()} & {site.module for site in sites}:
        return None
    return head
