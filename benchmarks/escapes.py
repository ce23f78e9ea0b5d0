"""How many inputs do the checks need? Every wrong version of an exercise, under many seeds.

The kill table asks whether a wrong version is caught under one seed. Here, for each misconception
and each automatic mutant that differs, seed and check: which is the first set of inputs on which it
fails? A check's ``examples`` should be what its hardest wrong version needs and not much more: each
is a call for every student of the class.

    python benchmarks/escapes.py sqnr --seeds 20
    python benchmarks/escapes.py --topic quantization    # 100 seeds: a machine with many cores

Prints for each check how many wrong versions it catches, how many of them under every seed, and the
draws within which it does; then the wrong versions that all checks together let through, and at how
many of the seeds.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import multiprocessing
import os
from collections import defaultdict
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from autograder.bounded import Bounded
from autograder.candidate import Local
from autograder.exercise import Exercise, exercises, find
from autograder.killtable import first_failure, remembering
from autograder.mutants import mutants
from fewer.progress import track

console = Console(highlight=False)
Failures = dict[str, dict[str, int]]  # of each wrong version, by check: the first draw that fails


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Exercises; default: all.")] = None,
    topic: Annotated[str, typer.Option(help="Only this topic's exercises.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 100,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Find what the checks let through, and how soon they catch the rest."""
    if unknown := set(names or ()) - exercises().keys():
        raise typer.BadParameter(f"no exercise is called {', '.join(sorted(unknown))}")
    chosen = [name for name in names or exercises() if topic in ("", find(name).topic)]
    if not chosen:
        raise typer.BadParameter(f"no exercise has the topic {topic!r}")
    found: dict[str, list[Failures]] = defaultdict(list)
    tasks = [(name, seed) for seed in range(first, first + seeds) for name in chosen]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(failures, name, seed): name for name, seed in tasks}
        done = concurrent.futures.as_completed(futures)
        for future in track(done, "wrong versions", total=len(tasks)):
            found[futures[future]].append(future.result())
    for name in chosen:
        show(find(name), found[name])


def failures(name: str, seed: int) -> Failures:
    """Where each wrong version of an exercise fails first, under one seed."""
    exercise = find(name)
    made = mutants(inspect.unwrap(exercise.reference))
    exercise = remembering(exercise)
    wrong = {m.name: Local(m.function) for m in exercise.misconceptions}
    for mutant in made:
        if mutant.text not in exercise.equivalent:
            function = exercise.decorated(mutant.function)
            wrong[mutant.text] = Bounded(function, exercise.decorator is not None)
    return {
        text: {
            check.name: failure[0]
            for check in exercise.checks
            if (failure := first_failure(exercise, check, candidate, seed))
        }
        for text, candidate in wrong.items()
    }


def show(exercise: Exercise, found: list[Failures]) -> None:
    """Print what was found about an exercise."""
    table = Table(box=None, header_style="dim", title=exercise.name, title_justify="left")
    for column in ("check", "inputs", "catches", "always", "half by", "all by"):
        table.add_column(column, justify="left" if column == "check" else "right")
    for check in exercise.checks:
        at = {
            text: [seen[text][check.name] for seen in found if check.name in seen[text]]
            for text in found[0]
        }
        caught = {text: numbers for text, numbers in at.items() if numbers}
        numbers = sorted(number for some in caught.values() for number in some)
        table.add_row(
            check.name,
            str(len(check.cases) or check.examples),
            str(len(caught)),
            str(sum(len(some) == len(found) for some in caught.values())),
            str(numbers[len(numbers) // 2]) if numbers else "",
            str(numbers[-1]) if numbers else "",
        )
    console.print(table)
    for text in found[0]:
        if missed := sum(not seen[text] for seen in found):
            console.print(f"  [red]passes at {missed} of {len(found)} seeds:[/] ", end="")
            console.print(text, markup=False)
    console.print()


if __name__ == "__main__":
    typer.run(main)
