"""Whether a run is slower than an earlier one, by ratios taken within each run and never by times.

In every round a case is timed beside a measure: the model's own forward on the same rows, or a fixed product. What is
compared between runs is our time over the measure's. A change counts beyond three standard errors of both medians
together, and beyond `FLOOR`: rounds of one run share their process, its memory layout and the weather of the machine,
and so know nothing of how these differ between runs.
"""

import math
from dataclasses import dataclass

from .results import Record, Results

FLOOR = 0.15  # relative: below the fifth that must not pass unseen
ERRORS = 3.0


@dataclass(frozen=True)
class Change:
    """One case in two runs.

    Attributes:
        factor: Its cost now over its cost then; above 1 is slower.
        noise: A factor that up to this, or down to its inverse, means nothing.
    """

    record: Record
    factor: float
    noise: float

    @property
    def verdict(self) -> str:
        if self.factor > self.noise:
            return "slower"
        return "faster" if self.factor < 1 / self.noise else "same"


def changes(now: Results, before: Results) -> list[Change]:
    """Of every case that both have, on devices and with threads that both share; the worst first.

    Nothing where one run was quick and the other was not.
    """
    if now.quick != before.quick:
        return []
    comparable = {
        device
        for device, info in now.machine.items()
        if device in before.machine
        and all(before.machine[device][name] == info[name] for name in ("device", "threads"))
    }
    earlier = {record.key: record for record in before.records}
    found = [
        change(record, earlier[record.key])
        for record in now.records
        if record.device in comparable and record.key in earlier
    ]
    return sorted(found, key=lambda entry: -entry.factor)


def change(now: Record, before: Record) -> Change:
    (cost, error), (cost_before, error_before) = now.cost, before.cost
    noise = max(math.log1p(FLOOR), ERRORS * math.hypot(error, error_before))
    return Change(now, cost / cost_before, math.exp(noise))
