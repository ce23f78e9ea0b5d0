"""One switch for the size of everything that trains, sweeps or measures in a lab.

A lab runs whole for people and small for tests: with FEWER_SMALL=1 in the environment, every
`sized(full, small)` is the small one. Nothing else about the lab changes.
"""

import os
from typing import TypeVar

T = TypeVar("T")


def sized(full: T, small: T) -> T:
    """``full``, or ``small`` where the environment variable FEWER_SMALL is set (and is not 0).

    >>> sized(4096, 4096)
    4096
    """
    return small if os.environ.get("FEWER_SMALL", "0") not in ("", "0") else full
