"""Whether a run is slower than an earlier one, by ratios taken within each run and never by times.

In every round a case is timed beside a measure: the model's own forward on the same rows, or a fixed product. What is
compared between runs is our time over the measure's. A change counts where the rounds of the two runs lie apart, from
their 10th to their 90th percentiles, and the medians differ by more than `FLOOR`.

Standard errors of the medians would see smaller changes, and many that are none: rounds of one run share its process
and what else the machine did meanwhile. Two runs of one commit, on a machine with six times as much to do as it has
cores, differed beyond three standard errors in 7 of 21 cases, and lay apart in 1.
"""

from dataclasses import dataclass

from .results import Record, Results

FLOOR = 0.15  # relative: below the fifth that must not pass unseen
FLOOR_OF_FEW = 0.3  # of cases with so few rounds that their spread is hardly known
FEW = 5


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
    """Of every case that both have, on devices, with threads and in the form that both share; the worst first.

    Nothing where a run was quick: its few rounds say nothing.
    """
    if now.quick or before.quick:
        return []
    comparable = {
        device
        for device, info in now.machine.items()
        if device in before.machine
        and all(before.machine[device].get(name) == info.get(name) for name in ("device", "threads", "cpu_form"))
    }
    earlier = {record.key: record for record in before.records}
    found = [
        change(record, earlier[record.key])
        for record in now.records
        if record.device in comparable and record.key in earlier
    ]
    return sorted(found, key=lambda entry: -entry.factor)


def change(now: Record, before: Record) -> Change:
    one, other = now.measure, before.measure  # the measure's time over ours: what falls is slower
    factor = other["median"] / one["median"]
    if factor > 1:
        apart = other["median"] / other["p10"] * one["p90"] / one["median"]
    else:
        apart = other["p90"] / other["median"] * one["median"] / one["p10"]
    few = min(one["rounds"], other["rounds"]) < FEW
    return Change(now, factor, max(1 + (FLOOR_OF_FEW if few else FLOOR), apart))
