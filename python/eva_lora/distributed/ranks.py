"""The ranks of a process group: what they agree on between two steps, and how one's failure reaches all."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar, Union
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ProcessGroup", "Ranks", "joined", "together"]

T = TypeVar("T")

#: A group of torch.distributed; "off": none; None: the default group, where there is one of more than one rank.
ProcessGroup = Union["dist.ProcessGroup", Literal["off"], None]

#: Group -> the group of its control messages. Made once: a second one of a name would find the addresses of the first.
_CONTROL: "WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = WeakKeyDictionary()
_PASSED_ON = (ValueError, TypeError, RuntimeError, OSError)  # kinds of error that another rank raises as they are


class Ranks:
    """The ranks that make one pass together.

    Control messages are a few numbers on the CPU, in a group of their own beside the one that is given, so that they
    meet in order whatever the model's own collectives do. An error is held back where it happens
    (:meth:`attempt`) until the next message, with which every rank learns of it and ends.

    Args:
        group: The process group. Tensors are reduced in it: on the GPU where it has a backend for that.

    Attributes:
        rank: Of this process, in the group.
        size: How many there are.
        device: Where tensors have to be to be reduced.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))  # device -> backend
        on_gpu = (
            backends.get("cuda", "gloo") != "gloo" and torch.cuda.is_available()
        )  # gloo lacks some collectives there
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._error: tuple[float, BaseException] | None = None
        # Longer than the group's: a rank that fails has to wait until the others give up what they wait for in it.
        self._patience = 2 * _timeout_of(group)
        if group not in _CONTROL:
            members = dist.get_process_group_ranks(group)
            _CONTROL[group] = dist.new_group(
                members, timeout=self._patience, backend="gloo", use_local_synchronization=True
            )
        self._control = _CONTROL[group]

    def rank_of(self, global_rank: int) -> int:
        """The rank in this group of a rank of the default group."""
        members = dist.get_process_group_ranks(self.group)
        if global_rank not in members:
            raise ValueError(
                f"process_group: the model's layers are split over ranks of which {global_rank} is not in it; expected "
                "the group of all ranks that make the pass, those of tensor parallelism included"
            )
        return members.index(global_rank)

    def attempt(self, function: Callable[..., T], *arguments: Any, default: Any = None) -> T:
        """What the function returns. Where it raises, and after that until the next message, ``default``."""
        if self._error is None:
            try:
                return function(*arguments)
            except BaseException as error:
                self._error = time.time(), error
        return default

    def agree(self, numbers: Sequence[int] = ()) -> list[int]:
        """The sums over all ranks of what each of them says; the one message that every batch costs.

        Raises:
            Exception: what a rank failed with since the last message: see :meth:`_raise`.
        """
        message = torch.tensor([self._error is not None, *numbers], dtype=torch.int64, device="cpu")
        with self._reaching_all():
            dist.all_reduce(message, group=self._control)
        failed, *sums = message.tolist()
        if failed:
            self._raise()
        return sums

    def gather(self, number: int) -> list[int]:
        """Every rank's number. Raises as :meth:`agree`."""
        everyone = [0] * self.size
        everyone[self.rank] = number
        return self.agree(everyone)

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, of any kind that can be pickled. Raises as :meth:`agree`."""
        self.agree()
        return self._everyone(value)

    def broadcast(self, value: T, source: int) -> T:
        """The value of one rank."""
        holder = [value]
        with self._reaching_all():
            dist.broadcast_object_list(holder, src=dist.get_global_rank(self._control, source), group=self._control)
        return holder[0]

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over all ranks, in place: one collective for each of their dtypes."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().to(self.device).reshape(-1) for tensor in chosen])
            with self._reaching_all():
                dist.all_reduce(flat, group=self.group)
            for tensor, sums in zip(chosen, torch.split(flat, [tensor.numel() for tensor in chosen]), strict=True):
                tensor.copy_(sums.view(tensor.shape))

    def reduce(self, tensor: Tensor, destination: int) -> Tensor:
        """The sum over all ranks; only what ``destination`` gets has a meaning."""
        own = tensor.to(self.device, copy=True).contiguous()
        with self._reaching_all():
            dist.reduce(own, dst=dist.get_global_rank(self.group, destination), group=self.group)
        return own

    def sum_up(self, pieces: Sequence[Tensor]) -> Tensor:  # one (n,) for each rank -> (n,)
        """The sum over all ranks of their pieces for this one: a reduce-scatter of pieces of different lengths.

        The pieces are exchanged and added up in the ranks' order, so that the sum has the same bits every time. Gloo's
        own reduce-scatter sends twice as much.
        """
        sent, own = torch.cat(list(pieces)), len(pieces[self.rank])
        received = sent.new_empty(self.size * own)
        lengths = [len(piece) for piece in pieces]
        with self._reaching_all():
            dist.all_to_all_single(received, sent, [own] * self.size, lengths, group=self.group)
        return received.view(self.size, own).sum(0)

    def all_gather(self, row: Tensor) -> Tensor:  # (n,) -> (ranks, n)
        """Every rank's row."""
        result = row.new_empty(self.size * len(row))
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._reaching_all():
            gather(result, row, group=self.group)
        return result.view(self.size, len(row))

    def _everyone(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._reaching_all():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def _raise(self) -> NoReturn:
        """End on all ranks: with one's own error where it was the first, with an error that names that rank elsewhere.

        The other ranks raise ValueError, TypeError, RuntimeError and OSError as they are, anything else as a
        RuntimeError that names its type.
        """
        own, self._error = self._error, None
        said = None if own is None else (own[0], type(own[1]).__name__, str(own[1]))
        everyone = self._everyone(said)
        _, rank = min((entry[0], rank) for rank, entry in enumerate(everyone) if entry is not None)
        if rank == self.rank and own is not None:
            raise own[1]
        _, name, message = everyone[rank] or (0.0, "", "")
        kind = next((kind for kind in _PASSED_ON if kind.__name__ == name), None)
        if kind is None:
            kind, message = RuntimeError, f"{name}: {message}"
        raise kind(f"rank {rank} failed: {message}") from (own[1] if own is not None else None)

    @contextmanager
    def _reaching_all(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank}: another rank of the process group is gone, or did not answer within "
                f"{self._patience}: {error}"
            ) from (self._error[1] if self._error else error)


def joined(process_group: ProcessGroup) -> Ranks | None:
    """The ranks of a group, None where this process works for itself.

    Raises:
        TypeError: ``process_group`` is none of the things it can be, or a group without this process.
        RuntimeError: not all of its ranks have come here within its timeout.
    """
    if process_group == "off":
        return None
    available = dist.is_available() and dist.is_initialized()
    if process_group is None:
        process_group = dist.group.WORLD if available else None
        return Ranks(process_group) if process_group is not None and process_group.size() > 1 else None
    if not available or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a group of torch.distributed that this process is in, 'off' or None, got "
            f"{process_group!r}"
        )
    return Ranks(process_group) if process_group.size() > 1 else None


def together(ranks: Ranks | None, function: Callable[[], T]) -> T:
    """What the function returns; where it raises on one rank, all of them do."""
    if ranks is None:
        return function()
    result = ranks.attempt(function)
    ranks.agree()
    return result


def _timeout_of(group: "dist.ProcessGroup") -> timedelta:
    """How long the group's own collectives wait; PyTorch's default where the backend does not say."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):  # no backend for this device, or one without options
            continue
    return dist.default_pg_timeout
