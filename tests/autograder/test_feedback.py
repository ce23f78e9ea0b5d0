"""The feedback page: what it says, and that nothing a student wrote can act in it."""

from __future__ import annotations

import base64
import re
from collections import Counter
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbgrader.utils import compute_checksum
from parsed import Page

from autograder.feedback import LONGEST_WORK, highlighted, page
from autograder.gradebook import CellScore, Score
from autograder.verdict import MIME, Failure, Result, Verdict

ATTACKS = [
    '"><img src=x onerror=alert(1)></pre></style></title><script>alert(1)</script>{{ 7 * 7 }}',
    "</code></details><svg/onload=alert(1)>&lt;b&gt;&#60;script&#62;",
    "<!--><math><mtext></p><style><a title='</style><iframe src=javascript:alert(1)>'>",
    "[x](javascript:alert(1)) ![y](https://example.org/t.png) $\\href{javascript:alert(1)}{z}$",
    "]]><![CDATA[<?php <base href=//example.org><meta http-equiv=refresh content=0>",
    "\u202e\x00\x1b]8;;https://example.org\x07 '\"`=/ \ud800",
]
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n any bytes").decode()


def verdict(name: str, *statuses: str, text: str = "off by 1", hidden: bool = False) -> Verdict:
    """A verdict of one point a check."""
    results = []
    for i, status in enumerate(statuses):
        failed = status == "failed"
        results.append(
            Result(
                f"check_{i}" if text == "off by 1" else text,
                text,
                1,
                status,
                hint=text if failed else "",
                diagnosis=text if failed else "",
                misconception=text if failed else "",
                failure=Failure(text, text, text, text, text) if failed else None,
                hidden=hidden,
            )
        )
    return Verdict(name, results, note="" if text == "off by 1" else text)


def tagged(cell: NotebookNode, **about: Any) -> NotebookNode:
    flags = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
    cell.metadata["nbgrader"] = flags | about
    return cell


def exercise(name: str, source: str, found: Verdict) -> list[NotebookNode]:
    """A solution cell and its grade cell."""
    solution = tagged(new_code_cell(source), solution=True, grade_id=name)
    check = tagged(
        new_code_cell(f"check({name})"), grade=True, points=found.possible, grade_id=f"check_{name}"
    )
    data = {"text/plain": str(found.points), "text/html": found.html(), MIME: found.to_json()}
    check.outputs = [new_output("execute_result", data=data)]
    return [solution, check]


def written(name: str, answer: str, points: int = 4) -> NotebookNode:
    about = {"grade": True, "solution": True, "points": points, "grade_id": name}
    return tagged(new_markdown_cell(answer), **about)


def lab(*cells: NotebookNode, title: str = "# Lab 1. Folding", **made: Any) -> NotebookNode:
    notebook = new_notebook(cells=[new_markdown_cell(title), *cells])
    notebook.metadata["fewer"] = {"version": "0.1.0", "seed": 3, "sandbox": True, **made}
    return notebook


def a_lab(text: str = "", **made: Any) -> NotebookNode:
    """Two exercises and a written question; ``text`` wherever a student can write."""
    return lab(
        new_markdown_cell(f"## 1.1 Fold {text}"),
        *exercise(
            "fold",
            f"def fold(x):\n    '''{text}'''\n    return x  # {text}",
            verdict("fold", "passed", "failed", "failed", text=text or "off by 1"),
        ),
        new_markdown_cell("## 1.2 Spin"),
        *exercise("spin", f"{text}\ndef spin(): ...", verdict("spin", "passed", "passed")),
        new_markdown_cell(f"**Question.** Why? {text}"),
        written("essay", f"Because **it** is so. {text}"),
        title=f"# Lab 1. Folding {text}",
        **made,
    )


def score(
    notebook: NotebookNode,
    late: float = 0.0,
    comments: dict[str, str] | None = None,
    waiting: tuple[str, ...] = (),
    **changed: float,
) -> Score:
    """What the gradebook says: the checks' points, but for those ``changed``."""
    cells = {}
    for cell in notebook.cells:
        about = cell.metadata.get("nbgrader", {})
        if about.get("grade") or about.get("task"):
            name = about["grade_id"]
            auto = float(cell.outputs[0].data["text/plain"]) if cell.get("outputs") else 0.0
            points = changed.get(name, auto)
            cells[name] = CellScore(points, float(about["points"]), name in waiting)
    total = sum(cell.points for cell in cells.values())
    possible = sum(cell.possible for cell in cells.values())
    return Score("ada", total - late, possible, late, cells, comments or {})


def read(notebook: NotebookNode, points: Score | None = None, name: str = "Ada Okafor") -> Page:
    return Page(page(notebook, points or score(notebook), name))


# --- what it says --------------------------------------------------------------------------------


def test_the_page_names_the_student_the_lab_and_the_points() -> None:
    text = read(a_lab(), score(a_lab(), essay=2.5)).text
    assert "Feedback for Ada Okafor Lab 1. Folding 5.5 of 9 points" in text
    assert "1.1 Fold fold 1 of 3" in text
    assert "1.2 Spin spin 2 of 2" in text
    assert "Together 5.5 of 9" in text
    assert "Graded with fewer 0.1.0, seed 3." in text
    assert "yet to" not in text
    assert "by hand" not in text


def test_a_failed_check_shows_what_went_wrong_beside_the_students_own_code() -> None:
    text = read(a_lab()).text
    assert "✗ check 1 0/1" in text
    assert "what happened off by 1" in text
    assert "hint off by 1" in text
    assert "return x" in text
    assert "check(fold)" not in text


def test_full_points_are_praised_and_lost_ones_linked() -> None:
    perfect = lab(*exercise("spin", "def spin(): ...", verdict("spin", "passed")))
    assert "Well done" in read(perfect).text
    some = read(a_lab(), score(a_lab(), essay=4))
    assert "Well done" not in some.text
    assert "Full points in 2 of 3. Worth another look: 1.1 Fold ." in some.text


def test_a_late_penalty_is_said_with_its_reason() -> None:
    text = read(a_lab(), score(a_lab(), late=1.5)).text
    assert "1.5 of 9" in text
    assert "Handed in after the due date: 1.5 points were taken off" in text
    assert "Handed in late −1.5" in text
    assert "due date" not in read(a_lab()).text


def test_an_answer_that_waits_is_not_shown_as_zero_points() -> None:
    text = read(a_lab(), score(a_lab(), waiting=("essay",))).text
    assert "3 of 9 points so far" in text
    assert "a person has yet to read this" in text
    assert "waiting, of 4" in text
    assert "0 of 4" not in text


def test_points_of_a_person_are_told_from_those_of_the_checks() -> None:
    text = read(a_lab(), score(a_lab(), check_fold=2.0)).text
    assert "2 of 3 points, set by hand . The checks gave 1." in text
    assert "looked at again" not in text
    again = read(a_lab(), score(a_lab(), check_fold=2.0, waiting=("check_fold",))).text
    assert "set by hand and to be looked at again" in again


@pytest.mark.parametrize("cell", ["fold", "check_fold", "essay"])
def test_what_a_person_wrote_is_shown_wherever_the_gradebook_keeps_it(cell: str) -> None:
    text = read(a_lab(), score(a_lab(), comments={cell: "Nearly.\nLook again."})).text
    assert text.count("Nearly. Look again.") == 1


def test_an_answer_is_shown_as_it_was_typed_with_its_question() -> None:
    page = read(a_lab())
    assert "Because **it** is so." in page.text
    assert "**Question.** Why?" in page.text
    assert "em" not in page.tags


@pytest.mark.parametrize("how", ["as handed out", "blank"])
def test_an_answer_nobody_wrote_is_not_shown_as_one(how: str) -> None:
    cell = written("essay", "*Your answer here*" if how == "as handed out" else " \n")
    if how == "as handed out":
        cell.metadata.nbgrader["checksum"] = compute_checksum(cell)
    text = read(lab(cell)).text
    assert "Nothing was written here" in text
    assert "Your answer here" not in text


def test_what_ran_without_a_sandbox_says_so() -> None:
    assert "without a sandbox" in read(a_lab(sandbox=False)).text
    assert "without a sandbox" not in read(a_lab()).text


def test_points_of_the_other_notebooks_of_an_assignment_are_accounted_for() -> None:
    first, second = a_lab(), lab(*exercise("turn", "", verdict("turn", "passed", "failed")))
    both = score(lab(*first.cells[1:], *second.cells[1:]), essay=4)
    text = read(second, both).text
    assert "The assignment's other notebooks 7 of 9" in text
    assert "Together 8 of 11" in text


def test_a_task_has_its_points_and_comment() -> None:
    task = tagged(new_markdown_cell("Draw a map."), task=True, points=3, grade_id="the_map")
    text = read(lab(task), score(lab(task), the_map=2, comments={"the_map": "Fine map."})).text
    assert "The map 2 of 3 points" in text
    assert "Fine map." in text


def test_a_forged_verdict_in_another_cell_is_nowhere() -> None:
    boast = verdict("fold", "passed", "passed", text="I am great").to_json()
    cell = new_code_cell("display()", outputs=[new_output("display_data", {MIME: boast})])
    solution, check = exercise("fold", "x", verdict("fold", "failed"))
    solution.outputs = cell.outputs
    for executed in (False, True):
        assert "I am great" not in read(lab(cell, solution, check, executed=executed)).text


def test_a_notebook_of_another_make_still_has_a_page() -> None:
    notebook = new_notebook(cells=[new_code_cell("1"), new_markdown_cell("words")])
    assert "Feedback for Ada" in Page(page(notebook, score(notebook), "Ada")).text


# --- outputs -------------------------------------------------------------------------------------


def showing(*outputs: NotebookNode, executed: bool = True) -> NotebookNode:
    cell = new_code_cell("plot()", outputs=list(outputs))
    return lab(new_markdown_cell("## 1.1 Fold"), cell, executed=executed)


def image(content: Any, kind: str = "image/png") -> NotebookNode:
    return new_output("display_data", {kind: content, "text/plain": "<Figure>"})


def test_plots_are_shown_if_and_only_if_grading_made_them() -> None:
    assert read(showing(image(PIXEL))).all("src") == [f"data:image/png;base64,{PIXEL}"]
    assert read(showing(image(PIXEL), executed=False)).all("src") == []
    assert read(showing(image(PIXEL), executed="yes")).all("src") == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    ["https://example.org/a.png", f'{PIXEL}" onerror="alert(1)', "AAA", "ääää", ["a"]],
)
def test_an_image_that_is_none_is_left_out(content: Any) -> None:
    page = read(showing(image(content)))
    assert page.all("src") == []
    assert "onerror" not in dict(page.attributes)


@pytest.mark.parametrize(
    "kind", ["text/html", "image/svg+xml", "application/javascript", "text/markdown", "text/latex"]
)
def test_outputs_that_could_act_are_never_shown(kind: str) -> None:
    page = read(showing(new_output("display_data", {kind: "<b>bold</b>", "text/plain": "plain"})))
    assert "bold" not in page.text
    assert "plain" in page.text


def test_long_outputs_are_cut_where_it_hurts_least() -> None:
    printed = new_output("stream", text="first" + "x" * 100_000 + "last")
    raised = new_output("error", ename="E", evalue="v", traceback=["first" + "x" * 100_000, "last"])
    text = read(showing(printed)).text
    assert "first" in text
    assert "last" not in text
    text = read(showing(raised)).text
    assert "first" not in text
    assert "last" in text


def test_a_page_stays_small_whatever_the_notebook_holds() -> None:
    long = "x = 1\n" * 200_000
    outputs = [new_output("stream", text="y" * 10_000) for _ in range(2_000)]
    outputs += [image(PIXEL * 4_000_000 if i == 0 else PIXEL * 100_000) for i in range(20)]
    notebook = lab(
        new_markdown_cell("## " + "z" * 1_000_000),
        *exercise("fold", long, verdict("fold", "passed")),
        written("essay", long),
        *showing(*outputs).cells,
        executed=True,
    )
    assert len(page(notebook, score(notebook), "n" * 1_000_000)) < 15_000_000
    notebook.metadata["fewer"]["executed"] = False
    assert len(page(notebook, score(notebook), "n" * 1_000_000)) < 6 * LONGEST_WORK


# --- nothing acts, nothing is fetched ------------------------------------------------------------


def hostile(text: str) -> tuple[NotebookNode, Score]:
    notebook = a_lab(text, executed=True)
    notebook.cells[2].outputs = [
        new_output("stream", text=text),
        new_output("error", ename=text, evalue=text, traceback=[text]),
        new_output("display_data", {"text/html": text, "text/plain": text}),
        image(PIXEL),
    ]
    comments = {"fold": text, "check_fold": text, "essay": text}
    return notebook, score(notebook, late=1.0, comments=comments, check_fold=2.0)


@pytest.mark.parametrize("text", ATTACKS)
def test_whatever_a_student_wrote_or_is_called_is_shown_and_never_acts(text: str) -> None:
    plain, attacked = (read(*hostile(t), name=f"Ada {t}") for t in ("harmless", text))
    # Colours of code may differ with what the text is.
    plain_tags, tags = plain.tags, attacked.tags
    assert {k: n for k, n in tags.items() if k != "i"} == {
        k: n for k, n in plain_tags.items() if k != "i"
    }
    colours = {"comment", "string", "keyword"}
    kept = [pair for pair in attacked.attributes if pair[1] not in colours]
    assert kept == [pair for pair in plain.attributes if pair[1] not in colours]
    assert not attacked.comments
    words = " ".join(text.replace("\x00", "").split())
    assert attacked.text.replace("\x00", "").count(words) > 15


def test_the_page_runs_nothing_and_asks_nothing_of_the_network() -> None:
    notebook, points = hostile("harmless")
    html = page(notebook, points, "Ada")
    tags = Page(html).tags
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & tags.keys()
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert all(source.startswith("data:image/") for source in Page(html).all("src"))


def test_every_link_leads_to_exactly_one_place_in_the_page() -> None:
    page = read(a_lab())
    places = Counter(page.all("id"))
    assert set(places.values()) == {1}
    assert {link.removeprefix("#") for link in page.all("href")} == places.keys()


@given(st.text("\"'#\\\n <>&abdef_0(", max_size=60))
def test_colours_change_no_character_of_the_code(source: str) -> None:
    seen = Page(f"<pre>{highlighted(source)}</pre>")
    assert seen.tags.keys() <= {"pre", "i"}
    text = re.sub(r"</?i[^>]*>", "", str(highlighted(source)))
    assert text == source.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_keywords_in_words_and_in_strings_have_no_colour() -> None:
    html = str(highlighted("def iffy(a): return 'if' # not\nx = \"\"\"is\n'''in\"\"\"; y = f'{a}'"))
    found = re.findall(r'<i class="(\w+)">(.*?)</i>', html, re.DOTALL)
    assert found == [
        ("keyword", "def"),
        ("keyword", "return"),
        ("string", "'if'"),
        ("comment", "# not"),
        ("string", '"""is\n\'\'\'in"""'),
        ("string", "'{a}'"),
    ]


@pytest.mark.parametrize(
    "piece", ['"', "'", '"""', "'''", "\\", '"\\', '""\\', "#", "a", "def ", '"""\\"', "\n'"]
)
def test_colouring_takes_no_longer_for_strange_code(piece: str) -> None:
    # Quadratic time would be minutes here; pytest's own limit on a test would end it.
    assert highlighted(piece * LONGEST_WORK)


def test_notebooks_as_they_are_on_disk_have_the_same_page() -> None:
    notebook = a_lab()
    again = nbformat.reads(nbformat.writes(notebook), as_version=4)
    assert page(again, score(again), "Ada") == page(notebook, score(notebook), "Ada")
