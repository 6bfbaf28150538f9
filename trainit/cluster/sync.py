"""Small exchanges between the job's processes: a barrier, gathered numbers and texts, the lead's number.

`agree` and the two `gather` are collectives on the devices: all processes must call them in the same order.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from trainit.cluster.process import coordination_client


def is_lead() -> bool:
    """Whether this is process 0, which writes for all: metrics, messages on the terminal, W&B."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float):
    """Waits until all processes have called this; each name can be used once. An error after `seconds`."""
    if jax.process_count() > 1:
        coordination_client().wait_at_barrier(name, timeout_in_ms=int(1000 * seconds))


def agree(number: int) -> int:
    """Process 0's number on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather(number: int) -> list[int]:
    """The numbers of all processes, in their order."""
    return multihost_utils.process_allgather(np.int32(number)).tolist()


def gather_text(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    # Arrays must have the same shape everywhere, so all are padded with zeros to the longest text.
    own = text.encode()
    padded = np.zeros(max(gather(len(own))), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    return [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(padded)]
