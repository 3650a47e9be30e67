"""Where reduced precision is good enough, and only there: running layers over calibration text, and summing products.

These are sums over tens of thousands of tokens. On processors that multiply bf16 natively (AVX-512 BF16, AMX) layers run
under autocast (linears and attention in bf16, the residual stream and the norms in float32), and products of activations
round their factors to bf16 and keep the sum in float32. Both are several times as fast there. The algorithms themselves
(Cholesky factors, sweeps, least squares) always run in full float32.
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
    """'bf16' where the processor multiplies bf16 natively, else 'ieee' (full float32). Recorded in manifests."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capability.get("avx512_bf16") or capability.get("amx_bf16") else "ieee"


def prepare_cpu(threads: int) -> None:
    """Set torch's thread count, and let its allocator ask for 2 MiB pages: without, a tenth of a layer goes into faults
    of 4 KiB (Linux; it takes effect where torch has not yet allocated)."""
    torch.set_num_threads(threads)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


_switch = Lock()
_inside = 0  # how many are in `fast_matmul`, over all threads: the setting is one of the process
_outside: str = ""


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Inside, float32 products on the CPU may round their factors to bf16 (sums stay float32).

    The setting is the whole process's: while threads share work, the caller of all of them has to be inside too, else what
    a product is rounded to would depend on which thread left first."""
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
    """Inside, layers run under autocast to bf16 where that is native; else `fast_matmul` alone."""
    with fast_matmul(), torch.autocast(device.type, torch.bfloat16, enabled=matmul_precision() == "bf16"):
        yield
