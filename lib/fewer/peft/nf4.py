"""NF4: sixteen levels where a normal distribution has its weights, and scales in 8 bits.

Dettmers, Pagnoni, Holtzman & Zettlemoyer 2023, "QLoRA: Efficient finetuning of quantized LLMs"
(arXiv 2305.14314), section 3. A tensor is cut into blocks of 64; c is the largest magnitude of a
block, q the 16 levels in [-1, 1]:

    code_i = argmin_j | q_j - x_i / c |,        x_i is close to c q[code_i]

Trained weights are close to normal, so levels at quantiles of the normal distribution are used
about equally often. One c for 64 weights is 32 / 64 = 0.5 bits a weight. *Double quantization*
keeps c in 8 bits: minus the mean of all c, in blocks of 256 with a scale each:

    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight

The paper calls the 8 bits "8-bit floats". Its authors' code (bitsandbytes) uses the *dynamic*
levels of Dettmers et al. 2021 (arXiv 2110.02861), and so do we.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from fewer.validate import require_floating, require_int


def nf4_levels() -> Float[Tensor, "16"]:
    """The 16 levels of NF4, rising from -1 to 1, from the quantiles of the normal distribution.

    Q is the inverse of the normal distribution function (`torch.special.ndtri`). Evenly spaced
    probabilities, from d to 1 - d, give levels that split normal weights evenly; but of 16 such
    levels none is 0, and a pruned or padded weight should stay 0. So the two halves are made apart
    and share the level Q(1/2) = 0:

        8 levels  Q(p), p evenly spaced from d to 1/2        seven below zero, and zero
        9 levels  Q(p), p evenly spaced from 1/2 to 1 - d    zero, and eight above
        d = (1/30 + 1/32) / 2

    Half a step of 15 even parts is 1/30, of 16 it is 1/32; d is their mean. At last all are divided
    by Q(1 - d), so that they end at -1 and 1. (This is the construction of the authors' code, which
    gives the table of the paper's appendix E. Equation 4 of the paper says it otherwise and does
    not give that table.)

    Returns:
        float32, [16], rising.

    Example:
        >>> nf4_levels()[:4].tolist(), nf4_levels()[7].item()
        ([-1.0, -0.6962, -0.5251, -0.3949], 0.0)
    """
    d = (1 / 30 + 1 / 32) / 2
    below = torch.linspace(d, 0.5, 8, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - d, 9, dtype=torch.float64)
    levels = torch.special.ndtri(torch.cat([below, above[1:]]))
    return (levels / levels[-1]).float()


@cache  # it is asked for whenever a 4-bit layer is used
def dynamic_levels() -> Float[Tensor, "256"]:
    """The 256 levels of the dynamic 8-bit type, rising: fine near zero, and finer still near one.

    A level is a power of ten and a fraction; the smaller the power, the fewer fractions it has. For
    i = 0 to 6 there are 2^i levels of each sign, 10^(i-6) times the middles of 2^i equal parts of
    [0.1, 1]. 0 and 1 make 256. (-1 is none of them.)

    Example:
        >>> dynamic_levels()[[0, 127, 128, 255]].tolist()
        [-0.9930, 0.0, 5.5e-7, 1.0]
    """
    positive = []
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        positive.append(10.0 ** (i - 6) * (ends[:-1] + ends[1:]) / 2)
    levels = torch.cat(positive)
    ends_and_zero = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([levels, -levels, ends_and_zero]).sort().values.float()


def quantize_blockwise(
    x: Float[Tensor, "*shape"], levels: Float[Tensor, "n"], block_size: int
) -> tuple[UInt8[Tensor, "*shape"], Float[Tensor, "blocks"]]:
    """Each value as the nearest level, once its block is divided by its largest magnitude.

    Blocks are `block_size` consecutive values of x, read row by row over all its dimensions; the
    last one may be shorter. With c = max |x| over a block, code_i = argmin_j |levels_j - x_i / c|.
    A value in the middle between two levels gets either. In a block of zeros c is 0, and each value
    gets the level nearest to 0.

    Args:
        x: any shape, any floating type, finite, not empty. It is not modified.
        levels: rising, in [-1, 1], 2 to 256 of them: `nf4_levels()` or `dynamic_levels()`.
        block_size: at least 1.

    Returns:
        codes: uint8, the shape of x: indices into levels.
        absmax: c, one a block, float32 (float64 for a float64 x).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is empty or not finite; block_size below 1.

    Example:
        >>> codes, absmax = quantize_blockwise(torch.tensor([0.0, -4.0, 2.0]), nf4_levels(), 64)
        >>> codes.tolist(), absmax.tolist()  # 2 / 4 lies between levels 12 (0.44) and 13 (0.56)
        ([7, 0, 12], [4.0])
    """
    x = require_floating(x, "x")
    require_int(block_size, "block_size", 1)
    if x.numel() == 0 or not torch.isfinite(x).all():
        raise ValueError(f"x must be finite and not empty, got shape {tuple(x.shape)}")
    blocks = F.pad(x.flatten(), (0, -x.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    middles = (levels[1:] + levels[:-1]) / 2  # on this side of a middle, that level is nearest
    codes = torch.bucketize(scaled, middles.to(x)).flatten()[: x.numel()]
    return codes.to(torch.uint8).view(x.shape), absmax


def dequantize_blockwise(
    codes: UInt8[Tensor, "*shape"],
    absmax: Float[Tensor, "blocks"],
    levels: Float[Tensor, "n"],
    block_size: int,
) -> Float[Tensor, "*shape"]:
    """The inverse of `quantize_blockwise`, up to its rounding: c * levels[code].

    Args:
        codes: uint8, any shape, below the number of levels.
        absmax: c of each block of `block_size` consecutive codes.
        levels, block_size: as they were quantized with.

    Returns:
        the shape of codes, the type of absmax.

    Raises:
        ValueError: absmax has not ceil(codes / block_size) values.

    Example:
        >>> codes = torch.tensor([7, 0, 12], dtype=torch.uint8)
        >>> dequantize_blockwise(codes, torch.tensor([4.0]), nf4_levels(), 64).tolist()
        [0.0, -4.0, 1.7628]
    """
    n_blocks = -(-codes.numel() // block_size)
    if absmax.shape != (n_blocks,):
        raise ValueError(
            f"absmax must have shape {(n_blocks,)} for {codes.numel()} codes in blocks of "
            f"{block_size}, got {tuple(absmax.shape)}"
        )
    # index_select with int32: a quarter of the time of levels[codes.long()].
    values = levels.to(absmax).index_select(0, codes.flatten().int())
    blocks = F.pad(values, (0, -codes.numel() % block_size)).view(n_blocks, block_size)
    return (absmax[:, None] * blocks).flatten()[: codes.numel()].view(codes.shape)


def double_quantize(
    absmax: Float[Tensor, "blocks"], block_size: int = 256
) -> tuple[UInt8[Tensor, "blocks"], Float[Tensor, "outer"], Float[Tensor, ""]]:
    """The block scales c in 8 bits each: `quantize_blockwise` of c - mean, `dynamic_levels()`.

    Magnitudes are all positive. Without their mean they lie on both sides of zero, and the levels
    of both signs are used.

    Args:
        absmax: c of each block, 1-D, any floating type, finite, not empty.
        block_size: how many c share a scale; the last block may be shorter.

    Returns:
        codes: uint8, indices into `dynamic_levels()`.
        scale: the largest |c - mean| of each `block_size` of them.
        mean: of all c, 0-d.

    Raises:
        TypeError: absmax is not a floating-point tensor.
        ValueError: absmax is empty or not finite; block_size below 1.

    Example:
        >>> codes, scale, mean = double_quantize(torch.tensor([1.0, 2.0, 3.0]))
        >>> codes.tolist(), scale.tolist(), mean.item()
        ([0, 127, 255], [1.0], 2.0)
    """
    absmax = require_floating(absmax, "absmax")
    mean = absmax.mean()
    codes, scale = quantize_blockwise(absmax - mean, dynamic_levels().to(absmax), block_size)
    return codes, scale, mean


def undo_double_quantize(
    codes: UInt8[Tensor, "blocks"],
    scale: Float[Tensor, "outer"],
    mean: Float[Tensor, ""],
    block_size: int = 256,
) -> Float[Tensor, "blocks"]:
    """The block scales again, each off by less than 1% of its `scale`.

    Example:
        >>> undo_double_quantize(*double_quantize(torch.tensor([1.0, 2.0, 3.0]))).tolist()
        [1.007, 2.0, 3.0]
    """
    return dequantize_blockwise(codes, scale, _levels_on(codes.device)[1], block_size) + mean


def pack_nibbles(codes: UInt8[Tensor, "*shape"]) -> UInt8[Tensor, "bytes"]:
    """Two 4-bit codes a byte, the earlier one in the high nibble, as bitsandbytes stores them.

    Args:
        codes: uint8 below 16, any shape, read row by row. An odd last one is followed by a 0.

    Raises:
        ValueError: a code above 15.

    Example:
        >>> [hex(byte) for byte in pack_nibbles(torch.tensor([1, 2, 15], dtype=torch.uint8))]
        ['0x12', '0xf0']
    """
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes must be at most 15, got {int(codes.max())}")
    flat = F.pad(codes.flatten(), (0, codes.numel() % 2))
    return flat[::2] << 4 | flat[1::2]


def unpack_nibbles(packed: UInt8[Tensor, "bytes"], n: int) -> UInt8[Tensor, "n"]:
    """The first n codes of `pack_nibbles`.

    Example:
        >>> unpack_nibbles(torch.tensor([0x12, 0xF0], dtype=torch.uint8), 3).tolist()
        [1, 2, 15]
    """
    return torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten()[:n]


class NF4(NamedTuple):
    """A tensor in NF4 with double quantization: all that is stored of it, besides its shape."""

    packed: UInt8[Tensor, "bytes"]  # two codes a byte
    absmax_codes: UInt8[Tensor, "blocks"]  # one a block of 64
    absmax_scale: Float[Tensor, "outer"]  # one a block of 256 * 64
    absmax_mean: Float[Tensor, ""]


def quantize_nf4(w: Float[Tensor, "*shape"]) -> NF4:
    """Blocks of 64, packed, with the scales in 8 bits: 4.127 bits a weight.

    Raises:
        TypeError, ValueError: as `quantize_blockwise`.

    Example:
        >>> stored = quantize_nf4(torch.randn(512, 512))
        >>> 8 * sum(tensor.nbytes for tensor in stored) / 512**2
        4.127
    """
    codes, absmax = quantize_blockwise(w.float(), nf4_levels().to(w.device), 64)
    return NF4(pack_nibbles(codes), *double_quantize(absmax))


def dequantize_nf4(stored: NF4, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """The float32 tensor of this shape that `stored` stands for.

    Example:
        >>> w = torch.tensor([[0.5, -1.0], [0.0, 0.1]])
        >>> dequantize_nf4(quantize_nf4(w), (2, 2)).tolist()
        [[0.4407, -1.0], [0.0, 0.0796]]
    """
    absmax = undo_double_quantize(*stored[1:])
    codes = unpack_nibbles(stored.packed, torch.Size(shape).numel())
    return dequantize_blockwise(codes, absmax, _levels_on(codes.device)[0], 64).view(shape)


@cache
def _levels_on(device: torch.device) -> tuple[Float[Tensor, "16"], Float[Tensor, "256"]]:
    """The levels of NF4 and of its scales: to send them to a GPU takes longer than to use them."""
    return nf4_levels().to(device), dynamic_levels().to(device)


def nf4_bits(block_size: int = 64, scale_block_size: int | None = 256) -> float:
    """Bits a weight of NF4: 4 for the code, and its share of the scales.

    Args:
        block_size: weights that share a scale.
        scale_block_size: scales that share one of their own; None: the scales are float32.

    Example:
        >>> nf4_bits(), nf4_bits(scale_block_size=None)
        (4.12695, 4.5)
    """
    if scale_block_size is None:
        return 4 + 32 / block_size
    return 4 + 8 / block_size + 32 / (block_size * scale_block_size)
