"""The roundings of llama.cpp on the CPU, inside a torch model: so its logits can be compared with those of a file closely.

llama.cpp multiplies a matrix with inputs that it first rounds to the type that goes with the matrix's (`vec_dot_type` in
ggml-cpu.c): 8 bits in blocks for quantized types, F16 and BF16 for these. In an untrained model that alone makes logits
differ by 2 % to 20 %, in which a wrong layout can hide. Without it they agree to about 0.1 %.

Which type a matrix has in the file is found by its rows' values: not by names, and also for experts in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.matching import Index, digests
from llmc.formats.types import BLOCK_TYPES

Rounding = Callable[[torch.Tensor], torch.Tensor]


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: d = max|x| / 127 as float16, codes in steps of the exact d (quantize_row_q8_0)."""
    blocks = x.reshape(-1, 32)
    most = blocks.abs().amax(1, keepdim=True)
    codes = (blocks * torch.where(most > 0, 127 / most, 0)).round()
    return (codes * (most / 127).to(torch.float16)).view(x.shape)


def q8_k(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 256: the value of the largest magnitude gets the code -127 (quantize_row_q8_K)."""
    blocks = x.reshape(-1, 256)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = torch.where(largest != 0, -127 / largest, 0)
    codes = (blocks * scale).round().clamp(max=127)
    return (codes * torch.where(largest != 0, 1 / scale, 0)).view(x.shape)


ROUNDINGS: dict[Kind, Rounding] = {
    Kind.F16: lambda x: x.to(torch.float16).to(torch.float32),
    Kind.BF16: lambda x: x.to(torch.bfloat16).to(torch.float32),
    **{Kind[t.gguf_type]: q8_0 if t.block == 32 else q8_k for t in BLOCK_TYPES.values()},
}


class Kinds:
    """The types of a file's matrices, by the values of their rows."""

    def __init__(self) -> None:
        self.index = Index()
        self.kinds: list[tuple[Kind, bool]] = []

    def add(self, rows: np.ndarray, kind: Kind, exact: bool) -> None:
        """rows: float32 [n, width] as the model has them. exact: the file has the same values, so they are not rounded."""
        self.index.add(len(self.kinds), digests(rows))
        self.kinds.append((kind, exact))

    def find(self, matrix: torch.Tensor) -> tuple[Kind, bool] | None:
        """The type of a matrix [rows, width] by its first row that is not zero. None: the file has no such row."""
        for row in matrix:
            if row.any():
                number = int(self.index.find(digests(row.detach()[None].numpy()))[0, 0])
                return self.kinds[number] if number >= 0 else None
        return None


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's table of GELU: from float16 to float16, between -10 and 10 (ggml_vec_gelu_f32)."""
    table = torch.nn.functional.gelu(x.to(torch.float16).to(torch.float32), approximate="tanh").to(torch.float16)
    return torch.where(x <= -10, 0, torch.where(x >= 10, x, table.to(torch.float32)))


class LikeLlamaCpp(TorchFunctionMode):
    """Within this context, products with matrices of a file are computed with llama.cpp's roundings, and tokens go to the
    experts that llama.cpp chose, where torch's scores of these are the same but for roundings.

    rounded: counts the products. The matrix of a product may be transposed, and may be a part of a larger tensor.
    rerouted: counts the tokens that torch alone would have sent to other experts."""

    def __init__(self, kinds: Kinds, in_file: Callable[[torch.Tensor, Kind], torch.Tensor],
                 orders: Iterable[np.ndarray] = ()) -> None:
        """in_file: the values of float rows in a type of the file.

        orders: of each layer with experts, in their order, the experts by llama.cpp's score, int32 [tokens, experts]."""
        super().__init__()
        self.kinds, self.in_file, self.rounded, self.rerouted = kinds, in_file, 0, 0
        self.orders = iter(orders)
        self.order = next(self.orders, None)

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.gelu and kwargs.get("approximate") == "tanh":
            return _gelu(args[0])
        if func in PRODUCTS and not kwargs.keys() & {"input", "weight", "mat1", "mat2"}:
            args = self._rounded(args, *PRODUCTS[func])
        if func in TOP and self._is_choice(args[0]):
            return self._rerouted(args[0], func(*args, **kwargs))
        return func(*args, **kwargs)

    def _is_choice(self, scores: torch.Tensor) -> bool:
        """Whether these are scores of every expert for every token."""
        return self.order is not None and tuple(scores.shape[-2:]) == self.order.shape and scores.numel() == self.order.size

    def _rerouted(self, scores: torch.Tensor, ours: Any) -> Any:
        """torch.topk's result with llama.cpp's experts, for the tokens where torch's scores of these are as good."""
        assert self.order is not None
        theirs = torch.from_numpy(self.order[:, : ours.indices.shape[-1]].astype(np.int64)).view(ours.indices.shape)
        self.order = next(self.orders, None)
        finite = scores.masked_fill(~scores.isfinite(), torch.nan)
        spread = finite.nan_to_num(-torch.inf).amax(-1) - finite.nan_to_num(torch.inf).amin(-1)
        values = scores.gather(-1, theirs)
        near = (ours.values.amin(-1) - values.amin(-1) <= NEAR * spread)[..., None]
        self.rerouted += int((near[..., 0] & (theirs.sort(-1).values != ours.indices.sort(-1).values).any(-1)).sum())
        return torch.return_types.topk((torch.where(near, values, ours.values), torch.where(near, theirs, ours.indices)))

    def _rounded(self, args: Any, x: int, w: int, transposed: bool) -> Any:
        matrix, inputs = args[w], args[x]
        if matrix.dim() not in (2, 3) or matrix.dtype != torch.float32:
            return args
        rows = matrix.transpose(-1, -2) if transposed else matrix
        found = self.kinds.find(rows if rows.dim() == 2 else rows[0])
        if found is None or found[0] not in ROUNDINGS:
            return args
        kind, exact = found
        self.rounded += 1
        values = rows if exact else self.in_file(rows.contiguous(), kind).view(rows.shape)
        changed = list(args)
        changed[x] = ROUNDINGS[kind](inputs.contiguous())
        changed[w] = values.transpose(-1, -2) if transposed else values
        return tuple(changed)


TOP = (torch.topk, torch.Tensor.topk)
NEAR = 0.02  # of the spread of a token's scores: as far as roundings may move them
# {function: (place of the inputs, place of the matrix, whether the matrix is [in, out])}
PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    torch.nn.functional.linear: (0, 1, False), torch.addmm: (1, 2, True),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm,
                     torch.Tensor.bmm, *filter(None, (getattr(torch, "_grouped_mm", None),
                                                      getattr(torch.nn.functional, "grouped_mm", None)))), (0, 1, True)),
}
