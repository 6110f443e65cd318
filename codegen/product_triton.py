"""A fused matrix product for the Triton kernels: what it computes, and how the columns of its weights are walked.

    y[M, N] = act(norm(x)[M, K] @ W[N, K]^T + bias[N]) (* norm(x) @ up[N, K]^T) (+ residual[M, N])

Codes lie packed: a byte holds columns k, k + 16, ... A tile therefore runs over packed columns, and the logical columns
of one packed column are its fields, unrolled: each byte is loaded once. Where scales are constant over a group, a tile
stays within one, so that they are one load a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy

from ..ir.encoding import Encoding
from ..ir.encoding.expr import Const, Expr, indices, k, loads, stored, substitute
from ..ir.errors import SmeltError
from .hoist import Term, folded, span, split
from .printers.torch import index

K = sympy.Symbol("K", integer=True, positive=True)
group = sympy.Symbol("group", integer=True, nonnegative=True)
POINTERS = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int64": "*i64", "int32": "*i32", "int16": "*i16",
    "int8": "*i8", "uint8": "*u8",
}  # fmt: skip
ONE = Const(1.0, "float32")
LEAST = 16  # packed columns of a tile: what tl.dot takes, and a vector of bytes
ACTIVATIONS = {
    None: "v",
    "silu": "v * tl.sigmoid(v)",
    "gelu": "v * 0.5 * (1 + tl.erf(v * 0.70710678118654752))",
    "gelu_tanh": "v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))",
    "relu": "tl.where(v < 0, 0.0, v)",  # NaN stays
}


@dataclass(frozen=True)
class Columns:
    """Where packed column k of a group lies: its field f is `span * group + period * (k // lanes) + lanes * f + k % lanes`.

    span: columns over which scales are constant; None: the walk knows no groups, and k runs over the whole row.
    """  # noqa: E501

    span: int | None
    period: int
    lanes: int

    @property
    def fields(self) -> int:
        """Logical columns of a packed one."""
        return self.period // self.lanes

    @property
    def packed(self) -> int | None:
        """Packed columns of a group."""
        return self.span // self.fields if self.span else None

    def at(self, field: int) -> sympy.Expr:
        """The logical column of a field."""
        inner = self.period * sympy.floor(k / self.lanes) + self.lanes * field + sympy.Mod(k, self.lanes)
        return (self.span * group if self.span else 0) + (inner if self.fields > 1 else k)

    def place_of(self, field: int) -> sympy.Expr:
        """`at` without a remainder, which Triton would not see to be contiguous over k."""
        return sympy.expand(self.at(field).subs(self._whole))

    @property
    def _whole(self) -> dict[sympy.Expr, sympy.Expr]:
        return {sympy.Mod(k, self.lanes): k - self.lanes * sympy.floor(k / self.lanes)} if self.fields > 1 else {}

    def place(self, expr: Expr, field: int) -> Expr:
        """The expression at a field, over `group` and packed k."""
        ranges = {k: (0, self.packed - 1)} if self.packed else {}
        return substitute(folded(substitute(expr, {k: self.at(field)}), ranges), self._whole)

    def block(self, columns: int) -> int:
        """Packed columns of a tile that should have so many logical ones: a power of two that divides the group."""
        most = max(LEAST, columns // self.fields)
        return most if self.packed is None else min(most, self.packed & -self.packed)


@dataclass(frozen=True)
class Product:
    """One fused product; bias, residual and the norm's weight may be there or not at every call.

    up: encoding of a second weight over the same x; the activated first product is multiplied by the second.
    norm: x is divided by its root mean square and multiplied by a weight first.
    act: one of ACTIVATIONS, applied to the (first) product.
    """

    encoding: Encoding
    up: Encoding | None = None
    norm: bool = False
    act: str | None = None

    def __post_init__(self) -> None:
        if self.act not in ACTIVATIONS:
            known = ", ".join(str(act) for act in ACTIVATIONS if act)
            raise SmeltError(f"a product has no activation '{self.act}'; known: {known}")
        for encoding in self.encodings.values():
            if (dtype := encoding.expr((None, K)).dtype) != "float32":
                raise SmeltError(f"a product does not cover {encoding}: its values are {dtype}, not float32")

    def __str__(self) -> str:
        """Norm, encoding and epilogue, in the order in which they apply."""
        words = ["rms_norm" if self.norm else "", str(self.encoding), self.act or "", f"* {self.up}" if self.up else ""]
        return " ".join(word for word in words if word)

    @property
    def encodings(self) -> dict[str, Encoding]:
        """The weights' encodings by the prefix of their parts and variables."""
        return {"": self.encoding} | ({} if self.up is None else {"up_": self.up})

    @cached_property
    def exprs(self) -> dict[str, Expr]:
        """The weights' values by prefix, over rows n and columns k."""
        return {prefix: encoding.expr((None, K)) for prefix, encoding in self.encodings.items()}

    @cached_property
    def columns(self) -> Columns:
        """The walk that suits all weights."""
        exprs = tuple(self.exprs.values())
        groups = [length for expr in exprs if (length := span(expr)) is not None]
        if groups:
            walk = _packing(exprs, math.gcd(*groups))
            if walk.packed is not None and walk.packed & -walk.packed >= LEAST:
                return walk
        return _packing(exprs, None)

    @cached_property
    def parts(self) -> dict[str, str]:
        """Storage types of the weights' parts by the name of their argument."""
        return {prefix + part: dtype for prefix, expr in self.exprs.items() for part, dtype in stored(expr).items()}

    def names(self, prefix: str) -> dict[str, str]:
        """Arguments by part, for the printer."""
        return {part: prefix + part for part in stored(self.exprs[prefix])}


def _packing(exprs: Sequence[Expr], length: int | None) -> Columns:
    """The walk whose fields share the most loads; the shortest such period."""
    found = {
        int(divisor)
        for expr in exprs
        for index in indices(expr)
        for atom in index.atoms(sympy.floor, sympy.Mod)
        if k in atom.free_symbols
        and (divisor := atom.args[1] if atom.func is sympy.Mod else sympy.fraction(sympy.together(atom.args[0]))[1])
        .is_Integer
    }  # fmt: skip
    best, fewest = Columns(length, 1, 1), float(_distinct(exprs, Columns(length, 1, 1)))
    for period in sorted(found):
        for lanes in sorted(found):
            walk = Columns(length, period, lanes)
            if lanes >= period or period % lanes or lanes % LEAST or (length and length % period):
                continue
            if (count := _distinct(exprs, walk) / walk.fields) < fewest:
                best, fewest = walk, count
    return best


def _distinct(exprs: Sequence[Expr], walk: Columns) -> int:
    """Different loads that a packed column takes, those that are constant over a tile left out."""
    placed = {
        (number, load)
        for number, expr in enumerate(exprs)
        for field in range(walk.fields)
        for load in loads(walk.place(expr, field))
    }
    return sum(k in load.index.free_symbols for _, load in placed)


def arguments(
    product: Product, dtype: str, bias: bool, residual: bool, splits: int, sizes: Sequence[str], sides: Sequence[str]
) -> dict[str, str]:
    """Triton's type of every argument of a product's kernel: `sizes` are integers, `sides` known when it compiles."""
    there = {True: POINTERS[dtype], False: "constexpr"}
    return {
        **{part: POINTERS[stored] for part, stored in product.parts.items()},
        "x": POINTERS[dtype], "y": POINTERS[dtype],
        **({"gain": POINTERS[dtype], "eps": "fp32", "offset": "fp32"} if product.norm else {}),
        "bias": there[bias], "residual": there[residual],
        "work": "*fp32" if splits > 1 else "constexpr", "arrived": "*i32" if splits > 1 else "constexpr",
        **dict.fromkeys(sizes, "i32"),
        **dict.fromkeys(sides, "constexpr"),
    }  # fmt: skip


def walk(columns: Columns) -> Iterator[str]:
    """Lines that set k (and the group that it lies in) for step `step`, and the column of each field."""
    if columns.packed:
        # pieces by number, not the remainder of a column: triton 3.6 then sees that a piece begins at its multiple
        yield f"group = step // ({columns.packed} // BLOCK_C)"
        yield f"k = step % ({columns.packed} // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)"
    else:
        yield "k = step * BLOCK_C + tl.arange(0, BLOCK_C)"
    for field in range(columns.fields):
        yield f"column_{field} = {index(columns.place_of(field))}"
    yield "k = k[None, :]"


def terms(product: Product, prefix: str) -> list[list[Term]]:
    """What each field adds, as coefficient times factor; the coefficients are those of the first field.

    Coefficients are loaded as vectors [BLOCK_N]: a tile [BLOCK_N, 1] would be loaded once for every column that a
    thread holds by triton 3.6.
    """
    columns = product.columns
    placed = [columns.place(product.exprs[prefix], field) for field in range(columns.fields)]
    found = [split(expr, {k}) for expr in placed]
    if all([by for by, _ in each] == [by for by, _ in found[0]] for each in found):
        return found
    return [[(ONE, expr)] for expr in placed]


def column_mask(columns: Columns) -> str:
    """The mask of the weights' columns; a walk by groups never leaves the row."""
    return "" if columns.packed else "column_0[None, :] < K"


def whole(columns: Columns) -> str:
    """A line that shows Triton what the length of a row is a multiple of, so that it sees aligned vectors."""
    unit = columns.span & -columns.span if columns.span else 1
    return f"\n    K = K // {unit} * {unit}" if unit > 1 else ""


def lines(depth: int, lines: Iterable[str]) -> str:
    """Text lines at a depth of indentation."""
    return "\n".join("    " * depth + line for line in lines)


def finish(product: Product) -> str:
    """The function `finish` of a kernel: bias, activation, gate and residual of a tile, and its store."""
    steps = [f"v = {ACTIVATIONS[product.act]}"] * (product.act is not None) + ["v *= up"] * (product.up is not None)
    return _FINISH.format(steps="".join(f"    {step}\n" for step in steps))


_FINISH = """\
@triton.jit
def finish(v, up, y, bias, residual, m, n, N, inside, y_row):
    if bias is not None:
        v += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
{steps}    at = m * y_row + n
    if residual is not None:
        v += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)
"""
