"""A fused product on a GPU, in Triton, at any number of rows: `TritonProduct` takes gemv for few and gemm for more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..ir.encoding import Encoding
from ..ir.errors import SmeltError
from . import gemv_triton
from .autotune_triton import Tile, fastest, form, key, space
from .gemm_triton_template import KERNEL, SQUARE
from .hoist import Term
from .printers import triton as printer
from .product_triton import ONE, Product, arguments, column_mask, finish, lines, terms, walk, whole
from .triton_module import load

SIZES = ("M", "N", "K", "x_row", "y_row")
SIDES = ("BLOCK_M", "BLOCK_N", "BLOCK_C", "GROUP", "SPLITS")


def source(product: Product | Encoding) -> str:
    """The kernel `gemm` as a Python module."""
    product = product if isinstance(product, Product) else Product(product)
    columns = product.columns
    return KERNEL.format(
        product=product,
        parts=", ".join(product.parts),
        norm=", gain, eps, offset" if product.norm else "",
        finish=finish(product),
        square=SQUARE if product.norm else "",
        zeros=lines(1, (f"{prefix}acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)" for prefix in product.encodings)),
        walk=lines(2, walk(columns)),
        body=lines(2, _body(product)),
        sums=len(product.encodings),
        partial=lines(2, _partial(product)),
        joined=lines(3, _joined(product)),
        done=lines(2, _done(product)),
        whole=whole(columns),
        period=columns.period,
        lanes=columns.lanes,
    )


def signature(product: Product, dtype: str = "float32", bias: bool = False, residual: bool = False,
              splits: int = 1) -> dict[str, str]:  # fmt: skip
    """Triton's type of every argument of the kernel, for compiling ahead of time; `dtype` is that of x and y."""
    return arguments(product, dtype, bias, residual, splits, SIZES, SIDES)


def constants(product: Product, tile: Tile) -> dict[str, int]:
    """The compile-time arguments of a tile."""
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_C": product.columns.block(tile.block_k),
        "GROUP": tile.group, "SPLITS": tile.splits,
    }  # fmt: skip


def kernel(product: Product | Encoding) -> Any:
    """The `triton.jit` function; `TritonProduct` launches it."""
    return load(source(product), "gemm").gemm


class TritonProduct:
    """The kernels of a product. A call is one launch and reads the weights once for up to 64 rows of x.

    Calls of one object must follow each other on one stream: they share the counters by which split programs find out
    which of them is the last. The first call of a shape makes them and compiles: it must come before a graph is
    captured. `tune`: on a GPU that call also tries the space of tiles; results then depend on the choice in their last
    bits.
    """

    def __init__(self, product: Product | Encoding, tune: bool = False) -> None:
        self.product = product if isinstance(product, Product) else Product(product)
        self.tune = tune
        self._kernels: dict[int, Any] = {}
        self._chosen: dict[tuple[Any, ...], Tile] = {}
        self._counters: dict[tuple[torch.device, int], torch.Tensor] = {}  # kept: captured graphs hold their addresses

    def __call__(
        self,
        weight: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        out: torch.Tensor,
        *,
        up: Mapping[str, torch.Tensor] | None = None,
        gain: torch.Tensor | None = None,
        eps: float = 0.0,
        offset: float = 0.0,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        tile: Tile | None = None,
    ) -> None:
        """out [M, N] from x [M, K] and the weights' contiguous parts; rows of x and of out may lie apart.

        gain [K], eps, offset: the norm's; residual [M, N] lies as `out` does, and may be `out`. Raises SmeltError for
        operands that do not fit the product.
        """
        self._check(weight, x, out, up, gain, bias, residual)
        (m, columns), n = x.shape, out.shape[1]
        tiles = space(m, n, columns, x.dtype, len(self.product.encodings))
        if tile is None and self.tune and torch.cuda.is_available():
            at = key(m, n, columns, self.product)
            if at not in self._chosen:
                self._chosen[at] = fastest(
                    tiles,
                    lambda each: self(
                        weight, x, torch.empty_like(out), up=up, gain=gain, eps=eps, offset=offset, bias=bias, tile=each
                    ),
                )
            tile = self._chosen[at]
        tile = tile or tiles[0]
        few = form(m) == "gemv"
        blocks = -(-n // tile.block_n) * (1 if few else -(-m // tile.block_m))
        work, arrived = self._shared(tile.splits, blocks, m, n, x.device)
        norm = {"gain": gain, "eps": float(eps), "offset": float(offset)} if self.product.norm else {}
        shape = {"N": n, "K": columns, "x_row": x.stride(0), "y_row": out.stride(0)} | ({} if few else {"M": m})
        stages = {} if few else {"num_stages": tile.stages}
        self._kernel(m if few else 0)[(blocks, tile.splits)](
            **weight, **{f"up_{part}": tensor for part, tensor in (up or {}).items()},
            x=x, y=out, **norm, bias=bias, residual=residual, work=work, arrived=arrived,
            **shape, **(gemv_triton.constants(self.product, tile, m) if few else constants(self.product, tile)),
            num_warps=tile.warps, **stages,
        )  # fmt: skip

    def _kernel(self, rows: int) -> Any:
        """The gemv of so many rows, or (0) the gemm."""
        if rows not in self._kernels:
            self._kernels[rows] = gemv_triton.kernel(self.product, rows) if rows else kernel(self.product)
        return self._kernels[rows]

    def _shared(
        self, splits: int, blocks: int, m: int, n: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Room for the partial sums of a split launch, and a counter a block, which every launch leaves at zero."""
        if splits == 1:
            return None, None
        at = device, 1 << (blocks - 1).bit_length()
        if at not in self._counters:
            self._counters[at] = torch.zeros(at[1], dtype=torch.int32, device=device)
        size = splits * m * (n * len(self.product.encodings) + blocks * self.product.norm)
        return torch.empty(size, dtype=torch.float32, device=device), self._counters[at]

    def _check(
        self,
        weight: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        out: torch.Tensor,
        up: Mapping[str, torch.Tensor] | None,
        gain: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> None:
        product = self.product
        if x.dim() != 2 or out.dim() != 2 or x.shape[0] != out.shape[0] or x.dtype is not out.dtype:
            raise SmeltError(
                f"product {product}: x [M, K] and out [M, N] of one type, not {x.dtype} {list(x.shape)} "
                f"and {out.dtype} {list(out.shape)}"
            )
        if x.stride(1) != 1 or out.stride(1) != 1:
            raise SmeltError(f"product {product}: the rows of x and of out must be contiguous; pass x.contiguous()")
        if product.columns.span and x.shape[1] % product.columns.span:
            raise SmeltError(f"product {product}: K is {x.shape[1]}, not a multiple of {product.columns.span}")
        if (up is None) == (product.up is not None):
            raise SmeltError(f"product {product}: 'up' is {'missing' if up is None else 'no part of it'}")
        if not all(part.is_contiguous() for parts in (weight, up or {}) for part in parts.values()):
            raise SmeltError(f"product {product}: every part of a weight must be contiguous; pass part.contiguous()")
        if gain is not None and not product.norm:
            raise SmeltError(f"product {product}: has no norm, but got a gain")
        if bias is not None and bias.shape != out.shape[1:]:
            raise SmeltError(f"product {product}: bias must be [{out.shape[1]}], not {list(bias.shape)}")
        rows_differ = residual is not None and len(x) > 1 and residual.stride(0) != out.stride(0)
        if residual is not None and (residual.shape != out.shape or residual.stride(1) != 1 or rows_differ):
            raise SmeltError(f"product {product}: the residual must lie in memory as out does; pass a copy that does")


def _body(product: Product) -> Iterator[str]:
    columns, found = product.columns, {prefix: terms(product, prefix) for prefix in product.encodings}
    yield "n = rows"
    for prefix, fields in found.items():
        for t, (coefficient, _) in enumerate(fields[0]):
            if coefficient != ONE:
                yield f"{prefix}by_{t} = {printer.text(coefficient, product.names(prefix), 'n < N')}[:, None]"

    def term(prefix: str, t: int, each: Term) -> str:
        by = "" if each[0] == ONE else f"{prefix}by_{t}"
        if each[1] is None:
            return by
        factor = printer.text(each[1], product.names(prefix), "n < N", column_mask(columns))
        return f"{by} * {factor}" if by else factor

    for field in range(columns.fields):
        inside = "m < M" if columns.packed else f"(m < M) & (column_{field}[:, None] < K)"
        yield f"v = tl.load(x + m * x_row + column_{field}[:, None], mask={inside}, other=0)"
        if product.norm:
            masked = "" if columns.packed else f", mask=column_{field} < K, other=0"
            yield "v = v.to(tl.float32) * size"
            yield "if gain is not None:"
            yield f"    v *= tl.load(gain + column_{field}{masked}).to(tl.float32)[:, None] + offset"
            yield "else:"
            yield "    v *= offset + 1.0"
            yield "v = v.to(x.dtype.element_ty)"
        yield "n = rows[:, None]"
        for prefix in product.encodings:
            value = " + ".join(term(prefix, t, each) for t, each in enumerate(found[prefix][field]))
            yield f"w = ({value}).to(x.dtype.element_ty)"
            yield f'{prefix}acc = tl.dot(w, v, {prefix}acc, input_precision="ieee")'


def _partial(product: Product) -> Iterator[str]:
    for i, prefix in enumerate(product.encodings):
        place = f"part * stride + tl.full((), {i}, tl.int64) * M * N"
        yield f"tl.store(work + {place} + at, {prefix}acc, mask=inside)"


def _joined(product: Product) -> Iterator[str]:
    for prefix in product.encodings:
        yield f"{prefix}all = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)"
    yield "for s in range(0, SPLITS):"
    for i, prefix in enumerate(product.encodings):
        place = f"s * stride + tl.full((), {i}, tl.int64) * M * N"
        yield f'    {prefix}all += tl.load(work + {place} + at, mask=inside, other=0, cache_modifier=".cg")'
    yield from _done(product, "all")


def _done(product: Product, name: str = "acc") -> Iterator[str]:
    up = f"up_{name}" if product.up else "None"
    yield f"finish({name}, {up}, y, bias, residual, m, rows[:, None], N, inside, y_row)"
