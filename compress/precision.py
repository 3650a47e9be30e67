"""Where reduced precision is good enough, and only there: the products of activations.

Running layers and summing Hessians are long sums over tens of thousands of tokens. On processors with bf16 instructions
(AVX-512 BF16, AMX) oneDNN can round the factors of a float32 product to bf16 and keep the sum in float32, which is three
to five times as fast. The algorithms themselves (Cholesky factors, sweeps, least squares) always run in full float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def matmul_precision() -> str:
    """'bf16' where the processor multiplies bf16 natively, else 'ieee' (full float32). Recorded in manifests."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capability.get("avx512_bf16") or capability.get("amx_bf16") else "ieee"


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Inside, float32 products on the CPU may round their factors to bf16 (sums stay float32)."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = matmul_precision()
    try:
        yield
    finally:
        backend.fp32_precision = before
