"""Right work in every disguise that students give it: nobody may lose a point for noise.

`make test` hands in a few; for the 500 of the documentation:

    FEWER_NOISY=500 python -m pytest tests/autograder/test_noise.py
"""

import os
import random
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from autograder import sandbox
from autograder.course import create_course, release
from autograder.demo import LAB, as_cell, solution_cells
from autograder.exercise import exercises
from autograder.grading import grade

ROOT = Path(__file__).parents[2]
HOW_MANY = int(os.environ.get("FEWER_NOISY", "6"))
BEFORE = (
    "import warnings\nwarnings.warn('deprecated since the last ice age')",
    "import sys\nprint('to stderr', file=sys.stderr)\nprint('x' * 5000)",
    "%matplotlib inline",
    "%%time\nsum(range(1000))",
    "!pip list",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nplt.show()",
    "import logging\nlogging.basicConfig(level=10)\nlogging.getLogger().warning('loud')",
    "import torch\ntorch.manual_seed(7)\ntorch.set_printoptions(precision=2)",
    "import numpy as np\nnp.random.seed(3)\nnp.seterr(all='warn')\nnp.float64(1) / np.float64(0)",
    "import sklearn.cluster\nimport scipy.stats",
    "assert False, 'a note to myself'",
    "undefined_name + 1",
    "from tqdm import tqdm\nfor i in tqdm(range(10)): pass",
    "x = y = w = scale = codes = bits = 5",
    "display({'text/html': '<b>bold</b>'})",
    "# nothing but a comment",
    "",
)


def noisy(name: str, source: str, rng: random.Random) -> str:
    """The same function with something around it that makes no difference."""
    helper = f"{rng.choice(['_my', 'helper_', 'v2_', 'impl'])}_{name}_{rng.randrange(1000)}"
    call = f"return {helper}(*args, **kwargs)"
    wrapped = source + f"\n\n{helper} = {name}\n\n\ndef {name}(*args, **kwargs):\n"
    kinds = {
        "as it is": source,
        "a helper": wrapped + f"    {call}\n",
        "prints": wrapped + f"    print('called', len(args), kwargs)\n    {call}\n",
        "stderr": wrapped + f"    import sys\n    sys.stderr.write('hm\\n' * 9)\n    {call}\n",
        "warns": wrapped + f"    import warnings\n    warnings.warn('again')\n    {call}\n",
        "imports": wrapped + f"    import scipy.optimize, sklearn.svm\n    {call}\n",
        "catches": wrapped
        + f"    try:\n        {call}\n    except (ValueError, TypeError):\n        raise\n",
        "progress": wrapped
        + f"    from tqdm import tqdm\n    for _ in tqdm(range(3)): pass\n    {call}\n",
        "draws": wrapped
        + f"    import torch, random\n    torch.rand(3), random.random()\n    {call}\n",
        "counts": f"{wrapped}    global calls\n    calls += 1\n    {call}\n\n\ncalls = 0\n",
        "tested": source + f"\n\nprint({name}, {name}.__doc__)\nassert callable({name})\n",
        "fails below": source + f"\n\n{name}('what', 'is', 'this')\n",
        "windows": source.replace("\n", "\r\n"),
        "a class": f"{wrapped}    return Holder.held(*args, **kwargs)\n\n\n"
        f"class Holder:\n    held = staticmethod({helper})\n",
    }
    return kinds[rng.choice(sorted(kinds))]


def disguise(released, right, seed: int):
    """A right submission: solutions in some style, noise around them."""
    rng = random.Random(seed)
    notebook = nbformat.from_dict(released)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name in right:
            cell.source = noisy(name, rng.choice(right[name]), rng)
            cell.outputs = [new_output("stream", name="stderr", text="left from yesterday")]
            cell.execution_count = rng.randrange(99)
    for _ in range(rng.randrange(6)):
        extra = new_code_cell(rng.choice(BEFORE)) if rng.random() < 0.8 else new_markdown_cell("#")
        notebook.cells.insert(rng.randrange(len(notebook.cells) + 1), extra)
    return notebook


@pytest.mark.skipif(bool(sandbox.missing()), reason="no sandbox here")
@pytest.mark.xdist_group("course")
@pytest.mark.timeout(300 + 5 * HOW_MANY)
def test_no_correct_noisy_variant_loses_a_point(tmp_path):
    course = tmp_path / "course"
    [lab] = create_course(course, ROOT, [LAB])
    released = nbformat.read(release(course, lab), as_version=4)
    solutions = solution_cells(nbformat.read(course / "source" / lab / f"{lab}.ipynb", 4))
    right = {
        name: [
            source,
            *(as_cell(exercises()[name], v.function) for v in exercises()[name].variants),
        ]
        for name, source in solutions.items()
        if name in exercises()
    }
    for seed in range(HOW_MANY):
        path = course / "submitted" / f"noisy-{seed:03}" / lab / f"{lab}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(disguise(released, right, seed), path)
    summary = grade(course, lab, seed=1)
    possible = sum(exercises()[name].points for name in right)
    lost = {s.student: (s.points, s.cells) for s in summary.scores if s.points != possible}
    assert not lost
    assert not summary.failed
    assert len(summary.scores) == HOW_MANY
