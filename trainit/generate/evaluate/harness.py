"""A model of Trainit in EleutherAI's lm-evaluation-harness (package lm-eval), on this machine's devices."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from trainit.config import ConfigError
from trainit.generate.decoder import Decoder
from trainit.generate.evaluate.loaded import LoadedModel
from trainit.generate.sampling import Sampling
from trainit.generate.texts import encode, write
from trainit.train import tasks

TEXTS = 16  # written at once


class HarnessModel(LM):
    """What the harness asks of a model. Requests are batched by length, and split over the devices."""

    def __init__(self, model: LoadedModel):
        super().__init__()
        self._params, self._tokenizer = model.params, model.tokenizer
        self._answers = tasks.Answers(model.config, model.shape, model.steps, model.tokenizer)
        self._longest = model.config.model.context_length
        self._model = model

    def loglikelihood(self, requests: Sequence[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Of (context, continuation): the log-likelihood, and whether it is what greedy decoding gives."""
        return self._answers.score(self._params, self._answers.requests([r.args for r in requests]))

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_: Any) -> list[float]:
        """Of (text,): the log-likelihood of all of it, in windows of the model's context."""
        windows = [
            self._windows(ids.tolist()) for ids in self._tokenizer.encode([r.args[0] for r in requests])
        ]
        scores = iter(self._answers.score(self._params, [window for of in windows for window in of]))
        return [sum(next(scores)[0] for _ in of) for of in windows]

    def _windows(self, ids: list[int]) -> list[tasks.Request]:
        """Each id is scored once. The last window has as many ids before it as fit."""
        found, begin = [], 0
        while begin < len(ids):
            end = min(begin + self._longest, len(ids))
            context = ids[max(end - self._longest - 1, 0) : begin] if begin else [self._tokenizer.end_of_text]
            found.append((context, ids[begin:end]))
            begin = end
        return found

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:
        """Of (context, settings): the text that follows, up to one of settings["until"].

        Requests with the same settings are written TEXTS at a time, those of one length together.
        """
        alike: dict[tuple, list[tuple[int, np.ndarray]]] = {}
        for index, (context, settings) in enumerate(request.args for request in requests):
            length = min(int(settings.get("max_gen_toks", 256)), self._longest // 2)
            until = settings.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            heat = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
            # Of a context that does not fit, the beginning is left out.
            ids = encode(self._tokenizer, context)[-(self._longest - length) :]
            alike.setdefault((length, stops, Sampling(temperature=heat)), []).append((index, ids))

        texts = [""] * len(requests)
        for (length, stops, sampling), rows in alike.items():
            rows.sort(key=lambda row: len(row[1]))
            for begin in range(0, len(rows), TEXTS):
                some = rows[begin : begin + TEXTS]
                prompts = [(ids, 0) for _, ids in some]
                written = write(self._decoder, self._tokenizer, prompts, length, stops, sampling)
                for row, text in zip(some, written, strict=True):
                    texts[row[0]] = text.text
        return texts

    @functools.cached_property
    def _decoder(self) -> Decoder:
        m = self._model
        ends = m.tokenizer.end_of_text, m.tokenizer.vocab_size
        decoder = Decoder(m.config, m.shape.device_mesh, m.config.precision, *ends)
        decoder.take(m.params)
        return decoder


@functools.cache
def _manager(folder: str) -> TaskManager:
    return TaskManager(include_path=folder or None)


def run(model: LoadedModel, names: str, folder: str, limit: int | None) -> tuple[dict, str]:
    """Runs tasks of the harness by name, of its own or of YAML files in a folder: results, and a table.

    Raises ConfigError if a task is unknown or its data are not there.
    """
    manager = _manager(folder)
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks={names}: lm-eval has no task {unknown[0]!r}; --include_path names a folder"
        )
    try:
        results = lm_eval.simple_evaluate(
            HarnessModel(model), tasks=wanted, task_manager=manager, limit=limit, log_samples=False
        )
    except (OSError, ValueError, KeyError) as error:  # such as data that are not on this machine
        raise ConfigError(f"--tasks={names}: {type(error).__name__}: {error}") from None
    assert results is not None
    return json.loads(json.dumps(results["results"], default=str)), make_table(results)
