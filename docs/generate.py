"""Writes the parts of the documentation that come from the code.

    python docs/generate.py            writes them
    python docs/generate.py --check    changes nothing; exits with 1 and names what is not up to date

In a page, a generated part lies between the two comments `<!-- generated: NAME -->` and `<!-- end -->`, where
NAME is a key of PARTS below. The text around it is written by hand. The picture of the rooms is a file of its
own.
"""

import argparse
import ast
import html
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "trainit"
PLAN = tomllib.loads((DOCS / "architecture.toml").read_text())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def docstring(path: Path) -> str:
    """Returns the docstring of a Python file."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""


# ----------------------------------------------------------------- architecture


def floor(room: str) -> int:
    return PLAN["rooms"][room]["floor"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms() -> dict[str, set[str]]:
    """Returns for each room the other rooms that its files import, at their top or inside functions."""
    rooms: dict[str, set[str]] = {name: set() for name in PLAN["rooms"]}
    for path in sorted(PACKAGE.rglob("*.py")):
        if room_of(path) not in rooms:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            tops = {name.split(".")[1] for name in names if name.startswith("trainit.")}
            rooms[room_of(path)] |= {top for top in tops & set(rooms) if floor(top) < floor(room_of(path))}
    return rooms


def direct(rooms: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that do not follow from others: no arrow from A to C where A -> B -> C exists."""

    def below(name: str) -> set[str]:
        return rooms[name].union(*(below(other) for other in rooms[name]))

    return [
        (name, other)
        for name, others in rooms.items()
        for other in sorted(others)
        if not any(other in below(between) for between in others - {other})
    ]


def existing_rooms() -> list[str]:
    return [name for name in PLAN["rooms"] if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()]


BOX, GUTTER, LINE, CHARACTERS = 420, 180, 15, 62  # pixels, except for the characters of a line of text
COLORS = ("#00695c", "#ad1457", "#4527a0", "#e65100", "#1565c0", "#558b2f")


def picture() -> str:
    """Returns the rooms as an SVG: the highest floor at the top, arcs on the right to what a room imports."""
    names = sorted(existing_rooms(), key=lambda name: -floor(name))
    texts = {name: textwrap.wrap(PLAN["rooms"][name]["purpose"], CHARACTERS) for name in names}
    # The top and the height of each box; floors lie farther apart than rooms of one floor.
    tops, heights, y = {}, {}, 8
    for before, name in zip([names[0], *names], names, strict=False):
        y += 10 if floor(name) != floor(before) else 0
        tops[name], heights[name] = y, 30 + LINE * len(texts[name])
        y += heights[name] + 8
    shapes = []
    # At the right edge of a box, arcs arrive in its upper half and leave from its lower half, the near ones
    # in the middle, so that few cross.
    arcs = [arc for arc in direct(imported_rooms()) if set(arc) <= set(names)]
    for upper, lower in sorted(arcs, key=lambda arc: names.index(arc[0])):
        leaving = sorted((b for a, b in arcs if a == upper), key=names.index, reverse=True)
        arriving = sorted((a for a, b in arcs if b == lower), key=names.index)
        share = (leaving.index(lower) + 1) / (len(leaving) + 1)
        y1 = tops[upper] + heights[upper] * (1 - share / 2)
        y2 = tops[lower] + heights[lower] * (arriving.index(upper) + 1) / (len(arriving) + 1) / 2
        bend = BOX + 24 + (GUTTER * 1.3 - 40) * (names.index(lower) - names.index(upper)) / len(names)
        color = COLORS[names.index(upper) % len(COLORS)]
        shapes.append(
            f'<path d="M{BOX} {y1:.0f}C{bend:.0f} {y1:.0f} {bend:.0f} {y2:.0f} {BOX + 7} {y2:.0f}" '
            f'fill="none" stroke="{color}" stroke-width="1.4"/>'
            f'<path d="M{BOX} {y2:.0f}l8 -4v8z" fill="{color}"/>'
        )
    for name in names:
        label = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        shapes.append(
            f'<rect x="1" y="{tops[name]}" width="{BOX - 1}" height="{heights[name]}" rx="5" '
            f'fill="#e0f2f1" stroke="{COLORS[names.index(name) % len(COLORS)]}"/>'
            f'<text x="12" y="{tops[name] + 19}" font-size="15" font-weight="600">{label}</text>'
        )
        for i, line in enumerate(texts[name]):
            shapes.append(
                f'<text x="12" y="{tops[name] + 36 + LINE * i}" font-size="12.5">{html.escape(line)}</text>'
            )
    width, height = BOX + GUTTER, y + 4
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif" fill="#263238" role="img" '
            f'aria-label="The rooms of the package by floor, and which imports which">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *shapes,
            "</svg>",
            "",
        ]
    )


def rooms() -> str:
    """The rooms, the highest first, with what each imports."""
    imports = imported_rooms()
    names = sorted(existing_rooms(), key=lambda name: -PLAN["rooms"][name]["floor"])
    return table(
        ("Room", "Floor", "Purpose", "Imports"),
        (
            (
                f"`{name}`",
                str(PLAN["rooms"][name]["floor"]),
                PLAN["rooms"][name]["purpose"],
                ", ".join(f"`{other}`" for other in sorted(imports[name])) or "nothing of Trainit",
            )
            for name in names
        ),
    )


def reading() -> str:
    """The files to read, in order, each with the first sentence of its docstring."""
    lines = []
    for number, name in enumerate(PLAN["reading"]["files"], 1):
        path = ROOT / name
        if not path.is_file():
            continue
        first = docstring(path).partition("\n\n")[0] if path.suffix == ".py" else "What Trainit is for."
        lines.append(f"{number}. `{name}`: {' '.join(first.split())}")
    return "\n".join(lines)


def caps() -> str:
    """How large a part may be."""
    meaning = {
        "core": "top-level files, `config`, `data/*.py`, `parallel`, `model`, `train` without statistics",
        "package": "the largest room",
        "all": "the whole package",
        "file": "a file",
        "class": "a class",
        "public_methods": "public methods of a class",
        "function": "a function",
        "rooms": "rooms at the top",
    }
    counted = ("public_methods", "rooms")
    return table(
        ("Part", "At most"),
        (
            (meaning[name], f"{value:,}" + " lines" * (name not in counted))
            for name, value in PLAN["caps"].items()
        ),
    )


# ----------------------------------------------------------------- fields and optimizers


def code(value: object) -> str:
    return f"`{value!r}`"


def field_rows(config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, default, meaning with bounds) of each field."""
    from trainit.config import walk

    for name, value, known in walk(config):
        bounds = f" *({known.bounds})*" if known.bounds else ""
        yield f"`{prefix}{name}`", code(value), known.help + bounds


def groups() -> str:
    """The choices of each group."""
    from trainit import config, optimizers

    notes = {
        "optimizer": "; a file of your own; any of optax; any of these in a wrapper, as `cautious+adamw`",
    }
    return table(
        ("Group", "Choices"),
        (
            (f"`{group}`", ", ".join(f"`{choice}`" for choice in choices) + notes.get(group, ""))
            for group, choices in {**config.GROUPS, "optimizer": optimizers.choices()}.items()
        ),
    )


def fields() -> str:
    """All fields of a config except those of optimizers, by group."""
    from trainit import config

    header = ("Field", "Default", "Meaning")
    everything = config.defaults()
    parts: dict[str, list] = {}
    for row in field_rows(everything):
        top, dot, _ = row[0].strip("`").partition(".")
        parts.setdefault(top if dot else "", []).append(row)
    parts.pop("optimizer", None)
    sections = []
    for top, rows_ in parts.items():
        title = f"`{top}`" if top else "The run"
        text = everything.declared[top].help if top else ""
        sections.append("\n\n".join(filter(None, (f"### {title}", sentence(text), table(header, rows_)))))
    for title, group in (("dataset", config.DATASETS), ("schedule", config.SCHEDULES)):
        known = {row[0] for row in parts[title]}
        more: dict[str, tuple] = {}
        for make in group.values():
            more |= {row[0]: row for row in field_rows(make(), f"{title}.") if row[0] not in known}
        sections.append(f"### Other choices of `{title}` also have\n\n" + table(header, more.values()))
    return "\n\n".join(sections)


def sentence(text: str) -> str:
    """Returns the text with a capital and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


# Everything else has the heading "Online learners" on the page of optimizers.
LEARNERS = """ogd ogd_md ftrl ada_ftrl kt_bettor mirror_descent blackbox normalized_blackbox
    imperfect_hints""".split()
SHARED = ("learning_rate", "weight_decay", "name")


def describe_optimizer(title: str, text: str, config) -> str:
    """A section: what the code says about it, and a table of its fields."""
    rows_ = [row for row in field_rows(config) if row[0].strip("`") not in SHARED]
    rates = [f"`{name}` = {code(config[name])}" for name in SHARED[:2] if name in config]
    first, _, rest = text.partition("\n\n")
    paragraphs = [
        f"### `{title}`",
        " ".join(first.split()),
        rest.strip(),
        "Defaults: " + ", ".join(rates) + ".",
    ]
    if rows_:
        paragraphs.append(table(("Field", "Default", "Meaning"), rows_))
    return "\n\n".join(filter(None, paragraphs))


def optimizer_sections(names: Iterable[str]) -> str:
    from trainit import optimizers

    choices = optimizers.choices()
    return "\n\n".join(describe_optimizer(name, optimizer_text(name), choices[name]()) for name in names)


def overview() -> str:
    """All optimizers and wrappers with the first sentence about each."""
    from trainit import optimizers

    wrappers = [
        path for path in sorted((PACKAGE / "optimizers/wrappers").glob("*.py")) if path.stem[0] != "_"
    ]
    texts = [(name, optimizer_text(name)) for name in sorted(optimizers.choices())]
    texts += [(f"{path.stem}+NAME", docstring(path)) for path in wrappers]
    return table(
        ("`optimizer=`", "Rule"),
        ((f"[`{name}`](#{name.lower().replace('+', '')})", first_paragraph(text)) for name, text in texts),
    )


def first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def optimizer_text(name: str) -> str:
    """Returns the docstring of an optimizer's file, or of make_NAME in a file that has several optimizers."""
    own = PACKAGE / "optimizers" / f"{name}.py"
    if own.is_file():
        return docstring(own)
    for path in sorted((PACKAGE / "optimizers").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == f"make_{name}":
                return ast.get_docstring(node) or docstring(path)
    raise ValueError(f"no file in trainit/optimizers has the optimizer {name}")


def optimizer_list() -> str:
    """The optimizers in the package that are not online learners."""
    from trainit import optimizers

    return optimizer_sections(sorted(set(optimizers.choices()) - set(LEARNERS)))


def learners() -> str:
    return optimizer_sections(LEARNERS)


def wrapper_list() -> str:
    """The wrappers, with their own fields."""
    from trainit import optimizers

    sections = []
    for path in sorted((PACKAGE / "optimizers/wrappers").glob("*.py")):
        if path.stem == "__init__":
            continue
        config = optimizers.choices()[f"{path.stem}+adamw"]()
        first, _, rest = docstring(path).partition("\n\n")
        rows_ = [row for row in field_rows(config) if row[0].startswith(f"`{path.stem}.")]
        parts = [f"### `{path.stem}+NAME`", " ".join(first.split()), rest.strip()]
        if rows_:
            parts.append(table(("Field", "Default", "Meaning"), rows_))
        sections.append("\n\n".join(filter(None, parts)))
    return "\n\n".join(sections)


# ----------------------------------------------------------------- flags, commands, evidence


def commands() -> str:
    """The sub-commands with their flags, from the parsers that read them."""
    from trainit.__main__ import COMMANDS, command_parser

    sections = [
        table(
            ("Command", "What it does"), ((f"[`trainit {n}`](#trainit-{n})", t) for n, t in COMMANDS.items())
        )
    ]
    for name in COMMANDS:
        parser = command_parser(name)
        rows_ = []
        for group in parser._action_groups:
            for action in group._group_actions:
                if action.dest != "help":
                    rows_.append((flag(action), default(action), sentence(action.help or "")))
        sections.append(f"## `trainit {name}`\n\n{sentence(parser.description or '')}")
        if rows_:
            sections.append(table(("Argument", "Default", "Meaning"), rows_))
    return "\n\n".join(sections)


def flag(action: argparse.Action) -> str:
    """Returns how an argument is written: `--steps=...`, `--on_error={stop,skip}`, `--debug` or `FILE`."""
    metavar = action.metavar if isinstance(action.metavar, str) else "..."
    if not action.option_strings:
        return f"`{metavar if metavar != '...' else action.dest.upper()}`"
    takes = action.nargs not in (0, "?")
    value = f"{{{','.join(map(str, action.choices))}}}" if action.choices else metavar
    return f"`{action.option_strings[-1]}{'=' + value if takes else ''}`"


def default(action: argparse.Action) -> str:
    """Returns the default, unless there is none, or the help explains it."""
    if action.dest == "workers":
        return "all cores"  # a number that is another one on each machine
    hidden = action.default in (None, argparse.SUPPRESS, "", False, []) or "default" in (action.help or "")
    return "" if hidden else f"`{action.default}`"


def xla_flags() -> str:
    """The table of settings, each with where it holds and its source."""
    from trainit.cluster.xla_flags import SETTINGS

    where = {"GPU": "one GPU", "host": "several GPUs of a host", "hosts": "several hosts"}

    def holds(row) -> str:
        kinds = "any GPU" if len(row.families) > 3 else ", ".join(row.families)
        if row.families == ("CPU",):
            return kinds + ", not in `trainit generate`" * row.training
        scales = "" if len(row.scales) == 3 else ": " + ", ".join(where[scale] for scale in row.scales)
        return kinds + scales

    return table(
        ("Setting", "Value", "Where", "Source"),
        ((f"`{row.name.removeprefix('--')}`", f"`{row.value}`", holds(row), row.source) for row in SETTINGS),
    )


def marks() -> Iterator[tuple[Path, str, str]]:
    """Yields (file, test, promise) of each `pytest.mark.evidence("promise")`; test is "" for a whole file."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                for call in node.decorator_list:
                    yield from ((path, node.name, text) for text in promises(call))
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                values = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
                yield from ((path, "", text) for value in values for text in promises(value))


def promises(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.evidence":
        yield " ".join(ast.literal_eval(node.args[0]).split())


TOPICS = {
    "cluster": "Jobs and faults",
    "train": "Training and resuming",
    "data": "Data",
    "prepare": "Data",
    "parallel": "Devices and what they exchange",
    "model": "Model and loss",
    "optimizers": "Optimizers",
    "references": "Optimizers",
    "experiments": "Sweeps and comparisons",
    "tools": "Tools",
}


def evidence() -> str:
    """Which test shows which promise, by topic."""
    topics: dict[str, list] = {title: [] for title in (*TOPICS.values(), "Everything else")}
    for path, name, text in marks():
        test = str(path.relative_to(ROOT)) + f"::{name}" * bool(name)
        topic = TOPICS.get(path.relative_to(ROOT / "tests").parts[0], "Everything else")
        topics[topic].append((sentence(text), f"`{test}`"))
    return "\n\n".join(
        f"### {title}\n\n" + table(("Promise", "Test"), rows_) for title, rows_ in topics.items() if rows_
    )


PARTS = {
    "rooms": rooms,
    "reading": reading,
    "caps": caps,
    "groups": groups,
    "fields": fields,
    "overview": overview,
    "optimizers": optimizer_list,
    "wrappers": wrapper_list,
    "learners": learners,
    "commands": commands,
    "xla_flags": xla_flags,
    "evidence": evidence,
}
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def outputs() -> Iterator[tuple[Path, str]]:
    """Yields (file, its text as it should be)."""
    yield DOCS / "explanation" / "architecture.svg", picture()
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        if MARKED.search(text):
            yield path, MARKED.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}", text)


def main() -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    stale = [(path, text) for path, text in outputs() if not path.is_file() or path.read_text() != text]
    if sys.argv[1:] == ["--check"]:
        for path, _ in stale:
            print(f"{path.relative_to(ROOT)} is not up to date: run python docs/generate.py")
        return 1 if stale else 0
    for path, text in stale:
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
