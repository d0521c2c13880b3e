"""The initialisations that are compared, and what each costs."""

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from eva_lora import EvaConfig, EvaStatistics, apply, collect, feature_gain, plan
from examples.domains.task import Batch, Task

__all__ = ["BASELINE", "EVA", "OTHERS", "SCALED", "Initialised", "Initialiser"]

#: Fields of ``EvaConfig``; all of one seed from one pass.
EVA: dict[str, dict[str, Any]] = {
    "eva_rho1": {"rho": 1.0},
    "eva_rho2": {"rho": 2.0},
    "eva_matched": {"rho": 1.0, "match_gain": True},
    "eva_global": {"rho": 1.0, "match_gain": "global"},
}
BASELINE = "lora"
SCALED = "lora_scaled"  # default A, each layer's times the gain that EVA's has there
OTHERS: dict[str, Any] = {"lora": True, "pissa": "pissa_niter_16", "olora": "olora"}  # PEFT's init_lora_weights


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
    """Makes models of one task. One pass of EVA per seed serves all that need one."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._passes: dict[int, tuple[EvaStatistics, float]] = {}  # the last seed's

    def __call__(self, method: str, seed: int) -> Initialised:
        if method in EVA:
            return self._eva(EvaConfig(**EVA[method]), seed)
        if method == SCALED:
            return self._scaled(seed)
        start = time.perf_counter()
        model = self._peft(seed, True)
        plain = time.perf_counter() - start
        seconds = 0.0
        if method != BASELINE:
            start = time.perf_counter()
            model = self._peft(seed, OTHERS[method])
            seconds = max(0.0, time.perf_counter() - start - plain)
        return self._described(model, seconds, 0, {})

    def _peft(self, seed: int, initialisation: Any) -> Any:
        torch.manual_seed(seed)
        return get_peft_model(self.task.base(seed), self.task.lora(init_lora_weights=initialisation))

    def _eva(self, config: EvaConfig, seed: int) -> Initialised:
        model = self._peft(seed, True)
        statistics, pass_seconds = self._pass(model, seed)
        start = time.perf_counter()
        eva_plan = plan(statistics, config)
        apply(model, eva_plan)
        seconds = pass_seconds + time.perf_counter() - start
        return self._described(model, seconds, statistics.num_batches, eva_plan.ranks)

    def _scaled(self, seed: int) -> Initialised:
        model = self._peft(seed, True)
        statistics, pass_seconds = self._pass(model, seed)
        start = time.perf_counter()
        gains = feature_gain(statistics, plan(statistics, EvaConfig(**EVA["eva_rho1"])).lora_a)
        with torch.no_grad():
            for name, gain in gains.items():
                model.get_base_model().get_submodule(name).lora_A["default"].weight.mul_(gain)
        return self._described(model, pass_seconds + time.perf_counter() - start, statistics.num_batches, {})

    def _pass(self, model: nn.Module, seed: int) -> tuple[EvaStatistics, float]:
        """Of that seed, and its seconds; run where it was not yet."""
        if seed not in self._passes:
            self._passes = {seed: self._collected(model, self.task.training(seed))}
        return self._passes[seed]

    @staticmethod
    def _collected(model: nn.Module, batches: list[Batch]) -> tuple[EvaStatistics, float]:
        """The pass, at most once over the batches of the training to come."""
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some layers had not converged by then
            most = max(options["rho"] for options in EVA.values())
            config = EvaConfig(rho=most, max_batches=len(batches))
            statistics = collect(model, batches, config, progress=False)
        return statistics, time.perf_counter() - start

    def _described(self, model: Any, seconds: float, forwards: int, ranks: dict[str, int]) -> Initialised:
        parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)
        found = list(ranks.values()) or [self.task.rank]
        return Initialised(model, seconds, forwards, parameters, (min(found), max(found), found.count(0)))
