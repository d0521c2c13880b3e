"""Which rows of a batch count: the one place that decides what a mask says, and of which rows it says it.

What is certain is read; what is not is refused by name, or all rows count and the rule says so (:attr:`RowMask.rules`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..adapters import LoraSite
from ..config import EvaConfig
from .batches import named_fields

__all__ = ["ALL_ROWS", "FITS_NO_MASK", "RowMask", "RowMaskFn", "RowMemory", "row_mask", "rows_of", "sides_of"]

RowMaskFn = Callable[[Any], "Tensor | Mapping[str, Tensor | None] | None"]

ALL_ROWS = "all rows"
FITS_NO_MASK = "all rows: they fit no mask of the batch"
NESTED = "all rows: nested tensors hold no padding"
PACKED = "all rows: a PackedSequence holds no padding"
NO_MASK = "all rows: there is no mask beside"
UNKNOWN = "all rows: it is not known what is meant by"
ASSUMED = ", read as (batch, tokens): there are as many sequences as tokens"

MASKED_BELOW = -1e3  # an additive mask adds at most −10⁴ where it masks, and 0 where a token attends to itself

#: Cumulative lengths of packed sequences, as the libraries name them.
CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens", "cu_seqlens_q")
POSITIONS = ("position_ids", "seq_idx")
#: Fields named as masks that say nothing of which tokens there are.
OTHER_MASKS = (
    "pixel_mask", "head_mask", "cross_attn_head_mask", "global_attention_mask", "special_tokens_mask", "mask_labels",
    "bool_masked_pos", "mask_time_indices",
)  # fmt: skip

ENCODER, DECODER, BOTH, INSIDE = "encoder", "decoder", "both", "inside the encoder"
TOKENS, TRANSPOSED, FLAT, SEQUENCES, NOWHERE = "tokens", "transposed", "flat", "sequences", "nowhere"
PLAIN, ADDITIVE = "plain", "additive"
SQUARE = "tokens, if each batch has as many sequences as tokens"
_PREFIXES = {ENCODER: "", DECODER: "decoder_"}  # of a side's fields


@dataclass
class RowMemory:
    """What earlier batches told, for those that cannot tell themselves.

    Attributes:
        sides: Layer of an encoder–decoder model → which side its rows are of.
        layouts: Layer → how its rows lie beside the (batch, tokens) of a mask.
        forms: Mask of floats → "additive" or "plain".
    """

    sides: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)

    def hand_on(self, names: Sequence[str]) -> None:
        """What is known of one of several layers with one input holds for the others."""
        for table in (self.sides, self.layouts):
            known = {table[name]: None for name in names if name in table}
            if known:  # a layer that was not looked at since may still have what was assumed
                table.update(dict.fromkeys(names, next((value for value in known if value != SQUARE), SQUARE)))

    def join(self, other: "RowMemory") -> None:
        """Take over what another rank knows of what is not known here."""
        for mine, theirs in ((self.sides, other.sides), (self.layouts, other.layouts), (self.forms, other.forms)):
            mine.update({name: value for name, value in theirs.items() if mine.get(name, SQUARE) == SQUARE})


@dataclass
class RowMask:
    """Which rows of a batch count, and what became of it.

    Attributes:
        mask: Bool, of the batch's tokens: (batch, tokens), or (tokens,) where sequences are packed. None where every
            row counts.
        num_rows: How many rows count, None where only the layers' inputs can tell.
        rule: What the mask was made of.
        shape: Of the batch's tokens. None where the batch does not tell; the mask's where there is one.
        decoder: The mask of the decoder's rows; this one is then that of the encoder's.
        skip_nonfinite: Leave rows with NaN or Inf out of the statistic they would enter, and count them.
        memory: Of earlier batches; filled.
        astray: Filled: layers whose rows are known since this batch to be others than its tokens.
        encoder_rows: Filled: the shape of the rows that the encoder's layers saw last.
        rules: Filled: layer → the rule its rows were chosen by in this batch.
        skipped: Filled: layer → rows left out for NaN or Inf. Layers that share an input: the first of them.
    """

    mask: Tensor | None
    num_rows: int | None
    rule: str = ALL_ROWS
    shape: tuple[int, ...] | None = None
    decoder: "RowMask | None" = None
    skip_nonfinite: bool = False
    memory: RowMemory = field(default_factory=RowMemory)
    astray: set[str] = field(default_factory=set)
    encoder_rows: tuple[int, ...] | None = None
    rules: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    # What was found for rows of a shape, on a device, of a layer of which that much was known: many are alike.
    _found: dict[tuple[Any, ...], tuple[str, Tensor | None, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.mask is not None:
            self.shape = tuple(self.mask.shape)

    def to(self, device: torch.device) -> "RowMask":
        """The same, with its masks on ``device``."""
        decoder = None if self.decoder is None else self.decoder.to(device)
        return replace(self, mask=None if self.mask is None else self.mask.to(device), decoder=decoder)

    def split(self, parts: int, index: int) -> "RowMask":
        """The mask of the ``index``-th part of tokens that are split into ``parts``."""
        decoder = None if self.decoder is None else self.decoder.split(parts, index)
        if self.mask is None:
            return replace(self, num_rows=None, shape=None, decoder=decoder)
        mine = self.mask.tensor_split(parts, self.mask.ndim - 1)[index]
        return replace(self, mask=mine, num_rows=int(mine.sum()), decoder=decoder)

    def of(self, x: Tensor, site: str) -> tuple[Tensor | None, int]:
        """The mask of a layer input's rows, shape ``x.shape[:-1]``, and how many count; see :meth:`of_rows`."""
        mask, count = self.of_rows(tuple(x.shape[:-1]), x.device, site)
        return self.finite(x, mask, count, site)

    def of_rows(
        self, rows: tuple[int, ...], device: torch.device, site: str, *, nested: bool = False
    ) -> tuple[Tensor | None, int]:
        """The mask of rows laid out in shape ``rows``, and how many count.

        An input takes the mask where it has one row per token: (batch, tokens, d), (tokens, batch, d), flattened
        to (batch·tokens, d), or with further dimensions (batch, tokens, …, d). One with one row per sequence (a
        pooler's) counts the sequences with any unmasked token. All rows of an input of any other shape count
        (the patches of an image, the tokens routed to an expert), then and in later batches, and :attr:`rules` says
        so. ``nested``: they were those of a nested tensor, which only a nested mask fits.

        Raises:
            ValueError: encoder and decoder rows have the same shape, and no earlier batch told them apart; or the rows
                lie (tokens, batch), and those of an earlier batch (batch, tokens), or the other way round.
        """
        layouts, plain = self.memory.layouts, self.decoder is None and not nested
        key = rows, device, layouts.get(site)
        if plain and not self.astray and key in self._found:
            self.rules[site], mask, count = self._found[key]
            return mask, count
        side = self if self.decoder is None else self._side(rows, site)
        layout, rule = side._layout(rows, site, self.astray, nested), side.rule
        if layout is None:
            own = None
            if side.mask is not None:
                rule = FITS_NO_MASK
            elif nested:
                rule = NESTED
        else:
            own = None if side.mask is None else _laid_out(side.mask, layout, rows)
            if own is not None and layouts.get(site) == SQUARE and layout == TOKENS:
                rule += ASSUMED
        self.rules[site] = rule
        count = math.prod(rows) if own is None else side._count(own)
        mask = None if own is None or count == own.numel() else own.to(device)
        if plain and not self.astray and layouts.get(site) == key[-1]:  # nothing was learnt that would be missed
            self._found[key] = rule, mask, count
        return mask, count

    def _layout(self, rows: tuple[int, ...], site: str, astray: set[str], nested: bool) -> str | None:
        """How rows lie beside the batch's tokens, None where they are other rows. Remembers what is certain.

        A layer whose rows were others in all of an earlier batch is not taken to have tokens because their number is
        the same for once.
        """
        shape, layouts = self.shape, self.memory.layouts
        if shape is None or (nested and rows != shape):
            return None
        layout, known = _layout_of(rows, shape), layouts.get(site)
        if layout is None or (known == NOWHERE and site not in astray):
            if known is None:
                layouts[site] = NOWHERE
                astray.add(site)
            return None
        if layout not in (TOKENS, TRANSPOSED) or len(shape) < 2:
            if known in (None, NOWHERE):
                layouts[site] = layout
            return layout
        if shape[0] == shape[1]:
            if known in (TOKENS, TRANSPOSED):
                return known
            if self.mask is not None:
                layouts[site] = SQUARE
            return TOKENS
        earlier = TOKENS if known == SQUARE else known
        if earlier in (TOKENS, TRANSPOSED) and earlier != layout:
            if known != SQUARE and self.mask is None:
                return layout
            said = {TOKENS: "(batch, tokens)", TRANSPOSED: "(tokens, batch)"}
            raise ValueError(
                f"layer {site}: its rows {rows} lie {said[layout]}, those of earlier batches were read as "
                f"{said[earlier]}; let the first batch have another number of sequences than of tokens"
            )
        layouts[site] = layout
        return layout

    def _side(self, rows: tuple[int, ...], site: str) -> "RowMask":
        """The mask that applies to an input of an encoder–decoder model."""
        assert self.decoder is not None
        sides, seen = {ENCODER: self, DECODER: self.decoder}, self.memory.sides
        known = seen.get(site)
        if known == INSIDE:
            self.encoder_rows = rows
            return self
        fitting = [name for name, side in sides.items() if side.shape and _layout_of(rows, side.shape)]
        if rows == self.encoder_rows and ENCODER not in fitting:
            fitting.append(ENCODER)
        if not fitting:
            return sides.get(known or "", self)
        if len(fitting) == 1:
            side = fitting[0]
            if known not in (None, side):
                seen[site] = BOTH
            elif self.decoder.shape and (self.shape or self.encoder_rows):  # else the other may have had as many
                seen[site] = side
            return sides[side]
        if known in sides:
            return sides[known]
        one, other = self.mask, self.decoder.mask
        if one is not other and (one is None or other is None or not torch.equal(one, other)):
            raise ValueError(
                f"layer {site}: its input has rows {rows}, and so have the masks of both encoder and decoder, "
                "which differ; let the first batch have different lengths on the two sides"
            )
        return self

    def _count(self, own: Tensor) -> int:
        assert self.mask is not None
        return self.num_rows if self.num_rows is not None and own.numel() == self.mask.numel() else int(own.sum())

    def finite(self, x: Tensor, mask: Tensor | None, count: int, site: str) -> tuple[Tensor | None, int]:
        """The mask without the rows whose squared norm is no finite float32, if those are to be left out."""
        if not self.skip_nonfinite:
            return mask, count
        low, high = torch.aminmax(x.detach(), dim=-1)
        bound = math.sqrt(torch.finfo(torch.float32).max / x.shape[-1])
        finite = (low >= -bound) & (high <= bound)  # False for NaN
        kept = finite if mask is None else finite & mask
        left = int(kept.sum())
        if left < count:
            self.skipped[site] = self.skipped.get(site, 0) + count - left
        return (mask, count) if left == count else (kept, left)

    def counting(self) -> "RowMask":
        """The same mask, to find out how many rows NaN or Inf is in."""
        return replace(self, skip_nonfinite=True, rules={}, skipped={})


def _layout_of(rows: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """How rows lie beside tokens of a shape, None if they are others."""
    if rows == shape or (len(shape) == 2 and rows[:2] == shape):
        return TOKENS
    if len(shape) == 2 and rows[:2] == shape[::-1]:
        return TRANSPOSED
    if rows == (math.prod(shape),):
        return FLAT
    return SEQUENCES if len(shape) == 2 and rows == shape[:1] else None


def _laid_out(mask: Tensor, layout: str, rows: tuple[int, ...]) -> Tensor:
    """The mask in the shape of rows that lie so."""
    if layout == FLAT:
        return mask.reshape(-1)
    if layout == SEQUENCES:
        return mask.any(1)
    mask = mask.T if layout == TRANSPOSED else mask
    return mask if len(rows) == mask.ndim else mask.reshape(*mask.shape, *[1] * (len(rows) - mask.ndim)).expand(rows)


def rows_of(x: Tensor, site: str) -> Tensor:  # nested (batch, *, d) -> (rows, d)
    """The rows of a nested tensor, one sequence after another.

    Raises:
        ValueError: the last dimension is the one that varies.
    """
    if _has_values(x):
        return x.values().reshape(-1, x.shape[-1])
    pieces = x.unbind()
    if len({piece.shape[-1] for piece in pieces}) > 1:
        raise ValueError(f"layer {site}: expected a nested tensor whose rows have one width, the last dimension varies")
    return torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])


def _flat_if_nested(value: Any) -> Any:
    """A nested tensor's values, one sequence after another; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_nested:
        return value
    return value.values() if _has_values(value) else torch.cat(value.unbind())


def _has_values(x: Any) -> bool:
    """Whether a nested tensor's values are its rows, without gaps."""
    return x.layout == torch.jagged and x._ragged_idx == 1 and x._lengths is None


class Sides(NamedTuple):
    """What a model's structure says of its two sides.

    Attributes:
        two: Whether it has an encoder and a decoder with rows of their own.
        inside: Layers that are in the encoder alone.
    """

    two: bool
    inside: list[str]


def sides_of(modules: Iterable[nn.Module], sites: Sequence[LoraSite]) -> Sides:
    """The encoder and the decoder of a transformers model, wherever it hangs among ``modules``, outer ones first."""
    flagged, covered = list[nn.Module](), set[nn.Module]()
    for module in modules:
        if module not in covered and getattr(vars(module).get("config"), "is_encoder_decoder", False):
            flagged.append(module)
            covered.update(module.modules())
    encoder, decoder = set[nn.Module](), set[nn.Module]()
    for module in covered:
        pair = [module._modules.get(name) for name in (ENCODER, DECODER)]
        if pair[0] is not None and pair[1] is not None:
            encoder.update(pair[0].modules())
            decoder.update(pair[1].modules())
    # An encoder alone has its model's configuration.
    two = bool(encoder) or any(not type(module).__name__.endswith(("Encoder", "EncoderModel")) for module in flagged)
    return Sides(two, [site.name for site in sites if site.module in encoder and site.module not in decoder])


def row_mask(
    batch: Any,
    config: EvaConfig,
    row_mask_fn: RowMaskFn | None,
    *,
    encoder_decoder: bool = False,
    invocation: Sequence[int] | None = None,
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
        memory: Of earlier batches; filled.

    Raises:
        TypeError, ValueError: the mask, or what ``row_mask_fn`` returned, is no (batch, tokens) mask, or what it says
            is not certain.
    """
    reader = _Reader(named_fields(batch) or {}, config, RowMemory() if memory is None else memory)
    two_sides = encoder_decoder or any(
        reader.fields.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds", "attention_mask")
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
    for side in (found, found.decoder):
        if side is not None:
            side.memory = reader.memory
    if found.decoder is not None and found.num_rows is None and found.shape is not None:
        found.num_rows = math.prod(found.shape)
    found.skip_nonfinite = config.nonfinite == "skip"
    return found


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
        mask, shape = self.fields.get(name), self._shape(prefix)
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
            return RowMask(None, None, "row_mask_fn", None if prefix is None else self._shape(prefix))
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

    def _shape(self, prefix: str) -> tuple[int, ...] | None:
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
        if isinstance(mask, Tensor) and (mask.ndim == 2 or nested or tuple(mask.shape) == shape):
            return self._kept(mask, name, added=False)
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
    wanted = torch.tensor(list(invocation), dtype=tokens.dtype, device=tokens.device)
    found = (tokens.unfold(1, length, 1) == wanted).all(-1)  # (batch, starts)
    positions = torch.arange(count, dtype=torch.int64, device=tokens.device)
    last = torch.where(found, positions[: found.shape[1]], -1).amax(1, keepdim=True)
    return (positions >= last) & (last >= 0)
