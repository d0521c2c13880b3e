"""What the statistics cost per row as batches and layers grow.

    python benchmarks/scaling.py

SmolLM2-135M in bfloat16 cut to 6, 12 and 24 blocks, LoRA r = 16 on all linear layers, 4 × 256 tokens. The cost of a
batch is what ``collect`` spends outside the forward pass proper: the hooks and the refreshes, in processor time.
"""

import time
import warnings
from typing import Any

import peft
import torch
from torch import Tensor

from eva_kernels.streaming_svd import Statistic
from eva_lora import EvaConfig, collect
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.collecting.capture import Capture
from eva_lora.collecting.run import Run
from timing import time_calls


def cut_model(blocks: int) -> Any:
    """SmolLM2-135M in bfloat16 with its first blocks only, and LoRA on all linear layers."""
    base, _ = load_smollm2()
    base.model.layers = base.model.layers[:blocks]
    return peft.get_peft_model(base.bfloat16(), peft.LoraConfig(r=16, target_modules="all-linear"))


def pass_over(model: Any, batches: list[dict[str, Tensor]]) -> None:
    collect(model, batches, EvaConfig(tau=1.0, max_batches=len(batches)), progress=False)


def cost(blocks: int, batches: list[dict[str, Tensor]]) -> float:
    """Seconds of processor time per batch in hooks and refreshes."""
    model = cut_model(blocks)
    with (
        time_calls(Capture, "_fold", time.process_time) as hooks,
        time_calls(Statistic, "finish_", time.process_time) as finish,
        time_calls(Run, "finish_batch", time.process_time) as refreshes,
    ):
        pass_over(model, batches)
    return (hooks[0] + refreshes[0] + finish[0]) / len(batches)


def main() -> None:
    warnings.simplefilter("ignore")
    _, tokenizer = load_smollm2()
    text = packed_text(tokenizer, sequences=4, tokens=256)
    cost(6, text[:4])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16; microseconds per row and block")
    counts = (8, 16, 32, 64)
    print("blocks " + "".join(f"{count:>5} batches" for count in counts))
    for blocks in (6, 12, 24):
        print(
            f"{blocks:6} " + "".join(f"{cost(blocks, text[:n]) / 1024 / blocks * 1e6:13.1f}" for n in counts),
            flush=True,
        )


if __name__ == "__main__":
    main()
