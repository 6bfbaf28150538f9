"""Groups of parameters with settings of their own, each described by one line.

"blocks/.*/kernel optimizer=muon learning_rate=0.02" is a pattern over whole parameter paths, and fields of
the group's optimizer. Without optimizer=, it is the run's with changes.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence

import jax

from trainit.config import Config, ConfigDict, ConfigError, check_fields, flatten, require
from trainit.parallel.trees import path_name

REST = "rest"  # the group of what no pattern matches


def split(line: str) -> tuple[str, list[tuple[str, str, str]]]:
    """A line's pattern, and its settings as (field, "=", value)."""
    pattern, *settings = line.split()
    return pattern, [setting.partition("=") for setting in settings]


def read(
    line: str, base: Config, choices: Mapping[str, Callable[[], ConfigDict]]
) -> tuple[re.Pattern, Config]:
    """A group's pattern and its optimizer's config; `base` is the run's.

    ConfigError: the line cannot be read, or has an unknown optimizer, field or value.
    """
    where = f"parameter_groups: {line!r}"
    require(isinstance(line, str) and bool(line.strip()), f"{where} must be text: 'PATTERN FIELD=VALUE ...'")
    pattern, pairs = split(line)
    are_settings = bool(pairs) and all(equals for _, equals, _ in pairs)
    require(are_settings, f"{where} must be a pattern and settings, as in 'blocks/.*/kernel optimizer=muon'")
    values = {field: value for field, _, value in pairs}
    name = values.pop("optimizer", base.name)
    require(name in choices, f"{where}: unknown optimizer {name!r}: there are {', '.join(choices)}")
    config = choices[name]()
    if name == base.name:
        config.update(base.to_dict())
    there = flatten(config)
    known = ", ".join(sorted(set(there) - {"name"}))
    for field, text in values.items():
        is_field = field in there and field != "name"
        require(is_field, f"{where}: {name} has no field {field!r}, but {known}")
        try:
            value = text if isinstance(there[field], str) else ast.literal_eval(text)
            config.update_from_flattened_dict({field: value})
        except (ValueError, SyntaxError, TypeError) as error:
            raise ConfigError(f"{where}: {field}={text} cannot be set: {error}") from None
    check_fields(config, config, "optimizer.", f"{where}: ")
    try:
        return re.compile(pattern), Config(config)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is no regular expression: {error}") from None


def assign(patterns: Sequence[re.Pattern], parameters: dict) -> dict:
    """For each parameter the number, as text, of the first pattern that matches its whole path, or REST."""

    def label(path, _) -> str:
        name = path_name(path)
        return next((str(i) for i, pattern in enumerate(patterns) if pattern.fullmatch(name)), REST)

    labels = jax.tree.map_with_path(label, parameters)
    for number, pattern in enumerate(patterns):
        none = f"parameter_groups: no parameter is left for {pattern.pattern!r}; paths are "
        require(str(number) in jax.tree.leaves(labels), none + ", ".join(paths(labels, None)))
    return labels


def paths(labels: dict, label: str | None) -> list[str]:
    """The part for the parameters with this label; None: for all."""
    return [path_name(path) for path, own in jax.tree.leaves_with_path(labels) if label in (None, own)]
