"""Time spent in a method, measured from outside."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def time_calls(owner: type, name: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[list[float]]:
    """Within it, every call of ``owner.name`` adds its seconds to the list's only entry."""
    spent, function = [0.0], getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        start = clock()
        try:
            return function(*arguments, **options)
        finally:
            spent[0] += clock() - start

    setattr(owner, name, call)
    try:
        yield spent
    finally:
        setattr(owner, name, function)
