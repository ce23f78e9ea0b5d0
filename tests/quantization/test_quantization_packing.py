"""Properties of packed codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.quantization import (
    bits_per_weight,
    pack_codes,
    quantize_per_group,
    stored_bytes,
    unpack_codes,
)

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**32 - 1)
INTEGERS = [torch.int16, torch.int32, torch.int64]


@st.composite
def codes_and_bits(draw):
    bits, signed = draw(BITS), draw(st.booleans())
    low = -(2 ** (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shape = [*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(0, 19))]
    codes = torch.randint(low, low + 2**bits, shape, generator=generator)
    codes = codes.to(draw(st.sampled_from([*INTEGERS, torch.int8 if signed else torch.uint8])))
    if codes.ndim > 1 and codes.numel() and draw(st.booleans()):
        codes = codes.transpose(0, -1)
    return codes, bits, signed


@given(codes_and_bits())
def test_unpacking_gives_the_codes_back(drawn):
    codes, bits, signed = drawn
    n = codes.shape[-1]
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*codes.shape[:-1], -(-n * bits // 8))
    unpacked = unpack_codes(packed, bits, n, signed)
    assert unpacked.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(unpacked.long(), codes.long())


@given(codes_and_bits())
def test_a_row_is_one_little_endian_number(drawn):
    codes, bits, _ = drawn
    packed = pack_codes(codes, bits)
    for row, octets in zip(
        codes.reshape(-1, max(codes.shape[-1], 1)).tolist(),
        packed.reshape(-1, max(packed.shape[-1], 1)).tolist(),
        strict=True,
    ):
        number = sum((code % 2**bits) << (i * bits) for i, code in enumerate(row))
        assert bytes(octets) == number.to_bytes(len(octets), "little")


@given(codes_and_bits())
def test_rows_can_be_packed_alone(drawn):
    codes, bits, _ = drawn
    if codes.ndim == 1:
        codes = codes.unsqueeze(0)
    packed = pack_codes(codes, bits)
    assert torch.equal(packed, torch.stack([pack_codes(row, bits) for row in codes]))


def test_nibbles_and_codes_that_cross_bytes():
    assert pack_codes(torch.tensor([0x1, 0x2, 0xF]), 4).tolist() == [0x21, 0x0F]
    assert pack_codes(torch.tensor([3, 0, 1, 2]), 2).tolist() == [0b10_01_00_11]
    assert pack_codes(torch.tensor([0, 0, 0b101]), 3).tolist() == [0b01_000_000, 0b1]
    assert pack_codes(torch.tensor([-1, -8, 7]), 4).tolist() == [0x8F, 0x07]
    assert pack_codes(torch.tensor([-1, -128]), 8).tolist() == [255, 128]


@pytest.mark.parametrize("bits", range(2, 9))
def test_true_bits_are_the_nominal_ones_plus_the_scales(bits):
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    codes, scale, zero_point = quantize_per_group(w, bits, 64, symmetric=False)
    packed = pack_codes(codes, bits)
    assert stored_bytes(packed) == w.numel() * bits // 8
    assert bits_per_weight(w.numel(), packed, scale.half()) == bits + 16 / 64
    packed_zeros = pack_codes(zero_point, bits)  # 4 zero-points a row
    padded = -(-4 * bits // 8) * 8 / 256
    total = bits_per_weight(w.numel(), packed, scale.half(), packed_zeros)
    assert total == pytest.approx(bits + 16 / 64 + padded)


def test_ragged_rows_cost_their_padding():
    packed = pack_codes(torch.zeros(10, 3, dtype=torch.uint8), 3)  # 9 bits fill 2 bytes
    assert stored_bytes(packed) == 20
    assert bits_per_weight(30, packed, None) == pytest.approx(160 / 30)


def test_packing_leaves_its_input_alone():
    codes = torch.tensor([[-1, 3], [2, -4]], dtype=torch.int8)
    before = codes.clone()
    pack_codes(codes, 3)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(
    ("codes", "bits", "error", "message"),
    [
        (torch.tensor([16]), 4, ValueError, "codes must lie between -8 and 15, got 16"),
        (torch.tensor([-9]), 4, ValueError, "codes must lie between -8 and 15, got -9"),
        (torch.tensor([-1, 8]), 4, ValueError, "or all between -8 and 7, got -1 to 8"),
        (torch.tensor(3), 4, ValueError, "codes must have at least one dimension"),
        (torch.tensor([1.0]), 4, TypeError, "codes must be an integer tensor, got torch.float32"),
        (torch.tensor([True]), 4, TypeError, "codes must be an integer tensor, got torch.bool"),
        (torch.tensor([1]), 9, ValueError, "bits must be between 2 and 8, got 9"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, bits, error, message):
    with pytest.raises(error, match=message):
        pack_codes(codes, bits)


def test_bytes_that_do_not_fit_are_refused():
    packed = torch.zeros(2, 3, dtype=torch.uint8)
    assert unpack_codes(packed, 4, 5, signed=False).shape == (2, 5)
    with pytest.raises(ValueError, match="packed must have 4 bytes a row for 7 codes of 4 bits"):
        unpack_codes(packed, 4, 7, signed=False)
    with pytest.raises(TypeError, match=r"packed must be a uint8 tensor, got torch\.int8"):
        unpack_codes(packed.to(torch.int8), 4, 5, signed=False)
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        unpack_codes(packed, 4, -1, signed=False)
    with pytest.raises(ValueError, match="weights must be at least 1, got 0"):
        bits_per_weight(0, packed)
