"""A healed linear: what it starts as, its gradients, and what ships."""

from __future__ import annotations

import pytest
import torch

from llmc.compress.heal import student
from llmc.formats.quantized import Quantized, with_tensors
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType, IntegerType, QuantizedTensor
from llmc.rounding.rtn import rtn

INTEGER_TYPES = [IntegerType(4, 32), IntegerType(4, 64, False), IntegerType(8, 32), IntegerType(8, 32, False)]


def quantized(qtype: IntegerType | BlockType, out: int = 6, n: int = 256) -> Quantized:
    if isinstance(qtype, BlockType):
        return rtn(torch.randn(out, n), qtype)
    groups = n // qtype.group_size
    zeros = None if qtype.symmetric else torch.randint(1, qtype.max_code, (out, groups), dtype=torch.uint8)
    return QuantizedTensor(qtype, torch.randint(0, qtype.max_code + 1, (out, n), dtype=torch.uint8),
                           (torch.rand(out, groups) + 0.1).half(), zeros)


@pytest.mark.parametrize("qtype", [*INTEGER_TYPES, *BLOCK_TYPES.values()], ids=lambda g: g.name)
def test_a_healed_linear_starts_as_what_it_replaces_and_has_autograds_gradients(qtype: IntegerType | BlockType) -> None:
    q = quantized(qtype)
    linear = student.HealedLinear(q, None, torch.float32)
    x = torch.randn(3, 5, 256, requires_grad=True)
    torch.testing.assert_close(linear(x), x @ q.dequantize().t())
    aim = torch.randn(3, 5, 6)
    (linear(x) * aim).sum().backward()
    ours = [x.grad.clone(), *(p.grad.clone() for p in linear.trained().values())]
    x.grad = None
    # the same from the definition of the type, differentiated by autograd
    logs = {kind: torch.zeros_like(p, requires_grad=True) for kind, p in linear.trained().items()}
    if isinstance(q, BlockTensor):
        scale = q.group_scales().view(*q.d.shape, -1) * logs["shift"].exp()[..., None]
        low = q.group_lows().view(*q.d.shape, -1) * logs["shift"].exp()[..., None]
        if "lift" in logs:
            low = low * (logs["lift"] * 2 / max(qtype.levels)).exp()[..., None]
        levels = torch.tensor(qtype.levels)[q.codes.int()].view(*scale.shape, -1)
        weight = (levels * scale[..., None] + low[..., None]).view(q.shape)
    else:
        weight = (q.dequantize().view(*q.scales.shape, -1) * logs["shift"].exp()[..., None]).view(q.shape)
    ((x @ weight.t()) * aim).sum().backward()
    for found, expected in zip(ours, [x.grad, *(p.grad for p in logs.values())], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("qtype", [IntegerType(4, 32), BLOCK_TYPES["q4_1"], BLOCK_TYPES["q4_k"]], ids=lambda g: g.name)
def test_trained_factors_are_values_of_fp16_and_make_the_weight_that_ships(qtype: IntegerType | BlockType) -> None:
    q = quantized(qtype)
    linear = student.HealedLinear(q, None, torch.float32)
    linear(torch.eye(256))  # made once, and again after a change
    with torch.no_grad():
        for p in linear.trained().values():
            p.normal_(0, 0.1)
    factors = linear.factors()
    assert all(torch.equal(f, f.half().float()) for f in factors.values())
    shipped = with_tensors(q, {name: f.half() for name, f in factors.items()})
    torch.testing.assert_close(linear(torch.eye(256)).t(), shipped.dequantize(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(shipped.dequantize(), q.dequantize())
