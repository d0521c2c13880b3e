"""What each initialisation of LoRA costs on one model, in time and memory, and what of the inputs its A captures.

SmolLM2-135M cut to its first blocks, r = 16 on all linear layers, the same batches for those that read data. A call
is everything from a base model to an adapter that can be trained. PiSSA, OLoRA, CorDA and LoRA-GA aim at other things
than the variance of the inputs: for them the error says how far from it their A is, not how good it is.
"""

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from end_to_end import ExactScatter, fed, load_smollm2, packed_text
from eva_lora import eva_initialize
from harness.paired import Candidate, Case

RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Batches = list[dict[str, Tensor]]


def config_of(init: bool | str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=init, task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]


def run_ours(base: nn.Module, batches: Batches) -> Any:
    model = peft.get_peft_model(base, config_of("eva"))
    eva_initialize(model, batches, progress=False)
    return model


def run_peft_eva(base: nn.Module, batches: Batches) -> Any:
    model = peft.get_peft_model(base, config_of("eva", eva_config=peft.EvaConfig(rho=2.0)), low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def run_from_weights(init: bool | str) -> Callable[[nn.Module, Batches], Any]:
    """Initialisations that read no data."""
    return lambda base, batches: peft.get_peft_model(base, config_of(init))


def run_corda(base: nn.Module, batches: Batches) -> Any:
    def forwards() -> None:
        for batch in batches:
            for ids in batch["input_ids"]:  # its hooks take one sequence at a time
                base(input_ids=ids[None], use_cache=False)

    config = config_of("corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"))
    preprocess_corda(base, config, run_model=forwards)
    return peft.get_peft_model(base, config)


def run_lora_ga(base: nn.Module, batches: Batches) -> Any:
    def steps() -> None:
        for batch in batches:
            base(**batch).loss.backward()

    config = config_of("lora_ga", lora_ga_config=peft.LoraGAConfig())
    peft.preprocess_loraga(base, config, steps)
    return peft.get_peft_model(base, config)


PEERS: dict[str, Callable[[nn.Module, Batches], Any]] = {
    "PEFT EVA": run_peft_eva,
    "PEFT default": run_from_weights(True),
    "PEFT PiSSA": run_from_weights("pissa"),
    "PEFT PiSSA, 4 iterations": run_from_weights("pissa_niter_4"),
    "PEFT OLoRA": run_from_weights("olora"),
    "PEFT CorDA": run_corda,
    "PEFT LoRA-GA": run_lora_ga,
}


def linears(base: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in base.named_modules() if name.endswith(tuple(TARGETS))}


def missed(model: Any, exact: Mapping[str, ExactScatter]) -> Mapping[str, float]:
    """Variance of a layer's inputs that no direction of its A holds, over the most its rank could; mean over layers."""
    found = []
    for name, scatter in exact.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        if "default" in getattr(layer, "lora_A", {}):  # rank 0 leaves no adapter
            found.append(scatter.missed_by(layer.lora_A["default"].weight.detach()))
    return {"variance missed": statistics.mean(found)}


def bench_initialisations(compare: Callable[..., Any], quick: bool) -> None:
    base, tokenizer = load_smollm2()
    base.model.layers = base.model.layers[: 1 if quick else 2]
    base.config.num_hidden_layers = len(base.model.layers)
    batches = packed_text(tokenizer, sequences=4, tokens=64 if quick else 256)[: 2 if quick else 12]
    base.eval()
    exact = {name: ExactScatter() for name in linears(base)}
    with torch.no_grad(), fed(linears(base), lambda name, x: exact[name].add(x)):
        for batch in batches:
            base(input_ids=batch["input_ids"], use_cache=False)
    fresh = [copy.deepcopy(base) for _ in range(8)]  # most of them change the weights they are given
    kept: dict[str, Any] = {}

    def candidate(name: str, run: Callable[[nn.Module, Batches], Any]) -> Candidate:
        def call() -> None:
            kept.pop(name, None)
            kept[name] = run(fresh.pop() if fresh else copy.deepcopy(base), batches)

        return Candidate(call, lambda: missed(kept[name], exact), long=True)

    def forward() -> None:
        with torch.no_grad():
            for batch in forwards:
                base(input_ids=batch["input_ids"], use_cache=False)

    forwards = batches[:3]
    wanted = {name: run for name, run in PEERS.items() if not (quick and name == "PEFT EVA")}  # it needs more rows
    compare(
        Case(
            "Initialisations",
            f"SmolLM2-135M's first {len(base.model.layers)} blocks, {len(batches)} batches of 4 sequences, float32",
            candidate("EVA, ours", run_ours),
            {name: candidate(name, run) for name, run in wanted.items()},
            Candidate(forward),
            forward_share=len(forwards) / len(batches),
            facts={"model": "SmolLM2-135M", "blocks": len(base.model.layers)},
        )
    )
