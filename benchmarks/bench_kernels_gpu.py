"""Kernels on a GPU: medians and percentiles beside cuBLAS' full product, svd_lowrank, PEFT's step and the roofline.

Run with ``python benchmarks/bench_kernels_gpu.py``; says so and stops where there is no GPU, and reports nothing
where a kernel fails its own check.
"""

import argparse
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from eva_kernels import gram_accumulate_, subspace_accumulate_
from eva_kernels.kernel_check import check_kernels

DEVICE = "cuda"
REPEATS = 50
WIDTHS = (384, 896, 2048, 4096, 8192, 14336)


def times(call: Callable[[], object]) -> list[float]:
    """Device milliseconds of one call each, sorted, with the L2 cache emptied before it."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(5):
        call()
    result = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        result.append(start.elapsed_time(end))
    return sorted(result)


def report(name: str, n: int, d: int, sample: list[float], floor: float | None = None) -> None:
    low, middle, high = (sample[round(p * (len(sample) - 1))] for p in (0.1, 0.5, 0.9))
    roofline = "" if floor is None else f"{middle / floor:.2f}"
    print(f"| {name} | {n} | {d} | {middle:.3f} | {low:.3f} | {high:.3f} | {roofline} |")


def peft_step(x: Tensor, rank: int) -> None:
    """One batch of the incremental PCA that PEFT runs, from its own code."""
    from peft.utils.incremental_pca import IncrementalPCA

    IncrementalPCA(n_components=rank, lowrank=True).partial_fit(x.float())


def bench_width(n: int, d: int, q: int, tflops: float | None, bandwidth: float | None) -> None:
    """All figures of one width; the roofline is the arithmetic at peak or every operand moved once."""
    x, shift = torch.randn(n, d, device=DEVICE).bfloat16(), torch.zeros(d, device=DEVICE)
    gram, basis = torch.zeros(d, d, device=DEVICE), torch.randn(d, q, device=DEVICE)
    product = torch.zeros_like(basis)
    sums = torch.zeros(d, device=DEVICE, dtype=torch.float64), torch.zeros((), device=DEVICE, dtype=torch.float64)
    gram_floor = product_floor = None
    if tflops and bandwidth:
        peak, memory = tflops * 1e9, bandwidth * 1e9  # a millisecond
        gram_floor = max(n * d * (d + 1) / peak, (2 * n * d + 6 * d * d) / memory)
        product_floor = max(4 * n * d * q / peak, (2 * n * d + 12 * d * q) / memory)
    gram_sample = times(lambda: gram_accumulate_(gram, *sums, x, shift, impl="triton"))
    report("gram", n, d, gram_sample, gram_floor)
    report("cuBLAS, full product", n, d, times(lambda: x.mT @ x))
    product_sample = times(lambda: subspace_accumulate_(product, *sums, x, basis, shift, impl="triton"))
    report("subspace", n, d, product_sample, product_floor)
    report("svd_lowrank", n, d, times(lambda: torch.svd_lowrank(x.float(), q=q, niter=4)))
    report("PEFT's step", n, d, times(lambda: peft_step(x, q // 2)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--tflops", type=float, help="dense bf16 peak of this GPU, for the roofline")
    parser.add_argument("--bandwidth", type=float, help="memory bandwidth of this GPU in TB/s, for the roofline")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA or HIP device: nothing measured")
        return 0
    if failed := [check for check in check_kernels(DEVICE) if not check.passed]:
        print(f"kernels fail their check, no figures: {failed}")
        return 1

    n, q = arguments.rows, arguments.components
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Python {platform.python_version()}, bf16")
    print(f"{' '.join(sys.argv)}: {REPEATS} calls each, milliseconds")
    print("| what | rows | width | median | 10 % | 90 % | over the roofline |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for d in WIDTHS:
        bench_width(n, d, q, arguments.tflops, arguments.bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
