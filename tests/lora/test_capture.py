"""Which tensors are folded into which statistic, for every way layers can be called."""

import pytest
import torch
from torch import nn

from eva_kernels import GramStatistic
from eva_lora.adapters import LoraSite
from eva_lora.collecting.capture import Capture
from eva_lora.collecting.rows import RowMask
from support.bounds import gamma

D = 4


class Net(nn.Module):
    """Three layers, called as each test says."""

    def __init__(self, names="abc"):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(D, D, bias=False))

    def run(self, *calls):
        with torch.no_grad():
            for name, x in calls:
                self.get_submodule(name)(x)


@pytest.fixture
def net():
    return Net()


def capture(net, *, share=True):
    sites = [LoraSite(name, module, D, 2) for name, module in net.named_children()]
    make = lambda i: (GramStatistic(D, 2, dtype=torch.float64), "test")  # noqa: E731
    return Capture(sites, [2] * len(sites), make, share=share)


def forward(capture, net, *calls):
    with capture.hooks(), capture.batch(RowMask(None, None)):
        net.run(*calls)


def rows(n=6, seed=0):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).float()


def assert_saw(capture, site, *tensors):
    """The site's statistic is that of exactly these tensors' rows."""
    x = torch.cat(tensors).double()
    statistic = capture.input_of[site].statistic
    assert statistic.num_rows == len(x)
    mean = statistic.shift + statistic.column_sum / len(x)
    centred, spread = x - x.mean(0), (x - statistic.shift).abs()
    rounding = 2 * gamma(len(x) + 3, torch.float64)  # of sums here and there, of rows about the shift
    assert ((mean - x.mean(0)).abs() <= rounding * (spread.mean(0) + x.abs().mean(0))).all()
    offset = statistic.column_sum / len(x)
    scatter = statistic.gram - len(x) * torch.outer(offset, offset)
    assert ((scatter - centred.T @ centred).abs() <= 2 * rounding * spread.T @ spread).all()


def test_layers_called_with_one_tensor_share(net):
    c, x, y = capture(net), rows(), rows(seed=1)
    forward(c, net, ("a", x), ("b", x), ("c", y))
    assert [entry.streams for entry in c.inputs] == [[0, 1], [2]]
    for site, saw in enumerate((x, x, y)):
        assert_saw(c, site, saw)


def test_equal_values_in_another_tensor_are_not_shared(net):
    c, x = capture(net), rows()
    forward(c, net, ("a", x), ("b", x.clone()), ("c", x))
    assert [entry.streams for entry in c.inputs] == [[0, 2], [1]]


def test_sharing_can_be_switched_off(net):
    c, x = capture(net, share=False), rows()
    forward(c, net, ("a", x), ("b", x), ("c", x))
    assert len(c.inputs) == 3
    for site in range(3):
        assert_saw(c, site, x)


def test_all_calls_of_a_layer_fold_into_one_statistic(net):
    c, x, y = capture(net), rows(), rows(3, seed=1)
    forward(c, net, ("a", x), ("b", x), ("a", y), ("b", y), ("c", y))
    assert [entry.streams for entry in c.inputs] == [[0, 1], [2]]
    for site, saw in enumerate(((x, y), (x, y), (y,))):
        assert_saw(c, site, *saw)


def test_a_layer_called_twice_before_its_neighbour_is_not_mixed_with_it(net):
    c, x, y = capture(net), rows(), rows(seed=1)
    forward(c, net, ("a", x), ("a", y), ("b", x), ("c", y))
    for site, saw in enumerate(((x, y), (x,), (y,))):
        assert_saw(c, site, *saw)


def test_layers_that_part_in_the_same_batch_are_told_apart(net):
    c, x, y, z = capture(net), rows(), rows(seed=1), rows(seed=2)
    forward(c, net, ("a", x), ("b", x), ("a", y), ("b", z), ("c", z))
    for site, saw in enumerate(((x, y), (x, z), (z,))):
        assert_saw(c, site, *saw)


@pytest.mark.parametrize("leaves", ["b", "a"])
def test_layers_that_part_in_a_later_batch_get_a_copy(net, leaves):
    c, x, y, z = capture(net), rows(), rows(seed=1), rows(seed=2)
    forward(c, net, ("a", x), ("b", x), ("c", x))
    calls = {"a": y, "b": y, "c": y, leaves: z}
    forward(c, net, *calls.items())
    forward(c, net, ("a", x), ("b", x), ("c", x))
    for site, name in enumerate("abc"):
        assert_saw(c, site, x, calls[name], x)
    assert len(c.inputs) == (2 if leaves == "b" else 3)  # those left behind by the first one called part one by one


def test_a_layer_left_out_of_a_batch_loses_nothing_and_gains_nothing(net):
    c, x, y = capture(net), rows(), rows(seed=1)
    forward(c, net, ("a", x), ("b", x), ("c", x))
    forward(c, net, ("a", y), ("c", y))
    for site, saw in enumerate(((x, y), (x,), (x, y))):
        assert_saw(c, site, *saw)


def test_an_edit_in_place_between_two_uses_is_seen(net):
    c, x = capture(net), rows()
    before = x.clone()
    with c.hooks(), c.batch(RowMask(None, None)):
        net.run(("a", x), ("b", x))
        x.mul_(2)
        net.run(("c", x))
    for site, saw in enumerate((before, before, 2 * before)):
        assert_saw(c, site, saw)


def test_an_edit_that_begins_in_a_later_batch_is_refused_by_name(net):
    c, x, y = capture(net), rows(), rows(seed=1)
    forward(c, net, ("a", x), ("b", x), ("c", x))

    def edited():
        with c.hooks(), c.batch(RowMask(None, None)):
            net.run(("a", y))
            y.add_(1)
            net.run(("b", y))

    with pytest.raises(RuntimeError, match=r"layers b and a shared their input .* share_inputs=False"):
        edited()


def test_tensors_are_let_go_when_all_have_been_called(net):
    c, x = capture(net), rows()
    forward(c, net, ("a", x), ("b", x), ("c", x))
    with c.hooks(), c.batch(RowMask(None, None)):
        net.run(("a", x), ("b", x))
        assert c.inputs[0].calls[0].held.tensor is x
        net.run(("c", x))
        assert c.inputs[0].calls[0].held is None


def test_unwanted_layers_accumulate_nothing_and_hold_nothing(net):
    c, x, y = capture(net), rows(), rows(seed=1)
    forward(c, net, ("a", x), ("b", x), ("c", y))
    c.wanted = {0}
    with c.hooks(), c.batch(RowMask(None, None)):
        net.run(("a", y), ("b", y), ("c", x))
        assert c.inputs[0].calls[0].held is None
    assert_saw(c, 0, x, y)
    assert_saw(c, 2, y)


def test_a_forward_that_begins_again_counts_nothing_twice(net):
    c, x, y, z = capture(net), rows(), rows(seed=1), rows(seed=2)
    forward(c, net, ("a", x), ("b", x), ("c", x))
    with c.hooks(), c.batch(RowMask(None, None)):
        net.run(("a", y), ("b", z), ("a", z))
        c.again()
        net.run(("a", y), ("b", z), ("a", z), ("c", y))
    for site, saw in enumerate(((x, y, z), (x, z), (x, y))):
        assert_saw(c, site, *saw)
    assert c.rows_in_batch == len(y) + len(z)


def test_a_wider_layer_that_joins_widens_the_basis(net):
    sites = [LoraSite(name, module, D, 1) for name, module in net.named_children()]
    widths = [1, 3, 2]
    c = Capture(sites, widths, lambda i: (GramStatistic(D, widths[i], dtype=torch.float64), "test"))
    x = rows()
    forward(c, net, ("a", x), ("b", x), ("c", x))
    assert len(c.inputs) == 1
    assert c.inputs[0].statistic.num_components == 3
    assert_saw(c, 0, x)


def test_inference_tensors_are_never_shared(net):
    c = capture(net)
    with torch.inference_mode():
        x = rows()
        forward(c, net, ("a", x), ("b", x))
    assert [entry.streams for entry in c.inputs] == [[0], [1]]


@pytest.mark.parametrize(
    ("shape", "rows_expected"),
    [((2, 5), [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]), ((10,), [1, 1, 0, 0, 1, 0, 0, 0, 0, 0]), ((2,), [1, 0])],
    ids=["a row per token", "flattened", "a row per sequence"],
)
def test_a_row_mask_fits_inputs_of_these_shapes(shape, rows_expected):
    mask = RowMask(torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]).bool(), 3)
    rows = torch.zeros(2, 5, D)[:, 0] if len(shape) == 1 and shape[0] == 2 else torch.zeros(2, 5, D).view(*shape, D)
    got, count = mask.of(rows, "layer")
    assert got.int().tolist() == rows_expected
    assert count == sum(got.flatten().int().tolist())
