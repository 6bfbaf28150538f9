"""Checks prose: words and turns of phrase that readers of Trainit had to translate back.

    python .ci/prose.py [FILE...]       default: all tracked Python, Markdown and shell files

Comments, docstrings and texts in Python files, comments in shell scripts, and Markdown outside of code blocks
are checked. Exits with 1 if something is found, with file, line, and what to write instead.
"""

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# What not to write, and what to write instead. Patterns ignore case.
WORDS = (
    (r"\banew\b", "again, afresh, from the start"),
    (r"\bbut for\b", "except (for)"),
    (r"\bso many\b", "that many, N"),
    (r"\bso (much|long|soon)\b(?! as)", "that much, that long"),
    (r"\b(is|are|was|were|be|been) (told|said)\b", "is reported, is printed, learns, knows"),
    (r"\btold\b(?! apart)", "reported, learned, given"),
    (r"\btells?\b(?! .{0,20}apart)", "reports, prints, shows"),
    (r"\bbehind (the|a|an|each|every|it|them|its|that|one|step|which)\b", "after, following"),
    (r"\bgets? on\b", "makes progress, continues"),
    (r"\b(goes|go|going|gone|went) on\b", "continues, resumes"),
    (r"\bwhat (there is|is there)\b", "what exists, the available ones"),
    (r"\bbeside(s)?\b", "next to, besides -> also, in addition to"),
    (r"\bmost of which\b|\bof which there (is|are)\b", "say it with a verb: it has ..."),
    (r"((?-i:^Of)|[.:;] of) (?!course)[a-z]", "start with the subject: a sentence has a verb"),
    (r"\bthere'?s\b", "there is"),
    (r"\butili[sz]e", "use"),
    (r"\bleverag(e|es|ing)\b", "use"),
    (
        r"\bseamless(ly)?\b|\bcutting[- ]edge\b|\bstate[- ]of[- ]the[- ]art\b",
        "say what it does, with a figure",
    ),
)
PATTERNS = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), advice) for pattern, advice in WORDS]
PROSE_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
SKIPPED = ("LICENSE", "findings/", ".ci/prose.py")


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment and each string literal in Python source."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in PROSE_TOKENS:
            yield token.start[0], token.string


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each line of Markdown outside of fenced blocks, without inline code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`", "", line)


def shell_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment that has a line of its own."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            yield number, line


def findings(path: Path) -> Iterator[str]:
    """What is to be changed in a file, a line each."""
    text = path.read_text()
    if path.suffix == ".py":
        pieces = python_prose(text)
    elif path.suffix == ".md":
        pieces = markdown_prose(text)
    else:
        pieces = shell_prose(text)
    for start, piece in pieces:
        for pattern, advice in PATTERNS:
            for match in pattern.finditer(piece):
                line = start + piece.count("\n", 0, match.start())
                yield f"{path}:{line}: {match[0].strip()!r}: write {advice}"


def main() -> int:
    names = sys.argv[1:]
    if not names:
        command = ["git", "ls-files", "*.py", "*.md", "*.sh"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    found = [line for name in names if not name.startswith(SKIPPED) for line in findings(Path(name))]
    print(*found, sep="\n", end="\n" * bool(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
