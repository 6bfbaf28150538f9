"""Validation by subset, against a direct computation in float64 from the model's logits."""

import jax
import numpy as np
import pytest
import tiny

from trainit import config as config_lib
from trainit.cluster.monitor import JobMonitor
from trainit.data.dataset import open_dataset
from trainit.data.training_data import PreparedData
from trainit.model.gpt import GPT
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import evaluate, step
from trainit.train.evaluate import Validation
from trainit.train.reports.startup_timer import StartupTimer


@pytest.mark.evidence("validation by subset against a float64 computation from the logits")
@pytest.mark.parametrize("sequences, fsdp, context", [(0, 2, 1), (13, 1, 2)])
def test_metrics_of_each_subset(sequences, fsdp, context, subset_dataset):
    dataset = open_dataset(subset_dataset)
    config = tiny.get_config()
    config.eval.sequences = sequences
    config = config_lib.resolve(config, dataset.vocab_size)
    shape = shape_on(config, make_mesh({"data": 2, "fsdp": fsdp, "tensor": 2, "context": context}))
    steps = step.build(config, shape)
    params, length = steps.init().params, config.model.context_length
    monitor = JobMonitor(0, 1, lambda code: None, 40.0)
    data = PreparedData(config, dataset)
    result = Validation(config, data, shape, steps, monitor, StartupTimer())(0, params)

    tokens, of = [], []
    for shard in dataset.info["splits"]["validation"]["shards"]:
        path = subset_dataset / shard["file"]
        starts = np.fromfile(path.with_suffix(".documents"), "<u8").astype(int)
        tokens.append(np.fromfile(path, "<u2"))
        of.append(
            np.repeat(
                np.fromfile(path.with_suffix(".subsets"), "<u2"),
                np.diff([*starts, len(tokens[-1])]),
            )
        )
    tokens, of = np.concatenate(tokens), np.concatenate(of)
    available = -(-(len(tokens) - 1) // length)
    chosen = [i * available // sequences for i in range(sequences)] if sequences else range(available)
    model, host = GPT(config.model), jax.device_get(params)
    forward = jax.jit(model)
    nats, bytes_, counts = np.zeros(3), np.zeros(3), np.zeros(3)
    for i in chosen:
        row = tokens[i * length : i * length + length + 1].astype(int)
        inputs = np.zeros(length, np.int32)
        inputs[: len(row) - 1] = row[:-1]
        logits = np.asarray(forward(host, inputs[None])[0, : len(row) - 1], np.float64)
        loss = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row) - 1), row[1:]]
        subsets = of[i * length + 1 : i * length + len(row)]
        np.add.at(nats, subsets, loss)
        np.add.at(counts, subsets, 1)
        np.add.at(bytes_, subsets, row[1:] != 256)  # a byte is a token
    expected = {"valid/loss": nats.sum() / counts.sum()}
    expected["valid/bits_per_byte"] = nats.sum() / np.log(2) / bytes_.sum()
    for k in np.flatnonzero(counts):
        name = dataset.info["subsets"][k]
        expected[f"valid/loss/{name}"] = nats[k] / counts[k]
        expected[f"valid/bits_per_byte/{name}"] = nats[k] / np.log(2) / bytes_[k]
    for kind in ("loss", "bits_per_byte"):
        values = [value for name, value in expected.items() if name.startswith(f"valid/{kind}/")]
        expected[f"valid/{kind}_macro"] = np.mean(values)
    del result["valid/accuracy"]
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=2e-6), name


@pytest.mark.parametrize("others", [("b", "c"), ("unnamed", "c"), ("unnamed", "(unnamed)")])
def test_documents_without_a_subset_keep_their_own_metrics(others):
    """The macro mean is over all subsets, also where one has the name that those without one get."""
    sums = {name: np.array([2.0, 5.0, 11.0, 23.0]) for name in ("loss", "correct")}
    sums |= {name: np.array([1.0, 2.0, 4.0, 8.0]) for name in ("count", "bytes")}
    metrics = evaluate._metrics([sums], ["a", "", *others])
    values = sums["loss"] / sums["count"]
    names = [name.removeprefix("valid/loss/") for name in metrics if name.startswith("valid/loss/")]
    assert [names[0], *names[2:]] == ["a", *others]
    assert names[1].strip("()") == "unnamed"
    assert [metrics[f"valid/loss/{name}"] for name in names] == values.tolist()
    assert metrics["valid/loss_macro"] == values.mean()
    assert metrics["valid/bits_per_byte_macro"] == pytest.approx(values.mean() / np.log(2))
