"""Every way of fine-tuning a few parameters, on the same texts, each at the learning rate it likes.

A model reads passages of State of the Union addresses and says which era (or party) they are from;
training, validation and test passages come from different addresses. Every method gets the same
number of steps, batches and a new head; its learning rate is chosen on the validation passages (the
mean of the first two seeds), from a list, and the test accuracy at that rate is measured with every
seed. (As stored, on MiniLM the lists were two: 3e-5 to 3e-2, and for LoRA and after 1e-4 to 3e-2.)

    python benchmarks/peft.py --methods lora-r8,full --lrs 1e-3 --seeds 1 --steps 20     # a look
    python benchmarks/peft.py --body minilm --device cuda --jobs 14                    # all of it

Prints method, trained parameters, the rate chosen, accuracy with its standard error, how much is
lost by a rate three times too large or too small, and the memory that training took; then whether
the survey's order holds (full, LoRA, adapters, prefix, prompt: Han et al. 2024, arXiv 2403.14608;
He et al. 2022, arXiv 2110.04366). Every run goes to benchmarks/results/.
"""

import datetime
import functools
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from sparse_training import InThisProcess, mean_and_error, processor
from torch import Tensor, nn

from fewer.data import PassageSplit, passages
from fewer.models import Bert, Classifier, Llama, load_minilm, load_smollm2
from fewer.peft import (
    Wrap,
    accuracy,
    adapters,
    attach,
    bitfit,
    cached_features,
    class_means,
    cosine_logits,
    dora,
    fine_tune,
    ia3,
    linear_probe,
    lora,
    model_bytes,
    parallel_adapters,
    prefix_tuning,
    prompt_tuning,
    quantize_model_nf4,
    whole,
)

EVERY_LINEAR = {
    Llama: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    Bert: ("query", "key", "value", "attention.output", "mlp.up", "mlp.down"),
}
QUERY_AND_VALUE = {Llama: ("q_proj", "v_proj"), Bert: ("query", "value")}
CHOOSING_SEEDS = 2  # one lucky seed must not choose a rate at which others are lost
RANKS = (1, 2, 4, 8, 16, 32, 64)
Method = Callable[[nn.Module, int, list[list[int]]], dict[str, Wrap]]  # body, seed, class names


def _lora(rank: int, targets: dict[type, tuple[str, ...]] = EVERY_LINEAR) -> Method:
    return lambda body, seed, _: lora(body, rank, 2.0 * rank, targets[type(body)], seed)


METHODS: dict[str, Method] = {
    "prompt-20 random": lambda body, seed, _: prompt_tuning(body, 20, "random", seed=seed),
    "prompt-20 words": lambda body, seed, _: prompt_tuning(body, 20, "vocabulary", seed=seed),
    "prompt-20 labels": lambda body, seed, names: prompt_tuning(body, 20, "label", names, seed),
    "prefix-20": lambda body, seed, _: prefix_tuning(body, 20, seed=seed),
    "prefix-20 direct": lambda body, seed, _: prefix_tuning(body, 20, None, seed),
    "ia3": lambda body, seed, _: ia3(body),
    "bitfit": lambda body, seed, _: bitfit(body),
    "adapters-16": lambda body, seed, _: adapters(body, 16, seed),
    "parallel-32": lambda body, seed, _: parallel_adapters(body, 32, seed=seed),
    **{f"lora-r{rank}": _lora(rank) for rank in RANKS},
    "lora-r8 q,v": _lora(8, QUERY_AND_VALUE),
    "dora-r8": lambda body, seed, _: dora(body, 8, 16.0, EVERY_LINEAR[type(body)], seed),
    "qlora-r8": _lora(8),  # on a body in NF4
    "full": lambda body, seed, _: whole(*(name for name, _ in body.named_children())),
}
# (worse, better) as surveys have it.
PUBLISHED_ORDER = [
    ("prompt-20 random", "prompt-20 words"),
    ("prompt-20 words", "prompt-20 labels"),
    ("prompt-20 labels", "prefix-20"),
    ("prefix-20", "adapters-16"),
    ("adapters-16", "lora-r8"),
    ("lora-r8", "full"),
    ("lora-r8 q,v", "lora-r8"),
    ("lora-r1", "lora-r8"),
    ("lora-r8", "dora-r8"),
    ("qlora-r8", "lora-r8"),
    ("linear probe", "bitfit"),
    ("linear probe", "full"),
]


class Run(NamedTuple):
    """One training, to be done in any process."""

    method: str
    lr: float
    seed: int


class Setup(NamedTuple):
    """What all runs share."""

    body: str
    task: str
    device: str
    steps: int
    batch: int
    length: int
    per_speech: int
    data_seed: int


@functools.cache
def prepared(setup: Setup, nf4: bool) -> tuple[nn.Module, PassageSplit, list[list[int]]]:
    """The frozen body, the passages on the device, and the class names as token ids."""
    loaded = {"minilm": load_minilm, "smollm2": load_smollm2}[setup.body]()
    body: nn.Module = loaded.model
    if nf4:
        quantize_model_nf4(body)
    split = passages(
        loaded.tokenizer, setup.task, setup.length, setup.per_speech, seed=setup.data_seed
    )
    moved = [
        part._replace(tokens=part.tokens.to(setup.device), labels=part.labels.to(setup.device))
        for part in (split.train, split.validation, split.test)
    ]
    names = [loaded.tokenizer.encode(c, add_special_tokens=False).ids for c in split.classes]
    return body.to(setup.device), PassageSplit(*moved, split.classes), names


def new_classifier(body: nn.Module, classes: int) -> Classifier:
    """The body with a head whose logits start at zero."""
    assert isinstance(body, Bert | Llama)
    head = nn.Linear(body.config.d_model, classes).to(next(body.parameters()))
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return Classifier(body, head)


def train_and_test(run: Run, setup: Setup) -> dict:
    """One row: a method trained with one learning rate and seed."""
    torch.backends.cuda.matmul.allow_tf32 = True
    body, split, names = prepared(setup, run.method.startswith("qlora"))
    classifier = new_classifier(body, len(split.classes))
    wraps = METHODS[run.method](body, run.seed, names)
    wraps = {f"body.{name}": wrap for name, wrap in wraps.items()} | whole("head")
    begin = time.perf_counter()
    with attach(classifier, wraps) as attached:
        memory = Memory(classifier, setup.device)
        head = sum(p.numel() for p in classifier.head.parameters())
        losses = fine_tune(
            classifier,
            attached.parameters(),
            split.train.tokens,
            split.train.labels,
            steps=setup.steps,
            lr=run.lr,
            batch=setup.batch,
            seed=run.seed,
        )
        memory.stop()
        return {
            **run._asdict(),
            "trained": attached.count() - head,
            "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
            "validation": accuracy(classifier, split.validation.tokens, split.validation.labels),
            "test": accuracy(classifier, split.test.tokens, split.test.labels),
            "seconds": round(time.perf_counter() - begin, 1),
            "peak_bytes": memory.bytes,
        }


class Memory:
    """The most bytes that training a model takes: its weights, and all that is made meanwhile.

    Other bodies that this process keeps for later runs, and modules put aside by `attach`, are not
    counted. Only on a GPU; elsewhere None.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        self.bytes: int | None = None
        self.on = device == "cuda"
        if self.on:
            torch.cuda.reset_peak_memory_stats()
            self.others = torch.cuda.memory_allocated() - model_bytes(model)

    def stop(self) -> None:
        if self.on:
            self.bytes = torch.cuda.max_memory_allocated() - self.others


def probes(setup: Setup) -> list[dict]:
    """The linear probe and the cosine classifier, on features that are computed once."""
    body, split, _ = prepared(setup, nf4=False)
    classifier, classes = new_classifier(body, len(split.classes)), len(split.classes)
    begin = time.perf_counter()
    train, validation, test = (cached_features(classifier.features, p.tokens) for p in split[:3])

    def row(method: str, lr: float, logits: Callable[[Tensor], Tensor]) -> dict:
        def right(features: Tensor, labels: Tensor) -> float:
            return (logits(features).argmax(-1) == labels).double().mean().item()

        return {
            **Run(method, lr, 0)._asdict(),
            "trained": 0,
            "loss": None,
            "validation": right(validation, split.validation.labels),
            "test": right(test, split.test.labels),
            "seconds": round(time.perf_counter() - begin, 1),
            "peak_bytes": None,
        }

    rows = []
    for decay in (1e-3, 1e-2, 1e-1, 1.0):
        W, b = linear_probe(train, split.train.labels, classes, decay, steps=200)
        rows.append(row("linear probe", decay, lambda f, W=W, b=b: f @ W.T + b))
    directions = class_means(train, split.train.labels, classes)
    rows.append(row("cosine classifier", 0.0, lambda f: cosine_logits(f, directions)))
    return rows


def resumed(path: Path, setup: Setup) -> list[dict]:
    """The rows of an earlier result, which must have been measured with the same settings."""
    earlier = json.loads(path.read_text())
    for name, value in setup._asdict().items():
        if earlier["settings"][name] != value:
            raise typer.BadParameter(
                f"{path} was measured with --{name} {earlier['settings'][name]}, not {value}"
            )
    return earlier["results"]


def best_rates(rows: Iterable[dict]) -> dict[str, float]:
    """Of each method the learning rate with the best validation accuracy; of equals the smaller."""
    best: dict[str, float] = {}
    accuracy_at = validation(rows)
    for method, lr in sorted(accuracy_at):
        if method not in best or accuracy_at[method, lr] > accuracy_at[method, best[method]]:
            best[method] = lr
    return best


def validation(rows: Iterable[dict]) -> dict[tuple[str, float], float]:
    """The mean validation accuracy of each method and rate, over the seeds that choose."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["seed"] < CHOOSING_SEEDS:
            found.setdefault((row["method"], row["lr"]), []).append(row["validation"])
    return {key: sum(values) / len(values) for key, values in found.items()}


def main(
    body: str = typer.Option("minilm", help="minilm or smollm2"),
    task: str = typer.Option("era", help="era or party"),
    methods: str = typer.Option("", help="which, such as lora-r8,full; all by default"),
    lrs: str = typer.Option(
        "3e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1", help="learning rates to try"
    ),
    seeds: int = typer.Option(5, min=1, help="of the test at the best rate"),
    steps: int = typer.Option(300, min=1),
    batch: int = typer.Option(16, min=1, help="passages a step"),
    length: int = typer.Option(64, min=8, help="tokens of a passage"),
    per_speech: int = typer.Option(8, min=1, help="passages of an address, at most"),
    data_seed: int = typer.Option(0, help="which addresses are trained, validated and tested on"),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    jobs: int = typer.Option(1, min=1, help="processes side by side"),
    resume: Path | None = typer.Option(
        None,
        exists=True,
        help="a result of the same settings, perhaps of a run broken off: what it has is kept",
    ),
    out: Path = typer.Option(Path(__file__).parent / "results", help="folder for the JSON file"),
) -> None:
    """Fine-tune with every method, learning rate and seed."""
    chosen = [m.strip() for m in methods.split(",") if m.strip()] if methods else list(METHODS)
    if "lora-r8 q" in chosen:  # the one name with a comma in it
        at = chosen.index("lora-r8 q")
        chosen[at : at + 2] = ["lora-r8 q,v"]
    if unknown := set(chosen) - set(METHODS):
        raise typer.BadParameter(f"no method {unknown.pop()!r}; there are: {', '.join(METHODS)}")
    setup = Setup(body, task, device, steps, batch, length, per_speech, data_seed)
    rates = [float(lr) for lr in lrs.split(",")]
    rows = resumed(resume, setup) if resume else probes(setup)
    done = {Run(row["method"], row["lr"], row["seed"]) for row in rows}
    one = functools.partial(train_and_test, setup=setup)
    # Forked workers would share the GPU's context, which does not survive a fork.
    context = multiprocessing.get_context("spawn")
    now = datetime.datetime.now(datetime.UTC)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"peft_{body}_{task}_{now:%Y%m%d_%H%M%S}.json"

    def result() -> dict:
        best = best_rates(rows)
        found = {
            "date": now.isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "settings": {
                **setup._asdict(),
                "lrs": sorted({row["lr"] for row in rows if row["trained"]}),
                "seeds": seeds,
                "jobs": jobs,
            },
            "best_lr": best,
            "results": rows,
        }
        return {**found, "table": tabulated(found)}

    with ProcessPoolExecutor(jobs, context) if jobs > 1 else InThisProcess() as pool:

        def do(runs: list[Run]) -> None:
            for row in pool.map(one, [run for run in runs if run not in done]):
                rows.append(row)
                path.write_text(json.dumps(result(), indent=1) + "\n")  # a part, for --resume
                print(
                    f"{row['method']:18} lr {row['lr']:<7g} seed {row['seed']}  validation "
                    f"{row['validation']:.3f}  test {row['test']:.3f}  {row['seconds']:5.1f} s",
                    flush=True,
                )

        choosing = range(min(CHOOSING_SEEDS, seeds))
        do([Run(method, lr, seed) for seed in choosing for lr in rates for method in chosen])
        best = best_rates(rows)
        others = range(len(choosing), seeds)
        do([Run(method, best[method], seed) for seed in others for method in chosen])

    path.write_text(json.dumps(result(), indent=1) + "\n")
    print_results(result())
    print(f"Written: {path}")


def tabulated(result: dict) -> dict:
    """The table of a result: a caption, the columns' names, and rows of strings."""
    on, rows = result["settings"], []
    for method, lr in sorted(result["best_lr"].items(), key=lambda item: order_of(item[0])):
        mine = [row for row in result["results"] if row["method"] == method]
        at_best = [row for row in mine if row["lr"] == lr]
        mean, error = mean_and_error([row["test"] for row in at_best])
        found = {at: value for (_, at), value in validation(mine).items()}
        accuracy = f"{100 * mean:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")
        near = [
            next((v for at, v in found.items() if 0 < abs(at - lr * f) < 0.2 * lr * f), None)
            for f in (1 / 3.16, 3.16)
        ]
        trained, peak = at_best[0]["trained"], at_best[0]["peak_bytes"]
        rows.append(
            [
                method,
                f"{trained:,}" if trained else "",
                f"{lr:g}" if trained else "",
                accuracy,
                *("" if v is None else f"{100 * (v - found[lr]):+.1f}" for v in near),
                f"{peak / 2**20:,.0f}" if peak else "",
                f"{sum(row['seconds'] for row in at_best) / len(at_best):.0f}" if trained else "",
            ]
        )
    names = {"minilm": "MiniLM (22.6M parameters)", "smollm2": "SmolLM2 (134.5M parameters)"}
    return {
        "caption": f"{names[on['body']]}, {on['task']}, {on['steps']} steps of {on['batch']} "
        f"passages of {on['length']} tokens, {on['seeds']} seeds; test accuracy in %, mean ± "
        "standard error; trained parameters without the head; in the columns beside it, points of "
        "validation accuracy gained or lost at a third and at three times the learning rate "
        "(mean of two seeds); MiB that training takes at its peak, weights and activations "
        f"included; seconds with {on['jobs']} trainings side by side",
        "columns": [
            "method",
            "trained",
            "rate",
            "accuracy",
            "rate / 3",
            "rate x 3",
            "MiB",
            "seconds",
        ],
        "rows": rows,
    }


def order_of(method: str) -> int:
    """Probes first, then as in METHODS."""
    return list(METHODS).index(method) if method in METHODS else -1


def print_results(result: dict) -> None:
    table = Table(title=result["table"]["caption"])
    for name in result["table"]["columns"]:
        table.add_column(name, justify="left" if name == "method" else "right")
    tests: dict[str, list[float]] = {}
    for row in result["table"]["rows"]:
        table.add_row(*row)
    for method, lr in result["best_lr"].items():
        at_best = [r for r in result["results"] if r["method"] == method and r["lr"] == lr]
        tests[method] = [row["test"] for row in sorted(at_best, key=lambda row: row["seed"])]
    Console(width=110).print(table)
    print("The published order, in points of accuracy (below 2 standard errors it says nothing):")
    for worse, better in PUBLISHED_ORDER:
        if worse not in tests or better not in tests:
            continue
        a, b = tests[better], tests[worse]
        b = b * len(a) if len(b) == 1 else b  # a probe has no seeds
        mean, error = mean_and_error([x - y for x, y in zip(a, b, strict=True)])
        says = "reversed" if mean < 0 else "holds"
        if mean == 0 or not abs(mean) >= 2 * error:
            says = "not resolved"
        print(f"  {better:18} over {worse:18} {100 * mean:+6.2f} ± {100 * error:.2f}  {says}")


if __name__ == "__main__":
    typer.run(main)
