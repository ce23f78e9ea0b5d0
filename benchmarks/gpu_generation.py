"""Tokens a second on a GPU: weights and cache in fewer bits, against bfloat16, all in CUDA graphs.

SmolLM2 reads contexts of equal length, State of the Union addresses, and continues them; every
combination of weights and cache does what `fewer.kernels.generate` does. A random model with the
sizes of Llama 3 8B does the same without a prompt: its numbers mean nothing, but its weights weigh
15 GB, and what a GPU is waiting for in SmolLM2 (0.27 GB) is mostly the next launch.

    python benchmarks/gpu_generation.py                           # all of it: 5 minutes on an H100
    python benchmarks/gpu_generation.py --models smollm2 --batches 1 --prompts 512
    python benchmarks/gpu_generation.py --combinations "full/full;w4/int4"
    python benchmarks/gpu_generation.py --device cpu --small      # a test: its times say nothing

A combination is weights/cache: weights full, w8, w4, w4s or nf4; cache full, int8, int4 or torch
(full, but read by PyTorch's own attention). What is printed of each:

    tokens/s    of all rows together, decoding only; the median of the repeats
    gain        over full/full, for the same batch and prompt
    GB/s        bytes of weights and cached tokens that a step has to read, over its time
    launches    kernels of a step
    same        how often the likeliest next token is that of full/full, both reading the text
    loss        how much higher the mean of -log p(next token) of the text is, in nats
    until       after how many tokens of their own the two part, the median of the rows
    kernels     the largest error of what a kernel gave within a step, against its reference in
                plain torch on the same tensors (relative, Euclidean)
    logits      the error at the end of that step: a CUDA graph of kernels, against references alone

The last two are the check that kernels do what they should. Above 0.01 and 0.1 the command fails at
its end. (Why 0.1: bfloat16 has 0.004 a rounding, of which SmolLM2's 30 layers make 0.02 to 0.04,
whichever way its attention is computed.)
"""

import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fewer.data import EVALUATION_IDS, speeches
from fewer.inference.early_exit import early_exit
from fewer.kernels import (
    decode_attention_quantized_reference,
    decode_attention_reference,
    generate,
    nf4_matmul_reference,
    packed_llama,
    w4a16_matmul_reference,
    w8a16_matmul_reference,
)
from fewer.kernels.generate import (
    CACHES,
    GROUP,
    State,
    decode,
    empty_state,
    flush,
    prefill,
    stepper,
)
from fewer.kernels.packed_llama import WEIGHTS, Weights, pack_model
from fewer.models import Llama, LlamaConfig, load_smollm2

BASELINE = "full/full"
COMBINATIONS = (
    "full/full;full/torch;full/int4;w8/full;nf4/full;w4/full;w4/int8;w4/int4;w4s/full;w4s/int4"
)
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    d_model=4096,
    d_ffn=14_336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    rope_base=500_000.0,
)
MODELS = {"smollm2": 64, "random-8b": 128}  # columns that share a scale in w4
ALLOWED = {"kernels": 0.01, "logits": 0.1}
PROBES = 2  # steps that are checked
Step = Callable[[int], Tensor]


def load(name: str, device: str, small: bool) -> tuple[Llama, list[int]]:
    """A model in bfloat16, and the tokens of a text of some millions of them, if it can read."""
    if name == "smollm2":
        model, tokenizer = load_smollm2(torch.bfloat16)
        first = [s for s in speeches() if s.id in EVALUATION_IDS]
        others = [s for s in reversed(speeches()) if s.id not in EVALUATION_IDS]
        texts = [s.text for s in (first + others)[: 1 if small else 40]]
        tokens = [i for one in tokenizer.encode_batch(texts) for i in one.ids]
        return (early_exit(model, 2) if small else model).to(device), tokens
    with torch.device("meta"):
        model = Llama(LLAMA_8B).bfloat16()
    model = model.to_empty(device=device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02)
    return model, []


def nbytes(tree: Any) -> int:
    """Of all tensors in it."""
    return sum(x.nbytes for x in tree_leaves(tree) if isinstance(x, Tensor))


def moved(weights: Weights, state: State, tokens: int) -> float:
    """Bytes that one step has to read, while that many tokens are in the cache."""
    room = state.turns.shape[1]
    return nbytes(weights) + nbytes([state.kv, state.codes]) * min(1, tokens / room)


KERNELS: dict[Any, dict[str, Callable[..., Tensor]]] = {
    packed_llama: {
        "w4a16_matmul": w4a16_matmul_reference,
        "w8a16_matmul": w8a16_matmul_reference,
        "nf4_matmul": nf4_matmul_reference,
    },
    generate: {
        "decode_attention": lambda *a: decode_attention_reference(*a)[0],
        "decode_attention_quantized": lambda *a, **k: decode_attention_quantized_reference(*a, **k)[
            0
        ],
    },
}


@contextmanager
def replaced(new: Callable[[Callable, Callable], Callable]) -> Iterator[None]:
    """Every kernel of a step is new(kernel, its reference)."""
    with ExitStack() as stack:
        for module, names in KERNELS.items():
            for name, reference in names.items():
                function = new(getattr(module, name), reference)
                stack.enter_context(patch.object(module, name, function))
        yield


def error_of(logits: Tensor, wanted: Tensor) -> float:
    return float((logits.float() - wanted.float()).norm() / wanted.float().norm())


def check(weights: Weights, state: State, step: Step, read: int) -> dict[str, float]:
    """The largest errors of the next steps; the state has read that many tokens."""
    found: dict[str, list[float]] = {"kernels": [0.0], "logits": []}

    def compare(kernel: Callable, reference: Callable) -> Callable:
        def both(*arguments: Any, **named: Any) -> Tensor:
            out = kernel(*arguments, **named)
            found["kernels"].append(error_of(out, reference(*arguments, **named)))
            return out

        return both

    by_kernels, by_references = (tree_map_only(Tensor, torch.clone, state) for _ in range(2))
    for i in range(read, read + PROBES):
        logits = step(i)
        if state.codes and i % GROUP == 0:
            flush(by_kernels)
            flush(by_references)
        with replaced(compare):
            decode(weights, by_kernels)
        with replaced(lambda kernel, reference: reference):
            found["logits"].append(error_of(logits, decode(weights, by_references)))
        by_kernels.token.copy_(state.token)
        by_references.token.copy_(state.token)
    # A NaN is worse than anything.
    return {name: max(math.inf if math.isnan(e) else e for e in of) for name, of in found.items()}


def rewinding(state: State) -> Callable[[], None]:
    """A function that takes back all tokens read from now on."""
    # A full cache still has the earlier ones, and codes have; what is not in codes is overwritten.
    kept = [state.token, state.read, state.stored, *([state.kv] if state.codes else [])]
    copies = [x.clone() for x in kept]

    def rewind() -> None:
        for x, copy in zip(kept, copies, strict=True):
            x.copy_(copy)

    return rewind


def seconds(step: Step, state: State, read: int, steps: int) -> float:
    """For one of so many steps after `read` tokens."""
    wait(state)
    begin = time.perf_counter()
    for i in range(read, read + steps):
        step(i)
    wait(state)
    return (time.perf_counter() - begin) / steps


def wait(state: State) -> None:
    if state.token.is_cuda:
        torch.cuda.synchronize()


def launches(weights: Weights, state: State) -> int | None:
    """How many kernels a step has; None where the profiler sees none."""
    if not state.token.is_cuda:
        return None
    state.read.zero_()  # wherever it was: there must be room
    state.stored.zero_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decode(weights, state)
        torch.cuda.synchronize()
    seen = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(seen) or None


def measure(
    weights: Weights,
    cache: str,
    batch: int,
    text: Tensor | None,
    prompt: int,
    repeats: int,
    new: int,
) -> tuple[dict, dict[str, Tensor]]:
    """What is to be told of a combination, and what it has said.

    text: [batch, prompt + new]; None: nothing is read or said.
    """
    state = empty_state(weights, batch, prompt + new, cache)
    step = stepper(weights, state)
    said: dict[str, Tensor] = {}
    row: dict[str, Any] = {}
    if text is None:
        state.read.fill_(prompt)
        state.stored.fill_((prompt - 1) // GROUP * GROUP if state.codes else 0)
        rewind = rewinding(state)
    else:
        logits = prefill(weights, state, text[:, :prompt])
        rewind, losses, likeliest, greedy = rewinding(state), [], [], []
        for i in range(prompt, prompt + new):
            losses.append(F.cross_entropy(logits.float(), text[:, i], reduction="none"))
            likeliest.append(state.token.clone())
            state.token.copy_(text[:, i : i + 1])
            logits = step(i)
        rewind()
        for i in range(prompt, prompt + new):
            greedy.append(state.token.clone())
            step(i)
        rewind()
        row["errors"] = check(weights, state, step, prompt)
        said = {
            "losses": torch.stack(losses, 1),
            "likeliest": torch.cat(likeliest, 1),
            "greedy": torch.cat(greedy, 1),
        }
    times = []
    for _ in range(repeats + 1):
        rewind()
        times.append(seconds(step, state, prompt, new))
    median = statistics.median(times[1:])
    row |= {
        "tokens_per_second": batch / median,
        "ms_per_step": [1000 * t for t in times[1:]],
        "gigabytes_per_second": moved(weights, state, prompt + new // 2) / median / 1e9,
        "weights_bytes": nbytes(weights),
        "cache_bytes": nbytes([state.kv, state.codes]),
        "launches": launches(weights, state),
    }
    return row, said


def compared(said: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, float]:
    """How near to the baseline."""
    differs = said["greedy"] != base["greedy"]
    ends = torch.cat([differs, torch.ones_like(differs[:, :1])], 1)
    return {
        "same": float((said["likeliest"] == base["likeliest"]).double().mean()),
        "loss": float(said["losses"].double().mean()),
        "loss_more": float((said["losses"] - base["losses"]).double().mean()),
        "until": float(ends.int().argmax(1).double().median()),
        "same_answers": float((~differs).all(1).double().mean()),
    }


def shown(model: str, weights: str, batch: int, prompt: int) -> bool:
    """Not everything is worth its time."""
    if weights in ("w8", "nf4") and (prompt > 512 or batch > 16):
        return False
    return model == "smollm2" or batch <= 16


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main(
    models: str = typer.Option("smollm2,random-8b", help="one, or both"),
    combinations: str = typer.Option(COMBINATIONS, help="weights/cache; ..."),
    batches: str = typer.Option("1,16,64", help="rows; 64 with SmolLM2 alone"),
    prompts: str = typer.Option("512,4096", help="tokens of a context"),
    tokens: int = typer.Option(128, min=2, help="to generate, for each; 64 by the random model"),
    repeats: int = typer.Option(3, min=1, help="of the timed steps, after one that is not counted"),
    device: str = typer.Option("cuda", help="cuda or cpu"),
    small: bool = typer.Option(False, help="two layers of SmolLM2, few tokens: does it run?"),
    out: Path = typer.Option(Path(__file__).parent / "results", help="folder for the JSON file"),
) -> None:
    """Generate with every combination of weights and cache; print and store what it took."""
    asked = [c.strip() for c in combinations.split(";") if c.strip()]
    asked = [BASELINE, *(c for c in asked if c != BASELINE)]
    for one in asked:
        weights_name, _, cache = one.partition("/")
        if weights_name not in WEIGHTS or cache not in CACHES:
            raise typer.BadParameter(f"no {one!r}; weights: {[*WEIGHTS]}, caches: {[*CACHES]}")
    chosen = [m.strip() for m in models.split(",")]
    for name in chosen:
        if name not in MODELS:
            raise typer.BadParameter(f"no {name!r}; there are: {', '.join(MODELS)}")
    if small:
        chosen, batches, prompts, tokens, repeats = ["smollm2"], "1,3", "62,128", 4, 1
    processor = platform.processor() or platform.machine()
    on = torch.cuda.get_device_name() if device == "cuda" else processor
    now = datetime.datetime.now(datetime.UTC)
    label = "_".join(chosen).replace("-", "_")
    path = out / f"gpu_generation_{label}_{now:%Y%m%d_%H%M%S}.json"
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "device": on,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "settings": {"tokens": tokens, "repeats": repeats, "group": MODELS, "small": small},
        "results": [],
    }
    begin = time.perf_counter()
    for name in chosen:
        model, ids = load(name, device, small)
        new = tokens if name == "smollm2" else min(tokens, 64)
        base: dict[tuple[int, int], tuple[dict, dict]] = {}
        for kind in dict.fromkeys(c.split("/")[0] for c in asked):
            weights = pack_model(model, kind, MODELS[name])
            caches = [c.split("/")[1] for c in asked if c.startswith(f"{kind}/")]
            for batch, prompt, cache in product(numbers(batches), numbers(prompts), caches):
                if not shown(name, kind, batch, prompt):
                    continue
                flat = torch.tensor(ids[: batch * (prompt + new)], device=device)
                text = flat.view(batch, prompt + new) if ids else None
                row, said = measure(weights, cache, batch, text, prompt, repeats, new)
                first_row, first_said = base.setdefault((batch, prompt), (row, said))
                row["gain"] = row["tokens_per_second"] / first_row["tokens_per_second"]
                what = {"model": name, "batch": batch, "prompt": prompt, "weights": kind}
                row = {**what, "cache": cache, **row}
                result["results"].append(row | (compared(said, first_said) if said else {}))
                result["table"] = tabulated(result)
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(
                    f"{time.perf_counter() - begin:4.0f} s  {name}, batch {batch}, "
                    f"prompt {prompt}, {kind}/{cache}: {row['tokens_per_second']:.0f} tokens/s",
                    flush=True,
                )
            del weights
        del model, base
    print_results(result["table"])
    print(f"Written: {path}")
    wrong = [
        f"{row['model']}, batch {row['batch']}, prompt {row['prompt']}, "
        f"{row['weights']}/{row['cache']}: error of {name} {error:.3f}"
        for row in result["results"]
        for name, error in row.get("errors", {}).items()
        if not error <= ALLOWED[name]
    ]
    if wrong:
        print("NOT WHAT THE REFERENCES GIVE:", *wrong, sep="\n")
        raise typer.Exit(1)


def tabulated(result: dict) -> dict:
    """The table of a result: a caption, the columns' names, and rows of strings."""

    def told(row: dict, name: str, form: str, factor: float = 1) -> str:
        return format(factor * row[name], form) if row.get(name) is not None else ""

    return {
        "caption": f"Decoding in CUDA graphs, {result['settings']['tokens']} tokens (64 by the "
        "random model) after each prompt. Full is bfloat16; w8 has a scale a row, w4 a scale and "
        f"a zero-point for {MODELS['smollm2']} columns ({MODELS['random-8b']} in the random "
        "model), w4s a scale alone. Columns: see benchmarks/gpu_generation.py",
        "columns": [
            *("model", "rows", "prompt", "weights", "cache", "tokens/s", "gain", "GB/s"),
            *("weights, MB", "cache, MB", "launches", "same", "loss", "until"),
            *("kernels", "logits"),
        ],
        "rows": [
            [
                row["model"],
                str(row["batch"]),
                str(row["prompt"]),
                row["weights"],
                row["cache"],
                told(row, "tokens_per_second", ",.0f"),
                told(row, "gain", ".2f"),
                told(row, "gigabytes_per_second", ",.0f"),
                told(row, "weights_bytes", ",.0f", 1e-6),
                told(row, "cache_bytes", ",.0f", 1e-6),
                told(row, "launches", "d"),
                told(row, "same", ".1%"),
                told(row, "loss_more", "+.3f"),
                told(row, "until", ".0f"),
                told(row.get("errors", {}), "kernels", ".4f"),
                told(row.get("errors", {}), "logits", ".3f"),
            ]
            for row in result["results"]
        ],
    }


def print_results(table: dict) -> None:
    printed = Table(title=table["caption"])
    for name in table["columns"]:
        left = name in ("model", "weights", "cache")
        printed.add_column(name, justify="left" if left else "right")
    for row in table["rows"]:
        printed.add_row(*row)
    Console(width=150).print(printed)


if __name__ == "__main__":
    typer.run(main)
