"""Lists the fields of configs: default, bounds, meaning: trainit fields [PATTERN].

Fields of optimizers are listed where PATTERN matches no other field, as in `trainit fields muon`, and by
`trainit fields optimizer`. Otherwise they are left out, since importing them takes seconds.
"""

import argparse
import pkgutil
import textwrap
from collections.abc import Iterator

from trainit import config as config_lib
from trainit.config import Field, require
from trainit.config.exit_codes import DONE

DESCRIPTION = "Lists the fields of configs: default, bounds, meaning."

Row = tuple[str, str, object, Field]  # choice such as "optimizer=muon", empty: any; name; default; meaning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("pattern", nargs="?", default="", help="part of a field's or a choice's name")


def run(arguments: argparse.Namespace) -> int:
    """Prints the fields; returns the exit code."""
    pattern = arguments.pattern.removeprefix("config.").lower()
    rows = [row for row in config_rows() if pattern in f"{row[0]} {row[1]}".lower()]
    if not rows or (pattern and pattern in "optimizer"):
        rows += [row for row in optimizer_rows() if pattern in f"{row[0]} {row[1]}".lower()]
    require(bool(rows), f"no field and no choice has {arguments.pattern!r} in its name; see trainit fields")
    for choice, name, default, known in rows:
        print(f"{name} = {default!r}" + f"    with :{choice}" * bool(choice))
        about = f"{known.help} ({known.bounds or known.type_name})".lstrip()
        print(textwrap.fill(about, 100, initial_indent="    ", subsequent_indent="    "))
    if not pattern:
        print("\nThe optimizer's: trainit fields optimizer. Fields are set by --config.NAME=VALUE.")
    return DONE


def config_rows() -> Iterator[Row]:
    """Fields of every config, then for each choice of a group what differs from that."""
    defaults = {row[0]: row for row in config_lib.walk(config_lib.defaults())}
    yield from (("", *row) for row in defaults.values())
    for group, choices in config_lib.GROUPS.items():
        for choice, make in choices.items():
            for row in config_lib.walk(make(), f"{group}."):
                if row[0] not in defaults or defaults[row[0]][1] != row[1]:
                    yield (f"{group}={choice}", *row)


def optimizer_rows() -> Iterator[Row]:
    """Fields of every optimizer, and those that each wrapper adds to an optimizer's. Imports JAX."""
    from trainit import optimizers
    from trainit.optimizers import wrappers

    makers = optimizers.choices()
    base = makers["sgdm"]()
    listed = [(name, make(), ()) for name, make in makers.items()]
    names = [module.name for module in pkgutil.iter_modules(wrappers.__path__)]
    listed += [(f"{name}+NAME", makers[f"{name}+sgdm"](), tuple(base)) for name in names]
    for choice, config, left_out in listed:
        for row in config_lib.walk(config, "optimizer."):
            if row[0].split(".")[1] not in ("name", *left_out):
                yield (f"optimizer={choice}", *row)
