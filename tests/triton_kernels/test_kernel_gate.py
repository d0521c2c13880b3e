"""The gate on kernels passes a few of ours, and fails the kernel one would write first."""

import os
from dataclasses import replace

import pytest
import triton
import triton.language as tl

from eva_kernels._cards import CARDS
from eva_kernels.gram.triton import GramTile, plan_gram
from eva_kernels.subspace.triton import needs_wait
from support.versions import needs
from tools.kernel_gate.bars import GRAM_FRACTION, failures, fraction
from tools.kernel_gate.buffers import Event, follow
from tools.kernel_gate.machine_code import innermost_tensor_loop
from tools.kernel_gate.model import CHIPS, Pass, gram_update
from tools.kernel_gate.variants import Variant, all_variants, representative

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    needs("triton>=3.8"),  # the oldest whose machine code the bars are for
]


@triton.jit
def _gram_kernel(
    x_ptr, g_ptr, n, d, stride_xm, stride_xd, BLOCK: tl.constexpr, DEPTH: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of XᵀX by the book: run-time strides, no hint on alignment, the full square of tiles."""
    m, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, DEPTH):
        rows = k + tl.arange(0, DEPTH)
        a = tl.load(x_ptr + m[:, None] * stride_xd + rows[None, :] * stride_xm, mask=(rows < n)[None, :], other=0.0)
        b = tl.load(x_ptr + rows[:, None] * stride_xm + c[None, :] * stride_xd, mask=(rows < n)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(g_ptr + m[:, None] * d + c[None, :], acc)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_naive_kernel_fails(architecture, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = GramTile(128, 128, 64, 8, 3)
    flags = {"BLOCK": tile.block_m, "DEPTH": tile.block_k, "FOLD": True, "MASKED": False}
    naive = Variant(_gram_kernel, architecture, "bf16", tuple(flags.items()), warps=8, stages=3, tile=tile)
    code = naive.compile()
    why = " ".join(failures(naive, code))
    assert "operand loads in the loop not all asynchronous and 16 bytes wide" in why
    assert fraction(naive, code) < GRAM_FRACTION[architecture]


@pytest.mark.slow
def test_spills_and_a_foreign_instruction_fail(monkeypatch, tmp_path):
    """Too few warps for a tile spill; on sm_90 a tile of half a warp group falls back to the older instruction."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (good,) = [v for v in all_variants(("sm_80",)) if _is_plain_gram(v)]
    code = Variant(good.kernel, "sm_80", "bf16", good.constants, warps=4, stages=3, tile=good.tile).compile()
    assert any(reason.endswith("spills") for reason in failures(good, code))

    (good,) = [v for v in all_variants(("sm_90",)) if _is_plain_gram(v) and v.flags["BLOCK_N"] == 128]
    small = tuple(({**good.flags, "BLOCK_M": 32, "BLOCK_N": 32}).items())
    other = Variant(good.kernel, "sm_90", "bf16", small, warps=4, stages=3, tile=good.tile)
    assert any("expected HGMMA" in reason for reason in failures(other, other.compile()))


def _is_plain_gram(variant):
    return variant.name == "gram" and variant.barred and variant.dtype == "bf16" and not variant.flags["MASKED"]


def test_what_a_card_has_no_shared_memory_for_fails(monkeypatch, tmp_path):
    """Three copies of the widest tile, which every card but AMD's has room for."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    good = next(
        v for v in all_variants(("gfx942",)) if v.name == "project" and v.barred and v.flags["PADDED"] == 256
    )  # fmt: skip
    assert not failures(good, good.compile())
    wide = replace(good, stages=3)
    assert failures(wide, wide.compile()) == ["81920 bytes of shared memory, of 65536"]


def test_operands_that_are_cut_to_tf32_fail(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = {"BLOCK": 64, "DEPTH": 16, "FOLD": False, "MASKED": False}
    cut = Variant(_gram_kernel, "sm_80", "fp32", tuple(flags.items()), warps=8)  # tl.dot takes float32 as TF32
    assert "operands cut to TF32, not rounded" in failures(cut, cut.compile())
    (ours,) = [
        v
        for v in all_variants(("sm_80",))
        if v.flags.get("PRECISION") == "tf32" and v.flags["ALIGNED"] and not v.flags["MASKED"]
    ]
    assert not failures(ours, ours.compile())


def test_the_short_form_has_every_kernel_on_every_card():
    variants = all_variants()
    short = representative(variants)
    assert set(short) < set(variants)
    for kind in (
        lambda v: (v.architecture, v.name),
        lambda v: (v.architecture, v.name, v.flags.get("FOLD"), v.flags.get("PRECISION")),
        lambda v: (v.tiles, v.tile),
    ):
        assert {kind(v) for v in short} == {kind(v) for v in variants}
    assert {v.architecture for v in short} == {name for name, card in CARDS.items() if card.tiles is not None}


@pytest.mark.slow  # `make kernels` compiles these and more
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_main_variants_pass(architecture, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [v for v in all_variants((architecture,)) if _is_plain_gram(v)]
    chosen += [
        v
        for v in all_variants((architecture,))
        if v.name in ("project", "lift") and v.dtype == "bf16" and v.barred and v.flags["PADDED"] == 64
        if v.flags["MASKED"]
    ]
    chosen += [
        v
        for v in all_variants((architecture,))
        if v.name == "thin" and v.barred and v.flags["COLUMNS"] == 64 and v.flags["MASKED"]
    ]
    assert {v.name for v in chosen} == {"gram", "project", "lift", "thin"}
    found = {v.describe(): failures(v, v.compile()) for v in chosen}
    assert not any(found.values()), found


@triton.jit
def _shared_rows_kernel(
    x_ptr, product_ptr, y_ptr, sum_ptr, n, SUMS: tl.constexpr, WAIT: tl.constexpr
):  # fmt: skip
    """Y = Xᵀ P and, with SUMS, Σ x: rows that a product reads and other arithmetic too."""
    i = tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    sums = tl.zeros((64, 64), tl.float32)
    for row in range(0, n, 64):
        p = tl.load(product_ptr + (row + i)[:, None] * 64 + i[None, :])
        x = tl.load(x_ptr + (row + i)[None, :] * 64 + i[:, None])
        if SUMS:
            sums += x.to(tl.float32)
        acc = tl.dot(x, p, acc)
        if WAIT:
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + i[:, None] * 64 + i[None, :], acc)
    tl.store(sum_ptr + i, tl.sum(sums, 1))


@pytest.mark.parametrize(
    ("architecture", "sums", "wait", "short"),
    [
        ("sm_90", True, False, True),
        ("sm_90", True, True, False),
        ("sm_90", False, False, False),
        ("sm_100", True, False, False),
        ("sm_80", True, False, False),
    ],
)
def test_rows_overwritten_while_a_product_reads_them_fail(architecture, sums, wait, short, monkeypatch, tmp_path):
    """On sm_90 rows that have another use get two buffers where two copies and a product are under way."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = (("SUMS", sums), ("WAIT", wait))
    variant = Variant(_shared_rows_kernel, architecture, "bf16", flags)
    why = "2 buffers of an operand for 2 copies ahead and 1 products under way"
    assert (why in failures(variant, variant.compile())) is short


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_lift_without_its_wait_fails(masked, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (lift,) = [
        v
        for v in all_variants(("sm_90",))
        if v.name == "lift" and v.dtype == "bf16" and v.barred and v.flags["PADDED"] == 128
        if v.flags["MASKED"] is masked
    ]
    assert lift.flags["WAIT"] is needs_wait("sm_90", True) is True
    assert not failures(lift, lift.compile())
    racing = replace(lift, constants=tuple({**lift.flags, "WAIT": False}.items()))
    assert any("buffers of an operand" in reason for reason in failures(racing, racing.compile()))


def test_buffers_are_followed_by_hand():
    """Two copies ahead: three buffers let one product stay under way, two none; a product may also be one back."""
    copy, product = Event("copy", ("a",)), Event("product", ("a",))
    ahead = [copy, copy]

    def short(buffers, *loop):
        return bool(follow({"a": buffers}, ahead + list(loop) * 8))

    assert not short(3, product, Event("wait", pending=1), copy)
    assert short(2, product, Event("wait", pending=1), copy)
    assert not short(2, product, Event("wait", pending=0), copy)
    assert short(3, product, Event("wait", pending=2), copy)
    assert not short(4, product, Event("wait", pending=2), copy)
    assert short(3, product, copy, Event("wait", pending=1))  # the wait comes too late: two are under way
    assert not short(3, product, Event("arrival"), copy)
    assert short(2, copy, product, Event("arrival"))  # what has not been read yet
    assert follow({"a": 3}, [product]) == ["operand a of a product in a loop read before a copy to it was found"]
    assert follow({}, [product]) == ["operand a of a product in a loop not traced to its buffers"]


def test_a_launch_that_idles_fails():
    """Tiles far too large for the width leave most of the chip idle, and the model must say so."""
    chip, tile = CHIPS["sm_80"], GramTile(512, 512, 64, 8, 3)
    one = Pass(tensor=16384.0, shared=0.0, issue=0.0, l2=0.0)
    assert plan_gram(2048, 384, tile, chip.processors).tiles == 1
    update = gram_update(2048, 384, tile, one, chip)
    assert update.seconds > 1.25 * update.ideal


def test_the_innermost_loop_is_found():
    listing = """
        .L_x_1:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        .L_x_2:
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R8, R12, R8 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
        .L_x_3:
        /*0060*/                   BRA `(.L_x_3);
    """
    instructions, loop = innermost_tensor_loop(listing)
    assert len(instructions) == 6
    assert [i.kind for i in loop] == ["LDGSTS", "HMMA", "BRA"]
    assert loop[0].width == 16
