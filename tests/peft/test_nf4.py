"""Properties of NF4, its packing and its double quantization; bitsandbytes as a peer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.peft.nf4 import (
    dequantize_blockwise,
    dequantize_nf4,
    double_quantize,
    dynamic_levels,
    nf4_bits,
    nf4_levels,
    pack_nibbles,
    quantize_blockwise,
    quantize_nf4,
    undo_double_quantize,
    unpack_nibbles,
)

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3)
# Appendix E of the paper.
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_levels_are_the_sixteen_published_ones():
    assert torch.allclose(nf4_levels(), torch.tensor(PUBLISHED), rtol=0, atol=1e-6)
    assert nf4_levels().dtype == torch.float32


def test_zero_is_a_level_with_seven_below_and_eight_above():
    levels = nf4_levels()
    assert (levels.diff() > 0).all()
    assert levels[0] == -1
    assert levels[7] == 0
    assert levels[15] == 1


def test_normal_weights_say_more_with_these_levels_than_with_uniform_steps():
    def entropy(levels):
        codes, _ = quantize_blockwise(normal(2**16), levels, 64)
        shares = codes.long().bincount(minlength=16) / 2**16
        return -(shares * shares.log2()).sum().item()  # in bits; 4 if all are used equally often

    assert entropy(nf4_levels()) > 3.85
    assert entropy(torch.linspace(-1, 1, 16)) < 3.7


@given(SHAPES, st.integers(1, 12), SEEDS, st.floats(-30, 30), st.booleans())
def test_no_other_level_is_nearer(shape, block_size, seed, exponent, eight_bits):
    levels = dynamic_levels() if eight_bits else nf4_levels()
    x = normal(*shape, seed=seed) * 10.0**exponent
    x[..., 0] = 0
    if x.ndim > 1:
        x = x.transpose(0, -1)  # read row by row, whatever its memory looks like
    codes, absmax = quantize_blockwise(x, levels, block_size)
    assert codes.shape == x.shape
    assert codes.dtype == torch.uint8
    assert absmax.shape == (-(-x.numel() // block_size),)
    restored = dequantize_blockwise(codes, absmax, levels, block_size)
    assert restored.dtype == torch.float32
    for i, block in enumerate(x.flatten().split(block_size)):
        c = block.abs().max()
        assert absmax[i] == c
        got = restored.flatten().split(block_size)[i]
        best = (c * levels[:, None] - block).abs().amin(0)
        assert ((got - block).abs() <= best + 1e-6 * c).all()


@given(st.integers(1, 200), SEEDS)
def test_the_largest_weight_of_a_block_comes_back_exactly_and_so_does_zero(n, seed):
    w = normal(n, seed=seed)
    w[:: max(n // 3, 1)] = 0
    restored = dequantize_blockwise(
        *quantize_blockwise(w, nf4_levels(), 64), nf4_levels(), 64
    ).split(64)
    for got, block in zip(restored, w.split(64), strict=True):
        largest = block.abs().argmax()
        assert got[largest] == block[largest]
        assert (got[block == 0] == 0).all()


def test_a_block_of_zeros_is_no_trouble():
    w = torch.cat([torch.zeros(64), normal(64), torch.zeros(3)])
    codes, absmax = quantize_blockwise(w, nf4_levels(), 64)
    assert absmax[0] == absmax[2] == 0
    assert (codes[:64] == 7).all()
    assert torch.equal(dequantize_nf4(quantize_nf4(w), (131,))[:64], torch.zeros(64))


def test_an_outlier_spoils_its_own_block_only():
    w = normal(4, 64)
    codes, absmax = quantize_blockwise(w, nf4_levels(), 64)
    w[1, 5] = 1000
    spoiled, absmax_spoiled = quantize_blockwise(w, nf4_levels(), 64)
    assert torch.equal(spoiled[[0, 2, 3]], codes[[0, 2, 3]])
    assert (absmax_spoiled != absmax).tolist() == [False, True, False, False]
    assert (spoiled[1].long().bincount(minlength=16)[[7, 15]] == torch.tensor([63, 1])).all()


def test_normal_weights_lose_about_a_tenth_and_less_than_with_uniform_steps():
    w = normal(512, 512)

    def error(levels):
        restored = dequantize_blockwise(*quantize_blockwise(w, levels, 64), levels, 64)
        return ((restored - w).norm() / w.norm()).item()

    assert error(nf4_levels()) == pytest.approx(0.092, abs=0.003)
    assert error(nf4_levels()) < 0.95 * error(torch.linspace(-1, 1, 15))  # int4, symmetric


@given(SHAPES, SEEDS)
def test_unpacking_gives_the_codes_back(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-codes.numel() // 2),)
    assert torch.equal(unpack_nibbles(packed, codes.numel()).view(codes.shape), codes)


def test_the_earlier_code_is_the_high_nibble():
    codes = torch.tensor([[0x1, 0x2], [0xF, 0x0], [0xA, 0xB]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [0x12, 0xF0, 0xAB]
    assert pack_nibbles(codes.flatten()[:3]).tolist() == [0x12, 0xF0]
    with pytest.raises(ValueError, match="codes must be at most 15, got 16"):
        pack_nibbles(torch.tensor([16], dtype=torch.uint8))


def test_double_quantization_moves_a_scale_by_less_than_a_hundredth_of_their_spread():
    absmax = normal(1000, 64).abs().amax(1)
    codes, scale, mean = double_quantize(absmax)
    assert codes.dtype == torch.uint8
    assert scale.shape == (4,)
    assert mean.shape == ()
    assert mean.item() == pytest.approx(absmax.mean().item())
    off = (undo_double_quantize(codes, scale, mean) - absmax).abs()
    assert (off <= 0.01 * scale.repeat_interleave(256)[:1000]).all()
    # Centred, they use levels of both signs, which halves the spread.
    assert (codes < 127).float().mean() > 0.3


def test_dynamic_levels_keep_scales_better_than_fp8_and_the_weights_hardly_notice():
    w = normal(512, 512)
    codes, absmax = quantize_blockwise(w, nf4_levels(), 64)
    every_byte = torch.arange(256, dtype=torch.uint8)
    fp8 = every_byte.view(torch.float8_e4m3fn).float()
    fp8 = fp8[fp8.isfinite()].unique() / 448
    centred = absmax - absmax.mean()

    def error(levels):
        restored = dequantize_blockwise(*quantize_blockwise(centred, levels, 256), levels, 256)
        return (restored - centred).norm()

    assert error(dynamic_levels()) < 0.6 * error(fp8)
    once = (dequantize_blockwise(codes, absmax, nf4_levels(), 64) - w).norm()
    twice = (dequantize_nf4(quantize_nf4(w), (512, 512)) - w).norm()
    assert twice < 1.001 * once


def test_the_bits_are_those_of_the_paper_and_of_the_bytes():
    assert nf4_bits() == pytest.approx(4.127, abs=5e-4)
    assert nf4_bits(scale_block_size=None) == 4.5
    for n in (64 * 256, 5 * 64 * 256):
        stored = quantize_nf4(normal(n))
        assert 8 * sum(tensor.nbytes for tensor in stored) == nf4_bits() * n + 32  # and the mean
        codes, absmax = quantize_blockwise(normal(n), nf4_levels(), 64)
        assert 8 * (pack_nibbles(codes).nbytes + absmax.nbytes) == 4.5 * n


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_are_taken_and_left_alone(dtype):
    w = normal(3, 50).to(dtype)
    before = w.clone()
    restored = dequantize_nf4(quantize_nf4(w), (3, 50))
    assert restored.dtype == torch.float32
    assert torch.equal(restored, dequantize_nf4(quantize_nf4(w.float()), (3, 50)))
    assert torch.equal(w, before)
    assert quantize_blockwise(w.requires_grad_(), nf4_levels(), 64)[1].grad_fn is None


def test_what_cannot_be_quantized_is_refused():
    levels = nf4_levels()
    with pytest.raises(ValueError, match="x must be finite and not empty"):
        quantize_blockwise(torch.tensor([1.0, float("nan")]), levels, 64)
    with pytest.raises(ValueError, match="x must be finite and not empty"):
        quantize_blockwise(torch.zeros(0), levels, 64)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        quantize_blockwise(torch.tensor([1]), levels, 64)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        quantize_blockwise(torch.ones(2), levels, 0)
    with pytest.raises(TypeError, match="absmax must be a floating-point tensor"):
        double_quantize(torch.tensor([1]))
    codes = torch.zeros(65, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"absmax must have shape \(2,\) for 65 codes"):
        dequantize_blockwise(codes, torch.ones(1), levels, 64)


def test_bitsandbytes_has_the_same_levels():
    functional = pytest.importorskip("bitsandbytes").functional
    theirs = functional.get_4bit_type("nf4", device="cpu")
    assert torch.allclose(nf4_levels(), theirs, rtol=0, atol=1e-6)
    assert torch.allclose(dynamic_levels(), functional.create_dynamic_map(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(64, 128), (256, 200), (3, 7), (1, 64), (130, 2)])
@pytest.mark.parametrize("block_size", [64, 128])
def test_bitsandbytes_stores_the_same_bytes(shape, block_size):
    functional = pytest.importorskip("bitsandbytes").functional
    for seed in range(5):
        w = 0.05 * normal(*shape, seed=seed)
        theirs, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=block_size)
        codes, absmax = quantize_blockwise(w, nf4_levels(), block_size)
        assert torch.equal(unpack_nibbles(theirs.flatten(), w.numel()), codes.flatten())
        assert torch.equal(absmax, state.absmax)
        if w.numel() % 2:  # half of the last byte is left over, theirs to fill
            continue  # and they compile a kernel of their own to read it, which takes a minute
        assert torch.equal(pack_nibbles(codes), theirs.flatten())
        restored = dequantize_blockwise(codes, absmax, nf4_levels(), block_size)
        assert torch.allclose(restored, functional.dequantize_4bit(theirs, state), rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 128), (512, 520), (30, 8)])
def test_bitsandbytes_quantizes_the_scales_the_same_way(shape):
    functional = pytest.importorskip("bitsandbytes").functional
    w = 0.05 * normal(*shape)
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = quantize_nf4(w)
    assert torch.equal(ours.packed, theirs.flatten())
    assert ours.absmax_mean.item() == pytest.approx(state.offset.item())
    assert torch.allclose(ours.absmax_scale, state.state2.absmax, rtol=1e-5)
    # Their mean may be summed in another order, which moves a scale that is nearly a tie.
    apart = (ours.absmax_codes.int() - state.absmax.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01
    restored = dequantize_nf4(ours, shape)
    assert torch.allclose(restored, functional.dequantize_4bit(theirs, state), atol=2e-3)
