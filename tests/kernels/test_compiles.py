"""Every kernel of the library compiles for an H100, with no GPU: Triton's wheel brings ptxas.

The interpreter takes Python that the compiler does not. Here each kernel is compiled with the types
and constants that its launcher gives it, in a process of its own, since a process either interprets
kernels or compiles them. To read what came out:

    TRITON_INTERPRET=0 python tests/kernels/test_compiles.py fewer.kernels.w4a16 out/

writes the PTX, the cubin and what ptxas says for every kernel of that module to out/. The suite
compiles each kernel once; with FEWER_COMPILE_ALL=1 in every way that is listed.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.xdist_group("compiled")  # one process compiles them all


class Compiled(NamedTuple):
    """One way to compile a kernel."""

    module: str
    kernel: str
    # Types of the arguments that are no constants, "*bf16" a pointer; ":16" says divisible by 16.
    signature: dict[str, str]
    constants: dict[str, Any]  # UNPACK: the module whose function it is
    options: dict[str, int]  # num_warps, num_stages

    @property
    def label(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        kind = next(iter(self.signature.values())).strip("*").removesuffix(":16")
        return f"{self.module.split('.')[-1]}.{self.kernel} {kind} {constants}"


WEIGHT_ONLY = {
    "x_ptr": "*bf16:16",
    "packed_ptr": "*i16:16",
    "scale_ptr": "*bf16:16",
    "out_ptr": "*bf16:16",
    "partial_ptr": "*fp32:16",
    "counter_ptr": "*i32:16",
    "m": "i32",
    "n": "i32:16",
    "k": "i32:16",
    "stride_x": "i32:16",
    "stride_w": "i32:16",
}

HALF = {"x_ptr": "*fp16:16", "scale_ptr": "*fp16:16", "out_ptr": "*fp16:16"}


def _weight_only(module: str, tiles: str, stages: int = 3, **others: Any) -> Compiled:
    """`tiles`: GROUP WIDTH TILE BLOCK_N BLOCK_M SPLIT num_warps."""
    names = ("GROUP", "WIDTH", "TILE", "BLOCK_N", "BLOCK_M", "SPLIT", "num_warps")
    values = dict(zip(names, map(int, tiles.split()), strict=True))
    options = {"num_warps": values.pop("num_warps"), "num_stages": stages}
    types = {n: t for n, t in others.items() if n.endswith("_ptr") and t is not None}
    constants = {n: v for n, v in others.items() if n not in types}
    constants = {**values, "EVEN": True, "ASM": True, **constants}
    constants |= {"SLICES": 2 if module == "w8a16" else 4, "UNPACK": f"fewer.kernels.{module}"}
    if "zero_ptr" not in types:
        constants |= {"zero_ptr": None, "sums_ptr": None}
    return Compiled(
        "fewer.kernels.w4a16", "packed_kernel", {**WEIGHT_ONLY, **types}, constants, options
    )


def _nf4(tiles: str, **others: Any) -> Compiled:
    """`tiles`: WIDTH TILE BLOCK_N BLOCK_M SPLIT num_warps."""
    made = _weight_only("nf4", f"0 {tiles}", **others)
    types = {
        **{n: t for n, t in made.signature.items() if n != "scale_ptr"},
        "codes_ptr": "*u8:16",
        "outer_ptr": "*fp32:16",
        "mean_ptr": "*fp32:16",
        "levels_ptr": made.signature["x_ptr"],
        "dynamic_ptr": "*fp32:16",
    }
    absent = ("GROUP", "EVEN", "SLICES", "UNPACK", "zero_ptr", "sums_ptr")
    constants = {n: v for n, v in made.constants.items() if n not in absent}
    return made._replace(
        module="fewer.kernels.nf4", kernel="_kernel", signature=types, constants=constants
    )


def _int8(kernel: str, kind: str, group: int, width: int, rows: int, warps: int = 4) -> Compiled:
    types = {
        "_quantize_kernel": ("x_ptr", "codes_ptr"),
        "_dequantize_kernel": ("out_ptr", "codes_ptr"),
    }
    x, codes = types[kernel]
    return Compiled(
        "fewer.kernels.int8",
        kernel,
        {x: kind, codes: "*i8:16", "scale_ptr": "*fp32:16", "groups": "i32"},
        {"GROUP": group, "WIDTH": width, "ROWS": rows},
        {"num_warps": warps, "num_stages": 3},
    )


KERNELS: list[Compiled] = [
    _weight_only("w4a16", "128 128 128 64 8 4 4"),
    _weight_only("w4a16", "64 64 64 64 16 4 4"),
    _weight_only("w4a16", "32 32 32 128 64 1 8"),
    _weight_only(
        "w4a16", "128 128 64 64 8 4 4", zero_ptr="*u8:16", sums_ptr="*fp32:16", EVEN=False
    ),
    _weight_only("w4a16", "128 128 128 64 8 4 4", ASM=False),
    _weight_only("w4a16", "128 128 32 128 64 1 8", zero_ptr="*u8:16", sums_ptr="*fp32:16"),
    _weight_only(
        "w4a16",
        "128 128 128 64 8 4 4",
        **HALF,
    ),
    _int8("_quantize_kernel", "*bf16:16", 4096, 4096, 1),
    _int8("_quantize_kernel", "*fp32:16", 14336, 16384, 1, warps=16),
    _int8("_dequantize_kernel", "*fp16:16", 96, 128, 32),
    _weight_only("w8a16", "128 128 128 64 8 4 4"),
    _weight_only("w8a16", "32 32 32 128 64 1 8", EVEN=False),
    _weight_only("w8a16", "1073741824 128 64 64 16 4 4", **HALF),
    _nf4("64 64 64 8 4 4"),
    _nf4("64 32 128 64 1 8"),
    _nf4("32 32 64 16 4 4", **HALF),
    _nf4("64 64 64 8 4 4", ASM=False),
]


def _simple(kernel: str, types: str, sizes: str, **constants: int) -> Compiled:
    """A kernel of the lab: types of its pointers and names of its sizes, in words."""
    pairs = (pair.split(":") for pair in types.split())
    pointers = {f"{name}_ptr": f"*{kind}:16" for name, kind in pairs}
    integers = dict.fromkeys(sizes.split(), "i32")
    return Compiled(
        f"fewer.kernels.simple.{kernel}", f"{kernel}_kernel", pointers | integers, constants,
        {"num_warps": 4, "num_stages": 3},
    )  # fmt: skip


STRIDES = "stride_am stride_ak stride_bk stride_bn stride_cm stride_cn"

KERNELS += [
    _simple("add", "x:fp32 y:fp32 out:fp32", "n", BLOCK=1024),
    _simple("add", "x:fp16 y:fp16 out:fp16", "n", BLOCK=64),
    _simple("quantize_rows", "x:fp32 codes:i8 scale:fp32", "cols row_stride", BLOCK=4096),
    _simple("quantize_rows", "x:fp16 codes:i8 scale:fp32", "cols row_stride", BLOCK=64),
    _simple("softmax", "x:fp32 out:fp32", "cols row_stride", BLOCK=1024),
    _simple("softmax", "x:fp16 out:fp16", "cols row_stride", BLOCK=16),
    _simple(
        "matmul", "a:fp16 b:fp16 c:fp32", f"m n k {STRIDES}", BLOCK_M=64, BLOCK_N=64, BLOCK_K=32
    ),
    _simple(
        "matmul", "a:fp16 b:fp16 c:fp16", f"m n k {STRIDES}", BLOCK_M=16, BLOCK_N=32, BLOCK_K=16
    ),
    *(
        _simple(
            "dequantize_matmul", "x:fp16 packed:u8 scale:fp32 zero:fp32 y:fp32", "m n k",
            GROUP=group, BLOCK_M=16, BLOCK_N=block,
        )
        for group, block in ((16, 16), (32, 16), (64, 32))
    ),
    _simple("split_k", "w:fp32 x:fp32 y:fp32", "n k", BLOCK_N=16, BLOCK_K=64),
    _simple("split_k", "w:fp16 x:fp16 y:fp32", "n k", BLOCK_N=16, BLOCK_K=32),
    _simple("hadamard", "x:fp32 out:fp32", "", n=4096),
    _simple("hadamard", "x:fp16 out:fp16", "", n=2),
    _simple(
        "decode_attention", "q:fp16 k:fp16 v:fp16 out:fp16", "tokens group", DIM=64, BLOCK=32
    ),
    _simple(
        "decode_attention", "q:fp32 k:fp32 v:fp32 out:fp32", "tokens group", DIM=16, BLOCK=16
    ),
]  # fmt: skip


def _hadamard(kind: str, n: int, quantize: bool = False, lines: int = 64) -> Compiled:
    return Compiled(
        "fewer.kernels.fast_hadamard",
        "hadamard_kernel",
        {
            "x_ptr": f"*{kind}:16", "out_ptr": "*i8:16" if quantize else f"*{kind}:16",
            "scale_ptr": "*fp32:16", "tiles": "i32", "numbers": "i32:16", "factor": "fp32",
        },
        {"n": n, "QUANTIZE": quantize, "LINES": lines, "STAGES": 2},
        {"num_warps": lines // 16, "num_stages": 3},
    )  # fmt: skip


def _decode(kind: str, bits: int, d: int, rows: int, warps: int = 4, **others: Any) -> Compiled:
    """All arguments that are pointers, those that are sizes, and constants."""
    integers = "tokens kv_heads slots places k_batch k_head k_token v_batch v_head v_token"
    pointers = {"part_ptr": "*fp32:16", "lse_ptr": "*fp32:16"}
    constants: dict[str, Any] = {"GROUP": rows, "d": d, "BLOCK": 64, "STAGES": 3}
    if bits == 16:
        module, kernel = "flash_decode", "decode_kernel"
        names = "q_ptr k_ptr v_ptr"
        pointers = dict.fromkeys(names.split(), f"*{kind}:16") | pointers
        integers += " slot place"
        constants |= {"D": 1 << (d - 1).bit_length()}
    else:
        module, kernel = "decode_quantized", "decode_quantized_kernel"
        names = "ks_ptr kl_ptr vs_ptr vl_ptr"
        pointers = {"q_ptr": f"*{kind}:16"} | dict.fromkeys(names.split(), "*fp16:16") | pointers
        pointers |= {"kc_ptr": "*i16:16", "vc_ptr": "*i16:16"}
        integers += " groups"
        wide = max(16, (1 << (d - 1).bit_length()) * bits // 16)
        constants |= {"WIDE": wide, "BITS": bits, "G": 64, "ASM": True}
    types = {name: kind for name, kind in others.items() if str(kind).startswith("*")}
    absent = {"lengths_ptr": None, "scores_ptr": None} | others
    sizes = dict.fromkeys(integers.split(), "i32:16") | {"factor": "fp32"}
    return Compiled(
        f"fewer.kernels.{module}",
        kernel,
        pointers | types | sizes,
        constants | {name: value for name, value in absent.items() if name not in types},
        {"num_warps": warps, "num_stages": 3},
    )


OBSERVED = {"lengths_ptr": "*i32:16", "scores_ptr": "*fp32:16"}

KERNELS += [
    _hadamard("bf16", 4096),
    _hadamard("fp16", 32),
    _hadamard("fp32", 1024),
    _hadamard("bf16", 4096, quantize=True),
    _hadamard("bf16", 32768, lines=128),
    _hadamard("bf16", 32768, lines=128, quantize=True),
    _decode("bf16", 16, 128, 4),
    _decode("fp16", 16, 80, 1, **OBSERVED),
    _decode("bf16", 8, 128, 4),
    _decode("bf16", 4, 128, 4),
    _decode("fp16", 4, 128, 4, warps=2),
    _decode("bf16", 8, 64, 16, ASM=False, **OBSERVED),
    _decode("bf16", 4, 16, 16, ASM=False, **OBSERVED),
    Compiled(
        "fewer.kernels.flash_decode",
        "combine_kernel",
        {
            "part_ptr": "*fp32:16", "lse_ptr": "*fp32:16", "out_ptr": "*bf16:16",
            "total_ptr": "*fp32:16", "slots": "i32",
        },
        {"d": 128, "D": 128, "SLOTS": 16},
        {"num_warps": 4, "num_stages": 3},
    ),
    Compiled(
        "fewer.kernels.flash_decode",
        "weights_kernel",
        {
            "scores_ptr": "*fp32:16", "total_ptr": "*fp32:16", "weights_ptr": "*fp32:16",
            "places": "i32",
        },
        {"GROUP": 4, "BLOCK": 1024},
        {"num_warps": 4, "num_stages": 3},
    ),
]  # fmt: skip


ONCE = list(
    {(c.module, c.kernel, c.constants.get("UNPACK")): c for c in reversed(KERNELS)}.values()
)[::-1]
TESTED = KERNELS if os.environ.get("FEWER_COMPILE_ALL") else ONCE
SPILLED = 16  # bytes a thread that one version of Triton may spill where another one does not


def compile_all(module: str | None, out: Path | None = None) -> dict[str, dict[str, Any]]:
    """What became of each kernel (of one module): its error, or its spilled bytes and registers."""
    wanted = [c for c in KERNELS if c.module == module] if module else TESTED
    return {c.label: _compile(c, out) for c in wanted}


def _compile(compiled: Compiled, out: Path | None) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(compiled.module), compiled.kernel)
    if not isinstance(kernel, triton.JITFunction):  # a kernel of the lab, on_copies
        kernel = triton.jit(kernel.__wrapped__)
    names = kernel.arg_names
    constants = dict(compiled.constants)
    if "UNPACK" in constants:
        constants["UNPACK"] = importlib.import_module(constants["UNPACK"])._unpack
    types = {n: t.removesuffix(":16") for n, t in compiled.signature.items()}
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n, t in compiled.signature.items()
            if t.endswith(":16")
        },
    )
    try:
        binary = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options=dict(compiled.options)
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}\n{error.__cause__!r}"}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    name = re.sub("[^A-Za-z0-9.=]+", "_", compiled.label)
    cubin = (out or Path(os.environ["TRITON_CACHE_DIR"])) / f"{name}.cubin"
    cubin.parent.mkdir(parents=True, exist_ok=True)
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    if out is not None:
        cubin.with_suffix(".ptx").write_text(binary.asm["ptx"])
        cubin.with_suffix(".ttgir").write_text(binary.asm["ttgir"])
        sass = subprocess.run(
            [tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
        cubin.with_suffix(".sass").write_text(sass)
    local = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return {
        "spilled": local,
        "registers": registers,
        "shared": binary.metadata.shared,
        "converted": len(re.findall(r"cvt\.rn\.\w+\.[su](8|16|32) ", binary.asm["ptx"])),
        "products": len(re.findall(r"(wgmma\.mma_async|mma)\.sync", binary.asm["ptx"])),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton.backends.nvidia")
    triton = importlib.import_module("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this Triton has no ptxas")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("label", [c.label for c in TESTED])
def test_a_kernel_compiles_for_an_h100_without_spilling(
    label: str, results: dict[str, dict[str, Any]]
) -> None:
    assert "error" not in results[label], results[label]["error"]
    assert results[label]["spilled"] <= SPILLED


@pytest.mark.parametrize(
    "label",
    [
        c.label
        for c in TESTED
        if "packed_ptr" in c.signature and c.constants.get("ASM") and "zero_ptr" not in c.signature
    ],
)
def test_packed_weights_are_multiplied_by_tensor_cores_and_never_converted_from_integers(
    label: str, results: dict[str, dict[str, Any]]
) -> None:
    assert results[label]["products"] > 0
    assert results[label]["converted"] == 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    module, folder = [*arguments, None, None][:2]
    print(json.dumps(compile_all(module, Path(folder) if folder else None), indent=1))
