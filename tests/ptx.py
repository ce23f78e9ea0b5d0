"""What the few PTX instructions do that our kernels have inline: the interpreter takes none."""

import re

import torch
from jaxtyping import Int64
from torch import Tensor

MASK = 0xFFFFFFFF


def run(asm: str, inputs: list[Int64[Tensor, "n"]], outputs: int) -> list[Int64[Tensor, "n"]]:
    """The output operands $0, $1, ... of the block, as 32 bits each, for inputs of 32 bits.

    Raises:
        ValueError: an instruction that is not known here.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for statement in asm.strip().strip("{}").split(";"):
        words = statement.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        name, target, *operands = words
        values = [registers[o] if o in registers else torch.tensor(int(o, 0)) for o in operands]
        registers[target] = _apply(name, values) & MASK
    return [registers[f"${i}"].expand_as(inputs[0]) for i in range(outputs)]


def _apply(name: str, values: list[Tensor]) -> Tensor:
    if name == "mov.b32":
        return values[0]
    if name == "and.b32":
        return values[0] & values[1]
    if name == "xor.b32":
        return values[0] ^ values[1]
    if name == "shr.u32":
        return values[0] >> values[1]
    if name == "lop3.b32":
        return _lop3(*values)
    if name == "prmt.b32":
        return _prmt(*values)
    if re.fullmatch(r"fma\.rn\.(bf16x2|f16x2)", name):
        return _fma(*values, dtype=torch.bfloat16 if "bf" in name else torch.float16)
    raise ValueError(f"name must be an instruction of this file, got {name}")


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """Any function of three bits: bit 4a + 2b + c of the table."""
    result = torch.zeros_like(a | b | c)
    for i in range(8):
        if int(table) >> i & 1:
            picked = [x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result |= picked[0] & picked[1] & picked[2]
    return result


def _prmt(a: Tensor, b: Tensor, selectors: Tensor) -> Tensor:
    """Four of eight bytes; bit 3 of a selector asks for the sign of its byte, eight times."""
    both = a & MASK | (b & 0x7FFFFFFF) << 32
    top = b >> 31 & 1  # the sign of an int64 would come down with a shift
    result = torch.zeros_like(selectors)
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = both >> 8 * (selector & 7) & 0xFF
        byte = byte | torch.where(selector & 7 == 7, top << 7, 0)
        byte = torch.where(selector >= 8, (byte >> 7) * 0xFF, byte)
        result = result | byte << 8 * i
    return result


def _fma(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply and add in pairs of floats, in float64: exact for the numbers of our kernels."""
    results = [
        (x.double() * y.double() + z.double()).to(dtype).view(torch.int16).long() & 0xFFFF
        for x, y, z in zip(*(halves(v.expand_as(a + b + c), dtype) for v in (a, b, c)), strict=True)
    ]
    return results[0] | results[1] << 16


def pairs_of_words() -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"], Int64[Tensor, "n"]]:
    """Every word of 16 bits as the lower half of a register, and as the upper half; with both."""
    low = torch.arange(1 << 16)
    high = (low * 40503 + 12345) & 0xFFFF  # an odd factor: all of them, in another order
    return low, high, low | high << 16


def halves(x: Int64[Tensor, "n"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two 16-bit floats in a register."""
    bits = [(x >> shift & 0xFFFF).to(torch.uint16).view(torch.int16) for shift in (0, 16)]
    return bits[0].view(dtype), bits[1].view(dtype)
