"""What GPUs can do by their vendors' data sheets, and what a device that is not in the table can do by measurement."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU of a usual server. Rates are dense (no sparsity) and one-way (half of what data sheets add up)."""

    device_names: tuple[str, ...]
    """Parts of the name its driver gives, all of which must be there."""
    bf16: float
    """FLOP/s of bf16 and fp16 matrix products."""
    fp8: float | None
    """FLOP/s of FP8 matrix products, where it has them."""
    fp32: float
    """FLOP/s of fp32 matrix products without TF32, PyTorch's default."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes/s."""
    link: float
    """Bytes/s a GPU sends to the others of its server (NVLink, or PCIe where there is none)."""
    network: float
    """Bytes/s a GPU sends to other servers: one adapter for each GPU of 400 Gbit/s (200 beside A100 and L40S), as usual
    in clusters; not a property of the GPU."""
    per_node: int
    """GPUs of a server."""

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in a `training.precision`."""
        return self.fp32 if precision == "fp32" else self.bf16


# Names that contain each other's parts: the more particular first.
GPUS: dict[str, GPU] = {
    "h200-141g": GPU(("H200",), 989.4e12, 1978.9e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, 8),
    "h100-pcie-80g": GPU(("H100", "PCIe"), 756e12, 1513e12, 51e12, 80e9, 2.0e12, 64e9, 50e9, 8),
    "h100-80g": GPU(("H100",), 989.4e12, 1978.9e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, 8),
    "b200-180g": GPU(("B200",), 2250e12, 4500e12, 75e12, 180e9, 7.7e12, 900e9, 50e9, 8),
    "a100-80g": GPU(("A100", "80GB"), 312e12, None, 19.5e12, 80e9, 2.039e12, 300e9, 25e9, 8),
    "a100-40g": GPU(("A100",), 312e12, None, 19.5e12, 40e9, 1.555e12, 300e9, 25e9, 8),
    "l40s-48g": GPU(("L40S",), 362e12, 733e12, 91.6e12, 48e9, 0.864e12, 32e9, 25e9, 8),
}
"""Name on the command line to GPU."""


_OTHERS = ("NVL", "MIG", "GH200", "GB200")
"""Parts of names of devices that are not what else their name says: other clocks or memory, or a slice of a GPU."""


def find(device_name: str) -> str | None:
    """The table's name of a device (`torch.cuda.get_device_name`), None if it is not there."""
    if any(part in device_name for part in _OTHERS):
        return None
    return next((name for name, gpu in GPUS.items() if all(part in device_name for part in gpu.device_names)), None)


def peak_flops(precision: str, device_type: str) -> tuple[float, str]:
    """What this rank's device can do at best.

    Args:
        precision: `training.precision`.
        device_type: `cuda` or `cpu`.

    Returns:
        FLOP/s and, in words, where they come from: the table; or, for a CPU or an unknown GPU, a square matrix product
        timed now, on as many threads as this process has.
    """
    import torch

    if device_type == "cuda" and (name := find(torch.cuda.get_device_name())) is not None:
        # Transformer Engine multiplies fp32 in TF32, which is faster: then MFU can exceed 1.
        counted = ", data sheet without TF32" if precision == "fp32" else ", data sheet"
        return GPUS[name].peak(precision), name + counted
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    size = 8192 if device_type == "cuda" else 512
    where = (
        torch.cuda.get_device_name() if device_type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s) a rank"
    )
    own = torch.Generator(device_type).manual_seed(0)  # a run that is resumed has its random state already
    left, right = (torch.randn(size, size, device=device_type, generator=own).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.3
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        # Read back, so that the clock waits for a GPU; one product is long against that.
        (left @ right)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"{where}, measured by a {size} x {size} matrix product"
