"""Speculative decoding on a CPU: what each draft gives on four kinds of text.

SmolLM2 answers two prompts of each kind in float32: plainly, and with every draft. The answers must
be the same, token by token, at temperature 0.

    python benchmarks/speculative.py --tokens 32 --drafts "prompt lookup" --repeats 1      # a look
    python benchmarks/speculative.py --threads 2                                       # all of it

Prints tokens a call and the speed relative to plain decoding, both after the call that reads the
prompt; in the JSON file in benchmarks/results/ stands more of each run: acceptance, tokens a
second, and how long calls and drafts took. Tokens a call and acceptance belong to model and text;
the speed belongs to the machine. Every run is repeated, and of each of its calls the quickest
repetition counts, since another program may have been in the way.

The model in fewer bits is simulated (rounded weights in float32), so here it costs as much as the
model itself and cannot pay; its acceptance is what a fast kernel would start from.
"""

import copy
import datetime
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from sparse_training import processor
from torch import Tensor

from fewer.data import calibration_text
from fewer.inference import (
    ModelDraft,
    ModelTreeDraft,
    NGramDraft,
    early_exit,
    merged,
    prompt_lookup,
    speculative_stream,
    tree_stream,
)
from fewer.inference.speculative import Draft, Round, collect_rounds
from fewer.models import (
    KVCache,
    Llama,
    chat_prompt,
    generate,
    linear_layers,
    load_smollm2,
    stream,
)
from fewer.quantization import round_to_nearest

LETTER = (
    "Dear neighbours, on Saterday the ninth of May we will clean the garden behind the house. "
    "Please bring gloves and, if you have one, a rake. We begin at ten in the morning and hope to "
    "be done by two. There will be soup and bread for all who help. The old bench by the gate is "
    "broken; Martin has offered to repare it, and Anna will paint it green. If it rains, we meet a "
    "week later at the same time. Children are welcome, and so are dogs on a leash. Write to me if "
    "you can lend us a wheelbarrow. With kind regards, Eva Lind"
)
STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()

    def peek(self):
        return self.items[-1]

    def is_empty(self):
        return len(self.items) == 0

    def size(self):
        return len(self.items)
"""
QUESTIONS = {
    "rewriting": [
        f"Correct the spelling of this letter. Answer with the whole letter.\n\n{LETTER}",
        f"Add a docstring to every method of this class.\n\n```python\n{STACK}```",
    ],
    "prose": [
        "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
        "Describe a morning at the market of a small town.",
    ],
    "code": [
        "Write a Python class for a bank account with deposit, withdraw and balance.",
        "Write a Python function that returns the prime numbers below n, and test it.",
    ],
    "list": [
        "Give me a packing list for a week of hiking in the mountains.",
        "List ten animals. For each, say where it lives and what it eats.",
    ],
}
CALLS = (1, 2, 3, 5, 9, 11, 17, 33)  # tokens a call, of which the time is measured


class Kit(NamedTuple):
    """What drafts are made of."""

    model: Llama
    rounded: dict[int, Llama]  # by bits
    training: list[int]
    temperature: float
    top_p: float

    def draft(self, model: Llama, length: int) -> ModelDraft:
        return ModelDraft(model, length, self.temperature, self.top_p)

    def ngrams(self, training: list[int]) -> NGramDraft:
        return NGramDraft(4, 8, vocab=self.model.config.vocab_size, training=training)


CHAINS: dict[str, Callable[[Kit], Draft]] = {
    "prompt lookup": lambda kit: prompt_lookup,
    "n-grams": lambda kit: kit.ngrams([]),
    "n-grams, trained": lambda kit: kit.ngrams(kit.training),
    **{
        f"{layers} of 30 layers": lambda kit, layers=layers: kit.draft(
            early_exit(kit.model, layers), 4
        )
        for layers in (10, 20, 25, 28)
    },
    **{f"{bits} bits": lambda kit, bits=bits: kit.draft(kit.rounded[bits], 4) for bits in (4, 3)},
}
TREES: dict[str, Callable] = {
    "tree: lookup, n-grams": lambda kit: merged(prompt_lookup, kit.ngrams([])),
    "tree: 28 layers, 3-2-1-1": lambda kit: ModelTreeDraft(
        early_exit(kit.model, 28), (3, 2, 1, 1), kit.temperature, kit.top_p
    ),
}


class Clocked:
    """A draft and the seconds it has taken in each call."""

    def __init__(self, draft: Callable) -> None:
        self.draft, self.seconds = draft, list[float]()

    def __call__(self, text: Tensor, generator: torch.Generator | None = None) -> tuple:
        begin = time.perf_counter()
        proposal = self.draft(text, generator)
        self.seconds.append(time.perf_counter() - begin)
        return proposal


def timed(steps: Iterator) -> tuple[list, list[float]]:
    """What an iterator yields, and the seconds it took for each."""
    found, seconds, begin = [], [], time.perf_counter()
    for step in steps:
        seconds.append(time.perf_counter() - begin)
        found.append(step)
        begin = time.perf_counter()
    return found, seconds


def quickest(runs: list[list[float]]) -> list[float]:
    """Of each call the quickest repetition, without the first call, which reads the prompt."""
    return [min(of_call) for of_call in zip(*runs, strict=True)][1:]


def measure_plain(
    model: Llama, prompt: Tensor, stop: list[int], tokens: int, repeats: int, sampling: dict
) -> tuple[Tensor, float]:
    """The answer, and tokens a second after the first."""
    runs = []
    for _ in range(repeats):
        options = {**sampling, "generator": torch.Generator().manual_seed(0)}
        said, seconds = timed(stream(model, prompt, tokens, stop=stop, **options))
        runs.append(seconds)
    best = quickest(runs)
    return torch.stack(said, 1), len(best) / sum(best)


def measure(
    name: str, kit: Kit, prompt: Tensor, stop: list[int], tokens: int, repeats: int, sampling: dict
) -> tuple[Tensor, dict]:
    """The answer with a draft, and what it took."""
    runs, drafting = [], []
    for _ in range(repeats):
        options = {**sampling, "generator": torch.Generator().manual_seed(0), "stop": stop}
        if name in CHAINS:
            draft = Clocked(CHAINS[name](kit))
            rounds = speculative_stream(kit.model, prompt, draft, tokens, **options)
        else:
            draft = Clocked(TREES[name](kit))
            rounds = tree_stream(kit.model, prompt, draft, tokens, **options)
        done, seconds = timed(rounds)
        runs.append(seconds)
        drafting.append(draft.seconds)
    answer = collect_rounds(done, 1)
    later: list[Round] = [one for (one,) in done[1:]]
    best, drafted = quickest(runs), sum(one.drafted for one in later)
    new, draft_seconds = sum(len(one.tokens) for one in later), sum(quickest(drafting))
    return answer.tokens, {
        "tokens": int(answer.lengths),
        "calls": int(answer.calls),
        "drafted": int(answer.drafted),
        "judged": int(answer.judged),
        "accepted": int(answer.accepted),
        "tokens_per_call": new / len(later) if later else math.nan,
        "tokens_per_second": new / sum(best) if later else math.nan,
        "ms_per_drafted_token": 1000 * draft_seconds / drafted if drafted else math.nan,
        "ms_per_call": 1000 * (sum(best) - draft_seconds) / len(later) if later else math.nan,
    }


@torch.no_grad()
def call_times(model: Llama, repeats: int, read: int = 128) -> dict[int, float]:
    """ms of a call on n tokens after `read` others: the price of judging n - 1 drafted tokens."""
    found = dict.fromkeys(CALLS, math.inf)
    for _ in range(max(repeats, 3)):
        for n in CALLS:
            cache = KVCache()
            model(torch.zeros(1, read, dtype=torch.long), cache)
            begin = time.perf_counter()
            model(torch.zeros(1, n, dtype=torch.long), cache)
            found[n] = min(found[n], 1000 * (time.perf_counter() - begin))
    return {n: round(ms, 2) for n, ms in found.items()}


def in_fewer_bits(model: Llama, bits: int) -> Llama:
    """A copy whose matrices are rounded to the nearest of 2^bits values in groups of 32."""
    rounded = copy.deepcopy(model)
    for layer in linear_layers(rounded).values():
        w_hat, _ = round_to_nearest(layer.weight, bits, 32, symmetric=False)
        layer.weight = torch.nn.Parameter(w_hat, requires_grad=False)
    return rounded


def main(
    drafts: str = typer.Option("", help='which, such as "prompt lookup;4 bits"; all by default'),
    kinds: str = typer.Option("rewriting,prose,code,list", help="of text"),
    prompts: int = typer.Option(2, min=1, max=2, help="of each kind"),
    tokens: int = typer.Option(128, min=8, help="of an answer, at most"),
    temperature: float = typer.Option(0.0, min=0, help="of the model and of the drafts"),
    top_p: float = typer.Option(1.0, help="likewise"),
    repeats: int = typer.Option(3, min=1, help="of every run; the quickest of each call counts"),
    threads: int = typer.Option(0, min=0, help="of PyTorch; as it likes by default"),
    out: Path = typer.Option(Path(__file__).parent / "results", help="folder for the JSON file"),
) -> None:
    """Answer every prompt plainly and with every draft."""
    if threads:
        torch.set_num_threads(threads)
    available = [*CHAINS, *TREES]
    chosen = [d.strip() for d in drafts.split(";") if d.strip()] if drafts else available
    asked = [k.strip() for k in kinds.split(",")]
    for name, known in [*((d, available) for d in chosen), *((k, list(QUESTIONS)) for k in asked)]:
        if name not in known:
            raise typer.BadParameter(f"no {name!r}; there are: {', '.join(known)}")

    model, tokenizer = load_smollm2()
    training = tokenizer.encode(calibration_text().text).ids if "n-grams, trained" in chosen else []
    rounded = {b: in_fewer_bits(model, b) for b in (4, 3) if f"{b} bits" in chosen}
    kit = Kit(model, rounded, training, temperature, top_p)
    stop = [tokenizer.token_to_id("<|im_end|>")]
    sampling = {"temperature": temperature, "top_p": top_p}
    now = datetime.datetime.now(datetime.UTC)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"speculative_smollm2_{now:%Y%m%d_%H%M%S}.json"
    generate(model, torch.tensor([[1, 2, 3]]), 3)  # to warm up
    result: dict = {
        "date": now.isoformat(timespec="seconds"),
        "device": processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            **sampling,
            "tokens": tokens,
            "prompts": prompts,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
        },
        "ms_per_call_on": call_times(model, repeats),
        "results": [],
    }

    for kind in asked:
        for i, question in enumerate(QUESTIONS[kind][:prompts]):
            text = chat_prompt([{"role": "user", "content": question}])
            prompt = torch.tensor([tokenizer.encode(text).ids])
            plain, speed = measure_plain(model, prompt, stop, tokens, repeats, sampling)
            for name in chosen:
                answer, row = measure(name, kit, prompt, stop, tokens, repeats, sampling)
                row = {
                    "kind": kind,
                    "prompt": i,
                    "draft": name,
                    **row,
                    "plain_tokens_per_second": speed,
                    # Two samples have nothing to be equal in.
                    "same_as_plain": answer.equal(plain) if temperature == 0 else None,
                }
                result["results"].append(row)
                result["table"] = tabulated(result)
                path.write_text(json.dumps(result, indent=1) + "\n")
                verdict = {True: "same", False: "OTHER", None: "another"}[row["same_as_plain"]]
                print(
                    f"{kind:10} {i} {name:26} {row['tokens_per_call']:5.2f} tokens a call  "
                    f"{row['tokens_per_second']:6.2f} tokens/s, plain {speed:6.2f}  "
                    f"{verdict} answer",
                    flush=True,
                )
    print_results(result["table"])
    print(f"Written: {path}")


def tabulated(result: dict) -> dict:
    """The table of a result: a caption, the columns' names, and rows of strings."""
    on, rows = result["settings"], result["results"]
    kinds, drafts = (list(dict.fromkeys(row[name] for row in rows)) for name in ("kind", "draft"))
    lines = []
    for draft in drafts:
        mine = [row for row in rows if row["draft"] == draft]
        cells = []
        for kind in kinds:
            of_kind = [row for row in mine if row["kind"] == kind]
            if of_kind:
                gains = [r["tokens_per_second"] / r["plain_tokens_per_second"] for r in of_kind]
                per_call = mean(row["tokens_per_call"] for row in of_kind)
                cells.append(f"{per_call:.2f}, {mean(gains):.2f}x")
            else:
                cells.append("")
        judged = sum(row["judged"] for row in mine)
        accepted = sum(row["accepted"] for row in mine)
        same = sum(bool(row["same_as_plain"]) for row in mine)
        lines.append(
            [
                draft,
                *cells,
                f"{100 * accepted / judged:.0f}%" if judged else "",
                f"{mean(row['ms_per_drafted_token'] for row in mine):.1f}",
                f"{same}/{len(mine)}" if on["temperature"] == 0 else "",
            ]
        )
    how = f"temperature {on['temperature']:g}, top-p {on['top_p']:g}"
    return {
        "caption": "SmolLM2 (134.5M parameters, float32) answers "
        f"{on['prompts']} prompt(s) of each kind in at most {on['tokens']} tokens; "
        f"{'greedy' if on['temperature'] == 0 else how}, batch 1, {on['threads']} thread(s). By "
        "kind of text: tokens a call, and tokens a second over those of plain decoding, after the "
        "call that reads the prompt; then the share of judged tokens that was accepted, ms a "
        "drafted token (a plain step takes "
        f"{1000 / mean(row['plain_tokens_per_second'] for row in rows):.0f} ms), and how many "
        "answers were those of plain decoding",
        "columns": ["draft", *kinds, "accepted", "ms", "same"],
        "rows": lines,
    }


def mean(values) -> float:  # type: ignore[no-untyped-def]
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def print_results(table: dict) -> None:
    shown = Table(title=table["caption"])
    for name in table["columns"]:
        shown.add_column(name, justify="left" if name == "draft" else "right")
    for row in table["rows"]:
        shown.add_row(*row)
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
