"""GPUs for which a step can be compiled, and what XLA has to know of them."""

from dataclasses import replace
from typing import NamedTuple

from trainit.cluster.hardware import Accelerator, find_accelerator
from trainit.config import require

# Bytes in JAX's part of the memory that XLA does not assign: workspaces of cuBLAS and cuDNN, what it takes to
# try kernels out, gaps between arrays. Assumed, as `outside` is; no card has confirmed them yet.
WORKSPACES = 2**29


class Target(NamedTuple):
    """A kind of GPU, as its vendor describes it."""

    kind: str  # the driver's name
    capability: tuple[int, int]  # CUDA's compute capability
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each of them
    shared: int  # KiB of shared memory of each of them
    cache: int  # MiB of the second level
    clock: float  # GHz at best
    bandwidth: float  # bytes a second of its memory
    memory: float  # bytes
    host: float  # bytes a second between it and the host, in one direction: PCIe 4 or 5, 16 lanes

    @property
    def accelerator(self) -> Accelerator:
        """Its peak and its links."""
        found = find_accelerator(self.kind)
        assert found is not None
        return replace(found, memory=self.memory)

    def part(self, devices: int) -> float:
        """The bytes that JAX takes of each of this many: `xla_flags`."""
        return self.memory * (0.9 if devices <= self.accelerator.node else 0.85)

    def room(self, devices: int) -> float:
        """The bytes that XLA may assign on each of this many."""
        return min(self.part(devices), self.memory - outside(devices)) - WORKSPACES

    @property
    def text(self) -> str:
        """The text of XLA's GpuTargetConfigProto. cuDNN and CUDA are those of jax[cuda12] 0.10.2."""
        major, minor = self.capability
        info = {
            **{"threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048},
            **{"registers_per_block_limit": 65536, "registers_per_core_limit": 65536},
            **{"block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535},
            # A block has 48 KiB by itself, and all but 1 KiB of a multiprocessor's if it asks for them.
            **{"shared_memory_per_block": 48 << 10, "shared_memory_per_core": self.shared << 10},
            "shared_memory_per_block_optin": (self.shared - 1) << 10,
            **{"core_count": self.cores, "fpus_per_core": self.lanes, "clock_rate_ghz": self.clock},
            **{"l2_cache_size": self.cache << 20, "memory_bandwidth": int(self.bandwidth)},
            "device_memory_size": int(self.memory),
        }
        fields = " ".join(f"{name}: {value}" for name, value in info.items())
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 28 } '
            f'runtime_version {{ major: 12 minor: 9 patch: 1 }} device_description_str: "{self.kind}"'
        )


# From NVIDIA's data sheets of A100, H100 (SXM), H200 and HGX B200, the white papers on Ampere and Hopper, and
# the table of compute capabilities in the CUDA C++ programming guide. Multiprocessors, clock and cache of the
# B200 are in none of these; they are those of OpenXLA's description of it.
TARGETS = {
    "A100-40": Target("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 164, 40, 1.41, 1555e9, 40e9, 32e9),
    "A100-80": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 40, 1.41, 2039e9, 80e9, 32e9),
    "H100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 50, 1.98, 3350e9, 80e9, 64e9),
    "H200": Target("NVIDIA H200", (9, 0), 132, 128, 228, 50, 1.98, 4800e9, 141e9, 64e9),
    "B200": Target("NVIDIA B200", (10, 0), 148, 128, 228, 126, 1.965, 8000e9, 180e9, 64e9),
}


def outside(devices: int) -> float:
    """The bytes outside of JAX's part of the memory: CUDA's context and code, and NCCL's buffers. Assumed."""
    return (1.0 if devices == 1 else 2.0) * 2**30


def hosts_of(devices: int, target: Target) -> int:
    """The machines that this many GPUs fill; ConfigError if they fill the last one only in part."""
    node = target.accelerator.node
    require(
        devices <= node or devices % node == 0,
        f"--devices={devices}: machines have {node} GPUs; take at most {node}, or a multiple",
    )
    return -(-devices // node)
