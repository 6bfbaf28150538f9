"""Programs: jitted functions that are compiled when they are told to, and never again unnoticed."""

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from absl import logging

from trainit.cluster import sync
from trainit.cluster.process import release_free_memory

COMPILE_SECONDS = 3600.0  # by which the slowest process may be later at compiling than the fastest


class CompiledFunction:
    """A jitted function, compiled once for each tree, shape and type of what is behind its first argument.

    What it is called with must be laid out as what it was compiled for: else it raises, where a jitted
    function would be compiled again. Of several processes, none runs it before all have compiled it: some are
    slower, or do not find it in the cache, and gloo's collectives wait 30 s for them at most.
    """

    def __init__(self, name: str, jitted: Callable, static: tuple[int, ...] = ()):
        """
        Args:
            name: for messages.
            jitted: what jax.jit has made of it.
            static: numbers of its static arguments.
        """
        self._name, self._static = name, static
        self.lower = jitted.lower
        self._compiled: dict[tuple, Future] = {}
        self._met: set[tuple] = set()  # what all processes have compiled

    def compile_ahead(self, *args):
        """Begins to compile it in another thread, unless it has been. The arguments may be abstract."""
        key = _key(args)
        if key not in self._compiled:
            thread = ThreadPoolExecutor(1, f"compile-{self._name}")
            self._compiled[key] = thread.submit(self._compile, args)
            thread.shutdown(wait=False)  # it ends when that is done

    def compiled(self, *args) -> jax.stages.Compiled:
        """The program for such arguments, when all processes have it; raises what compiling raises."""
        self.compile_ahead(*args)
        key = _key(args)
        program = self._compiled[key].result()
        if key not in self._met:
            self._met.add(key)
            sync.barrier(f"compiled {self._name} {len(self._met)}", COMPILE_SECONDS)
        return program

    def __call__(self, *args):
        program = self.compiled(*args)
        return program(*(arg for number, arg in enumerate(args) if number not in self._static))

    def _compile(self, args: tuple) -> jax.stages.Compiled:
        begun, events = time.monotonic(), _events()
        events.seen = set()
        compiled = self.lower(*args).compile()
        seconds, folder = time.monotonic() - begun, jax.config.jax_compilation_cache_dir
        how = "compiled, without a cache"
        if "/jax/compilation_cache/cache_hits" in events.seen:
            how = f"from the cache {folder}"
        elif folder and "/jax/compilation_cache/compile_requests_use_cache" in events.seen:
            how = f"compiled, was not in the cache {folder}"
        logging.info("%-10s %s: %.1f s, %s", "program", self._name, seconds, how)
        release_free_memory()  # a compiler leaves some hundred MB behind
        return compiled


def _key(args: tuple) -> tuple:
    leaves, tree = jax.tree.flatten(args[1:])
    return tree, *((leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf for leaf in leaves)


@functools.cache
def _events() -> threading.local:
    """Where a thread that has set `seen` to a set finds what JAX has told of its compiling."""
    events = threading.local()

    def listen(name: str, **_):
        if hasattr(events, "seen"):
            events.seen.add(name)

    jax.monitoring.register_event_listener(listen)
    return events
