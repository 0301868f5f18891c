"""A page as a browser would take it apart, for tests."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from moe_compress.report.page import write_page

INLINE = {"span", "b", "strong", "wbr", "data", "code", "small", "sup", "a"}
VOID = {"meta", "link", "br", "img", "wbr", "input", "hr"}


class Parsed(HTMLParser):
    """What a browser would make of a page: its elements, texts by element, figures and ids."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.errors: list[str] = []
        self.feed(text)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append(("", "" if tag in INLINE else " "))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def figures(self) -> set[str]:
        return {attributes["value"] or "" for tag, attributes in self.elements if tag == "data"}

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]

    @property
    def text(self) -> str:
        """What is read, spaces made one."""
        shown = "".join(data for tag, data in self.texts if tag not in ("script", "style"))
        return " ".join(shown.replace("\u00a0", " ").split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> Parsed:
    parsed = Parsed(write_page([folder]).read_text(encoding="utf-8"))
    assert parsed.errors == []
    assert len(set(parsed.ids)) == len(parsed.ids)
    return parsed
