"""Perplexity of SmolLM2 under every way of compressing it that labs 2 and 4 teach.

One model, one text to calibrate on and another to evaluate on (addresses of different years), the
same tokens for every method. Prints method x setting with perplexity, bits per weight counted in
real bytes, the share of zeros, and the seconds that compressing took; says where the published
order holds and where it does not; then shows the newest stored results of `sparse_training.py`.
Every number goes to benchmarks/results/.

    python benchmarks/compression.py --only rtn,gptq --tokens 1024 --windows 4    # a first look
    python benchmarks/compression.py --jobs 8               # all of it, with 8 cores: some minutes

GPTQ and SparseGPT walk one column after another, and on a GPU they wait for Python: on an H100, one
process had not finished all of it in 9 minutes; 16 processes on 16 CPU cores took 6.

Read the bits with care: SmolLM2 comes from a file that already keeps its weights in 4 bits (groups
of 32 with a float minimum). Full size is given as 16 bits, what the weights would take in bf16. For
weights and activations in 8 bits, the bits are those of the weights. Without a special kernel none
of this is faster: everything is computed in float32 with the restored weights.
"""

import datetime
import functools
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from sparse_training import mean_and_error, print_order, print_table, processor
from torch import Tensor

from fewer.data import calibration_text, evaluation_text
from fewer.evaluate import perplexity
from fewer.models import (
    Llama,
    compressed_sequentially,
    input_hessian,
    linear_layers,
    load_smollm2,
    replaced_products,
    replaced_weights,
)
from fewer.progress import track
from fewer.quantization import (
    bits_per_weight,
    calibrate_smoothing,
    dequantize_per_group,
    matmul_llm_int8,
    pack_codes,
    quantize_gptq,
    quantize_symmetric,
    quantized_activations,
    rotated,
    round_to_nearest,
    smoothed,
)
from fewer.sparsity import (
    global_masks,
    magnitude_mask,
    n_m_mask,
    prune_sparsegpt,
    storage_bits,
    wanda_mask,
)

Weight = Float[Tensor, "out in"]
CONTEXT = 512


class Size(NamedTuple):
    """What all linear layers take together."""

    bits_per_weight: float
    sparsity: float  # share of zeros


# From the model and calibration tokens to a `with` block in which the model is compressed. It gives
# a function that returns the Size, to be called once the model has read the evaluation text.
Compress = Callable[[Llama, Int[Tensor, "windows 512"]], AbstractContextManager[Callable[[], Size]]]


class Setting(NamedTuple):
    method: str
    setting: str
    compressed: Compress


def mean_bits(sizes: list[tuple[int, float]]) -> float:
    """Bits a weight of all layers, from (weights, bits a weight) of each."""
    return sum(n * bits for n, bits in sizes) / sum(n for n, _ in sizes)


@contextmanager
def nothing(model: Llama, tokens: Tensor) -> Iterator[Callable[[], Size]]:
    yield lambda: Size(16.0, 0.0)


def rtn(bits: int, group_size: int | None = None, symmetric: bool = True) -> Compress:
    @contextmanager
    def compressed(model: Llama, tokens: Tensor) -> Iterator[Callable[[], Size]]:
        sizes: list[tuple[int, float]] = []

        def quantize(_: str, w: Weight) -> Weight:
            w_hat, stored = round_to_nearest(w, bits, group_size, symmetric)
            sizes.append((w.numel(), bits_per_weight(w.numel(), *stored)))
            return w_hat

        with replaced_weights(model, quantize):
            yield lambda: Size(mean_bits(sizes), 0.0)

    return compressed


def gptq(
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = True,
    damp: float = 0.01,
    one_shot: bool = False,
    windows: int | None = None,
) -> Compress:
    """`one_shot`: the Hessians are those of the unquantized model. `windows`: of calibration."""

    @contextmanager
    def compressed(model: Llama, tokens: Tensor) -> Iterator[Callable[[], Size]]:
        sizes: list[tuple[int, float]] = []

        def quantize(_: str, w: Weight, x: Float[Tensor, "tokens in"]) -> Weight:
            size = group_size or w.shape[1]
            codes, scale, zero = quantize_gptq(
                w, input_hessian(x), bits, size, symmetric, act_order, damp
            )
            half = scale.half()  # as `round_to_nearest` keeps it
            stored = [pack_codes(codes, bits), half]
            stored += [] if zero is None else [pack_codes(zero, bits)]
            sizes.append((w.numel(), bits_per_weight(w.numel(), *stored)))
            return dequantize_per_group(codes, half.to(w.dtype), zero, size)

        tokens = tokens[:windows]
        if one_shot:
            new: dict[str, Weight] = {}

            def look(name: str, w: Weight, x: Tensor) -> Weight:
                new[name] = quantize(name, w, x)
                return w

            with compressed_sequentially(model, tokens, look):
                pass
            with replaced_weights(model, lambda name, _: new[name]):
                yield lambda: Size(mean_bits(sizes), 0.0)
        else:
            with compressed_sequentially(model, tokens, quantize):
                yield lambda: Size(mean_bits(sizes), 0.0)

    return compressed


def w8a8(
    per_token: bool = False,
    alphas: list[float] | None = None,
    norms_only: bool = False,
    rotate: bool = False,
    bits: int = 8,
) -> Compress:
    """Weights one scale a channel, inputs one a tensor or a token; smoothed where alphas are."""

    @contextmanager
    def compressed(model: Llama, tokens: Tensor) -> Iterator[Callable[[], Size]]:
        dim = -1 if per_token else None
        with ExitStack() as stack:
            if alphas:
                scales = calibrate_smoothing(model, tokens[:2], alphas, bits, per_token)
                if norms_only:
                    scales = {name: s for name, s in scales.items() if "norm" in name}
                stack.enter_context(smoothed(model, scales))
            if rotate:
                stack.enter_context(rotated(model))
            size = stack.enter_context(rtn(bits)(model, tokens))
            stack.enter_context(
                quantized_activations(model, lambda x: quantize_symmetric(x, bits, dim))
            )
            yield size

    return compressed


@contextmanager
def llm_int8(model: Llama, tokens: Tensor) -> Iterator[Callable[[], Size]]:
    kept: list[tuple[int, float]] = []

    def product(_: str, x: Tensor, w: Weight) -> Tensor:
        # On the CPU: PyTorch has no int32 matrix product on the GPU.
        y, fraction = matmul_llm_int8(x.cpu(), w.cpu())
        kept.append((w.numel(), fraction))
        return y.to(x)

    channels = [(layer.weight.numel(), 16 / layer.weight.shape[1]) for layer in layers_of(model)]
    with replaced_products(model, product):
        # int8 codes and a float16 scale a channel, and the kept features once more in float16
        yield lambda: Size(8 + mean_bits(channels) + 16 * mean_bits(kept), 0.0)


def layers_of(model: Llama) -> list[torch.nn.Linear]:
    return list(linear_layers(model).values())


def size_of_sparse(model: Llama, n_m: tuple[int, int] | None) -> Size:
    """Values in 16 bits, in the 2:4 format where the mask is, else with a bitmap."""
    bits, zeros, total = 0, 0, 0
    for layer in layers_of(model):
        w = layer.weight
        nonzeros = int((w != 0).sum())
        storage = "2:4" if n_m == (2, 4) else "bitmap"
        bits += storage_bits(storage, (w.shape[0], w.shape[1]), nonzeros)
        zeros, total = zeros + w.numel() - nonzeros, total + w.numel()
    return Size(bits / total, zeros / total)


def pruned(how: str, sparsity: float = 0.5, n_m: tuple[int, int] | None = None) -> Compress:
    @contextmanager
    def compressed(model: Llama, tokens: Tensor) -> Iterator[Callable[[], Size]]:
        with ExitStack() as stack:
            if how == "global":
                scores = {name: l.weight.abs() for name, l in linear_layers(model).items()}
                masks = global_masks(scores, sparsity)
                stack.enter_context(replaced_weights(model, lambda name, w: w * masks[name]))
            elif how == "magnitude":

                def magnitude(_: str, w: Weight) -> Weight:
                    return w * (n_m_mask(w.abs(), *n_m) if n_m else magnitude_mask(w, sparsity))

                stack.enter_context(replaced_weights(model, magnitude))
            else:

                def calibrated(_: str, w: Weight, x: Tensor) -> Weight:
                    if how == "wanda":
                        return w * wanda_mask(w, x, sparsity, n_m)
                    return prune_sparsegpt(w, input_hessian(x), sparsity, n_m)

                stack.enter_context(compressed_sequentially(model, tokens, calibrated))
            yield lambda: size_of_sparse(model, n_m)

    return compressed


def settings() -> list[Setting]:
    rows = [Setting("none", "16 bits", nothing)]
    grids = {
        "8-bit channel": (8, None, True),
        "4-bit channel": (4, None, True),
        "4-bit channel asym": (4, None, False),
        "4-bit groups of 64": (4, 64, True),
        "3-bit groups of 64": (3, 64, True),
        "3-bit groups of 64 asym": (3, 64, False),
    }
    for name, grid in grids.items():
        rows.append(Setting("rtn", name, rtn(*grid)))
    for name, grid in grids.items():
        if grid[0] < 8:
            rows.append(Setting("gptq", name, gptq(*grid)))
    for name, ablation in {
        "without act-order": gptq(4, act_order=False),
        "one-shot": gptq(4, one_shot=True),
        "one-shot, without act-order": gptq(4, one_shot=True, act_order=False),
        "damp 0.1": gptq(4, damp=0.1),
        "damp 0.001": gptq(4, damp=0.001),
        "1 window": gptq(4, windows=1),
        "4 windows": gptq(4, windows=4),
    }.items():
        rows.append(Setting("gptq", f"4-bit channel, {name}", ablation))
    rows += [
        Setting("w8a8", "per tensor", w8a8()),
        Setting("w8a8", "per token", w8a8(per_token=True)),
        *(
            Setting("smoothquant", f"W8A8 per tensor, alpha {name}", w8a8(alphas=alphas, **how))
            for name, alphas, how in (
                ("0.5, norms only", [0.5], {"norms_only": True}),
                ("0.5", [0.5], {}),
                ("0.75", [0.75], {}),
                ("searched", [step / 10 for step in range(11)], {}),
            )
        ),
        Setting("rotated", "W8A8 per tensor", w8a8(rotate=True)),
        Setting("rotated", "W8A8 per token", w8a8(rotate=True, per_token=True)),
        Setting("llm.int8()", "W8A8 vector-wise, threshold 6", llm_int8),
        Setting("w4a4", "per token", w8a8(per_token=True, bits=4)),
        Setting("rotated", "W4A4 per token", w8a8(rotate=True, per_token=True, bits=4)),
    ]
    for sparsity in (0.3, 0.5, 0.6, 0.7):
        for how in ("magnitude", "global", "wanda", "sparsegpt"):
            rows.append(Setting(how, f"{sparsity:.0%}", pruned(how, sparsity)))
    for n_m in ((2, 4), (4, 8)):
        for how in ("magnitude", "wanda", "sparsegpt"):
            rows.append(Setting(how, f"{n_m[0]}:{n_m[1]}", pruned(how, n_m=n_m)))
    return rows


# (worse, better), as the papers have it; each a (method, setting).
GPTQ_SETTINGS = [
    *("4-bit channel", "4-bit channel asym", "4-bit groups of 64"),
    *("3-bit groups of 64", "3-bit groups of 64 asym"),
]
PUBLISHED_ORDER = [
    *((("rtn", s), ("gptq", s)) for s in GPTQ_SETTINGS),
    (("gptq", "4-bit channel, without act-order"), ("gptq", "4-bit channel")),
    (("gptq", "4-bit channel, one-shot"), ("gptq", "4-bit channel")),
    (("w8a8", "per tensor"), ("smoothquant", "W8A8 per tensor, alpha 0.5")),
    (
        ("smoothquant", "W8A8 per tensor, alpha 0.5"),
        ("smoothquant", "W8A8 per tensor, alpha searched"),
    ),
    (("w8a8", "per token"), ("llm.int8()", "W8A8 vector-wise, threshold 6")),
    (("w8a8", "per tensor"), ("rotated", "W8A8 per tensor")),
    (("w4a4", "per token"), ("rotated", "W4A4 per token")),
    *(
        ((worse, s), (better, s))
        for s in ("30%", "50%", "60%", "70%", "2:4", "4:8")
        for worse, better in (("magnitude", "wanda"), ("wanda", "sparsegpt"))
    ),
    *(((how, "2:4"), (how, "4:8")) for how in ("magnitude", "wanda", "sparsegpt")),
    *(((how, "4:8"), (how, "50%")) for how in ("magnitude", "wanda", "sparsegpt")),
]


@functools.cache
def prepared(
    device: str, tokens: int, windows: int
) -> tuple[Llama, list[Int[Tensor, "n"]], Int[Tensor, "windows 512"]]:
    """The model, the evaluation windows, and calibration windows spread over all its addresses."""
    model, tokenizer = load_smollm2()
    model.to(device)
    test = torch.tensor(tokenizer.encode(evaluation_text().text).ids, device=device)
    pieces = [test[i : i + CONTEXT + 1] for i in range(0, tokens - CONTEXT + 1, CONTEXT)]
    source = torch.tensor(tokenizer.encode(calibration_text().text).ids, device=device)
    starts = torch.linspace(0, len(source) - CONTEXT, windows).long().tolist()
    return model, pieces, torch.stack([source[s : s + CONTEXT] for s in starts])


def measure(row: int, device: str, tokens: int, windows: int) -> dict:
    """One line of the table: setting number `row`, compressed, read and given back."""
    method, setting, compressed = settings()[row]
    model, pieces, calibration = prepared(device, tokens, windows)
    begin = time.perf_counter()
    with compressed(model, calibration) as size:
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        losses = [
            math.log(perplexity(model, p, text_id="window", context=CONTEXT).value) for p in pieces
        ]
        bits, sparsity = size()
    return {
        "method": method,
        "setting": setting,
        "perplexity": round(math.exp(sum(losses) / len(losses)), 4),
        "bits_per_weight": round(bits, 4),
        "sparsity": round(sparsity, 4),
        "seconds": round(seconds, 2),
        "window_losses": [round(loss, 5) for loss in losses],  # nats a token
    }


def main(
    only: str = typer.Option("", help="methods to run, such as rtn,gptq; all by default"),
    tokens: int = typer.Option(8192, min=CONTEXT, help="of the evaluation text; whole windows"),
    windows: int = typer.Option(8, min=2, help="calibration windows of 512 tokens"),
    device: str = typer.Option("cpu", help="cpu or cuda"),
    jobs: int = typer.Option(1, min=1, help="processes side by side, each with its own model"),
    out: Path = typer.Option(Path(__file__).parent / "results", help="folder for the JSON file"),
) -> None:
    """Compress SmolLM2 with every method and setting; measure perplexity, size and time."""
    known = list(dict.fromkeys(s.method for s in settings()))
    wanted = only.split(",") if only else known
    if unknown := set(wanted) - set(known):
        raise typer.BadParameter(
            f"no method is called {unknown.pop()!r}; there are: {', '.join(known)}"
        )
    chosen = [i for i, s in enumerate(settings()) if s.method in ("none", *wanted)]
    one = functools.partial(measure, device=device, tokens=tokens, windows=windows)
    rows: list[dict] = []
    with ExitStack() as stack:
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(jobs, context))
            results = pool.map(one, chosen)
        else:
            results = map(one, chosen)
        for row in track(results, "compress and read", len(chosen)):
            rows.append(row)
            print(f"{row['method']:12} {row['setting']:45} {row['perplexity']:12,.2f}", flush=True)

    now = datetime.datetime.now(datetime.UTC)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "model": "SmolLM2-135M-Instruct, float32",
            "evaluation": evaluation_text().id,
            "tokens": tokens // CONTEXT * CONTEXT,
            "context": CONTEXT,
            "stride": CONTEXT,
            "calibration": calibration_text().id,
            "calibration_tokens": windows * CONTEXT,
            "jobs": jobs,
        },
        "results": rows,
    }
    result["table"] = tabulated(result)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"compression_smollm2_{now:%Y%m%d_%H%M%S}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print_compression(result["table"])
    print_published_order(rows)
    stored = sorted((Path(__file__).parent / "results").glob("sparse_training_*.json"))
    for file in stored[-1:]:
        sparse = json.loads(file.read_text())
        given = sparse["settings"]
        levels = [float(s) for s in given["sparsities"].split(",")]
        print(f"\nTraining sparse, stored {sparse['date'][:10]}, {sparse['device']} ({file.name}):")
        widths = "-".join(map(str, given["widths"]))
        title = f"{given['data']}, {widths}, {given['steps']} steps, {given['seeds']} seeds"
        print_table(sparse["results"], levels, title)
        print_order(sparse["results"], levels)
    print(f"Written: {path}")


def tabulated(result: dict) -> dict:
    """The table of a result: a caption, the columns' names, and rows of strings."""
    on = result["settings"]
    return {
        "caption": f"{on['model']}: {on['tokens']:,} tokens of {on['evaluation']}, "
        f"context = stride = {on['context']}; "
        f"{on['calibration_tokens']:,} calibration tokens of other addresses; "
        f"seconds of one core with {on['jobs']} at work",
        "columns": ["method", "setting", "perplexity", "bits a weight", "zeros", "seconds"],
        "rows": [
            [
                row["method"],
                row["setting"],
                f"{row['perplexity']:,.2f}",
                f"{row['bits_per_weight']:.2f}",
                f"{row['sparsity']:.1%}",
                f"{row['seconds']:.0f}",
            ]
            for row in result["results"]
        ],
    }


def print_compression(table: dict) -> None:
    shown = Table(title=table["caption"])
    for name in table["columns"]:
        shown.add_column(name, justify="left" if name in ("method", "setting") else "right")
    for row in table["rows"]:
        shown.add_row(*row)
    Console(width=120).print(shown)


def print_published_order(rows: list[dict]) -> None:
    """Whether the papers' order holds: mean difference of the windows' losses, and its error."""
    losses = {(row["method"], row["setting"]): row["window_losses"] for row in rows}
    print("The published order, as nats a token gained (below 2 standard errors it says nothing):")
    for worse, better in PUBLISHED_ORDER:
        if worse not in losses or better not in losses:
            continue
        gains = [w - b for w, b in zip(losses[worse], losses[better], strict=True)]
        mean, error = mean_and_error(gains)
        says = "reversed" if mean < 0 else "holds"
        if not abs(mean) >= 2 * error:
            says = "not resolved"
        names = f"{' '.join(better)}  over  {' '.join(worse)}"
        print(f"  {names:85} {mean:+7.3f} ± {error:.3f}  {says}")


if __name__ == "__main__":
    typer.run(main)
