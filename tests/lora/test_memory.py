"""Memory that a pass takes: given back when it is over, and not asked for again and again."""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from eva_kernels.streaming_svd import Statistic
from eva_lora import EvaConfig, collect
from support.tiny import tiny_batches, tiny_model


def test_statistics_are_gone_with_the_pass():
    gc.collect()
    gc.disable()  # cycles would keep them until it comes by
    try:
        collected = collect(tiny_model(), tiny_batches(2), EvaConfig(max_batches=2, tau=1.0), progress=False)
        assert collected.inputs
        assert not [x for x in gc.get_objects() if isinstance(x, Statistic)]
    finally:
        gc.enable()


MAPPED_FOR_A_BLOCK = """
import ctypes, sys
import torch

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

if sys.argv[1] == "after a pass":
    from eva_lora import EvaConfig, collect
    from support.tiny import tiny_batches, tiny_model

    collect(tiny_model(), tiny_batches(1), EvaConfig(max_batches=1, tau=1.0), progress=False)
before = mallinfo().hblkhd
block = torch.empty(30 << 20, dtype=torch.uint8)
print(mallinfo().hblkhd - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="what is measured is glibc's malloc")
@pytest.mark.parametrize(("when", "is_mapped"), [("before any", True), ("after a pass", False)])
def test_after_a_pass_large_blocks_are_no_longer_mapped_one_by_one(when, is_mapped):
    command = [sys.executable, "-W", "ignore", "-c", MAPPED_FOR_A_BLOCK, when]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(done.stdout) in (range(30 << 20, 31 << 20) if is_mapped else [0])
