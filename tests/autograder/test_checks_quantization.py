"""What is special to the exercises of lab 1; what holds for all is in test_every_exercise.py."""

import math
import re

import pytest
import torch
from judged import lost, points_of

import autograder.judge
from autograder.candidate import Local
from autograder.exercise import exercises
from autograder.judge import judge
from fewer.quantization import (
    clip_by_mse,
    decode_minifloat,
    matmul_int8,
    pack_codes,
    quantize_asymmetric,
    quantize_per_group,
    quantize_symmetric,
    sqnr,
)


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few steps towards the simplest counter-example are enough here."""
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)


# --- mistakes that are no misconception: nobody would make them, or nobody would need a tutor ----


def in_half_precision(x, bits=8, dim=None, clip=None):
    codes, scale = quantize_symmetric(x, bits, dim, clip)
    return codes, scale.to(x.dtype).float()


def only_contiguous(x, bits=8, dim=None, clip=None):
    x.view(-1)
    return quantize_symmetric(x, bits, dim, clip)


def never_widens_by_a_clip(x, bits=8, dim=None, clip=None):
    absmax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    clip = absmax if clip is None else torch.minimum(absmax, torch.as_tensor(clip))
    return quantize_symmetric(x, bits, dim, clip)


def negative_dims_are_rows(x, bits=8, dim=None, clip=None):
    return quantize_symmetric(x, bits, None if dim is None else max(dim, 0), clip)


def zero_is_nearly_zero(x, bits=8, dim=None):
    codes, scale, zero_point = quantize_asymmetric(x, bits, dim)
    return codes, scale, (zero_point - 1).clamp(min=0)


def full_range(x, bits=8, dim=None):
    return quantize_asymmetric(x, 8, dim)


def mean_of_decibels(x, x_hat):
    if x.dim() < 2:
        return sqnr(x, x_hat)
    parts = [sqnr(a, b) for a, b in zip(x, x_hat, strict=True)]
    return sum(parts) / len(parts)


def always_symmetric(w, bits=4, group_size=64, symmetric=True):
    codes, scale, _ = quantize_per_group(w, bits, group_size)
    return codes, scale, None if symmetric else torch.zeros(scale.shape, dtype=torch.int32)


def groups_of_128_by_default(w, bits=4, group_size=128, symmetric=True):
    return quantize_per_group(w, bits, group_size, symmetric)


def eight_bits_by_default(w, bits=8, group_size=64, symmetric=True):
    return quantize_per_group(w, bits, group_size, symmetric)


def flat(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return decode_minifloat(codes, exponent_bits, mantissa_bits, specials).flatten()


def positive_zero(codes, exponent_bits, mantissa_bits, specials="ieee"):
    return decode_minifloat(codes, exponent_bits, mantissa_bits, specials) + 0.0


def ten_thresholds(x, bits, steps=10):
    return clip_by_mse(x, bits, steps)


def at_eight_bits(x, bits, steps=100):
    return clip_by_mse(x, 8 if 1 < bits < 9 else bits, steps)


def first_token_only(x_codes, x_scale, w_codes, w_scale):
    y = matmul_int8(x_codes, x_scale, w_codes, w_scale)
    return y[:1].expand_as(y)


def first_row_only(codes, bits):
    packed = pack_codes(codes, bits)
    return packed if packed.dim() == 1 else packed[:1].expand_as(packed)


UNLISTED = [
    (quantize_symmetric, in_half_precision),
    (quantize_symmetric, only_contiguous),
    (quantize_symmetric, never_widens_by_a_clip),
    (quantize_symmetric, negative_dims_are_rows),
    (quantize_asymmetric, zero_is_nearly_zero),
    (quantize_asymmetric, full_range),
    (sqnr, mean_of_decibels),
    (quantize_per_group, always_symmetric),
    (quantize_per_group, groups_of_128_by_default),
    (quantize_per_group, eight_bits_by_default),
    (decode_minifloat, flat),
    (decode_minifloat, positive_zero),
    (clip_by_mse, ten_thresholds),
    (clip_by_mse, at_eight_bits),
    (matmul_int8, first_token_only),
    (pack_codes, first_row_only),
]


@pytest.mark.parametrize(("reference", "wrong"), UNLISTED, ids=[f.__name__ for _, f in UNLISTED])
def test_other_wrong_work_fails_too(reference, wrong):
    exercise = exercises()[reference.__name__]
    assert sum(points_of(exercise, wrong).values()) < exercise.points


# --- one mistake costs one check -----------------------------------------------------------------


def test_codes_of_another_integer_type_cost_the_storage_check_alone():
    def symmetric(x, bits=8, dim=None, clip=None):
        codes, scale = quantize_symmetric(x, bits, dim, clip)
        return codes.to(torch.int32), scale

    def asymmetric(x, bits=8, dim=None):
        codes, scale, zero_point = quantize_asymmetric(x, bits, dim)
        return codes.float(), scale, zero_point

    def packed(codes, bits):
        return pack_codes(codes, bits).long()

    assert lost(quantize_symmetric, symmetric) == ["codes_are_stored_as_int8"]
    assert lost(quantize_asymmetric, asymmetric) == ["codes_are_stored_as_uint8"]
    assert lost(pack_codes, packed) == ["the_bytes_are_real_bytes"]


def test_a_missing_refusal_costs_the_refusals_alone_and_is_not_misdiagnosed():
    def trusting(x, bits=8, dim=None, clip=None):
        x, largest = x.detach().float(), 2 ** (bits - 1) - 1
        absmax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
        alpha = absmax if clip is None else torch.as_tensor(clip, dtype=torch.float32)
        scale = torch.where(alpha == 0, 1.0, alpha / largest)
        return torch.round(x.clamp(-alpha, alpha) / scale).to(torch.int8), scale

    verdict = judge(exercises()["quantize_symmetric"], Local(trusting))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert [result.check for result in failed] == ["what_cannot_be_quantized_is_refused"]
    assert failed[0].misconception == ""


def test_a_wrong_rounding_does_not_make_the_scale_wrong():
    def upwards(x, bits=8, dim=None, clip=None):
        codes, scale = quantize_symmetric(x, bits, dim, clip)
        if not codes.any():
            return codes, scale
        above = torch.ceil(x.detach().float() / scale).clamp(
            -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
        )
        return torch.maximum(codes, above.to(torch.int8)), scale

    assert lost(quantize_symmetric, upwards) == ["every_value_gets_the_nearest_code"]


def test_the_bits_of_a_wrong_byte_are_shown():
    def reversed_bits(codes, bits):
        packed = pack_codes(codes, bits)
        swapped = [int(f"{byte:08b}"[::-1], 2) for byte in packed.flatten().tolist()]
        return torch.tensor(swapped, dtype=torch.uint8).reshape(packed.shape)

    verdict = judge(exercises()["pack_codes"], Local(reversed_bits))
    assert re.search(r"byte \d is [01]{8}, expected [01]{8}", verdict.first_failure.failure.message)


def test_a_wrong_number_is_shown_with_its_bits():
    def doubled(codes, exponent_bits, mantissa_bits, specials="ieee"):
        return 2 * decode_minifloat(codes, exponent_bits, mantissa_bits, specials)

    worst = judge(exercises()["decode_minifloat"], Local(doubled)).first_failure
    assert re.match(r"[01] [01]+ [01]+ \(sign exponent mantissa\)", worst.failure.message)
    assert math.isfinite(float(worst.failure.message.split()[-1]))
