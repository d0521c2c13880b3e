"""Options that several commands share; those of ``EvaConfig`` are made from its fields."""

import inspect
import json
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from ..config import EvaConfig
from .running import Decorator

#: Fields a plan can change without another pass over the data.
PLANNING_FIELDS = (
    "rho",
    "min_rank",
    "max_rank",
    "rank_multiple",
    "budget_parameters",
    "whiten",
    "match_gain",
    "adjust_scaling_factors",
)


#: What ``--quantize`` may say, and what bitsandbytes is told then.
QUANTIZERS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


#: Methods that start from gradients of the model's loss.
FROM_GRADIENTS = ("lora-ga", "lora-ga-a2r", "lora-one", "gora")
#: What ``--method`` may say, and whether it looks at data: the table's names, known without PyTorch.
METHODS = {
    "eva": True, "pissa": False, "milora": False, "mica": False, "corda": True, "corda-kpm": True, "astra": True,
    "sc-lora": True, "lora-null": True, **dict.fromkeys(FROM_GRADIENTS, True),
}  # fmt: skip

#: Those whose directions have scores that ranks can be given by.
SCORED = ("eva", "pissa", "corda")


def config_options(only: Iterable[str] | None = None) -> Decorator:
    """One option for every field of ``EvaConfig`` (or those named); what is not given is left out."""
    names = None if only is None else set(only)
    hints, help_texts = get_type_hints(EvaConfig), _field_help(EvaConfig)

    def decorate(function: Any) -> Any:
        for field in reversed(fields(EvaConfig)):
            if names is None or field.name in names:
                default = None if field.default is MISSING else field.default
                option = _option(field.name, hints[field.name], default, help_texts.get(field.name, ""))
                function = option(function)
        return function

    return decorate


def take_config(params: dict[str, Any], base: EvaConfig | None = None) -> EvaConfig:
    """``base`` (or the defaults) with the options that were given; raises a usage error for a bad value."""
    given = {f.name: params[f.name] for f in fields(EvaConfig) if params.get(f.name) is not None}
    try:
        return EvaConfig(**{**({} if base is None else base.to_dict()), **given})
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"--{str(error).replace('_', '-', str(error).partition(':')[0].count('_'))}") from error


def _option(name: str, hint: Any, default: Any, text: str) -> Decorator:
    flag = f"--{name.replace('_', '-')}"
    shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    help_text = f"{text}  [default: {shown}]".strip()
    options: dict[str, Any] = {"default": None, "help": help_text}
    choices = _choices(hint)
    if hint is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif choices:
        options["type"] = _Choice(choices)
    else:
        kinds = [kind for kind in _members(hint) if kind is not type(None)]
        options["type"] = kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, str) else _Json()
    return click.option(flag, name, **options)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> dict[str, Any]:
    """What an option of literals (and booleans) may be, as typed → as meant; empty for other types."""
    found: dict[str, Any] = {}
    for member in _members(hint):
        if get_origin(member) is Literal:
            found.update({str(value).lower(): value for value in get_args(member)})
        elif member is bool:
            found.update({"true": True, "false": False})
        elif member is not type(None):
            return {}
    return found


class _Choice(click.Choice):  # type: ignore[type-arg]  # click before 8.2 has no Choice[str]
    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(list(values))
        self._values = values

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._values[super().convert(str(value).lower(), param, ctx)]


class _Json(click.ParamType):  # type: ignore[type-arg]  # nor a ParamType[Any]
    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return json.loads(value)
        except (TypeError, json.JSONDecodeError):
            return value


def _field_help(cls: type) -> dict[str, str]:
    """Each attribute's description, from the class's docstring."""
    text = inspect.getdoc(cls) or ""
    attributes = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", body).replace("``", "") for name, body in entries}


def model_options(function: Any) -> Any:
    for option in reversed(
        [
            click.option(
                "--dtype", default="auto", show_default=True, help="torch dtype of the model; auto: as saved."
            ),
            click.option("--device", default="auto", show_default=True, help="auto: a GPU where there is one."),
            click.option("--trust-remote-code", is_flag=True, help="Let code that comes with the model run."),
        ]
    ):
        function = option(function)
    return function


def _positive(context: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"expected a positive number, got {value}")
    return value


def lora_options(function: Any) -> Any:
    for option in reversed(
        [
            click.option("--rank", type=click.IntRange(1),
                         help="Rank of every layer; their sum is the budget.  [default: 16]"),
            click.option("--alpha", type=float, callback=_positive,
                         help="LoRA alpha.  [default: the rank, a scaling of 1]"),
            click.option("--target-modules", multiple=True, metavar="NAME",
                         help="Layers to adapt, repeatable or separated by commas.  [default: all-linear]"),
            click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="LoRA dropout.  [default: 0]"),
            click.option("--rslora", is_flag=True, help="Scale by alpha / √rank."),
            click.option("--dora", is_flag=True, help="Weight-decomposed LoRA."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def take_pretrained(model: str, params: dict[str, Any]) -> Any:
    """The :class:`Pretrained` that the model and LoRA options describe."""
    from .pretrained import LoraOptions, Pretrained

    targets = tuple(name for value in params["target_modules"] for name in value.split(",") if name)
    if params["target_modules"] and not targets:
        raise click.UsageError("--target-modules: expected names of modules, got none")
    given = {
        "rank": params["rank"],
        "alpha": params["alpha"],
        "target_modules": targets or None,
        "dropout": params["dropout"],
        "use_rslora": params["rslora"] or None,
        "use_dora": params["dora"] or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return Pretrained(
        model, dtype=params["dtype"], device=params["device"], trust_remote_code=params["trust_remote_code"],
        lora=LoraOptions(**given) if given else None, quantize=QUANTIZERS.get(params.get("quantize") or "", {}),
    )  # fmt: skip
