"""Lists the fields of configs: default, bounds, meaning.

    trainit fields [PATTERN] [--markdown]

Fields of optimizers are listed where PATTERN matches no other field, as in `trainit fields muon`, and by
`trainit fields optimizer`. Otherwise they are left out, since importing them takes seconds.
"""

import argparse
import pkgutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from trainit import config as config_lib
from trainit.cluster.process import DONE
from trainit.config import ConfigDict, Field, require

DESCRIPTION = "Lists the fields of configs: default, bounds, meaning."
WIDTH = 100


@dataclass(frozen=True)
class Row:
    """A field as it is listed."""

    group: str  # such as "optimizer=muon"; empty: in every config
    name: str
    default: object
    known: Field

    @property
    def limits(self) -> str:
        """The type and the bounds in words."""
        return self.known.bounds or self.known.type_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("pattern", nargs="?", default="", help="part of a field's or a choice's name")
    parser.add_argument("--markdown", action="store_true", help="all fields as a page")


def run(arguments: argparse.Namespace) -> int:
    """Prints the fields; returns the exit code."""
    if arguments.markdown:
        print(markdown([*config_rows(), *optimizer_rows()]), end="")
        return DONE
    pattern = arguments.pattern.removeprefix("config.").lower()
    rows = [row for row in config_rows() if pattern in f"{row.group} {row.name}".lower()]
    if not rows or (pattern and pattern in "optimizer"):
        rows += [row for row in optimizer_rows() if pattern in f"{row.group} {row.name}".lower()]
    require(bool(rows), f"no field and no choice has {arguments.pattern!r} in its name; see trainit fields")
    for row in rows:
        print(text(row))
    if not pattern:
        print("\nThe optimizer's: trainit fields optimizer. Fields are set by --config.NAME=VALUE.")
    return DONE


def config_rows() -> Iterator[Row]:
    """Fields of every config, then for each choice of a group what differs from that."""
    defaults = {name: value for name, value, _ in config_lib.walk(config_lib.defaults())}
    for name, value, known in config_lib.walk(config_lib.defaults()):
        yield Row("", name, value, known)
    for group, choices in config_lib.GROUPS.items():
        for choice, make in choices.items():
            for name, value, known in config_lib.walk(make(), f"{group}."):
                if name not in defaults or defaults[name] != value:
                    yield Row(f"{group}={choice}", name, value, known)


def optimizer_rows() -> Iterator[Row]:
    """Fields of every optimizer and of every wrapper. Imports JAX."""
    from trainit import optimizers
    from trainit.optimizers import wrappers

    for name, make in optimizers.choices().items():
        yield from _optimizer(name, make())
    base = set(optimizers.choices()["sgdm"]())
    for wrapper in (module.name for module in pkgutil.iter_modules(wrappers.__path__)):
        config = optimizers.choices()[f"{wrapper}+sgdm"]()
        for row in _optimizer(f"{wrapper}+NAME", config):
            if row.name.split(".")[1] not in base:
                yield row


def _optimizer(choice: str, config: ConfigDict) -> Iterator[Row]:
    for name, value, known in config_lib.walk(config, "optimizer."):
        if name != "optimizer.name":
            yield Row(f"optimizer={choice}", name, value, known)


def text(row: Row) -> str:
    """A field for the terminal: name and default, and below them what it is."""
    head = f"{row.name} = {row.default!r}" + f"    with :{row.group}" * bool(row.group)
    about = f"{row.known.help} ({row.limits})" if row.known.help else f"({row.limits})"
    return "\n".join([head, *textwrap.wrap(about, WIDTH, initial_indent="    ", subsequent_indent="    ")])


def markdown(rows: list[Row]) -> str:
    """A page with a table for each group."""
    lines = ["# Fields of configs", ""]
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            title = f"`:{group}`" if group else "Every config"
            lines += ["", f"## {title}", "", "| field | default | is | meaning |", "|---|---|---|---|"]
        cells = (f"`{row.name}`", f"`{row.default!r}`", row.limits, row.known.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
