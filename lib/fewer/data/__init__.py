"""Texts and small data sets that are installed with the library: nothing here needs a network."""

from fewer.data.passages import ERAS, PARTIES, PARTIES_SINCE, Passages, PassageSplit, passages
from fewer.data.small import LabelledSplit, digits, mnist1d
from fewer.data.speeches import (
    CALIBRATION_IDS,
    EVALUATION_IDS,
    Speech,
    Text,
    calibration_text,
    evaluation_text,
    speeches,
)

__all__ = [
    "CALIBRATION_IDS",
    "ERAS",
    "EVALUATION_IDS",
    "PARTIES",
    "PARTIES_SINCE",
    "LabelledSplit",
    "PassageSplit",
    "Passages",
    "Speech",
    "Text",
    "calibration_text",
    "digits",
    "evaluation_text",
    "mnist1d",
    "passages",
    "speeches",
]
