"""README and the documentation's pages name what exists; their commands are run in tests/commands."""

import ast
import importlib
import re
import runpy
import shlex

from pages import ROOT, all_blocks, commands, pages

README = (ROOT / "README.md").read_text()


def test_ci_runs_every_command():
    """Those that install by itself, all others by the test that is left out here."""
    script = (ROOT / ".ci/run").read_text().replace(" --quiet", "")
    shell = [block for block in all_blocks() if block.language == "sh"]
    install = [line for block in shell for line in commands(block) if line.startswith("pip ")]
    assert len(set(install)) == 2
    assert set(install) == set(
        re.findall(r"^pip .*", "".join(re.findall(r"```sh\n(.*?)```", README, re.S)), re.M)
    )
    for command in (*install, "pytest -n 0 tests/commands/test_commands.py"):
        assert f"\n{command}\n" in script


def test_tables_name_what_there_is():
    """The groups' choices on the page of fields are those of the code; README counts optimizers."""
    from trainit import config, optimizers

    page = (ROOT / "docs/reference/fields.md").read_text()
    for group, choices in {**config.GROUPS, "optimizer": optimizers.choices()}.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{group}` |"))
        for choice in choices:
            assert f"`{choice}`" in row
    wrappers = [
        path for path in (ROOT / "trainit/optimizers/wrappers").glob("*.py") if path.stem != "__init__"
    ]
    assert f"{len(optimizers.choices())} optimizers, {len(wrappers)} wrappers" in README


def test_picture_is_there():
    pictures = [
        (page, path)
        for page in pages()
        for path in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / page).read_text())
    ]
    assert len(pictures) >= 4
    for page, path in pictures:
        assert ((ROOT / page).parent / path).stat().st_size > 4_000


def test_configs_are_found_from_a_clone():
    for name in ("pile_gpt", "debug"):
        assert runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().steps > 0


def test_readme_is_a_page_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).is_file(), link


def test_exit_codes_are_those_of_the_code():
    from trainit.config import exit_codes

    page = (ROOT / "docs/reference/exit-codes.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|$", page, re.M))
    assert rows.keys() == {"0", "1", "2", "70", "75"}
    assert "all steps are done" in rows[str(exit_codes.DONE)]
    assert "everything is saved" in rows[str(exit_codes.STOPPED)]
    assert "usage" in rows[str(exit_codes.USAGE)]
    assert "anything else" in rows[str(exit_codes.FAILED)]
    assert "wrong numbers" in rows[str(exit_codes.DAMAGED)]


def test_pages_name_files_that_exist():
    names = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for page in pages():
        text = (ROOT / page).read_text()
        for test in re.findall(r"`(?:tests/[\w/]*)?(test_\w+\.py)", text):
            assert test in names, (page, test)
        for path in re.findall(r"`((?:trainit|configs|launch|docs|tests|\.ci)/[\w./]*\w)`", text):
            assert (ROOT / path).exists(), (page, path)


def test_code_on_pages_imports_what_exists():
    for block in all_blocks():
        for node in ast.walk(ast.parse(block.text)) if block.language == "python" else ():
            if isinstance(node, ast.ImportFrom) and node.module.startswith("trainit"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), (block.page, block.line, alias.name)


def test_commands_on_pages_are_understood(tmp_path, monkeypatch):
    """Also those that need a GPU or a cluster: their flags are known, and so are the fields that they set."""
    from trainit.__main__ import COMMANDS, command_parser
    from trainit.config import command_line

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in all_blocks():
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    seen = set()
    for block in all_blocks():
        for command in commands(block) if block.language in ("", "sh") else ():
            words = shlex.split(re.sub(r"^TRAINIT_\w+=\S+ ", "", command.strip()))
            scripts = [word for word in words if word.startswith("launch/")]
            if scripts:
                rest = words[words.index(scripts[0]) + 1 :]
                words = ["trainit", "train", *(rest[2:] if rest[0] == "-n" else rest)]
            if words[:1] != ["trainit"]:
                continue
            assert words[1] in COMMANDS, command
            seen.add(words[1])
            arguments = command_parser(words[1]).parse(words[2:])
            if getattr(arguments, "config", ""):
                command_line.load_config(arguments)
    assert seen >= {"train", "prepare", "compare", "sweep", "plan", "benchmark", "doctor", "fields"}
