"""GPUs: how much memory they have, and how fast they multiply.

Names are those of the node label nvidia.com/gpu.product (NVIDIA GPU feature discovery) and, as aliases, those of
cloud.google.com/gke-accelerator. Memory is what nvidia-smi shows, in MiB, which is less than the data sheet's GB.
TFLOP/s are the data sheets' dense 16-bit tensor numbers (bfloat16 where the GPU has it).
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    name: str
    memory_mib: int
    tflops: float
    """Peak of dense 16-bit matrix products, in 10^12 operations per second."""
    bfloat16: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB


ACCELERATORS = (
    Accelerator("Tesla-T4", 15_360, 65, bfloat16=False, aliases=("nvidia-tesla-t4", "T4")),
    Accelerator("Tesla-V100-SXM2-16GB", 16_384, 125, bfloat16=False, aliases=("nvidia-tesla-v100", "V100")),
    Accelerator("Tesla-V100-SXM2-32GB", 32_768, 125, bfloat16=False),
    Accelerator("NVIDIA-A10", 23_028, 125, aliases=("A10",)),
    Accelerator("NVIDIA-A10G", 23_028, 70, aliases=("A10G",)),
    Accelerator("NVIDIA-L4", 23_034, 121, aliases=("L4",)),
    Accelerator("NVIDIA-GeForce-RTX-3090", 24_576, 71, aliases=("RTX-3090",)),
    Accelerator("NVIDIA-GeForce-RTX-4090", 24_564, 165, aliases=("RTX-4090",)),
    Accelerator("NVIDIA-GeForce-RTX-5090", 32_607, 209, aliases=("RTX-5090",)),
    Accelerator("NVIDIA-A40", 46_068, 150, aliases=("A40",)),
    Accelerator("NVIDIA-L40S", 46_068, 362, aliases=("L40S",)),
    Accelerator("NVIDIA-RTX-A6000", 49_140, 155, aliases=("A6000",)),
    Accelerator("NVIDIA-RTX-6000-Ada-Generation", 49_140, 364, aliases=("RTX-6000-Ada",)),
    Accelerator("NVIDIA-A100-PCIE-40GB", 40_960, 312),
    Accelerator("NVIDIA-A100-SXM4-40GB", 40_960, 312, aliases=("nvidia-tesla-a100", "A100-40GB")),
    Accelerator("NVIDIA-A100-80GB-PCIe", 81_920, 312),
    Accelerator("NVIDIA-A100-SXM4-80GB", 81_920, 312, aliases=("nvidia-a100-80gb", "A100-80GB", "A100")),
    Accelerator("NVIDIA-H100-PCIe", 81_559, 756),
    Accelerator(
        "NVIDIA-H100-80GB-HBM3", 81_559, 989, aliases=("nvidia-h100-80gb", "nvidia-h100-mega-80gb", "H100")
    ),
    Accelerator("NVIDIA-H100-NVL", 95_830, 835),
    Accelerator("NVIDIA-H200", 143_771, 989, aliases=("nvidia-h200-141gb", "H200")),
    Accelerator("NVIDIA-B200", 183_359, 2_250, aliases=("B200",)),
)


def find(name: str | None) -> Accelerator | None:
    """The GPU of this name or alias, in any case; None where the table does not have it."""
    wanted = (name or "").lower().replace(" ", "-")
    for accelerator in ACCELERATORS:
        if wanted in (accelerator.name.lower(), *(alias.lower() for alias in accelerator.aliases)):
            return accelerator
    return None
