"""XLA's flags and environment variables for the job's devices, set before JAX starts.

One table, in which each row has its condition and its source. What the user has set wins, and
TRAINIT_SETTINGS=off leaves all of them out.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from trainit.cluster.hardware import JobDevices
from trainit.cluster.place import SetupError

JAX_TIPS = "JAX, GPU performance tips"
TOOLBOX = "NVIDIA JAX-Toolbox, GPU performance"
OPENXLA = "OpenXLA, optimization level O1"
MAXTEXT = "MaxText, a3/llama_2_7b"
TWO = "openxla/xla pull requests 17749, 19026; as compiled"
COMPILING = "measured: making the state compiles in a third of the time, steps take as long"
MEASURED = "measured: the step of GPT-2 124M takes a fifth less memory, and no more time"


@dataclass(frozen=True)
class Setting:
    """A flag or a variable, its value, and the devices on which it is set."""

    name: str  # a flag of XLA, with its dashes; anything else is an environment variable
    value: str
    source: str
    families: tuple[str, ...]
    scales: tuple[str, ...] = ("GPU", "host", "hosts")  # one GPU, several of one host, of several hosts
    instead: tuple[str, ...] = ()  # other variables that decide the same thing
    training: bool = False  # good for the training step alone

    def holds(self, devices: JobDevices) -> bool:
        """Whether it is set for a job with these devices."""
        return devices.family in self.families and devices.scale in self.scales


CPU, LARGE = ("CPU",), ("Ampere", "Hopper", "Blackwell")
ALL, OLDER = (*LARGE, "other"), ("Ampere", "Hopper", "other")
HOST, HOSTS, SEVERAL = ("host",), ("hosts",), ("host", "hosts")
MIB = 1 << 20
FRACTION = "XLA_CLIENT_MEM_FRACTION"
FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
SETTINGS = (
    # Another order of computations, in which few run at once, and fewer copies.
    Setting("--xla_cpu_enable_concurrency_optimized_scheduler", "false", MEASURED, CPU, training=True),
    Setting("--xla_cpu_copy_insertion_use_region_analysis", "true", MEASURED, CPU),
    # LLVM's level. The third makes programs no faster here, since a library computes the large products.
    Setting("--xla_backend_optimization_level", "2", COMPILING, CPU),
    # Exchanges run while something is computed. In a loop over layers they run one pass ahead: the kernels of
    # the next layer are gathered while one layer is computed. All are XLA_FLAGS, since jaxlib 0.11.2 does not
    # accept the pipelined ones as options of a single program.
    Setting("--xla_gpu_enable_latency_hiding_scheduler", "true", f"{JAX_TIPS}; {TOOLBOX}", ALL, SEVERAL),
    Setting("--xla_gpu_enable_pipelined_all_gather", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    Setting("--xla_gpu_enable_pipelined_reduce_scatter", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    Setting("--xla_gpu_enable_pipelined_all_reduce", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    Setting("--xla_gpu_enable_while_loop_double_buffering", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    # Two exchanges at once if no two devices are in both, such as a sum inside a host and one between hosts:
    # on 64 H100s, the predicted step of 7B takes 6 % less. On GB200, 4 of them took a quarter more time.
    Setting("--xla_gpu_experimental_parallel_collective_overlap_limit", "2", TWO, ("Hopper",), HOSTS),
    # Small exchanges are joined, up to this many bytes.
    Setting("--xla_gpu_all_gather_combine_threshold_bytes", f"{128 * MIB}", MAXTEXT, LARGE, SEVERAL),
    Setting("--xla_gpu_reduce_scatter_combine_threshold_bytes", f"{64 * MIB}", MAXTEXT, LARGE, HOST),
    Setting("--xla_gpu_reduce_scatter_combine_threshold_bytes", f"{128 * MIB}", MAXTEXT, LARGE, HOSTS),
    Setting("--xla_gpu_all_reduce_combine_threshold_bytes", f"{128 * MIB}", MAXTEXT, LARGE, HOST),
    Setting("--xla_gpu_all_reduce_combine_threshold_bytes", f"{1024 * MIB}", MAXTEXT, LARGE, HOSTS),
    # CUDA graphs. With exchanges inside of them, steps were slower by a third, and jobs hung.
    Setting("--xla_gpu_enable_command_buffer", "-collectives", "openxla/xla issue 35360", OLDER, SEVERAL),
    Setting("--xla_gpu_enable_command_buffer", "FUSION,CUSTOM_CALL", TOOLBOX, ("Blackwell",)),
    # With one queue, exchanges start in XLA's order. Blackwell is slower with it.
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", TOOLBOX, ("Hopper",), SEVERAL),
    # The part of a GPU's memory that JAX takes, by default three quarters. NCCL needs some of the rest, and
    # more of it between hosts.
    Setting(FRACTION, "0.9", TOOLBOX, LARGE, ("GPU", "host"), FRACTIONS),
    Setting(FRACTION, "0.85", MAXTEXT, LARGE, HOSTS, FRACTIONS),
)


def apply(devices: JobDevices, environment: MutableMapping[str, str], trains: bool = True) -> str:
    """Sets what these devices need and the user has not set, before JAX starts; returns text for the log."""
    switch = environment.get("TRAINIT_SETTINGS", "")
    if switch not in ("", "off"):
        raise SetupError(f"TRAINIT_SETTINGS={switch!r} must be 'off', or not set")
    if switch == "off":
        return f"{devices}: none, since TRAINIT_SETTINGS=off"
    # What the user has set: variables, and flags in XLA_FLAGS, which may also name a file of flags.
    own = environment.get("XLA_FLAGS", "").strip()
    if own and not own.startswith("-") and Path(own).is_file():
        own = Path(own).read_text().strip()
    users = {word.partition("=")[0] for word in own.split()} | set(environment)
    # The others are ours. The user's flags stay last, since XLA takes the last of two values.
    settings = [row for row in SETTINGS if row.holds(devices) and (trains or not row.training)]
    kept = [setting for setting in settings if users & {setting.name, *setting.instead}]
    ours = [setting for setting in settings if setting not in kept]
    flags = [f"{setting.name}={setting.value}" for setting in ours if setting.name.startswith("--")]
    variables = {setting.name: setting.value for setting in ours if not setting.name.startswith("--")}
    if flags:
        environment["XLA_FLAGS"] = " ".join([*flags, own])
    environment.update(variables)
    text = " ".join([*flags, *(f"{name}={value}" for name, value in variables.items())])
    left = "; left as they were set: " + ", ".join(setting.name for setting in kept) if kept else ""
    return f"{devices}: {text or 'none'}{left}"
