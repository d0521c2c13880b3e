"""Which GPUs there are kernels for: one table, which dispatch, the doctor and the kernel gate read."""

from dataclasses import dataclass
from functools import cache

import torch

KIB = 1024


@dataclass(frozen=True)
class Card:
    """One architecture of GPUs.

    Attributes:
        name: What compilers call it.
        found_in: Cards that have it.
        shared: Bytes of shared memory that a block may have.
        tiles: The architecture whose tiles it is launched with; None where there are none, so that PyTorch's own
            operations run: the reference.
        why: Of either.
        triton: The oldest version that was seen to compile the kernels for it; some older ones end the process.
        tf32: Whether Triton multiplies float32 as TF32 there, where PyTorch's switch allows it.
    """

    name: str
    found_in: str
    shared: int
    tiles: str | None
    why: str
    triton: tuple[int, int] = (3, 2)
    tf32: bool = True


_SAME = "the same instructions and as much shared memory"
_LESS = "the same instructions, and tiles that fit into less shared memory"
_TURING = "no bfloat16 and no asynchronous copies: Triton multiplies without tensor cores there, from spilled registers"

CARDS = {
    card.name: card
    for card in (
        Card("sm_70", "V100", 96 * KIB, None, _TURING),
        Card("sm_75", "T4, RTX 20", 64 * KIB, None, _TURING),
        Card("sm_80", "A100, A30", 163 * KIB, "sm_80", "its own"),
        Card("sm_86", "RTX 30, A10, A40, A6000", 99 * KIB, "sm_80", _LESS),
        Card("sm_87", "Jetson Orin", 163 * KIB, "sm_80", _SAME),
        Card("sm_89", "RTX 40, L4, L40S", 99 * KIB, "sm_80", _LESS),
        Card("sm_90", "H100, H200, GH200", 227 * KIB, "sm_90", "its own"),
        Card("sm_100", "B200, GB200", 227 * KIB, "sm_100", "its own", (3, 3)),
        Card("sm_103", "B300, GB300", 227 * KIB, "sm_100", _SAME, (3, 6)),
        Card("sm_110", "Jetson Thor", 227 * KIB, "sm_100", _SAME, (3, 9)),
        Card("sm_120", "RTX 50, RTX PRO 6000", 99 * KIB, "sm_120", "its own", (3, 4)),
        Card("sm_121", "DGX Spark", 99 * KIB, "sm_120", _SAME, (3, 6)),
        Card("gfx90a", "MI210, MI250", 64 * KIB, "gfx942", _SAME, tf32=False),
        Card("gfx942", "MI300, MI325", 64 * KIB, "gfx942", "its own"),
        Card("gfx950", "MI350, MI355", 160 * KIB, "gfx942", "the same instructions, more shared memory", (3, 3), False),
        Card("gfx1100", "RX 7900, W7900", 64 * KIB, None, "tiles spill from its registers"),
        Card("gfx1201", "RX 9070, R9700", 64 * KIB, None, "the widest tiles need more shared memory"),
    )
}


def name_of(device: torch.device) -> str:
    """What compilers call the architecture of a CUDA or HIP device."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def card_named(name: str, triton: tuple[int, int]) -> Card:
    """What is known of an architecture. One that is not in the table, or too new for this Triton, gets the reference:
    nobody has seen that the kernels fit it, or that they compile."""
    card = CARDS.get(name) or Card(name, "", 0, None, "not known to this version of eva-kernels")
    if card.tiles is not None and triton < card.triton:
        needed, had = (".".join(map(str, number)) for number in (card.triton, triton))
        return Card(name, card.found_in, card.shared, None, f"needs Triton {needed}, and this is {had}", card.triton)
    return card


@cache
def triton_version() -> tuple[int, int]:
    """Major and minor. Imports Triton."""
    import triton

    major, minor = map(int, triton.__version__.split(".")[:2])
    return major, minor


@cache
def card_of(device: torch.device) -> Card:
    """The architecture of a CUDA or HIP device, looked up once. Imports Triton."""
    return card_named(name_of(device), triton_version())


def has_tiles(device: torch.device) -> bool:
    """Whether there are kernels for a CUDA or HIP device."""
    return card_of(device).tiles is not None


# torch.compile asks once, while it traces. As torch.compiler.assume_constant_result does it, which imports Triton.
vars(has_tiles)["_dynamo_marked_constant"] = True
