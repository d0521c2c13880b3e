"""How a ``LoraConfig`` names layers, so that PEFT finds exactly these again: it matches names at their ends."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from .outline import plain_modules
from .preflight import is_lora

__all__ = ["PatternsAmong", "base_names", "is_targeted", "planned_targets", "retarget"]

_PLAIN = re.compile(r"[\w.-]*")  # what a regular expression takes as it is, but for the dots, which match anything


def base_names(root: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a base model's modules and parameters, as they are without adapters and wrappers."""
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    for path, module in plain_modules(root):
        name = path.replace(".base_layer", "")
        if name and not is_lora(name):
            modules[name] = None
            parameters |= dict.fromkeys(f"{name}.{parameter}" for parameter in module._parameters)
    return list(modules), list(parameters)


class PatternsAmong:
    """Layers' names as keys of ``rank_pattern``, which PEFT matches as regular expressions at names' ends.

    Args:
        everything: All names that a key must not match but its own.
    """

    def __init__(self, everything: Iterable[str]) -> None:
        self._whole: dict[int, set[str]] = {}  # by their lengths: a key matches as many characters as it has
        self._ends: dict[int, set[str]] = {}  # of longer names, after a dot
        for name in everything:
            self._whole.setdefault(len(name), set()).add(name)
            dot = name.find(".")
            while dot >= 0:
                self._ends.setdefault(len(name) - dot - 1, set()).add(name[dot + 1 :])
                dot = name.find(".", dot + 1)

    def of(self, name: str) -> str:
        """The key: the name itself where it matches no other."""
        whole, ends = (known.get(len(name), set()) for known in (self._whole, self._ends))
        if _PLAIN.fullmatch(name) and not any(re.fullmatch(name, other) for other in (*(whole - {name}), *ends)):
            return name
        return f"^{re.escape(name)}"


def is_targeted(parameter: str, targets: Collection[str]) -> bool:
    """Whether ``target_parameters`` names a parameter, as PEFT takes it."""
    return parameter in targets or any(parameter.endswith(f".{target}") for target in targets)


def retarget(
    config: Any, names_of_base: tuple[list[str], list[str]], modules: Sequence[str], parameters: Sequence[str]
) -> None:
    """Have a ``LoraConfig`` target exactly these modules and parameters of a base model, and no other name that it has.

    What targets them already stays as it is.

    Args:
        names_of_base: As :func:`base_names` says.

    Raises:
        ValueError: it cannot be said in PEFT's terms.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    all_modules, all_parameters = names_of_base
    names, wanted = dict.fromkeys([*all_modules, *modules]), set(modules)

    def fits() -> bool:
        return {name for name in names if check_target_module_exists(config, name)} == wanted

    if not fits():
        config.layers_to_transform = config.layers_pattern = None  # target_modules names every layer from here on
        config.target_modules = set(modules)
        if not fits():
            config.target_modules = "|".join(map(re.escape, modules))  # a text is matched whole
        if not fits():
            raise ValueError(
                "model: exclude_modules or modules_to_save of its LoraConfig name layers that have the adapter; the "
                "saved adapter would not load"
            )
    if config.target_parameters or parameters:
        config.target_parameters = planned_targets(config.target_parameters or [], parameters, all_parameters)


def planned_targets(targets: Collection[str], kept: Sequence[str], everything: Iterable[str]) -> Collection[str]:
    """``target_parameters`` that name those kept and no other: the same as before, or their full names.

    Raises:
        ValueError: others end in the name of one that is kept, and PEFT has no way to leave them out.
    """
    names, wanted = dict.fromkeys([*everything, *kept]), set(kept)
    for candidate in (targets, sorted(kept)):
        found = {name for name in names if is_targeted(name, candidate)}
        if found == wanted:
            return candidate
    raise ValueError(
        f"target_parameters: PEFT cannot leave out {sorted(found - wanted)}, which end in the name of one that has an "
        "adapter; give them a rank (min_rank=1)"
    )
