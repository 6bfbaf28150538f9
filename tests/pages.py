"""What the documentation's pages contain: code blocks and commands, in the order in which to read them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

BLOCK = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str  # its path from the repository's root
    line: int
    language: str  # "sh": commands that are run; "python": code that is run; "": only shown
    title: str  # of Python: the file that it is saved as; "": it is run where it stands
    text: str


def pages() -> list[str]:
    """Paths of README.md and of all pages of the site, in the order of its navigation."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    return [
        "README.md",
        *(f"docs/{name}" for name in re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)),
    ]


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        indent, language, title, body = match.groups()
        body = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        yield Block(page, line, language, title or "", body)


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def commands(block: Block) -> list[str]:
    """The commands of a block, one a line; a line that ends in a backslash continues in the next."""
    return block.text.replace("\\\n", " ").splitlines()


def words(page: Path) -> set[str]:
    """What stands in inline code on a page."""
    return set(re.findall(r"`([^`\n]+)`", page.read_text()))
