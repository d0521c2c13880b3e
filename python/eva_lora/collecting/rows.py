"""Of which rows of a layer's input a batch's mask says something: how rows lie beside the batch's tokens.

What is certain is followed; else all rows count and the rule says so (:attr:`RowMask.rules`), or it is refused by name.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eva_kernels.streaming_svd import sent

from ..adapters import LoraSite
from .origins import OF_DECODER, OF_ENCODER, Origins, order_of_view

__all__ = ["RowMask", "RowMemory", "has_values", "rows_of", "sides_of"]

ALL_ROWS = "all rows"
FITS_NO_MASK = "all rows: they fit no mask of the batch"
IN_NO_KNOWN_ORDER = "all rows: as many as tokens, in an order that is not known"
NESTED = "all rows: nested tensors hold no padding"
UNSEEN = ", for rows as many as tokens; what they are made of was not seen"
ASSUMED = ", read as (batch, tokens): there are as many sequences as tokens"

ENCODER, DECODER, BOTH, INSIDE = "encoder", "decoder", "both", "inside the encoder"
TOKENS, TRANSPOSED, SEQUENCES, FRAMES, NOWHERE = "tokens", "transposed", "sequences", "frames", "nowhere"
FLAT, FLAT_TRANSPOSED, UNORDERED = "flat", "flat, transposed", "flat, in an order that is not known"
SQUARE = "tokens, if each batch has as many sequences as tokens"
OTHERS, NOT_SEEN = "others", "not seen"


@dataclass
class RowMemory:
    """What earlier batches told, for those that cannot tell themselves.

    Attributes:
        sides: Layer of an encoder–decoder model → which side its rows are of.
        layouts: Layer → how its rows lie beside the (batch, tokens) of a mask.
        origins: Layer → whether its rows are made of the batch's "tokens", of "others" alone (images), now of these
            and now of those ("both"), or "not seen".
        forms: Mask of floats → "additive" or "plain".
    """

    sides: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)

    def is_unsure(self) -> bool:
        """Whether the next forward that masks rows has to be looked at, tensor by tensor."""
        return not self.origins or BOTH in self.origins.values() or SQUARE in self.layouts.values()

    def hand_on(self, names: Sequence[str]) -> None:
        """What is known of one of several layers with one input holds for the others."""
        for table in (self.sides, self.layouts, self.origins):
            known = {table[name]: None for name in names if name in table}
            if known:  # a layer that was not looked at since may still have what was assumed
                table.update(dict.fromkeys(names, next((value for value in known if value != SQUARE), SQUARE)))

    def join(self, other: "RowMemory") -> None:
        """Take over what another rank knows of what is not known here."""
        for table in ("sides", "layouts", "origins", "forms"):
            mine, theirs = getattr(self, table), getattr(other, table)
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
        frames: Which frames count, (batch, frames) bool, where the model makes fewer of them than the mask has samples.
        has_tokens: Whether the batch has fields that hold these tokens, so that it can be seen what is made of them.
        has_others: Whether it has fields, too, that rows are made of and that are no tokens.
        origins: Sees what the layers' rows are made of, if this forward is looked at.
        skip_nonfinite: Leave rows with NaN or Inf out of the statistic they would enter, and count them.
        memory: Of earlier batches; filled.
        astray: Filled: layers whose rows are known since this batch to be others than its tokens.
        encoder_rows: Filled: the shape of the rows that the encoder's layers saw last.
        rules: Filled: layer → the rules its rows were chosen by in this batch.
        skipped: Filled: layer → rows left out for NaN or Inf. Layers that share an input: the first of them.
        counted: The same before it was moved, where the loader left it: what rows are counted in.
    """

    mask: Tensor | None
    num_rows: int | None
    rule: str = ALL_ROWS
    shape: tuple[int, ...] | None = None
    decoder: "RowMask | None" = None
    frames: Tensor | None = None
    has_tokens: bool = False
    has_others: bool = False
    origins: Origins | None = None
    skip_nonfinite: bool = False
    memory: RowMemory = field(default_factory=RowMemory)
    astray: set[str] = field(default_factory=set)
    encoder_rows: tuple[int, ...] | None = None
    rules: dict[str, set[str]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    counted: "RowMask | None" = None
    # What was found for rows of a shape, on a device, of a layer of which that much was known: many are alike.
    _found: dict[tuple[Any, ...], tuple[str, Tensor | None, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.mask is not None:
            self.shape = tuple(self.mask.shape)

    def to(self, device: torch.device) -> "RowMask":
        """The same, with its masks on ``device``."""
        mask, frames = (None if part is None else sent(part, device) for part in (self.mask, self.frames))
        decoder = None if self.decoder is None else self.decoder.to(device)
        return replace(self, mask=mask, frames=frames, decoder=decoder, counted=self.counted or self)

    def split(self, parts: int, index: int) -> "RowMask":
        """The mask of the ``index``-th part of tokens that are split into ``parts``."""
        decoder, counted = (None if of is None else of.split(parts, index) for of in (self.decoder, self.counted))
        if self.mask is None:
            return replace(self, num_rows=None, shape=None, decoder=decoder, frames=None, counted=counted)
        mine = self.mask.tensor_split(parts, self.mask.ndim - 1)[index]
        num_rows = int(mine.sum()) if counted is None else counted.num_rows
        return replace(self, mask=mine, num_rows=num_rows, decoder=decoder, frames=None, counted=counted)

    @property
    def leaves_rows_out(self) -> bool:
        """Whether there is a mask, on either side."""
        return self.mask is not None or (self.decoder is not None and self.decoder.mask is not None)

    def of(self, x: Tensor, site: str) -> tuple[Tensor | None, int]:
        """The mask of a layer input's rows, shape ``x.shape[:-1]``, and how many count; see :meth:`of_rows`."""
        mask, count = self.of_rows(tuple(x.shape[:-1]), x.device, site, made=x)
        return self.finite(x, mask, count, site)

    def of_rows(
        self,
        rows: tuple[int, ...],
        device: torch.device,
        site: str,
        *,
        nested: bool = False,
        made: Tensor | None = None,
    ) -> tuple[Tensor | None, int]:
        """The mask of rows laid out in shape ``rows``, and how many count.

        An input takes the mask where it has one row per token: (batch, tokens, d), (tokens, batch, d), with further
        dimensions (batch, tokens, …, d), or flattened to (batch·tokens, d), if it is known in which order. One with one
        row per sequence (a pooler's) counts the sequences with any unmasked token. All rows of an input of any other
        shape count (the patches of an image, the tokens routed to an expert), then and in later batches, and of one
        that was seen to be made of other fields of the batch than its tokens; :attr:`rules` says so.

        Args:
            rows: The shape.
            device: Where the mask is needed.
            site: The layer's name.
            nested: They were those of a nested tensor, which only a nested mask fits.
            made: The tensor that has these rows, to find out what it is made of.

        Raises:
            ValueError: encoder and decoder rows have the same shape, and nothing told them apart; or the rows
                lie (tokens, batch), and those of an earlier batch (batch, tokens), or the other way round.
        """
        layouts, key = self.memory.layouts, (rows, device, self.memory.layouts.get(site), self.memory.origins.get(site))
        # Of flat rows, and in a forward that is looked at, the tensor itself decides.
        plain = self.decoder is None and self.origins is None and not nested and len(rows) > 1
        if plain and not self.astray and key in self._found:
            rule, mask, count = self._found[key]
            self._choose(site, rule)
            return mask, count
        kind = self._origin(made, site)
        side = self if self.decoder is None else self._side(rows, site, kind)
        layout, rule = side._layout(rows, site, self.astray, nested, made), side.rule
        own = None
        if layout is None:
            if side.mask is not None:
                rule = FITS_NO_MASK
            elif nested:
                rule = NESTED
        elif side.mask is not None:
            if layout == UNORDERED:
                rule = IN_NO_KNOWN_ORDER
            else:
                own = side._own(layout, rows)
                if layout not in (FRAMES, SEQUENCES) and side._may_be_of_others(site):
                    rule += UNSEEN
                if layouts.get(site) == SQUARE and layout in (TOKENS, FLAT):
                    rule += ASSUMED
        self._choose(site, rule)
        count = math.prod(rows) if own is None or layout is None else side._count(layout, rows)
        mask = None if own is None or count == own.numel() else own.to(device)
        if plain and not self.astray and layouts.get(site) == key[2]:  # nothing was learnt that would be missed
            self._found[key] = rule, mask, count
        return mask, count

    def _choose(self, site: str, rule: str) -> None:
        if site in self.rules:
            self.rules[site].add(rule)
        else:
            self.rules[site] = {rule}

    def _origin(self, made: Tensor | None, site: str) -> int:
        """Which kinds of fields rows were seen to be made of, as :meth:`Origins.of` says it. Remembered by layer."""
        if self.origins is None or made is None:
            return 0
        kind, known = self.origins.of(made), self.memory.origins.get(site)
        now = TOKENS if kind & (OF_ENCODER | OF_DECODER) else OTHERS if kind else NOT_SEEN
        self.memory.origins[site] = now if known in (None, NOT_SEEN, now) else known if now == NOT_SEEN else BOTH
        return kind

    def _may_be_of_others(self, site: str) -> bool:
        known = self.memory.origins.get(site, NOT_SEEN)
        return self.has_tokens and self.has_others and known == NOT_SEEN

    def _is_of_others(self, made: Tensor | None, site: str) -> bool:
        if not self.has_tokens:
            return False
        kind = 0 if self.origins is None or made is None else self.origins.of(made)
        return not kind & (OF_ENCODER | OF_DECODER) if kind else self.memory.origins.get(site) == OTHERS

    def _layout(
        self, rows: tuple[int, ...], site: str, astray: set[str], nested: bool, made: Tensor | None
    ) -> str | None:
        """How rows lie beside the batch's tokens, None where they are other rows. Remembers what is certain.

        A layer whose rows were others in all of an earlier batch is not taken to have tokens because their number is
        the same for once.
        """
        shape, layouts = self.shape, self.memory.layouts
        if shape is None or (nested and rows != shape):
            return None
        layout, known = _layout_of(rows, shape), layouts.get(site)
        if layout is None and self.frames is not None and rows == tuple(self.frames.shape):
            layout = FRAMES
        if layout is None or (known == NOWHERE and site not in astray) or self._is_of_others(made, site):
            if known is None:
                layouts[site] = NOWHERE
                astray.add(site)
            return None
        if layout not in (TOKENS, TRANSPOSED, FLAT) or len(shape) < 2 or (layout == FLAT and 1 in shape):
            if known in (None, NOWHERE):
                layouts[site] = layout
            return layout
        kinds = (FLAT, FLAT_TRANSPOSED) if layout == FLAT else (TOKENS, TRANSPOSED)
        if shape[0] == shape[1]:
            if known in kinds:
                return known
            if self.mask is not None:
                layouts[site] = SQUARE
            return kinds[0]
        if layout == FLAT:
            batch_first = None if made is None else self._is_batch_first(made, shape)
            if batch_first is None:
                return known if known in kinds else UNORDERED
            layout = kinds[0] if batch_first else kinds[1]
        earlier = kinds[0] if known == SQUARE else known
        if earlier in kinds and earlier != layout:
            if known != SQUARE and self.mask is None:
                return layout
            said = dict(zip(kinds, ("(batch, tokens)", "(tokens, batch)"), strict=True))
            raise ValueError(
                f"layer {site}: its rows {rows} lie {said[layout]}, those of earlier batches were read as "
                f"{said[earlier]}; let the first batch have another number of sequences than of tokens"
            )
        layouts[site] = layout
        return layout

    def _is_batch_first(self, made: Tensor, shape: tuple[int, ...]) -> bool | None:
        seen = None if self.origins is None else self.origins.is_batch_first(made)
        return order_of_view(made, shape) if seen is None else seen

    def _side(self, rows: tuple[int, ...], site: str, kind: int) -> "RowMask":
        """The mask that applies to an input of an encoder–decoder model.

        What is made of the decoder's fields is the decoder's, what is made of others alone the encoder's; where that is
        not seen, the shape tells, and what earlier batches told.
        """
        assert self.decoder is not None
        sides, seen = {ENCODER: self, DECODER: self.decoder}, self.memory.sides
        known = seen.get(site)
        if known == INSIDE:
            self.encoder_rows = rows
            return self
        if kind and self.decoder.has_tokens:
            side = DECODER if kind & OF_DECODER else ENCODER
            seen[site] = side if known in (None, side) else BOTH
            return sides[side]
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
        one, other = ((side.counted or side).mask for side in sides.values())
        if one is not other and (one is None or other is None or not torch.equal(one, other)):
            raise ValueError(
                f"layer {site}: its input has rows {rows}, and so have the masks of both encoder and decoder, "
                "which differ; let the first batch have different lengths on the two sides"
            )
        return self

    def _own(self, layout: str, rows: tuple[int, ...]) -> Tensor:
        """The mask of rows that lie so."""
        assert self.mask is not None
        if layout == FRAMES:
            assert self.frames is not None
            return self.frames
        return _laid_out(self.mask, layout, rows)

    def _count(self, layout: str, rows: tuple[int, ...]) -> int:
        """How many of these rows count."""
        assert self.mask is not None
        if self.num_rows is not None and math.prod(rows) == self.mask.numel():
            return self.num_rows
        return int((self.counted or self)._own(layout, rows).sum())

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
        return replace(self, skip_nonfinite=True, origins=None, rules={}, skipped={})


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
    if layout in (FLAT, FLAT_TRANSPOSED):
        return (mask if layout == FLAT else mask.T).reshape(-1)
    if layout == SEQUENCES:
        return mask.any(1)
    mask = mask.T if layout == TRANSPOSED else mask
    return mask if len(rows) == mask.ndim else mask.reshape(*mask.shape, *[1] * (len(rows) - mask.ndim)).expand(rows)


def rows_of(x: Tensor, site: str) -> Tensor:  # nested (batch, *, d) -> (rows, d)
    """The rows of a nested tensor, one sequence after another.

    Raises:
        ValueError: the last dimension is the one that varies.
    """
    if has_values(x):
        return x.values().reshape(-1, x.shape[-1])
    pieces = x.unbind()
    if len({piece.shape[-1] for piece in pieces}) > 1:
        raise ValueError(f"layer {site}: expected a nested tensor whose rows have one width, the last dimension varies")
    return torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])


def has_values(x: Any) -> bool:
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
