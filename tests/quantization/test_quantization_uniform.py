"""Properties of `fewer.quantization.uniform`, and its agreement with torch and torchao."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.quantization import dequantize, quantize_asymmetric, quantize_symmetric

SEEDS = st.integers(0, 2**32 - 1)
BITS = st.integers(2, 8)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
KINDS = ("normal", "zeros", "constant", "ties", "outlier", "positive", "negative", "small", "mixed")


@st.composite
def tensors(draw, min_ndim=0):
    """Seeds, shapes and kinds rather than lists of floats: small to print, quick to shrink."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shape = draw(st.lists(st.integers(1, 6), min_size=min_ndim, max_size=3))
    x = torch.randn(shape, generator=generator)
    match draw(st.sampled_from(KINDS)):
        case "zeros":
            x = torch.zeros(shape)
        case "constant":
            x = torch.full(shape, draw(st.sampled_from([-3.0, -0.1, 0.7, 5.0])))
        case "ties":
            x = torch.randint(-14, 15, shape, generator=generator) / 2
        case "outlier":
            x.view(-1)[0] = 300.0
        case "positive":
            x = x.abs() + 0.01
        case "negative":
            x = -x.abs() - 0.01
        case "small":
            x = x * 1e-4
        case "mixed" if x.ndim:
            x[0] = 0.0
    x = x.to(draw(DTYPES))
    return x.transpose(0, -1) if x.ndim > 1 and draw(st.booleans()) else x


@st.composite
def tensors_and_dim(draw):
    x = draw(tensors())
    return x, draw(st.sampled_from([None, *range(-x.ndim, x.ndim)]))


def slack(x: torch.Tensor) -> float:
    """Room for the rounding of x / scale and of scale * code themselves."""
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return 4 * eps * x.double().abs().max().item()


@given(tensors_and_dim(), BITS)
def test_symmetric_error_is_at_most_half_a_step(drawn, bits):
    x, dim = drawn
    codes, scale = quantize_symmetric(x, bits, dim)
    error = (dequantize(codes, scale).double() - x.double()).abs()
    assert (error <= scale.double() / 2 + slack(x)).all()


@given(tensors_and_dim(), BITS)
def test_asymmetric_error_is_at_most_half_a_step(drawn, bits):
    x, dim = drawn
    codes, scale, zero_point = quantize_asymmetric(x, bits, dim)
    error = (dequantize(codes, scale, zero_point).double() - x.double()).abs()
    assert (error <= scale.double() / 2 + slack(x)).all()


@given(tensors_and_dim(), BITS)
def test_symmetric_codes_stay_in_the_restricted_range_and_reach_its_end(drawn, bits):
    x, dim = drawn
    codes, scale = quantize_symmetric(x, bits, dim)
    largest = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert scale.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    reached = codes.abs().amax() if dim is None else codes.abs().amax(dim, keepdim=True)
    assert scale.shape == reached.shape
    assert set(reached.flatten().tolist()) <= {0, largest}
    absmax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    assert ((reached == 0) == (absmax == 0)).all()
    assert (scale[absmax == 0] == 1).all()


@given(tensors_and_dim(), BITS)
def test_asymmetric_codes_span_the_whole_range(drawn, bits):
    x, dim = drawn
    codes, scale, zero_point = quantize_asymmetric(x, bits, dim)
    largest = 2**bits - 1
    assert codes.dtype == torch.uint8
    assert zero_point.dtype == torch.int32
    assert codes.shape == x.shape
    assert zero_point.shape == scale.shape
    with_zero = torch.cat([codes.reshape(-1), zero_point.reshape(-1).to(torch.uint8)])
    assert int(with_zero.max()) <= largest
    low, high = torch.aminmax(codes.int(), dim=dim, keepdim=dim is not None)
    low, high = torch.minimum(low, zero_point), torch.maximum(high, zero_point)
    empty = torch.aminmax(x.abs(), dim=dim, keepdim=dim is not None).max == 0
    # One code may be lost to the rounding of the zero-point, where both ends fall on a tie.
    assert (((high - low) >= largest - 1) | empty).all()
    assert (scale[empty] == 1).all()
    assert (zero_point[empty] == 0).all()


@given(tensors_and_dim(), BITS)
def test_zero_comes_back_as_exactly_zero(drawn, bits):
    x, dim = drawn
    x = x.masked_fill(torch.arange(x.numel()).reshape(x.shape) % 2 == 0, 0)
    for restored in (
        dequantize(*quantize_symmetric(x, bits, dim)),
        dequantize(*quantize_asymmetric(x, bits, dim)),
    ):
        assert (restored[x == 0] == 0).all()


@given(tensors_and_dim(), BITS)
def test_symmetric_quantization_commutes_with_a_change_of_sign(drawn, bits):
    x, dim = drawn
    codes, scale = quantize_symmetric(x, bits, dim)
    mirrored, same_scale = quantize_symmetric(-x, bits, dim)
    assert torch.equal(mirrored, -codes)
    assert torch.equal(same_scale, scale)


@given(tensors(), BITS)
def test_larger_numbers_never_get_smaller_codes(x, bits):
    order = x.reshape(-1).argsort()
    for codes in (quantize_symmetric(x, bits)[0], quantize_asymmetric(x, bits)[0]):
        assert (codes.reshape(-1)[order].int().diff() >= 0).all()


@given(tensors(min_ndim=1), BITS, st.data())
def test_a_slice_is_quantized_as_if_it_were_alone(x, bits, data):
    dim = data.draw(st.integers(0, x.ndim - 1))
    for quantize in (quantize_symmetric, quantize_asymmetric):
        together = [part.movedim(dim, -1) for part in quantize(x, bits, dim)]
        rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
        for i, row in enumerate(rows):
            alone = quantize(row, bits)
            assert torch.equal(together[0].reshape(rows.shape)[i], alone[0])
            for parameter, expected in zip(together[1:], alone[1:], strict=True):
                assert parameter.reshape(-1)[i] == expected


@given(tensors(), BITS)
def test_quantizing_twice_changes_nothing(x, bits):
    codes, scale = quantize_symmetric(x, bits)
    assert torch.equal(quantize_symmetric(dequantize(codes, scale), bits)[0], codes)


@given(BITS, SEEDS)
def test_every_code_survives_a_round_trip(bits, seed):
    step = 2.0 ** (seed % 20 - 10)
    largest = 2 ** (bits - 1) - 1
    codes = torch.arange(-largest, largest + 1)
    assert torch.equal(quantize_symmetric(codes * step, bits)[0], codes.to(torch.int8))
    zero_point = seed % 2**bits
    codes = torch.arange(2**bits)
    stored, scale, found = quantize_asymmetric((codes - zero_point) * step, bits)
    assert torch.equal(stored, codes.to(torch.uint8))
    assert (scale.item(), found.item()) == (step, zero_point)


def test_ties_go_to_the_even_code():
    x = torch.tensor([-7.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.0])
    assert quantize_symmetric(x, 4)[0].tolist() == [-7, -2, -2, 0, 0, 2, 2, 7]
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 15.0])
    assert quantize_asymmetric(x, 4)[0].tolist() == [0, 0, 2, 2, 15]


@given(tensors(), BITS, st.floats(0.01, 2.0))
def test_a_clip_replaces_the_maximum_and_saturates(x, bits, share):
    alpha = max(share * x.abs().max().item(), 1e-3)
    codes, scale = quantize_symmetric(x, bits, clip=alpha)
    largest = 2 ** (bits - 1) - 1
    torch.testing.assert_close(scale.item(), alpha / largest, rtol=1e-6, atol=0)
    assert (codes[x.double() >= alpha * (1 + 1e-6)] == largest).all()
    assert (codes[x.double() <= -alpha * (1 + 1e-6)] == -largest).all()
    inside = x.double().abs() <= alpha
    error = (dequantize(codes, scale).double() - x.double()).abs()[inside]
    assert (error <= scale.double() / 2 + 1e-6 * alpha).all()


def test_a_clip_may_be_given_for_each_slice():
    x = torch.tensor([[1.0, 4.0], [10.0, -40.0]])
    codes, scale = quantize_symmetric(x, 4, dim=-1, clip=torch.tensor([[1.0], [20.0]]))
    assert codes.tolist() == [[7, 7], [4, -7]]
    torch.testing.assert_close(scale, torch.tensor([[1 / 7], [20 / 7]]))
    per_slice = quantize_symmetric(x, 4, dim=-1, clip=7.0)[1]
    assert per_slice.tolist() == [[1.0], [1.0]]


def test_a_clip_of_zero_gives_zeros():
    codes, scale = quantize_symmetric(torch.tensor([1.0, -2.0]), clip=0.0)
    assert codes.tolist() == [0, 0]
    assert scale == 1


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -1e-30, 1e30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_comes_back_as_itself(value, bits):
    x = torch.full((3,), value)
    torch.testing.assert_close(dequantize(*quantize_symmetric(x, bits)), x, rtol=1e-6, atol=0)
    codes, scale, zero_point = quantize_asymmetric(x, bits)
    torch.testing.assert_close(dequantize(codes, scale, zero_point), x, rtol=1e-6, atol=0)
    assert zero_point == (0 if value > 0 else 2**bits - 1)


@pytest.mark.parametrize("tiny", [1e-45, 1e-43, 2.6e-43, 1e-39])
def test_numbers_too_small_for_a_scale_become_zero(tiny):
    x = torch.tensor([tiny, -tiny])
    assert dequantize(*quantize_symmetric(x)).tolist() == [0, 0]
    assert dequantize(*quantize_asymmetric(x)).tolist() == [0, 0]


def test_the_largest_floats_do_not_overflow():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([-largest, 0.0, largest])
    assert quantize_symmetric(x)[0].tolist() == [-127, 0, 127]
    with pytest.raises(ValueError, match="the range of x must be finite"):
        quantize_asymmetric(x)


def test_float64_is_kept_precise():
    x = torch.linspace(-1, 1, 255, dtype=torch.float64) * (1 + 1e-12)
    codes, scale = quantize_symmetric(x)
    torch.testing.assert_close(dequantize(codes, scale), x, rtol=0, atol=1e-15)


@given(tensors_and_dim(), BITS)
def test_the_input_is_left_alone_and_no_gradient_is_kept(drawn, bits):
    x, dim = drawn
    before = x.clone()
    x.requires_grad_()
    for parts in (quantize_symmetric(x, bits, dim), quantize_asymmetric(x, bits, dim)):
        assert not any(part.requires_grad for part in parts)
    assert torch.equal(x.detach(), before)


def test_dequantize_lets_a_gradient_into_the_scale():
    scale = torch.tensor(0.5, requires_grad=True)
    dequantize(torch.tensor([3, -1]), scale).sum().backward()
    assert scale.grad == 2


def test_dequantize_does_not_wrap_below_the_zero_point():
    codes, zero_point = torch.tensor([0, 255], dtype=torch.uint8), torch.tensor(200).to(torch.uint8)
    assert dequantize(codes, torch.tensor(1.0), zero_point).tolist() == [-200, 55]
    half = dequantize(codes, torch.tensor(1.0, dtype=torch.float16), zero_point)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("quantize", [quantize_symmetric, quantize_asymmetric])
@pytest.mark.parametrize(
    ("x", "bits", "error", "message"),
    [
        (torch.tensor([1.0, float("nan")]), 8, ValueError, "x must be finite, got 1 NaN"),
        (torch.tensor([1.0, -float("inf")]), 8, ValueError, "x must be finite, got 0 NaN and 1"),
        (torch.zeros(0, 3), 8, ValueError, "x must have at least one element"),
        (torch.tensor([1, 2]), 8, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ([1.0, 2.0], 8, TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(2), 1, ValueError, "bits must be between 2 and 8, got 1"),
        (torch.ones(2), 9, ValueError, "bits must be between 2 and 8, got 9"),
        (torch.ones(2), 4.0, TypeError, "bits must be an int, got 4.0"),
        (torch.ones(2), True, TypeError, "bits must be an int, got True"),
    ],
)
def test_bad_input_is_refused_by_name(quantize, x, bits, error, message):
    with pytest.raises(error, match=message):
        quantize(x, bits)


@pytest.mark.parametrize("quantize", [quantize_symmetric, quantize_asymmetric])
def test_a_dimension_that_is_not_there_is_refused(quantize):
    with pytest.raises(IndexError):
        quantize(torch.ones(2, 3), dim=2)


@pytest.mark.parametrize("clip", [-1.0, float("nan"), float("inf"), torch.ones(3), torch.ones(0)])
def test_a_bad_clip_is_refused_by_name(clip):
    with pytest.raises(ValueError, match="clip must"):
        quantize_symmetric(torch.ones(2, 2), dim=-1, clip=clip)


def test_dequantize_refuses_floating_codes_and_integer_scales():
    with pytest.raises(TypeError, match="codes must be an integer tensor"):
        dequantize(torch.tensor([1.0]), torch.tensor(1.0))
    with pytest.raises(TypeError, match="scale must be a floating-point tensor"):
        dequantize(torch.tensor([1]), torch.tensor(1))
    with pytest.raises(TypeError, match="zero_point must be an integer tensor"):
        dequantize(torch.tensor([1]), torch.tensor(1.0), torch.tensor(0.5))


# Peers. Codes may differ by one where x / scale sits on a tie within the rounding of a float.


@settings(max_examples=50)
@given(SEEDS, st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from(["tensor", "row"]))
def test_parameters_and_codes_equal_those_of_torchao(seed, bits, symmetric, granularity):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    mapping = primitives.MappingType
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) + (0 if symmetric else 1)
    dim, block = (None, (6, 16)) if granularity == "tensor" else (-1, (1, 16))
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        kind, low, high = mapping.SYMMETRIC_NO_CLIPPING_ERR, -largest, largest
        target = torch.int8
        codes, scale = quantize_symmetric(x, bits, dim)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        kind, low, high, target = mapping.ASYMMETRIC, 0, 2**bits - 1, torch.uint8
        codes, scale, zero_point = quantize_asymmetric(x, bits, dim)
    their_scale, their_zero = primitives.choose_qparams_affine(
        x, kind, block, target, low, high, eps=1e-12, scale_dtype=torch.float32
    )
    torch.testing.assert_close(their_scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(their_zero.flatten().int(), zero_point.flatten())
    theirs = primitives.quantize_affine(x, block, their_scale, their_zero, target, low, high)
    difference = (theirs.int() - codes.int()).abs()
    position = (x / scale).frac().abs()
    assert (difference[(position - 0.5).abs() > 1e-4] == 0).all()
    assert difference.max() <= 1


@settings(max_examples=50)
@given(SEEDS, BITS)
def test_round_trip_equals_the_fake_quantize_of_torch(seed, bits):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) - 0.5
    codes, scale, zero_point = quantize_asymmetric(x, bits)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 2**bits - 1)
    far_from_tie = ((x / scale).frac().abs() - 0.5).abs() > 1e-4
    ours = dequantize(codes, scale, zero_point)
    torch.testing.assert_close(ours[far_from_tie], theirs[far_from_tie], rtol=1e-6, atol=1e-7)


@settings(max_examples=50)
@given(SEEDS)
def test_parameters_equal_those_of_the_min_max_observer_of_torch(seed):
    observers = pytest.importorskip("torch.ao.quantization.observer")
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)) + 0.3
    observer = observers.PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=255
    )
    observer(x)
    their_scale, their_zero = observer.calculate_qparams()
    _, scale, zero_point = quantize_asymmetric(x, 8, dim=-1)
    torch.testing.assert_close(their_scale, scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(their_zero.int(), zero_point.flatten())
