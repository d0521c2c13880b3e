"""Statistics on a device without float64: simulated, and against the same stream in the CPU's plain arithmetic."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import GramStatistic, SubspaceStatistic, orthonormalize, refresh_
from eva_kernels._double import MAX_PARTS, DistantSum, distilled, double, home_of, like
from eva_kernels.streaming_svd import bring_home_, finish_, refresh
from eva_kernels.symmetric_eigen import symmetric_eigen
from support.bounds import gamma
from support.simulated_device import SimulatedDevice, not_on
from support.streams import EXACTLY, KINDS, loss, scatter, stream

CPU = torch.device("cpu")
D, Q, ROWS = 48, 16, 300  # more rows than a chunk has
SIGMAS = pytest.mark.parametrize("sigmas", [0, 5, 1e4])


def distant(number):
    """What share of the magnitudes of so many tensors their distant sum may be off by: what is lost whenever MAX_PARTS
    are made two, which are parts of the next, of no more than twice those magnitudes; and float64's own rounding.
    """
    times = math.ceil(number / (MAX_PARTS - 2))
    return times * 2 * 2**-47 * math.log2(MAX_PARTS) ** 2 + gamma(number, torch.float64)


DISTANT = distant(1000)  # of more than any test here adds, what is taken out again included; 2⁻²⁴ is a float32 sum's


@pytest.fixture
def simulated():
    home_of.cache_clear()  # it remembers what a device was found to have
    with SimulatedDevice(operators=not_on("MPS")) as device:
        yield device
    home_of.cache_clear()


def masks(number):
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(ROWS, generator=generator) > 0.3 for _ in range(number)]


def fold(statistic, batches, masks=None, sign=1):
    device = statistic.basis.device
    for i, batch in enumerate(batches):
        mask = None if masks is None else masks[i].to(device)
        num_rows = len(batch) if masks is None else int(masks[i].sum())
        statistic.accumulate_(batch.to(device), mask, num_rows=num_rows, sign=sign)


def streamed(kind, device, batches, masks=None, **options):
    """Refreshed after every second batch; what a batch brings after the last refresh is taken out again."""
    statistic = kind(D, Q, device=device, **EXACTLY, **options)
    for start in range(0, len(batches), 2):
        part = slice(start, start + 2)
        fold(statistic, batches[part], None if masks is None else masks[part])
        if start:
            fold(statistic, batches[:1], masks)
            fold(statistic, batches[:1], masks, sign=-1)
        refresh_([statistic])
    statistic.finish_()
    return statistic


def errors(statistic, batches, masks=None):
    """Of its totals, its eigenvalues and its basis, against float64 of the rows; each over its scale."""
    rows = torch.cat([b if masks is None else b[m] for b, m in zip(batches, masks or batches, strict=True)]).double()
    z = rows - statistic.shift.cpu().double()
    sizes, squares = z.abs().sum(0), float(z.square().sum())
    exact = scatter([rows])
    values = torch.linalg.eigvalsh(exact).flip(0)[:Q]
    here = SimpleNamespace(basis=statistic.basis.cpu())
    return {
        "column_sum": float(((statistic.column_sum - z.sum(0)).abs() / sizes).max()),
        "square_sum": abs(float(statistic.square_sum) - squares) / squares,
        "total_scatter": abs(float(statistic.total_scatter()) - float(exact.trace())) / squares,
        "eigenvalues": float((statistic.eigenvalues - values).abs().max() / values[0]),
        "loss": loss(here, exact, 8),
    }


def assert_no_worse(found, plain):
    for name, error in found.items():
        assert error <= 2 * abs(plain[name]) + DISTANT, name


@pytest.mark.parametrize("name", ["cpu", "cuda", "meta", "cuda:1"])
def test_float64_is_at_home_where_a_device_has_it(name):
    assert home_of(torch.device(name)) == torch.device(name)


def test_float64_of_apples_gpu_is_on_the_cpu():
    assert home_of(torch.device("mps")) == CPU


@pytest.mark.parametrize("has_fp64", [True, False])
def test_intels_gpus_say_themselves_whether_they_have_it(has_fp64, monkeypatch):
    home_of.cache_clear()
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_fp64))
    device = torch.device("xpu", 3)
    assert home_of(device) == (device if has_fp64 else CPU)
    home_of.cache_clear()


def test_any_other_device_is_tried_once(simulated):
    assert home_of(simulated.device) == CPU
    tried = simulated.operations.total()
    assert home_of(simulated.device) == CPU
    assert simulated.operations.total() == tried
    simulated._dtypes = ()
    home_of.cache_clear()
    assert home_of(simulated.device) == simulated.device


def test_the_simulated_device_refuses_what_it_lacks(simulated):
    x = torch.ones(3, 2, device=simulated.device)
    for refused in (
        x.double,
        lambda: torch.zeros(2, dtype=torch.float64, device=simulated.device),
        lambda: x.to("cpu", torch.float64),
        lambda: torch.ones(2, dtype=torch.float64, device=CPU).to(x.device),
    ):
        with pytest.raises(TypeError, match=r"has no torch\.float64"):
            refused()
    with pytest.raises(RuntimeError, match="expected all tensors on lazy:0"):
        x + torch.ones(2)
    with pytest.raises(NotImplementedError, match="linalg_eig"):
        torch.linalg.eig(x[:2])
    waits = simulated.waits
    assert bool((x.cpu() == 1).all())
    assert float(x.sum()) == len(x[x > 0]) == 6
    assert simulated.waits == waits + 3


def test_double_goes_home_and_like_comes_back(simulated):
    x = torch.full((2,), 1 / 3, device=simulated.device)
    wide = double(x)
    assert (wide.device, wide.dtype) == (CPU, torch.float64)
    back = like(wide / 3, x)
    assert (back.device, back.dtype) == (simulated.device, torch.float32)
    assert torch.equal(back.cpu(), (wide / 3).float())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=70))
def test_distilling_keeps_the_sum(numbers):
    high, low = distilled(torch.tensor(numbers, dtype=torch.float32)[:, None])
    bound = 2**-47 * max(1, math.ceil(math.log2(len(numbers)))) ** 2 * math.fsum(map(abs, numbers))
    assert abs(math.fsum([float(high), float(low), *(-x for x in numbers)])) <= bound


def test_a_distant_sum_adds_up_without_a_wait_and_keeps_few_parts(simulated):
    rows = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 1e4 + 1e6
    total = DistantSum(torch.zeros(3, dtype=torch.float64, device=CPU), simulated.device)
    moved = [row.to(simulated.device) for row in rows]
    waits = simulated.waits
    for i, row in enumerate(moved):
        total.add_(row, alpha=-1 if i % 3 == 0 else 1)
        assert total.nbytes <= 3 * (8 + 4 * MAX_PARTS)
    assert simulated.waits == waits
    signed = (rows * torch.where(torch.arange(1000) % 3 == 0, -1, 1)[:, None]).double()
    exact = [math.fsum(column) for column in signed.T.tolist()]
    assert np.abs(total.read().numpy() - exact).max() <= DISTANT * float(signed.abs().sum(0).max())
    assert simulated.waits == waits + 1
    total.read()
    assert simulated.waits == waits + 1


def test_a_distant_sum_can_be_copied_replaced_and_added_to_in_part():
    total = DistantSum(torch.zeros(4, dtype=torch.float64), CPU)
    total.add_(torch.ones(4))
    copy = total.clone()
    copy[1:3].add_(torch.tensor([2.0, 3.0]), alpha=-1)
    assert total.read().tolist() == [1, 1, 1, 1]
    assert copy.read().tolist() == [1, -1, -2, 1]
    total.add_(torch.ones(4))
    total.hold_(torch.full((4,), 5.0, dtype=torch.float64))
    assert total.read().tolist() == [5, 5, 5, 5]


def test_what_is_written_to_a_total_that_was_read_counts(simulated):
    statistic = GramStatistic(D, Q, device=simulated.device)
    fold(statistic, stream(1, ROWS, D))
    statistic.column_sum.zero_()
    statistic.square_sum += 1
    before = float(statistic.square_sum)
    fold(statistic, stream(1, ROWS, D))
    assert float(statistic.square_sum) == pytest.approx(2 * before - 1)
    assert bool(statistic.column_sum.any())


@SIGMAS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("watch_gain", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_as_exact_as_with_float64(kind, watch_gain, masked, sigmas, simulated):
    batches, which = stream(6, ROWS, D, decay=1.5, mean=sigmas), masks(6) if masked else None
    plain = streamed(kind, CPU, batches, which, watch_gain=watch_gain)
    found = streamed(kind, simulated.device, batches, which, watch_gain=watch_gain)
    assert found.basis.device == simulated.device
    assert found.num_rows == plain.num_rows
    assert_no_worse(errors(found, batches, which), errors(plain, batches, which))


@SIGMAS
@pytest.mark.parametrize("kind", KINDS)
def test_totals_of_many_chunks_are_as_exact_as_with_float64(kind, sigmas, simulated):
    """Between two refreshes, and about the mean of a first batch that is nothing like the others."""
    batches = [*stream(1, ROWS, D), *(20 * stream(5, ROWS, D, mean=sigmas, seed=1))]

    def totals(device):
        statistic = kind(D, Q, device=device, **EXACTLY)
        fold(statistic, batches)
        found = errors(statistic, batches)
        return {name: found[name] for name in ("column_sum", "square_sum", "total_scatter")}

    assert_no_worse(totals(simulated.device), totals(CPU))


@SIGMAS
@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_as_exact_as_with_float64(kind, sigmas, simulated):
    batches = stream(6, 1000, D, decay=1, mean=sigmas)

    def gains(device):
        """Those that the last refresh found, and those of float64 on the same bases and rows."""
        statistic = kind(D, Q, device=device, watch_gain=True, **EXACTLY)
        for batch in batches:
            fold(statistic, [batch])
            bases = [statistic.previous, statistic.basis]
            (result,) = refresh_([statistic])
        z = batches[-1].double()
        z -= z.mean(0)
        before, after = (((z @ b.cpu().double()) ** 2).sum(0).cumsum(0) for b in bases)
        return result.gains, ((after - before) / after).numpy()

    (plain, its), (found, exact) = gains(CPU), gains(simulated.device)
    assert np.abs(found - exact).max() <= 2 * np.abs(plain - its).max() + DISTANT


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_merge_as_with_float64(kind, simulated):
    parts = [stream(4, ROWS, D, decay=1.5, mean=mean, seed=seed) for seed, mean in enumerate((3, -40))]

    def merged(device):
        one, other = (streamed(kind, device, part) for part in parts)
        one.merge_(other)
        one.finish_()
        return errors(one, [*parts[0], *parts[1]])

    assert_no_worse(merged(simulated.device), merged(CPU))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_to_another_device_and_back(kind, simulated):
    batches = stream(4, ROWS, D, decay=1.5)
    here = kind(D, Q, device=simulated.device, watch_gain=True, **EXACTLY)
    fold(here, batches[:2])
    refresh_([here])
    fold(here, batches[2:3])
    there, back = (kind(D, Q, device=device, watch_gain=True, **EXACTLY) for device in (CPU, simulated.device))
    there.load_state_(here.state())
    back.load_state_(there.state())
    for name, value in here.state().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.cpu(), there.state()[name])
            assert getattr(back, name).device == value.device
    fold(back, batches[3:])
    assert not torch.equal(back.column_sum, here.column_sum)
    fold(here, batches[3:])
    for statistic in (here, back):
        refresh_([statistic])
        statistic.finish_()
    assert torch.equal(here.basis.cpu(), back.basis.cpu())
    assert torch.equal(here.eigenvalues, back.eigenvalues)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_takes_along_what_was_not_read_yet(kind, simulated):
    batches = stream(3, ROWS, D)
    one = kind(D, Q, device=simulated.device)
    fold(one, batches[:2])
    other = one.clone()
    fold(other, batches[2:])
    fold(other, batches[2:], sign=-1)
    torch.testing.assert_close(other.column_sum, one.column_sum, rtol=0, atol=DISTANT * ROWS)
    assert other.num_rows == one.num_rows == 2 * ROWS


def test_blocks_of_features_add_up(simulated):
    batches = stream(3, ROWS, D, decay=1.5)

    def blocks(device):
        statistic = SubspaceStatistic(D, Q, device=device, **EXACTLY)
        fold(statistic, batches[:1])
        refresh_([statistic])
        for batch in batches[1:]:
            for start, stop in ((0, 20), (20, D)):
                x = batch.to(device)[:, start:stop]
                statistic.accumulate_block_(
                    x, None, num_rows=ROWS, start=start, add_up_=lambda products: None, counts=start == 0
                )
        return statistic

    here, there = blocks(simulated.device), blocks(CPU)
    torch.testing.assert_close(here.column_sum, there.column_sum, rtol=0, atol=DISTANT * ROWS)
    torch.testing.assert_close(here.square_sum, there.square_sum, rtol=DISTANT, atol=0)
    assert torch.equal(here.pending.cpu(), there.pending)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("watch_gain", [False, True])
def test_nobody_waits_for_rows_and_once_for_many_statistics(kind, watch_gain, simulated):
    batches = stream(3, ROWS, D)

    def waits(number):
        statistics = [kind(D, Q, device=simulated.device, watch_gain=watch_gain) for _ in range(number)]
        for statistic in statistics:
            fold(statistic, batches[:1])
        refresh_(statistics)
        before = simulated.waits
        for statistic in statistics:
            fold(statistic, batches[1:])
        folded = simulated.waits
        refresh_(statistics)
        return folded - before, simulated.waits - folded

    assert waits(1) == waits(4)
    assert waits(1)[0] == 0
    bring_home_([])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_cost_few_more_operations_than_with_float64(kind):
    """Views included; at most half more, where adding each row to a pair of float32 would have cost twice as many."""

    def operations(dtypes):
        home_of.cache_clear()
        with SimulatedDevice(dtypes=dtypes) as device:
            statistic = kind(D, Q, device=device.device)
            x = torch.ones(64, D, device=device.device)
            statistic.accumulate_(x)
            device.operations.clear()
            for _ in range(200):
                statistic.accumulate_(x)
            return device.operations.total()

    assert operations([torch.float64]) <= 1.5 * operations([])
    home_of.cache_clear()


def test_numerically_dependent_columns_are_mended(simulated):
    """Of rank three, so that factorisations fail and directions without variance come from before."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(ROWS, 3, generator=generator) @ torch.randn(3, D, generator=generator) for _ in range(2)]
    for kind in KINDS:
        found, plain = (streamed(kind, device, batches) for device in (simulated.device, CPU))
        basis, reference = found.basis.cpu().double(), plain.basis.double()
        eye = torch.eye(Q, dtype=torch.float64)
        assert (basis.T @ basis - eye).abs().max() <= 2 * (reference.T @ reference - eye).abs().max()
        assert_no_worse(
            {"eigenvalues": errors(found, batches)["eigenvalues"]},
            {"eigenvalues": errors(plain, batches)["eigenvalues"]},
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_are_found(kind, simulated):
    batches = stream(2, ROWS, D)
    batches[1][5, 3] = float("nan")
    statistics = [kind(D, Q, device=simulated.device) for _ in range(2)]
    fold(statistics[0], batches[:1])
    fold(statistics[1], batches)
    assert [result.finite for result in refresh_(statistics)] == [True, False]


def test_small_algebra_comes_back_to_the_device(simulated):
    y = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    y[1, :, 4] = y[1, :, 3]
    found = orthonormalize(y.to(simulated.device))
    assert found.device == simulated.device
    assert torch.equal(found.cpu(), orthonormalize(y))
    gram = y.mT @ y
    values, vectors = symmetric_eigen(gram.to(simulated.device))
    assert values.device == vectors.device == simulated.device
    assert torch.equal(values.cpu(), symmetric_eigen(gram)[0])


def test_statistics_of_several_devices_are_refreshed_together(simulated):
    batches = stream(3, ROWS, D, decay=1.5)
    statistics = [kind(D, Q, device=device, **EXACTLY) for kind in KINDS for device in (CPU, simulated.device)]
    for batch in batches:
        for statistic in statistics:
            fold(statistic, [batch])
        before = [statistic.basis.cpu().double() for statistic in statistics]
        results = refresh_(statistics)
    for statistic, old, result in zip(statistics, before, results, strict=True):
        cosines, _ = refresh._agreement((old.T @ statistic.basis.cpu().double())[None])
        np.testing.assert_allclose(result.cosines, cosines[0], rtol=0, atol=gamma(D))  # products of columns of norm 1
    finish_(statistics)
    for i in (0, 2):
        assert statistics[i + 1].basis.device == simulated.device
        assert_no_worse(errors(statistics[i + 1], batches), errors(statistics[i], batches))
