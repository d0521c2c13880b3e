"""A pretrained model with the LoRA layers asked for: from a folder or an id, with weights or only their shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


class Pretrained:
    """A model folder or id, or an adapter folder whose base model and ``LoraConfig`` are taken.

    Args:
        source: The folder or id; ids are looked up as transformers does, in its cache or on the hub.
        dtype: "auto" (as saved), or the name of a torch dtype.
        device: "auto" (a GPU where there is one), or what torch calls it.
        trust_remote_code: Whether code that comes with the model may run.
        lora: None: the defaults, or an adapter folder's own.

    Raises:
        ValueError: nothing loads from there (the message says why), LoRA options together with an adapter
            folder, an unknown dtype or device.
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
    ) -> None:
        import transformers

        self.trust = {"trust_remote_code": trust_remote_code}
        self.device = _device(device)
        self.lora_config: Any = None
        self.base = _absolute(source)
        try:
            if transformers.utils.peft_utils.find_adapter_config_file(source) is not None:
                self._take_adapter(source, lora)
            self.config = transformers.AutoConfig.from_pretrained(self.base, **self.trust)
        except (OSError, KeyError) as error:
            raise ValueError(f"model: {source} does not load: {_first_line(error)}") from error
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
        self.base = _absolute(self.lora_config.base_model_name_or_path)

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

    def tokenizer(self) -> Any:
        """Raises ValueError if the model comes with none."""
        import transformers

        try:
            return transformers.AutoTokenizer.from_pretrained(self.base, **self.trust)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model: {self.base} has no tokenizer that loads: {_first_line(error)}") from error

    def load(self) -> nn.Module:
        """The model with its weights, LoRA layers added, on the device."""
        try:
            base = self.model_class.from_pretrained(self.base, **{dtype_keyword(): self.dtype}, **self.trust)
        except (OSError, ValueError) as error:
            raise ValueError(f"model: {self.base} does not load: {_first_line(error)}") from error
        return self._with_lora(base).to(self.device)

    def shapes(self) -> nn.Module:
        """The same without weights, on the meta device."""
        build = getattr(self.model_class, "_from_config", None) or self.model_class.from_config
        with torch.device("meta"):
            base = build(self.config, attn_implementation="eager", **{dtype_keyword(): self.dtype})
        return self._with_lora(base)

    def _with_lora(self, base: nn.Module) -> Any:
        from peft import get_peft_model

        try:
            return get_peft_model(base, self.lora_config)
        except ValueError as error:
            raise ValueError(f"target_modules: {_first_line(error)}") from error


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
        torch.empty(0, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {_first_line(error)}") from error
    return device


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
