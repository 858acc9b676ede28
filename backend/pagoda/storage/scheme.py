"""How a matrix is stored: which tensors the checkpoint holds for it, and the product that they become.

A `Linear` has a scheme and does not ask which. The schemes are here (plain numbers, another layer's numbers), in fp8.py
and in int4.py; choice.py gives each matrix its own, by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pagoda_kernels import Ops, PackedWeight
from torch import Tensor, nn


class Product(Protocol):
    def __call__(self, x: Any, *, bias: Tensor | None) -> Tensor:
        """x [T, in] to [T, out]: a Tensor, and where the product rounds its inputs, Fp8Rows as well."""


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor that the checkpoint holds for a matrix."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    outputs: int | None
    """The dimension that runs along the outputs, where matrices are joined; None: each keeps its own tensor."""
    default: float | None = None
    """What the checkpoint means when it leaves the tensor out; None: it must be there."""


class Scheme(Protocol):
    """Of one Linear, which may join several of the checkpoint's matrices by their outputs."""

    rounds_inputs: bool
    """The product multiplies 8-bit floats: it rounds its inputs, and takes such as are rounded already."""

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        """The tensors of a matrix by their last name. Raises ValueError for sizes that cannot be stored so."""
        ...

    def make_up(self, tensors: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> None:
        """Fill the tensors at random, so that the matrix's numbers have this standard deviation."""
        ...

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        """The product of the joined matrix, whose parts have these outputs.

        A tensor is joined along its outputs; one that has none is stacked by parts. Raises ValueError for contents that
        the operations cannot take.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """The product of a plain weight, which other operations than `linear` can take, too."""

    ops: Ops
    packed: PackedWeight

    def __call__(self, x: Tensor, *, bias: Tensor | None) -> Tensor:
        return self.ops.linear(x, self.packed, bias)

    def onto(self, x: Tensor, residual: Tensor) -> bool:
        """Add the product to residual, [T, out], in place; False, with nothing done, where that is no faster."""
        return self.ops.linear_onto(x, self.packed, residual)

    def silu(self, x: Tensor, *, bias: Tensor | None) -> Tensor:
        """silu(gate) * up, [T, out / 2], for the product [gate | up]."""
        return self.ops.silu_linear(x, self.packed, bias)


class Plain:
    """Numbers of the model's type."""

    rounds_inputs = False

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        return {"weight": Field((out_features, in_features), torch.get_default_dtype(), 0)}

    def make_up(self, tensors: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> None:
        tensors["weight"].normal_(0.0, deviation, generator=generator)

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        return PlainProduct(ops, ops.pack_linear(tensors["weight"]))


class Tied:
    """The numbers of another layer's weight [out, in], which must be there when this one is prepared."""

    rounds_inputs = False

    def __init__(self, source: nn.Module) -> None:
        self._source = source

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        return {}

    def make_up(self, tensors: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> None:
        pass

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        weight = self._source.weight
        assert isinstance(weight, nn.Parameter)
        return PlainProduct(ops, ops.pack_linear(weight.data))
