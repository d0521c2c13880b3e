"""Every choice of an EVA run, validated once."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Convergence = Literal["component", "subspace", "captured"]
StatisticKind = Literal["auto", "gram", "subspace"]

DEFAULT_MAX_BATCHES = 1000  # ten times what the paper's runs need: ends a run that would never converge
EVA_RHO = 2.0  # the paper's and PEFT's
# By criterion: batches between refreshes in the long run, and columns kept per candidate at least. The paper's and
# "captured" are defined batch by batch; what refreshes often needs fewer columns for the same accuracy.
REFRESH_PERIOD = {"subspace": 4, "component": 1, "captured": 1}
DEFAULT_OVERSAMPLING = {"subspace": 2.5, "component": 2.0, "captured": 2.0}
EXTRA_COLUMNS = 32  # kept beyond the candidates at least: multiples of few are too few
COLUMNS_AT_ONCE = 16  # that kernels multiply
GRAM_MAX_WIDENING = 5  # d / q up to which the exact Gram takes at most 2.5 times the operations of the subspace product


def default_columns(candidates: int, convergence: str = "subspace") -> int:
    """Columns of a basis that so many candidate components come from, where ``oversampling`` is None.

    docs/choosing.md has the losses that this rests on. One rule for all devices, so that they find the same.
    """
    wanted = max(math.ceil(candidates * DEFAULT_OVERSAMPLING[convergence]), candidates + EXTRA_COLUMNS)
    return -(-wanted // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE


@dataclass(frozen=True)
class EvaConfig:
    """Options of EVA (Paischer et al., arXiv 2410.07170), with PEFT's names and defaults where PEFT has them.

    Attributes:
        rho: Candidate components per layer, as a multiple of its rank; ≥ 1. 1 keeps ranks uniform. Paper, §3.3. None: 2
            for EVA, as in the paper and in PEFT; 1 for other methods of ``initialize``.
        tau: Convergence threshold in [0, 1] of the criterion below. Paper, §3.2.
        convergence: "subspace" compares the leading subspaces of two refreshes, blind to rotations inside;
            "component" compares each component with itself one batch earlier, whatever its sign (the
            paper's criterion, which waits for the eigengaps and may never be met where they are small);
            "captured" asks what the last refresh gained in captured variance on rows that neither basis had
            seen, ≤ 1 − tau three times in a row. It projects every row once more, on both bases.
        use_label_mask: Leave out rows whose label is ``label_mask_value``, where labels are per token.
        label_mask_value: The label that marks a row to leave out.
        label_names: Fields of a batch that may hold labels; the first that is there does.
        whiten: Divide each row of A by the square root of its singular value. Paper, appendix on vision.
        match_gain: Divide each layer's A by its feature gain (docs/choosing.md), so that B is fed features
            as large as with PEFT's default A and learning rates found for that apply; "global": all by the median gain.
            Directions and captured variance stay.
        adjust_scaling_factors: Change alpha with the rank so that the LoRA scaling stays what it was.
        max_batches: Stop after this many batches. None: ``DEFAULT_MAX_BATCHES``, so that every run ends.
        max_rows: Stop once this many unmasked rows (tokens) were seen. None: no such bound.
        min_rank: Smallest rank any layer may get; 0 lets a layer lose its adapter.
        max_rank: Largest rank any layer may get. None: rho alone bounds it.
        rank_multiple: Every rank is a multiple of this.
        budget_parameters: Spend so many parameters of all A and B together in place of the configured ranks' sum: wide
            layers cost more. None: ranks are counted.
        statistic: "gram" is exact, "subspace" needs d × q memory instead of d × d; "auto" takes "gram" for
            inputs up to ``GRAM_MAX_WIDENING`` times as wide as q while ``memory_budget`` lasts, where it costs
            at most 2.5 times as much.
        oversampling: Columns kept per candidate component, ≥ 1. None: 2.5 for "subspace", 2 for the criteria that
            refresh with every batch; but 32 more than candidates at least, and a multiple of 16.
        keep_moments: Whether the statistics keep each input's whole second moment, d × d: every statistic is then
            "gram", in float64. What aims at the directions that inputs have least of needs it (docs/methods.md). A pass
            then reads the loader once, to its end or a bound: that leading directions converged says nothing of those.
        memory_budget: Bytes all "gram" states together may take under "auto". None: no bound.
        equal_data: Keep all layers accumulating until all have converged, so that their ratios come from
            the same rows. False frees a layer's hook as soon as it has converged.
        early_stop: Compute nothing from the model's output head on, where no layer is called there: neither logits nor
            loss. That none is, is seen in every forward; the first, and 3 % of the others, run whole. "auto":
            unless the model is offloaded, compiled, wrapped for distribution, or called through a ``forward_fn``;
            then, and with False, every forward is a plain call.
        share_inputs: Keep one statistic for layers that are fed the very same tensor (q, k and v, say).
        nonfinite: What NaN or Inf in a layer's input does. "error" names the layer, the batch and the number of
            rows. "skip" leaves such rows out of that layer's statistic as if they were masked, and the report counts
            them; it reads every input once more.
        uncalled: What a layer that the first batch does not reach does; "error" names it, "default" waits for it
            to be called, and if it never is (experts nobody was routed to) it keeps its rank and its initial A.
        save_as: What the adapter's config says of its beginning: "plain", ``init_lora_weights=True``, which every tool
            takes; or "eva" with the options, which PEFT loads alike and some other tools refuse.
        impl: Implementation of the accumulating ops; "auto" takes Triton on a GPU, compiled code on a CPU that
            has the instructions, and the reference elsewhere. A name never falls back.
        seed: Of the random start; the global generators are never touched. Reruns on one device are bit-equal.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or names something that is not built yet.
    """

    rho: float | None = None
    tau: float = 0.99
    convergence: Convergence = "subspace"
    use_label_mask: bool = True
    label_mask_value: int = -100
    label_names: tuple[str, ...] = ("labels", "label_ids", "lm_labels", "target_ids", "targets")
    whiten: bool = False
    match_gain: Literal["global"] | bool = False
    adjust_scaling_factors: bool = True
    max_batches: int | None = None
    max_rows: int | None = None
    min_rank: int = 0
    max_rank: int | None = None
    rank_multiple: int = 1
    budget_parameters: int | None = None
    statistic: StatisticKind = "auto"
    oversampling: float | None = None
    keep_moments: bool = False
    memory_budget: int | None = None
    equal_data: bool = True
    early_stop: Literal["auto"] | bool = "auto"
    share_inputs: bool = True
    nonfinite: Literal["error", "skip"] = "error"
    uncalled: Literal["error", "default"] = "error"
    save_as: Literal["plain", "eva"] = "plain"
    impl: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self._number("rho", 1.0, None, optional=True)
        self._number("tau", 0.0, 1.0)
        self._number("oversampling", 1.0, None, optional=True)
        for name, low in (("min_rank", 0), ("rank_multiple", 1)):
            self._integer(name, low)
        for name in ("max_batches", "max_rows", "max_rank", "budget_parameters", "memory_budget"):
            self._integer(name, 1, optional=True)
        self._integer("seed", 0)
        self._integer("label_mask_value", None)
        self._names("label_names")
        for name in (
            "use_label_mask",
            "whiten",
            "adjust_scaling_factors",
            "equal_data",
            "share_inputs",
            "keep_moments",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        self._choice("convergence", ("component", "subspace", "captured"))
        self._choice("statistic", ("auto", "gram", "subspace"))
        self._choice("nonfinite", ("error", "skip"))
        self._choice("uncalled", ("error", "default"))
        self._choice("save_as", ("plain", "eva"))
        self._choice("impl", ("auto", "reference", "triton"))
        if self.match_gain not in ("global", True, False):
            raise ValueError(f"match_gain: expected 'global', True or False, got {self.match_gain!r}")
        if self.early_stop not in ("auto", True, False):
            raise ValueError(f"early_stop: expected 'auto', True or False, got {self.early_stop!r}")
        if self.keep_moments and self.statistic == "subspace":
            raise ValueError("statistic: expected 'gram' or 'auto' with keep_moments, got 'subspace'")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank: expected at least min_rank ({self.min_rank}), got {self.max_rank}")

    @classmethod
    def of(cls, config: Any) -> "EvaConfig":
        """Ours, PEFT's ``EvaConfig``, or None for the defaults; with ``rho`` as it is for EVA where it is None.

        Raises:
            TypeError: ``config`` is none of these.
        """
        if config is None:
            config = cls()
        if isinstance(config, cls):
            return replace(config, rho=config.settled_rho)
        shared = ("rho", "tau", "use_label_mask", "label_mask_value", "whiten", "adjust_scaling_factors")
        if type(config).__name__ == "EvaConfig" and all(hasattr(config, name) for name in shared):
            return cls(**{name: getattr(config, name) for name in shared})
        raise TypeError(f"config: expected eva_lora.EvaConfig or peft.EvaConfig, got {type(config).__name__}")

    def columns_for(self, candidates: int) -> int:
        """Columns of a basis that so many candidate components are to come from."""
        if self.oversampling is None:
            return default_columns(candidates, self.convergence)
        return math.ceil(candidates * self.oversampling)

    @property
    def settled_rho(self) -> float:
        """``rho``, EVA's where it is None."""
        return EVA_RHO if self.rho is None else self.rho

    @property
    def moves_ranks(self) -> bool:
        """Whether layers' ranks may change."""
        return self.settled_rho != 1 or self.rank_multiple != 1 or self.budget_parameters is not None

    def least_rank(self, removable: Iterable[bool]) -> int:
        """The least rank of any layer: ``min_rank``, or 1 where there are layers that cannot have rank 0."""
        return max(self.min_rank, 0 if all(removable) else 1)

    def to_dict(self) -> dict[str, Any]:
        """Field → value, as JSON can hold it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvaConfig":
        """Inverse of :meth:`to_dict`.

        Raises:
            TypeError: ``values`` is no mapping.
            ValueError: a name this version does not know, or a value out of range.
        """
        if not isinstance(values, dict):
            raise TypeError(f"config: expected its fields, got {type(values).__name__}")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"config: unknown fields {unknown}; written by another version?")
        return cls(**values)

    def _names(self, field: str) -> None:
        names = getattr(self, field)
        names = (names,) if isinstance(names, str) else names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{field}: expected a list of names, got {names!r}")
        object.__setattr__(self, field, tuple(names))

    def _choice(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")

    def _number(self, name: str, low: float, high: float | None, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not (value >= low and (high is None or value <= high) and value != float("inf")):
            expected = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{name}: expected a number {expected}, got {value!r}")

    def _integer(self, name: str, low: int | None, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if low is not None and value < low:
            raise ValueError(f"{name}: expected an integer of at least {low}, got {value}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
