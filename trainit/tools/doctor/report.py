"""The outcome of checks, and the table in which they are printed."""

import textwrap
from dataclasses import dataclass

OK, NOTE, FAIL = "ok", "note", "FAIL"
COLUMNS = 84  # of what was found, beside the names of checks


@dataclass(frozen=True)
class Row:
    """The outcome of one check."""

    name: str
    verdict: str  # OK, NOTE or FAIL
    seen: str
    remedy: str = ""


def table(rows: list[Row]) -> str:
    """Aligned, a remedy under each check that failed, and a count."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        remedy = f"\n-> {row.remedy}" * (row.verdict == FAIL and row.remedy != "")
        parts = [part for text in (row.seen + remedy).splitlines() for part in textwrap.wrap(text, COLUMNS)]
        heads = [f"{row.name:{width}}  {row.verdict:4}  "] + [" " * (width + 8)] * (len(parts) - 1)
        lines += [head + part for head, part in zip(heads, parts, strict=True)]
    failed = sum(row.verdict == FAIL for row in rows)
    lines.append(f"{failed} of {len(rows)} checks failed" if failed else f"all {len(rows)} checks passed")
    return "\n".join(lines)


def by_value(values: list, processes: list[str]) -> str:
    """'0.10.2: process 0 (n1); 0.11.0: process 1 (n2)', for values that should be the same everywhere."""
    groups: dict[str, list[str]] = {}
    for value, process in zip(values, processes, strict=True):
        groups.setdefault(str(value), []).append(process)
    return "; ".join(f"{value}: {', '.join(who[:8])}" for value, who in groups.items())
