"""From a loader's batches to a model call, and which rows of it count."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..config import EvaConfig

ForwardFn = Callable[[nn.Module, Any], Any]
RowMaskFn = Callable[[Any], Tensor | None]

ALL_ROWS = "all rows"
FITS_NO_MASK = "all rows: they fit no mask of the batch"
MASKED_BELOW = -1e3  # an additive mask adds at least −10⁴ where it masks, and 0 where a token attends to itself


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``; the caller's batch is left alone.

    Mappings (as dicts), dataclasses, tuples and lists are gone through, packed sequences moved by their own
    ``to``; everything else is passed on as it is.
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **moved)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model as the batch's type suggests: keywords, positions, or one argument."""
    fields = named_fields(batch)
    if fields is not None:
        return model(**fields)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def named_fields(batch: Any) -> Mapping[str, Any] | None:
    """The fields of a mapping or dataclass, None for a batch without names."""
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return None


@dataclass
class RowMask:
    """Which rows of a batch count, and what became of it.

    Attributes:
        mask: (batch, tokens) bool, or None where every row counts.
        num_rows: How many rows count, None where only the layers' inputs can tell.
        rule: What the mask was made of.
        decoder: The mask of the decoder's rows; this one is then that of the encoder's.
        skip_nonfinite: Leave rows with NaN or Inf out of the statistic they would enter, and count them.
        sides: Layer → "encoder" or "decoder", of earlier batches; decides where a batch cannot.
        rules: Filled: layer → the rule its rows were chosen by in this batch.
        skipped: Filled: layer → rows left out for NaN or Inf. Layers that share an input: the first of them.
    """

    mask: Tensor | None
    num_rows: int | None
    rule: str = ALL_ROWS
    decoder: "RowMask | None" = None
    skip_nonfinite: bool = False
    sides: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device) -> "RowMask":
        """The same, with its masks on ``device``."""
        decoder = None if self.decoder is None else self.decoder.to(device)
        return replace(self, mask=None if self.mask is None else self.mask.to(device), decoder=decoder)

    def of(self, x: Tensor, site: str) -> tuple[Tensor | None, int]:
        """The mask of a layer input's rows, shape ``x.shape[:-1]``, and how many count; see :meth:`of_rows`."""
        mask, count = self.of_rows(tuple(x.shape[:-1]), x.device, site)
        return self.finite(x, mask, count, site)

    def of_rows(self, rows: tuple[int, ...], device: torch.device, site: str) -> tuple[Tensor | None, int]:
        """The mask of rows laid out in shape ``rows``, and how many count.

        An input takes the mask where it has one row per token: (batch, tokens, d), (tokens, batch, d), flattened
        to (batch·tokens, d), or with further dimensions (batch, tokens, …, d). One with one row per sequence (a
        pooler's) counts the sequences with any unmasked token. All rows of an input of any other shape count
        (the patches of an image, the tokens routed to an expert), and :attr:`rules` says so.

        Raises:
            ValueError: encoder and decoder rows have the same shape, and no earlier batch told them apart.
        """
        chosen, own = self._side(rows, site)
        if chosen.mask is not None and own is None:
            self.rules[site] = FITS_NO_MASK
        else:
            self.rules[site] = chosen.rule
        count = math.prod(rows) if own is None else chosen._count(own)
        return None if own is None or count == own.numel() else own.to(device), count

    def _side(self, rows: tuple[int, ...], site: str) -> tuple["RowMask", Tensor | None]:
        """The mask that applies to an input, and that mask in the shape of its rows."""
        if self.decoder is None:
            return self, _fitted(self.mask, rows)
        sides = {"encoder": self, "decoder": self.decoder}
        fits = {name: _fitted(side.mask, rows) for name, side in sides.items()}
        known = self.sides.get(site)
        possible = [name for name, fitted in fits.items() if fitted is not None] or ["encoder"]
        if len(possible) == 2 and known is None:
            one, other = fits.values()
            assert one is not None
            assert other is not None
            if not torch.equal(one, other):
                raise ValueError(
                    f"layer {site}: its input has rows {rows}, and so have the masks of both encoder and decoder, "
                    "which differ; let the first batch have different lengths on the two sides"
                )
            return self, one
        side = known if known in possible else possible[0]
        if len(possible) == 1:
            self.sides[site] = side
        return sides[side], fits[side]

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


def _fitted(mask: Tensor | None, rows: tuple[int, ...]) -> Tensor | None:
    """The mask in the shape of an input's rows, None if it fits in none of the ways."""
    if mask is None:
        return None
    if rows == mask.shape:
        return mask
    if rows == (mask.numel(),):
        return mask.reshape(-1)
    if mask.ndim != 2:
        return None
    if rows == mask.shape[::-1]:
        return mask.T
    if rows[:2] == mask.shape:
        return mask.reshape(*mask.shape, *[1] * (len(rows) - 2)).expand(rows)
    if rows == mask.shape[:1]:
        return mask.any(1)
    return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder and a decoder with rows of their own."""
    wrapper: Any = model
    base = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def row_mask(batch: Any, config: EvaConfig, row_mask_fn: RowMaskFn | None, *, encoder_decoder: bool = False) -> RowMask:
    """attention_mask (default: all) and, where labels are per token, labels ≠ ``label_mask_value``.

    Of an encoder–decoder model attention_mask is the encoder's; decoder_attention_mask and the labels are the
    decoder's.

    Raises:
        TypeError, ValueError: the mask, or what ``row_mask_fn`` returned, is no (batch, tokens) mask.
    """
    skip = config.nonfinite == "skip"
    if row_mask_fn is not None:
        mask = row_mask_fn(batch)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim >= 1):
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"row_mask_fn: expected None or a bool tensor (batch, tokens), got {got}")
        return replace(_counted(mask, "row_mask_fn"), skip_nonfinite=skip)
    fields = named_fields(batch) or {}
    labels = fields.get("labels") if config.use_label_mask else None
    if not encoder_decoder:
        return replace(_counted(*_of_tokens(fields, "", labels, config)), skip_nonfinite=skip)
    masks = []
    for side, its_labels in (("", None), ("decoder_", labels)):
        mask, rule = _of_tokens(fields, side, its_labels, config)
        like = next((fields[name] for name in (f"{side}input_ids", f"{side}inputs_embeds") if name in fields), None)
        if mask is None and isinstance(like, Tensor):  # its shape still tells the two sides apart
            mask = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        masks.append(RowMask(mask, None if mask is None else int(mask.sum()), rule))
    return replace(masks[0], decoder=masks[1], skip_nonfinite=skip)


def _of_tokens(fields: Mapping[str, Any], side: str, labels: Any, config: EvaConfig) -> tuple[Tensor | None, str]:
    """The (batch, tokens) mask of one side of a model ("" or "decoder\\_"), and what it is made of."""
    name = f"{side}attention_mask"
    mask, tokens = fields.get(name), fields.get(f"{side}input_ids")
    rule = []
    if mask is not None:
        mask, rule = _tokens_that_attend(mask, name), [name]
        if isinstance(tokens, Tensor) and tokens.ndim == 2 and mask.shape == (1, tokens.shape[1]):
            mask = mask.expand(tokens.shape)
    if isinstance(labels, Tensor) and labels.ndim == 2:
        like = mask if mask is not None else tokens
        if like is None and side:  # a decoder is fed its labels, moved by one
            like = labels
        if isinstance(like, Tensor) and labels.shape == like.shape:  # else labels are per sequence, not per token
            labelled = labels != config.label_mask_value
            mask = labelled if mask is None else mask & labelled
            rule.append("labels")
    return mask, " and ".join(rule) or ALL_ROWS


def _tokens_that_attend(mask: Any, name: str) -> Tensor:
    """(batch, tokens) bool of an attention mask in any usual layout.

    (batch, tokens): what is not 0 counts, numbers of packed sequences included. (batch, queries, keys) and (batch,
    heads, queries, keys), boolean or additive: a token counts where it may attend to itself. A mapping of masks by
    kind of attention: the first of them.
    """
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if isinstance(value, Tensor)), None)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask != 0
    if isinstance(mask, Tensor) and mask.ndim in (3, 4) and mask.shape[-2] <= mask.shape[-1]:
        itself = mask.diagonal(mask.shape[-1] - mask.shape[-2], -2, -1)  # the last keys are the queries' own
        additive = itself.dtype.is_floating_point
        if additive and bool((itself > 0).any()):
            raise ValueError(
                f"{name}: expected an additive mask, 0 where a token may attend to itself, got values above 0; pass a "
                "boolean mask, or row_mask_fn"
            )
        attends = itself > MASKED_BELOW if additive else itself != 0
        return attends if mask.ndim == 3 else attends.any(1)
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"{name}: expected shape (batch, tokens) or (batch, heads, queries, keys), got {got}; pass row_mask_fn for "
        "another layout"
    )


def _counted(mask: Tensor | None, rule: str) -> RowMask:
    if mask is None or bool(mask.all()):
        return RowMask(None, None if mask is None else mask.numel(), rule)
    return RowMask(mask, int(mask.sum()), rule)
