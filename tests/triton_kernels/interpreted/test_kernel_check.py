"""The check users run on their own device, here in the interpreter; and that it can fail."""

import pytest
import torch

from eva_kernels import kernel_check


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(kernel_check, "_SHAPES", ((100, 40), (77, 13)))
    monkeypatch.setattr(kernel_check, "_EIGEN_SIZES", (6,))


def test_every_kernel_passes():
    checks = kernel_check.check_kernels("cpu")
    assert len(checks) == 2 * 3 * 3 + 1
    assert all(check.passed for check in checks), checks


def test_a_kernel_that_forgets_the_shift_fails(monkeypatch):
    monkeypatch.setattr(kernel_check, "_SHAPES", ((77, 13),))

    def forgetful(gram, column_sum, square_sum, x, shift, row_mask, *, impl):
        right(gram, column_sum, square_sum, x, shift * 0, row_mask, impl=impl)

    right = kernel_check.gram_accumulate_
    monkeypatch.setattr(kernel_check, "gram_accumulate_", forgetful)
    assert {check.passed for check in kernel_check.check_kernels("cpu") if check.name.startswith("gram")} == {False}


@pytest.mark.parametrize("forgotten", ["mask", "half of the weights"])
def test_a_sketch_that_forgets_something_fails(forgotten, monkeypatch):
    for name, value in (("_SHAPES", ((77, 13),)), ("_DTYPES", (torch.bfloat16,)), ("_EIGEN_SIZES", ())):
        monkeypatch.setattr(kernel_check, name, value)

    def forgetful(product, rows, weights, row_mask, *, impl):
        if forgotten == "mask":
            right(product, rows.nan_to_num(1), weights, impl=impl)
        else:
            right(product, rows, weights.bfloat16(), row_mask, impl=impl)

    right = kernel_check.outer_add_
    monkeypatch.setattr(kernel_check, "outer_add_", forgetful)
    assert {check.passed for check in kernel_check.check_kernels("cpu") if check.name.startswith("grad")} == {False}


@pytest.mark.slow
def test_a_kernel_that_does_not_run_leaves_the_others_to_be_checked(monkeypatch):
    monkeypatch.setattr(kernel_check, "_SHAPES", ((77, 13),))

    def unable(*_, **options):
        raise RuntimeError("out of resource:\n  shared memory")

    monkeypatch.setattr(kernel_check, "subspace_accumulate_", unable)
    checks = kernel_check.check_kernels("cpu")
    assert len(checks) == 3 * 3 + 1
    failed = [check for check in checks if not check.passed]
    assert {check.failure for check in failed} == {"RuntimeError: out of resource: shared memory"}
    assert {check.name.partition(" ")[0] for check in failed} == {"subspace"}
    assert len(failed) == 3


def test_a_device_that_triton_does_not_run_on_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"^impl: expected CUDA or HIP tensors for 'triton'"):
        kernel_check.check_kernels("cpu")
