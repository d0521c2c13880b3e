"""The state of a pass in one file, from which a pass that was cut off goes on as if it had not been."""

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eva_kernels._build import cpu_form, use_core

from ..adapters import is_lora
from ..planning import Trace, storage, versions
from .convergence import LayerConvergence
from .inputs import DistinctInput
from .reader import DIGEST_BYTES, Position
from .rows import RowMemory
from .run import Run

__all__ = ["DEFAULT_CHECKPOINT_EVERY", "Checkpoint"]

DEFAULT_CHECKPOINT_EVERY = 10
SAMPLED_ELEMENTS = 1024  # of each weight, spread over it, that tell one model from another
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class SavedInput:
    """One :class:`~eva_lora.collecting.inputs.DistinctInput` between two batches, but for its tensors."""

    kind: str
    reason: str
    streams: list[int]
    columns: int
    pending_batches: int
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """The plain numbers of a run between two batches."""

    num_batches: int
    num_rows: int
    history: list[int]
    seconds: dict[str, float]
    stop_reason: str
    gram_bytes: int
    wanted: list[int]
    spares: bool
    rules: dict[str, list[str]]
    row_memory: dict[str, dict[str, str]]
    skipped_rows: dict[str, int]
    trace: dict[str, Any]


class Checkpoint:
    """Where and how often a pass is saved.

    Args:
        path: The file.
        every: Batches between two saves.
        identity: What has to be the same for the pass to go on: :func:`identity`.

    Raises:
        TypeError, ValueError: ``path`` is no path or ``every`` no number of at least 1.
        IsADirectoryError: ``path`` is a folder.
        PermissionError: nothing can be written there.
    """

    def __init__(self, path: str | Path, every: int | None, identity: dict[str, Any]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint: expected a path, got {type(path).__name__}")
        if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
            raise TypeError(f"checkpoint_every: expected an integer, got {every!r}")
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every: expected an integer of at least 1, got {every}")
        self.path, self.every, self._identity = Path(path), every or DEFAULT_CHECKPOINT_EVERY, identity
        if self.path.is_dir():
            raise IsADirectoryError(f"checkpoint: expected a file name, got the folder {self.path}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path.parent, os.W_OK):
            raise PermissionError(f"checkpoint: expected a folder that can be written to, got {self.path.parent}")
        storage.remove_leftovers(self.path)

    def save(self, run: Run, positions: list[Position], states: list[dict[str, Any]] | None = None) -> None:
        """Write the run as it stands between two batches.

        Args:
            run: The run.
            positions: Of each rank's loader.
            states: Of each input's statistic. None: its own.
        """
        tensors: dict[str, Tensor] = {}
        transposed: list[str] = []
        inputs = []
        for i, entry in enumerate(run.capture.inputs):
            state = entry.statistic.state() if states is None else states[i]
            for name, value in state.items():
                if isinstance(value, Tensor):
                    # A product's rounding follows the order of its operands in memory, so that is kept too.
                    if value.ndim == 2 and not value.is_contiguous() and value.mT.is_contiguous():
                        transposed.append(f"input.{i}.{name}")
                        value = value.mT
                    tensors[f"input.{i}.{name}"] = value
            numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
            columns = entry.statistic.num_components
            inputs.append(
                SavedInput(entry.statistic.kind, entry.reason, entry.streams, columns, entry.pending_batches, numbers)
            )
        progress = Progress(
            num_batches=run.num_batches,
            num_rows=run.num_rows,
            history=run.history,
            seconds={**run.seconds, "statistics": run.capture.seconds, "total": time.perf_counter() - run.started},
            stop_reason=run.stop_reason,
            gram_bytes=run.maker.gram_bytes,
            wanted=sorted(run.capture.wanted),
            spares=run.capture.end.spares,
            rules={name: sorted(rules) for name, rules in run.row_rules.rules.items()},
            row_memory=asdict(run.row_rules.memory),
            skipped_rows=run.row_rules.skipped,
            trace=asdict(run.trace),
        )
        for rank, position in enumerate(positions):
            joined = np.frombuffer(b"".join(position.digests), np.uint8).copy()
            tensors[f"digests.{rank}"] = torch.from_numpy(joined).reshape(-1, DIGEST_BYTES)
        facts = {
            "identity": self._identity,
            "progress": asdict(progress),
            "inputs": [asdict(entry) for entry in inputs],
            "transposed": transposed,
            "following": _packed(run.convergence.state(), tensors, "following"),
            "loaders": [_packed(p.loader_state, tensors, f"loader.{rank}") for rank, p in enumerate(positions)],
        }
        storage.save(self.path, "checkpoint", tensors, facts)

    def load_into(self, run: Run) -> Position | None:
        """Bring a fresh run to where the file left off.

        Returns where this rank's loader has to stand; None without a file, and where another number of ranks wrote it:
        then the loader is to go on from where it stands.

        Raises:
            ValueError: the file is damaged, or was made by another run; the message names what differs.
        """
        if not self.path.exists():
            return None
        tensors, facts = storage.load(self.path, "checkpoint")
        differences = list(_differences(facts.get("identity"), self._identity))
        if differences and run.statistics.is_speaker:  # which wrote it; others hold other shards
            more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
            raise ValueError(
                f"checkpoint: {self.path} is of another run: {'; '.join(differences[:SHOWN_DIFFERENCES])}{more}. Run "
                "as it was run, or delete the file to begin again"
            )
        try:
            return _restore(run, tensors, facts)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"checkpoint: {self.path} is no complete checkpoint: {error}") from error


def _restore(run: Run, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Position | None:
    progress = storage.checked(Progress, facts["progress"])
    saved = [storage.checked(SavedInput, entry) for entry in facts["inputs"]]
    _check(progress, saved, run)
    trace, memory = storage.checked(Trace, progress.trace), storage.checked(RowMemory, progress.row_memory)
    layouts = set(facts["transposed"])
    state: dict[int, dict[str, Any]] = {i: dict(entry.numbers) for i, entry in enumerate(saved)}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "input":
            index, _, attribute = rest.partition(".")
            state[int(index)][attribute] = tensor.mT if name in layouts else tensor
    convergence = LayerConvergence(run.sites, run.config)
    convergence.load_state_(_unpacked(facts["following"], tensors))
    if not set(convergence.latest) <= {stream for entry in saved for stream in entry.streams}:
        raise ValueError(f"expected evidence of the layers that have inputs, got some of {sorted(convergence.latest)}")
    entries = []
    for i, entry in enumerate(saved):
        statistic = run.maker.empty(entry.streams[0], entry.kind, entry.columns)
        statistic.load_state_(state[i])
        pending = entry.pending_batches
        restored = DistinctInput(statistic, entry.reason, entry.streams, is_new=False, pending_batches=pending)
        restored.calls_made = dict.fromkeys(entry.streams, 0)
        entries.append(restored)
    positions = []
    for rank, loader_state in enumerate(facts["loaders"]):
        digests = tensors[f"digests.{rank}"]
        if digests.dtype != torch.uint8 or digests.ndim != 2 or digests.shape[1] != DIGEST_BYTES:
            raise ValueError(f"expected digests of {DIGEST_BYTES} bytes, got shape {tuple(digests.shape)}")
        if len(digests) > progress.num_batches:
            raise ValueError(f"expected a digest for each of {progress.num_batches} batches, got {len(digests)}")
        positions.append(Position([bytes(row) for row in digests.tolist()], _unpacked(loader_state, tensors)))

    # Everything fits: nothing of the run was touched before this line.
    run.capture.inputs = entries
    for recovered in entries:
        for stream in recovered.streams:
            run.capture.input_of[stream] = recovered
    run.capture.wanted, run.capture.end.spares = set(progress.wanted), progress.spares
    run.convergence = convergence
    run.num_batches, run.num_rows, run.history = progress.num_batches, progress.num_rows, progress.history
    run.seconds, run.started = progress.seconds, time.perf_counter() - progress.seconds["total"]
    run.trace, run.capture.seconds = trace, progress.seconds["statistics"]
    run.stop_reason, run.maker.gram_bytes = progress.stop_reason, progress.gram_bytes
    run.row_rules.rules = {name: set(rules) for name, rules in progress.rules.items()}
    run.row_rules.memory, run.row_rules.skipped = memory, progress.skipped_rows
    run.statistics.share_out()
    return positions[run.statistics.rank] if len(positions) == run.statistics.size else None


def _check(progress: Progress, saved: list[SavedInput], run: Run) -> None:
    """Raise ValueError where a checkpoint's numbers are out of range or do not fit the run's layers."""
    sites, site_of = range(len(run.sites)), run.capture.site_of
    used = [stream for entry in saved for stream in entry.streams]
    if len(set(used)) < len(used) or not set(used) <= set(range(len(site_of))) or not all(e.streams for e in saved):
        raise ValueError("expected every layer in one input at most")
    for entry in saved:
        widths = {run.sites[site_of[stream]].in_features for stream in entry.streams}
        if len(widths) > 1 or entry.columns not in run.maker.columns or entry.columns > min(widths):
            raise ValueError(f"an input of widths {sorted(widths)} cannot have {entry.columns} columns")
    counts = [progress.num_batches, progress.num_rows, progress.gram_bytes, *progress.skipped_rows.values()]
    if min(counts) < 0 or any(entry.pending_batches < 0 for entry in saved):
        raise ValueError("expected counts of at least 0")
    if set(progress.seconds) != set(run.seconds) or not all(map(math.isfinite, progress.seconds.values())):
        raise ValueError(f"expected seconds of {sorted(run.seconds)}")
    if not set(progress.wanted) <= set(sites):
        raise ValueError(f"expected wanted layers of {len(sites)} layers")
    if len(progress.history) != progress.num_batches:
        raise ValueError(f"expected a history of {progress.num_batches} batches")


def identity(model: nn.Module, run: Run, device: torch.device, **callables: Any) -> dict[str, Any]:
    """What a run's result depends on besides the loader, as plain values with names that say what differs."""
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    known = {
        "version": {name: version for name, version in versions().items() if name != "python"},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compiled module": cpu_form() or "none" if use_core("auto") is not None else "not there",
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else "off",
        **{name: "given" if function is not None else "not given" for name, function in callables.items()},
        "config": run.config.to_dict(),
        "sites": {site.name: f"rank {site.rank}, width {site.in_features}" for site in run.sites},
        "weights": {name: _describe(tensor) for name, tensor in _base_tensors(model)},
    }
    return json.loads(json.dumps(known))  # as it comes back from a file


def _base_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights and buffers that the frozen forward reads: all but the adapters', which are switched off."""
    return [(name, value) for name, value in (*model.named_parameters(), *model.named_buffers()) if not is_lora(name)]


def _describe(tensor: Tensor) -> str:
    described = f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
    if tensor.device.type == "meta" or tensor.numel() == 0 or hasattr(tensor, "device_mesh"):
        return described  # of a DTensor there is only a shard here, which differs with the number of ranks
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)][:SAMPLED_ELEMENTS]
    return f"{described} #{hashlib.blake2b(storage.raw_bytes(sample), digest_size=6).hexdigest()}"


def _differences(there: Any, here: Any, name: str = "") -> Any:
    """Every place where two nested dicts of plain values differ, said in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*here, *there]):
            yield from _differences(there.get(key, "absent"), here.get(key, "absent"), f"{name}.{key}".lstrip("."))
    elif there != here or type(there) is not type(here):
        yield f"{name or 'identity'} was {there}, is {here}"


def _packed(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A nested value as JSON: tensors and arrays go to ``tensors``, the containers JSON has not are marked."""
    if isinstance(value, (np.ndarray, Tensor)):
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        return {"array" if isinstance(value, np.ndarray) else "tensor": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {
            "dict": [
                [_packed(key, tensors, f"{name}.key"), _packed(entry, tensors, f"{name}.{i}")]
                for i, (key, entry) in enumerate(value.items())
            ]
        }
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_packed(entry, tensors, f"{name}.{i}") for i, entry in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"loader: its state_dict() holds a {type(value).__name__}, which cannot be saved without code that runs when "
        "it is loaded; expected tensors, arrays, numbers, text and containers of them"
    )


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of :func:`_packed`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(entry, tensors) for key, entry in content}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(_unpacked(entry, tensors) for entry in content)
    raise ValueError(f"unknown kind of value {kind!r}")
