"""What a GPU gives: peak arithmetic, memory, links. Dense peaks (no structured sparsity), from the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_longctx.config import ConfigError, did_you_mean

GIB = 1024**3
DEFAULT_GPU = "h100"  # where neither an option nor a recipe's trainer names one


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: how the planner calls it.
        memory_gib: device memory in GiB that a process can use (what the driver reports, not the number on the box).
        bf16_tflops: dense bf16 tensor-core peak, TFLOP/s; the denominator of MFU.
        fp8_tflops: dense fp8 peak, TFLOP/s; None where the hardware has none.
        memory_gb_s: device memory bandwidth, GB/s.
        nvlink_gb_s: one direction of the links within a node, GB/s per GPU.
        network_gb_s: one direction between nodes, GB/s per GPU (one NIC a GPU).
        host_gb_s: one direction to host memory, GB/s per GPU (PCIe 4.0 or 5.0 x16; Grace by NVLink-C2C, shared by two GPUs).
        gpus_per_node: GPUs that share the fast links.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    host_gb_s: float = 64
    gpus_per_node: int = 8


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, DGX B200 and GB200 NVL72. HBM capacity is the decimal number of the
# sheet turned to GiB less about 2 % that the driver and ECC keep. "h100-96gb" is Meta's Grand Teton part (torchtitan
# benchmarks/llama3_h100_202412_torchtitan.md): 96 GB HBM2e, 500 W, its peak lies under the SXM part's and is not published.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",
            memory_gib=79.0,
            bf16_tflops=312,
            fp8_tflops=None,
            memory_gb_s=2039,
            nvlink_gb_s=300,
            network_gb_s=25,
            host_gb_s=32,
        ),
        Gpu(name="h100", memory_gib=79.0, bf16_tflops=989, fp8_tflops=1979, memory_gb_s=3350, nvlink_gb_s=450, network_gb_s=50),
        Gpu(
            name="h100-96gb",
            memory_gib=94.5,
            bf16_tflops=989,
            fp8_tflops=1979,
            memory_gb_s=2400,
            nvlink_gb_s=450,
            network_gb_s=50,
        ),
        Gpu(
            name="h200", memory_gib=139.8, bf16_tflops=989, fp8_tflops=1979, memory_gb_s=4800, nvlink_gb_s=450, network_gb_s=50
        ),
        Gpu(
            name="b200", memory_gib=178.0, bf16_tflops=2250, fp8_tflops=4500, memory_gb_s=8000, nvlink_gb_s=900, network_gb_s=50
        ),
        Gpu(
            name="gb200",
            memory_gib=184.0,
            bf16_tflops=2500,
            fp8_tflops=5000,
            memory_gb_s=8000,
            nvlink_gb_s=900,
            network_gb_s=50,
            host_gb_s=225,
            gpus_per_node=72,
        ),
    )
}


def gpu_by_name(name: str) -> Gpu:
    """The GPU called `name`.

    Raises:
        ConfigError: no such GPU is known.
    """
    if name not in GPUS:
        raise ConfigError("gpu", name, f"not a GPU that the planner knows, {did_you_mean(name, GPUS)}")
    return GPUS[name]
