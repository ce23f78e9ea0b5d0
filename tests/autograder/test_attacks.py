"""The published attack suite against this installation, in its short form; and the suite itself:
would it notice, if an attack succeeded?"""

from __future__ import annotations

import re
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
from nbformat import NotebookNode
from rich.console import Console
from typer.testing import CliRunner

import autograder.attacks
from autograder import sandbox
from autograder.attacks import Attack, Outcome, attacks, run_attacks, table
from autograder.attacks.attack import HEAD, HONEST, TARGET, Scene, at_once
from autograder.attacks.notebooks import WRITTEN, cell_of
from autograder.attacks.suite import MARK_FOUND, NEIGHBOURS, foreign_parts
from autograder.cli import app
from autograder.compare import Mismatch, like
from autograder.verdict import Failure, Result, Verdict

ROOT = Path(__file__).parents[2]


def solves_it(nb: NotebookNode, scene: Scene) -> None:
    cell_of(nb, TARGET).source = scene.solutions[TARGET]


def writes_outside(nb: NotebookNode, scene: Scene) -> None:
    (scene.outside / scene.mark).write_text("here")


def tells_a_secret(nb: NotebookNode, scene: Scene) -> None:
    cell_of(nb, WRITTEN).source = scene.secret


def connects(nb: NotebookNode, scene: Scene) -> None:
    with socket.create_connection(("127.0.0.1", scene.known["port"])) as connection:
        connection.sendall(scene.mark.encode())


# What each of these does is done before grading, or is honest, or does no harm. The suite cannot
# know that, and must say that they succeeded.
WINNERS = {
    "more": (Attack("more", "", "Earns more than it says.", forge=solves_it), {TARGET: 10}, ""),
    "less": (Attack("less", "", "Earns less than it says.", deserves={TARGET: 10}), {}, ""),
    "proud": (Attack("proud", "", "Brags.", at_once("brag('of nothing')")), {}, "of nothing"),
    "file": (Attack("file", "", "Writes.", forge=writes_outside), {}, "left a file"),
    "secret": (Attack("secret", "", "Tells.", forge=tells_a_secret), {}, "a secret is in lab1"),
    "voice": (Attack("voice", "", "Connects.", forge=connects), {}, "was heard on TCP"),
    "lost": (Attack("lost", "", "No notebook.", forge=lambda nb, scene: b"{"), {}, ""),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    if reason := sandbox.missing():
        pytest.skip(reason)
    everybody = [*attacks(short=True), *(attack for attack, _, _ in WINNERS.values())]
    folder = tmp_path_factory.mktemp("attacks") / "here"
    return {o.attack.name: o for o in run_attacks(folder, ROOT, chosen=everybody)}


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine may take its time
@pytest.mark.xdist_group("attacks")
class TestAClassOfAttackers:
    def test_no_attack_succeeds(self, outcomes: dict[str, Outcome]) -> None:
        succeeded = {
            name: (outcome.earned, outcome.deserved, outcome.harm, outcome.told)
            for name, outcome in outcomes.items()
            if not outcome.repelled and name not in WINNERS
        }
        assert not succeeded
        assert len(outcomes) == len(attacks(short=True)) + len(WINNERS) + 5

    def test_neighbours_get_what_they_deserve(self, outcomes: dict[str, Outcome]) -> None:
        honest = [o for o in outcomes.values() if o.attack.family == NEIGHBOURS and o.deserved]
        assert sorted(sum(o.earned.values()) for o in honest) == [38, 73, 75, 75]

    @pytest.mark.parametrize("name", WINNERS)
    def test_the_suite_would_notice(self, outcomes: dict[str, Outcome], name: str) -> None:
        _, earned, harm = WINNERS[name]
        outcome = outcomes[name]
        assert not outcome.repelled
        assert {k: v for k, v in outcome.earned.items() if v and k != HONEST} == earned
        assert harm in str(outcome.harm)
        assert bool(outcome.harm) == bool(harm)

    def test_who_cannot_be_graded_is_told_why(self, outcomes: dict[str, Outcome]) -> None:
        for outcome in outcomes.values():
            if outcome.attack.deserves is None:
                assert outcome.told, outcome.attack.name
                assert not outcome.earned


def test_there_are_attacks_of_every_kind() -> None:
    families = Counter(attack.family for attack in attacks(short=True))
    assert sum(families.values()) >= 40
    text = " ".join(families)
    for part in (
        *("tests", "verdicts", "interpreter", "IPython", "torch dispatch", "time", "randomness"),
        *("signals", "threads", "exit", "reading files", "writing files", "network", "processes"),
        *("memory", "disk", "handles", "output", "hiding", "protocol", "metadata", "injection"),
    ):
        assert part in text, part


def test_attacks_tell_themselves_apart_and_say_what_they_try() -> None:
    everything = attacks()
    assert len({attack.name for attack in everything}) == len(everything)
    assert len({attack.student for attack in everything}) == len(everything)
    for attack in everything:
        assert re.fullmatch(r"[A-Z].*\.", attack.tries), attack.name
        assert attack.cells or attack.forge or attack.hand_in or attack.id, attack.name


def test_the_code_of_an_attack_does_not_run_outside_of_the_sandbox() -> None:
    with pytest.raises(BaseException, match="this runs outside of the sandbox"):
        exec(HEAD.replace("@KNOWN@", "{}"), {})
    for attack in attacks():
        for source in attack.cells.values():
            harmless = not re.search(r"\b(os|sys|libc|open)\b", source)
            assert source.startswith(HEAD) or harmless, attack.name


@pytest.mark.parametrize(
    ("page", "parts"),
    [
        ("<p>&lt;script&gt;zq001qz()&lt;/script&gt;</p>", []),
        ("<pre><code>zq001qz</code></pre>", []),
        ("<p><script>zq001qz()</script></p>", ["zq001qz()"]),
        ('<p title=""><img src=x onerror=zq001qz()>">', ["onerror='zq001qz()'"]),
        ("<zq001qz>", ["zq001qz"]),
        ("<a zq001qz>", ["zq001qz=None"]),
        ("<style>@import 'zq001qz'</style>", ["@import 'zq001qz'"]),
        ('<a href="&#106;avascript:zq001qz">', ["href='javascript:zq001qz'"]),
        ("<svg/onload=zq001qz()>", ["onload='zq001qz()'"]),
    ],
)
def test_a_students_words_are_found_where_they_are_no_text(page: str, parts: list[str]) -> None:
    assert foreign_parts(page) == parts


def test_a_verdict_holds_no_commands_for_terminals_and_ends() -> None:
    failure = Failure("a\x1b[2Jb\x9bc\u202ed\te\nf", got="x" * 100_000)
    assert failure.message == "a\ufffd[2Jb\ufffdc\ufffdd\te\nf"
    assert len(failure.got) < 5000
    verdict = Verdict("f", [Result("c", "S.", 1, "failed", failure=failure)], note="\x07")
    assert verdict.note == "\ufffd"
    assert Verdict.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize("shape", [(30_000, 1), (1 << 40, 0), (0, 1 << 40), [1] * 9 + [999]])
def test_an_answer_much_larger_than_the_right_one_reaches_no_check(shape: list[int]) -> None:
    with pytest.raises(Mismatch, match=r"part 2 of the result has shape \(.*\), expected \(2,\)"):
        like((1, torch.zeros(shape)), (1, torch.zeros(2)))
    assert like(torch.zeros(100), torch.zeros(2)).shape == (100,)


def test_what_lies_in_a_folder_is_removed_whatever_it_is(tmp_path: Path) -> None:
    for number in range(9000):  # more than a command's arguments may be
        (tmp_path / f"{number:0250}").touch()
    (tmp_path / "-rf").mkdir()
    (tmp_path / "link").symlink_to(Path(__file__).parent)
    locked = tmp_path / "locked" / "inner"
    locked.mkdir(parents=True)
    (locked / "file").touch()
    locked.chmod(0)
    locked.parent.chmod(0)
    sandbox.empty(str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert Path(__file__).exists()


def test_marks_are_told_from_each_other() -> None:
    assert re.search(MARK_FOUND, "left zq012qz here")[1] == "012"  # type: ignore[index]


def test_the_command_refuses_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "missing", lambda: "the walls are missing")
    monkeypatch.chdir(ROOT)
    said = CliRunner().invoke(app, ["attack"])
    assert said.exit_code == 2
    assert "student code cannot be isolated on this machine: the walls are missing" in said.output


@pytest.mark.parametrize("harm", [[], ["left a file: /etc/\x1b[2Jpasswd"]])
def test_the_command_shows_a_table_and_fails_if_one_succeeds(
    harm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(Attack("a [b]knock[/]", "doors", "Knocks."), {"f": 1.0}, {"f": 1}, harm)
    monkeypatch.setattr(autograder.attacks, "run_attacks", lambda *args, **kwargs: [outcome])
    monkeypatch.chdir(ROOT)
    said = CliRunner().invoke(app, ["attack", "--short"], env={"COLUMNS": "100"})
    assert said.exit_code == bool(harm)
    assert "a [b]knock[/]" in said.output
    assert ("none succeeded" in said.output) == (not harm)
    assert ("left a file" in said.output) == bool(harm)
    assert "\x1b[2J" not in said.output


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    if reason := sandbox.missing():
        pytest.skip(reason)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="must be new or empty"):
        run_attacks(tmp_path, ROOT)


def test_points_must_be_those_deserved_exercise_by_exercise() -> None:
    attack = Attack("", "", "")
    assert Outcome(attack, {"f": 1.0, "g": 0.0}, {"f": 1}).repelled
    assert not Outcome(attack, {"f": 1.0, "g": 2.0}, {"f": 2, "g": 1}).repelled
    assert not Outcome(attack, {}, {"f": 1}).repelled
    assert table([Outcome(attack, {}, {})]).row_count == 2
    Console(quiet=True).print(table([]))
