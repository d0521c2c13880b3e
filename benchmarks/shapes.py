"""The real models whose shapes the benchmarks use, under one name each.

Widths and counts are those of the models' published configurations; `tests/bench` holds them against the published
numbers of parameters.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """One distinct input of a block: the tensor that one or more linear layers are fed.

    Attributes:
        name: "attention" (q, k, v), "output", "mlp" (gate and up), or "down".
        width: d, features of a row.
        outputs: of each layer that it feeds.
    """

    name: str
    width: int
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A transformer's shape.

    Attributes:
        blocks: Transformer blocks, all alike.
        width: Of the residual stream.
        mlp: Inner width of the MLP.
        kv: Width of the keys, and of the values: key-value heads times their size.
        vocabulary: Rows of the embedding.
        parameters: Published number of parameters.
        gated: Whether the MLP has a gate beside its up projection (Llama) or not (BERT).
        head: Whether a forward ends in a product with the vocabulary.
    """

    name: str
    blocks: int
    width: int
    mlp: int
    kv: int
    vocabulary: int
    parameters: int
    gated: bool = True
    head: bool = True

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The distinct inputs of one block, in the order of the forward."""
        return (
            Input("attention", self.width, (self.width, self.kv, self.kv)),
            Input("output", self.width, (self.width,)),
            Input("mlp", self.width, (self.mlp, self.mlp) if self.gated else (self.mlp,)),
            Input("down", self.mlp, (self.width,)),
        )

    def input(self, name: str) -> Input:
        return next(entry for entry in self.inputs if entry.name == name)

    @property
    def layers(self) -> int:
        """Linear layers in all blocks: what LoRA's "all-linear" adapts."""
        return self.blocks * sum(len(entry.outputs) for entry in self.inputs)

    @property
    def linear_parameters(self) -> int:
        return self.blocks * sum(entry.width * sum(entry.outputs) for entry in self.inputs)

    def forward_flops(self, rows: int, sequence: int, *, head: bool = False) -> float:
        """Of ``rows`` tokens in causal sequences: linear layers, attention, and the head if asked for."""
        attention = 2 * sequence * self.width * self.blocks  # QKᵀ and PV, half of them masked
        return rows * (2 * self.linear_parameters + attention + (2 * self.width * self.vocabulary if head else 0))


_MODELS = (
    Model("MiniLM", 6, 384, 1536, 384, 30_522, 22_713_216, gated=False, head=False),  # all-MiniLM-L6-v2
    Model("SmolLM2-135M", 30, 576, 1536, 192, 49_152, 134_515_008),
    Model("Qwen2.5-0.5B", 24, 896, 4864, 128, 151_936, 494_032_768),
    Model("Llama-3-8B", 32, 4096, 14_336, 1024, 128_256, 8_030_261_248),
    Model("Llama-3-70B", 80, 8192, 28_672, 1024, 128_256, 70_553_706_496),
)
MODELS = {model.name: model for model in _MODELS}

# What the suites of single operations run on: every width that differs, narrow to wide.
ROW_CASES = (
    ("MiniLM", "attention"),
    ("SmolLM2-135M", "attention"),
    ("Qwen2.5-0.5B", "attention"),
    ("SmolLM2-135M", "down"),
    ("Llama-3-8B", "attention"),
    ("Qwen2.5-0.5B", "down"),
    ("Llama-3-70B", "attention"),
    ("Llama-3-8B", "down"),
    ("Llama-3-70B", "down"),
)
QUICK_CASES = ROW_CASES[:2]
