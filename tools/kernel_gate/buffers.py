"""Shared memory that a product may still be reading when a later pass of its loop writes there.

On sm_90 and sm_100 a product runs by itself: the loop goes on, copies rows for later passes, and waits for the
product some time later. Its operands therefore need a buffer for every copy that runs ahead and one for every product
that is still under way. Triton gives too few to a load that other arithmetic reads too.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

PASSES = 8  # of a loop that are followed: its copies, products and waits are the same in each
_NAME = r"%[\w$.-]+"


@dataclass(frozen=True)
class Event:
    """One operation: a copy into buffers, a product that reads some, or a wait for products.

    Attributes:
        kind: ``copy``, ``product``, ``wait`` (until ``pending`` products are left) or ``arrival`` (of the oldest).
        buffers: names of the allocations that are written or read.
        pending: products that a wait leaves under way.
    """

    kind: str
    buffers: tuple[str, ...] = ()
    pending: int = 0


def short_buffers(ttgir: str, expected: bool) -> list[str]:
    """Operands in loops that a copy overwrites while a product reads them: one line each.

    Args:
        ttgir: a kernel in Triton's dialect for GPUs, as text.
        expected: the machine code has a loop with products that run by themselves, so that one must be found here.
    """
    count, events, loops = read(ttgir)
    found = ["copies by tensor maps, whose waits are not told from those for products"] if "async_tma" in ttgir else []
    loops = [(start, stop) for start, stop in loops if any(e.kind == "product" for e in events[start:stop])]
    if expected and not loops:
        found.append("products in a loop whose buffers were not found")
    for start, stop in loops:
        found += follow(count, events[:start] + events[start:stop] * PASSES)
    return found


def follow(count: dict[str, int], events: list[Event]) -> list[str]:
    """What goes wrong where buffers are used in turn, ``count`` of each name."""
    copies: Counter[str] = Counter()
    reads: Counter[str] = Counter()
    reader: dict[str, dict[int, int]] = defaultdict(dict)  # the last product that reads a buffer
    operands = {name for event in events if event.kind == "product" for name in event.buffers}
    issued = ended = 0
    found: dict[str, str] = {}
    for event in events:
        if event.kind == "wait":
            ended = max(ended, issued - event.pending)
        elif event.kind == "arrival":
            ended = min(ended + 1, issued)
        for name in operands.intersection(event.buffers):
            if name not in count:
                found[name] = f"operand {name} of a product in a loop not traced to its buffers"
            elif event.kind == "product":
                if reads[name] == copies[name]:
                    found[name] = f"operand {name} of a product in a loop read before a copy to it was found"
                reader[name][reads[name] % count[name]] = issued + 1
                reads[name] += 1
            else:
                ahead, last_reader = copies[name] + 1 - reads[name], reader[name].get(copies[name] % count[name], 0)
                if ahead > count[name] or last_reader > ended:
                    found[name] = (
                        f"{count[name]} buffers of an operand for {ahead} copies ahead "
                        f"and {issued - ended} products under way"
                    )
                copies[name] += 1
        issued += event.kind == "product"
    return list(found.values())


def read(ttgir: str) -> tuple[dict[str, int], list[Event], list[tuple[int, int]]]:
    """Buffers by name, the kernel's events in order, and where in them each loop starts and stops."""
    count: dict[str, int] = {}
    whole: dict[str, str] = {}  # the allocation that a view is of
    events: list[Event] = []
    loops: list[tuple[int, int]] = []
    open_loops: list[tuple[str, int]] = []
    for line in ttgir.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if "scf.for" in line:
            open_loops.append((indent, len(events)))
        elif open_loops and line.startswith(open_loops[-1][0] + "}"):
            loops.append((open_loops.pop()[1], len(events)))
        match = re.match(rf"\s*(?:({_NAME})(?::\d+)? = )?\"?[a-z_]+\.(\w+)\"?(.*)", line)
        if not match:
            continue
        result, operation, rest = match.groups()
        operands = [whole.get(name, name) for name in re.findall(_NAME, rest)]
        if operation in ("local_alloc", "tmem_alloc"):
            sizes = re.search(r"-> !?\w+\.memdesc<((?:\d+x)+)", rest)
            shape = sizes[1].split("x")[:-1] if sizes else []
            count[result] = int(shape[0]) if len(shape) == 3 else 1  # of matrices
            if operands:
                events.append(Event("copy", (result,)))
        elif operation.startswith("memdesc_"):
            whole[result] = operands[0]
        elif operation in ("async_copy_global_to_local", "local_store", "tmem_store"):
            events.append(Event("copy", (operands[1],)))
        elif operation in ("warp_group_dot", "tc_gen5_mma"):
            kinds = re.findall(r"!?\w+\.memdesc<|tensor<", rest)
            read_here = [name for name, kind in zip(operands[:2], kinds, strict=False) if "memdesc" in kind]
            events.append(Event("product", tuple(dict.fromkeys(read_here))))
            if not re.search("isAsync = true|is_async", rest):
                events.append(Event("wait"))
        elif operation == "warp_group_dot_wait":
            pending = re.search(r"pendings = (\d+)", rest)
            events.append(Event("wait", pending=int(pending[1]) if pending else 0))
        elif operation == "wait_barrier":
            events.append(Event("arrival"))
    return count, events, loops
