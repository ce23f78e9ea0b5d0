"""The exercises of lab 1 tell right from wrong: all correct styles pass, every known mistake is
caught and named, and what the student reads is fit to be read."""

import math
import re

import pytest
import torch

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

LAB = [e for e in exercises().values() if e.topic == "quantization"]
NAMES = [e.name for e in LAB]


def every(part):
    """All misconceptions or variants, each with its exercise, as test parameters."""
    return [
        pytest.param(e, item, id=f"{e.name}-{item.name}") for e in LAB for item in getattr(e, part)
    ]


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few steps towards the simplest counter-example are enough here."""
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)


def points_of(exercise, function, seed=0):
    verdict = judge(exercise, Local(function), seed, explain=False)
    return {result.check: result.earned for result in verdict.results}


def test_the_lab_has_its_eight_exercises_in_order():
    assert NAMES == [
        "decode_minifloat",
        "quantize_symmetric",
        "quantize_asymmetric",
        "sqnr",
        "quantize_per_group",
        "clip_by_mse",
        "matmul_int8",
        "pack_codes",
    ]


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_an_exercise_is_of_the_agreed_size(exercise):
    assert 5 <= exercise.points <= 10
    assert 3 <= len(exercise.checks) <= 6
    assert all(1 <= check.points <= 3 for check in exercise.checks)
    assert len(exercise.misconceptions) >= 3
    assert exercise.variants


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_the_reference_gets_full_points(exercise):
    for seed in (0, 1):
        verdict = judge(exercise, Local(exercise.reference), seed)
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize(("exercise", "variant"), every("variants"))
def test_a_correct_variant_gets_full_points(exercise, variant):
    for seed in (0, 1):
        verdict = judge(exercise, Local(variant.function), seed)
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize(("exercise", "misconception"), every("misconceptions"))
def test_a_misconception_is_caught_and_called_by_its_name(exercise, misconception):
    verdict = judge(exercise, Local(misconception.function), seed=1)
    failed = [result for result in verdict.results if result.status == "failed"]
    assert failed, "no check fails"
    assert {result.misconception for result in failed} == {misconception.name}
    assert verdict.first_failure.diagnosis == misconception.says


@pytest.mark.parametrize(("exercise", "misconception"), every("misconceptions"))
def test_a_misconception_keeps_the_points_it_has_nothing_to_do_with(exercise, misconception):
    earned = points_of(exercise, misconception.function)
    assert earned[exercise.checks[-1].name] == 1, "bad input is refused all the same"
    assert sum(earned.values()) < exercise.points


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_the_verdict_shows_the_call_the_result_and_the_hint(exercise):
    mistake = exercise.misconceptions[0]
    verdict = judge(exercise, Local(mistake.function))
    worst = verdict.first_failure
    assert worst.failure.call.startswith(f"{exercise.name}(")
    assert worst.failure.got
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", str(verdict)).split())
    for part in (worst.statement, worst.hint, mistake.says, worst.failure.message):
        assert " ".join(part.split()) in text
    assert "when called as:" in text
    assert "your result:" in text


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_whatever_a_student_reads_is_whole_sentences(exercise):
    texts = [check.statement for check in exercise.checks]
    texts += [check.hint for check in exercise.checks]
    texts += [misconception.says for misconception in exercise.misconceptions]
    for text in texts:
        assert text[0].isupper(), text
        assert text.endswith((".", "?"))
        assert "  " not in text
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_no_hint_holds_code_of_the_solution(exercise):
    source = exercise.source()
    lines = [line.strip() for line in source.split('"""')[-1].splitlines() if len(line.strip()) > 8]
    for check in exercise.checks:
        assert not re.search(r"torch\.|\w\(|\.T\b|>>|<<|return ", check.hint), check.hint
        assert not any(line in check.hint for line in lines)


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


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_returning_the_input_or_nothing_earns_nothing_but_pity(exercise):
    def echo(*args, **kwargs):
        return args[0]

    def nothing(*args, **kwargs):
        return None

    for lazy in (echo, nothing):
        assert sum(points_of(exercise, lazy).values()) <= 1


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_an_unwritten_stub_is_to_do_and_not_wrong(exercise):
    def stub(*args, **kwargs):
        raise NotImplementedError

    assert judge(exercise, Local(stub)).todo


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_refusing_everything_earns_only_the_refusals(exercise):
    def refuses(*args, **kwargs):
        raise ValueError("no")

    assert sum(points_of(exercise, refuses).values()) == exercise.checks[-1].points == 1


# --- one mistake costs one check -----------------------------------------------------------------


def lost(reference, function):
    """The names of the checks that ``function`` fails."""
    earned = points_of(exercises()[reference.__name__], function)
    return [name for name, points in earned.items() if not points]


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
