"""Mutants are wrong in one place, say where, and are the same list every time."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch

from autograder.mutants import mutants, mutations
from fewer import quantization

SCALE = 2.0


def worked(x, bits: int = 8, dim=None):
    """The docstring says 1 + 1 and x.abs()."""
    if bits < 2:
        raise ValueError(f"bits must be at least {1 + 1}, got {bits}")
    y: float = x.abs().amax() * SCALE
    y = helper(y)
    return y, bits


def helper(y):
    return y + 1


def after(statement: str) -> set[str]:
    """What ``statement`` turns into, as the last line of a function."""
    lines = ast.unparse(ast.parse(statement)).splitlines()
    source = "def f(x, y, z):\n" + "".join(f"    {line}\n" for line in lines)
    return {code.split("\n", 1)[1].strip().replace("\n    ", "\n") for _, code in mutations(source)}


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("return x + y", {"return x - y"}),
        ("return x - y", {"return x + y"}),
        ("return x * y", {"return x / y"}),
        ("return x / y", {"return x * y"}),
        ("return x // y", {"return x * y"}),
        ("return x % y", {"return x // y"}),
        ("return x ** y", {"return x * y"}),
        ("return x << y", {"return x >> y"}),
        ("return x & y", {"return x | y"}),
        ("return x | y", {"return x & y"}),
        ("return x < y", {"return x <= y"}),
        ("return x >= y", {"return x > y"}),
        ("return x == y", {"return x != y"}),
        ("return x is y", {"return x is not y"}),
        ("return x < y <= z", {"return x <= y <= z", "return x < y < z"}),
        ("return x and y", {"return x or y", "return x", "return y"}),
        ("return -x", {"return x"}),
        ("return not x", {"return x"}),
        ("return x[1]", {"return x[2]", "return x[0]"}),
        ("return 0.5", {"return 1.5", "return -0.5"}),
        ("return True", {"return False"}),
        ("return x == 'ieee'", {"return x != 'ieee'", "return x == ''"}),
        ("return x in ('a', 'b')", {"return x not in ('a', 'b')", "return x in ('', 'b')"}
         | {"return x in ('a', '')"}),
        ("return x.get('name')", set()),
        ("return x.min()", {"return x.max()"}),
        ("return min(x)", {"return max(x)"}),
        ("return x.amax(y)", {"return x.amin(y)"}),
        ("return torch.minimum(x, y)", {"return torch.maximum(x, y)"}),
        ("return x.mean()", {"return x.sum()"}),
        ("return sum(x)", set()),
        ("return torch.round(x)", {f"return torch.{f}(x)" for f in ("floor", "ceil", "trunc")}
         | {"return x"}),
        ("return math.floor(x)", {"return x"}),
        ("return x.abs()", {"return x"}),
        ("return abs(x)", {"return x"}),
        ("return x.T", {"return x"}),
        ("return x.clamp(y, z)", {"return x"}),
        ("return x.clamp(min=y)", {"return x", "return x.clamp(max=y)"}),
        ("return x.clamp(min=y, max=z)", {"return x", "return x.clamp(min=y)"}
         | {"return x.clamp(max=z)"}),
        ("return f(x, dim=-1)", {"return f(x, dim=0)", "return f(x)"}),
        ("return f(x, dim=0)", {"return f(x, dim=-1)", "return f(x)"}),
        ("return f(x, dim=y)", {"return f(x, dim=0)", "return f(x, dim=-1)", "return f(x)"}),
        ("return f(x, keepdim=True)", {"return f(x, keepdim=False)"}),
        ("return f(x, weights=y)", {"return f(x)"}),
        ("return zip(x, y, strict=True)", set()),
        ("return require_bits(x)", {"return x"}),
        ("return torch.where(x, y, z)", {"return torch.where(x, z, y)", "return y", "return z"}),
        ("return tl.exp(x)", {"return x"}),
        ("return tl.max(x)", {"return tl.min(x)"}),
        ("return x.to(tl.float32)", {"return x", "return x.to(tl.float16)"}),
        ("tl.store(x, y, mask=z)", {"tl.store(x, y)", "pass"}),
        ("tl.atomic_add(x, y)", {"tl.store(x, y)", "pass"}),
        ("return x.to(torch.int8)", {"return x", "return x.to(torch.uint8)"}
         | {"return x.to(torch.int16)"}),
        ("return x[y:]", {"return x[:]", "return x[y + 1:]"}),
        ("return x[:2]", {"return x[:]", "return x[:3]", "return x[:1]"}),
        ("return (x, y, z)", {"return (y, x, z)", "return (x, z, y)"}),
        ("return x if y else z", {"return x", "return z"}),
        ("return [v for v in x if v]", {"return [v for v in x]"}),
        ("x = y", {"pass"}),
        ("new = y", set()),
        ("x[y] = z", {"pass"}),
        ("x, y = (y, x)", {"pass"}),
        ("x += y", {"x -= y", "pass"}),
        ("f(x)", {"pass"}),
        ("require_bits(x)", {"pass"}),
        ("x = require_bits(x)", {"pass"}),
        ("for x in y:\n    z.f(x)", {"pass", "for x in y:\n    pass"}),
        ("if x:\n    return y", {"if not x:\n    return y", "if False:\n    return y"}),
        ("if x == y:\n    return z", {"if x != y:\n    return z", "if False:\n    return z"}),
        ("if x:\n    pass\nelse:\n    f(x)", {"if not x:\n    pass\nelse:\n    f(x)"}
         | {f"if {b}:\n    pass\nelse:\n    f(x)" for b in (True, False)}
         | {"if x:\n    pass\nelse:\n    pass"}),
        ("if x:\n    y = 1 + 2\n    raise E(y)",
         {f"if {t}:\n    y = 1 + 2\n    raise E(y)" for t in ("not x", "False")}),
        ("while x:\n    break", {"while not x:\n    break", "while False:\n    break"}
         | {"while x:\n    continue"}),
    ],
)  # fmt: skip
def test_an_operator_makes_exactly_these_mutants(before: str, expected: set[str]) -> None:
    assert after(before) == expected


def test_docstrings_annotations_defaults_and_messages_are_never_touched() -> None:
    for mutant in mutants(worked):
        assert mutant.function.__doc__ == worked.__doc__
        assert inspect.signature(mutant.function) == inspect.signature(worked)
        assert mutant.function.__name__ == "worked"
        assert "raise" not in mutant.text
    messages = {code.split("raise ")[1].split("\n")[0] for _, code in mutations(SOURCE)}
    assert len(messages) == 1
    assert all("y: float" in code for _, code in mutations(SOURCE))


SOURCE = inspect.getsource(worked)


def test_mutants_run_beside_the_globals_of_their_function() -> None:
    x = torch.tensor([-3.0, 1.0])
    values = {m.text: m.function(x) for m in mutants(worked) if "bits <" not in m.text}
    assert values["y = helper(y)  ->  (removed)"] == (torch.tensor(6.0), 8)
    assert values["return (y, bits)  ->  return (bits, y)"] == (8, torch.tensor(7.0))
    assert worked(x) == (torch.tensor(7.0), 8)


def test_nonlocal_names_are_found() -> None:
    factor = 3.0

    def inner(x):
        return x * factor

    assert [m.function(6.0) for m in mutants(inner)] == [2.0]


@pytest.mark.parametrize("name", ["quantize_asymmetric", "decode_minifloat", "clip_by_entropy"])
def test_texts_are_unique_and_the_list_is_the_same_every_time(name: str) -> None:
    function = getattr(quantization, name)
    texts = [mutant.text for mutant in mutants(function)]
    assert len(texts) > 20
    assert len(set(texts)) == len(texts)
    assert texts == [mutant.text for mutant in mutants(function)]


def test_a_new_docstring_or_line_above_changes_no_text() -> None:
    longer = SOURCE.replace("says 1 + 1", "says\n    much\n    more,").replace(
        "def ", "\n\ndef ", 1
    )
    assert [text for text, _ in mutations(SOURCE)] == [text for text, _ in mutations(longer)]


def test_no_two_mutants_have_the_same_code_and_none_is_the_original() -> None:
    codes = [code for _, code in mutations(SOURCE)]
    assert len(set(codes)) == len(codes)
    assert ast.unparse(ast.parse(SOURCE)) not in codes


def test_equal_lines_are_told_apart_by_a_number() -> None:
    texts = [text for text, _ in mutations("def f(x):\n    x += x\n    x += x\n")]
    change = "x += x  ->  x -= x"
    assert [text for text in texts if text.startswith(change)] == [change, f"{change}  (2)"]


def test_of_a_long_line_the_text_shows_the_change_and_what_is_near() -> None:
    line = "return " + " + ".join(f"name_{i}" for i in range(30))
    texts = [text for text, _ in mutations(f"def f():\n    {line}\n")]
    assert len(texts) == len(set(texts)) == 29
    assert all(len(text) < 140 and " - " in text for text in texts)
    assert "…name_9 + name_10 + name_11 + name_12 + name_13" in texts[17]
