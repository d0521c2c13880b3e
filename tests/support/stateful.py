"""Where a model may keep what its forwards change: each place is a maker of something to call for the next number."""

import functools
import itertools
import random
import threading
import types
from collections import OrderedDict, deque

import numpy as np
import torch


class Counter:
    def __init__(self):
        self.count = 0

    def step(self):
        self.count += 1
        return self.count

    __call__ = step


class Slotted:
    __slots__ = ("__hidden", "count")

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        self.__hidden = getattr(self, "_Slotted__hidden", 0) + 1
        return self.count + self.__hidden


class Memo(dict):
    """Forbids what ``dict`` allows, as transformers' outputs do."""

    def update(self, *_):
        raise TypeError

    def __call__(self):
        self[len(self)] = None
        return len(self)


class Within:
    """Something that a container holds, however deep."""

    def __init__(self, inner, container):
        self.inner, self.container = inner, container

    def __call__(self):
        return self.inner(self.container)


def lengthened(find, append):
    def count(container):
        append(find(container), 1)
        return len(find(container))

    return count


def closure():
    total = 0

    def count():
        nonlocal total
        total += 1
        return total

    return count


def unfilled_closure():
    def count():
        nonlocal total
        total = total + 1 if begun else 1
        begun.append(1)
        return total

    begun = []
    if begun:
        total = 0
    return count


def default_argument():
    return types.FunctionType((lambda seen: (seen.append(1), len(seen))[1]).__code__, {"len": len}, "f", ([],))


def function_attribute():
    def count():
        count.total = getattr(count, "total", 0) + 1
        return count.total

    return count


def array():
    values = np.zeros(2)

    def count():
        values[1] += 1
        return float(values[1])

    return count


def drawn(generator, draw):
    return lambda: 1 + float(draw(generator))


def bound_anew():
    holder = torch.nn.Module()
    holder.register_buffer("count", torch.zeros(()))

    def count():
        holder.count = holder.count + 1
        return float(holder.count)

    return count


PLACES = {
    "object": Counter,
    "slots": Slotted,
    "bound method": lambda: Counter().step,
    "partial": lambda: functools.partial(Counter().step),
    "list in a dict in a tuple": lambda: Within(lengthened(lambda held: held[0]["a"], list.append), ({"a": []},)),
    "order of a dict": lambda: Within(lambda held: (held.move_to_end(next(iter(held))), 1 + [*held].index("a"))[1],
                                      OrderedDict(a=1, b=2, c=3)),
    "dict of its own kind": Memo,
    "deque": lambda: Within(lengthened(lambda held: held, deque.append), deque([1, 2])),
    "set": lambda: Within(lambda held: (held.add(len(held)), len(held))[1], set()),
    "object in a list": lambda: Within(lambda held: held[0](), [Counter()]),
    "closure": closure,
    "closure that holds nothing yet": unfilled_closure,
    "default argument": default_argument,
    "function's attribute": function_attribute,
    "array": array,
    "buffer of a module in hiding": bound_anew,
    "generator": lambda: drawn(torch.Generator().manual_seed(0), lambda g: torch.rand((), generator=g)),
    "Python's generator": lambda: drawn(random.Random(0), lambda g: g.random()),
    "NumPy's generator": lambda: drawn(np.random.default_rng(0), lambda g: g.random()),
    "NumPy's old generator": lambda: drawn(np.random.RandomState(0), lambda g: g.rand()),
    "the global generator": lambda: drawn(None, lambda _: torch.rand(())),
    "Python's global generator": lambda: drawn(None, lambda _: random.random()),
    "NumPy's global generator": lambda: drawn(None, lambda _: np.random.rand()),  # noqa: NPY002 - as a model would
}  # fmt: skip


def in_place():
    total = torch.zeros(())
    return lambda: float(total.add_(1))


def iterator():
    return functools.partial(next, itertools.count(1))


def lock():
    counter = Counter()
    counter.lock = threading.Lock()
    return counter


#: Of which nobody can say what is in them.
OPAQUE = {"iterator": iterator, "object with a lock": lock}
