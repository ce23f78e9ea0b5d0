"""Accuracy against sparsity for every way of training sparse.

One small fully connected network, one data set, all seeds of a method trained side by side. Every
method gets the same number of steps, batches and initial weights for a seed; the sparsity is that
of all weights together (biases are dense in every network). Prints a table of means and standard
errors, says where the published order holds and where it does not, and writes every single number
to benchmarks/results/.

    python benchmarks/sparse_training.py --seeds 3 --sparsities 0.9,0.98      # a first look
    python benchmarks/sparse_training.py --seeds 10 --device cuda             # the stored one
"""

import datetime
import json
import math
import platform
import time
from itertools import pairwise
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from fewer.data import LabelledSplit, digits, mnist1d
from fewer.sparsity import (
    Network,
    SparseRun,
    connection_counts,
    cubic_sparsity,
    erk_densities,
    forward_flops,
    initial_network,
    lottery_ticket,
    mlp_parameters,
    prune_surviving,
    pruning_step_flops,
    random_masks,
    rewind,
    rewire_gradual,
    rewire_rigl,
    rewire_set,
    rigl_step_flops,
    small_dense_widths,
    step_flops,
    train_sparse,
    uniform_densities,
)

DATA = {"mnist1d": mnist1d, "digits": digits}
METHODS = (
    "dense",
    "small-dense",
    "static",
    "static-erk",
    "set",
    "set-erk",
    "rigl",
    "rigl-erk",
    "gradual",
    "lottery",
)
PUBLISHED_ORDER = (
    ("static", "set"),
    ("set", "rigl"),
    ("rigl", "rigl-erk"),
    ("small-dense", "rigl-erk"),
)


def main(
    data: str = typer.Option("mnist1d", help="mnist1d or digits"),
    hidden: str = typer.Option("100,100", help="units of the hidden layers"),
    sparsities: str = typer.Option("0.8,0.9,0.95,0.98", help="of all weights, rising"),
    methods: str = typer.Option(",".join(METHODS), help="which, in this order"),
    seeds: int = typer.Option(5, min=1),
    steps: int = typer.Option(2000, min=1),
    batch: int = 64,
    lr: float = 0.1,
    delta_t: int = typer.Option(50, min=1, help="steps between two updates of the connections"),
    alpha: float = typer.Option(0.3, help="the first fraction replaced by SET and RigL"),
    rewind_to: int = typer.Option(100, min=0, help="the step k that a lottery ticket goes back to"),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    out: Path = typer.Option(Path(__file__).parent / "results", help="folder for the JSON file"),
) -> None:
    """Train every method at every sparsity with every seed."""
    settings = {key: value for key, value in locals().items() if key != "out"}
    split = LabelledSplit(*(tensor.to(device) for tensor in DATA[data]()))
    classes = int(split.y_train.max()) + 1
    widths = [split.x_train.shape[1], *(int(h) for h in hidden.split(",")), classes]
    shapes = [(b, a) for a, b in pairwise(widths)]
    total = sum(a * b for a, b in shapes)
    f_D = forward_flops([a * b for a, b in shapes])
    levels = [float(s) for s in sparsities.split(",")]
    seed_list = list(range(seeds))
    T_end = 3 * steps // 4
    last_update = (T_end - 1) // delta_t * delta_t

    def start(widths: list[int]) -> Network:
        network = initial_network(widths, seed_list)
        return Network(*([tensor.to(device) for tensor in part] for part in network))

    def train(
        network: Network, masks: list[torch.Tensor] | None = None, **how: object
    ) -> SparseRun:
        if masks is None:
            masks = [torch.ones_like(w, dtype=torch.bool) for w in network.weights]
        masks = [mask.to(device) for mask in masks]
        common = {"seeds": seed_list, "steps": steps, "delta_T": delta_t, "lr": lr, "batch": batch}
        return train_sparse(split, network, masks, **common, **how)  # type: ignore[arg-type]

    def one(method: str, sparsity: float) -> tuple[SparseRun, float]:
        """A trained run and the FLOPs of its mean step."""
        name, _, erk = method.partition("-")
        if method == "dense":
            return train(start(widths)), step_flops(f_D)
        if method == "small-dense":
            connections = sum(connection_counts(shapes, uniform_densities(shapes, sparsity)))
            narrow = small_dense_widths(widths, connections + mlp_parameters(widths) - total)
            f = forward_flops([a * b for a, b in pairwise(narrow)])
            return train(start(narrow)), step_flops(f)
        if method == "gradual":
            run = train(start(widths), rewire=rewire_gradual(sparsity, last_update))
            done = [t // delta_t * delta_t for t in range(steps)]
            path = [cubic_sparsity(t, 0, last_update, 0.0, sparsity) for t in done]
            return run, pruning_step_flops(f_D, path)
        densities = (erk_densities if erk else uniform_densities)(shapes, sparsity)
        counts = connection_counts(shapes, densities)
        rewire = {
            "static": None,
            "set": rewire_set(alpha, T_end),
            "rigl": rewire_rigl(alpha, T_end),
        }[name]
        run = train(start(widths), random_masks(widths, counts, seed_list), rewire=rewire)
        f_S = forward_flops(counts)
        if name != "rigl":
            return run, step_flops(f_S)
        share = T_end / steps  # connections rest after T_end
        # An update takes the place of a step here, so delta_t - 1 sparse steps lie between two.
        moving = rigl_step_flops(f_S, f_D, delta_t - 1) if delta_t > 1 else 2 * f_S + f_D
        return run, share * moving + (1 - share) * step_flops(f_S)

    def tickets() -> dict[float, tuple[SparseRun, float]]:
        """All levels out of one chain of rounds; the FLOPs include every round that led there."""
        densities, fractions, stops = [1.0], [], {}
        for level in levels:
            rounds = math.ceil(math.log(densities[-1] / (1 - level)) / math.log(1 / 0.6) - 1e-9)
            kept = ((1 - level) / densities[-1]) ** (1 / rounds)
            for _ in range(rounds):
                densities.append(densities[-1] * kept)
                fractions.append(1 - kept)
            densities[-1] = 1 - level
            stops[len(densities) - 1] = level
        early = train(start(widths), stop=rewind_to).network
        runs: list[SparseRun] = []

        def from_k(weights: list[torch.Tensor], masks: list[torch.Tensor]) -> list[torch.Tensor]:
            runs.append(train(Network(weights, early.biases), masks, start=rewind_to))
            return runs[-1].network.weights

        masks = lottery_ticket(from_k, early.weights, fractions, prune=each_seed)[-1]
        from_k(rewind(early.weights, masks), masks)
        spent = [step_flops(f_D * density) for density in densities]
        return {level: (runs[i], sum(spent[: i + 1])) for i, level in stops.items()}

    rows: list[dict[str, object]] = []

    def record(method: str, sparsity: float, run: SparseRun, flops: float, seconds: float) -> None:
        connected = [mask.sum((1, 2)).tolist() for mask in run.masks]
        row = {
            "method": method,
            "sparsity": sparsity,
            "accuracy": [round(a, 4) for a in run.accuracy.tolist()],
            "connections": [list(layer) for layer in zip(*connected, strict=True)],
            "flops_over_dense": flops / step_flops(f_D),
            "seconds": round(seconds, 1),
        }
        rows.append(row)
        mean, error = mean_and_error(run.accuracy.tolist())
        print(
            f"{method:12} {sparsity:5.2f}  {100 * mean:5.2f} ± {100 * error:4.2f} %  "
            f"{row['flops_over_dense']:6.3f} x dense FLOPs  {seconds:5.1f} s",
            flush=True,
        )

    for method in methods.split(","):
        begin = time.perf_counter()
        if method == "lottery":
            for level, (run, flops) in tickets().items():
                record(method, level, run, flops, time.perf_counter() - begin)
            continue
        for level in [0.0] if method == "dense" else levels:
            begin = time.perf_counter()
            run, flops = one(method, level)
            record(method, level, run, flops, time.perf_counter() - begin)

    now = datetime.datetime.now(datetime.UTC)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": settings | {"widths": widths, "weights": total, "T_end": T_end},
        "results": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    units = hidden.replace(",", "-")
    path = out / f"sparse_training_{data}_{now:%Y%m%d_%H%M%S}_{units}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows, levels, f"{data}, {'-'.join(map(str, widths))}, {steps} steps, {seeds} seeds")
    print_order(rows, levels)
    print(f"Written: {path}")


def each_seed(
    weights: list[torch.Tensor], masks: list[torch.Tensor], fraction: float
) -> list[torch.Tensor]:
    """`prune_surviving` for every network of a stack by itself."""
    pruned = [
        prune_surviving([w[s] for w in weights], [m[s] for m in masks], fraction)
        for s in range(len(masks[0]))
    ]
    return [torch.stack(layer) for layer in zip(*pruned, strict=True)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error (nan for a single value)."""
    x = torch.tensor(values, dtype=torch.float64)
    error = x.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return x.mean().item(), error


def print_table(rows: list[dict], levels: list[float], title: str) -> None:  # type: ignore[type-arg]
    table = Table(title=f"Test accuracy in %, mean ± standard error ({title})")
    table.add_column("method")
    for level in levels:
        table.add_column(f"{100 * level:g}% sparse", justify="right")
    table.add_column("FLOPs / dense", justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {row["sparsity"]: row for row in rows if row["method"] == method}
        texts = []
        for level in levels:
            row = cells.get(level, cells.get(0.0))
            mean, error = mean_and_error(row["accuracy"]) if row else (math.nan, math.nan)
            texts.append(f"{100 * mean:.2f} ± {100 * error:.2f}")
        flops = [cells[level]["flops_over_dense"] for level in sorted(cells)]
        table.add_row(method, *texts, " ".join(f"{f:.2f}" for f in flops))
    Console(width=120).print(table)


def print_order(rows: list[dict], levels: list[float]) -> None:  # type: ignore[type-arg]
    """Whether Evci et al.'s order holds: differences of the same seeds, in standard errors."""
    accuracy = {(row["method"], row["sparsity"]): row["accuracy"] for row in rows}
    print("The published order, in points of accuracy (a difference below 2 errors says nothing):")
    for worse, better in PUBLISHED_ORDER:
        for level in levels:
            pair = accuracy.get((better, level)), accuracy.get((worse, level))
            if pair[0] is None or pair[1] is None:
                continue
            mean, error = mean_and_error([b - w for b, w in zip(*pair, strict=True)])
            says = "reversed" if mean < 0 else "holds"
            if not abs(mean) >= 2 * error:  # nan, of a single seed, comes here too
                says = "not resolved"
            print(
                f"  {better:>8} - {worse:11} at {100 * level:g}%: "
                f"{100 * mean:+6.2f} ± {100 * error:.2f}  {says}"
            )


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = (
        [l for l in info.read_text().splitlines() if l.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


class InThisProcess:
    """`map` in place of a pool of processes."""

    map = staticmethod(map)

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass


if __name__ == "__main__":
    typer.run(main)
