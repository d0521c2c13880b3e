"""What the tests of the compiled code for a CPU share: each runs with every form that this machine runs."""

from collections.abc import Iterator

import pytest

from eva_kernels._build import use_core

HERE = [] if use_core("auto") is None else use_core("core").cpu_forms()
NONE = [pytest.param("none", marks=pytest.mark.skip("no form of the compiled code runs here"))]
ALGEBRA = ("avx512", "avx2")  # forms with code of their own for more than the products of rows


def chosen(form: str) -> Iterator[str]:
    core = use_core("core")
    before = core.cpu_form()
    core.choose_cpu_form(form)
    yield form
    core.choose_cpu_form(before)


@pytest.fixture(scope="module", params=HERE or NONE)
def cpu_form(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=[form for form in HERE if form in ALGEBRA] or NONE)
def algebra_form(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from chosen(request.param)
