"""How a model answers questions: by the likelihood of each choice, given the question."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from trainit.config import Config, length_multiple, require
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.tokenizers import Tokenizer
from trainit.train.step import CompiledSteps
from trainit.train.tasks.questions import Task

SHORTEST = 64  # tokens of a row: rows of similar length share a compiled program
Request = tuple[list[int], list[int]]  # the ids of a context, and those that continue it


@dataclass
class Answers:
    """Scores texts with the parameters of a run. All processes of a job call the same methods together."""

    config: Config
    shape: RunShape
    steps: CompiledSteps
    tokenizer: Tokenizer
    stop_reason: Callable[[], str] = str  # why to stop here; empty: nothing asks for it

    def __call__(self, params: dict, task: Task) -> dict[str, float]:
        """The metrics of a task: "accuracy", "accuracy_norm" (by characters) and "stderr" of the first.

        A question is answered by its likeliest choice: by the sum of its tokens' log-likelihoods, or, in
        "accuracy_norm", by that sum divided by the choice's length in characters. A choice that is alone
        counts if each of its tokens is the most likely one, and there is no "accuracy_norm" then. Empty if
        the job is asked to stop meanwhile.
        """
        pairs = [(question.context, choice) for question in task.questions for choice in question.choices]
        scores, right, right_norm = iter(found := self.score(params, self.requests(pairs))), [], []
        if not found:
            return {}
        for question in task.questions:
            results = [next(scores) for _ in question.choices]
            sums = np.array([total for total, _ in results])
            lengths = np.array([len(choice) for choice in question.choices])
            alone = len(results) == 1
            right.append(results[0][1] if alone else int(sums.argmax()) == question.answer)
            right_norm += [] if alone else [int((sums / lengths).argmax()) == question.answer]
        accuracy, count = float(np.mean(right)), len(right)
        metrics = {"accuracy": accuracy}
        if right_norm:
            metrics["accuracy_norm"] = float(np.mean(right_norm))
        return metrics | {"stderr": math.sqrt(accuracy * (1 - accuracy) / max(count - 1, 1))}

    def requests(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """The ids of contexts and continuations, cut as they are in the ids of both together.

        Spaces at the end of a context belong to what follows. Without a context, an end of text is one.
        """
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + text) for context, text in pairs]
        whole = self.tokenizer.encode([context + text for context, text in moved])
        contexts = self.tokenizer.encode([context for context, _ in moved])
        result = []
        for (context, _), ids, begin in zip(moved, whole, contexts, strict=True):
            size = len(begin) if context else 0
            result.append((ids[:size].tolist() or [self.tokenizer.end_of_text], ids[size:].tolist()))
        return result

    def score(self, params: dict, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each continuation, and whether each of its tokens is the likeliest.

        What does not fit the model's context loses its beginning. Raises ConfigError if a continuation alone
        does not fit. Empty if the job is asked to stop meanwhile.
        """
        longest, rows = self.config.model.context_length, self.shape.batch_at(0).rows
        by_length: dict[int, list[int]] = {}
        for number, (context, text) in enumerate(requests):
            require(
                0 < len(text) <= longest,
                f"a text to score has {len(text)} tokens; from 1 to model.context_length={longest} can be",
            )
            needed = min(len(context) + len(text) - 1, longest)
            length = min(max(SHORTEST, 1 << (needed - 1).bit_length()), longest)
            length += -length % length_multiple(self.shape.sizes)
            by_length.setdefault(length, []).append(number)
        results: dict[int, tuple[float, bool]] = {}
        for length, numbers in sorted(by_length.items()):
            for begin in range(0, len(numbers), rows):
                if self.stop_reason():
                    return []
                chosen = numbers[begin : begin + rows]
                found = self._batch(params, [requests[number] for number in chosen], rows, length)
                results |= dict(zip(chosen, found, strict=True))
        return [results[number] for number in range(len(requests))]

    def _batch(self, params: dict, requests: list[Request], rows: int, length: int) -> list:
        """The scores of as many requests as there are rows at most. A row's targets are its own subset."""
        tokens = np.zeros((1, rows, length + 1), np.uint32)
        lengths, subsets = np.zeros((1, rows), np.int32), np.zeros((1, rows, length), np.uint16)
        for row, (context, text) in enumerate(requests):
            ids = (context + text)[-(length + 1) :]
            tokens[0, row, : len(ids)] = ids
            lengths[0, row] = len(ids) - 1
            subsets[0, row, len(ids) - 1 - len(text) : len(ids) - 1] = row + 1
        layout = batch_sharding(self.shape.device_mesh)
        arrays: dict[str, np.ndarray] = {"tokens": tokens, "lengths": lengths, "subsets": subsets}
        batch = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, layout, x.__getitem__), arrays)
        no_bytes = np.zeros(self.config.model.vocab_size, np.int32)
        sums = jax.device_get(self.steps.evaluate(params, batch, no_bytes, rows + 1))
        loss, correct, count = (sums[name][1 : len(requests) + 1] for name in ("loss", "correct", "count"))
        return [(-float(loss[i]), bool(correct[i] == count[i])) for i in range(len(requests))]
