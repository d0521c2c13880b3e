"""NaN, Inf and overflow: named, or left out and counted; and rows too few for a basis."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eva_lora import EvaConfig, collect, eva_initialize
from support.bounds import product_rounding
from support.models import layer_inputs, lora, tiny_llama, token_batches
from support.tiny import WIDTH, fingerprint_of, state_of, tiny_batches, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = EvaConfig(max_batches=4, tau=1.0)


def run(loader, model=None, config=CONFIG, **options):
    return collect(model or tiny_model(), loader, config, progress=False, **options)


@pytest.mark.parametrize("statistic", ["gram", "subspace"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 2e19], ids=str)  # the last: its square overflows
@pytest.mark.parametrize("number", [1, 2, 3])  # bases are refreshed after the first two
def test_the_layer_the_batch_and_the_rows_are_named(value, statistic, number):
    model, batches = tiny_model(), tiny_batches(4)
    bad = batches[number - 1]
    bad["attention_mask"][:] = True
    bad["x"].view(-1, WIDTH)[[3, 4, 11], 5] = value
    before = state_of(model)
    message = (
        rf"^batch {number}: NaN or Inf reached the input of blocks\.0\.q, blocks\.0\.k, blocks\.0\.v \(3 rows\); .*"
        r" Float16 overflows at 65504.*nonfinite='skip'"
    )
    with pytest.raises(ValueError, match=message):
        run(batches, model, EvaConfig(max_batches=4, statistic=statistic))
    assert state_of(model) == before


def test_a_batch_is_waited_for_once(monkeypatch):
    """Values are read on the host for one question: is all finite? A refresh answers it with what it has to say."""
    monkeypatch.setattr("eva_kernels.symmetric_eigen.core_runs", lambda matrix: False)  # as on a GPU

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    reads, counts = Reads(), []
    generator = torch.Generator().manual_seed(0)

    def loader():
        for _ in range(6):
            counts.append(reads.count)
            yield {"x": torch.randn(4, 9, WIDTH, generator=generator)}  # of a spectrum that leaves nothing to mend

    with reads:
        run(loader(), config=EvaConfig(max_batches=6, tau=1.0, impl="reference", oversampling=1.0))
    assert np.diff(counts).tolist()[2:] == [1, 0, 1]  # batches 3 to 5; bases are refreshed after the fourth


def test_masked_rows_may_hold_anything():
    batches = tiny_batches(4)
    expected = fingerprint_of(run(batches))
    for batch in batches:
        batch["x"][~batch["attention_mask"]] = float("nan")
    assert fingerprint_of(run(batches)) == expected


@pytest.mark.parametrize("statistic", ["gram", "subspace"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_skipping_is_the_same_as_masking(statistic, value):
    """Rows that hold NaN or Inf leave the same statistics, to the bit, as rows that were masked."""
    bad = [3, 4, 11]
    batches, masked = tiny_batches(4), tiny_batches(4)
    for batch in (*batches, *masked):
        batch["attention_mask"][:] = True
    batches[1]["x"].view(-1, WIDTH)[bad, 5] = value
    masked[1]["attention_mask"].view(-1)[bad] = False
    config = {"max_batches": 4, "tau": 1.0, "statistic": statistic}
    found = run(batches, config=EvaConfig(nonfinite="skip", **config))
    expected = run(masked, config=EvaConfig(**config))
    one, other = found.inputs[0], expected.inputs[0]
    assert torch.equal(one.components, other.components)
    assert torch.equal(one.eigenvalues, other.eigenvalues)
    assert (one.num_rows, one.skipped_rows, other.skipped_rows) == (other.num_rows, 3, 0)


def test_skipped_rows_are_in_the_report():
    batches = tiny_batches(4)
    for batch in batches:
        batch["attention_mask"][:] = True
        batch["x"][1, 2] = float("inf")
    report = eva_initialize(tiny_model(), batches, EvaConfig(max_batches=4, nonfinite="skip"), progress=False)
    assert {state["skipped_rows"] for name, state in report.statistic.items() if name.endswith((".q", ".up"))} == {4}
    assert "rows of layers' inputs left out for NaN or Inf" in str(report)


def test_clean_rows_are_the_same_whether_nan_is_skipped_or_an_error():
    skipping = run(tiny_batches(4), config=EvaConfig(max_batches=4, tau=1.0, nonfinite="skip"))
    failing = run(tiny_batches(4))
    assert all(torch.equal(a.components, b.components) for a, b in zip(skipping.inputs, failing.inputs, strict=True))


def test_a_layer_without_a_single_usable_row_is_named():
    batches = tiny_batches(3)
    for batch in batches:
        batch["x"][:] = float("nan")
    with pytest.raises(ValueError, match=r"^loader: 4 batches held no row that counts for blocks\.0\.q, .* NaN or Inf"):
        run(batches, config=EvaConfig(max_batches=4, nonfinite="skip"))


def test_float16_overflow_says_what_may_mend_it():
    model = lora(tiny_llama()).half()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"^batch 1: NaN or Inf reached the input of .*Float16 overflows at 65504"):
        eva_initialize(model, token_batches(), progress=False)


@pytest.mark.parametrize("number", [2, 3])  # with a refresh and without
def test_rows_are_counted_under_the_callers_autocast(number):
    """What overflows in float16 alone would be clean in a second forward without it."""
    batches = tiny_batches(4)
    batches[number - 1]["x"] *= 1e5
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(
            ValueError, match=rf"^batch {number}: NaN or Inf reached the input of blocks\.0\.up \(\d+ rows\)"
        ),
    ):
        run(batches)


def test_batches_smaller_than_the_components_are_accumulated():
    """One row a batch: what is found is the components of all rows together."""
    model = lora(tiny_llama())
    batches = token_batches(60, (1, 1))
    rows = layer_inputs(model, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        statistics = run(batches, model, EvaConfig(max_batches=60, tau=1.0, statistic="gram"))
    for site in statistics.sites:
        x = rows[site.name]
        values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).flip(0)
        found = statistics.inputs[site.input].eigenvalues
        about_the_shift = (x - x[0]).square().sum()  # the mean of the first batch, which is one row
        rounding = product_rounding("reference", *x.shape) * about_the_shift
        torch.testing.assert_close(found[:4], values[:4], rtol=0, atol=float(rounding))
