"""Causal attention whose backward pass is faster on processors that multiply bf16.

torch's own backward pass on the CPU works a head at a time; here the heads that share keys are one product, a band of
queries at a time against the keys before them, with the probabilities made again (Dao, "FlashAttention-2", 2023,
arXiv:2307.08691, section 2.3). SmolLM2-135M's shapes, 2 x 512 tokens, one core: 24 ms a layer against 35, at the same error
against float32 (0.5 % of the gradient's norm).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

ROWS = 64  # queries of a band


class _Causal(torch.autograd.Function):
    """q [batch, heads, n, width], k and v [batch, heads / g, n, width], all bf16 -> [batch, heads, n, width]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        n, width = q.shape[-2:]
        keys, values = (t.reshape(-1, n, width) for t in (k, v))
        shared = (keys.shape[0], -1, n, width)  # the queries of the heads that share keys
        queries, slopes = q.mul(ctx.scale).reshape(shared), grads[0].to(q.dtype).reshape(shared)
        with torch.autocast(q.device.type, enabled=False):
            means = (slopes * out.reshape(shared)).sum(-1, keepdim=True, dtype=torch.float32).to(q.dtype)
            dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
            later = torch.full((ROWS, ROWS), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
            for first in range(0, n, ROWS):
                last = min(first + ROWS, n)
                band = (keys.shape[0], queries.shape[1], last - first)
                x, dy = (t[:, :, first:last].reshape(keys.shape[0], -1, width) for t in (queries, slopes))
                scores = torch.bmm(x, keys[:, :last].transpose(1, 2))
                scores.view(*band, last)[..., first:] += later[: band[2], : band[2]]
                p = torch.softmax(scores, -1)
                ds = torch.bmm(dy, values[:, :last].transpose(1, 2))
                ds.sub_(means[:, :, first:last].reshape(*ds.shape[:2], 1)).mul_(p)
                dq[:, :, first:last] = torch.bmm(ds, keys[:, :last]).view(*band, width)
                dk[:, :last].baddbmm_(ds.transpose(1, 2), x)
                dv[:, :last].baddbmm_(p.transpose(1, 2), dy)
        return dq.mul_(ctx.scale).view(q.shape), dk.view(k.shape), dv.view(v.shape), None


class FasterAttention(TorchFunctionMode):
    """Inside, calls of torch's attention that it computes in bf16 on the CPU, for a plain causal mask and with gradients,
    take the one above; all others are as they are."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func is scaled_dot_product_attention and len(args) == 3 and _fits(*args, given):
            q, k, v = (t.to(torch.bfloat16) for t in args)
            scale = given.get("scale")
            return _Causal.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        return func(*args, **given)


def _fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]) -> bool:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    plain = given.get("is_causal") and given.get("attn_mask") is None and not given.get("dropout_p")
    return bool(plain and dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled()
                and q.shape[2] == k.shape[2] and q.shape[3] == k.shape[3] == v.shape[3] and q.shape[1] % k.shape[1] == 0)
