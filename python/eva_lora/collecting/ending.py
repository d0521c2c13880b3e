"""Where a forward may end: what decides that no layer is still to be called."""

from collections.abc import Collection
from typing import Any

from torch import nn

from ..adapters import LoraAdapter, ModelOutline, is_partitioned, wrapper_of
from ..config import EvaConfig
from .batches import ForwardFn

__all__ = ["ForwardComplete", "ForwardEnd"]


class ForwardComplete(Exception):
    """Raised inside a forward to end it there."""


class ForwardEnd:
    """Ends a forward once every wanted layer was called as often as in any whole forward so far.

    While a layer was never called, forwards run whole: it may be called yet, and only they can tell.

    Args:
        num_sites: How many LoRA layers there are.
        head: A module that is called after every layer, if there is one: where even a first forward may end.
        is_safe: Whether leaving a forward by an exception is safe: nobody waits for its end.

    Attributes:
        expected: Most calls of each layer in any whole forward so far; None before the first.
    """

    def __init__(self, num_sites: int, *, head: nn.Module | None = None, is_safe: bool = False) -> None:
        self.head, self._is_safe = head, is_safe
        self.expected: list[int] | None = None
        self._calls = [0] * num_sites
        self._may_end = False
        self._last_awaited = 0  # the layer that a forward was last seen to go on for

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
        return cls(len(adapter.sites), head=_head(model, adapter), is_safe=is_safe)

    def begin(self, *, whole: bool) -> None:
        """A forward begins; ``whole``: it is to run to its end."""
        self._calls = [0] * len(self._calls)
        self._may_end = self._is_safe and not whole

    def ran_whole(self) -> None:
        """The forward that began last has run as far as any layer is called."""
        earlier = self.expected or self._calls
        self.expected = [max(pair) for pair in zip(earlier, self._calls, strict=True)]

    def called(self, site: int, wanted: Collection[int]) -> None:
        """Count a call of a layer.

        Raises:
            ForwardComplete: it was the last one of those that are ``wanted``.
        """
        self._calls[site] += 1
        if self._may_end and self._is_last(site, wanted):
            raise ForwardComplete

    def reached_head(self, *, all_called: bool) -> None:
        """The module that comes after every layer is being called.

        Raises:
            ForwardComplete: every layer was called, in this forward or an earlier one.
        """
        if self._may_end and all_called:
            self.ran_whole()
            raise ForwardComplete

    def _is_last(self, site: int, wanted: Collection[int]) -> bool:
        if self.expected is None or self._calls[site] < self.expected[site]:
            return False
        if self._is_awaited(self._last_awaited, wanted):  # most calls end here
            return False
        awaited = [other for other in wanted if self._is_awaited(other, wanted)]
        self._last_awaited = max(awaited, default=site)
        return not awaited

    def _is_awaited(self, site: int, wanted: Collection[int]) -> bool:
        assert self.expected is not None
        return site in wanted and self._calls[site] < max(1, self.expected[site])


def _is_safe(outline: ModelOutline, forward_fn: ForwardFn | None) -> bool:
    if forward_fn is not None:
        return False
    if any(map(is_partitioned, outline.parameters)) or any("_hf_hook" in vars(module) for module in outline.modules):
        return False
    return wrapper_of(outline) is None


def _head(model: nn.Module, adapter: LoraAdapter) -> nn.Module | None:
    """The LM head of a transformers model, unless a LoRA layer is in it."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module) or {*head.modules()} & {site.module for site in adapter.sites}:
        return None
    return head
