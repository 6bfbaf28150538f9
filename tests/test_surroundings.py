"""What a process finds around it: home folder, odd paths, file systems without locks, readers that leave."""

import errno
import fcntl
import json
import logging as std_logging
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import FAST, ROOT, on_a_terminal

from trainit.__main__ import main as trainit_command
from trainit.cluster import logs
from trainit.config import ConfigError, command_line
from trainit.data.dataset import open_dataset

BAR = """
import time
from trainit.cluster import logs
from trainit.cluster import process
from trainit.train.reports import trackers

process.outlive_readers()
logs.log_to_terminal(True)
progress = trackers.Progress(0, 4000)
for n in range(1, {steps} + 1):
    time.sleep(0.05)
    values = {{"throughput/tokens_per_second": 1234.0 * n, "throughput/mfu": 0.412}}
    progress.show(n, {{"train/loss": 4.0 / n}} | values)
process.exit_process({code})
"""


def test_eighty_columns_show_the_time_left():
    code, screen = on_a_terminal(BAR.format(steps=20, code=0), 80)
    line = re.findall(r"[^\r\n]*step 20/4000[^\r\n]*", screen)[-1]
    assert code == 0
    assert re.search(r"\[00:0\d < 0\d:\d\d\].*loss 0\.200", line), line
    assert len(line.removesuffix("\x1b[A")) <= 80


def test_the_prompt_gets_a_line_of_its_own():
    """A process that ends before its first step, as after Ctrl-C, has a bar on the screen."""
    code, screen = on_a_terminal(BAR.format(steps=0, code=75), 80)
    assert code == 75
    assert "step 0/4000" in screen
    assert screen.endswith("\n")


def test_a_terminal_that_is_closed_ends_nothing():
    code, _ = on_a_terminal(BAR.format(steps=20, code=42), 80, close_at=b"step 2/")
    assert code == 42


@pytest.mark.evidence(
    "nobody reads the output any more (a closed pipe): the run goes to its end, as does its log"
)
def test_a_pipe_that_is_closed_ends_nothing(tmp_path, random_dataset):
    reading, writing = os.pipe()
    flags = [
        f"--config={ROOT}/tests/tiny.py",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={tmp_path}",
    ]
    flags += ["--config.steps=3", "--config.cpu_devices=1"]
    flags += [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")]
    environment = {**os.environ, "XLA_FLAGS": FAST}
    command = [sys.executable, "-m", "trainit", "train", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=writing, stderr=writing, env=environment)
    os.close(writing)
    os.close(reading)
    assert process.wait(120) == 0
    assert "done       all 3 steps" in (tmp_path / "logs" / "process_0.log").read_text()


def test_streams_that_are_closed_from_the_start(tmp_path):
    """As some daemons start their jobs; files that are opened later do not take the streams' numbers."""
    code = f"""
import sys
from trainit.cluster import process
process.outlive_readers()
with open({str(tmp_path / "file")!r}, "w") as file:
    print("out", flush=True)
    print("err", file=sys.stderr, flush=True)
    file.write(str(file.fileno() > 2))
"""
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "True"


def test_a_log_that_has_no_room_is_no_traceback(tmp_path, monkeypatch, capfd):
    """A line that a full disk does not take is missing there, and nothing else happens."""
    monkeypatch.setattr(std_logging.getLogger(), "handlers", [])
    monkeypatch.setattr(std_logging, "raiseExceptions", True)
    (tmp_path / "log").symlink_to("/dev/full")
    logs.log_to_file(tmp_path / "log")
    std_logging.getLogger().warning("some line")
    assert capfd.readouterr() == ("", "")


def test_a_list_that_nobody_reads_to_its_end():
    """As `trainit fields | head -1`: no traceback, nothing said."""
    command = f"{sys.executable} -m trainit fields | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout
    assert not done.stderr


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user's folder with texts in it. The working folder is another one."""
    folder, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
    for name in ("[2026] a", "v"):
        lines = [json.dumps({"text": f"some words of {name}, number {i}"}) + "\n" for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    return folder


def test_a_tilde_is_the_users_folder_and_brackets_are_themselves(home):
    """In flags, in the command line's fields and in a config file; no folder ~ is made anywhere."""
    inputs = ["--input=~/[2026] a.jsonl", "--validation=~/v.jsonl"]
    assert trainit_command(["prepare", *inputs, "--output=~/data", "--tokenizer=bytes", "--workers=1"]) == 0
    assert open_dataset(home / "data").splits["train"].tokens > 20 * len("some words of [2026] a, number 0")

    file = home / "config.py"
    text = (ROOT / "tests/tiny.py").read_text().replace('dataset("set by the test")', 'dataset("~/data")')
    file.write_text(text.replace("return", 'config.checkpoint.load_path = "~/other"\n    return'))
    given = ["--config=~/config.py", "--workdir=~/runs/a", "--config.dataset.mixture=all: 1; ~/data: 2"]
    arguments = command_line.train_parser("trainit train").parse(
        [*given, "--config.dataset.tokenizer=tokenizers:~/t.json"]
    )
    config = command_line.load_config(arguments)
    assert command_line.workdir(arguments) == home / "runs/a"
    assert config.dataset.path == f"{home}/data"
    assert config.dataset.mixture == f"all: 1; {home}/data: 2"
    assert config.dataset.tokenizer == f"tokenizers:{home}/t.json"
    assert config.checkpoint.load_path == f"{home}/other"
    assert not list(Path.cwd().iterdir())


def test_without_a_home_folder(tmp_path, monkeypatch):
    """Of a user whom the container does not know, either: what needs none works, the rest says what to do."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("TRAINIT_CACHE", str(tmp_path))
    assert command_line.cache() == tmp_path
    monkeypatch.delenv("TRAINIT_CACHE")
    with pytest.raises(ConfigError, match=r"~/.cache/trainit: HOME is not set and user \d+ has no folder"):
        command_line.cache()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EAGAIN])
def test_a_file_system_without_locks_is_no_other_process(number, home, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    flags = ["--input=~/v.jsonl", "--validation_fraction=0.5", "--output=~/data", "--tokenizer=bytes"]
    code, said = trainit_command(["prepare", *flags, "--workers=1"]), capfd.readouterr().err
    if number == errno.EAGAIN:
        assert code == 1
        assert "is being prepared by another process" in said
    else:
        assert code == 0
        assert f"has no file locks ({os.strerror(number)})" in said
        assert "another process" not in said


@pytest.mark.parametrize(
    ("command", "code", "output", "error"),
    [
        ("fields seed >&-", 0, "", ""),  # as daemons are started
        ("nope 2>&-", 2, "", ""),
        ("fields seed > /dev/full", 1, "", "No space left on device"),
        ("fields > /dev/full", 1, "", "No space left on device"),
    ],
)
def test_output_that_cannot_be_written(command, code, output, error):
    command = f"{sys.executable} -m trainit {command}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, output)
    assert (error in done.stderr) and len(done.stderr.splitlines()) == bool(error)


def test_a_terminal_without_all_letters():
    code = "from trainit.cluster import process; process.outlive_readers(); print('3.2 \u00b1 0.1')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment, check=True
    )
    assert done.stdout == b"3.2 \\xb1 0.1\n"
