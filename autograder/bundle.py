"""What students get: one zip with the lab, how to begin, and the course as a wheel.

    bundles/lab1_quantization.zip
        lab1_quantization/lab1_quantization.ipynb    what nbgrader released, and files beside it
        lab1_quantization/INSTRUCTIONS.md
        lab1_quantization/fewer-0.1.0+students.c1a2b3c4d-py3-none-any.whl

The wheel has the whole library, and of the autograder what the students' own commands import:
neither the commands of instructors nor anything that only they need. A check marked hidden is cut
out of the source of its file; what it is worth stays. The labs' solutions are not in it.

The same sources give the same bytes (with the same zlib). The version says whose wheel it is and,
by a hash, of which content, so that pip replaces an earlier one.

A wheel is a zip with three files about itself (packaging.python.org, "Binary distribution
format"). It is written here, because a build backend is nothing that an installation has.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import importlib.metadata
import io
import re
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import jinja2
import nbformat

import autograder
import fewer
from autograder.build import Lab, labs
from autograder.exercise import exercises
from autograder.verdict import GRADE_ID

COMMANDS = "autograder/cli.py"
LABS = "autograder/material"  # where `autograder.cli.root` finds the labs of an installed package


class BundleError(Exception):
    """The bundle cannot be made, or would give away what it must not."""


def bundle(course: Path, released: Path, root: Path) -> Path:
    """Make the bundle of a lab that was just released.

    Args:
        course: the course folder; the bundle comes to ``bundles/LAB.zip`` in it.
        released: the students' notebook, as `autograder.course.release` returns it. What lies
            beside it (data that the instructor added) is put into the bundle, too.
        root: the folder with the course's ``solutions/``.

    Returns:
        The zip file.

    Raises:
        BundleError: a hidden check cannot be kept out of the bundle.
    """
    lab = released.stem
    there = {other.name: other for other in labs(root)}
    others = sorted(released.parent.parent.glob("lab*/lab*.ipynb"))
    material = {path: there[path.stem] for path in others if path.stem in there}
    name, wheel = student_wheel(root, material)
    files = {name: wheel}
    for path in _files(released.parent):
        files[path.relative_to(released.parent).as_posix()] = path.read_bytes()
    files["INSTRUCTIONS.md"] = instructions(released, there[lab].title, name).encode()
    _keeps_secrets(files)
    target = course / "bundles" / f"{lab}.zip"
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(".part")
    part.write_bytes(_zip({f"{lab}/{path}": files[path] for path in sorted(files)}))
    part.replace(target)
    return target


def instructions(released: Path, title: str, wheel: str) -> str:
    """What a student reads first, made from ``templates/instructions.md.j2``."""
    cells = nbformat.read(released, as_version=4).cells
    about = [cell.metadata.get("nbgrader", {}) for cell in cells]
    graded = [entry for entry in about if entry.get("grade")]
    names = [entry["grade_id"].removeprefix(GRADE_ID) for entry in graded]
    checks = [check for n in names if n in exercises() for check in exercises()[n].checks]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autograder"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("instructions.md.j2").render(
        title=title,
        lab=released.stem,
        notebook=released.name,
        wheel=wheel,
        points=f"{sum(entry['points'] for entry in graded):g}",
        hidden=sum(check.points for check in checks if check.hidden),
        written=any(entry.get("solution") for entry in graded),
        models=any(re.search(r"load_(smollm2|minilm)\(", cell.source) for cell in cells),
    )


# ------------------------------------------------------------------------------------ the wheel


def student_wheel(root: Path, material: dict[Path, Lab]) -> tuple[str, bytes]:
    """The students' wheel: its file name, and its content.

    Args:
        root: where pyproject.toml is; without one (in an installed package), the requirements are
            those of the installation.
        material: released notebooks, and the labs they are of; `fewer start` copies them.

    Raises:
        BundleError: a hidden check cannot be kept out of it.
    """
    files = student_files()
    for notebook, lab in material.items():
        files[f"{LABS}/labs/{lab.name}.ipynb"] = notebook.read_bytes()
        # `fewer labs` reads the title of a lab from its script: here that is all there is of it.
        title = f"# %% [markdown]\n# # {lab.title}\n"
        files[f"{LABS}/solutions/{lab.name}.py"] = title.encode()
    _keeps_secrets(files)
    about, licence = _about(root)
    content = hashlib.sha256(about.encode())
    for path in sorted(files):
        content.update(f"\n{path}\n{len(files[path])}\n".encode() + files[path])
    version = f"{fewer.__version__}+students.c{content.hexdigest()[:8]}"
    versioned = files["fewer/__init__.py"].replace(
        f'__version__ = "{fewer.__version__}"'.encode(), f'__version__ = "{version}"'.encode()
    )
    info = f"fewer-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: fewer\nVersion: {version}\n"
    wheel = {path: files[path] for path in sorted(files)}
    wheel |= {
        "fewer/__init__.py": versioned,
        f"{info}/METADATA": (head + about).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: fewer\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        f"{info}/entry_points.txt": b"[console_scripts]\nfewer = autograder.cli:app\n",
        f"{info}/licenses/LICENSE": licence.encode(),
    }
    wheel[f"{info}/RECORD"] = _record(wheel, f"{info}/RECORD")
    return f"fewer-{version}-py3-none-any.whl", _zip(wheel)


def student_files() -> dict[str, bytes]:
    """The files of the packages `fewer` and `autograder` as students get them, by path."""
    library, tools = (Path(str(package.__file__)).parent for package in (fewer, autograder))
    files = {f"fewer/{p.relative_to(library).as_posix()}": p.read_bytes() for p in _files(library)}
    ours = {f"autograder/{p.relative_to(tools).as_posix()}": p.read_bytes() for p in _files(tools)}
    ours[COMMANDS] = cut(ours[COMMANDS].decode(), _instructors_command).encode()
    for path in ours:
        if path.startswith("autograder/checks/") and path.endswith(".py"):
            ours[path] = cut(ours[path].decode(), _hidden_check).encode()
    return files | {path: ours[path] for path in _needed(ours)}


def cut(source: str, instead_of: Callable[[ast.FunctionDef], str | None]) -> str:
    """A module's source with some of its functions taken out, and all else as it is.

    Args:
        instead_of: called with each function at the top level; the line to put in its place (""
            for none), or None to keep it.
    """
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        if not isinstance(node, ast.FunctionDef) or (line := instead_of(node)) is None:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        while first and lines[first - 1].startswith("#"):  # what was said about it
            first -= 1
        lines[first : node.end_lineno] = [line] if line else []
    return "\n".join(lines)


def _hidden_check(function: ast.FunctionDef) -> str | None:
    """What stands in place of a hidden check: its points, which still count."""
    for call in function.decorator_list:
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        options = {option.arg: option.value for option in call.keywords}
        if call.func.attr != "check" or "hidden" not in options:
            continue
        hidden, points = options["hidden"], ast.unparse(options["points"])
        if not (isinstance(hidden, ast.Constant) and isinstance(hidden.value, bool)):
            raise BundleError(f"{function.name}: write hidden=True or hidden=False, as a word")
        if hidden.value and len(function.decorator_list) > 1:
            raise BundleError(f"the hidden check {function.name} must have no other decorator")
        if hidden.value:
            exercise = ast.unparse(call.func.value)
            return f"{exercise}.hidden_points += {points}  # here stood a check, seen at grading"
    return None


def _instructors_command(function: ast.FunctionDef) -> str | None:
    panels = [
        ast.unparse(option.value)
        for call in function.decorator_list
        if isinstance(call, ast.Call)
        for option in call.keywords
        if option.arg == "rich_help_panel"
    ]
    return "" if panels == ["INSTRUCTORS"] else None


def _needed(ours: dict[str, bytes]) -> list[str]:
    """The files that the students' commands and the checks import, directly or not."""
    start = ["autograder/__init__.py", COMMANDS]
    todo = start + [path for path in ours if path.startswith("autograder/checks/")]
    needed = set(todo)
    while todo:
        found = set()
        for node in ast.walk(ast.parse(ours[todo.pop()])):
            match node:
                case ast.Import(names=names):
                    found |= {name.name for name in names}
                case ast.ImportFrom(module="autograder", names=names):
                    found |= {f"autograder.{name.name}" for name in names}
                case ast.ImportFrom(module=str(module)):
                    found.add(module)
                case ast.Constant(value=str(text)):  # python -m autograder.child; a template
                    found |= {text, f"autograder/templates/{text}"}
        paths = {name.replace(".", "/") + ".py" for name in found} | found
        new = (paths & ours.keys()) - needed
        needed |= new
        todo += [path for path in new if path.endswith(".py")]
    return sorted(needed)


def _keeps_secrets(files: dict[str, bytes]) -> None:
    """Fail if a file names a hidden check: then its code, or a trace of it, was left behind."""
    for exercise in exercises().values():
        for check in exercise.checks:
            for path, data in files.items():
                if check.hidden and re.search(rf"\b{check.name}\b".encode(), data):
                    raise BundleError(
                        f"{path} would tell students of {check.name}, a hidden check of "
                        f"{exercise.name}: see what else there names it"
                    )


def _files(folder: Path) -> list[Path]:
    """The files of a folder, without what Python, Jupyter and editors leave behind."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        ours = not any(part.startswith(".") or part == "__pycache__" for part in parts)
        if ours and not path.name.endswith("~") and path.is_file():
            found.append(path)
    return found


def _about(root: Path) -> tuple[str, str]:
    """METADATA without name and version, and the licence."""
    if (root / "pyproject.toml").is_file():
        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
        summary, python = project["description"], project["requires-python"]
        needs, licence = project["dependencies"], (root / "LICENSE").read_text("utf-8")
    else:
        installed = importlib.metadata.distribution("fewer")
        summary, python = installed.metadata["Summary"], installed.metadata["Requires-Python"]
        needs = [need for need in installed.requires or () if "extra ==" not in need]
        licence = installed.read_text("licenses/LICENSE") or ""
    fields = [f"Summary: {summary}", "License: Apache-2.0", f"Requires-Python: {python}"]
    return "\n".join([*fields, *(f"Requires-Dist: {need}" for need in needs), ""]), licence


def _record(files: dict[str, bytes], own: str) -> bytes:
    """RECORD: path, hash and size of every file of a wheel; its own line has the path alone."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        table.writerow([path, f"sha256={digest}", len(data)])
    table.writerow([own, "", ""])
    return out.getvalue().encode()


def _zip(files: dict[str, bytes]) -> bytes:
    """A zip that depends on names and contents alone."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # Unix, wherever this runs
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
    return out.getvalue()
