"""Texts that a model writes while it is trained."""

import time

from absl import logging

from trainit.config import Config, ConfigError, require
from trainit.generate import texts
from trainit.generate.decoder import Decoder
from trainit.parallel.mesh import RunShape
from trainit.tokenizers import Tokenizer

ROWS, SHOWN = 64, 100  # prompts at once; characters in the log


class Samples:
    """What follows the prompts of `eval.prompts`: always the most likely token."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        """Encodes the prompts. Raises ConfigError if one is no text or fills the context."""
        self._config, self._tokenizer = config, tokenizer
        self._prompts = tuple(config.eval.prompts)
        self._decoder: Decoder | None = None
        try:
            require(all(isinstance(prompt, str) for prompt in self._prompts), "one is no text")
            length = config.model.context_length
            self._ids = [texts.encode_with_room(tokenizer, prompt, length) for prompt in self._prompts]
        except ConfigError as error:
            raise ConfigError(f"eval.prompts={self._prompts!r}: {error}") from None

    def __call__(self, step: int, params: dict, shape: RunShape) -> list[dict]:
        """An object for each prompt, for samples.jsonl. All processes of a job call it together."""
        if not self._prompts:
            return []
        # For the time that it takes, there is a second copy of the parameters, as there is of gradients else.
        begin, c, tokenizer = time.monotonic(), self._config, self._tokenizer
        if self._decoder is None:
            ends = tokenizer.end_of_text, tokenizer.vocab_size
            self._decoder = Decoder(c, shape.device_mesh, c.precision, *ends)
        self._decoder.take(params)
        found = []
        for at in range(0, len(self._ids), ROWS):
            rows = [(ids, 0) for ids in self._ids[at : at + ROWS]]
            found += texts.write(self._decoder, tokenizer, rows, c.eval.length)
        self._decoder.parameters = {}

        # What was written, in short, and in full.
        logging.info("step %d: %d texts, in %.1f s", step, len(found), time.monotonic() - begin)
        for prompt, text in zip(self._prompts, found, strict=True):
            logging.info("text       %s | %s", prompt[-SHOWN:], text.text[:SHOWN].replace("\n", "\\n"))
        pairs = zip(self._prompts, found, strict=True)
        return [{"step": step, "prompt": prompt, **text.facts()} for prompt, text in pairs]
