"""Statistics from forwards that somebody else runs: hooks on the model, and a run that they drive."""

import inspect
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eva_kernels.streaming_svd import release_workspaces

from ..adapters import (
    LoraAdapter,
    LoraSite,
    ModelOutline,
    TrainedLayers,
    find_adapter,
    is_fused,
    ordinary_tensors,
    require_loaded,
    require_watchable,
    tell_left_alone,
)
from ..config import EvaConfig
from ..distributed import ProcessGroup, Ranks, joined, together
from ..planning import EvaStatistics, merged
from .batches import named_fields
from .capture import StayingHook
from .closing import statistics_of
from .forwards import Forwards
from .masks import RowMaskFn
from .restoring import without_autocast
from .rows import RowMask
from .run import Run
from .tensor_parallel import TensorParallel

__all__ = ["Watch", "watching"]


@contextmanager
def watching(
    model: nn.Module,
    config: Any = None,
    *,
    row_mask_fn: RowMaskFn | None = None,
    sites: Sequence[LoraSite] | None = None,
    without_adapter: bool = False,
    process_group: ProcessGroup = None,
) -> "Iterator[Watch]":
    """Within it EVA takes its statistics from forwards that run anyway: an evaluation, reference log-probabilities.

    Each call of the model, or of a part that holds LoRA layers, is one batch; calls inside it are part of it. Hooks
    look on: nothing of the model, its modes, its outputs or the random generators is changed, and the hooks are gone
    after the block. What gradient checkpointing computes again in a backward pass is not counted again, nor are tokens
    that a cache holds already. ::

        with watching(model) as watch:
            trainer.evaluate()
        eva_initialize(model, watch.statistics())

    Args:
        model: As in :func:`eva_lora.eva_initialize`; its adapter has to leave the layers' inputs alone: B is zero, or
            it is switched off where the model is called.
        config: As in :func:`eva_lora.eva_initialize`. Without ``max_batches`` there is no bound on calls.
        row_mask_fn: Called with a call's arguments by name, a dict; returns which rows count, as in
            :func:`eva_lora.eva_initialize`. None: ``attention_mask`` and labels of the call decide, as in a pass.
        sites: As in :func:`eva_lora.eva_initialize`.
        without_adapter: Switch the model's adapters off within the block: its outputs are then its base's.
        process_group: As in :func:`eva_lora.eva_initialize`: ranks that all watch calls of their own.

    Raises:
        TypeError: as :func:`eva_lora.collect`; from the calls watched, too.
        ValueError: as :func:`eva_lora.collect`, of what is wrong with a model or a call; it is compiled, or wrapped or
            sharded by anything but DistributedDataParallel and ``fully_shard``; fused kernels run in the place of its
            layers; or, from a call, an adapter acts whose B is not zero.
    """
    ranks = joined(process_group)

    def prepare() -> tuple[LoraAdapter, Watch]:
        outline = ModelOutline(model) if isinstance(model, nn.Module) else None
        if outline is not None:
            require_watchable(outline)
        adapter = find_adapter(model, sites)
        assert outline is not None
        require_loaded(outline)
        if is_fused(outline.modules) and not without_adapter:
            raise ValueError(
                "model: fused kernels of Unsloth or axolotl run in the place of its layers, which are then never "
                "called; pass without_adapter=True, which has them called"
            )
        if TensorParallel.of(outline, adapter.sites) is not None:
            raise ValueError("model: its layers are split over ranks, where its calls cannot be watched; make a pass")
        return adapter, Watch(model, outline, adapter, config, row_mask_fn, ranks)

    with ordinary_tensors():
        adapter, watch = together(ranks, prepare)
    if watch.speaks:
        tell_left_alone(adapter, "EVA", stacklevel=3)
    with ExitStack() as stack:
        stack.callback(release_workspaces)
        if without_adapter:
            stack.enter_context(adapter.disabled())
        stack.enter_context(watch.hooks())
        yield watch


class Watch:
    """What :func:`watching` sees.

    Attributes:
        stop_reason: Why nothing more is taken in; "" as long as calls are.
    """

    def __init__(
        self,
        model: nn.Module,
        outline: ModelOutline,
        adapter: LoraAdapter,
        config: Any,
        row_mask_fn: RowMaskFn | None,
        ranks: Ranks | None,
    ) -> None:
        self._adapter, self._ranks = adapter, ranks
        its_config = EvaConfig.of(adapter.eva_config if config is None else config)
        self._run = Run(adapter, its_config, watches=True)
        self._forwards = Forwards(model, outline, self._run, None, row_mask_fn)
        layers = {site.module for site in adapter.sites}
        around = [(module, {*module.modules()} & layers) for module in outline.modules if module not in layers]
        self._doors = [module for module, inside in around if inside]
        self._around_all = [module for module, inside in around if inside == layers]
        self._open: nn.Module | None = None  # whose call is the batch
        self._mask = RowMask(None, None)
        self._handled: BaseException | None = None  # an exception that was being handled before the call
        self._began = 0.0
        self._thread = 0  # that has begun the call
        self._overlapped = False
        self._known_idle: list[tuple[int, int]] = []  # tensors of the adapter that were zero, and their edits by then
        self._result: EvaStatistics | None = None
        self._model = model
        self._hung: list[tuple[str, nn.Module, str, RemovableHandle]] = []  # a name, and where each hook hangs
        self._fused = False  # as the block began
        self._unseen = ""  # what has come between, so that calls may have gone unseen

    @property
    def speaks(self) -> bool:
        """Whether this process says what all have found."""
        return self._ranks is None or self._ranks.rank == 0

    @property
    def num_batches(self) -> int:
        """Calls taken in by this process."""
        return self._run.num_batches

    @property
    def num_rows(self) -> int:
        """Rows (tokens) of these calls that counted."""
        return self._run.num_rows

    @property
    def stop_reason(self) -> str:
        return self._run.stop_reason

    @property
    def converged(self) -> bool:
        """Whether all layers have converged, so that further calls tell little and are no longer taken in. With
        ``keep_moments`` never: what that is for, convergence says nothing of.

        Of several ranks, whether those of all have: they ask each other, so all have to ask.
        """
        own = self._run.stop_reason == "all layers converged"
        return own if self._ranks is None else self._ranks.agree([int(own)])[0] == self._ranks.size

    def statistics(self) -> EvaStatistics:
        """What the calls showed; later ones are no longer taken in.

        In a process group all ranks have to ask, and get the same: each one's leading directions together.

        Raises:
            RuntimeError: a call broke off halfway, so that layers have seen different rows; threads called at once;
                a hook was taken off or a layer replaced within the block.
            ValueError: as :func:`eva_lora.collect`, where calls brought too little; layers were not reached.
        """
        with ordinary_tensors():
            if self._result is None:
                own = together(self._ranks, self._finished)
                self._result = own if self._ranks is None else merged(self._ranks.exchange(own))
            return self._result

    def _finished(self) -> EvaStatistics:
        run = self._run
        self._look_after()
        if self._unseen:
            raise RuntimeError(
                f"watch: {self._unseen} within the block, so that calls may have gone unseen; call statistics() before"
            )
        if self._open is not None:
            self._break_off()
        if run.stop_reason == BROKEN_OFF:
            raise RuntimeError(
                f"watch: call {run.num_batches + 1} of the model broke off after some of its layers had been called, "
                "so that they have seen different rows; watch anew"
            )
        if self._overlapped:
            raise RuntimeError("watch: several threads called the model at once, whose rows cannot be told apart")
        if run.num_batches == 0:
            raise ValueError("watch: the model was not called within the block; calls of a copy are not its own")
        run.stop_reason = run.stop_reason or "end of the data"
        with torch.no_grad(), without_autocast(self._forwards.device):
            run.finish()
            return statistics_of(run)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within it the model is watched."""
        outline = ModelOutline(self._model)
        self._fused = is_fused(outline.modules)
        names = {module: f"module {name}" if name else "the model" for name, module in outline.named_modules}
        with self._run.capture.hooks(_apart) as handles, ExitStack() as stack:
            self._hung = [
                (f"layer {site.name}", site.module, "_forward_pre_hooks", handle)
                for site, handle in zip(self._adapter.sites, handles, strict=True)
                if site.module in names
            ]
            for module in self._doors:
                begins = module.register_forward_pre_hook(StayingHook(self._begins), with_kwargs=True)
                ends = module.register_forward_hook(StayingHook(self._ends), always_call=True)
                stack.callback(begins.remove)
                stack.callback(ends.remove)
                self._hung.append((names[module], module, "_forward_pre_hooks", begins))
                self._hung.append((names[module], module, "_forward_hooks", ends))
            try:
                yield
            finally:
                if self._open is not None:
                    self._break_off()
                self._look_after()
                self._hung = []

    def _look_after(self) -> None:
        """Within the block: note where a hook is gone, or what it hung on."""
        if not self._hung or self._unseen:
            return
        modules = set(self._model.modules())
        for name, module, hooks, handle in self._hung:
            if module not in modules:
                self._unseen = f"{name} was taken out of the model"
                return
            if handle.id not in getattr(module, hooks):
                self._unseen = f"a hook was taken off {name}"
                return
        if is_fused(modules) and not self._fused:
            self._unseen = "fused kernels were put in the place of layers"

    def _begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is module and threading.get_ident() == self._thread:  # an interrupt has left it without a word
            self._break_off()
        if self._open is not None and threading.get_ident() != self._thread:
            self._overlapped = True
        if self._open is not None or self._run.stop_reason:
            return
        if torch._C._current_graph_task_id() != -1:  # a backward pass computes again what was seen in the forward
            return
        with _apart():
            self._require_idle()
            fields = without_past(self._named(module, args, kwargs))
            mask = self._forwards.mask_of(fields)
            self._run.capture.begin_batch(mask, only=() if mask.num_rows == 0 else None)
            if mask.decoder is not None and fields.get("encoder_outputs") is not None:
                # What the encoder was given was counted when it was called.
                counted, shape = mask.decoder.num_rows, mask.decoder.shape
                self._run.capture.rows_in_batch = math.prod(shape or (0,)) if counted is None else counted
        self._open, self._mask, self._handled = module, mask, sys.exc_info()[1]
        self._began, self._thread = time.perf_counter(), threading.get_ident()

    def _ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._open:
            return
        if sys.exc_info()[1] is not self._handled:  # called for an exception that leaves the model
            self._break_off()
            return
        run = self._run
        run.seconds["forward"] += time.perf_counter() - self._began
        self._open = None
        try:
            with _apart():
                run.capture.end_batch()
                if not run.refresh_tells_nonfinite():
                    run.require_finite(run.num_batches + 1, dict)
                run.finish_batch(self._mask)
        except BaseException:
            run.stop_reason = BROKEN_OFF  # should the caller go on
            raise

    def _break_off(self) -> None:
        """A call has not come to its end: what its layers have brought cannot be taken out again."""
        self._open = None
        if self._run.capture.close_batch():
            self._run.stop_reason = BROKEN_OFF

    def _require_idle(self) -> None:
        """Raise ValueError where an adapter adds something to layers' outputs, and so to the inputs of others."""
        ask: Any = getattr(self._adapter, "acting", None) or getattr(self._adapter, "zero_before_training", dict)
        told = ask()
        edits = [(id(tensor), tensor._version) for tensors in told.values() for tensor in tensors]
        if edits == self._known_idle:
            return
        trained = TrainedLayers.among(told).trained()
        if trained:
            raise ValueError(
                f"model: an adapter is switched on whose B is not zero in {len(trained)} layers, the first is "
                f"{trained[0]}: layers behind it see what it adds, not what the base model shows them. Switch it off "
                "where the model is called, or pass without_adapter=True"
            )
        self._known_idle = edits

    def _named(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name; what a lone argument holds, where that has names itself."""
        if len(args) == 1 and not kwargs and named_fields(args[0]) is not None:
            return dict(named_fields(args[0]) or {})
        if not args:
            return kwargs
        # A wrapper may hand on what it does not name; those within do.
        for one in (module, *(self._around_all if module in self._around_all else ())):
            names = _positions(one)
            if len(names) >= len(args):
                return {**dict(zip(names, args, strict=False)), **kwargs}
        return kwargs


BROKEN_OFF = "a call broke off"


@contextmanager
def _apart() -> Iterator[None]:
    """Within it what is computed is none of the caller's: neither gradients nor inference tensors are made."""
    with torch.no_grad(), ordinary_tensors():
        yield


def _positions(module: nn.Module) -> list[str]:
    """Names of a module's positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def without_past(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments with masks of its own tokens alone: in cached decoding they cover those in the cache, too."""
    fields = dict(fields)
    past = next((held for n in ("cache", "past_key_values") if (held := _cached(fields.get(n))) is not None), None)
    for prefix in ("", "decoder_"):
        given = (fields.get(f"{prefix}{name}") for name in ("input_ids", "inputs_embeds"))
        tokens = next((value for value in given if isinstance(value, Tensor) and value.ndim > 1), None)
        name = f"{prefix}attention_mask"
        mask = fields.get(name)
        if past is None or tokens is None or mask is None:
            continue
        count = tokens.shape[1]
        whole = isinstance(mask, Mapping)
        parts = {kind: _own_keys(part, past, count) for kind, part in (mask if whole else {"": mask}).items()}
        fields[name] = parts if whole else parts[""]
    return fields


def _own_keys(mask: Any, past: int, count: int) -> Any:  # (…, keys) -> (…, count)
    """What a mask says of the ``count`` keys that come after those of a cache, which keeps the last ones if not all."""
    if not isinstance(mask, Tensor) or mask.is_nested or mask.ndim < 2 or mask.shape[-1] <= count:
        return mask
    start = min(past, mask.shape[-1] - count)
    return mask[..., start : start + count]


def _cached(cache: Any) -> int | None:
    """Tokens that a cache holds; None where there is none, or it does not say."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, (tuple, list)) and cache and isinstance(cache[0], (tuple, list)) and cache[0]:
        first = cache[0][0]
        return int(first.shape[-2]) if isinstance(first, Tensor) and first.ndim > 2 else None
    return None
