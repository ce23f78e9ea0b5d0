"""Any grade again: the verdict that was recorded, and the same work judged once more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from autograder import worker
from autograder.course import CourseError, open_course
from autograder.grading import Folders, handed_out, load, open_book, require_walls
from autograder.intake import Unusable, pick, read
from autograder.verdict import GRADE_ID, Verdict, verdicts
from autograder.worker import Order, course_version


@dataclass(frozen=True)
class Explained:
    """A grade, and the same judgement made now.

    Attributes:
        recorded: what grading found then; None if it was not graded.
        again: what it finds now.
        changed: what is not as it was then, in words; a grade that is not the same again must have
            such a reason.
    """

    recorded: Verdict | None
    again: Verdict
    changed: list[str]

    @property
    def same(self) -> bool:
        return self.recorded is not None and self.recorded.to_json() == self.again.to_json()


def explain(
    course: Path, assignment: str, student: str, exercise: str, walled: bool = True
) -> Explained:
    """Judge an exercise of a student again, with the seed that is recorded with the grade.

    Raises:
        CourseError: there is no such submission or exercise; the message lists those there are.
    """
    require_walls(walled)
    with open_course(course) as app, open_book(app, assignment) as book:
        released = handed_out(app, book, assignment)
        folders = Folders(app, assignment)
        where = app.coursedir
        folder = Path(where.format_path(where.submitted_directory, student, assignment))
        if not folder.is_dir():
            there = ", ".join(sorted(book.names())[:10])
            raise CourseError(f"{student!r} handed in nothing in {assignment}; there are: {there}")
        ids = [cell.name for one in released.values() for cell in one.cells]
        names = [id.removeprefix(GRADE_ID) for id in ids if id.startswith(GRADE_ID)]
        if exercise not in names:
            raise CourseError(f"EXERCISE must be one of {', '.join(names)}, got {exercise!r}")
        try:
            picked = pick(folder, released)
            files = {name: read(path) for name, path in picked.paths.items()}
        except Unusable as error:
            raise CourseError(str(error)) from None
        recorded: dict[str, Verdict] = {}
        made: dict[str, object] = {}
        for name in files:
            path = folders.autograded(student) / f"{name}.ipynb"
            if path.is_file():
                notebook = load(path)
                recorded |= verdicts(notebook)
                made = notebook.metadata.get("fewer") or {}
        seed = made.get("seed")
        order = Order(released, course_version(), seed if isinstance(seed, int) else 0, walled)
        try:
            graded = worker.judge(files, order)
        except (Unusable, worker.GraderFault) as error:
            raise CourseError(str(error)) from None
        finally:
            worker.close()
    again: dict[str, Verdict] = {}
    for one in graded.values():
        again |= verdicts(worker.from_bytes(one.data))
    if exercise not in again:
        raise CourseError(f"the notebook with {exercise!r} was not handed in")
    return Explained(recorded.get(exercise), again[exercise], _changed(made, order, files))


def _changed(made: dict[str, object], order: Order, files: dict[str, bytes]) -> list[str]:
    if not made:
        return ["it was not graded before"]
    order = replace(order, execute=bool(made.get("executed")))
    if made.get("key") == order.key(files):
        return []
    changed = []
    if made.get("course") != order.course:
        changed.append(f"the course was {made.get('course')} then and is {order.course} now")
    if made.get("sandbox") != order.walled:
        changed.append("it was graded with a sandbox" if made.get("sandbox") else "without one")
    return changed or ["the submission, or what was released, is not what was graded then"]
