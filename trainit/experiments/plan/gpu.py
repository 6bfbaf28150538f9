"""Compiles a train step for GPUs that this machine does not have, with the compiler in JAX's CUDA plugin.

XLA takes its flags from the environment once, so each step is compiled in a process of its own:
python -m trainit.experiments.plan.gpu FOLDER answers the request in that folder.
"""

import importlib.util
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainit.cluster import xla_flags
from trainit.cluster.hardware import JobDevices
from trainit.config import Config, ConfigError
from trainit.experiments.plan.targets import TARGETS, hosts_of

PLUGINS = {"xla_cuda12": "jax-cuda12-plugin", "xla_cuda13": "jax-cuda13-plugin"}


@dataclass(frozen=True)
class Program:
    """A train step as it is compiled for GPUs."""

    assigned: int  # bytes of a device that XLA assigns: state, batch, results and everything between
    attention: str  # the kernel
    partitioned: str  # text after the program is split over the devices
    scheduled: str  # text of what runs, in order
    unknown: list[str]  # flags of cluster/xla_flags.py that this compiler does not know


def missing() -> str:
    """Returns why nothing can be compiled for GPUs here; "": it can."""
    for module, package in PLUGINS.items():
        if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.{module}"):
            found, needed = version(package), version("jaxlib")
            return "" if found == needed else f"{package} {found} is not jaxlib's {needed}"
    return "JAX's CUDA plugin is not installed: pip install 'trainit[plan]'"


def compile_for(config: Config, devices: int, name: str, environment: Mapping[str, str]) -> Program:
    """Compiles the step of a config in which nothing is open for this many of these GPUs.

    The environment is the user's, without settings for this machine's own devices. Raises ConfigError if the
    devices fill no machines or cannot do what the config asks for, ChildProcessError if the compiler fails.
    """
    target = TARGETS[name]
    hosts = hosts_of(devices, target)
    settings = {**environment, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    xla_flags.apply(JobDevices(target.kind, devices, hosts), settings)
    unknown: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "request").write_bytes(pickle.dumps((config.to_dict(), devices, hosts, name)))
        command = [sys.executable, "-m", "trainit.experiments.plan.gpu", folder]
        while True:
            process = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
            # It ends at once if it does not know a flag, and names all of those.
            found = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", process.stderr)
            if not found or not (words := set(found[1].split())) & set(settings["XLA_FLAGS"].split()):
                break
            flags = [word for word in settings["XLA_FLAGS"].split() if word not in words]
            settings["XLA_FLAGS"] = " ".join(flags)
            unknown += sorted(words)
        answer = Path(folder) / "answer"
        if not answer.exists():
            lines = [line for line in process.stderr.splitlines() if line.strip()] or ["it says nothing"]
            raise ChildProcessError(
                f"compiling for {name} ended with {process.returncode}: {lines[-1][:300]}"
            )
        result = pickle.loads(answer.read_bytes())
    if isinstance(result, str):
        raise ConfigError(result)
    assigned, attention, partitioned, scheduled = result
    return Program(assigned, attention, partitioned, scheduled, unknown)


def _answer(folder: Path):
    """Compiles what is requested in this folder, and writes the fields of `Program` there, or an error."""
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    from trainit.experiments.plan import hlo

    fields, devices, hosts, name = pickle.loads((folder / "request").read_bytes())
    config = Config(fields)
    # Without a GPU, JAX finds no cuDNN whose version it could ask for, and takes it from nowhere else.
    fused_attention_stablehlo.check_cudnn_version = lambda: 92800
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[name].text, topology=f"1x{hosts}x{devices // hosts}"
    )
    try:
        shape, _, compiled, partitioned = hlo.compile_step(config, topology.devices)
    except ConfigError as error:
        (folder / "answer").write_bytes(pickle.dumps(str(error)))
        return
    memory: Any = compiled.memory_analysis()
    assigned = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assigned += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    result = assigned, shape.attention, partitioned, compiled.as_text()
    (folder / "answer").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
