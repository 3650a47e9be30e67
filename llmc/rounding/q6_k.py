"""Rounding of float weights to Q6_K, with the same accuracy as ggml's own rounding and fast enough for an embedding.

A weight is d * scale * (q - 32) with q of 6 bits, an int8 `scale` for every 16 weights and a float16 d for every 256.
"""

from __future__ import annotations

import numpy as np
import torch

from llmc.formats.types import BLOCK_TYPES, BlockTensor


def round_q6_k(x: np.ndarray) -> BlockTensor:
    """Round float32 [rows, n] to Q6_K; n must be a multiple of 256.

    For each 16 weights, the candidates are the scales that put the largest weight at 28 to 36 steps. The best one has the
    smallest squared error, weighted with x² as in ggml. Then d puts the largest scale at 127, and q is rounded again with the
    stored d and scale.
    """
    blocks = x.reshape(-1, 16, 16)
    ideal = _best_scales(blocks)
    largest = np.abs(ideal).max(axis=1, keepdims=True)
    d = (largest / 127).astype(np.float16)
    d = np.where(127.5 * d.astype(np.float32) < largest, np.nextafter(d, np.float16(np.inf)), d)  # if d is subnormal
    step = d.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(step > 0, np.clip(np.rint(ideal / step), -127, 127), 0).astype(np.int8)
        q = np.rint(blocks / (step * scales)[..., None])
    codes = (np.clip(np.nan_to_num(q, posinf=0, neginf=0), -32, 31) + 32).astype(np.uint8)
    rows = x.shape[0]
    return BlockTensor(BLOCK_TYPES["q6_k"], torch.from_numpy(codes.reshape(x.shape)), torch.from_numpy(d.reshape(rows, -1)),
                       scales=torch.from_numpy(scales.reshape(rows, -1)))


def _best_scales(blocks: np.ndarray) -> np.ndarray:
    """float32 [n, 16, 16] -> [n, 16]: for each 16 weights the scale s with the smallest error of s * q, -32 <= q <= 31."""
    weight = blocks * blocks
    index = np.abs(blocks).argmax(axis=2)[..., None]
    extreme = np.take_along_axis(blocks, index, axis=2)
    extreme[extreme == 0] = 1  # an all-zero block: every q is 0 below, and so is the scale
    best = np.zeros(blocks.shape[:2], dtype=np.float32)
    gain = np.zeros_like(best)
    for steps in range(28, 37):  # the largest weight gets q = -steps, clipped to -32
        q = np.clip(np.rint(blocks * (np.float32(-steps) / extreme)), -32, 31)
        weighted = weight * q
        cross, power = (weighted * blocks).sum(axis=2), (weighted * q).sum(axis=2)
        scale = cross / np.maximum(power, np.finfo(np.float32).tiny)
        better = scale * cross > gain  # the error of the best scale is const - cross² / power
        best = np.where(better, scale, best)
        gain = np.where(better, scale * cross, gain)
    return best
