"""`field` says what a config field is: default, meaning, type and bounds. `ConfigDict` remembers it.

    config = ConfigDict()
    config.steps = field(50_000, "optimizer steps of the whole run", above=0)
    config.steps = 2_000                  # sets the value; what the field is stays known

Checks, the command line, `trainit fields` and the reference page all read what `field` was given.
"""

import ast
import difflib
import os
import re
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from operator import ge, gt, le, lt
from typing import Any

import ml_collections

DURATION = (int, float, str)  # 500 steps, "10%" of all steps, or "2e9 tokens"
IN_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}


class ConfigError(ValueError):
    """A config or a usage that cannot work. The message is one line: what, the values, what to do."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def expand_home(text: str) -> str:
    """A value or a flag with the user's folder for ~ where a path begins. ConfigError: there is none."""
    if not re.search(pattern := r"(^|[=:,;]\s*)~(?=/|$)", text):
        return text
    home = os.path.expanduser("~")  # noqa: PTH111
    if home == "~":
        raise ConfigError(f"{text}: HOME is not set and user {os.getuid()} has no folder; write a whole path")
    return re.sub(pattern, lambda match: match[1] + home, text)


def describe_error(error: BaseException, file: str) -> str:
    """The type and message of an error, and the last line of the file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    message = textwrap.shorten(f"{type(error).__name__}: {error}", 500, placeholder=" ...")
    return message + "".join(f" (line {line})" for line in lines[-1:])


@dataclass
class Field:
    """What a field is and allows. Assigned to a key of a `ConfigDict`, it declares the field."""

    default: Any  # its value until another is set; a `ConfigDict` for a group of fields
    help: str  # what it is, with its unit, and what special values such as 0 mean
    _: KW_ONLY
    types: tuple[type, ...] = ()  # of its values; without them, the default's; DURATION for lengths of time
    above: float | None = None  # all its numbers are greater
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    one_of: Collection[Any] = ()  # all allowed values

    def __post_init__(self) -> None:
        self.types = self.types or (tuple if isinstance(self.default, list) else type(self.default),)

    @property
    def bounds(self) -> str:
        """What the value must be, such as "in [0, 1)" or "above 0"; empty without bounds."""
        if self.one_of:
            return "one of " + ", ".join(map(repr, self.one_of))
        low = self.above if self.above is not None else self.at_least
        high = self.below if self.below is not None else self.at_most
        if low is not None and high is not None:
            return f"in {'[('[self.at_least is None]}{low}, {high}{'])'[self.at_most is None]}"
        if low is not None:
            return f"above {low}" if self.at_least is None else f"at least {low}"
        return "" if high is None else f"below {high}" if self.at_most is None else f"at most {high}"

    @property
    def type_name(self) -> str:
        """The types in words, such as "a whole number or a tuple"."""
        if set(DURATION) <= set(self.types):
            return "a duration" + " or several" * (tuple in self.types)
        return " or ".join(IN_WORDS.get(t, t.__name__) for t in self.types)

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError, with the dotted name, unless type and bounds allow `value`, each of a tuple."""
        require(self._has_type(value), f"{name}={value!r} must be {self.type_name}")
        if self.one_of:
            require(value in self.one_of, f"{name}={value!r} is n{self.bounds}")  # "none of"
        # A comparison with NaN is False, so that NaN lies within no bound.
        limits = ((self.above, gt), (self.at_least, ge), (self.below, lt), (self.at_most, le))
        must = f"must {'lie' if self.bounds.startswith('in ') else 'be'} {self.bounds}"
        if self.bounds == f"at least {self.at_least}":
            must = f"must not be below {self.at_least}"
        for number in as_tuple(value):
            if isinstance(number, int | float) and not isinstance(number, bool):
                allowed = all(limit is None or within(number, limit) for limit, within in limits)
                require(allowed, f"{name}={value} {must}")
                require(abs(number) < float("inf"), f"{name}={value} must be finite")

    def _has_type(self, value: Any) -> bool:
        if not set(self.types) <= set(IN_WORDS):
            return True  # a value of an optimizer file of the user's own
        if isinstance(value, bool):
            return bool in self.types
        is_number = float in self.types and isinstance(value, int)
        return is_number or isinstance(tuple(value) if isinstance(value, list) else value, self.types)

    def parse(self, name: str, text: str | None) -> Any:
        """The value that a text on the command line stands for, or ConfigError; None: no value was given."""
        if text is None:
            require(bool in self.types, f"--{name} needs a value: {self.type_name}")
            return True
        try:
            return _PARSERS[self.types[0]](text) if len(self.types) == 1 else _parse_literal(text)
        except (ValueError, KeyError):
            raise ConfigError(f"{name}={text!r} must be {self.type_name}") from None


field = Field  # as it reads best where fields are declared


class ConfigDict(ml_collections.ConfigDict):  # type: ignore[misc]
    """A config or a group of its fields, which knows, as its copies do, how each field was declared."""

    def __init__(self, initial: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "declared", {})  # {key: Field}
        super().__init__(initial, *args, **kwargs)
        if isinstance(initial, ConfigDict):
            self.declared.update(initial.declared)

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, Field):
            self.declared[key], value = value, value.default
            self._fields.pop(key, None)  # a field that is declared again may have another type
        if isinstance(value, dict | ml_collections.ConfigDict) and not isinstance(value, ConfigDict):
            value = ConfigDict(value)
        known = self.declared.get(key)
        if isinstance(value, ConfigDict) and known and not value.declared:
            value.declared.update(getattr(known.default, "declared", {}))
        if known and len(known.types) > 1:
            self._fields[key] = value  # ml_collections knows one type a field; `check` looks at the others
        else:
            super().__setitem__(key, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.declared.update(state["declared"])

    def copy_and_resolve_references(self, visit_map: dict[int, Any] | None = None) -> "ConfigDict":
        """A deep copy."""
        copy: ConfigDict = super().copy_and_resolve_references(visit_map)
        copy.declared.update(self.declared)
        return copy

    def declare_rest(self, usual: Mapping[str, Mapping[str, Any]]) -> None:
        """Declares all undeclared keys by their values, and as `usual` says of the pattern of their name."""
        for key, value in self.items():
            if isinstance(value, ConfigDict):
                value.declare_rest(usual)
            if key not in self.declared:
                about = next((usual[name] for name in usual if re.fullmatch(name, key)), {})
                self.declared[key] = Field(value, **{"help": "", **about})


def check_fields(config: Mapping[str, Any], declared: ConfigDict, prefix: str = "", where: str = "") -> None:
    """Checks that a config has exactly the fields that `declared` (perhaps itself) declares, each as allowed.

    `prefix`, such as "optimizer.", is what dotted names begin with, and `where` what messages begin with.
    """
    for key in (key for key in config if key not in declared.declared):
        raise ConfigError(where + unknown_field(prefix + key, declared))
    lacking = names(set(declared.declared) - set(config))
    require(not lacking, f"{where}{prefix.rstrip('.') or 'config'} lacks the fields {lacking}")
    for key, known in declared.declared.items():
        if isinstance(known.default, ConfigDict):
            require(hasattr(config[key], "items"), f"{where}{prefix}{key}={config[key]!r} must be a group")
            check_fields(config[key], declared[key], f"{prefix}{key}.", where)
        else:
            known.check(f"{where}{prefix}{key}", config[key])


def unknown_field(name: str, group: Any) -> str:
    """The message about a dotted name whose last part a group lacks: the nearest field, or all fields."""
    path, _, last = f"config.{name}".rpartition(".")
    known: list[str] = list(group.declared or group) if isinstance(group, ConfigDict) else []
    near = difflib.get_close_matches(last, known, 1)
    if known and not near:  # the same name in a group below?
        near = [field for field, _, _ in walk(group) if field.endswith(f".{last}")][:1]
    hint = f"did you mean {path}.{near[0]}?" if near else f"{path} has {names(known) or 'no fields'}"
    return f"unknown field {path}.{last}; {hint}"


def walk(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Yields (dotted name, value, Field) of all declared fields but groups, in the order of declaration."""
    for key, known in config.declared.items():
        if isinstance(config[key], ConfigDict):
            yield from walk(config[key], f"{prefix}{key}.")
        else:
            yield prefix + key, config[key], known


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.dim": 768, ...}, lists as tuples: what a config and its JSON have in common."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def _parse_literal(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError, TypeError):
        return text


def _parse_tuple(text: str) -> tuple[Any, ...]:
    """Several literals separated by commas, or one text."""
    value = _parse_literal(text)
    if isinstance(value, str) and value.startswith(("(", "[")):
        raise ValueError
    return as_tuple(value)


_TRUTH = {**dict.fromkeys(("true", "t", "1"), True), **dict.fromkeys(("false", "f", "0"), False)}
_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: _TRUTH[text.lower()],
    int: lambda text: int(text, 16 if text.lower().startswith("0x") else 10),
    float: float,
    str: str,
    tuple: _parse_tuple,
    type(None): _parse_literal,
}


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple or list as a tuple, anything else as a tuple of one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def names(choices: Iterable[str]) -> str:
    """The choices in order, separated by commas."""
    return ", ".join(sorted(choices))
