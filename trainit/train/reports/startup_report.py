"""The report at the start of a run: everything that was chosen for it, one line for each topic."""

import socket
from pathlib import Path

import jax
from absl import logging

from trainit import optimizers, tokenizers
from trainit.cluster import sync
from trainit.cluster.logs import quantity
from trainit.config import MESH_AXES, Config
from trainit.data.training_data import TrainingData
from trainit.parallel.mesh import RunShape, describe_devices
from trainit.train import diagnostics
from trainit.train.evaluate import MAX_SUBSETS
from trainit.train.reports import metrics
from trainit.train.step import CompiledSteps


def report(config: Config, steps: CompiledSteps, shape: RunShape, data: TrainingData, workdir: Path):
    """Logs the report. All processes call it together, since it says on which hosts they run."""
    c, validation, facts = config, data.validation, metrics.facts(config.model, steps.abstract_state, shape)
    for topic, text in {
        "run": workdir,
        "devices": f"{facts['devices']}, processes: {jax.process_count()}, {facts['versions']}",
        "mesh": " × ".join(f"{axis} {shape.sizes[axis]}" for axis in MESH_AXES),
        "model": f"{quantity(facts['parameters'])} parameters, {c.model.num_blocks} layers of width "
        f"{c.model.dim}, attention {shape.attention}, precision "
        + ", ".join([c.precision, *(f"{part} {own}" for part, own in c.precision_of.items() if own)]),
        "dataset": f"{data.source}: {data.describe()} to train, {quantity(validation.tokens)} to validate",
        "tokenizer": tokenizers.describe(data.tokenizer),
        "warning": tokenizers.losses.describe(data.tokenizer),
        "batch": _batch(shape),
        "optimizer": f"{c.optimizer.name}, learning rate {c.optimizer.learning_rate:g}, "
        f"schedule {c.schedule.name}, state {c.optimizer_state}",
        "trackers": ", ".join(c.trackers),
        "statistics": diagnostics.describe(c.diagnostics, steps.abstract_state.diagnostics),
    }.items():
        if text:
            logging.info("%-10s %s", topic, text)
    if c.parameter_groups:
        params = steps.abstract_state.params
        for own, paths in optimizers.assigned(c.optimizer, c.parameter_groups, params)[1].values():
            rates = f"learning rate {own.learning_rate:g}, weight decay {own.weight_decay:g}"
            logging.info("%-10s %s, %s: %s", "group", own.name, rates, ", ".join(paths) or "nothing")
    if len(validation.subsets) > MAX_SUBSETS:
        logging.info("%-10s %d are too many to validate one by one", "subsets", len(validation.subsets))
    if jax.process_count() > 1:
        for process, host in enumerate(sync.gather_text(socket.gethostname())):
            logging.info("process %-3d%s: %s", process, host, describe_devices(shape.device_mesh, process))


def _batch(shape: RunShape) -> str:
    """How many sequences a step has, and how devices share them; likewise for each later batch size."""
    texts = []
    for start, size in zip(shape.batch_sizes.starts, shape.batch_sizes.sizes, strict=True):
        micro_steps, rows, length = shape.batch_of(size)
        share = rows // shape.shares
        text = f"{size} sequences of {length} tokens; {micro_steps} × {share} on a device"
        texts.append(text if start == 0 else f"from step {start} on {size}: {micro_steps} × {share}")
    return f"{'; '.join(texts)}, logits of {shape.logits_chunk} at once"
