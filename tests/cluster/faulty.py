"""What the processes of a job under faults have in addition: a page of memory that the tests share with each.

Through it, tests learn where a process is, slow its disk down, and set its clock back. A module of `Fork`'s.
"""

import ctypes
import mmap
import os
import struct
import time
from pathlib import Path

from trainit.train.evaluate import Validation
from trainit.train.loop import Job

# A file system that takes its time: libc's functions, for Python and for the libraries that write arrays.
SLOW_DISK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
static volatile int *page;
void use_page(volatile int *shared) { page = shared; }
static void be_slow(int fd) {
    struct stat about;
    if (page && page[0] > 0 && !fstat(fd, &about) && S_ISREG(about.st_mode)) usleep(page[0] * 1000);
}
#define SLOW(type, name, parameters, arguments) \\
    type name parameters { \\
        static type (*real) parameters; \\
        if (!real) real = dlsym(RTLD_NEXT, #name); \\
        be_slow(fd); \\
        return real arguments; \\
    }
SLOW(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
SLOW(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
SLOW(ssize_t, pwrite64, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
SLOW(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
SLOW(int, fsync, (int fd), (fd))
SLOW(int, fdatasync, (int fd), (fd))
"""
FIELDS = ("write_milliseconds", "clock_back_seconds", "validating", "leaving")


class Page:
    """The shared page of one process, from both sides: an integer for each of FIELDS."""

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def get(self, name: str) -> int:
        return struct.unpack_from("i", self.memory, 4 * FIELDS.index(name))[0]

    def set(self, name: str, value: int):
        struct.pack_into("i", self.memory, 4 * FIELDS.index(name), value)


def begin():
    """Called in each process, before it does anything."""
    page = Page(Path(os.environ["FAULTS_PAGE"]))
    if library := os.environ["FAULTS_LIBRARY"]:
        ctypes.CDLL(library).use_page(ctypes.byref(ctypes.c_int.from_buffer(page.memory)))

    def shifted(clock, unit):
        return lambda: clock() - unit * page.get("clock_back_seconds")

    time.time, time.time_ns = shifted(time.time, 1), shifted(time.time_ns, 10**9)
    validate, validate_and_save, report_end = Validation.__call__, Job.validate_and_save, Job.report_end

    def marked(validation, *args):
        page.set("validating", 1)
        try:
            return validate(validation, *args)
        finally:
            page.set("validating", 0)

    def stopping(job, *args):
        reason = validate_and_save(job, *args)
        page.set("leaving", int(bool(reason)))  # what is left to do is to wait for the save, and to exit
        return reason

    def leaving(job, *args):
        page.set("leaving", 1)
        report_end(job, *args)

    Validation.__call__, Job.validate_and_save, Job.report_end = marked, stopping, leaving
