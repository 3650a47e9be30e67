"""Reduced precision for the two steps that allow it: running layers over calibration text, and summing products.

These are sums over tens of thousands of tokens. On processors that multiply bf16 natively (AVX-512 BF16, AMX), layers run
under autocast: linears and attention in bf16, the residual stream and the norms in float32. Products of activations round
their factors to bf16 and keep the sum in float32. Both are several times faster there. The algorithms themselves (Cholesky
factors, sweeps, least squares) always run in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch


@cache
def matmul_precision() -> str:
    """'bf16' if the processor multiplies bf16 natively, else 'ieee' (full float32). Manifests record it."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capability.get("avx512_bf16") or capability.get("amx_bf16") else "ieee"


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the products of a training. precision: 'bf16', 'fp32', or 'auto': bf16 where the device multiplies it."""
    native = matmul_precision() == "bf16" or device.type != "cpu"
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else torch.float32


def prepare_cpu(threads: int) -> None:
    """Set torch's number of threads, and let its allocator request pages of 2 MiB.

    With pages of 4 KiB, page faults take a tenth of a layer's time on Linux. Call it before torch allocates memory."""
    torch.set_num_threads(threads)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


_switch = Lock()
_inside = 0  # number of open `fast_matmul` blocks in all threads: the setting belongs to the process
_outside: str = ""


@contextmanager
def fast_matmul() -> Iterator[None]:
    """In this block, float32 products on the CPU may round their factors to bf16. Sums stay float32.

    The setting belongs to the whole process. If threads share work, their caller must be in this block too. Otherwise the
    precision of a product would depend on which thread leaves first."""
    global _inside, _outside
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _switch:
        if _inside == 0:
            _outside = backend.fp32_precision
            backend.fp32_precision = matmul_precision()
        _inside += 1
    try:
        yield
    finally:
        with _switch:
            _inside -= 1
            if _inside == 0:
                backend.fp32_precision = _outside


@contextmanager
def fast_forward(device: torch.device) -> Iterator[None]:
    """In this block, layers run under autocast to bf16 if the processor has it; otherwise only `fast_matmul` applies."""
    with fast_matmul(), torch.autocast(device.type, torch.bfloat16, enabled=matmul_precision() == "bf16"):
        yield
