"""The CUDA comparison of bases where a pass calls it: on a simulated device, its source run on the host."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_compare_bases import overlap_error, run_on_host

from eva_kernels._build import CudaState
from eva_kernels.convergence import bases as comparing_bases

torch: Any = pytest.importorskip("torch")
pytest.importorskip("peft")

from eva_kernels import GramStatistic, SubspaceStatistic  # noqa: E402
from eva_kernels.streaming_svd import comparing, refresh, refresh_, release_workspaces  # noqa: E402
from eva_lora import EvaConfig, collect  # noqa: E402
from support.models import lora, tiny_llama, token_batches  # noqa: E402
from support.simulated_cuda import SimulatedCuda  # noqa: E402
from support.streams import stream  # noqa: E402

KERNEL = "tests/core/compare_bases_host.cpp"
ROWS = 60


def matrix_at(address: int, rows: int, columns: int, stride: int) -> NDArray[np.float32]:
    """What lies there: nothing is read beyond the last column of the last row."""
    size = (rows - 1) * stride + columns
    flat = np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(ctypes.c_float)), (size,)).copy()
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (4 * stride, 4)).copy()


class HostComparison:
    """In the place of the compiled module's class: what it is launched with goes to the kernel's source on the host."""

    program = Path()
    made: "list[HostComparison]" = []  # noqa: RUF012 - of one test

    def __init__(self, rows: NDArray[np.int64], columns: NDArray[np.int64], tau: float, device: int) -> None:
        self.shapes, self.tau, self.launches = list(zip(rows.tolist(), columns.tolist(), strict=True)), tau, 0
        self.found: Any = None
        assert device == 0
        self.made.append(self)

    def launch(self, previous: Any, previous_strides: Any, current: Any, current_strides: Any, stream: int) -> None:
        self.launches += 1
        sides = [
            [matrix_at(a, *shape, s) for a, s, shape in zip(*each, self.shapes, strict=True)]
            for each in ((previous, previous_strides), (current, current_strides))
        ]
        self.found = run_on_host(self.program, *sides, self.tau)

    def result(self) -> dict[str, Any]:
        return dict(vars(self.found))


@pytest.fixture(scope="module")
def program(compile_program: Callable[..., Path]) -> Path:
    return compile_program(KERNEL)


@pytest.fixture
def device(program: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(HostComparison, "program", program)
    monkeypatch.setattr(HostComparison, "made", [])
    for module in (comparing, comparing_bases):
        monkeypatch.setattr(module, "cuda_state", lambda: CudaState(True, 1, "built, 1 device(s)"))
    monkeypatch.setattr(comparing_bases, "use_core", lambda impl: SimpleNamespace(BasisComparison=HostComparison))
    release_workspaces()
    with SimulatedCuda() as simulated:
        yield simulated
    release_workspaces()


def statistics_on(where: Any) -> list[Any]:
    """Of both kinds and several shapes, with rows to refresh from."""
    kinds = [(SubspaceStatistic, 20, 6), (GramStatistic, 12, 5), (SubspaceStatistic, 20, 6), (GramStatistic, 40, 33)]
    made = []
    for seed, (kind, d, q) in enumerate(kinds):
        statistic = kind(d, q, device=where, seed=seed)
        statistic.accumulate_(stream(1, ROWS, d, seed=seed)[0].to(where), num_rows=ROWS)
        made.append(statistic)
    return made


def more(statistics: list[Any]) -> None:
    for seed, s in enumerate(statistics):
        s.accumulate_(stream(2, ROWS, s.num_features, seed=seed)[1].to(s.basis.device), num_rows=ROWS)


def test_a_refresh_takes_its_evidence_from_it_and_waits_no_more_for_it(device: Any) -> None:
    made = statistics_on(device.device)
    refresh_(made)
    more(made)
    before = [s.basis.cpu().double().numpy() for s in made]
    waits = device.waits
    found = refresh_(made)
    assert device.waits == waits + 1
    (comparison,) = HostComparison.made  # made once for these shapes
    assert comparison.launches == 2
    for s, q, refreshed in zip(made, before, found, strict=True):
        p = s.basis.cpu().double().numpy()
        cross = q.T @ p
        bound = len(q) * np.finfo(np.float32).eps / 2  # of one float32 dot product of unit vectors
        norms = np.linalg.norm(q, axis=0) * np.linalg.norm(p, axis=0)
        assert np.abs(refreshed.cosines - np.minimum(np.abs(np.diagonal(cross)) / norms, 1)).max() <= 3 * bound
        for i in range(1, q.shape[1] + 1):
            exact = np.sum(cross[:i, :i] ** 2)
            assert abs(refreshed.overlaps[i - 1] - exact) <= overlap_error(i, bound)


def test_other_statistics_have_a_comparison_of_their_own_and_all_are_let_go(device: Any) -> None:
    made = statistics_on(device.device)
    refresh_(made[:3])
    refresh_(made)
    refresh_(made[:3])
    assert [(c.shapes, c.launches) for c in HostComparison.made] == [
        ([(20, 6), (20, 6), (12, 5)], 2),
        ([(20, 6), (20, 6), (12, 5), (40, 33)], 1),
    ]
    release_workspaces()
    refresh_(made)
    assert len(HostComparison.made) == 3


def test_what_the_kernel_does_not_take_is_compared_by_the_algebra(device: Any) -> None:
    wide = GramStatistic(20, 6, device=device.device, dtype=torch.float64)
    wide.accumulate_(stream(1, ROWS, 20)[0].double().to(device.device), num_rows=ROWS)
    refresh_([wide])
    refresh_(statistics_on("cpu"))
    assert HostComparison.made == []
    basis = torch.zeros(600, comparing.MAX_COLUMNS + 1, device=device.device)
    assert not comparing.comparison_runs([basis])
    assert comparing.comparison_runs([basis[:, 1:]])


def test_a_pass_converges_by_it_as_by_the_algebra(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers are done after the same batches; agreement differs by a float32 product of q columns at most."""

    def a_pass() -> Any:
        base = tiny_llama()
        base.set_attn_implementation("eager")
        model = lora(base.to(device.device), target_modules=["q_proj", "up_proj", "down_proj"])
        return collect(model, token_batches(4), EvaConfig(max_batches=4), progress=False)

    compared = a_pass()
    launches = sum(c.launches for c in HostComparison.made)
    assert launches == 3  # refreshes come after batches 1, 2 and 4
    monkeypatch.setattr(refresh, "comparison_runs", lambda bases: False)
    plain = a_pass()
    assert sum(c.launches for c in HostComparison.made) == launches
    assert compared.history == plain.history
    assert compared.trace.converged == plain.trace.converged
    for ours, theirs in zip(compared.inputs, plain.inputs, strict=True):
        assert torch.equal(ours.components, theirs.components)
