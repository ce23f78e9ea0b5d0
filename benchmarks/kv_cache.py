"""What forgetting costs: perplexity of a text read through every cache, at several budgets.

SmolLM2 reads the beginning of a State of the Union address, `chunk` tokens a call, and is scored on
the next: with the full cache, with every policy at every budget, with quantized caches alone and
below two of the policies, and with a window that is read anew for every token (on some of the
tokens: it takes long).

    python benchmarks/kv_cache.py --tokens 256 --budgets 64,128 --bits 4 --chunk 16     # a look
    python benchmarks/kv_cache.py --budgets 128,256,819 --bits 4,2 --chunk 32 --every 512 --jobs 2

Prints perplexities; by how many nats a cache changes the loss of a token (the mean absolute
difference from the full cache: a perplexity can stay while every token's chances move); the bytes
of keys and values at the end; and the median time a token. Every result goes to
benchmarks/results/, after each cache, so that a run broken off is not lost.

Read the time with care: the quantized cache is written to be read, and turns all of its codes back
into numbers for every token, where a kernel would do it on the way to the product.
"""

import datetime
import functools
import json
import multiprocessing
import platform
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from sparse_training import InThisProcess, processor
from torch import Tensor

from fewer.data import evaluation_text
from fewer.inference import (
    EvictingCache,
    FullCache,
    QuantizedCache,
    h2o,
    random_eviction,
    recomputed_losses,
    stream_losses,
    streaming_h2o,
    streaming_llm,
    window,
)
from fewer.models import Llama, load_smollm2

POLICIES: dict[str, Callable[..., EvictingCache]] = {
    "window": window,
    "random": random_eviction,
    "StreamingLLM": streaming_llm,
    "H2O": h2o,
    "StreamingH2O": streaming_h2o,
}
QUANTIZED_BELOW = ("StreamingLLM", "H2O")
RECOMPUTED = "window, recomputed"
ALONG = 128  # tokens that a number of the curve along the text stands for


class Case(NamedTuple):
    """One cache: a policy or "full", its budget, and the bits of a number."""

    policy: str
    budget: int | None
    bits: int | None  # None for full precision

    @property
    def name(self) -> str:
        return self.policy + (f", {self.bits} bits" if self.bits else "")

    def cache(self) -> FullCache | EvictingCache:
        store = QuantizedCache(self.bits) if self.bits else FullCache()
        if self.budget is None:
            return store
        return POLICIES[self.policy](self.budget, store=store)


def cases(policies: list[str], budgets: list[int], bits: list[int]) -> list[Case]:
    """The full cache first: others are compared with it."""
    found = [Case("full", None, b) for b in (None, *bits)]
    found += [Case(policy, budget, None) for policy in policies for budget in budgets]
    below = [policy for policy in policies if policy in QUANTIZED_BELOW]
    # The recent half must have room for the tokens that are not quantized yet.
    enough = [budget for budget in budgets if budget // 2 >= QuantizedCache().protected]
    return found + [Case(p, budget, b) for p in below for b in bits for budget in enough]


@functools.cache
def prepared(tokens: int) -> tuple[Llama, str, Tensor]:
    """The model, the text's name and its first tokens, loaded once a process."""
    model, tokenizer = load_smollm2()
    text_id, text = evaluation_text()
    return model, text_id, torch.tensor(tokenizer.encode(text).ids)[: tokens + 1]


def measure(case: Case, tokens: int, chunk: int) -> tuple[dict, Tensor]:
    """A row, and the losses token by token."""
    model, _, ids = prepared(tokens)
    cache = case.cache()
    losses, seconds = stream_losses(model, ids, cache, chunk)
    later = seconds[len(seconds) // 2 :]
    row = {
        **case._asdict(),
        "perplexity": losses.double().mean().exp().item(),
        "along": [round(part.mean().item(), 4) for part in losses.split(ALONG)],
        "bytes": cache.nbytes,
        "ms_per_token": 1000 * statistics.median(later) / chunk,
    }
    return row, losses


def recompute(budget: int, tokens: int, every: int) -> tuple[dict, Tensor]:
    """The row of a window read anew, on every so-manyth token, and the losses there."""
    model, _, ids = prepared(tokens)
    steps = recomputed_steps(budget, tokens, every)
    losses, seconds = recomputed_losses(model, ids, budget, steps)
    row = {
        **Case(RECOMPUTED, budget, None)._asdict(),
        "tokens": len(steps),
        "bytes": 0,
        "ms_per_token": 1000 * statistics.median(seconds),
    }
    return row, losses


def recomputed_steps(budget: int, tokens: int, every: int) -> list[int]:
    return list(range(min(budget, tokens - 1), tokens, every))


def main(
    tokens: int = typer.Option(4096, min=ALONG, help="scored, from the beginning of the text"),
    policies: str = typer.Option(",".join(POLICIES), help="which"),
    budgets: str = typer.Option("128,256,512,819", help="tokens kept; 819 is a fifth of 4096"),
    bits: str = typer.Option("8,4,2", help="of quantized caches; empty for none"),
    chunk: int = typer.Option(1, min=1, help="tokens a call; more is faster, and sees more"),
    every: int = typer.Option(32, min=0, help="recompute for every so-manyth token; 0 for none"),
    jobs: int = typer.Option(1, min=1, help="caches side by side; times then say little"),
    out: Path = typer.Option(Path(__file__).parent / "results", help="folder for the JSON file"),
) -> None:
    """Read a text through every cache."""
    chosen = [name.strip() for name in policies.split(",") if name.strip()]
    if unknown := set(chosen) - set(POLICIES):
        raise typer.BadParameter(f"no policy {unknown.pop()!r}; there are: {', '.join(POLICIES)}")
    sizes = sorted(int(budget) for budget in budgets.split(","))
    widths = [int(b) for b in bits.split(",") if b.strip()]
    _, text_id, ids = prepared(tokens)
    tokens = len(ids) - 1
    now = datetime.datetime.now(datetime.UTC)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"inference_cache_smollm2_{now:%Y%m%d_%H%M%S}.json"
    result: dict = {
        "date": now.isoformat(timespec="seconds"),
        "device": processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "text": text_id,
            "tokens": tokens,
            "policies": chosen,
            "budgets": sizes,
            "bits": widths,
            "chunk": chunk,
            "every": every,
            "threads": torch.get_num_threads(),
            "jobs": jobs,
        },
        "results": [],
    }

    def keep(row: dict) -> None:
        result["results"].append(row)
        result["table"] = tabulated(result)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{Case(row['policy'], row['budget'], row['bits']).name:22} {row['budget'] or '':>5}"
            f"  perplexity {row['perplexity']:8.2f}  change {row['change']:.4f}"
            f"  {row['bytes'] / 2**20:6.2f} MiB"
            f"  {row['ms_per_token']:7.1f} ms a token",
            flush=True,
        )

    todo = cases(chosen, sizes, widths)
    # Forked workers would share locks of PyTorch's threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) if jobs > 1 else InThisProcess() as pool:
        again = pool.map(
            functools.partial(recompute, tokens=tokens, every=every), sizes if every else []
        )
        found = pool.map(functools.partial(measure, tokens=tokens, chunk=chunk), todo)
        full = None
        for row, losses in found:
            full = losses if full is None else full
            keep({**row, "change": (losses - full).abs().mean().item()})
        assert full is not None
        for row, losses in again:
            # On the tokens that were read anew, beside the full cache: their difficulty cancels.
            steps = recomputed_steps(row["budget"], tokens, every)
            change = (losses - full[steps]).double()
            loss = full.double().mean() + change.mean()
            keep({**row, "perplexity": loss.exp().item(), "change": change.abs().mean().item()})
    print_results(result["table"])
    print(f"Written: {path}")


def tabulated(result: dict) -> dict:
    """The table of a result: a caption, the columns' names, and rows of strings."""
    on, rows = result["settings"], result["results"]
    found: dict[str, dict] = {}
    for row in rows:
        name = Case(row["policy"], row["budget"], row["bits"]).name
        found.setdefault(name, {})[row["budget"]] = row
    lines = []
    for name, at in found.items():
        last = at[max(at, key=lambda budget: budget or 0)]
        size = f"{last['bytes'] / 2**20:.1f}" if last["bytes"] else ""
        cells = [f"{at[b]['perplexity']:.2f}" if b in at else "" for b in (*on["budgets"], None)]
        change = f"{last['change']:.3f}" if last["change"] else ""
        lines.append([name, *cells, change, size, f"{last['ms_per_token']:.0f}"])
    caption = (
        f"SmolLM2 (134.5M parameters) reads {on['tokens']:,} tokens of {on['text']}, "
        f"{on['chunk']} a call: perplexity by tokens kept in every head; at the largest budget, "
        "the mean absolute change of a token's loss in nats, MiB of keys and values in the end, "
        "and median ms a token in the second half of the text (with many tokens cached); float32, "
        f"{on['threads']} threads, {on['jobs']} side by side"
    )
    if on["every"]:
        caption += f"; recomputed on every {on['every']}th token"
    return {
        "caption": caption,
        "columns": ["cache", *map(str, on["budgets"]), "all", "change", "MiB", "ms a token"],
        "rows": lines,
    }


def print_results(table: dict) -> None:
    shown = Table(title=table["caption"])
    for name in table["columns"]:
        shown.add_column(name, justify="left" if name == "cache" else "right")
    for row in table["rows"]:
        shown.add_row(*row)
    Console(width=110).print(shown)


if __name__ == "__main__":
    typer.run(main)
