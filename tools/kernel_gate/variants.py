"""Every variant of every kernel that can be chosen at run time, as the launchers would ask for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch

from eva_kernels import _triton
from eva_kernels._cards import CARDS
from eva_kernels.gradient_sketch import triton as gradient_sketch
from eva_kernels.gram import triton as gram
from eva_kernels.subspace import triton as subspace
from eva_kernels.symmetric_eigen import triton as symmetric_eigen

from .machine_code import ARCHITECTURES, Code, compile_variant

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PADDED = (32, 64, 128, 256)
COLUMNS = {32: 32, 64: 48, 128: 80, 256: 160}  # of a basis that is padded so; 48 and 80 are those of r = 4 and 16
TYPED = {"x_ptr", "operand_ptr", "product_ptr", "work_ptr", "vectors_ptr"}  # pointers to what has the rows' dtype


@dataclass(frozen=True)
class Variant:
    """One kernel, one architecture, one set of compile-time constants.

    ``base16`` says that x starts at a multiple of 16 bytes. Generic variants are compiled without: where strides
    are known only at run time, the base alone lets no load be any wider.
    """

    kernel: Any
    architecture: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    base16: bool = True
    warps: int = _triton.WARPS
    stages: int = _triton.STAGES
    tile: gram.GramTile | subspace.SubspaceTile | gradient_sketch.ThinTile | None = None

    @property
    def tiles(self) -> str:
        """The architecture whose tiles it has."""
        return tiles_of(self.architecture)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")

    @property
    def flags(self) -> dict[str, Any]:
        return dict(self.constants)

    @property
    def barred(self) -> bool:
        """Whether the bars for aligned 16-bit products hold: not the slower generic variants."""
        folds = bool(self.flags.get("FOLD")) and self.name in ("gram", "project", "lift")
        return folds or bool(self.flags.get("FAST"))

    def describe(self) -> str:
        flags = self.flags
        block = [
            f"{flags[k]}"
            for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "ROWS", "BLOCK", "DEPTH", "COLUMNS", "PADDED")
            if k in flags
        ]
        names = [k.lower() for k in ("ALIGNED", "FOLD", "MASKED", "OUTER", "SPLIT") if flags.get(k)]
        names += ["tf32"] if flags.get("PRECISION") == "tf32" else []
        names += [] if self.base16 else ["odd base"]
        return f"{self.name} {self.dtype} {'x'.join(block)} {' '.join(names)}".strip()

    def compile(self) -> Code:
        constants, signature, aligned = self.flags, {}, set()
        for name in self.kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*" + self._element(name)
                if name not in _triton.FOREIGN and (name != "x_ptr" or self.base16):
                    aligned.add(name)
            elif name in ("sign", "tolerance", "floor"):
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if name.startswith("stride") else "i32"
        options = _triton.launch_options(self.kernel, self.warps, self.stages)
        return compile_variant(self.kernel, self.architecture, signature, constants, frozenset(aligned), options)

    def _element(self, name: str) -> str:
        if name == "counter_ptr":
            return "i32"
        if name == "factor_ptr":
            return "fp32" if self.flags["SPLIT"] else self.dtype
        if name == "operand_ptr" and self.name in ("thin", "factor"):
            return "bf16" if self.dtype == "bf16" else "fp32"
        if name in ("column_sum_ptr", "square_sum_ptr"):
            return "fp64"
        if name == "mask_ptr":
            return "i1" if self.flags.get("MASKED") else self.dtype
        return self.dtype if name in TYPED else "fp32"


def tiles_of(architecture: str) -> str:
    """The architecture whose tiles another is launched with."""
    tiles = CARDS[architecture].tiles
    assert tiles is not None, f"{architecture} has none"
    return tiles


def row_kinds() -> Iterator[tuple[str, dict[str, bool], bool]]:
    """Dtype, flags and base of every kind of rows: only aligned 16-bit rows fold."""
    for dtype, masked in product(DTYPES, (False, True)):
        yield dtype, {"ALIGNED": True, "FOLD": dtype != "fp32", "MASKED": masked}, True
        yield dtype, {"ALIGNED": False, "FOLD": False, "MASKED": masked}, False


def make(kernel: Any, architecture: str, dtype: str, constants: dict[str, Any], **rest: Any) -> Variant:
    """A variant with only those constants that the kernel has."""
    return Variant(
        kernel, architecture, dtype, tuple((k, v) for k, v in constants.items() if k in kernel.arg_names), **rest
    )


def gram_variants(architecture: str) -> Iterator[Variant]:
    for dtype, flags, base16 in row_kinds():
        fold = flags["FOLD"]
        tiles = [tile for _, tile in gram.ALIGNED_TILES[tiles_of(architecture)]] if fold else [gram.GENERIC_TILE]
        precisions = ("ieee", "tf32") if dtype == "fp32" and CARDS[architecture].tf32 else ("ieee",)
        for tile, precision in product(tiles, precisions):
            blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BAND": tile.band}
            constants = {**blocks, **flags, "COLUMNS": gram.FLUSH_COLUMNS, "PRECISION": precision, "UPCAST": False}
            shape = {"base16": base16, "warps": tile.warps, "stages": tile.stages, "tile": tile}
            yield make(gram._gram_kernel, architecture, dtype, constants, **shape)
    yield make(gram._mirror_kernel, architecture, "fp32", {"BLOCK": gram.MIRROR_BLOCK})


def subspace_variants(architecture: str) -> Iterator[Variant]:
    for dtype, flags, base16 in row_kinds():
        for padded in PADDED if flags["FOLD"] else (subspace.GENERIC_COLUMNS,):
            tile = subspace.choose_tile(tiles_of(architecture), DTYPES[dtype], flags["ALIGNED"], padded)
            shape = {"base16": base16, "warps": tile.warps, "stages": tile.stages, "tile": tile}
            used = subspace.used_columns(COLUMNS[padded], padded, flags["FOLD"])
            constants = {**flags, "COLUMNS": tile.columns, "PADDED": padded, "USED": used}
            yield make(subspace._project_kernel, architecture, dtype, {**constants, "ROWS": tile.rows}, **shape)
            wait = subspace.needs_wait(tiles_of(architecture), flags["FOLD"])
            lift = {**constants, "ROWS": tile.lift_rows, "WAIT": wait, **subspace.finish_constants(padded)}
            yield make(subspace._lift_kernel, architecture, dtype, lift, **shape)
            if not flags["MASKED"]:
                prepare = {**flags, "PADDED": padded, "ROWS": subspace.PREPARE_ROWS}
                yield make(subspace._prepare_kernel, architecture, dtype, prepare)


def thin_variants(architecture: str) -> Iterator[Variant]:
    """With bfloat16 rows a basis is one bfloat16, weights are two."""
    for dtype, flags, base16 in row_kinds():
        narrow = dtype == "bf16"
        fast = narrow and flags["ALIGNED"]
        for outer, columns in product((False, True), PADDED[:3] if fast else (gradient_sketch.GENERIC_COLUMNS,)):
            split = narrow and outer
            tile = gradient_sketch.choose_tile(tiles_of(architecture), fast, 2 * columns if split else columns)
            constants = {**flags, "COLUMNS": columns, "FAST": fast, "OUTER": outer, "SPLIT": split}
            block = {"BLOCK": tile.block, "DEPTH": tile.depth}
            shape = {"base16": base16, "warps": tile.warps, "stages": tile.stages, "tile": tile}
            kind = dtype if narrow else "fp32"
            yield make(gradient_sketch._thin_kernel, architecture, dtype, {**constants, **block}, **shape)
            prepare = {"ROWS": gradient_sketch.PREPARE_ROWS, "COLUMNS": columns, "SPLIT": split}
            yield make(gradient_sketch._factor_kernel, architecture, kind, prepare)


def totals_variants(architecture: str) -> Iterator[Variant]:
    for dtype, flags, base16 in row_kinds():
        block = {"ROWS": _triton.TOTALS_ROWS, "COLUMNS": _triton.TOTALS_COLUMNS, "STEP": _triton.TOTALS_STEP}
        yield make(_triton._totals_kernel, architecture, dtype, {**block, **flags}, base16=base16)


def eigen_variants(architecture: str) -> Iterator[Variant]:
    for dtype, padded in product(("fp32", "fp64"), (64, 128, 256)):
        pairs = symmetric_eigen.pairs_at_once(padded, 4 if dtype == "fp32" else 8)
        constants = {"PADDED": padded, "PAIRS": pairs, "MAX_SWEEPS": symmetric_eigen.MAX_SWEEPS}
        yield make(
            symmetric_eigen._jacobi_kernel, architecture, dtype, constants, warps=symmetric_eigen.warps_of(padded)
        )  # fmt: skip


def all_variants(architectures: tuple[str, ...] = ARCHITECTURES) -> list[Variant]:
    """Each distinct variant once; what does not depend on the rows' dtype is listed for one."""
    unique: dict[Variant, None] = {}
    for architecture in architectures:
        for variants in (gram_variants, subspace_variants, thin_variants, totals_variants, eigen_variants):
            for variant in variants(architecture):
                if not TYPED & set(variant.kernel.arg_names):
                    variant = replace(variant, dtype="fp32")
                unique.setdefault(variant, None)
    return list(unique)


def representative(variants: list[Variant]) -> list[Variant]:
    """Of every architecture's variants those that ask for most, of each kernel on rows that fold and on others: the
    widest tile, with a mask. Where tiles are an architecture's own, every tile too, as models of updates take it."""
    most: dict[Any, Variant] = {}
    for variant in variants:
        kind = (variant.flags.get(name) for name in ("FOLD", "PRECISION", "FAST", "OUTER"))
        key = variant.architecture, variant.name, *kind
        most[key] = max(most.get(key, variant), variant, key=_asks_for)
    chosen = set(most.values())
    for variant in variants:
        plain = variant.dtype == "bf16" and not variant.flags.get("MASKED")
        if variant.barred and plain and variant.tiles == variant.architecture:
            chosen.add(variant)
    return [variant for variant in variants if variant in chosen]


def _asks_for(variant: Variant) -> tuple[int, bool, bool]:
    """More of what fills registers and shared memory; float16 has a scale to find, float64 twice the bytes."""
    flags = variant.flags
    widths = "PADDED", "COLUMNS", "BLOCK_M", "BLOCK_N"
    size = prod(int(flags.get(name, 1)) for name in widths)
    return size, bool(flags.get("MASKED")), variant.dtype in ("fp16", "fp64")
