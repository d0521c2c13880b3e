"""A run's results: one JSON file, made of what pytest-benchmark wrote for each suite."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
DIGITS = 4  # significant, of every number: more would be noise


@dataclass(frozen=True)
class Record:
    """One measured case, as `harness.paired` describes it."""

    content: Mapping[str, Any]

    @property
    def group(self) -> str:
        return str(self.content["group"])

    @property
    def case(self) -> str:
        return str(self.content["case"])

    @property
    def device(self) -> str:
        return str(self.content["device"])

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.case, self.device

    @property
    def facts(self) -> Mapping[str, Any]:
        return dict(self.content["facts"])

    @property
    def seconds(self) -> Mapping[str, float]:
        """Summary of the time of one call of ours."""
        return dict(self.content["seconds"]["ours"])

    @property
    def peers(self) -> list[str]:
        return [name for name in self.content["ratio"] if name not in ("forward", "ruler")]

    def ratio(self, name: str) -> Mapping[str, float]:
        """Summary of another's time over ours, taken round by round."""
        return dict(self.content["ratio"][name])

    def error(self, name: str) -> Mapping[str, float]:
        return dict(self.content["errors"].get(name, {}))

    def memory(self, name: str) -> int | None:
        return self.content["memory"].get(name)

    @property
    def of_forward(self) -> float | None:
        """Our time over that of the whole forward that the same rows cost, where there is one."""
        if "forward" not in self.content["ratio"]:
            return None
        return float(self.content["forward_share"] / self.ratio("forward")["median"])

    @property
    def measure(self) -> Mapping[str, float]:
        """Over ours, the time of what stands beside it for comparisons between runs: the forward or the ruler."""
        return self.ratio("forward" if "forward" in self.content["ratio"] else "ruler")


@dataclass(frozen=True)
class Results:
    """A whole run.

    Attributes:
        machine: Per device where figures come from, and its measured rates.
        suites: Per suite its status and the seconds it took.
        records: The cases.
        command: That made them.
        gate: What had to pass first, and did.
        quick: Whether this was a short run, whose figures mean nothing.
    """

    machine: Mapping[str, Mapping[str, Any]]
    suites: Mapping[str, Mapping[str, Any]]
    records: tuple[Record, ...]
    command: str
    gate: str
    quick: bool

    @property
    def cpu_form(self) -> str:
        """Which form of the compiled code for a CPU ran: one kind of processor for each."""
        return str(self.machine.get("cpu", {}).get("cpu_form", "none"))

    def of(self, group: str) -> list[Record]:
        return [record for record in self.records if record.group == group]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(record.group for record in self.records))

    def save(self, path: Path) -> None:
        content = {
            "format": FORMAT,
            "command": self.command,
            "gate": self.gate,
            "quick": self.quick,
            "machine": self.machine,
            "suites": self.suites,
            "records": [record.content for record in self.records],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Raises ValueError for a file of another kind."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path.name}: expected results of format {FORMAT}, as `make bench` writes them")
        records = tuple(Record(entry) for entry in content["records"])
        return cls(
            content["machine"], content["suites"], records, content["command"], content["gate"], content["quick"]
        )


def merged(files: Iterable[Path], suites: Mapping[str, Mapping[str, Any]], command: str, gate: str) -> Results:
    """The suites' own files as one; rates are those of the first suite that measured them."""
    machine: dict[str, Any] = {}
    records: list[Record] = []
    quick = False
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        info = content["machine_info"]
        quick = quick or info["quick"]
        for device in ("cpu", "cuda"):
            if device in info:
                machine.setdefault(device, info[device])
        records += [Record(entry["extra_info"]) for entry in content["benchmarks"] if entry["extra_info"]]
    return Results(machine, suites, tuple(records), command, gate, quick)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
