"""XLA's flags and environment variables for the devices at hand, to be set before JAX starts.

One table, in which each row has its condition and its source. What the user has set wins, and
TRAINIT_SETTINGS=off leaves all of them out.
"""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

JAX_TIPS = "JAX, GPU performance tips"
TOOLBOX = "NVIDIA JAX-Toolbox, GPU performance"
OPENXLA = "OpenXLA, optimization level O1"
MAXTEXT = "MaxText, a3/llama_2_7b"
MEASURED = "measured: the step of GPT-2 124M takes a fifth less memory, and no more time"
# The GPUs of each family, by a word in the name that the driver gives them.
FAMILIES = {
    "Ampere": {"A100"},
    "Hopper": {"H100", "H200", "H800", "H20", "GH200"},
    "Blackwell": {"B200", "B300", "GB200", "GB300"},
}
INFORMATION = Path("/proc/driver/nvidia/gpus")  # the driver's: a folder for each GPU


class SettingsError(ValueError):
    """TRAINIT_SETTINGS says what is not known. The message is one line and says what to do."""


# Of glibc. Large arrays of the host are in huge pages, with which GPT-2's step takes 3 to 8 % less time on
# CPUs (measured, at width 384); when they are freed they go back to the system: 60 to 80 MB less memory.
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 8 << 20, "trim_threshold": 32 << 20}.items()
)


def tune_process():
    """Collects garbage rarely, and begins this process anew, as the same one, for glibc to read TUNABLES.

    To be called first of all, with all that comes before it done twice.
    """
    collect_garbage_rarely()
    chosen = {"GLIBC_TUNABLES", "TRAINIT_SETTINGS"} & set(os.environ)
    if sys.platform == "linux" and not chosen:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def collect_garbage_rarely():
    """Python's collector runs after 100,000 new objects, not 700, and looks at old ones hardly ever.

    What is imported and traced is some million objects that stay. By default it walks all of them again and
    again while there come more: a tenth of the seconds in which a small run starts (measured).
    """
    gc.set_threshold(100_000, 50, 100)


@dataclass(frozen=True)
class Here:
    """The devices of a job, as far as rows ask for them."""

    kind: str = ""  # what the driver calls its GPUs; empty: it runs on CPUs
    gpus: int = 0  # in all
    hosts: int = 1

    @property
    def family(self) -> str:
        """ "CPU", one of FAMILIES, or "other"."""
        words = set(self.kind.replace("-", " ").split())
        known = [family for family, names in FAMILIES.items() if words & names]
        return (known or ["other"])[0] if self.kind else "CPU"

    @property
    def scale(self) -> str:
        return "GPU" if self.gpus < 2 else "host" if self.hosts == 1 else "hosts"

    def __str__(self) -> str:
        hosts = f", {self.hosts} hosts" * (self.hosts > 1)
        return f"{self.gpus} × {self.kind} ({self.family}){hosts}" if self.kind else "CPU"


@dataclass(frozen=True)
class Row:
    """A setting, and where it holds."""

    name: str  # a flag of XLA, with its dashes; anything else is an environment variable
    value: str
    source: str
    families: tuple[str, ...]
    scales: tuple[str, ...] = ("GPU", "host", "hosts")  # one GPU, several of one host, of several hosts
    instead: tuple[str, ...] = ()  # other variables that decide the same thing

    def holds(self, here: Here) -> bool:
        return here.family in self.families and here.scale in self.scales


CPU, LARGE = ("CPU",), ("Ampere", "Hopper", "Blackwell")
ALL = (*LARGE, "other")
HOST, HOSTS, SEVERAL = ("host",), ("hosts",), ("host", "hosts")
MIB = 1 << 20
FRACTION = "XLA_CLIENT_MEM_FRACTION"
FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
TABLE = (
    # Another order of computations, and fewer copies.
    Row("--xla_cpu_enable_concurrency_optimized_scheduler", "false", MEASURED, CPU),
    Row("--xla_cpu_copy_insertion_use_region_analysis", "true", MEASURED, CPU),
    # LLVM's. The third level makes no faster programs here: the large products are a library's.
    Row(
        "--xla_backend_optimization_level",
        "2",
        "measured: making the state compiles in a third of the time, steps take as long",
        CPU,
    ),
    # Exchanges run beside computation, those of a loop over layers one pass ahead: the next layer's kernels
    # are gathered while one is computed. As XLA_FLAGS, since as options of a program jaxlib 0.11.2 does not
    # know the pipelined ones.
    Row("--xla_gpu_enable_latency_hiding_scheduler", "true", f"{JAX_TIPS}; {TOOLBOX}", ALL, SEVERAL),
    Row("--xla_gpu_enable_pipelined_all_gather", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    Row("--xla_gpu_enable_pipelined_reduce_scatter", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    Row("--xla_gpu_enable_pipelined_all_reduce", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    Row("--xla_gpu_enable_while_loop_double_buffering", "true", f"{OPENXLA}; {TOOLBOX}", ALL, SEVERAL),
    # Small exchanges are joined, up to so many bytes.
    Row("--xla_gpu_all_gather_combine_threshold_bytes", f"{128 * MIB}", MAXTEXT, LARGE, SEVERAL),
    Row("--xla_gpu_reduce_scatter_combine_threshold_bytes", f"{64 * MIB}", MAXTEXT, LARGE, HOST),
    Row("--xla_gpu_reduce_scatter_combine_threshold_bytes", f"{128 * MIB}", MAXTEXT, LARGE, HOSTS),
    Row("--xla_gpu_all_reduce_combine_threshold_bytes", f"{128 * MIB}", MAXTEXT, LARGE, HOST),
    Row("--xla_gpu_all_reduce_combine_threshold_bytes", f"{1024 * MIB}", MAXTEXT, LARGE, HOSTS),
    # CUDA graphs; with exchanges in them, steps were slower by a third, and jobs hung.
    Row(
        *("--xla_gpu_enable_command_buffer", "-collectives", "openxla/xla issue 35360"),
        *(("Ampere", "Hopper", "other"), SEVERAL),
    ),
    Row("--xla_gpu_enable_command_buffer", "FUSION,CUSTOM_CALL", TOOLBOX, ("Blackwell",)),
    # One queue: exchanges start in XLA's order. Blackwell is slower with it.
    Row("CUDA_DEVICE_MAX_CONNECTIONS", "1", TOOLBOX, ("Hopper",), SEVERAL),
    # Of a GPU's memory; without it, three quarters. NCCL needs some of the rest, more of it between hosts.
    Row(FRACTION, "0.9", TOOLBOX, LARGE, ("GPU", "host"), FRACTIONS),
    Row(FRACTION, "0.85", MAXTEXT, LARGE, HOSTS, FRACTIONS),
)


def ask_nvidia_smi(environment: Mapping[str, str]) -> dict[str, str]:
    """Kinds by unique name of the NVIDIA GPUs let through to here, whatever CUDA_VISIBLE_DEVICES says."""
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    answer = subprocess.run(
        query, capture_output=True, text=True, timeout=60, check=False, env=dict(environment)
    )
    lines = [line.partition(",") for line in answer.stdout.splitlines() if line.startswith("GPU-")]
    return {uuid.strip(): name.strip() for uuid, _, name in lines}


def find(
    platform: str, environment: Mapping[str, str], processes: int, hosts: int, folder: Path = INFORMATION
) -> Here:
    """The devices of this job, without JAX, taking other hosts for this one's like.

    Args:
        platform: the config's; with "cpu", GPUs are passed over.
        environment: of this process.
        processes: of the job.
        hosts: of the job.
        folder: the driver's information, which is there at once; nvidia-smi may take seconds.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if platform == "cpu" or (visible is not None and visible.strip() in ("", "-1", "NoDevFiles")):
        return Here()
    files = [path.read_text() for path in sorted(folder.glob("*/information"))]
    lines = [line.partition(":") for text in files for line in text.splitlines()]
    names = [value.strip() for name, _, value in lines if name == "Model"]
    if len(set(names)) != 1:  # not told, or several kinds, of which some may be others' jobs'
        names = list(ask_nvidia_smi(environment).values())
    if not names:
        return Here()
    count = min(len(names), len(visible.split(","))) if visible else len(names)
    kinds = sorted(set(names))
    return Here(kinds[0] if len(kinds) == 1 else "several kinds", max(count, processes), hosts)


def apply(here: Here, environment: MutableMapping[str, str]) -> str:
    """Sets what holds here and the user has not set. To be called before JAX touches a device.

    Returns:
        What was set and what was left to the user, for the log.

    Raises:
        SettingsError: TRAINIT_SETTINGS is neither "off" nor empty.
    """
    switch = environment.get("TRAINIT_SETTINGS", "")
    if switch not in ("", "off"):
        raise SettingsError(f"TRAINIT_SETTINGS={switch!r} must be 'off', or not set")
    if switch == "off":
        return f"{here}: none, since TRAINIT_SETTINGS=off"
    own = environment.get("XLA_FLAGS", "").strip()
    if own and not own.startswith("-") and Path(own).is_file():  # XLA takes a file of flags, too
        own = Path(own).read_text().strip()
    theirs = {word.partition("=")[0] for word in own.split()} | set(environment)
    rows = [row for row in TABLE if row.holds(here)]
    kept = [row for row in rows if theirs & {row.name, *row.instead}]
    ours = [row for row in rows if row not in kept]
    flags = [f"{row.name}={row.value}" for row in ours if row.name.startswith("--")]
    variables = {row.name: row.value for row in ours if not row.name.startswith("--")}
    if flags:
        environment["XLA_FLAGS"] = " ".join([*flags, own])  # of two values, XLA takes the last
    environment.update(variables)
    text = " ".join([*flags, *(f"{name}={value}" for name, value in variables.items())])
    left = "; left as they were set: " + ", ".join(row.name for row in kept) if kept else ""
    return f"{here}: {text or 'none'}{left}"
