"""Which kernels serve a device."""

from __future__ import annotations

import torch

from models.ops.cpu import CpuKernels, load_extension
from models.ops.kernels import Kernels
from models.ops.reference import ReferenceKernels
from models.ops.tiled import TiledKernels

KINDS = ("auto", "cpu", "tiled", "triton", "reference")


def select_kernels(device: torch.device, dtype: torch.dtype, kind: str = "auto") -> Kernels:
    """The kernels of `kind` for weights of `dtype`; `auto` is the fastest set that runs here, on a CPU an exact one.

    On CUDA that is Triton's, or plain torch where Triton is not installed; `triton` by name insists.

    Raises ValueError for an unknown kind or one that cannot serve `device`.
    """
    if kind not in KINDS:
        raise ValueError(f"kernels must be one of {', '.join(KINDS)}; got {kind!r}")
    if device.type == "cpu" and kind == "auto" and dtype is not torch.float64:
        kind = "tiled" if load_extension() is None else "cpu"
    if device.type == "cpu" and kind == "cpu":
        return CpuKernels()
    if device.type == "cpu" and kind == "tiled":
        return TiledKernels()
    if device.type == "cuda" and kind in ("auto", "triton") and dtype is not torch.float64:
        try:
            from models.ops.triton import TritonKernels  # a CPU build of torch comes without it
        except ImportError:
            if kind == "triton":
                raise ValueError("kernels 'triton' need the package triton, which is not installed") from None
        else:
            return TritonKernels(dtype, device)
    if kind in ("auto", "reference"):
        is_cpu_narrow = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
        return ReferenceKernels(torch.float32 if is_cpu_narrow else dtype, device)
    raise ValueError(f"kernels {kind!r} are not available on device {device.type!r}")


def set_num_threads(num_threads: int) -> None:
    """Threads of torch and of our own kernels. Raises ValueError below 1."""
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1; got {num_threads}")
    torch.set_num_threads(num_threads)
    extension = load_extension()
    if extension is not None:
        extension.set_num_threads(num_threads)
