"""Texts for prompts, by a run's model and tokenizer."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from trainit.checkpoints.finished_run import open_model
from trainit.config import require
from trainit.generate import texts
from trainit.generate.decoder import Decoder
from trainit.generate.parameters import mesh_for
from trainit.generate.sampling import Sampling

STEPS_SHOWN = 8  # tokens between two looks at them where somebody reads along


class Writer:
    """Continues prompts as the flags of the command say."""

    def __init__(self, arguments: argparse.Namespace, source: str, cache: Path):
        """Opens the run. Raises ConfigError if it has no such checkpoint or no tokenizer."""
        self._flags, self._run = arguments, open_model(source, arguments.step)
        tokenizer = self._run.tokenizer(arguments.tokenizer, cache)
        require(tokenizer is not None, "--tokenizer=none: a text needs a tokenizer; name the run's")
        assert tokenizer is not None
        self._tokenizer, self._context = tokenizer, self._run.config.model.context_length
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        self._sampling = Sampling(**{name: getattr(arguments, name) for name in names})

    @functools.cached_property
    def _decoder(self) -> Decoder:
        devices, run, tokenizer = jax.devices(), self._run, self._tokenizer
        on_cpu = devices[0].platform == "cpu"
        precision = self._flags.precision or ("float32" if on_cpu else run.config.precision)
        mesh = mesh_for(run.config.model, devices)
        decoder = Decoder(run.config, mesh, precision, tokenizer.end_of_text, tokenizer.vocab_size)
        sizes = ", ".join(f"{axis} {size}" for axis, size in decoder.mesh.shape.items() if size > 1)
        where = f"{len(devices)} × {devices[0].device_kind}" + f" ({sizes})" * bool(sizes)
        logging.info("%-10s %s, %s, on %s", "model", run.name, precision, where)
        return decoder.restore(run)

    def encode(self, prompt: str) -> np.ndarray:
        """The ids of a prompt; errors as of `texts.encode_with_room`."""
        return texts.encode_with_room(self._tokenizer, prompt, self._context)

    def write(
        self, rows: Sequence[tuple[np.ndarray, int]], show: Callable[[str], None] | None = None
    ) -> list[texts.Text]:
        """The texts of rows, as `texts.write` has them."""
        f, steps = self._flags, STEPS_SHOWN if show else texts.STEPS
        chosen = f.length, f.stop, self._sampling, f.seed, steps
        return texts.write(self._decoder, self._tokenizer, rows, *chosen, show)

    def explain(self, text: texts.Text) -> None:
        """Says why a text ends, where its reader may wonder."""
        if text.ended == "context":
            logging.info("%-10s after the model's context of %d tokens", "ended", self._context)
