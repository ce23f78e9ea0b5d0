"""What several test files share: one warm process to fork students from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autograder.remote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote
