"""Modes of the process that EVA must not depend on: its random generators, and whether tensors are for inference."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

__all__ = ["noted_generators", "ordinary_tensors", "same_generators"]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Within it new tensors are ordinary ones, which can be trained, also where the caller is in inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextmanager
def same_generators(devices: set[torch.device]) -> Iterator[None]:
    """Within it anything may draw; afterwards the global generators, and these devices', are where they were."""
    restore = noted_generators(devices)
    try:
        yield
    finally:
        restore()


def noted_generators(devices: set[torch.device]) -> Callable[[], None]:
    """Note where the global generators, and these devices', are; the function returned puts them back there."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),  # noqa: NPY002 - the global one is what users draw from
        *(pair for device in devices if (pair := _generator_of(device)) is not None),
    ]

    def restore() -> None:
        for set_state, state in states:
            set_state(state)

    return restore


def _generator_of(device: torch.device) -> tuple[Callable[[Any], object], Any] | None:
    """What sets the state of a device's own generator, and that state; None where there is none that PyTorch names."""
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        return partial(module.set_rng_state, device=device), module.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.set_rng_state, torch.mps.get_rng_state()
    return None
