"""What the statistics cost per row as batches and layers grow.

    python benchmarks/scaling.py

SmolLM2-135M in bfloat16 cut to 6, 12 and 24 blocks, LoRA r = 16 on all linear layers, 4 × 256 tokens. The cost of a
batch is what ``collect`` spends outside the forward pass proper: the hooks and the refreshes, in processor time.
"""

import time
import warnings

import peft
import torch
from timing import time_calls
from torch import Tensor

from eva_kernels.streaming_svd import Statistic
from eva_lora import EvaConfig, collect
from eva_lora.capture import Capture
from eva_lora.demo import load_smollm2, packed_text
from eva_lora.running import Run


def cost(blocks: int, batches: list[dict[str, Tensor]]) -> float:
    """Seconds of processor time per batch in hooks and refreshes."""
    base, _ = load_smollm2()
    base.model.layers = base.model.layers[:blocks]
    model = peft.get_peft_model(base.bfloat16(), peft.LoraConfig(r=16, target_modules="all-linear"))
    config = EvaConfig(tau=1.0, max_batches=len(batches))
    with (
        time_calls(Capture, "_fold", time.process_time) as hooks,
        time_calls(Statistic, "finish_", time.process_time) as finish,
        time_calls(Run, "finish_batch", time.process_time) as refreshes,
    ):
        collect(model, batches, config, progress=False)
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
