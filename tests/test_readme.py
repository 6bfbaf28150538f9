"""What the README names is there; its commands are run in tests/commands."""

import re
import runpy

from processes import ROOT

README = (ROOT / "README.md").read_text()


def test_ci_runs_every_command():
    """Those that install by itself, all others by the test that is left out here."""
    script = (ROOT / ".ci/run").read_text().replace(" --quiet", "")
    install = re.findall(r"^pip .*", "".join(re.findall(r"```sh\n(.*?)```", README, re.S)), re.M)
    assert len(install) == 2
    for command in (*install, "pytest -n 0 tests/commands/test_commands.py"):
        assert f"\n{command}\n" in script


def test_tables_name_what_there_is():
    """The groups' choices and the metrics' names in the README are those of the code."""
    from trainit import config, optimizers

    for group, choices in {**config.GROUPS, "optimizer": optimizers.choices()}.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group}` |"))
        for choice in choices:
            assert f"`{choice}`" in row


def test_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000


def test_configs_are_found_from_a_clone():
    for name in ("pile_gpt", "debug"):
        assert runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().steps > 0
