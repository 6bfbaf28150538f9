"""The command line: sub-commands, help, wrong flags, overrides, the list of fields, completion."""

import os
import pty
import re
import shlex
import subprocess
import sys

import pytest
from processes import ROOT, Fork, end, start

from trainit.__main__ import COMMANDS, main
from trainit.config import ConfigError, command_line, defaults, walk

SLOW = ("jax", "grain", "orbax", "flax")  # what no help and no completion may wait for


def trainit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def error_of(*arguments: str, code: int = 2) -> str:
    """The one line that a wrong command prints."""
    result = trainit(*arguments)
    assert result.returncode == code, result
    assert result.stderr.startswith("trainit: error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("the command is missing", "train, prepare, compare", "trainit --help")),
        (("trian",), ("unknown command 'trian'", "did you mean trainit train?")),
        (("--config=configs/debug.py",), ("did you mean trainit train?",)),
        (("configs/debug.py",), ("did you mean trainit train?",)),
        (("train",), ("--config=FILE is missing",)),
        (("doctor",), ("--config=FILE is missing",)),
        (("train", "--config=configs/debug.py", "--workdr=x"), ("unknown flag --workdr", "--workdir")),
        (("compare",), ("required: RUN",)),
        (("compare", "x", "--config.steps=3"), ("unknown flag --config.steps",)),
        (("plan", "--config=configs/debug.py", "--rows=-1"), ("--rows: -1 must be at least 0",)),
        (("fields", "nosuchfield"), ("nosuchfield",)),
        (("completion", "tcsh"), ("'tcsh'", "bash")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_commands_say_what_to_do(arguments, parts):
    line = error_of(*arguments)
    for part in parts:
        assert part in line


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(flag):
    result = trainit(flag)
    assert result.returncode == 0
    for name, about in COMMANDS.items():
        assert re.search(rf"^  {name} +{about}$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_its_own_and_quick(name):
    """No other library's flags, and none of the imports that take seconds."""
    program = (
        "import sys; from trainit.__main__ import main\n"
        f"try: main(['{name}', '--help'])\n"
        f"except SystemExit as e: assert not e.code\n"
        f"assert not [m for m in {SLOW} if m in sys.modules]"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: trainit {name} ")
    for word in ("absl", "grain", "orbax", "verbosity", "helpfull"):
        assert word not in result.stdout


def test_modules_and_config_files_that_are_no_commands():
    for module, part in (("trainit.train", "trainit train --config=FILE"),):
        assert part in end(start(module=module), 2)
    for file, part in (
        ("debug", "trainit train --config="),
        ("pile_gpt", "trainit train --config="),
        ("bench_optimizers", "trainit sweep "),
    ):
        path = ROOT / f"configs/{file}.py"
        result = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.returncode == 2
        assert result.stderr == f"trainit: error: {path} is no program. Use it by: {part}{path}\n"


def loaded(tmp_path, *flags: str, body: str = ""):
    """The config that a file and flags describe."""
    file = tmp_path / "own.py"
    lines = ["from trainit import optimizers", "from trainit.config import choose, defaults"]
    lines += ["def get_config(arg=''):", "    config = defaults()"]
    lines += ["    config.optimizer = optimizers.choices()['adamw']()", *([f"    {body}"] * bool(body))]
    lines += [f"    open({str(tmp_path / 'runs')!r}, 'a').write('.')"]
    file.write_text(
        "\n".join([*lines, "    return choose(config, arg, optimizer=optimizers.choices())"]) + "\n"
    )
    parser = command_line.train_parser("trainit train")
    return command_line.load_config(parser.parse([f"--config={file}", *flags]))


def test_overrides_set_fields_of_every_type(tmp_path):
    config = loaded(
        tmp_path,
        *("--config.steps=0x10", "--config.z_loss", "1e-4", "--config.mesh.fsdp", "-1"),
        *("--config.model.head_bias", "--noconfig.model.use_bias", "--config.model.scan_layers=false"),
        *("--config.schedule.warmup=10%", "--config.schedule.constant=20"),
        *("--config.checkpoint.save_steps=4,6", "--config.optimizer.learning_rate=1"),
        *("--config.parameter_groups=head/.* beta1=0.5", "--config.parameter_groups=('.* eps=1e-6',)"),
    )
    assert (config.steps, config.z_loss, config.mesh.fsdp) == (16, 1e-4, -1)
    assert (config.model.head_bias, config.model.use_bias, config.model.scan_layers) == (True, False, False)
    assert (config.schedule.warmup, config.schedule.constant) == ("10%", 20)
    assert config.checkpoint.save_steps == (4, 6)
    assert config.parameter_groups == ("head/.* beta1=0.5", ".* eps=1e-6")
    assert type(config.optimizer.learning_rate) is float
    assert (tmp_path / "runs").read_text() == "."  # the file ran once


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.steps=1.5", "config.steps='1.5' must be a whole number"),
        ("--config.clip_norm=much", "config.clip_norm='much' must be a number"),
        ("--config.model.qk_norm=maybe", "config.model.qk_norm='maybe' must be True or False"),
        ("--config.parameter_groups=('a", r"config.parameter_groups=\"\('a\" must be a tuple"),
        ("--config.steps", "--config.steps needs a value: a whole number"),
        ("--config.optimizer.beta_1=0.9", r"unknown field config.optimizer.beta_1; did you mean .*beta1\?"),
        ("--config.schedule=cosine", "--config=FILE:schedule=CHOICE"),
        ("--config.steps.x=1", "unknown field config.steps.x; config.steps has no fields"),
    ],
)
def test_overrides_name_field_and_type(flag, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, flag)


SET = {
    "config.checkpoint.save_step = 10": "save_step; did you mean config.checkpoint.save_steps?",
    "config.weight_decay = 0.3": "config.weight_decay; did you mean config.optimizer.weight_decay?",
    "config.model.dropout = 0.1": "config.model.dropout; did you mean config.model.",
}


@pytest.mark.parametrize("body", SET)
@pytest.mark.parametrize("command", ["train", "doctor", "plan", "benchmark", "sweep"])
def test_a_field_that_a_file_sets_and_nothing_declares(command, body, tmp_path, capsys):
    """Every command that reads a config file names it, and the field that was meant."""
    with pytest.raises(ConfigError):
        loaded(tmp_path, body=body)
    given = [f"--config={tmp_path}/own.py"]
    if command == "sweep":
        (tmp_path / "sweep.py").write_text(f"def get_sweep(arg): return {{'config': '{tmp_path}/own.py'}}")
        given = [f"{tmp_path}/sweep.py", "--dry_run"]
    if command in ("train", "doctor"):
        given += ["--workdir", str(tmp_path / "run"), "--config.dataset.path=demo"]
    if command == "train":
        output = end(Fork(*given), 2)
    elif command == "benchmark":  # it begins its process again, with other settings
        output = end(start(*given, command=command), 2, 120)
    else:
        assert main([command, *given]) == 2
        output = capsys.readouterr().err
    assert SET[body] in " ".join(output.split())


def test_fields_are_listed_with_default_bounds_and_meaning(capsys):
    assert main(["fields"]) == 0
    listed = capsys.readouterr().out
    for name, value, known in walk(defaults()):
        assert f"{name} = {value!r}\n    {known.help[:60]}" in listed
    assert main(["fields", "config.model.attn_dropout"]) == 0
    expected = "model.attn_dropout = 0.0\n    dropout of attention weights (in [0, 1))\n"
    assert capsys.readouterr().out == expected
    assert main(["fields", "optimizer=muon"]) == 0
    assert "optimizer.ns_steps = 5    with :optimizer=muon\n" in capsys.readouterr().out


def test_a_page_of_all_fields(capsys):
    """The reference page has every field; the command also lists those of each group's choices."""
    page = (ROOT / "docs/reference/fields.md").read_text()
    for name, value, known in walk(defaults()):
        if not name.startswith("optimizer."):
            assert f"\n| `{name}` | `{value!r}` | {known.help}" in page
    assert "\n| `steps` | `50000` | optimizer steps of the whole run *(in (0, 2147483648))* |\n" in page
    assert main(["fields", "="]) == 0
    listed = capsys.readouterr().out
    assert "model.dim = 1600    with :model=gpt2_xl\n" in listed
    assert "with :schedule=cosine\n" in listed
    assert main(["fields", "optimizer=sam"]) == 0
    assert "with :optimizer=sam+NAME\n" in capsys.readouterr().out


TYPED = {
    "trainit ": [
        "train",
        "prepare",
        "compare",
        "sweep",
        "generate",
        "export",
        "import",
        "evaluate",
        "verify",
        "replay",
        "plan",
        "benchmark",
        "doctor",
        "init",
        "fields",
        "completion",
    ],
    "trainit d": ["doctor"],
    "trainit train --work": ["--workdir="],
    "trainit compare --ta": ["--target="],
    "trainit train --config=configs/pil": ["configs/pile_gpt.py"],
    "trainit train --config=configs/debug.py:schedule=co": ["constant", "cosine"],
    "trainit train --config=configs/debug.py:model=modern,optimizer=muo": ["muon", "muon_og"],
    "trainit doctor --config.checkpoint.load": [
        "--config.checkpoint.load_path=",
        "--config.checkpoint.load_step=",
    ],
    "trainit train --config.optimizer.sam.": [
        "--config.optimizer.sam.rho=",
        "--config.optimizer.sam.adaptive=",
    ],
    "trainit sweep configs/be": ["configs/bench_optimizers.py"],
}


def test_bash_completes():
    """What a user has typed, split into words as bash does it, and what bash offers then."""
    script = trainit("completion", "bash").stdout
    for line, expected in TYPED.items():
        words = re.findall(r"[=:]|[^ =:]+", line) + [""] * line.endswith(" ")
        array = " ".join(f"'{word}'" for word in words)
        program = (
            f"{script}\nCOMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({array}) "
            f"COMP_CWORD={len(words) - 1}\n_trainit; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
        assert result.stdout.split() == expected, line
        assert result.stderr == ""


def test_bash_completes_on_a_terminal():
    """A real shell, in which the tabulator is pressed."""
    script = trainit("completion", "bash").stdout
    parent, child = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=child, stdout=child, stderr=child, cwd=ROOT
    )
    os.close(child)
    os.write(parent, f"eval {shlex.quote(script)}\n".encode())
    os.write(parent, b"trainit() { printf '<%s>' \"$@\"; }\n")
    os.write(parent, b"trainit tra\t--config=configs/deb\t:mod\tmoder\t --config.model.num_bl\t3; exit\n")
    output = b""
    try:
        while chunk := os.read(parent, 1 << 16):
            output += chunk
    except OSError:  # the terminal is closed
        pass
    shell.wait(timeout=30)
    expected = "<train><--config=configs/debug.py:model=modern><--config.model.num_blocks=3>"
    assert expected in output.decode().replace("\r\n", "\n")


def test_fish_and_zsh_scripts_hold_all_names():
    for shell in ("zsh", "fish"):
        script = trainit("completion", shell).stdout
        for name, _, _ in walk(defaults()):
            assert f"--config.{name}" in script
        assert all(name in script for name in COMMANDS)
