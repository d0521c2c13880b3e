"""What compiled code is told of memory is true, or the call is refused before anything is read or written."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import eva_kernels
import eva_lora
from eva_kernels import SubspaceStatistic
from eva_kernels._build import cpu_form, use_core
from eva_kernels._memory import address, cuda_address, readable
from eva_kernels.gradient_sketch.core import outer_core
from eva_kernels.gram.core import gram_core
from eva_kernels.orthonormal.core import orthonormalize_core
from eva_kernels.streaming_svd import refresh
from eva_kernels.streaming_svd.core import extract_core
from eva_kernels.streaming_svd.count_sketch import count_sketch_core
from eva_kernels.subspace.core import subspace_core
from eva_kernels.symmetric_eigen.core import symmetric_eigen_core

needs_core = pytest.mark.skipif(use_core("auto") is None, reason="no compiled module is used")
needs_form = pytest.mark.skipif(cpu_form() is None, reason="no form of the compiled code runs here")
N, D, Q = 5, 6, 3


def other_dtype(tensor):
    return tensor.to(torch.int16)


def elsewhere(tensor):
    return tensor.to("meta")


def longer(tensor):
    return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype) if tensor.ndim else tensor[None]


def spread(tensor):
    return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]


def misaligned(tensor):
    buffer = bytearray(tensor.nbytes + 1)
    return torch.frombuffer(buffer, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)


def freed(tensor):
    emptied = tensor.clone()
    emptied.untyped_storage().resize_(0)
    return emptied


def negated(tensor):
    if tensor.dtype in (torch.bool, torch.bfloat16):
        return spread(tensor)  # booleans have no negative, complex numbers no parts in bfloat16
    return torch.complex(tensor, tensor).conj().imag.as_strided(tensor.shape, tensor.stride())


SPOILS = [other_dtype, elsewhere, longer, spread, misaligned, freed, negated]


@pytest.mark.parametrize("spoil", SPOILS)
def test_every_fault_is_named_and_the_argument_too(spoil):
    tensor = torch.ones(N, D)
    assert address("it", tensor, torch.float32, (N, D)) == tensor.data_ptr()
    with pytest.raises((TypeError, ValueError), match=r"^it: expected "):
        address("it", spoil(tensor), torch.float32, (N, D))


def test_rows_may_be_apart_where_their_stride_is_passed_on():
    wide = torch.ones(N, D + 2)
    assert address("x", wide[:, 1:-1], torch.float32, (N, D), rows_apart=True) == wide.data_ptr() + 4
    with pytest.raises(ValueError, match=r"^x: expected elements side by side in memory, got strides \(8, 1\)"):
        address("x", wide[:, 1:-1], torch.float32, (N, D))
    with pytest.raises(ValueError, match="side by side"):
        address("x", torch.ones(D, N).T, torch.float32, (N, D), rows_apart=True)
    assert address("x", torch.ones(0, D), torch.float32, (0, D)) == 0  # nothing lies nowhere


@pytest.mark.parametrize("spoil", [spread, misaligned, negated])
def test_rows_that_cannot_be_read_as_they_lie_are_copied(spoil):
    rows = spoil(torch.randn(N, D, generator=torch.Generator().manual_seed(0)))
    copy = readable(rows)
    assert torch.equal(copy, rows)
    address("x", copy, torch.float32, (N, D), rows_apart=True)
    wide = torch.ones(N, D + 2)[:, 1:-1]
    assert readable(wide) is wide


def refusal_of(call):
    """What the error says, or None where there is none."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def subspace_arguments():
    generator = torch.Generator().manual_seed(1)
    return {
        "product": torch.zeros(D, Q),
        "column_sum": torch.zeros(D, dtype=torch.float64),
        "square_sum": torch.zeros((), dtype=torch.float64),
        "x": torch.randn(N, D, generator=generator),
        "basis": torch.randn(D, Q, generator=generator),
        "shift": torch.zeros(D),
        "row_mask": torch.ones(N, dtype=torch.bool),
        "sign": 1.0,
    }


def sketch_arguments():
    return {
        "sums": torch.zeros(Q, D),
        "tally": torch.zeros(Q, 1),
        "total": torch.zeros(D, dtype=torch.float64),
        "x": torch.randn(N, D, generator=torch.Generator().manual_seed(1)),
        "signs": torch.ones(N, 1),
        "row_mask": torch.ones(N, dtype=torch.bool),
        "first": 0,
    }


def gram_arguments():
    given = {**subspace_arguments(), "gram": torch.zeros(D, D)}
    return {name: value for name, value in given.items() if name not in ("product", "basis")}


def outer_arguments():
    generator = torch.Generator().manual_seed(1)
    return {
        "product": torch.zeros(D, Q),
        "rows": torch.randn(N, D, generator=generator).bfloat16(),
        "weights": torch.randn(N, Q, generator=generator),
        "row_mask": torch.ones(N, dtype=torch.bool),
    }


CALLS = {
    subspace_core: subspace_arguments,
    gram_core: gram_arguments,
    count_sketch_core: sketch_arguments,
    outer_core: outer_arguments,
}
TENSORS = [(f, name) for f, make in CALLS.items() for name, value in make().items() if isinstance(value, torch.Tensor)]


@needs_form
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_a_call_is_refused_by_name_or_gives_what_it_gives_of_plain_memory(function, name, spoil):
    expected, given = CALLS[function](), CALLS[function]()
    function(**expected)
    plain = CALLS[function]()[name]
    given[name] = spoil(plain)
    if given[name].shape == plain.shape and given[name].device == plain.device and spoil is not freed:
        given[name].copy_(plain)
    refusal = refusal_of(lambda: function(**given))
    if refusal is not None:
        sized = spoil is longer and name in ("product", "sums", "rows")  # the others' sizes are taken from theirs
        torchs_own = spoil is freed and name in ("signs", "weights")  # they are cut to the rows before
        assert f"{'' if sized else name}: expected " in refusal or (torchs_own and "storage of size 0" in refusal)
        return
    assert spoil in (spread, misaligned, negated), "what cannot be what was meant was taken"
    assert all(torch.equal(torch.as_tensor(given[key]), torch.as_tensor(value)) for key, value in expected.items())


def fed():
    statistics = [SubspaceStatistic(D, Q, seed=i) for i in range(2)]
    for statistic in statistics:
        statistic.accumulate_(torch.randn(4 * D, D, generator=torch.Generator().manual_seed(2)))
    return statistics


@needs_form
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize(("field", "name"), [("pending", "image"), ("basis", "basis"), ("_sample", "sample")])
def test_a_refresh_clears_the_image_where_it_lies_or_is_refused(field, name, spoil):
    statistics = fed()
    before = [getattr(s, field).clone() for s in statistics]
    setattr(statistics[1], field, spoil(before[1]))
    if getattr(statistics[1], field).shape == before[1].shape and spoil in (spread, misaligned, negated):
        getattr(statistics[1], field).copy_(before[1])
    refusal = refusal_of(lambda: list(extract_core(statistics, refresh._LIMITS)))
    if refusal is not None:
        assert refusal.startswith(f"{name}: expected ")
        assert torch.equal(statistics[0].pending, fed()[0].pending)  # nothing was begun
        return
    assert spoil in (spread, negated)
    assert not statistics[1].pending.any()


def test_a_state_that_lies_otherwise_is_brought_into_order():
    """Where an image lies apart, compiled code would clear a copy of it, and its rows would count twice."""
    source, target = fed()[0], SubspaceStatistic(D, Q)
    turned = {
        k: v.T.contiguous().T if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in source.state().items()
    }
    assert not turned["pending"].is_contiguous()
    target.load_state_(turned)
    refresh.refresh_([source]), refresh.refresh_([target])
    assert torch.equal(source.basis, target.basis)
    assert not target.pending.any()


@needs_form
def test_the_eigensolver_and_orthonormalisation_name_their_matrix():
    with pytest.raises(TypeError, match=r"^matrix: expected dtype torch.float64"):
        symmetric_eigen_core(torch.eye(3))
    with pytest.raises(TypeError, match=r"^y: expected dtype torch.float32"):
        orthonormalize_core(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^y: expected memory"):
        orthonormalize_core(freed(torch.eye(3)))


class OnCuda:
    """What an array on a CUDA device says of itself."""

    def __init__(self, device=0, **interface):
        self.device = type("Device", (), {"index": device})()
        self.__cuda_array_interface__ = {"typestr": "<f4", "shape": (4, 2), "strides": None, "data": (64, False)}
        self.__cuda_array_interface__.update(interface)


def test_arrays_on_cuda_are_asked_the_same():
    assert cuda_address("current", OnCuda(), 0) == (64, 2)
    assert cuda_address("current", OnCuda(strides=(20, 4)), 0) == (64, 5)
    for wrong in (
        {"strides": (8, 8)},
        {"strides": (4, 4)},
        {"strides": (10, 4)},
        {"data": (0, False)},
        {"data": (2, False)},
    ):
        with pytest.raises(ValueError, match=r"^current: expected "):
            cuda_address("current", OnCuda(**wrong), 0)
    with pytest.raises(TypeError, match=r"^current: expected float32 arrays on a CUDA device, got <f8"):
        cuda_address("current", OnCuda(typestr="<f8"), 0)
    with pytest.raises(TypeError, match="got ndarray"):
        cuda_address("current", np.zeros((4, 2), np.float32), 0)
    with pytest.raises(ValueError, match=r"^current: expected arrays on CUDA device 1, got one on device 0"):
        cuda_address("current", OnCuda(), 1)


def bindings():
    """By name, arguments that each of the module's functions that take addresses would be right with."""
    buffer = np.zeros(4096)
    at = buffer.ctypes.data
    limits = {
        "jitter": 0.0,
        "alignment": 0.0,
        "symmetry": 0.0,
        "orthogonal": 0.0,
        "rank": 0.0,
        "growth": 0.0,
        "span_jitter": 0.0,
    }
    rows = {"x": at, "is_float32": True, "n": N, "d": D, "row_stride": D, "mask": 0}
    return buffer, {
        "subspace": {**rows, "shift": at, "basis": at, "q": Q, "sign": 1.0, "product": at, "column_sum": at,
                     "square_sum": at, "threads": 1},
        "gram": {**rows, "shift": at, "sign": 1.0, "gram": at, "column_sum": at, "square_sum": at, "threads": 1},
        "thin": {"x": at, "n": N, "d": D, "row_stride": D, "mask": 0, "factor": at, "q": Q, "product": at,
                 "outer": True, "threads": 1},
        "low_rank": {"matrix": at, "is_float32": True, "m": N, "n": D, "left": at, "r": Q, "right": at, "threads": 1},
        "mirror": {"matrix": at, "d": D},
        "sketch": {**rows, "signs": at, "chunk_rows": 256, "before": 0, "column": 0, "q": Q, "sums": at, "tally": at,
                   "total": at, "threads": 1},
        "cholesky_qr": {"y": at, "transposed": False, "d": D, "q": Q, "out": at, "growth": 0.1, "threads": 1},
        "symmetric_eigen": {"matrices": at, "batch": 1, "n": Q, "values": at, "vectors": at, "solved": at,
                            "threads": 1},
        "leading_eigen": {"matrices": at, "batch": 1, "n": Q, "count": 1, "values": at, "vectors": at, "solved": at,
                          "threads": 1},
        "refresh": {"d": D, "q": Q, "samples": [at], "images": [at], "bases": [at], "eigenvalues": at, "means": at,
                    "summarises": True, "new_bases": [at], "rounded_bases": [at], "new_eigenvalues": at, "cosines": at,
                    "overlaps": at, "solved": at, **limits, "power_steps": 1, "threads": 1},
    }  # fmt: skip


SIZES = {
    "m",
    "n",
    "r",
    "d",
    "q",
    "row_stride",
    "threads",
    "batch",
    "count",
    "chunk_rows",
    "before",
    "column",
    "power_steps",
}
ZERO_IS_FINE = {"n", "row_stride", "before", "column", "power_steps"}
BYTES = {"mask", "solved"}  # one of which begins anywhere
BOUND = [
    (function, name) for function, given in bindings()[1].items() for name in given
    if name in SIZES or isinstance(given[name], list) or (isinstance(given[name], int) and given[name] > 4096)
]  # fmt: skip


@needs_form
@pytest.mark.parametrize(("function", "name"), BOUND)
def test_the_binding_refuses_what_no_array_has(function, name):
    buffer, every = bindings()
    given = every[function]
    value = given[name]
    if name in SIZES:
        wrong = [-1] if name in ZERO_IS_FINE and not function.endswith("_eigen") else [-1, 0]
    elif isinstance(value, list):
        wrong = [[0], [value[0] + 1], []]
    else:
        wrong = [0] if name in BYTES else [0, value + 1]
    for one in wrong:
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            getattr(use_core("core"), function)(**{**given, name: one})
    assert not buffer.any()


@needs_core
def test_the_trackers_binding_reads_no_further_than_an_array_goes():
    core = use_core("core")
    demands = {"budget": 4, "groups": None, "min_rank": 0, "max_rank": None, "rank_multiple": 1, "divisors": None}
    sites, ratios = np.array([2, 2, 2]), np.full((3, 2), 0.25)
    raw = bytearray(ratios.nbytes + 1)
    odd = np.frombuffer(raw, np.float64, offset=1).reshape(3, 2)
    odd[:] = ratios
    assert not odd.flags.aligned
    given = {"ratios": ratios, "candidates": sites, **demands}
    expected = core.allocate_ranks(**given)
    np.testing.assert_array_equal(core.allocate_ranks(**{**given, "ratios": odd}), expected)
    np.testing.assert_array_equal(core.allocate_ranks(**{**given, "ratios": np.asfortranarray(ratios)}), expected)
    for name, wrong in [
        ("ratios", ratios[:2]), ("ratios", ratios[:, :1]), ("ratios", ratios[0]), ("candidates", sites[None]),
        ("groups", np.array([0])), ("groups", np.array([0, 1, 3])), ("groups", np.array([0, -1, 1])),
        ("divisors", np.array([1])), ("divisors", np.array([1, 0, 1])), ("rank_multiple", 0),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            core.allocate_ranks(**{**given, name: wrong})
    with pytest.raises(TypeError):
        core.allocate_ranks(**{**given, "candidates": sites.astype(float)})  # would lose what is after the point
    tracker = core.Tracker(sites, **demands, tau=0.9, criterion="component")
    evidence, updated = np.ones((3, 2)), np.ones(3, np.bool_)
    for name, wrong in [
        ("evidence", evidence[:1]), ("evidence", evidence[:, :1]), ("ratios", ratios[:1]), ("ratios", ratios[:, :1]),
        ("updated", updated[:2]),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            tracker.update(**{"evidence": evidence, "ratios": ratios, "updated": updated, name: wrong})
    state = tracker.state()
    for name, value in state.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            tracker.restore(**{**state, name: value[:2]})
    tracker.restore(**state)


def test_addresses_are_taken_in_one_place():
    """Triton's launches take tensors; a table of addresses that they read on the device is made beside them."""
    found = {
        path.name
        for package in (eva_kernels, eva_lora)
        for path in Path(package.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in ("data_ptr", "ctypes", "__array_interface__"))
        or (isinstance(node, ast.Constant) and node.value == "__cuda_array_interface__")
    }
    assert found == {"_memory.py", "_triton.py", "storage.py", "peft_start.py"}  # the last two ask what shares memory
