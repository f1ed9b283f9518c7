"""What a kernel's machine code (SASS) for compute capability 9.0 says of it, read from the disassembly.

These are readings, not measurements: how wide loads are, what is spilled, which tensor instruction multiplies, how many
instructions and slow conversions the main loop has, and how many bytes it keeps under way.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

# Of one multiprocessor of compute capability 9.0.
REGISTERS, SHARED, WARPS, BLOCKS, RESERVED = 65536, 233472, 64, 32, 1024
SCHEDULERS = 4
# Cycles that a scheduler is taken for one instruction of a warp: 16 lanes a cycle and multiprocessor for conversions
# and special functions, 64 for packed conversions, 128 for the rest.
SLOW = {"F2F": 8, "I2F": 8, "F2I": 8, "MUFU": 8}
HALF = {"F2FP": 2, "POPC": 8, "BREV": 8, "FLO": 8}
_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_ASYNC = re.compile(r"local_alloc\s+:\s+\(\) -> !ttg\.memdesc<((?:\d+x)+)([a-z]\w*),")
_BYTES = {"f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i8": 1, "f8E4M3FN": 1, "i64": 8}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers
    rest: str

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes a thread of a load or store."""
        parts = self.name.split(".")
        for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if part in parts:
                return size
        return 4


@dataclass
class Code:
    """`loads`, `stores`, `copies` (to shared memory): how many of each width in bytes, in the whole kernel."""

    registers: int
    spilled: int  # loads and stores of local memory
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    copies: Counter[int] = field(default_factory=Counter)
    bulk: int = 0  # loads by descriptor
    products: str = ""  # the tensor instruction
    loop: list[Instruction] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """Cycles of a scheduler that a warp's turn of the main loop takes at least."""
        return sum(cycles(each) for each in self.loop)

    @property
    def slow(self) -> int:
        """Instructions of the main loop that take eight cycles each."""
        return sum(1 for each in self.loop if each.kind in SLOW)

    def loop_bytes(self, threads: int) -> int:
        """Bytes that a block's turn of the main loop loads through registers or asynchronously (no descriptors)."""
        return threads * sum(each.width for each in self.loop if each.kind in ("LDG", "LDGSTS"))


def cycles(each: Instruction) -> int:
    if each.name.startswith("F2FP"):
        return HALF["F2FP"]
    return SLOW.get(each.kind) or HALF.get(each.kind) or 1


def disassemble(cubin: bytes) -> list[Instruction]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in their order."""
    return [Instruction(int(m[1], 16), m[3], m[4].strip()) for m in _LINE.finditer(text)]


def read(cubin: bytes, registers: int) -> Code:
    """Everything that is read of a kernel's machine code."""
    code = disassemble(cubin)
    found = Code(registers, sum(1 for each in code if each.kind in ("LDL", "STL")))
    tensor: Counter[str] = Counter()
    for each in code:
        if each.kind == "LDG":
            found.loads[each.width] += 1
        elif each.kind == "STG":
            found.stores[each.width] += 1
        elif each.kind == "LDGSTS":
            found.copies[each.width] += 1
        elif each.kind == "UTMALDG":
            found.bulk += 1
        elif each.kind in ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA"):
            tensor[each.kind] += 1
    found.products = "+".join(kind for kind, _ in tensor.most_common())
    found.loop = main_loop(code)
    return found


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop that loads most from global memory; of equals the shortest. Empty: no loop loads."""
    loops: list[tuple[int, int]] = []
    for each in code:
        if each.kind == "BRA" and (target := re.search(r"0x([0-9a-f]+)", each.rest)):
            begin = int(target[1], 16)
            if begin < each.address:
                loops.append((begin, each.address))
    best: tuple[tuple[int, int], list[Instruction]] = ((0, 0), [])
    for begin, end in loops:
        if any(a >= begin and b <= end and (a, b) != (begin, end) for a, b in loops):
            continue
        body = [each for each in code if begin <= each.address <= end]
        load = sum(each.width for each in body if each.kind in ("LDG", "LDGSTS"))
        load += sum(64 for each in body if each.kind == "UTMALDG")
        if load and (load, -len(body)) > best[0]:
            best = (load, -len(body)), body
    return best[1]


def under_way(code: Code, ttgir: str, threads: int) -> int:
    """Bytes that a block keeps under way in its main loop: copies of all stages but the one in use, or loads into
    registers between their issue and the first use of what they bring. A single stage is copied to registers before it
    is filled again, and counts."""
    staged = 0
    for dims, kind in _ASYNC.findall(ttgir):
        sizes = [int(size) for size in dims.split("x") if size]
        if len(sizes) >= 2 and kind in _BYTES:
            staged += math.prod(sizes[1:]) * max(sizes[0] - 1, 1) * _BYTES[kind]
    return staged + threads * _in_registers(code.loop)


def _in_registers(loop: list[Instruction]) -> int:
    most, waiting = 0, dict[int, int]()
    for each in loop + loop:  # twice: what is loaded at the end of a turn may be used in the next
        names = {int(number) for number in re.findall(r"\bR(\d+)\b", each.rest)}
        if each.kind == "LDG":
            found = re.match(r"(?:U?P\w+, )?R(\d+)", each.rest)
            if found:
                first, count = int(found[1]), max(1, each.width // 4)
                for number in range(first, first + count):
                    waiting[number] = min(each.width, 4)
        else:
            for number in names & waiting.keys():
                del waiting[number]
        most = max(most, sum(waiting.values()))
    return most


def resident(registers: int, shared: int, warps: int) -> int:
    """Blocks that one multiprocessor holds at once."""
    each = -(-registers // 8) * 8 * 32
    by_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // each) // warps
    by_shared = SHARED // (shared + RESERVED)
    return max(0, min(by_registers, by_shared, WARPS // warps, BLOCKS))
