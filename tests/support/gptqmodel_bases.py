"""``python gptqmodel_bases.py FOLDER gptq|awq`` makes two bases of a float model, FOLDER/gptq-1 and FOLDER/gptq-2.

They differ by the rows that it is quantised by. A program, since gptqmodel ends its process where it fails.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import AWQConfig

BITS, GROUP = 4, 32


def main(folder: Path, kind: str) -> None:
    made, backend, dtype = {
        "gptq": (QuantizeConfig, BACKEND.GPTQ_TORCH, torch.float32),
        "awq": (AWQConfig, BACKEND.AWQ_TORCH, torch.float16),  # its layers take no other
    }[kind]
    for seed in (1, 2):
        how = made(bits=BITS, group_size=GROUP, pack_impl="original", offload_to_disk=False)
        model = GPTQModel.load(str(folder), how, device="cpu", dtype=dtype)
        rows = torch.randint(0, 97, (32, 64), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        model.quantize(batches, batch_size=4, backend=backend)
        model.save(str(folder / f"{kind}-{seed}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
