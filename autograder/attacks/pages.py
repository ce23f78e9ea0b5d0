"""Attacks on whoever reads: scripts in pages, escapes for terminals, formulas for tables."""

from __future__ import annotations

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from autograder.attacks.attack import TARGET, Attack, Scene, in_call
from autograder.attacks.notebooks import WRITTEN, cell_of, each

INJECTION = "script injection"

# Each would leave an element, an attribute or a script that bears the mark.
SCRIPTS = (
    "<script>@MARK@()</script>",
    '"><img src=@MARK@ onerror=@MARK@()>',
    "'><svg/onload=@MARK@()>",
    "</pre></code></div><@MARK@>",
    "</title></style></textarea></script><iframe srcdoc='@MARK@'>",
    "]]>--><script src=//@MARK@></script>",
    "{{ '@MARK@' }}{% raw %}<@MARK@>{% endraw %}",
    "&lt;@MARK@&gt;&#60;script&#62;@MARK@()",
    "[x](javascript:@MARK@) ![x](x'onerror='@MARK@) <javascript:@MARK@>",
    r"$\href{javascript:@MARK@()}{x}$ $\require{html}\class{@MARK@}{x}$",
)
PAYLOAD = "\n".join(SCRIPTS)
ESCAPES = "\x1b]0;@MARK@\x07\x1b[2J\x1b]52;c;QE1BUktA\x07\x9b31m\x08\x7f\u202e\u2066@MARK@"


def in_words(nb: NotebookNode, scene: Scene) -> None:
    cell_of(nb, WRITTEN).source = PAYLOAD
    nb.cells.insert(0, new_markdown_cell(f"# {PAYLOAD}"))
    for cell in nb.cells:
        if cell.cell_type == "markdown" and "nbgrader" not in cell.metadata:
            cell.source += f"\n{PAYLOAD}\n<style>@import '@MARK@'</style><base href=@MARK@>"
    drawn = {
        "a.svg": {"image/svg+xml": "<svg onload=@MARK@()>"},
        SCRIPTS[1]: {SCRIPTS[1]: SCRIPTS[1]},
    }
    nb.cells.append(new_markdown_cell("![x](attachment:a.svg)", attachments=drawn))


def in_outputs(nb: NotebookNode, scene: Scene) -> None:
    data = {
        "text/html": PAYLOAD,
        "image/svg+xml": "<svg onload=@MARK@()></svg>",
        "application/javascript": "@MARK@()",
        "text/markdown": PAYLOAD,
        "text/latex": SCRIPTS[-1],
        "image/png": '" onerror="@MARK@()',
        SCRIPTS[1]: SCRIPTS[1],
    }
    shown = [new_output("display_data", data, metadata={"image/png": {"width": SCRIPTS[1]}})]
    shown += [new_output("error", ename=PAYLOAD, evalue=ESCAPES, traceback=[PAYLOAD, ESCAPES])]
    shown += [new_output("stream", text=PAYLOAD + ESCAPES)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = shown
    nb.cells.append(new_code_cell("1", outputs=shown))


def in_metadata(nb: NotebookNode, scene: Scene) -> None:
    nb.metadata["title"] = nb.metadata["authors"] = PAYLOAD
    nb.metadata["kernelspec"] = {"name": PAYLOAD, "display_name": PAYLOAD, "language": PAYLOAD}
    nb.metadata["language_info"] = {
        "name": PAYLOAD,
        "pygments_lexer": PAYLOAD,
        "codemirror_mode": PAYLOAD,
    }
    for number, cell in enumerate(nb.cells):
        cell["id"] = f'{number}"><@MARK@>'
        cell.metadata["tags"] = [PAYLOAD]
        cell.metadata["slideshow"] = {"slide_type": PAYLOAD}


def say(payload: str) -> str:
    return repr(payload)


ATTACKS = (
    Attack(
        "scripts in an exception",
        INJECTION,
        "Raises exceptions whose message and name are scripts.",
        in_call(f"raise type({say(SCRIPTS[1])}, (Exception,), {{}})({say(PAYLOAD)})"),
    ),
    Attack(
        "scripts in the line that failed",
        INJECTION,
        "Fails in a line of code that is a script, which the traceback quotes.",
        in_call(f"assert not args and not kwargs, {say(PAYLOAD)}  # {SCRIPTS[3]} {SCRIPTS[1]}"),
    ),
    Attack(
        "scripts in a type",
        INJECTION,
        "Returns objects whose types, keys and texts are scripts.",
        in_call(f"""
            named, text = {say(SCRIPTS[0])}, {say(PAYLOAD)}
            odd = [type(named, (), {{}})(), {{text: 1}}, text, [text, named]]
            return odd[len(repr(args)) % len(odd)]
        """),
    ),
    Attack(
        "scripts in what is no function",
        INJECTION,
        "Defines the function as an object of a type whose name is a script.",
        {TARGET: f"{TARGET} = type({say(SCRIPTS[1])}, (), {{}})()"},
    ),
    Attack(
        "scripts in a cell that fails",
        INJECTION,
        "Adds a cell that raises a script, which the note above the verdict tells of.",
        {TARGET: f"def {TARGET}(*args): return 1\n"},
        forge=lambda nb, scene: nb.cells.insert(
            0, new_code_cell(f"raise ValueError({say(PAYLOAD)})")
        ),
    ),
    Attack(
        "a syntax error that is a script",
        INJECTION,
        "Hands in scripts in place of code.",
        {TARGET: PAYLOAD},
    ),
    Attack(
        "scripts in words",
        INJECTION,
        "Writes scripts into its answer, into headings, and into every text of the notebook.",
        forge=in_words,
    ),
    Attack(
        "scripts in outputs",
        INJECTION,
        "Hands in outputs of all kinds that are scripts.",
        forge=in_outputs,
    ),
    Attack(
        "scripts in metadata",
        INJECTION,
        "Writes scripts into ids, tags, titles and languages.",
        forge=in_metadata,
    ),
    Attack(
        "scripts in names of checks",
        INJECTION,
        "Renames checks to scripts.",
        forge=each(
            lambda cell: cell.metadata.nbgrader.update(grade_id=SCRIPTS[1], checksum=SCRIPTS[0])
        ),
    ),
    Attack(
        "a name that is a script",
        INJECTION,
        "Is called what a page would run.",
        id='"><script>@MARK@()<script><img src=x onerror=@MARK@()>',
    ),
    Attack(
        "escapes for the terminal",
        INJECTION,
        "Raises exceptions with commands for the terminal of whoever reads them there.",
        in_call(f"raise type('E' + {say(ESCAPES)}, (Exception,), {{}})({say(ESCAPES)})"),
    ),
)
