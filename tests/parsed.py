"""A page as a parser sees it: for tests that ask what a student could get into it."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.comments: list[str] = []
        self._words: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(self._words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem != "style":
            self._words += data.split()

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    handle_pi = unknown_decl = handle_comment

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]
