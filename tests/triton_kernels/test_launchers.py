"""Every kernel compiles as its launcher asks for it, with any Triton from the oldest on, for devices that are not here.

A launch is cut off between compiling and running; what a compiled kernel computes, the interpreter and a GPU say.
"""

import os
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from eva_kernels import _triton
from eva_kernels._cards import CARDS, card_named
from eva_kernels._workspace import Workspace
from eva_kernels.gradient_sketch import triton as gradient_sketch
from eva_kernels.gram import triton as gram
from eva_kernels.subspace import triton as subspace
from eva_kernels.symmetric_eigen import triton as symmetric_eigen
from tools.kernel_gate.machine_code import TENSOR_INSTRUCTION
from tools.kernel_gate.variants import all_variants

pytestmark = [
    pytest.mark.slow,  # `make kernels` compiles more; this is for every Triton, and through the launchers
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

MODULES = (_triton, gram, subspace, gradient_sketch, symmetric_eigen)
KERNELS = {
    kernel.__name__
    for module in MODULES
    for name, kernel in vars(module).items()
    if isinstance(kernel, JITFunction) and name.endswith("_kernel")
}
HERE = tuple(map(int, triton.__version__.split(".")[:2]))
TARGETS = {  # every card that this Triton has kernels for; AMD's need a linker of ROCm's
    name: GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    for name in CARDS
    if name.startswith("sm_") and card_named(name, HERE).tiles is not None
}


@pytest.fixture(params=TARGETS)
def compiled(request, monkeypatch, tmp_path):
    """The names of the kernels that were asked for and compiled, for a device that only has a name."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = SimpleNamespace(
        get_current_target=lambda: TARGETS[request.param],
        get_current_device=lambda: request.param,  # a kernel keeps what it compiled for a device
        get_current_stream=lambda device: 0,
    )
    before = dict(vars(driver))
    driver.set_active(device)
    tiles = CARDS[request.param].tiles
    facts = {"architecture": lambda device: tiles, "multiprocessors": lambda device: 108}
    for module in MODULES:
        for name, fact in {**facts, "l2_bytes": lambda device: 40 << 20}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fact)
    run, names = JITFunction.run, set()

    def compile_only(self, *arguments, warmup, **options):
        assert run(self, *arguments, warmup=True, **options) is not None
        names.add(self.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    yield names
    vars(driver).update(before)  # to reset it would look for a device


def multiply(x, mask, q):
    """X times a basis in bfloat16, and its transpose times weights in float32."""
    n, d = x.shape
    for outer, factor, target in (
        (False, torch.zeros(d, q, dtype=torch.bfloat16), torch.zeros(n, q)),
        (True, torch.zeros(n, q), torch.zeros(d, q)),
    ):
        kind = {"outer": outer, "masked": mask is not None, "workspace": Workspace(x.device)}
        gradient_sketch.ThinProduct(x, factor, target, **kind).launch(x, mask, factor, target, 0)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, True), (torch.float32, False)])
def test_every_kernel_compiles_as_it_is_launched(compiled, dtype, masked):
    n, d = 600, 256
    totals = torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x, shift, mask = torch.zeros(n, d, dtype=dtype), torch.zeros(d), torch.ones(n, dtype=torch.bool) if masked else None
    gram.accumulate_triangle_(torch.zeros(d, d), *totals, x, shift, mask)
    gram.mirror_triangle_(torch.zeros(d, d))
    subspace.accumulate_product_(torch.zeros(d, 24), *totals, x, torch.zeros(d, 24), shift, mask)
    multiply(x, mask, 24)
    symmetric_eigen.symmetric_eigen_triton(torch.eye(24)[None])
    assert compiled == KERNELS


def test_bases_of_every_width_compile(compiled):
    n, d = 600, 320
    totals = torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x, shift = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(d)
    for q in (8, 40, 100, 200):  # padded to 32, 64, 128 and 256
        subspace.accumulate_product_(torch.zeros(d, q), *totals, x, torch.zeros(d, q), shift, None)
        multiply(x, None, q)
    assert {"_prepare_kernel", "_project_kernel", "_lift_kernel", "_factor_kernel", "_thin_kernel"} <= compiled


def test_the_gate_compiles_with_this_triton(monkeypatch, tmp_path):
    """Its bars are for machine code of later ones; that a variant compiles and can be read is asked of all."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    variant = next(v for v in all_variants(("sm_80",)) if v.name == "gram" and v.barred)
    code = variant.compile()
    assert any(name.startswith(TENSOR_INSTRUCTION["sm_80"]) for name in code.tensor)
    assert code.loop
    assert code.registers > 0
