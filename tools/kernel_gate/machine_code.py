"""Compile one kernel variant for one architecture and read what the assembler made of it."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eva_kernels._cards import CARDS

from .buffers import short_buffers

ARCHITECTURES = tuple(name for name, card in CARDS.items() if card.tiles is not None)
TENSOR_INSTRUCTION = {  # by the architecture whose tiles are taken
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its full name, operands, and address in the listing."""

    name: str
    operands: str

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes a lane moves by a load or store."""
        return next((_WIDTH[part] for part in self.name.split(".")[1:] if part in _WIDTH), 4)


@dataclass(frozen=True)
class Code:
    """One compiled variant.

    Attributes:
        registers: of one lane; for AMD vector registers alone.
        spills: spilling instructions (NVIDIA) or registers (AMD).
        shared: bytes of a block.
        instructions: of the whole kernel; empty for AMD.
        loop: of the innermost loop that holds the tensor instruction, empty where there is none.
        tensor: names of the tensor instructions anywhere in the kernel.
        short_buffers: operands of products in loops that are overwritten while they are read, one line each.
        rounded: instructions that round an operand to TF32; without them tensor cores cut it.
    """

    registers: int
    spills: int
    shared: int
    instructions: tuple[Instruction, ...]
    loop: tuple[Instruction, ...]
    tensor: frozenset[str]
    short_buffers: tuple[str, ...] = ()
    rounded: int = 0

    @cached_property
    def multiplies(self) -> int:
        return sum(_is_tensor(i) for i in self.loop)

    @property
    def loads(self) -> Counter[tuple[str, int]]:
        """Reads from global memory in the loop by kind and width, single bytes (the row mask) left out."""
        names = ("LDG", "LDGSTS", "UTMALDG", "LD")
        return Counter((i.kind, i.width) for i in self.loop if i.kind in names and i.width > 1)

    @property
    def asynchronous(self) -> bool:
        """Whether every operand load of the loop is asynchronous and 16 bytes wide."""
        return bool(self.loads) and all(
            kind == "UTMALDG" or (kind == "LDGSTS" and width == 16) for kind, width in self.loads
        )

    def shared_bytes(self, warps: int) -> int:
        """Bytes one pass of the loop moves through shared memory, over all warps of a block."""
        total = 0
        for i in self.loop:
            if i.kind == "LDSM":
                total += 128 * int(i.name.rsplit(".", 1)[-1]) * warps
            elif i.kind in ("LDS", "STS", "LDGSTS"):
                total += 32 * i.width * warps
            elif i.kind == "HGMMA":  # a warp group's own rows of one operand and all columns of the other
                m, n, k = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", i.name)[0])
                total += 2 * (m + n) * k * warps // 4
            elif i.kind == "UTCHMMA":  # issued once a block; 128 rows deep, as wide as the tile
                total += self._descriptor_bytes
        return total

    @property
    def _descriptor_bytes(self) -> int:
        """What one UTCHMMA reads: the operands of the pass, shared evenly by its instructions."""
        copied = sum(32 * i.width for i in self.loop if i.kind == "LDGSTS")
        return copied * 8 // max(1, sum(i.kind == "UTCHMMA" for i in self.loop))


def _is_tensor(instruction: Instruction) -> bool:
    return bool(re.match(r"HMMA|HGMMA|UTC\w*MMA$|UTC\w*MMA\.|v_mfma", instruction.name))


def compile_variant(
    kernel: Any,
    architecture: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: frozenset[str],
    options: dict[str, Any],
) -> Code:
    """Compile as the launcher would on that device, with its ``options``; ``aligned`` pointers are multiples of 16."""
    source = ASTSource(kernel, signature, constants, _multiples_of_16([kernel.arg_names.index(n) for n in aligned]))
    target = target_of(architecture)
    compiled = triton.compile(source, target=target, options=options)
    return _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)


def _multiples_of_16(arguments: list[int]) -> Any:
    """That these arguments are, as Triton says it."""
    if descriptor := getattr(triton.backends.compiler, "AttrsDescriptor", None):  # until Triton 3.2
        properties = {"arg_properties": {"tt.divisibility": sorted(arguments)}, "cls": descriptor.__name__}
        return descriptor.from_dict(properties)
    return {(argument,): [["tt.divisibility", 16]] for argument in arguments}


def links(architecture: str) -> bool:
    """Whether this Triton finds what it links an architecture's code with: early ones ask for ROCm's linker."""
    find = getattr(triton.backends.backends["amd"].compiler, "path_to_rocm_lld", None)
    if not architecture.startswith("gfx") or find is None:
        return True
    try:
        find()
    except Exception:  # Triton raises nothing narrower
        return False
    return True


def target_of(architecture: str) -> GPUTarget:
    """As Triton names an architecture that there are tiles for."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _read_amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    tensor = frozenset(re.findall(r"v_mfma_\w+", text))
    return Code(field("vgpr_count"), spills, compiled.metadata.shared, (), (), tensor)


def _read_nvidia(compiled: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    instructions, loop = innermost_tensor_loop(listing)
    by_themselves = any(i.kind in ("HGMMA", "UTCHMMA") for i in loop)
    return Code(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=sum(i.kind in ("STL", "LDL") for i in instructions),
        shared=compiled.metadata.shared,
        instructions=instructions,
        loop=loop,
        tensor=frozenset(i.name for i in instructions if _is_tensor(i)),
        short_buffers=tuple(short_buffers(compiled.asm["ttgir"], by_themselves)),
        rounded=len(re.findall(r"and\.b32\s+%r\d+, %r\d+, -8192;", compiled.asm["ptx"])),
    )


def _run(tool: str, *arguments: str) -> str:
    result = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def innermost_tensor_loop(listing: str) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
    """All instructions of a disassembly, and the shortest backward branch around a tensor instruction."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            instructions.append(Instruction(code[1], code[2]))
    best: tuple[Instruction, ...] = ()
    for end, instruction in enumerate(instructions):
        if instruction.kind != "BRA":
            continue
        target = re.search(r"\.L_x_\d+", instruction.operands)
        start = labels.get(target[0], end + 1) if target else end + 1
        body = tuple(instructions[start : end + 1])
        if any(map(_is_tensor, body)) and (not best or len(body) < len(best)):
            best = body
    return tuple(instructions), best
