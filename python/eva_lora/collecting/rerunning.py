"""What a forward may change, noted before it, so that it can be run again as if for the first time."""

import random
import re
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters import noted_generators

__all__ = ["CONTENT_BYTES", "ForwardState"]

CONTENT_BYTES = 2**24  # of the largest tensor whose content is noted
MAX_HELD = 10**6  # what holds more than that, a data set perhaps, is not gone through
#: What never changes.
_CONSTANT = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, type(...), type(NotImplemented), Enum,
    types.BuiltinFunctionType, types.ModuleType, re.Pattern, np.generic, np.dtype, torch.dtype, torch.device,
    torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
#: Whose objects run a model and are ready for its next forward. What they know of other processes may not be put back.
_MACHINERY = frozenset({"torch", "deepspeed", "accelerate", "lightning", "lightning_fabric", "pytorch_lightning"})
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Thread)
_STATELESS = ("torch.nn.modules.", "peft.tuners.lora.")
_OWN = frozenset(vars(nn.Module()))
_POINTER = object.__basicsize__ // 2
_ABSENT = object()
_edit_of = attrgetter("_version")


class ForwardState:
    """What a forward may change of a model, of its batch and of the process, but for global variables.

    That is: modules' attributes and buffers; all that these, and objects in a batch, hold: containers, objects of
    Python's classes, what functions close over, arrays; random generators, the global ones too. Of tensors it is noted
    which edit there is, and their content only where that is asked for.

    Args:
        modules: The model's.
        parameters: What no forward may edit.
        devices: Whose random generators forwards may draw from.
    """

    def __init__(
        self, modules: Iterable[nn.Module], parameters: Iterable[Tensor] = (), devices: Iterable[torch.device] = ()
    ) -> None:
        self._modules, self._devices = list(modules), set(devices)
        self._roots: list[Any] = [module for module in self._modules if not _is_stateless(module)]
        self._roots += [module._buffers for module in self._modules if module._buffers]
        self._parameters = [x for x in parameters if not x.is_inference()]
        self._model: _Held | None = None
        self._batch = _Held((), ())
        self._edits: list[int] = []
        self._put_back_generators: Callable[[], None] = lambda: None

    def note(self, batch: Iterable[Any] = (), *, contents: bool = False) -> str:
        """Note how everything is. Returns what is held that nobody can look into, "" where nothing is.

        Args:
            batch: What the batch holds.
            contents: Note what is in tensors, too, but for parameters and those above 16 MiB.
        """
        if self._model is None or not self._model.is_as_noted():
            self._model = None  # what the model has let go of is let go of here first
            self._model = _Held(self._roots, self._modules)
        self._batch = _Held(batch, self._modules)
        for held in (self._model, self._batch):
            held.note_values(contents=contents)
        self._edits = [*map(_edit_of, self._parameters)]
        self._put_back_generators = noted_generators(self._devices)
        return self._model.unknown or self._batch.unknown

    def restore(self) -> bool:
        """Make it all what it was when noted. Returns whether that was possible: False where tensors were edited."""
        assert self._model is not None
        self._put_back_generators()
        unedited = self._edits == [*map(_edit_of, self._parameters)]
        return all([self._model.restore(), self._batch.restore(), unedited])


class _Held:
    """All that some things hold, however deep: where it is held, and, of what has values, these.

    Args:
        roots: The things.
        known: Modules that are not to be gone through.

    Attributes:
        unknown: The kind of something that nobody can look into; "" where there is none.
    """

    def __init__(self, roots: Iterable[Any], known: Iterable[nn.Module]) -> None:
        self.unknown = ""
        self._namespaces: list[tuple[dict[str, Any], dict[str, Any]]] = []  # attributes, and a copy
        self._containers: list[tuple[Any, Any]] = []  # filled ones, and a copy
        self._empty: list[Any] = []
        self._places: list[tuple[Any, str, Any]] = []  # an object, the name of a slot, what is in it
        self._values: list[tuple[Callable[[], Any], Callable[[Any], object]]] = []  # what returns some, what sets them
        self._noted: list[Any] = []
        self._tensors: list[Tensor] = []
        self._edits: list[int] = []
        self._contents: list[Tensor | None] = []
        todo = [*roots]
        seen = set(map(id, known)) - set(map(id, todo))
        while todo:
            value = todo.pop()
            if isinstance(value, _CONSTANT) or id(value) in seen:
                continue
            seen.add(id(value))
            todo += self._note(value)
            if len(todo) + len(seen) > MAX_HELD:
                self.unknown = f"more than {MAX_HELD} things"
                break
        self._filled = [one for one, _ in (*self._namespaces, *self._containers)]
        self._lengths, self._held = [*map(len, self._filled)], [*_all_held(self._filled)]

    def is_as_noted(self) -> bool:
        """Whether the same is held in the same places: asked before every forward, and most often answered with yes."""
        return (
            not any(self._empty)
            and [*map(len, self._filled)] == self._lengths
            and all(map(is_, _all_held(self._filled), self._held))
            and all(_at(holder, name) is value for holder, name, value in self._places)
        )

    def note_values(self, *, contents: bool) -> None:
        """Note the values of what has some."""
        self._noted = [read() for read, _ in self._values]
        self._edits = [*map(_edit_of, self._tensors)]
        self._contents = [x.clone() if contents and x.nbytes <= CONTENT_BYTES else None for x in self._tensors]

    def restore(self) -> bool:
        """Make it all what it was. Returns whether that was possible: False where tensors were edited."""
        for names, copy in self._namespaces:
            names.update(copy)  # never empty, should an interrupt come
            for name in names.keys() - copy.keys():
                del names[name]
        for container, copy in self._containers:
            _fill(container, copy)
        for container in self._empty:
            if container:
                _fill(container, ())
        for holder, name, value in self._places:
            if value is not _ABSENT:
                setattr(holder, name, value)
            elif _at(holder, name) is not _ABSENT:
                delattr(holder, name)
        for (_, write), value in zip(self._values, self._noted, strict=True):
            write(value)
        unedited = True
        for x, edit, content in zip(self._tensors, self._edits, self._contents, strict=True):
            if x._version != edit and content is not None:
                x.copy_(content)
            unedited = unedited and (x._version == edit or content is not None)
        return unedited

    def _note(self, value: Any) -> Iterable[Any]:
        """Note one thing; returns what is in it."""
        kind = type(value)
        if isinstance(value, (list, dict, set, deque)):
            return self._note_container(value)
        if isinstance(value, (tuple, frozenset, types.MappingProxyType)):
            return [*value, *(value.values() if isinstance(value, types.MappingProxyType) else ())]
        if isinstance(value, nn.Module):
            names = vars(value)
            self._namespaces.append((names, names.copy()))
            inside = [inner for name, inner in names.items() if name not in _OWN]
            return [*inside, value._buffers, *value._modules.values()]
        if isinstance(value, Tensor):
            if not value.is_inference():  # which PyTorch lets nobody edit outside of inference mode
                self._tensors.append(value)
            return ()
        if isinstance(value, types.FunctionType):
            return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, vars(value)]
        if isinstance(value, types.CellType):
            return self._note_places(value, ["cell_contents"])
        if isinstance(value, types.MethodType):
            return value.__self__, value.__func__
        if isinstance(value, partial):
            return value.func, value.args, value.keywords
        if isinstance(value, weakref.ref):
            return [value()]
        if (values := _values_of(value)) is not None:
            self._values.append(values)
        elif kind.__module__.partition(".")[0] not in _MACHINERY:
            return self._note_object(value)
        return ()

    def _note_container(self, value: Any) -> Iterable[Any]:
        if value:
            self._containers.append((value, dict.copy(value) if isinstance(value, dict) else [*value]))
        else:
            self._empty.append(value)
        inside = [*value, *dict.values(value)] if isinstance(value, dict) else [*value]
        return [*inside, vars(value)] if hasattr(value, "__dict__") else inside

    def _note_object(self, value: Any) -> Iterable[Any]:
        kind, names = type(value), getattr(value, "__dict__", {})
        slots = [slot for base in kind.__mro__ for slot in _slots(base)]
        # What is made in C holds more than attributes. What holds a lock is changed by other threads meanwhile.
        has_names = hasattr(value, "__dict__")
        in_c = kind.__itemsize__ or kind.__basicsize__ > object.__basicsize__ + _POINTER * (len(slots) + 2)
        if in_c or not (slots or has_names) or any(isinstance(x, _LOCKS) for x in names.values()):
            self.unknown = f"{kind.__module__}.{kind.__qualname__}"
            return ()
        if has_names:
            self._namespaces.append((names, names.copy()))
        return [*names.values(), *self._note_places(value, slots)]

    def _note_places(self, holder: Any, names: Iterable[str]) -> Iterable[Any]:
        places = [(holder, name, _at(holder, name)) for name in names]
        self._places += places
        return [value for _, _, value in places if value is not _ABSENT]


def _at(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name)
    except (AttributeError, ValueError):  # the latter of a cell
        return _ABSENT


def _is_stateless(module: nn.Module) -> bool:
    """Whether it is of a class whose forwards are known to change no attribute: PyTorch's layers, and PEFT's LoRA."""
    return type(module).__module__.startswith(_STATELESS) and "forward" not in vars(module)


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else [*slots]
    # Private names are kept under the class's.
    own = kind.__name__.lstrip("_")
    mangled = [f"_{own}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]
    return [name for name in mangled if name not in ("__dict__", "__weakref__")]


def _all_held(containers: list[Any]) -> Iterator[Any]:
    """All that is in containers, one after the other, the values of dicts and their keys."""
    tables = [dict.values(one) for one in containers if isinstance(one, dict)]
    return chain(chain.from_iterable(containers), chain.from_iterable(tables))


def _fill(one: Any, content: Any) -> None:
    """Make a container hold just that, past what its own class does then."""
    if isinstance(one, list):
        list.__setitem__(one, slice(None), list(content))
    elif isinstance(one, dict):
        kind: Any = OrderedDict if isinstance(one, OrderedDict) else dict
        kind.clear(one)
        for name, value in dict(content).items():
            kind.__setitem__(one, name, value)
    else:
        kind = set if isinstance(one, set) else deque
        kind.clear(one)
        (kind.update if kind is set else kind.extend)(one, content)


def _values_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """What returns the values that something keeps, and what sets them; None of what keeps none."""
    if isinstance(value, np.ndarray):
        return value.copy, partial(np.copyto, value)
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, (np.random.Generator, np.random.BitGenerator)):
        bits: Any = getattr(value, "bit_generator", value)
        return lambda: bits.state, partial(setattr, bits, "state")
    return None
