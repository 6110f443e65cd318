"""The kernels of fused regions: products with their epilogues, chains of pointwise ops, and rounding to codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

from ..ir.ops import HEAD, RMS_NORM, arguments, is_op
from ..ir.weight import Weight
from . import interleave, product
from .arena import Arena
from .fuse import Chain, Region
from .gemv import name as encoding_name
from .pointwise import label, outside, statements
from .rows import function as row_function
from .rows import row_stride
from .rows_source import MATH
from .unit import Call, Function, call

Value = Callable[[fx.Node], Any]
UNIT = 1 << 15  # bytes of weights that a rank draws at once, about 2 us of reading; or all that is read side by side


class Codes(NamedTuple):
    """Activations of `rows` rows as 8-bit codes, with a scale and the sum of the codes of each group of columns.

    Where there are several rows, `product.BLOCK` of them stand side by side: codes [M / 8, K / 4, 8, 4], scales and
    sums [M / 8, K / group, 8].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def shapes(cls, rows: int, columns: int, group: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and types for so many rows."""
        wide = product.BLOCK if rows > 1 else 1
        blocks = -(-rows // wide)
        groups = (blocks, columns // group, wide)
        return ((blocks, columns // 4, wide, 4), torch.int8), (groups, torch.float32), (groups, torch.int32)


@dataclass(frozen=True, eq=False)
class ProductKernel:
    """Matrix products of one input, with what is fused behind them."""

    region: Region
    weights: Mapping[str, Weight]
    arena: Arena

    @property
    def name(self) -> str:
        chain = self.region.chains[0]
        words = [encoding_name(self._weight(chain.products[0]).encoding)]
        words += ["int8"] if self.region.width else []
        return ".".join([*words, *(label(node) for node in chain.tail)])

    @property
    def source(self) -> str:
        return self._function.source

    @cached_property
    def _chains(self) -> list[tuple[product.Spec, list[tuple[fx.Node, bool]]]]:
        """For each chain its spec, and its operands: nodes, and whether each has a row for each of x's."""
        return [self._spec(chain) for chain in self.region.chains]

    @cached_property
    def _function(self) -> Function:
        return product.function(self._chains[0][0], self.name)

    def _spec(self, chain: Chain) -> tuple[product.Spec, list[tuple[fx.Node, bool]]]:
        operands: list[tuple[fx.Node, bool]] = []
        names: dict[fx.Node, str] = {}
        lines: list[str] = []

        def operand(node: fx.Node) -> str:
            operands.append((node, node.op != "get_attr"))
            return f"o{len(operands) - 1}"

        for i, node in enumerate(chain.products):
            bias = arguments(node).get("bias")
            names[node] = f"v{i}"
            if bias is not None:
                lines.append(f"const f32x16 b{i} = v{i} + {operand(bias)};")
                names[node] = f"b{i}"
        for node in chain.tail:
            for used in node.all_input_nodes:
                if used not in names and used not in chain.tail:
                    names[used] = operand(used)
        more, value = statements(chain.tail, names)
        value = value or names[chain.products[-1]]
        encoding = self._weight(chain.products[0]).encoding
        by_row = tuple(rows for _, rows in operands)
        lines += more
        spec = product.Spec(encoding, len(chain.products), self.region.width, tuple(lines), value, by_row, self.head)
        return spec, operands

    @property
    def head(self) -> bool:
        """Whether the results are logits and nothing else."""
        return len(self.region.chains) == 1 and all(is_op(p, HEAD) for p in self.region.chains[0].products)

    def _weight(self, node: fx.Node) -> Weight:
        return self.weights[str(arguments(node)["weight"].target)]

    def pack(self) -> None:
        """Bring the weights into the order that the kernel reads, unless they are."""
        self._packed  # noqa: B018  # the property is what remembers

    @cached_property
    def _packed(self) -> dict[fx.Node, list[torch.Tensor]]:
        """The parts of every product's weight, interleaved; what stays in its order stays where it is."""
        nodes = (node for chain in self.region.chains for node in chain.products)
        return {node: self.arena.packed(self._weight(node), self._pack) for node in nodes}

    def _pack(self, weight: Weight) -> list[torch.Tensor]:
        return list(product.pack(weight.encoding, weight.parts, weight.shape[0], self.arena.hold).values())

    def bind(self, value: Value, outs: Mapping[fx.Node, torch.Tensor]) -> Call:
        """A call that writes every chain's output, contiguous."""
        first = self.region.chains[0].products[0]
        x, k = value(arguments(first)["x"]), self._weight(first).shape[1]
        quantities = (*x,) if isinstance(x, Codes) else (x, None, None)
        rows = outs[self.region.chains[0].output].numel() // self._rows(first)
        row_bytes = sum(part.numel() * part.element_size() for part in self._packed[first]) // -(
            -self._rows(first) // 16
        )
        most = UNIT // max(1, row_bytes * len(self.region.chains[0].products))
        tiles = max(1, most // product.SINGLE) * product.SINGLE
        words: list[Any] = []
        units, nbytes = 0, 0
        for chain, (_, operands) in zip(self.region.chains, self._chains, strict=True):
            n = self._rows(chain.products[0])
            count = math.ceil(math.ceil(n / interleave.ROWS) / tiles)
            words += [count, n, outs[chain.output], n]
            units += count
            for node in chain.products:
                for part in self._packed[node]:
                    words += [part, part.shape[1] if part.dim() == 3 else 0]
                    nbytes += part.numel() * part.element_size()
            for node, by_row in operands:
                words += [value(node), n if by_row else 0]
        fixed = (rows, k, *quantities, tiles, units, 0)
        return call(self._function, *fixed, *words, writes=list(outs.values()), nbytes=nbytes)

    def _rows(self, node: fx.Node) -> int:
        return self._weight(node).shape[0]

    def width(self, chain: Chain) -> int:
        """Columns of a chain's output."""
        return self._rows(chain.products[0])


@dataclass(frozen=True, eq=False)
class PointwiseKernel:
    """A chain of pointwise ops, row by row."""

    region: Region

    @property
    def name(self) -> str:
        return ".".join(["pointwise", *(label(node) for node in self.region.nodes)])

    @property
    def source(self) -> str:
        return self._function.source

    @cached_property
    def operands(self) -> list[fx.Node]:
        """What the chain reads, in order."""
        return outside(self.region.nodes)

    @cached_property
    def _function(self) -> Function:
        names = {node: f"o{i}" for i, node in enumerate(self.operands)}
        lines, value = statements(self.region.nodes, names)
        loads = [
            f"const f32x16 o{i} = read((const float*)c[{4 + 2 * i}] + r * c[{5 + 2 * i}] + i, k - i);"
            for i in range(len(self.operands))
        ]
        return Function.of(self.name, _POINTWISE.format(body="\n      ".join([*loads, *lines]), value=value), (MATH,))

    def bind(self, value: Value, outs: Mapping[fx.Node, torch.Tensor]) -> Call:
        """A call that writes the output, contiguous."""
        (out,) = outs.values()
        width = out.shape[-1]
        words: list[Any] = []
        for node in self.operands:
            x = value(node)
            words += [x, row_stride(x) if x.dim() > 1 or x.shape == out.shape else 0]
        work = out.numel() * (1 + len(self.operands))
        return call(self._function, out, out.numel() // width, width, *words, writes=[out], work=work)


@dataclass(frozen=True, eq=False)
class QuantizeKernel:
    """Activations as codes; the norm before them in the same pass."""

    region: Region

    @property
    def name(self) -> str:
        return "rows.rms_norm_quantize" if len(self.region.nodes) > 1 else "rows.quantize"

    @property
    def source(self) -> str:
        return row_function("quantize_rows").source

    def bind(self, value: Value, out: Codes, spare: torch.Tensor | None) -> Call:
        """A call that writes codes, scales and sums; `spare` holds what the norm leaves."""
        norm = self.region.nodes[0]
        args = arguments(norm)
        x = value(args["x"])
        sizes = (x.numel() // x.shape[-1], x.shape[-1], self.region.width, out.codes.shape[2])
        if spare is None:
            return call(row_function("quantize_rows"), x, *out, *sizes, writes=list(out), work=4 * x.numel())
        assert norm.target is RMS_NORM.target
        rest = (value(args["weight"]), float(args["eps"]), float(args["offset"]), spare)
        name = row_function("rms_norm_quantize")
        return call(name, x, *out, *sizes, *rest, writes=[*out, spare], work=6 * x.numel())


_POINTWISE = """\
// out, m, k, then each operand with the step from row to row
static void $name(Rank& rank, const int64_t* c) {{
  const int64_t k = c[3];
  share(rank, c[2], [&](int64_t r) {{
    for (int64_t i = 0; i < k; i += 16) {{
      {body}
      write((float*)c[1] + r * k + i, {value}, k - i);
    }}
  }});
}}
"""
