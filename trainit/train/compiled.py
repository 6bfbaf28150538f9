"""Jitted functions that are compiled when the run asks for it, and never again unnoticed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from absl import logging

from trainit.cluster import sync
from trainit.cluster.process import release_free_memory

PROGRAMS: dict[str, jax.stages.Compiled] = {}  # the newest of each name, to say what fills the memory
COMPILE_SECONDS = 3600.0  # how much longer the slowest process may take to compile than the fastest


class CompiledFunction:
    """A jitted function, compiled once for each structure, shape and type of its arguments after the first.

    A call with arguments that are laid out differently raises, where a jitted function would silently be
    compiled again. In a job of several processes, none runs the function before all have compiled it: some
    take longer, or do not find it in the cache, and gloo's collectives wait at most 30 s for the others.
    """

    def __init__(self, name: str, function: Callable, out_shardings: Any = None, **options: Any):
        """Takes the options of jax.jit; `static_argnums` is a tuple."""
        self._name, self._static = name, options.get("static_argnums", ())
        self.lower = jax.jit(function, out_shardings=out_shardings, **options).lower
        self._compiled: dict[tuple, Future] = {}
        self._compiled_by_all: set[tuple] = set()

    def compile_ahead(self, *args):
        """Starts to compile for such arguments (or shapes with shardings) in another thread, unless done."""
        key = _key(args)
        if key not in self._compiled:
            thread = ThreadPoolExecutor(1, f"compile-{self._name}")
            self._compiled[key] = thread.submit(self._compile, args)
            thread.shutdown(wait=False)  # the thread ends once that is done

    def compiled(self, *args) -> jax.stages.Compiled:
        """The compiled function for such arguments, once all processes have it."""
        self.compile_ahead(*args)
        key = _key(args)
        function = self._compiled[key].result()
        if key not in self._compiled_by_all:
            self._compiled_by_all.add(key)
            sync.barrier(f"compiled {self._name} {len(self._compiled_by_all)}", COMPILE_SECONDS)
        return function

    def __call__(self, *args):
        return self.compiled(*args)(*(arg for index, arg in enumerate(args) if index not in self._static))

    def _compile(self, args: tuple) -> jax.stages.Compiled:
        begun, _events.seen = time.monotonic(), set()
        PROGRAMS[self._name] = compiled = self.lower(*args).compile()

        # A start that takes minutes should say why: was the function in the cache?
        seconds, folder = time.monotonic() - begun, jax.config.values["jax_compilation_cache_dir"]
        how = "compiled, without a cache"
        if "/jax/compilation_cache/cache_hits" in _events.seen:
            how = f"from the cache {folder}"
        elif folder and "/jax/compilation_cache/compile_requests_use_cache" in _events.seen:
            how = f"compiled, was not in the cache {folder}"
        logging.info("%-10s %s: %.1f s, %s", "program", self._name, seconds, how)
        release_free_memory()  # the compiler leaves some hundred MB that are free but not returned
        return compiled


def _key(args: tuple) -> tuple:
    """What a compiled function depends on. The first argument is left out: it is alike in all calls."""
    leaves, tree = jax.tree.flatten(args[1:])
    return tree, *((leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf for leaf in leaves)


_events = threading.local()  # `seen`: the names of the events that JAX has reported in this thread


@jax.monitoring.register_event_listener
def _listen(event: str, **_: str | int):
    if hasattr(_events, "seen"):
        _events.seen.add(event)
