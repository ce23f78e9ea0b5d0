"""The house style: what a reader of a figure may rely on."""

import io
from itertools import combinations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from fewer.plots import PALETTE, _spread, direct_label, figure, frame, log_axis, save

BITS = "size (bits per weight)"
PERPLEXITY = "perplexity (per token)"


@pytest.fixture(autouse=True)
def _fresh_matplotlib():
    with plt.rc_context():
        yield
    plt.close("all")


def crowded(ends, size=(6.4, 4.0)):
    fig, ax = figure("Many curves end together", BITS, PERPLEXITY, note="a text", size=size)
    labels = []
    for i, end in enumerate(ends):
        (line,) = ax.plot([3, 8], [10 + i, end])
        labels.append(direct_label(ax, line, f"method number {i}"))
    return fig, ax, labels


def boxes(fig, labels):
    fig.canvas.draw()
    return [Text.get_window_extent(label) for label in labels]


@pytest.mark.parametrize("ends", [[5] * 7, [0, 0, 0, 20], [1, 1.01, 9, 9.01, 16], [3]])
def test_labels_of_curves_that_end_together_do_not_overlap(ends):
    fig, _, labels = crowded(ends)
    for a, b in combinations(boxes(fig, labels), 2):
        assert min(a.y1, b.y1) - max(a.y0, b.y0) <= 0.5 or min(a.x1, b.x1) <= max(a.x0, b.x0)


def test_labels_do_not_overlap_on_a_log_axis_that_was_set_afterwards():
    fig, ax, labels = crowded([58.8, 59, 60, 62, 9e6])
    log_axis(ax.yaxis)
    for a, b in combinations(boxes(fig, labels), 2):
        assert min(a.y1, b.y1) - max(a.y0, b.y0) <= 0.5


def test_labels_keep_the_order_of_the_curves():
    fig, _, labels = crowded([5.2, 5.0, 5.1, 5.3])
    heights = [box.y0 for box in boxes(fig, labels)]
    assert sorted(range(4), key=heights.__getitem__) == [1, 2, 0, 3]


def test_a_label_with_room_stands_level_with_the_end_of_its_curve():
    fig, ax, labels = crowded([0, 10, 20])
    for box, end in zip(boxes(fig, labels), [0, 10, 20], strict=True):
        assert (box.y0 + box.y1) / 2 == pytest.approx(ax.transData.transform((8, end))[1], abs=1)


def test_curves_that_end_apart_sideways_are_labelled_level():
    fig, ax = figure("One ends early", BITS, PERPLEXITY)
    labels = [direct_label(ax, ax.plot([1, x], [0, 5])[0], "here") for x in (2, 8)]
    a, b = boxes(fig, labels)
    assert a.y0 == pytest.approx(b.y0, abs=0.5)


def test_labels_lie_inside_the_picture_and_stay_where_they_are_when_drawn_again():
    fig, ax, labels = crowded([5, 5, 5, 5.1])
    labels.append(direct_label(ax, ax.plot([3, 7], [9, 5])[0], "a long name that ends earlier"))
    first, second = boxes(fig, labels), boxes(fig, labels)
    for before, after in zip(first, second, strict=True):
        assert np.allclose(before.extents, after.extents, atol=1)
        assert before.x0 >= 0
        assert before.x1 <= fig.bbox.x1


def test_a_label_stands_at_the_last_finite_point():
    _, ax = figure("It diverges", BITS, PERPLEXITY)
    (line,) = ax.plot([1, 2, 3], [4.0, 5.0, np.nan])
    assert tuple(direct_label(ax, line, "diverges").xy) == (2, 5)
    (nothing,) = ax.plot([1, 2], [np.nan, np.inf])
    with pytest.raises(ValueError, match="finite"):
        direct_label(ax, nothing, "nothing")


lines = st.lists(st.tuples(st.floats(0, 400), st.floats(5, 30)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(lines)
def test_spread_labels_are_a_line_apart_and_no_further_from_home_than_needed(drawn):
    y, heights = np.array(sorted(drawn)).T
    place = _spread(y, heights, 0, 400)
    apart = (heights[1:] + heights[:-1]) / 2
    assert np.all(np.diff(place) >= apart - 1e-6)
    assert place[0] >= heights[0] / 2 - 1e-6
    assert place[-1] <= 400 - heights[-1] / 2 + 1e-6
    for i in range(
        len(y)
    ):  # where a label is away from home, it leans on a neighbour or on the edge
        above = i + 1 < len(y) and place[i + 1] - place[i] <= apart[i] + 1e-6
        below = i > 0 and place[i] - place[i - 1] <= apart[i - 1] + 1e-6
        edge = min(place[i] - heights[i] / 2, 400 - heights[i] / 2 - place[i]) <= 1e-6
        assert above or below or edge or place[i] == pytest.approx(y[i], abs=1e-6)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
COLOUR_VISION = {
    "usual": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


def linear(color):
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def cielab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(xyz @ rgb, 1e-4, None) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_colours_of_the_palette_stay_apart(vision):
    seen = [
        cielab(np.clip(np.array(COLOUR_VISION[vision]) @ linear(color), 0, 1))
        for color in PALETTE.values()
    ]
    # 2.3 is a just noticeable difference; matplotlib's default palette falls to 5 here.
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15


@pytest.mark.parametrize("color", PALETTE.values())
def test_labels_are_dark_enough_to_read(color):
    _, ax = figure("Readable", BITS, PERPLEXITY)
    ink = direct_label(ax, (1, 1), "text", color=color).get_color()
    contrast = 1.05 / (linear(ink) @ [0.2126, 0.7152, 0.0722] + 0.05)
    assert contrast > 3.5


@pytest.mark.parametrize("wrong", ["", "size", "(bits)", "size ()", "size(bits)"])
def test_a_label_without_quantity_and_unit_is_refused(wrong):
    with pytest.raises(ValueError, match="ylabel must be a quantity and its unit"):
        figure("Title", BITS, wrong)
    with pytest.raises(ValueError, match="xlabel must be a quantity and its unit"):
        figure("Title", wrong, PERPLEXITY)
    assert not plt.get_fignums()  # and no empty figure is left for a notebook to show


def test_a_figure_without_title_is_refused():
    with pytest.raises(ValueError, match="title must say"):
        figure(" ", BITS, PERPLEXITY)


def test_an_axis_of_names_needs_no_label():
    _, ax = figure("Bars", None, "error (%)")
    ax.bar(["tensor", "channel"], [2, 1])
    assert ax.get_xlabel() == ""


def test_a_note_is_shown_whole_and_inside_the_picture():
    note = "SmolLM2-135M, State of the Union of 1946, 4,096 tokens, context 512, stride 256. " * 3
    fig, _ = figure("Noted", BITS, PERPLEXITY, note=note)
    fig.canvas.draw()
    (shown,) = [text for text in fig.texts if "SmolLM2" in text.get_text()]
    assert shown.get_text().split() == note.split()
    box = shown.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= fig.bbox.x1
    assert box.y0 >= 0


def test_panels_of_one_figure_are_labelled_each():
    fig, axes = plt.subplots(1, 2)
    for ax in axes:
        frame(ax, "A panel", BITS, PERPLEXITY)
        labels = [direct_label(ax, ax.plot([1, 2], [i, 5])[0], f"curve {i}") for i in range(3)]
        for a, b in combinations(boxes(fig, labels), 2):
            assert min(a.y1, b.y1) - max(a.y0, b.y0) <= 0.5


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (50, 2e6, "100 1k 10k 100k 1M"),
        (55, 130, "100"),
        (8, 90, "10 20 50"),
        (0.002, 0.1, "0.002 0.005 0.01 0.02 0.05 0.1"),
    ],
)
def test_log_ticks_are_few_and_written_as_people_write_them(low, high, ticks):
    fig, ax = figure("Ticks", BITS, PERPLEXITY)
    log_axis(ax.yaxis)
    ax.set_ylim(low, high)
    fig.canvas.draw()
    shown = [
        label.get_text()
        for place, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
        if low <= place <= high * 1.0001
    ]
    assert " ".join(shown) == ticks


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_the_same_figure_is_the_same_bytes(kind, tmp_path):
    for name in ("a", "b"):
        fig, _, _ = crowded([1, 1, 2])
        save(fig, tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_labels_fit_in_the_picture_that_a_notebook_shows():
    fig, _, labels = crowded([1, 1, 2])
    fig.savefig(io.BytesIO(), bbox_inches="tight")  # what Jupyter's inline backend does
    for a, b in combinations(boxes(fig, labels), 2):
        assert min(a.y1, b.y1) - max(a.y0, b.y0) <= 0.5
