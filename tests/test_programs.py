"""Programs: how often they are compiled, for what, where from, and what goes wrong."""

import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.train.compiled import CompiledFunction

STATE = np.float32(2)  # the first argument of most programs here: what is the same in all calls


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What programs log, each line when it is compiled."""
    lines = []
    monkeypatch.setattr("trainit.train.compiled.logging.info", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def scale():
    """A program x -> state x, with the shapes that it was traced for."""
    traced = []

    def function(state, x):
        traced.append((x.shape, x.dtype.name))
        return state * x

    program = CompiledFunction("scale", function)
    program.traced = traced
    return program


@pytest.mark.evidence("each shape and type is compiled once")
def test_each_shape_and_type_is_compiled_once(scale, told):
    for _ in range(2):
        for x in (np.ones(3, np.float32), np.ones(4, np.float32), np.ones(3, np.int32)):
            np.testing.assert_array_equal(scale(STATE, x), 2 * x)
    assert scale.traced == [((3,), "float32"), ((4,), "float32"), ((3,), "int32")]
    assert len(told) == 3
    assert all(line.startswith("program    scale: ") for line in told)


def test_trees_of_one_key_are_told_apart():
    """Leaves alone do not say what a batch is: {a: x} and {b: x} have the same."""
    program = CompiledFunction("tree", lambda state, x: state * x.get("a", 0) + x.get("b", 0))
    assert program(STATE, {"a": np.float32(3)}) == 6
    assert program(STATE, {"b": np.float32(3)}) == 3


def test_what_is_compiled_ahead_is_what_the_call_takes_up(scale, told):
    """From abstract arguments, in another thread, which the call waits for."""
    threads = []
    lower, go = scale.lower, threading.Event()

    def slow(*args):
        threads.append(threading.current_thread())
        assert go.wait(60)
        return lower(*args)

    scale.lower = slow
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (5,))]
    scale.compile_ahead(*abstract)
    scale.compile_ahead(*abstract)
    assert told == []
    threading.Timer(0.05, go.set).start()
    np.testing.assert_array_equal(scale(STATE, np.arange(5, dtype=np.float32)), 2 * np.arange(5))
    assert len(threads) == len(scale.traced) == len(told) == 1
    assert threads[0] is not threading.current_thread()
    assert threads[0].name.startswith("compile-scale")


def test_another_layout_or_first_argument_raises(scale):
    """Compiled for rows on eight devices, it neither takes columns nor is compiled again for them."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), (None, "data")))
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    state = jax.device_put(STATE, NamedSharding(mesh, PartitionSpec()))
    scale.compile_ahead(state, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows))
    np.testing.assert_array_equal(scale(state, jax.device_put(x, rows)), 2 * x)
    with pytest.raises(ValueError, match="sharding"):
        scale(state, jax.device_put(x, columns))
    with pytest.raises(TypeError, match=r"float32\[2\]"):
        scale(np.ones(2, np.float32), jax.device_put(x, rows))
    assert len(scale.traced) == 1


def test_an_error_of_compiling_is_raised_where_it_is_called():
    def function(state, x):
        raise RuntimeError(f"cannot do {x.shape}")

    program = CompiledFunction("broken", function)
    program.compile_ahead(STATE, np.ones(3, np.float32))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot do \(3,\)"):
            program(STATE, np.ones(3, np.float32))


def test_static_arguments(told):
    """They belong to what is compiled, and are not given to it."""
    program = CompiledFunction("power", lambda state, x, n: state * x**n, static_argnums=(2,))
    x = np.arange(3, dtype=np.float32)
    for n in (2, 3, 2):
        np.testing.assert_array_equal(program(STATE, x, n), 2 * x**n)
    assert len(told) == 2


@pytest.mark.evidence("the log is right about programs that come from the cache")
def test_hits_and_misses_of_the_cache(told, keep_compiled, tmp_path):
    """The same program again, as another start would have it: JAX forgets all but the folder."""
    x = np.ones(7, np.float32)

    def tell(folder: Path | None) -> str:
        jax.clear_caches()
        keep_compiled(folder)
        program = CompiledFunction("cached", lambda state, x: state * jnp.sin(x))
        assert program(STATE, x).shape == (7,)
        return re.fullmatch(r"program    cached: [\d.]+ s, (.*)", told.pop())[1]

    assert tell(tmp_path) == f"compiled, was not in the cache {tmp_path}"
    assert tell(tmp_path) == f"from the cache {tmp_path}"
    assert tell(None) == "compiled, without a cache"
    assert told == []
