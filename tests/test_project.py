"""The repository itself: what a newcomer, a packager and a reader of the library may rely on."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import fewer

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "lib" / "fewer").rglob("*.py"))
# What every topic may build on.
GROUND = {"models", "data", "evaluate", "plots", "progress", "sizes", "validate"}
# Kernels make quick what the topics say; no topic knows of them.
ABOVE = {"kernels": {"quantization", "peft", "inference"}}


def makefile_targets():
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z-]+):", text, flags=re.MULTILINE))


def repository_files():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def test_the_version_is_the_same_in_pyproject_and_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fewer.__version__
    assert f"## {fewer.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_a_document_names_exists(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:`|^\s*\$?\s*)make ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert named <= makefile_targets()


def test_help_lists_every_target_of_the_makefile():
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^  make ([a-z-]+) ", shown, flags=re.MULTILINE)) == makefile_targets()


def test_continuous_integration_runs_what_the_readme_tells_people_to_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "make --no-print-directory check" in text
    assert "make --no-print-directory test" in text


def test_pinned_versions_satisfy_what_the_package_asks_for():
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = [requirements.Requirement(line) for lines in lists for line in lines]
    asked = {requirement.name.lower(): requirement for requirement in asked}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            if name.lower() in asked:
                assert asked[name.lower()].specifier.contains(version), line


def test_no_file_names_a_private_folder_or_a_package_registry():
    # Put together from pieces, so that this file does not name them either.
    folders = rf"(?<![\w.~-])/{'work'}/|/{'root'}/|/{'home'}/\w"
    hosts = "|".join(
        host.replace(".", r"\.")
        for host in (
            "pypi" + ".org",
            "python" + "hosted",
            "registry.npm" + "js",
            "download.py" + "torch",
        )
    )
    told = re.compile(f"{folders}|{hosts}")
    found = []
    for path in repository_files():
        data = path.read_bytes()
        if b"\0" not in data[:4096]:
            text = data.decode(errors="replace")
            found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in told.finditer(text)]
    assert not found


def imported(path):
    """Every module that a file imports, absolute: fewer.models, fewer.quantization.uniform, ..."""
    package = path.relative_to(ROOT / "lib").with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT / "lib")))
def test_the_arrows_of_the_library_run_one_way(path):
    own = path.relative_to(ROOT / "lib" / "fewer").with_suffix("").parts[0]
    for module in imported(path):
        top, *rest = module.split(".")
        assert top != "autograder", f"{module}: the library knows nothing of the autograder"
        if top == "fewer" and rest and rest[0] != "__version__":
            allowed = GROUND if own in GROUND else GROUND | {own} | ABOVE.get(own, set())
            assert rest[0] in allowed, f"{module}: {own} may build on {sorted(allowed)} only"


def test_the_excerpts_in_contributing_are_the_real_code():
    blocks = re.findall(
        r"^```python\n# (\S+)\n(.*?)^```",
        (ROOT / "CONTRIBUTING.md").read_text("utf-8"),
        re.M | re.S,
    )
    assert len(blocks) >= 4
    for path, excerpt in blocks:
        assert excerpt in (ROOT / path).read_text("utf-8"), f"{path} no longer has:\n{excerpt}"
