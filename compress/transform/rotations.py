"""Rotations: orthogonal changes of basis that keep a model's output and spread outliers over all channels.

* R2: the values v of a head become v R, and the columns of o_proj that read the head are rotated back. Attention mixes tokens
  and not channels, so nothing in between changes. It works for every architecture, with biases and grouped queries.
* R1: the residual stream h becomes h R. Each norm's weight is folded into the linears that read it, because an RMSNorm
  without weight commutes with a rotation. Embedding and writers then output rotated states, and readers and head rotate them
  back.

Sources: Ashkboos et al., "QuaRot", 2024 (arXiv:2404.00456), sections 3 and 4; Liu et al., "SpinQuant", 2024
(arXiv:2405.16406), section 3.1, which has the names R1 and R2. The rotations that these papers apply at run time (R3, R4:
online Hadamard transforms) are left out: they cost time, and the file formats cannot express them.
"""

from __future__ import annotations

import torch
from torch import nn

from llmc.compress.transform.opening import Opening, loaded
from llmc.compress.transform.roles import Heads, LayerMap, Place
from llmc.formats.linears import get_weight
from llmc.formats.mixture import Experts

ROWS = 8192  # rows of a matrix in float64 at a time


def orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix, float64 [n, n]. For n = 2^k m with odd m it is the Kronecker product of a Hadamard matrix
    of order 2^k (Sylvester's construction) and a random orthogonal matrix [m, m], with random signs of the rows."""
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
    """Change weight [out, in] to weight R in place, for a linear whose input is rotated, x -> x R."""
    for rows in weight.split(ROWS):
        rows.copy_(rows.double() @ r.to(weight.device))


def rotate_rows(weight: torch.Tensor, bias: torch.Tensor | None, r: torch.Tensor) -> None:
    """Change weight [out, in] and bias [out] to R^T weight and R^T bias in place, so that the output is rotated, y -> y R."""
    weight.copy_(r.to(weight.device).t() @ weight.double())
    if bias is not None:
        bias.copy_(bias.double() @ r.to(weight.device))


def rotate_heads(layer: nn.Module, value: Place, heads: Heads, r: torch.Tensor) -> None:
    """Apply R2 to one layer in place. r: [head_dim, head_dim], the same for every head."""
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


def scale_columns(weight: torch.Tensor, by: torch.Tensor) -> None:
    """Multiply the columns of weight [out, in] by float64 [in], in place."""
    for rows in weight.split(ROWS):
        rows.copy_(rows.double() * by)


def fold(norm: torch.Tensor, readers: list[torch.Tensor], offset: float) -> None:
    """Move an RMSNorm's weight [in] into the weights [out, in] of all linears that read it, in place. offset: the norm
    multiplies by its weight + offset."""
    weight = norm.double() + offset
    for columns in readers:
        scale_columns(columns, weight)
    norm.fill_(1 - offset)


def rotate_stream(layer: nn.Module, places: LayerMap, r: torch.Tensor, opened: Opening = loaded) -> None:
    """Apply R1 to one layer in place. r: [hidden, hidden].  opened: gives each linear its weights and keeps the changed
    ones."""
    offset = places.family.offset
    for place in places.norms:
        norm = layer.get_submodule(place.writer).weight
        assert isinstance(norm, torch.Tensor)
        for name in place.readers:
            with opened(layer, name) as reader:
                scale_columns(get_weight(reader), norm.data.double() + offset)
                rotate_columns(get_weight(reader), r)
        norm.data.fill_(1 - offset)
    for name in places.writers:
        with opened(layer, name) as writer:
            rotate_rows(get_weight(writer), bias_of(layer, name), r)


def bias_of(layer: nn.Module, name: str) -> torch.Tensor | None:
    """The bias of a linear, a view; of an expert's last linear its row of the experts' biases."""
    experts = layer.get_submodule(".".join(name.split(".")[:-2]))
    if isinstance(experts, Experts):
        number = int(name.split(".")[-2])
        return experts.bias_out(number) if name.endswith(f".{experts.out(number)}") else None
    return _bias(layer.get_submodule(name))


def _bias(linear: nn.Module) -> torch.Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.data
