"""Rotations: orthogonal changes of basis that leave a model's function as it is and spread outliers over all channels.

* R2: the values of a head v become v R, and the columns of o_proj that read the head are rotated back. Attention mixes
  tokens, not channels, so nothing in between changes. Any architecture, biases and grouped queries included.
* R1: the residual stream h becomes h R. Each norm's weight is folded into the linears that read it; what is left of an
  RMSNorm commutes with a rotation. Embedding and writers then put out rotated states, readers and head undo it.

Sources: Ashkboos et al., "QuaRot", 2024 (arXiv:2404.00456), sections 3 and 4; Liu et al., "SpinQuant", 2024
(arXiv:2405.16406), section 3.1, whose names R1 and R2 are used. The rotations that those papers make while the model runs
(R3, R4: online Hadamards) cost time and have no place in the files that llmc writes.
"""

from __future__ import annotations

import torch
from torch import nn

from llmc.compress.skeleton import get_weight
from llmc.compress.transform.roles import Heads, LayerMap, Place

ROWS = 8192  # of a matrix in float64 at once


def orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal float64 [n, n]: for n = 2^k m, m odd, a Hadamard matrix of order 2^k (Sylvester's construction)
    times a random orthogonal [m, m] (Kronecker product), with the signs of its rows drawn at random."""
    power = n & -n
    gaussian = torch.randn(n // power, n // power, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    q *= r.diagonal().sign()  # uniform over the orthogonal group (Mezzadri, 2007)
    signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
    return torch.kron(hadamard(power), q.contiguous()) * signs


def hadamard(n: int) -> torch.Tensor:
    """float64 [n, n] with entries +-1/sqrt(n), n a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    return h


def rotate_columns(weight: torch.Tensor, r: torch.Tensor) -> None:
    """weight [out, in] becomes weight R, in place: it reads states that were rotated, x -> x R."""
    for rows in weight.split(ROWS):
        rows.copy_(rows.double() @ r.to(weight.device))


def rotate_rows(weight: torch.Tensor, bias: torch.Tensor | None, r: torch.Tensor) -> None:
    """weight [out, in] and bias [out] become R^T weight, R^T bias, in place: it puts out rotated states, y -> y R."""
    weight.copy_(r.to(weight.device).t() @ weight.double())
    if bias is not None:
        bias.copy_(bias.double() @ r.to(weight.device))


def rotate_heads(layer: nn.Module, value: Place, heads: Heads, r: torch.Tensor) -> None:
    """R2 on one layer, in place; r [head_dim, head_dim] for every head."""
    assert value.rows is not None
    writer, reader = layer.get_submodule(value.writer), get_weight(layer.get_submodule(value.readers[0]))
    weight, bias = get_weight(writer), _bias(writer)
    for rows in value.rows.view(heads.kv, heads.width):
        part, part_bias = weight[rows], None if bias is None else bias[rows]
        rotate_rows(part, part_bias, r)
        weight[rows] = part
        if bias is not None and part_bias is not None:
            bias[rows] = part_bias
    for columns in reader.split(heads.width, dim=1):
        rotate_columns(columns, r)


def fold(norm: torch.Tensor, readers: list[torch.Tensor], offset: float) -> None:
    """Move an RMSNorm's weight [in] into the weights [out, in] of the linears that are all that reads it, in place."""
    weight = norm.double() + offset
    for columns in readers:
        for rows in columns.split(ROWS):
            rows.copy_(rows.double() * weight)
    norm.fill_(1 - offset)


def rotate_stream(layer: nn.Module, places: LayerMap, r: torch.Tensor) -> None:
    """R1 on one layer, in place; r [hidden, hidden]."""
    for place in places.norms:
        readers = [get_weight(layer.get_submodule(n)) for n in place.readers]
        norm = layer.get_submodule(place.writer).weight
        assert isinstance(norm, torch.Tensor)
        fold(norm.data, readers, places.family.offset)
        for weight in readers:
            rotate_columns(weight, r)
    for name in (places.family.out, places.family.down):
        linear = layer.get_submodule(name)
        rotate_rows(get_weight(linear), _bias(linear), r)


def _bias(linear: nn.Module) -> torch.Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.data
