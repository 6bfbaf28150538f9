"""The results of the doctor's checks, and the table in which they are printed."""

from dataclasses import dataclass

from tabulate import tabulate

OK, NOTE, FAIL = "ok", "note", "FAIL"  # verdicts
FINDING_WIDTH = 84  # characters; with the two columns before it, the table fits a terminal of 100


@dataclass(frozen=True)
class Result:
    """The result of one check."""

    check: str
    verdict: str  # OK, NOTE or FAIL
    finding: str
    remedy: str = ""  # what to do if it failed


def table(results: list[Result]) -> str:
    """Returns the results as a table, each failure with its remedy below, and the number of failures."""
    rows = []
    for result in results:
        remedy = f"\n-> {result.remedy}" if result.verdict == FAIL and result.remedy else ""
        rows.append((result.check, result.verdict, result.finding + remedy))
    text = tabulate(rows, tablefmt="plain", maxcolwidths=[None, None, FINDING_WIDTH], disable_numparse=True)
    failed = sum(result.verdict == FAIL for result in results)
    count = f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed"
    return f"{text}\n{count}"


def group_processes(values: list, processes: list[str]) -> str:
    """Returns which processes have which value: '0.10.2: process 0 (n1); 0.11.0: process 1 (n2)'."""
    groups: dict[str, list[str]] = {}
    for value, process in zip(values, processes, strict=True):
        groups.setdefault(str(value), []).append(process)
    return "; ".join(f"{value}: {', '.join(group[:8])}" for value, group in groups.items())
