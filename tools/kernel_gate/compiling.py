"""Compile many variants at once."""

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

from .machine_code import Code
from .variants import Variant, all_variants


def compile_all(variants: list[Variant], jobs: int) -> list[Code]:
    """Compile in worker processes, with a compiler cache of their own, so that nothing stale is looked at."""
    indices = _index()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TRITON_CACHE_DIR"] = directory
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            return list(pool.map(_compile, [indices[v] for v in variants], chunksize=4))


@cache
def _listed() -> list[Variant]:
    return all_variants()


def _index() -> dict[Variant, int]:
    return {variant: index for index, variant in enumerate(_listed())}


def _compile(index: int) -> Code:
    """Kernels do not pickle, so every worker lists the variants itself and is told only an index."""
    return _listed()[index].compile()
