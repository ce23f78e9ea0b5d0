import pytest
import torch

from fewer.kernels import int8
from fewer.kernels.int8 import (
    DTYPES,
    dequantize_int8,
    dequantize_int8_reference,
    quantize_int8,
    quantize_int8_reference,
)
from fewer.kernels.interpreter import interpreted, watched

pytestmark = pytest.mark.filterwarnings("ignore:.*it is plain torch:UserWarning")


def run(x: torch.Tensor, group: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale by the kernel, watched where that can be."""
    codes = torch.full(x.shape, 127, dtype=torch.int8, device=x.device)
    scale = torch.full((*x.shape[:-1], x.shape[-1] // group), float("nan"), device=x.device)
    if interpreted():
        with watched({"x": x, "codes": codes, "scale": scale}, seed) as trace:
            int8._launch_quantize(x, codes, scale)
        assert (trace.loads("x") == 1).all()  # one pass
        assert (trace.stores("codes") == 1).all()
    else:
        int8._launch_quantize(x, codes, scale)
    return codes, scale


def reference(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU: on a GPU, torch divides by 127 by multiplying with 1 / 127."""
    codes, scale = quantize_int8_reference(x.cpu(), group)
    return codes.to(x.device), scale.to(x.device)


SHAPES = [((5, 100), 100), ((3, 4, 96), 32), ((2, 5000), 5000), ((130, 64), 64), ((7, 3), 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_codes_and_scale_are_those_of_a_division(
    shape: tuple[int, ...], group: int, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(group)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])
    x[0] = 0
    x = x.to(device, dtype)
    codes, scale = run(x, group)
    wanted_codes, wanted_scale = reference(x, group)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(codes, wanted_codes)
    wanted = (x.double().unflatten(-1, (-1, group)) / scale.double()[..., None]).flatten(-2)
    assert (codes - wanted).abs().max() <= 0.5 + 1e-5
    assert int(codes.min()) >= -127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_dequantized_values_are_codes_times_scale(
    shape: tuple[int, ...], group: int, dtype: torch.dtype, device: str
) -> None:
    codes = torch.randint(-127, 128, shape, device=device).to(torch.int8)
    scale = torch.rand(*shape[:-1], shape[-1] // group, device=device)
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    if interpreted():
        with watched({"codes": codes, "scale": scale, "out": out}, seed=1):
            int8._launch_dequantize(codes, scale, out)
    else:
        int8._launch_dequantize(codes, scale, out)
    assert torch.equal(out, dequantize_int8_reference(codes, scale, dtype))


def test_a_tie_goes_to_the_even_code(device: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]], device=device)
    assert run(x, 8)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_tiny_and_huge_values_use_all_codes(size: float, device: str) -> None:
    x = torch.linspace(-size, size, 255, device=device)[None]
    assert run(x, 255)[0].tolist() == [list(range(-127, 128))]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_gives_nothing(shape: tuple[int, ...], device: str) -> None:
    codes, scale = quantize_int8(torch.empty(shape, device=device))
    assert codes.shape == shape
    assert dequantize_int8(codes, scale, torch.float16).shape == shape


def test_not_contiguous_values_are_found(device: str) -> None:
    x = torch.randn(6, 40, device=device).mT
    codes, scale = quantize_int8(x, 3)
    wanted = reference(x.contiguous(), 3)
    assert torch.equal(codes, wanted[0])
    assert torch.equal(dequantize_int8(codes, scale), dequantize_int8_reference(*wanted, x.dtype))


def test_the_operators_are_good_citizens_of_torch(device: str) -> None:
    x = torch.randn(4, 24, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(int8._quantize_int8, (x, 8), test_utils=checks)
    torch.library.opcheck(
        int8._dequantize_int8, (*quantize_int8(x, 8), torch.float16), test_utils=checks
    )


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 100)
    with pytest.raises(
        TypeError, match=r"x must be float32, float16 or bfloat16, got torch.float64"
    ):
        quantize_int8(x.double())
    with pytest.raises(ValueError, match=r"group must divide the 100 columns of x .* got 64"):
        quantize_int8(x, 64)
    with pytest.raises(ValueError, match="between 1 and 32768, got 40000"):
        quantize_int8(torch.empty(1, 40000))
    codes, scale = quantize_int8(x, 50)
    with pytest.raises(ValueError, match=r"a last dimension that divides 100, got \(4, 3\)"):
        dequantize_int8(codes, torch.ones(4, 3))
    with pytest.raises(TypeError, match="codes must be int8 and scale float32"):
        dequantize_int8(codes, scale.half())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [None, 128])
def test_full_size(group: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(4096, 8192, device="cuda").to(dtype)
    codes, scale = quantize_int8(x, group)
    wanted_codes, wanted_scale = reference(x, group or 8192)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(codes, wanted_codes)
    out = dequantize_int8(codes, scale, dtype)
    assert torch.equal(out, dequantize_int8_reference(codes, scale, dtype))
