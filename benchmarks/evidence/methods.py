"""The initialisations that are compared, and what each costs."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from eva_lora import (
    METHODS,
    EvaConfig,
    EvaStatistics,
    apply,
    collect,
    feature_gain,
    fit_quantization_error,
    initialize,
    plan,
)
from examples.domains.task import Batch, Task

__all__ = ["BASELINE", "STARTS", "Initialised", "Initialiser", "Start", "nf4"]


@dataclass(frozen=True)
class Start:
    """How LoRA layers start, on which base, and what of them learns.

    Attributes:
        label: What pages and pictures call it.
        colour: Its own in pictures.
        eva: Fields of ``EvaConfig``; all starts of one seed come from one pass.
        equal_parameters: EVA spends as many parameters as the configured ranks have, in place of as many ranks.
        peft: PEFT's ``init_lora_weights``, where ``eva`` is None.
        scaled: Default A, each layer's times the gain that EVA's has there.
        orthonormal: Rows of A drawn orthonormal.
        method: Of :func:`eva_lora.initialize`, or of :func:`eva_lora.fit_quantization_error` on a quantised base.
        wider: This many times the task's rank.
        frozen: A does not learn.
        quantised: On what nf4 makes of the base.
    """

    label: str
    colour: str
    eva: Mapping[str, Any] | None = field(default=None, kw_only=True)
    equal_parameters: bool = field(default=False, kw_only=True)
    peft: Any = field(default=True, kw_only=True)
    scaled: bool = field(default=False, kw_only=True)
    orthonormal: bool = field(default=False, kw_only=True)
    method: str = field(default="", kw_only=True)
    wider: int = field(default=1, kw_only=True)
    frozen: bool = field(default=False, kw_only=True)
    quantised: bool = field(default=False, kw_only=True)


RHO1, MATCHED = {"rho": 1.0}, {"rho": 1.0, "match_gain": True}
BASELINE = "lora"
STARTS = {
    "lora": Start("default LoRA", "#555555"),
    "eva_rho1": Start("EVA, rho 1", "#56a0d3", eva=RHO1),
    "eva_rho2": Start("EVA, rho 2", "#0b4f8a", eva={"rho": 2.0}),
    "eva_rho2_parameters": Start("EVA, rho 2, equal parameters", "#2a9d8f", eva={"rho": 2.0}, equal_parameters=True),
    "eva_matched": Start("EVA, each A over its gain", "#7b3fa0", eva=MATCHED),
    "eva_global": Start("EVA, all over the median gain", "#c04f9b", eva={"rho": 1.0, "match_gain": "global"}),
    "lora_scaled": Start("default A times EVA's gain", "#a89a1c", scaled=True),
    "pissa": Start("PiSSA", "#c96f16", peft="pissa_niter_16"),
    "olora": Start("OLoRA", "#3c8d40", peft="olora"),
    "frozen_lora": Start("default A, frozen", "#999999", frozen=True),
    "frozen_orthonormal": Start("orthonormal A, frozen", "#a89a1c", orthonormal=True, frozen=True),
    "frozen_eva": Start("EVA, frozen", "#56a0d3", eva=RHO1, frozen=True),
    "frozen_eva_matched": Start("EVA over its gain, frozen", "#7b3fa0", eva=MATCHED, frozen=True),
    "frozen_eva_wider": Start("EVA at twice the rank, frozen", "#0b4f8a", eva=RHO1, wider=2, frozen=True),
    "corda": Start("CorDA", "#8a2d3b", method="corda"),
    "milora": Start("MiLoRA", "#1f7a8c", method="milora"),
    "mica": Start("MiCA", "#b5651d", method="mica"),
    "lora_ga": Start("LoRA-GA", "#d1495b", method="lora-ga"),
    "lora_one": Start("LoRA-One", "#6a994e", method="lora-one"),
    "nf4_lora": Start("nf4, default LoRA", "#999999", quantised=True),
    "nf4_eva": Start("nf4, EVA", "#56a0d3", eva=RHO1, quantised=True),
    "nf4_loftq": Start("nf4, LoftQ", "#c96f16", method="loftq", quantised=True),
    "nf4_repair": Start("nf4, repair", "#3c8d40", method="repair", quantised=True),
    "nf4_both": Start("nf4, half repair, half EVA", "#7b3fa0", method="eva+repair", quantised=True),
}


@dataclass(frozen=True)
class Initialised:
    """A model ready to be trained.

    Attributes:
        model: With its LoRA layers, initialised.
        seconds: What the initialisation took beyond making the layers; for EVA with its pass over the data.
        forwards: Batches it ran through the model.
        parameters: Trainable parameters of the LoRA layers (a head of the task's comes on top, the same for all).
        ranks: Smallest and largest rank, and how many layers lost their adapter.
    """

    model: nn.Module
    seconds: float
    forwards: int
    parameters: int
    ranks: tuple[int, int, int]


class Initialiser:
    """Makes models of one task. One pass of EVA per seed and base serves all that need one."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._passes: dict[tuple[int, bool, int], tuple[EvaStatistics, float]] = {}  # the last one

    def __call__(self, name: str, seed: int) -> Initialised:
        start = STARTS[name]
        began = time.perf_counter()
        base = self.task.base(seed)
        if start.quantised:
            nf4(base)
        model = self._layers(base, seed, True, start)
        plain, began = time.perf_counter() - began, time.perf_counter()
        passed, forwards, ranks = 0.0, 0, {}
        if start.eva is not None or start.scaled:
            statistics, passed = self._pass(model, seed, start)
            began = time.perf_counter()
            ranks = self._from_statistics(model, statistics, start)
            forwards = statistics.num_batches
        elif start.method:
            forwards = self._by_method(model, seed, start)
        elif start.orthonormal:
            for weight in _weights(model, "lora_A"):
                nn.init.orthogonal_(weight)
        elif start.peft is not True:
            model = self._layers(self.task.base(seed), seed, start.peft, start)
            passed = -plain
        seconds = max(0.0, passed + time.perf_counter() - began) if name != BASELINE else 0.0
        for weight in _weights(model, "lora_A") if start.frozen else ():
            weight.requires_grad_(False)
        parameters, found = _trainable(model), list(ranks.values()) or [self.task.rank * start.wider]
        return Initialised(model, seconds, forwards, parameters, (min(found), max(found), found.count(0)))

    def _layers(self, base: nn.Module, seed: int, initialisation: Any, start: Start) -> Any:
        torch.manual_seed(seed)
        rank = self.task.rank * start.wider
        return get_peft_model(base, self.task.lora(r=rank, lora_alpha=rank, init_lora_weights=initialisation))

    @staticmethod
    def _from_statistics(model: Any, statistics: EvaStatistics, start: Start) -> dict[str, int]:
        """Ranks, where they moved."""
        config = EvaConfig(**(start.eva or RHO1))
        if start.equal_parameters:
            config = replace(config, budget_parameters=_trainable(model))
        chosen = plan(statistics, config)
        if not start.scaled:
            apply(model, chosen)
            return chosen.ranks
        with torch.no_grad():
            for name, gain in feature_gain(statistics, chosen.lora_a).items():
                model.get_base_model().get_submodule(name).lora_A["default"].weight.mul_(gain)
        return {}

    def _by_method(self, model: Any, seed: int, start: Start) -> int:
        """How many batches it ran."""
        method, batches, losses = start.method, self.task.training(seed), 0

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            nonlocal losses
            losses += 1
            return self.task.loss(model, batch)

        config = EvaConfig(rho=1.0, max_batches=len(batches))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some layers had not converged by then
            if start.quantised:
                data = None if method == "loftq" else batches
                whole = self.task.base(seed)
                fit_quantization_error(model, data, whole, config, method=method, hold_back=0, progress=False)  # type: ignore[arg-type]
                return len(data or ())
            if METHODS[method].data == "none":
                return initialize(model, None, method, config, progress=False).num_batches
            if METHODS[method].data == "gradients":
                initialize(model, batches, method, config, loss_fn=loss, progress=False)
                return losses
            return initialize(model, batches, method, config, progress=False).num_batches

    def _pass(self, model: nn.Module, seed: int, start: Start) -> tuple[EvaStatistics, float]:
        """Of that seed and those layers, and its seconds; run where it was not yet."""
        key = seed, start.quantised, start.wider
        if key not in self._passes:
            self._passes = {key: self._collected(model, self.task.training(seed))}
        return self._passes[key]

    @staticmethod
    def _collected(model: nn.Module, batches: list[Batch]) -> tuple[EvaStatistics, float]:
        """The pass, at most once over the batches of the training to come."""
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some layers had not converged by then
            most = max(one.eva["rho"] for one in STARTS.values() if one.eva)
            statistics = collect(model, batches, EvaConfig(rho=most, max_batches=len(batches)), progress=False)
        return statistics, time.perf_counter() - start


def nf4(model: nn.Module) -> None:
    """Give each linear layer but the head what bitsandbytes' nf4 (blocks of 64) makes of its weight, in its dtype."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed, state = quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4")
            module.weight.data.copy_(dequantize_4bit(packed, state))


def _weights(model: nn.Module, kind: str) -> list[nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if kind in name]


def _trainable(model: nn.Module) -> int:
    return sum(weight.numel() for weight in _weights(model, "lora_") if weight.requires_grad)
