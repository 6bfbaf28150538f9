"""The content of compressed files, piece by piece, in bounded memory."""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

CHUNK = 1 << 18  # bytes of content
COMPRESSED = 1 << 14  # bytes decompressed at once: even these can become half a GB


class DamagedError(Exception):
    """A file cannot be read any further. The message is the reason."""


def chunks(path: Path, file: BinaryIO, skip: int) -> Iterator[bytes]:
    """Yields the decompressed content of a file after its first `skip` bytes."""
    if path.suffix == ".zst":
        content = _decompress_zst(file)
    elif path.suffix == ".gz":
        content = _decompress_gz(file)
    else:
        file.seek(skip)
        skip, content = 0, iter(lambda: file.read(CHUNK), b"")
    for chunk in content:
        if skip >= len(chunk):
            skip -= len(chunk)
        else:
            yield chunk[skip:]
            skip = 0


def _decompress_zst(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses frame by frame, since the library's own stream reader takes a torn frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    try:
        while data := file.read(COMPRESSED):
            while data:
                frame = frame or decompressor.decompressobj()
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DamagedError(f"damaged zstd frame ({error})") from None
    if frame:
        raise DamagedError("truncated zstd frame")


def _decompress_gz(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses member by member. What comes before damage, such as bytes after the end, is kept."""
    member, padding = None, b""
    while data := file.read(COMPRESSED):
        while data := data if member else data.lstrip(padding):
            member = member or zlib.decompressobj(zlib.MAX_WBITS | 16)
            before = member.copy()
            try:
                chunk = member.decompress(data)
            except zlib.error as error:
                yield from _up_to_damage(before, data)
                raise DamagedError(f"damaged gzip file ({error})") from None
            if chunk:
                yield chunk
            data = member.unused_data if member.eof else b""
            member, padding = None if member.eof else member, b"\0"  # zeros may follow a member
    if member:
        raise DamagedError("truncated gzip file")


def _up_to_damage(member: Any, data: bytes) -> Iterator[bytes]:
    """Yields what comes out of damaged data before the first byte that is refused."""
    with contextlib.suppress(zlib.error):
        for i in range(len(data)):
            yield member.decompress(data[i : i + 1])
