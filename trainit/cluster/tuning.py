"""What this process does to its memory before anything else: glibc's settings, and when garbage is collected.

Nothing that takes time is imported here: a program that is tuned begins a second time.
"""

import gc
import os
import sys

# Settings of glibc's malloc, which it reads only when a process starts. Large arrays of the host are put in
# huge pages and are given back to the system when they are freed. Without them, a step of GPT-2 at width
# 384 takes 3 to 8 % longer on a CPU, and a process keeps 60 to 80 MB more (both measured). Without the last,
# threads that compile leave some 25 MB more in pieces of the eight arenas that each core has by default.
ARENAS = max(2, os.cpu_count() or 1)
TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8388608:glibc.malloc.trim_threshold=33554432:"
    f"glibc.malloc.arena_max={ARENAS}"
)


def tune_process():
    """Restarts the program in this same process, so that glibc reads TUNABLES, and collects no garbage.

    Call it first of all, since what ran before runs twice, and `collect_garbage_rarely` after the imports,
    which leave none. Nothing is restarted if the user has set GLIBC_TUNABLES or TRAINIT_SETTINGS. May go when
    a running process can switch huge pages on, e.g. by `mallopt`.
    """
    gc.disable()
    chosen = {"GLIBC_TUNABLES", "TRAINIT_SETTINGS"} & set(os.environ)
    if sys.platform == "linux" and not chosen:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # What data workers leave in shared memory is removed at the end: nobody needs the warning about it.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")


def collect_garbage_rarely():
    """Makes Python's collector run after 100,000 new objects instead of 700, and hardly ever over old ones.

    Imports and tracing make some million objects that stay alive. By default the collector walks over all
    of them again and again meanwhile: a tenth of the time that a small run needs to start (measured).
    """
    gc.enable()
    gc.set_threshold(100_000, 50, 100)
