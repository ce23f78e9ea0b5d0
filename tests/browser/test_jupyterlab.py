"""The lab as a student and an instructor see it: JupyterLab and formgrader in a real browser.

Needs Playwright (the extra `browser`) and Chromium; skipped where one is missing. With
FEWER_SCREENSHOTS set to a folder, the pictures are kept there: the README's is one of them.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from autograder.course import create_course, release
from autograder.demo import as_cell
from autograder.exercise import find
from autograder.grading import grade

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
    pytest.mark.xdist_group("browser"),
]
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def jupyter(folder, tmp_path):
    """A Jupyter server in ``folder``, as `jupyter lab` starts it; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = tmp_path / "jupyter"
    preferences = {
        # All cells at once: what is scrolled out of sight must still be there to be found.
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false"},
    }
    for name, values in preferences.items():
        file = settings / "lab" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JUPYTERLAB_SETTINGS_DIR": str(settings / "lab"),
        "JUPYTER_CONFIG_DIR": str(settings),
        "JUPYTER_DATA_DIR": str(settings / "data"),
        "IPYTHONDIR": str(settings / "ipython"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--allow-root"]
    command += ["--IdentityProvider.token=", "--ip=127.0.0.1", "--ServerApp.port_retries=0"]
    with (
        open(tmp_path / "jupyter.log", "w") as log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/api", timeout=1).close()
                    break
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()


@contextlib.contextmanager
def page_at(address):
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(address)
        try:
            yield page
        except sync_api.Error:
            keep(page, "failed.png")
            raise
        finally:
            browser.close()


def keep(shot, name):
    """Take a screenshot if somebody wants to look at it."""
    if folder := os.environ.get("FEWER_SCREENSHOTS"):
        shot.screenshot(path=Path(folder) / name)


def write_and_check(page, name, source):
    """Replace the cell of an exercise by ``source``, run it and the check below; give the card."""
    cell = page.locator(".jp-CodeCell", has_text=f"def {name}(").first
    cell.scroll_into_view_if_needed()
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(source)
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    check = page.locator(".jp-CodeCell", has_text=f"check({name})").first
    card = check.locator(".fewer-verdict")
    card.wait_for()
    return check, card


def test_a_solution_typed_into_jupyterlab_gets_its_card(tmp_path):
    lab = tmp_path / "lab1_quantization.ipynb"
    shutil.copy(ROOT / "labs" / lab.name, lab)
    exercise = find("quantize_symmetric")
    wrong = next(m for m in exercise.misconceptions)
    with jupyter(tmp_path, tmp_path) as address, page_at(f"{address}/lab/tree/{lab.name}") as page:
        page.locator(".jp-Notebook h1", has_text="Lab 1").wait_for()
        page.get_by_text("| Idle").wait_for()  # a key pressed before the kernel is there is lost
        first = page.locator(".jp-CodeCell", has_text="from autograder import check").first
        first.click()
        page.keyboard.press("Shift+Enter")
        first.get_by_text("[1]:").first.wait_for()
        check, card = write_and_check(page, exercise.name, as_cell(exercise, wrong.function))
        assert wrong.says in card.inner_text()
        keep(check, "check.png")

        check, _ = write_and_check(page, exercise.name, as_cell(exercise, exercise.reference))
        full = f"{exercise.points} / {exercise.points} points"
        check.get_by_text(full).wait_for()
        keep(page, "jupyterlab.png")


def test_formgrader_shows_the_graded_class(tmp_path):
    course = Path(os.environ.get("FEWER_GRADED_COURSE") or tmp_path / "course")
    if not course.exists():
        (name,) = create_course(course, ROOT, [1])
        release(course, name)
        for student in ("ada", "blaise"):
            folder = course / "submitted" / student / name
            folder.mkdir(parents=True)
            shutil.copy(course / "release" / name / f"{name}.ipynb", folder)
        grade(course, name)
    with (
        jupyter(course, tmp_path) as address,
        page_at(f"{address}/formgrader/gradebook/lab1_quantization") as page,
    ):
        page.get_by_text("lab1_quantization").first.wait_for()
        page.get_by_role("link", name="lab1_quantization").last.click()
        page.get_by_text("Submission #2", exact=True).wait_for()
        keep(page, "formgrader.png")
