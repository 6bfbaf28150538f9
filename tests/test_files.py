"""Files that are written whole or not at all."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainit.cluster.files import write_atomically, write_json


def test_text_bytes_and_json(tmp_path):
    write_atomically(tmp_path / "text", "é\n")
    write_atomically(tmp_path / "bytes", b"\0\xff")
    write_json(tmp_path / "value.json", {"a": [1, None]})
    assert (tmp_path / "text").read_text() == "é\n"
    assert (tmp_path / "bytes").read_bytes() == b"\0\xff"
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": [1, None]}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(descriptor: int):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_a_part(tmp_path):
    path, size = tmp_path / "file", 1 << 16
    write_atomically(path, b"0" * size)

    def read(_: int) -> bool:
        content = path.read_bytes()
        return len(content) == size and len(set(content)) == 1

    with ThreadPoolExecutor(4) as threads:
        results = threads.map(read, range(400))
        for number in range(50):
            write_atomically(path, str(number % 10).encode() * size)
        assert all(results)
