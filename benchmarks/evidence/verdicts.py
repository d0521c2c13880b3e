"""What users ask, each with the study that answers it: the table that the page begins with."""

from pathlib import Path
from typing import NamedTuple

from .methods import BASELINE, STARTS
from .results import Results
from .summary import MethodSummary, summarise

__all__ = ["QUESTIONS", "Question", "verdict", "verdicts"]

LANGUAGE, TOPICS = "language model", "topics"


class Question(NamedTuple):
    """Whether a start beats another one of its study: the study's baseline where none is named."""

    text: str
    data: str
    study: str
    method: str
    against: str = ""


QUESTIONS = (
    Question("EVA, rho 1", LANGUAGE, "gain_generation", "eva_rho1"),
    Question("EVA, rho 1", TOPICS, "gain_understanding", "eva_rho1"),
    Question("EVA with `match_gain`", LANGUAGE, "gain_generation", "eva_matched"),
    Question("EVA with `match_gain`", TOPICS, "gain_understanding", "eva_matched"),
    Question("the gain alone: default A times EVA's", LANGUAGE, "gain_generation", "lora_scaled"),
    Question("the gain alone: default A times EVA's", TOPICS, "gain_understanding", "lora_scaled"),
    Question("EVA at rank 1", LANGUAGE, "rank1_generation", "eva_rho1"),
    Question("EVA at rank 2", LANGUAGE, "rank2_generation", "eva_rho1"),
    Question("EVA at rank 4", LANGUAGE, "rank4_generation", "eva_rho1"),
    Question("EVA on 16 samples", TOPICS, "samples16_understanding", "eva_rho1"),
    Question("EVA with `match_gain` on 16 samples", TOPICS, "samples16_understanding", "eva_matched"),
    Question("the gain alone on 16 samples: default A times EVA's", TOPICS, "samples16_understanding", "lora_scaled"),
    Question("EVA on 64 samples", TOPICS, "samples64_understanding", "eva_rho1"),
    Question("EVA on 256 samples", TOPICS, "samples256_understanding", "eva_rho1"),
    Question("moving ranks: rho 2 at equal parameters", LANGUAGE, "moves_generation", "eva_rho2_parameters"),
    Question("moving ranks: rho 2 at equal parameters", TOPICS, "moves_understanding", "eva_rho2_parameters"),
    Question("A frozen: orthonormal", LANGUAGE, "frozen_generation", "frozen_orthonormal"),
    Question("A frozen: EVA", LANGUAGE, "frozen_generation", "frozen_eva"),
    Question("A frozen: EVA at twice the rank", LANGUAGE, "frozen_generation", "frozen_eva_wider"),
    Question("A learns (default LoRA)", LANGUAGE, "frozen_generation", BASELINE),
    Question("an nf4 base", LANGUAGE, "quantised_generation", "nf4_lora"),
    Question("an nf4 base, EVA", LANGUAGE, "quantised_generation", "nf4_eva", "nf4_lora"),
    Question("an nf4 base, LoftQ", LANGUAGE, "quantised_generation", "nf4_loftq", "nf4_lora"),
    Question("an nf4 base, repair", LANGUAGE, "quantised_generation", "nf4_repair", "nf4_lora"),
    Question("an nf4 base, half repair, half EVA", LANGUAGE, "quantised_generation", "nf4_both", "nf4_lora"),
    Question("PiSSA", LANGUAGE, "gain_generation", "pissa"),
    Question("PiSSA", TOPICS, "gain_understanding", "pissa"),
    Question("OLoRA", LANGUAGE, "gain_generation", "olora"),
    Question("OLoRA", TOPICS, "gain_understanding", "olora"),
    Question("CorDA", LANGUAGE, "methods_generation", "corda"),
    Question("MiLoRA", LANGUAGE, "methods_generation", "milora"),
    Question("MiCA", LANGUAGE, "methods_generation", "mica"),
    Question("LoRA-GA", LANGUAGE, "methods_generation", "lora_ga"),
    Question("LoRA-One", LANGUAGE, "methods_generation", "lora_one"),
)


def verdict(one: MethodSummary, *, higher_is_better: bool) -> str:
    """In words: the final score decides where it is beyond chance, else the steps."""
    if one.gain is None or one.steps_gain is None:
        raise ValueError(f"{one.method} is what its study compares with")
    if one.gain.excludes_zero():
        return "**helps**" if (one.gain.mean > 0) == higher_is_better else "**hurts**"
    if one.steps_gain.excludes_zero():
        return "**sooner**, ends the same" if one.steps_gain.mean < 0 else "**later**, ends the same"
    return "no difference"


def verdicts(folder: Path) -> str:
    """The Markdown of the questions whose studies have been run."""
    lines = [
        "| what is tried | data | instead of | final score | steps to its loss | seeds | cost, in steps | verdict |",
        "| --- " * 8 + "|",
    ]
    for question in QUESTIONS:
        path = folder / f"{question.study}.jsonl"
        if not path.exists():
            continue
        settings, _, runs = Results.load(path)
        baseline = question.against or settings.get("baseline", BASELINE)
        found = summarise(settings["methods"], settings["learning_rates"], runs, baseline)
        (one,) = (one for one in found if one.method == question.method)
        higher = settings["higher_is_better"]
        said = verdict(one, higher_is_better=higher)
        digits = 3 if higher else 2
        lines.append(
            f"| {question.text} | {question.data} | {STARTS[baseline].label} "
            f"| {one.gain.mean:+.{digits}f} ± {one.gain.half:.{digits}f} "  # type: ignore[union-attr]
            f"| {one.steps_gain.mean:+.1f} ± {one.steps_gain.half:.1f} "  # type: ignore[union-attr]
            f"| {len(settings['seeds'])} | {one.cost:.0f} | {said} |"
        )
    return "\n".join(lines) + "\n"
