"""What is known of GPUs and TPUs, in one table, and which GPUs this job has, found without JAX."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainit.cluster.place import Place

DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")  # NVIDIA's driver has a folder in it for each GPU


@dataclass(frozen=True)
class Accelerator:
    """A kind of GPU or TPU, and its links in the vendor's machines; 0 and "" where nothing is known."""

    name: str  # words that occur in the name that the driver or JAX gives the device
    teraflops: float = 0.0  # dense bfloat16 (V100, T4: float16) without sparsity, 1e12 operations a second
    family: str = ""  # for which cluster/xla_flags.py has rows
    node: int = 0  # GPUs that share a machine
    inside: float = 0.0  # bytes a second of a GPU in one direction within its machine
    across: float = 0.0  # bytes a second of a GPU in one direction between machines
    memory: float = 0.0  # bytes

    @property
    def flops(self) -> float:
        """Floating-point operations a second at best."""
        return 1e12 * self.teraflops


# Teraflops are from the vendors' data sheets. Links are those of NVIDIA's DGX A100, H100, H200 and B200: half
# of NVLink's rate, which counts both directions, and one network card for each GPU, of 200 Gb/s (HDR) or
# 400 Gb/s (NDR). The A100 is the one with the larger memory. The first name that a device's kind contains as
# whole words counts: longer ones come first.
ACCELERATORS = (
    Accelerator("GB300", family="Blackwell"),
    Accelerator("GB200", 2500.0, "Blackwell"),
    Accelerator("B300", family="Blackwell"),
    Accelerator("B200", 2250.0, "Blackwell", 8, 900e9, 50e9, 180e9),
    Accelerator("GH200", family="Hopper"),
    Accelerator("H200", 989.4, "Hopper", 8, 450e9, 50e9, 141e9),
    Accelerator("H100 PCIe", 756.0, "Hopper"),
    Accelerator("H100 NVL", 835.0, "Hopper"),
    Accelerator("H100", 989.4, "Hopper", 8, 450e9, 50e9, 80e9),
    Accelerator("H800", family="Hopper"),
    Accelerator("H20", family="Hopper"),
    Accelerator("A100", 312.0, "Ampere", 8, 300e9, 25e9, 80e9),
    Accelerator("A800", 312.0),
    Accelerator("A40", 149.7),
    Accelerator("L40S", 362.0),
    Accelerator("L4", 121.0),
    Accelerator("A10", 125.0),
    Accelerator("RTX 4090", 165.2),
    Accelerator("RTX 3090", 71.0),
    Accelerator("V100", 125.0),
    Accelerator("T4", 65.0),
    Accelerator("TPU v6", 918.0),
    Accelerator("TPU v5p", 459.0),
    Accelerator("TPU v5", 197.0),
    Accelerator("TPU v4", 275.0),
)


def find_accelerator(kind: str) -> Accelerator | None:
    """The row of a device, by the name that the driver or JAX gives it; None if there is none."""
    return next((row for row in ACCELERATORS if re.search(rf"\b{row.name}\b", kind)), None)


def peak_flops(kind: str) -> float | None:
    """Floating-point operations a second of one device at best; None if that is not known."""
    row = find_accelerator(kind)
    return row.flops or None if row else None


@dataclass(frozen=True)
class JobDevices:
    """The devices of a job, as far as settings depend on them."""

    kind: str = ""  # the driver's name of its GPUs; empty: the job runs on CPUs
    gpus: int = 0  # of the whole job
    hosts: int = 1

    @property
    def family(self) -> str:
        """ "CPU", a family of ACCELERATORS, or "other"."""
        row = find_accelerator(self.kind)
        return ((row and row.family) or "other") if self.kind else "CPU"

    @property
    def scale(self) -> str:
        """ "GPU" for a single one, "host" for several of one host, "hosts" for several hosts."""
        return "GPU" if self.gpus < 2 else "host" if self.hosts == 1 else "hosts"

    def __str__(self) -> str:
        hosts = f", {self.hosts} hosts" * (self.hosts > 1)
        return f"{self.gpus} × {self.kind} ({self.family}){hosts}" if self.kind else "CPU"


def detect(
    platform: str, environment: Mapping[str, str], processes: int, hosts: int, folder: Path = DRIVER_FOLDER
) -> JobDevices:
    """The devices of this job, found without JAX; other hosts are taken to be like this one."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if platform == "cpu" or (visible is not None and visible.strip() in ("", "-1", "NoDevFiles")):
        return JobDevices()
    files = [path.read_text() for path in sorted(folder.glob("*/information"))]
    lines = [line.partition(":") for text in files for line in text.splitlines()]
    names = [value.strip() for name, _, value in lines if name == "Model"]
    # The driver lists all GPUs of the machine. If they differ, some may be other jobs'; nvidia-smi, which may
    # take seconds, leaves those out.
    if len(set(names)) != 1:
        names = list(ask_nvidia_smi(environment).values())
    if not names:
        return JobDevices()
    count = min(len(names), len(visible.split(","))) if visible else len(names)
    kind = names[0] if len(set(names)) == 1 else "several kinds"
    return JobDevices(kind, max(count, processes), hosts)


def ask_nvidia_smi(environment: Mapping[str, str]) -> dict[str, str]:
    """{unique name: kind} of the GPUs that this job may use, whatever CUDA_VISIBLE_DEVICES says."""
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False, env=environment)
    lines = [line.partition(",") for line in answer.stdout.splitlines() if line.startswith("GPU-")]
    return {uuid.strip(): name.strip() for uuid, _, name in lines}


def visible_gpus(environment: Mapping[str, str], place: Place) -> list[str]:
    """Worldwide unique names of the NVIDIA GPUs that this process will use, in no particular order."""
    # Processes compare names, not indices: in containers and control groups each may have its own GPU 0.
    installed = list(ask_nvidia_smi(environment))
    visible = installed
    if "CUDA_VISIBLE_DEVICES" in environment:
        visible = []
        for word in environment["CUDA_VISIBLE_DEVICES"].split(","):
            named = [uuid for uuid in installed if word and uuid.startswith(word)]
            visible += installed[int(word) : int(word) + 1] if word.isdigit() else named
    if place.local_device_ids is not None:
        visible = [visible[i] for i in place.local_device_ids if i < len(visible)]
    return visible
