"""Which tokens of a batch count: the one place that decides what a mask says.

What is certain is read; what is not is refused by name, or all rows count and the rule says so (:attr:`RowMask.rules`).
Of which rows of a layer's input it is said is decided in ``rows.py``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from eva_kernels.streaming_svd import sent

from ..config import EvaConfig
from .batches import named_fields
from .origins import Origins
from .rows import ALL_ROWS, DECODER, ENCODER, RowMask, RowMemory, has_values

__all__ = ["UNKNOWN", "FrameMask", "RowMaskFn", "frame_mask_of", "origins_of", "row_mask"]

RowMaskFn = Callable[[Any], "Tensor | Mapping[str, Tensor | None] | None"]
FrameMask = Callable[[Tensor], "Tensor | None"]  # of samples (batch, samples) bool -> of frames (batch, frames) bool

PACKED = "all rows: a PackedSequence holds no padding"
NO_MASK = "all rows: there is no mask beside"
UNKNOWN = "all rows: it is not known what is meant by"

MASKED_BELOW = -1e3  # an additive mask adds at most −10⁴ where it masks, and 0 where a token attends to itself

#: Cumulative lengths of packed sequences, as the libraries name them.
CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens", "cu_seqlens_q")
POSITIONS = ("position_ids", "seq_idx")
#: Fields named as masks that say nothing of which tokens there are.
OTHER_MASKS = (
    "pixel_mask", "head_mask", "cross_attn_head_mask", "global_attention_mask", "special_tokens_mask", "mask_labels",
    "bool_masked_pos", "mask_time_indices",
)  # fmt: skip

PLAIN, ADDITIVE = "plain", "additive"
_PREFIXES = {ENCODER: "", DECODER: "decoder_"}  # of a side's fields
_OF_TOKENS = ("input_ids", "inputs_embeds")
_PREFIXED = [f"decoder_{name}" for name in _OF_TOKENS]


def _flat_if_nested(value: Any) -> Any:
    """A nested tensor's values, one sequence after another; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_nested:
        return value
    return value.values() if has_values(value) else torch.cat(value.unbind())


def row_mask(
    batch: Any,
    config: EvaConfig,
    row_mask_fn: RowMaskFn | None,
    *,
    encoder_decoder: bool = False,
    invocation: Sequence[int] | None = None,
    frame_mask: FrameMask | None = None,
    memory: RowMemory | None = None,
) -> RowMask:
    """attention_mask (default: all) and, where labels are per token, labels ≠ ``label_mask_value``.

    Of an encoder–decoder model attention_mask is the encoder's; decoder_attention_mask and the labels are the
    decoder's.

    Args:
        batch: As the loader yields it.
        config: Says what labels are called, and which of them mark rows to leave out.
        row_mask_fn: Decides in place of all that, if given.
        encoder_decoder: Whether the model has two sides. A batch with fields of a decoder shows it too.
        invocation: Tokens from whose last occurrence on an activated LoRA acts; earlier rows do not count.
        frame_mask: What the model makes of a mask of samples, where it makes frames of them.
        memory: Of earlier batches; filled.

    Raises:
        TypeError, ValueError: the mask, or what ``row_mask_fn`` returned, is no (batch, tokens) mask, or what it says
            is not certain.
    """
    reader = _Reader(named_fields(batch) or {}, config, RowMemory() if memory is None else memory)
    two_sides = encoder_decoder or any(
        reader.fields.get(f"decoder_{name}") is not None for name in (*_OF_TOKENS, "attention_mask")
    )
    if row_mask_fn is not None:
        found = reader.given(row_mask_fn(batch), two_sides)
    elif isinstance(batch, PackedSequence):
        found = RowMask(None, None, PACKED)
    elif not two_sides:
        found = reader.side("", labelled=True, invocation=invocation)
    elif invocation:
        raise ValueError("model: expected a decoder alone with alora_invocation_tokens, it has an encoder too")
    else:
        found = replace(reader.side("", labelled=False), decoder=reader.side("decoder_", labelled=True))
    for side, prefix in zip((found, found.decoder), _PREFIXES.values(), strict=True):
        if side is not None:
            side.memory = reader.memory
            side.has_tokens = side.shape is not None and reader.shape(prefix) == side.shape
            side.has_others = bool(_others(reader.fields, [*_PREFIXED, *config.label_names]))
    if frame_mask is not None and found.shape is not None and len(found.shape) == 2 and not found.has_tokens:
        every = torch.ones(found.shape, dtype=torch.bool, device="cpu")
        found.frames = frame_mask(every if found.mask is None else found.mask)
    if found.decoder is not None and found.num_rows is None and found.shape is not None:
        found.num_rows = math.prod(found.shape)
    found.skip_nonfinite = config.nonfinite == "skip"
    return found


def origins_of(batch: Any, mask: RowMask, config: EvaConfig) -> Origins:
    """What sees, in a forward of the batch, which of its fields the layers' rows are made of."""
    fields = named_fields(batch) or {}
    decoder = [*_PREFIXED, *(config.label_names if mask.decoder is not None else ())]
    mine, its = (_tensors(fields[name] for name in fields if name in names) for names in (_OF_TOKENS, decoder))
    sides = [side.shape for side in (mask, mask.decoder) if side is not None and side.shape is not None]
    return Origins(mine, its, _others(fields, decoder), sides)


def _others(fields: Mapping[str, Any], decoder: Iterable[str]) -> list[Tensor]:
    """What a batch holds that is made into rows and is no tokens: images, sounds."""
    known = {*_OF_TOKENS, *decoder}
    names = [name for name in fields if name not in known and "mask" not in str(name)]
    # A number (how many items there are, for the loss) is made into no rows.
    return [x for x in _tensors(fields[name] for name in names) if x.is_floating_point() and x.ndim]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in tree_leaves(list(values)) if isinstance(x, Tensor)]


def frame_mask_of(modules: Iterable[nn.Module]) -> FrameMask | None:
    """How a model of transformers that makes frames of samples says which frames there are; None for other models."""
    names = ("_get_feature_vector_attention_mask", "_get_feat_extract_output_lengths")
    model: Any = next((m for m in modules if all(hasattr(type(m), name) for name in names)), None)
    if model is None or getattr(model.config, "add_adapter", False):  # which makes fewer of them once more
        return None

    def frame_mask(samples: Tensor) -> Tensor | None:
        frames = int(
            model._get_feat_extract_output_lengths(torch.tensor(samples.shape[1], dtype=torch.int64, device="cpu"))
        )
        made: Tensor = model._get_feature_vector_attention_mask(frames, samples.long())
        return made.bool() if made.shape == (len(samples), frames) else None

    return frame_mask


class _Reader:
    """Reads the masks of one batch."""

    def __init__(self, fields: Mapping[str, Any], config: EvaConfig, memory: RowMemory) -> None:
        self.fields, self.config, self.memory = fields, config, memory
        self._checks: list[tuple[Tensor, str, str]] = []  # what must hold, the field it holds of, and in words

    def given(self, found: Any, two_sides: bool) -> RowMask:
        """What ``row_mask_fn`` returned."""
        if isinstance(found, Mapping):
            if not found or not set(found) <= {ENCODER, DECODER}:
                raise ValueError(f"row_mask_fn: expected masks of 'encoder' and 'decoder', got {[*map(str, found)]}")
            one, other = (self._one_given(found.get(name), prefix) for name, prefix in _PREFIXES.items())
            return replace(one, decoder=other)
        if found is not None and two_sides:
            raise ValueError(
                "row_mask_fn: expected a mask for each side of an encoder-decoder, {'encoder': ..., 'decoder': ...}, "
                "got one"
            )
        return self._one_given(found, None)

    def side(self, prefix: str, *, labelled: bool, invocation: Sequence[int] | None = None) -> RowMask:
        """The mask of one side of a model ("" or "decoder\\_"), whose labels are this side's if ``labelled``."""
        name, rule = f"{prefix}attention_mask", []
        mask, shape = self.fields.get(name), self.shape(prefix)
        if mask is not None:
            mask, rule = self._tokens_that_attend(mask, name, shape), [name]
            if shape is not None and len(shape) == 2 and mask.shape == (1, shape[1]):
                mask = mask.expand(shape)
            shape = tuple(mask.shape)
        elif not prefix and shape is not None:
            mask, rule = self._in_sequences(shape)
        label_name, labels = self._labels() if labelled and self.config.use_label_mask else ("", None)
        if labels is not None and tuple(labels.shape) == shape:  # else they are per sequence, not per token
            counted = labels != self.config.label_mask_value
            mask, rule = counted if mask is None else mask & counted, [*rule, label_name]
        if invocation:
            acted_on = _from_invocation(self.fields.get("input_ids"), invocation)
            mask, rule = acted_on if mask is None else mask & acted_on, [*rule, "alora_invocation_tokens"]
        if mask is None:
            return RowMask(None, None, self._why_all(prefix, shape), shape)
        return self._counted(mask, " and ".join(rule))

    def _one_given(self, mask: Any, prefix: str | None) -> RowMask:
        if mask is None:
            return RowMask(None, None, "row_mask_fn", None if prefix is None else self.shape(prefix))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim < 1:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"row_mask_fn: expected None or a bool tensor (batch, tokens), got {got}")
        return self._counted(mask, "row_mask_fn")

    def _counted(self, mask: Tensor, rule: str) -> RowMask:
        """A mask, its rows counted. All that is asked of a device's tensors is asked for here, at once."""
        count, *held = torch.stack([mask.sum(), *(check for check, *_ in self._checks)]).tolist()
        for holds, (_, name, expected) in zip(held, self._checks, strict=True):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got others")
        self._checks.clear()
        return RowMask(None if count == mask.numel() else mask, count, rule, tuple(mask.shape))

    def shape(self, prefix: str) -> tuple[int, ...] | None:
        """Shape of a side's tokens, where its inputs tell."""
        ids, embeds = (_flat_if_nested(self.fields.get(f"{prefix}{name}")) for name in ("input_ids", "inputs_embeds"))
        if isinstance(ids, Tensor):
            return tuple(ids.shape) if ids.ndim < 3 else (math.prod(ids.shape[:-1]), ids.shape[-1])
        if isinstance(embeds, Tensor):
            return tuple(embeds.shape[:-1])
        labels = self._labels()[1]
        if prefix and labels is not None and labels.ndim == 2 and not labels.dtype.is_floating_point:
            return tuple(labels.shape)  # a decoder is fed its labels, moved by one
        return None

    def _labels(self) -> tuple[str, Tensor | None]:
        """The first of the fields that hold labels, and its name."""
        named = ((name, self.fields.get(name)) for name in self.config.label_names)
        return next(((name, _flat_if_nested(value)) for name, value in named if isinstance(value, Tensor)), ("", None))

    def _in_sequences(self, shape: tuple[int, ...]) -> tuple[Tensor | None, list[str]]:
        """The mask of packed sequences: what comes after the last of them is in none."""
        name = next((name for name in CUMULATIVE_LENGTHS if isinstance(self.fields.get(name), Tensor)), None)
        if name is None or self.fields[name].ndim != 1 or not len(self.fields[name]):
            return None, []
        lengths, there = self.fields[name], math.prod(shape)
        self._checks.append((lengths[-1] <= there, name, f"cumulative lengths of at most the batch's {there} tokens"))
        return (torch.arange(there, dtype=torch.int64, device=lengths.device) < lengths[-1]).reshape(shape), [name]

    def _why_all(self, prefix: str, shape: tuple[int, ...] | None) -> str:
        """The rule of a batch that has no mask."""
        for name, value in self.fields.items():
            called_mask = "mask" in str(name) and str(name).startswith("decoder_") == bool(prefix)
            of_tokens = isinstance(value, Tensor) and value.ndim > 1 and shape in (None, tuple(value.shape))
            if called_mask and of_tokens and name not in OTHER_MASKS:
                return f"{UNKNOWN} {name}"
        beside = next((name for name in (*CUMULATIVE_LENGTHS, *POSITIONS) if self.fields.get(name) is not None), None)
        label_name, labels = self._labels()
        if beside is None and shape is None and labels is not None and labels.ndim > 1:  # per token, of which tokens?
            beside = label_name
        return ALL_ROWS if prefix or beside is None else f"{NO_MASK} {beside}"

    def _tokens_that_attend(self, mask: Any, name: str, shape: tuple[int, ...] | None) -> Tensor:
        """(batch, tokens) bool of an attention mask in any usual layout.

        (batch, tokens): boolean, 0 and 1, numbers of packed sequences, or additive; (batch, choices, tokens) where the
        tokens are. (batch, queries, keys) and (batch, heads, queries, keys), boolean, integer or additive: a token
        counts where it may attend to itself; with one query, where it may be attended to. A mapping of masks by kind
        of attention: the first of them. Nested: (tokens,).
        """
        if isinstance(mask, Mapping):
            mask = next((value for value in mask.values() if isinstance(value, Tensor)), None)
        nested, mask = isinstance(mask, Tensor) and mask.is_nested, _flat_if_nested(mask)
        ids = self.fields.get(name.replace("attention_mask", "input_ids"))
        if isinstance(mask, Tensor) and mask.ndim > 2 and isinstance(ids, Tensor) and mask.shape == ids.shape:
            mask = mask.reshape(-1, mask.shape[-1])
        if isinstance(mask, Tensor) and shape is not None and mask.shape == (shape[-1],) * 2 and len({*shape}) == 2:
            mask = mask[None]  # (queries, keys)
        if isinstance(mask, Tensor) and (mask.ndim == 2 or nested or tuple(mask.shape) == shape):
            kept = self._kept(mask, name, added=False)
            if mask.ndim == 2 and mask.shape[0] == mask.shape[1] > 1 and _may_be_of_queries(kept):
                raise ValueError(
                    f"{name}: expected (batch, tokens), got what may be (queries, keys), with as many sequences as "
                    "tokens; pass (1, queries, keys), or row_mask_fn"
                )
            return kept
        if isinstance(mask, Tensor) and mask.ndim in (3, 4) and mask.shape[-2] <= mask.shape[-1]:
            queries, keys = mask.shape[-2:]  # the last keys are the queries' own
            itself = mask[..., 0, :] if queries == 1 else mask.diagonal(keys - queries, -2, -1)
            attends = self._kept(itself, name, added=True)
            return attends if mask.ndim == 3 else attends.any(1)
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name}: expected shape (batch, tokens) or (batch, heads, queries, keys), got {got}; pass row_mask_fn for "
            "another layout"
        )

    def _kept(self, values: Tensor, name: str, *, added: bool) -> Tensor:
        """What the values of a mask keep: booleans and integers what is not 0; floats that, or 0 if they are additive.

        Floats that are all 0 may be either: additive, unless those of an earlier batch were not. ``added``: floats are
        additive, since masks of this shape are added to scores.
        """
        if not values.dtype.is_floating_point:
            if values.dtype != torch.bool:
                self._checks.append(((values >= 0).all(), name, "integers of at least 0"))
            return values != 0
        zero, known = values == 0, self.memory.forms.get(name)
        may_be = torch.stack([(zero | (values <= MASKED_BELOW)).all(), (zero | (values >= 1)).all() & (not added)])
        forms = [form for form, holds in zip((ADDITIVE, PLAIN), may_be.tolist(), strict=True) if holds]
        if not forms:
            either = "" if added else "0 and 1, or "
            raise ValueError(
                f"{name}: expected {either}an additive mask, 0 where a token may attend and at most {MASKED_BELOW:g} "
                "elsewhere, got other values; pass a boolean mask, or row_mask_fn"
            )
        form = forms[0] if known not in forms else known
        if self.memory.forms.setdefault(name, form) != form:
            raise ValueError(
                f"{name}: expected masks of one kind, this batch's is {form}, an earlier one was read as {known}; pass "
                "boolean masks, or row_mask_fn"
            )
        return zero if form == ADDITIVE else ~zero


def _may_be_of_queries(kept: Tensor) -> bool:  # (n, n) bool
    """Whether a mask may be one of queries and keys, or its opposite.

    In such a one each token attends to itself, and to none after it or to those that attend to it. A mask of padded
    sequences is so only if the first of them has one token, the next two, and so on.
    """
    forms = torch.stack([kept, ~kept])
    itself = forms.diagonal(0, 1, 2).all(-1)
    causal, mutual = ~forms.triu(1).flatten(1).any(1), (forms == forms.mT).flatten(1).all(1)
    return bool((itself & (causal | mutual)).any() & kept.any() & ~kept.all())


def _from_invocation(tokens: Any, invocation: Sequence[int]) -> Tensor:  # (batch, tokens) -> (batch, tokens) bool
    """The tokens that an activated LoRA acts on: from the last occurrence of its invocation on."""
    if not isinstance(tokens, Tensor) or tokens.is_nested or tokens.ndim != 2:
        raise ValueError(
            "alora_invocation_tokens: expected input_ids (batch, tokens) in each batch, which say where the adapter "
            "acts; pass row_mask_fn for other batches"
        )
    count, length = tokens.shape[1], len(invocation)
    if count < length:
        return torch.zeros_like(tokens, dtype=torch.bool)
    wanted = sent(torch.tensor(list(invocation), dtype=tokens.dtype, device="cpu"), tokens.device)
    found = (tokens.unfold(1, length, 1) == wanted).all(-1)  # (batch, starts)
    positions = torch.arange(count, dtype=torch.int64, device=tokens.device)
    last = torch.where(found, positions[: found.shape[1]], -1).amax(1, keepdim=True)
    return (positions >= last) & (last >= 0)
