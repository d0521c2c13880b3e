"""Bases that libraries' own quantisers make on a CPU, all of one small float model."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eva_lora.cli.pretrained import dtype_keyword

from .models import LINEARS
from .recipes import run
from .texts import tokenizer

GROUP = 32  # inputs that share a scale


def save_float_model(folder: Path) -> None:
    """A Llama with biases, of sizes that all quantisers take, and a tokenizer, which some ask for."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, attention_bias=True, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def loaded(folder: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, **{dtype_keyword(): torch.float32}, **options
    )


def _bitsandbytes(folder: Path, **how: object) -> nn.Module:
    from transformers import BitsAndBytesConfig

    model = loaded(folder, quantization_config=BitsAndBytesConfig(**how))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # in bfloat16, and with weights packed at the first forward
    return model


def _hqq(folder: Path, group: int) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = loaded(folder)
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEARS:
            config = BaseQuantizeConfig(nbits=4, group_size=group)
            model.set_submodule(name, HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))
    return model


def _torchao(folder: Path, bits: int) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    how = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))
    return loaded(folder, quantization_config=TorchAoConfig(how))


def _gptqmodel(folder: Path, kind: str, number: int) -> nn.Module:
    from transformers import AwqConfig, GPTQConfig

    made = folder / f"{kind}-{number}"
    if not made.exists():
        run(folder, str(Path(__file__).with_name("gptqmodel_bases.py")), str(folder), kind)
    backends = {"gptq": GPTQConfig(4, backend="gptq_torch"), "awq": AwqConfig(4, backend="torch_awq")}
    return loaded(made, quantization_config=backends[kind])


def _of_bitsandbytes(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weight = layer.weight
    if hasattr(weight, "SCB"):
        return int8_vectorwise_dequant(weight.data, layer.state.SCB if weight.SCB is None else weight.SCB)
    return dequantize_4bit(weight.data, weight.quant_state)


@dataclass(frozen=True)
class Quantiser:
    """A kind of base.

    Attributes:
        needs: Packages that make it, with the versions that are tested, if these are not those of all tests.
        base: Folder of the float model → the base.
        other: The same → a base that is another.
        dequantized: Layer → what its library says that it computes with, (out, in).
        rounding: How much of Σ|x||w| + |b| an output may be off by: what the layer rounds its inputs, its weights and
            itself to.
        exact: Whether with the rest of their float weights beside them its layers are the float ones: inputs are not
            quantised, biases not rounded, and weights not scaled.
        rescales: Whether it moves scales between layers.
        unmerged: What PEFT raises where it is asked to merge into it; None where it merges.
    """

    needs: tuple[str, ...]
    base: Callable[[Path], nn.Module]
    other: Callable[[Path], nn.Module]
    dequantized: Callable[[nn.Module], Tensor]
    rounding: float
    exact: bool = True
    rescales: bool = False
    unmerged: type[Exception] | None = None


SINGLE = 2 * 128 * 2.0**-24  # sums of at most 128 products in float32
HALF = 4 * 2.0**-11  # inputs, weights and outputs rounded to float16, and a bias added in it

QUANTISERS = {
    "nf4": Quantiser(
        ("bitsandbytes",),
        lambda folder: _bitsandbytes(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        lambda folder: _bitsandbytes(folder, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        _of_bitsandbytes, SINGLE,
    ),
    "int8": Quantiser(
        ("bitsandbytes",),
        lambda folder: _bitsandbytes(folder, load_in_8bit=True),
        lambda folder: _bitsandbytes(folder, load_in_4bit=True),
        _of_bitsandbytes, 2.0**-6, exact=False,  # inputs in 8 bits, outputs in float16
    ),
    "hqq": Quantiser(
        ("hqq",), lambda folder: _hqq(folder, GROUP), lambda folder: _hqq(folder, 2 * GROUP),
        lambda layer: layer.dequantize(), SINGLE,
    ),
    "torchao 8": Quantiser(
        ("torchao==0.18.0",), lambda folder: _torchao(folder, 8), lambda folder: _torchao(folder, 4),
        lambda layer: layer.weight.dequantize(), SINGLE,
    ),
    "torchao 4": Quantiser(
        ("torchao==0.18.0",), lambda folder: _torchao(folder, 4), lambda folder: _torchao(folder, 8),
        lambda layer: layer.weight.dequantize(), SINGLE,
    ),
    "gptq": Quantiser(
        ("gptqmodel==7.7.0", "optimum==2.3.0"), lambda folder: _gptqmodel(folder, "gptq", 1),
        lambda folder: _gptqmodel(folder, "gptq", 2), lambda layer: layer.dequantize_weight().T, SINGLE,
        exact=False, unmerged=ValueError,
    ),
    "awq": Quantiser(
        ("gptqmodel==7.7.0", "optimum==2.3.0"), lambda folder: _gptqmodel(folder, "awq", 1),
        lambda folder: _gptqmodel(folder, "awq", 2),
        lambda layer: layer._dequantize_weight_for_inference(layer.scales, dtype=torch.float16).T, HALF,
        exact=False, rescales=True, unmerged=NotImplementedError,
    ),
}  # fmt: skip


def parameters() -> list[object]:
    """The quantisers' names, those whose package is not here marked to be skipped."""
    return [pytest.param(name, marks=_skipped(kind.needs)) for name, kind in QUANTISERS.items()]


def _skipped(needs: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    marks = []
    for requirement in needs:
        package = requirement.partition("==")[0]
        try:
            version(package)
        except PackageNotFoundError:
            marks.append(pytest.mark.skip(reason=f"no {package}"))
    return marks
