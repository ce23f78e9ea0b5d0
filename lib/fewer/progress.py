"""One progress bar for all that takes long: a widget in notebooks, a line in terminals.

It draws from the thread that works, never from one of its own: a kernel that draws from two threads
can hang, and then so does the lab.
"""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def track(
    steps: Iterable[Any] | None = None,
    what: str = "",
    total: int | None = None,
    progress: bool = True,
    **more: Any,
) -> tqdm:
    """Go through `steps` as `for` does, with a bar on stderr that is gone once they are done.

    Args:
        steps: what to go through; None for work that is no loop: call `.update(n)` after n parts of
            it, and use the bar in a `with`.
        what: a word or two that stand before the bar.
        total: the number of steps, where `len(steps)` does not tell.
        progress: False shows nothing.
        more: goes to tqdm, such as ``unit="B", unit_scale=True``.

    Work of less than a second shows no bar.

    Example:
        >>> sum(track(range(4), "add"))
        6
    """
    arguments = {"leave": False, "miniters": 1, "delay": 1} | more
    # None: only where stderr is a terminal; a notebook's bar is always shown.
    return tqdm(
        steps, desc=what or None, total=total, disable=None if progress else True, **arguments
    )
