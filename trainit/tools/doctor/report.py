"""The results of the doctor's checks, and the table in which they are printed."""

from collections.abc import Sequence
from typing import NamedTuple

from tabulate import tabulate

OK, NOTE, FAIL = "ok", "note", "FAIL"  # verdicts
FINDING_WIDTH = 84  # characters; with the two columns before it, the table fits a terminal of 100


class Result(NamedTuple):
    """The result of one check."""

    check: str
    verdict: str  # OK, NOTE or FAIL
    finding: str
    remedy: str = ""  # what to do if it failed


def judge(check: str, finding: str, failure: str, remedy: str) -> Result:
    """Returns the finding, or, if there is a failure, that and its remedy."""
    return Result(check, FAIL, failure, remedy) if failure else Result(check, OK, finding)


def table(results: list[Result]) -> str:
    """Returns the results as a table, each failure with its remedy below, and the number of failures."""
    rows = [(r.check, r.verdict, r.finding + f"\n-> {r.remedy}" * bool(r.remedy)) for r in results]
    text = tabulate(rows, tablefmt="plain", maxcolwidths=[None, None, FINDING_WIDTH], disable_numparse=True)
    failed = sum(result.verdict == FAIL for result in results)
    count = f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed"
    return f"{text}\n{count}"


def name_failures(errors: Sequence[str], processes: list[str]) -> str:
    """Returns which processes have which error, or "" if all errors are empty."""
    return "; ".join(f"{process}: {error}" for process, error in zip(processes, errors, strict=True) if error)


def group_processes(values: list, processes: list[str]) -> str:
    """Returns which processes have which value: '0.10.2: process 0 (n1); 0.11.0: process 1 (n2)'."""
    groups: dict[str, list[str]] = {}
    for value, process in zip(values, processes, strict=True):
        groups.setdefault(str(value), []).append(process)
    return "; ".join(f"{value}: {', '.join(group[:8])}" for value, group in groups.items())
