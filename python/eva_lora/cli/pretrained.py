"""A pretrained model with the LoRA layers asked for: from a folder or an id, with weights or only their shapes."""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from .running import is_refusal, reason

__all__ = ["LoraOptions", "Pretrained"]

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class LoraOptions:
    """What LoRA layers to add; see PEFT's ``LoraConfig``.

    Attributes:
        rank: Of every layer; their sum is EVA's budget.
        alpha: None: the rank, for a scaling of 1.
        target_modules: Names as PEFT matches them; ("all-linear",) for every linear layer but the head.
        dropout: In [0, 1).
        use_rslora, use_dora: The variants.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class Limits:
    """What a model can be fed.

    Attributes:
        vocabulary: Tokens that it has an embedding for; None: unknown.
        context: Tokens that it has positions for; None: as many as there are, or unknown.
    """

    vocabulary: int | None = None
    context: int | None = None


class Pretrained:
    """A model folder or id, or an adapter folder whose base model and ``LoraConfig`` are taken.

    Args:
        source: The folder or id; ids are looked up as transformers does, in its cache or on the hub.
        dtype: "auto" (as saved), or the name of a torch dtype.
        device: "auto" (a GPU where there is one), or what torch calls it.
        trust_remote_code: Whether code that comes with the model may run.
        lora: None: the defaults, or an adapter folder's own.
        quantize: What bitsandbytes is told of the weights; nothing where they stay as they are.

    Raises:
        ValueError: nothing loads from there (the message says why), LoRA options together with an adapter
            folder, an unknown dtype or device, target modules that there are not.
        ImportError: transformers or peft is not installed.
    """

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        lora: LoraOptions | None = None,
        quantize: Mapping[str, Any] | None = None,
    ) -> None:
        import transformers

        self._quantize = dict(quantize or {})

        self.trust = {"trust_remote_code": trust_remote_code}
        self.device = _device(device)
        self.lora_config: Any = None
        self._targets_named = lora is not None and lora.target_modules != ("all-linear",)
        self.base = _absolute(source)
        try:
            if transformers.utils.peft_utils.find_adapter_config_file(source) is not None:
                self._take_adapter(source, lora)
            self.config = transformers.AutoConfig.from_pretrained(self.base, **self.trust)
        except Exception as error:  # transformers and PEFT raise as they please where a file is not as they expect
            if is_refusal(error):
                raise
            self._refuse(error)
        if getattr(self.config, "is_encoder_decoder", False):
            raise ValueError(
                f"model: {source} is an encoder-decoder; call eva_lora.eva_initialize with a forward_fn and row_mask_fn"
            )
        self.dtype = self._dtype(dtype)
        self.model_class = self._model_class()
        if self.lora_config is None:
            self.lora_config = self._lora_config(lora or LoraOptions())

    def _take_adapter(self, source: str, lora: LoraOptions | None) -> None:
        from peft import LoraConfig, PeftConfig

        if lora is not None:
            raise ValueError(f"model: {source} is an adapter with its own LoraConfig; give no LoRA options with it")
        self.lora_config = PeftConfig.from_pretrained(source)
        if not isinstance(self.lora_config, LoraConfig):
            raise ValueError(f"model: expected a LoRA adapter, {source} is {self.lora_config.peft_type}")
        self.lora_config.inference_mode = False
        base = self.lora_config.base_model_name_or_path
        if not base:
            raise ValueError(f"model: {source} is an adapter that names no base model in base_model_name_or_path")
        self.base = _absolute(base)

    def _refuse(self, error: Exception) -> NoReturn:
        """Raises ValueError for a folder or id that did not load, with what to do about it where that is known."""
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model: {self.base} brings code of its own, which runs only with --trust-remote-code"
            ) from error
        folder = Path(self.base)
        inside = [name for name in ("adapter", "lora") if (folder / name / "adapter_config.json").is_file()]
        if inside and not (folder / "config.json").exists():
            raise ValueError(
                f"model: {folder} is no model, but holds adapters: {', '.join(inside)}; name one of them"
            ) from error
        raise ValueError(f"model: {self.base} does not load: {reason(error)}") from error

    def _dtype(self, name: str) -> torch.dtype:
        if name == "auto":
            return getattr(self.config, dtype_keyword(), None) or torch.float32
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype: expected 'auto' or a floating dtype such as 'bfloat16', got {name!r}")
        return dtype

    def _model_class(self) -> Any:
        """The class the model was saved as, else an auto class."""
        import transformers

        names = getattr(self.config, "architectures", None) or []
        if names and hasattr(transformers, names[0]) and not getattr(self.config, "auto_map", None):
            return getattr(transformers, names[0])
        causal = not names or "CausalLM" in names[0]
        return transformers.AutoModelForCausalLM if causal else transformers.AutoModel

    def _lora_config(self, options: LoraOptions) -> Any:
        from peft import LoraConfig

        targets: Any = list(options.target_modules)
        name = self.model_class.__name__
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.rank if options.alpha is None else options.alpha,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            lora_dropout=options.dropout,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            task_type=next((task for ending, task in _TASKS.items() if name.endswith(ending)), None),
            init_lora_weights="eva",
            base_model_name_or_path=self.base,
        )

    @property
    def takes_labels(self) -> bool:
        """Whether the model's forward accepts per-token labels."""
        return str(self.lora_config.task_type).rpartition(".")[2] in ("CAUSAL_LM", "TOKEN_CLS")

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model returns a loss where labels are the tokens themselves."""
        return str(self.lora_config.task_type).rpartition(".")[2] == "CAUSAL_LM"

    def tokenizer(self) -> Any:
        """Raises ValueError if the model comes with none."""
        import transformers

        try:
            return transformers.AutoTokenizer.from_pretrained(self.base, **self.trust)
        except Exception as error:
            if "trust_remote_code" in str(error):
                self._refuse(error)
            raise ValueError(f"model: {self.base} has no tokenizer that loads: {reason(error)}") from error

    def load(self) -> nn.Module:
        """The model with its weights, LoRA layers added, on the device."""
        options: dict[str, Any] = {dtype_keyword(): self.dtype, **self.trust}
        try:
            if self._quantize:
                from transformers import BitsAndBytesConfig

                computed = {"bnb_4bit_compute_dtype": self.dtype} if "load_in_4bit" in self._quantize else {}
                options["quantization_config"] = BitsAndBytesConfig(**self._quantize, **computed)
                options["device_map"] = {"": self.device}
            base = self.model_class.from_pretrained(self.base, **options)
        except Exception as error:
            self._refuse(error)
        adapted = self._with_lora(base, self.lora_config)
        return adapted if self._quantize else adapted.to(self.device)

    def shapes(self) -> nn.Module:
        """The same without weights, on the meta device."""
        return self._with_lora(self._bare(), self.lora_config)

    def limits(self) -> Limits:
        """What the model can be fed, known before its weights are loaded.

        Raises:
            ValueError: target modules that there are not.
        """
        try:
            base = self._bare()
        except ValueError:  # code of its own may want weights; what is wrong then shows in the pass
            return Limits()
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        declared = getattr(text, "max_position_embeddings", None)
        try:
            weight = getattr(base.get_input_embeddings(), "weight", None)
        except (NotImplementedError, AttributeError):
            weight = None
        found = Limits(None if weight is None else len(weight), min(_positions(base, declared), default=None))
        self._with_lora(base, deepcopy(self.lora_config))
        return found

    def _bare(self) -> Any:
        build = getattr(self.model_class, "_from_config", None) or self.model_class.from_config
        code = self.trust if build.__name__ == "from_config" else {}
        try:
            with torch.device("meta"):
                return build(self.config, attn_implementation="eager", **{dtype_keyword(): self.dtype}, **code)
        except Exception as error:
            raise ValueError(f"model: {self.base} cannot be built without its weights: {reason(error)}") from error

    def _with_lora(self, base: nn.Module, config: Any) -> Any:
        from peft import get_peft_model

        if self._targets_named:
            names = [name for name, _ in base.named_modules()]
            for target in sorted(config.target_modules):
                if not any(name == target or name.endswith(f".{target}") for name in names):
                    kinds = sorted({name.rpartition(".")[2] for name, m in base.named_modules() if not [*m.children()]})
                    raise ValueError(
                        f"target_modules: expected names of modules, the model has no {target!r}; it has "
                        f"{', '.join(kind for kind in kinds if not kind.isdecimal())}"
                    )
        try:
            return get_peft_model(base, config)
        except Exception as error:
            raise ValueError(f"target_modules: {reason(error)}") from error


def _positions(model: nn.Module, declared: int | None) -> Iterator[int]:
    """How many tokens there are places for in each table of positions as long as the config declares.

    Rotations are computed and have no end; tables of other lengths are those of other towers.
    """
    modules = dict(model.named_modules())
    for name, table in (*model.named_parameters(), *model.named_buffers()):
        owner, _, last = name.rpartition(".")
        if table.ndim == 2 and re.search("pos|wpe", owner.rpartition(".")[2] if last == "weight" else last):
            padding = getattr(modules[owner], "padding_idx", None)  # RoBERTa's positions begin behind it
            places = len(table) - getattr(modules[owner], "offset", 0 if padding is None else padding + 1)
            if declared in (len(table), places):
                yield places


def dtype_keyword() -> str:
    """What transformers calls a model's dtype, as a keyword and in its configs: ``torch_dtype`` before 4.56."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def _absolute(source: str) -> str:
    """A folder as every working directory names it, since adapters record it; ids as they are."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), dtype=torch.uint8, device=device).item()  # fails where there is no device, or no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {reason(error)}") from error
    return device
