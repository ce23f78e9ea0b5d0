"""One quiet house style for every figure, in labs and slides alike.

The colours are those of Okabe & Ito, "Color Universal Design" (2008), darkened a little so that
they also serve as ink; they stay apart for colour-blind readers. Axes name a quantity and its unit,
a curve carries its name at its own end instead of in a legend, and a grey line below says what was
measured: the text, tokens and context of a perplexity. ::

    fig, ax = figure("Groups pay", "size (bits per weight)", "perplexity (per token)", note=text)
    log_axis(ax.yaxis)
    (line,) = ax.plot(bits, perplexities, marker="o")
    direct_label(ax, line, "per group")
    save(fig, "headline.svg")
"""

import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

GAP = 9.0  # points between the end of a curve and its name
INK, GREY, RULE, GRID = "#2B2F36", "#6B717A", "#B4B9C1", "#E9EBEE"
PALETTE = {
    "blue": "#0067A5",
    "vermilion": "#C24A00",
    "green": "#1E9E77",
    "purple": "#A8457F",
    "amber": "#D99000",
    "sky": "#4FA9E3",
    "ink": INK,
}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: a figure is the same on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.prop_cycle": cycler(color=list(PALETTE.values())),
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": GREY,
    "axes.xmargin": 0.03,
    "grid.color": GRID,
    "xtick.color": RULE,
    "xtick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "savefig.dpi": 160,
    "image.cmap": "cividis",
    "svg.hashsalt": "fewer",  # the same figure is the same file
}


def style() -> None:
    """Make the house style matplotlib's default; ``plt.rc_context(STYLE)`` keeps it to a block."""
    plt.style.use(STYLE)


def figure(
    title: str,
    xlabel: str | None,
    ylabel: str | None,
    note: str = "",
    size: tuple[float, float] = (6.4, 4.0),
) -> tuple[Figure, Axes]:
    """Open a figure of one set of axes in the house style.

    Args:
        title, xlabel, ylabel: see `frame`.
        note: what was measured and on what, in small grey print below. Long notes are wrapped.
        size: width and height in inches.

    Raises:
        ValueError: where the title is empty or a label lacks its unit.

    Example:
        >>> fig, ax = figure("Bits cost", "size (bits per weight)", "perplexity (per token)")
        >>> ax.get_ylabel()
        'perplexity (per token)'
        >>> plt.close(fig)
    """
    style()
    fig, ax = plt.subplots(figsize=size)
    try:
        frame(ax, title, xlabel, ylabel)
    except ValueError:
        plt.close(fig)  # or a notebook would show the empty one
        raise
    if note:
        wrapped = textwrap.fill(note, int(size[0] * 17))  # about 17 letters of 7 points an inch
        fig.supxlabel(wrapped, x=0.02, ha="left", fontsize=7, color=GREY, linespacing=1.4)
    return fig, ax


def frame(ax: Axes, title: str, xlabel: str | None, ylabel: str | None) -> None:
    """Give ``ax`` its title and labels. The y label lies flat above its axis.

    Args:
        title: what the reader should see, as a short sentence.
        xlabel, ylabel: ``"quantity (unit)"``; a pure number says of what it is, as in
            ``"accuracy (fraction)"``. None stands for an axis whose ticks are names.

    Raises:
        ValueError: where the title is empty or a label lacks its unit.
    """
    if not title.strip():
        raise ValueError(f"title must say what the reader should see, got {title!r}")
    for name, label in (("xlabel", xlabel), ("ylabel", ylabel)):
        if label is not None and not re.search(r"\S \([^()]+\)", label):
            right = '"size (bits per weight)"'
            raise ValueError(f"{name} must be a quantity and its unit, as {right}, got {label!r}")
    ax.set_title(title, loc="left", pad=22 if ylabel else 10)
    ax.set_xlabel(xlabel or "", labelpad=5)
    ax.set_ylabel(ylabel or "", rotation=0, ha="left", va="bottom")
    ax.yaxis.set_label_coords(0, 1.02)
    if xlabel is None:
        ax.tick_params(axis="x", length=0)


def log_axis(axis: Axis) -> None:
    """Make ``ax.xaxis`` or ``ax.yaxis`` logarithmic, with few ticks, written 20, 5k, 3M.

    Example:
        >>> fig, ax = figure("It grows", "size (bits per weight)", "perplexity (per token)")
        >>> log_axis(ax.yaxis)
        >>> [ax.yaxis.get_major_formatter()(y) for y in (0.5, 20, 5000, 3e6)]
        ['0.5', '20', '5k', '3M']
        >>> plt.close(fig)
    """
    axis.axes.set(**{"yscale" if axis is axis.axes.yaxis else "xscale": "log"})
    axis.set_major_locator(_FewTicks())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _human(value)))
    axis.set_minor_locator(NullLocator())


class _FewTicks(LogLocator):
    """Steps of 1, 2, 5 where the axis spans less than two decades, whole decades beyond."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        self.set_params(subs=(1, 2, 5) if vmax < 100 * vmin else (1,))
        return super().tick_values(vmin, vmax)


def _human(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def direct_label(
    ax: Axes, at: Line2D | tuple[float, float], text: str, color: str | None = None
) -> Annotation:
    """Write ``text`` beside the end of a curve, in its colour; labels make room for each other.

    Args:
        at: the line, whose last finite point counts, or a point in data coordinates.
        color: of the text; by default the line's, or dark grey for a point.

    Raises:
        ValueError: where the line has no finite point.
    """
    base = color or (at.get_color() if isinstance(at, Line2D) else INK)
    if isinstance(at, Line2D):
        points = np.column_stack([np.asarray(d, dtype=float) for d in at.get_data(orig=False)])
        points = points[np.isfinite(points).all(axis=1)]
        if not len(points):
            raise ValueError(f"at must have a finite point to carry {text!r}, got a line of none")
        at = (points[-1, 0], points[-1, 1])
    # Two parts colour and one part ink: amber and sky alone are too pale for text.
    mixed = (2 * np.array(to_rgb(base)) + np.array(to_rgb(INK))) / 3
    leader = {"arrowstyle": "-", "color": RULE, "lw": 0.7, "shrinkA": 1, "shrinkB": 3}
    label = ax.annotate(
        text,
        at,
        xytext=(GAP, 0),
        textcoords="offset points",
        va="center",
        color=tuple(mixed),
        annotation_clip=False,
        gid="direct label",
        arrowprops={**leader, "relpos": (0, 0.5)},
    )
    fig = ax.get_figure(root=True)
    if fig and not isinstance(fig.get_layout_engine(), _Layout):
        fig.set_layout_engine(_Layout())
    return label


class _Layout(ConstrainedLayoutEngine):
    """Constrained layout that also moves direct labels apart. It runs at every draw."""

    def execute(self, fig: Figure) -> None:
        # Making room for a moved label shifts the ends of the curves; each round a fifth as much.
        for _ in range(4):
            super().execute(fig)
            for ax in fig.axes:
                _place(ax)


def _place(ax: Axes) -> None:
    points = 72 / ax.figure.dpi
    labels = [t for t in ax.texts if isinstance(t, Annotation) and t.get_gid() == "direct label"]
    ends = [ax.transData.transform(label.xy) for label in labels]
    boxes = [Text.get_window_extent(label) for label in labels]
    columns: list[list[int]] = []  # labels that overlap sideways; others may stay level
    right = -np.inf
    for i in sorted(range(len(labels)), key=lambda i: ends[i][0]):
        if ends[i][0] >= right:
            columns.append([])
        columns[-1].append(i)
        right = ends[i][0] + GAP / points + max(boxes[j].width for j in columns[-1])
    for column in columns:
        column.sort(key=lambda i: ends[i][1])
        x, y = np.array([ends[i] for i in column]).T
        heights = np.array([boxes[i].height for i in column])
        place = _spread(y, heights, ax.bbox.y0, ax.bbox.y1)
        close = np.diff(place) < (heights[1:] + heights[:-1]) / 2 + 1
        stacked = np.append(close, False) | np.append(False, close)
        # Labels that stand in a stack are flush left, and thin rules lead to their curves.
        right_by, up_by = (x.max() - x) * stacked, place - y
        for i, dx, dy, height in zip(column, right_by, up_by, heights, strict=True):
            labels[i].xyann = (GAP + dx * points, dy * points)
            labels[i].arrow_patch.set_visible(np.hypot(dx, dy) > height / 2)  # type: ignore[union-attr]


def _spread(y: np.ndarray, heights: np.ndarray, bottom: float, top: float) -> np.ndarray:
    """Least squares: the places nearest to y (ascending), one line apart, from bottom to top.

    Less the lines stacked below it, z[i] = place[i] - stack[i], the constraint is z[i] <= z[i+1]:
    isotonic regression.
    """
    from sklearn.isotonic import isotonic_regression  # here: importing it takes a second

    stack = np.cumsum([heights[0] / 2, *((a + b) / 2 for a, b in pairwise(heights))])
    room = max(bottom, top - stack[-1] - heights[-1] / 2)
    return isotonic_regression(y - stack, y_min=bottom, y_max=room) + stack


def save(fig: Figure, path: str | Path) -> None:
    """Write ``fig`` as .svg, .png or .pdf. The same figure is the same bytes."""
    no_date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(path).suffix)
    fig.savefig(path, metadata=no_date)
