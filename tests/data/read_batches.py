"""One process of a job that reads batches and writes down its rows: see test_loader.

python -m tests.data.read_batches DATASET OUTPUT COORDINATOR PROCESSES PROCESS [kill]
"""

import multiprocessing
import os
import signal
from pathlib import Path

from absl import app

SEED, ROWS, LENGTH, BATCHES = 5, 24, 32, 4
FIRST_ROW = 2 * ROWS


def main(argv):
    import numpy as np

    from trainit.cluster import devices
    from trainit.cluster.place import Place
    from trainit.cluster.process import exit_process
    from trainit.data import loader
    from trainit.data.dataset import open_dataset
    from trainit.data.rows.order import Ordered, Shuffled
    from trainit.parallel.layout import batch_sharding
    from trainit.parallel.mesh import make_mesh

    folder, output, coordinator, processes, process, *kill = argv[1:]
    processes = int(processes)
    cache = Path(os.environ["TRAINIT_CACHE"])
    place = Place("test", coordinator, processes, int(process))
    devices.configure("cpu", 12 // processes, cache)
    devices.initialize("cpu", place, place.coordinator)
    mesh = make_mesh({"data": 3, "fsdp": 4, "tensor": 1, "context": 1})
    split = open_dataset(Path(folder)).splits["train"]
    order = Shuffled(split.sequences(LENGTH), SEED)
    layout = batch_sharding(mesh)
    for workers in (2,) if kill else (0, 1, 2):
        count = 1 << 20 if kill else BATCHES
        batches = loader.batches(Ordered(split, order), (1, ROWS, LENGTH), layout, FIRST_ROW, count, workers)
        parts, rows = [], []
        for batch in batches:
            shards = sorted(batch["tokens"].addressable_shards, key=lambda s: s.index[1].start or 0)
            parts.append(np.concatenate([np.asarray(shard.data)[0] for shard in shards]))
            rows = np.concatenate([np.arange(ROWS)[shard.index[1]] for shard in shards])
            if kill and len(parts) == 5:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        np.savez(Path(output) / f"{workers}-{process}.npz", tokens=np.stack(parts), rows=rows)
    exit_process(0, together=True)


if __name__ == "__main__":
    app.run(main)
