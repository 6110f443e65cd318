"""Matrix products with stored weights: `y = x W^T` for any encoding, with what comes before and behind it.

Weights stand interleaved (see `interleave`), so that a vector's lanes are rows of W. The encoding's tile expression is
split into a factor that changes along a row and coefficients that are constant over a group, which leave the inner
loop. Two forms: `floats`, where the factor is multiplied with float32 activations; and `integers`, where activations
are 8-bit codes in groups and the factor is an 8-bit code too: four products an instruction and lane, exact sums, one
multiplication by both scales a group.

Every row of x is reduced in one order whatever M is, so that a token gets the same bits alone and as a node of a tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from ..ir.encoding import Encoding
from ..ir.encoding.expr import Bin, Cast, Const, Expr, k, loads, stored, substitute
from ..ir.errors import SmeltError
from . import choose, interleave, planes, walk
from .hoist import folded
from .interleave import lane
from .loops import LANES, Inner, K, column, floats, integers
from .memo import remembered
from .printers import cpp
from .product_template import CHOSEN, TEMPLATE, WRITTEN
from .ranges import Ranges, across, fold
from .rows_source import MATH
from .unit import Function

BLOCK = 8  # rows of x at once; rows of 8-bit activations stand side by side by so many, four columns each
SINGLE = 4  # tiles that one row of x reads at once; more rows read fewer
SIZES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Spec:
    """What a product's kernel is generated for: one or two matrices over one x, and a chain behind them.

    `width`: columns of a group of 8-bit activations, None for float32. `lines`: C++ over the sums `v0` (and `v1`) and
    the operands `o0`, `o1`, … behind which `value` is the result; `operands`: whether each has a row for each of x's.
    `head`: the results are logits, from which a token may be chosen at once (see `choose`).
    """

    encoding: Encoding
    matrices: int = 1
    width: int | None = None
    lines: tuple[str, ...] = ()
    value: str = "v0"
    operands: tuple[bool, ...] = ()
    head: bool = False

    @property
    def inner(self) -> Inner:
        """The loop; SmeltError where the encoding has none."""
        found = floats(self.encoding) if self.width is None else integers(self.encoding, self.width)
        if isinstance(found, str):
            raise SmeltError(f"gemv does not cover {self.encoding}: {found}")
        return found


def parts(encoding: Encoding) -> dict[str, str]:
    """What a kernel is given of a weight, and the type of its elements there, in order."""
    return walk.walked(encoding) or stored(planes.beside(encoding.expr((None, K))))


def pack(
    encoding: Encoding, held: Mapping[str, torch.Tensor], rows: int, hold: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parts of a matrix of so many rows as the kernel reads them; `hold` as in `interleave`."""
    if ordered := walk.walked(encoding):
        return {part: hold(held[part]) for part in ordered}
    expr = encoding.expr((None, K))
    return interleave.pack(planes.beside(expr), planes.moved(expr, held), rows, hold)


@functools.cache
def function(spec: Spec, label: str) -> Function:
    """The kernel of a spec.

    Words: M, K, x, its scales, its sums, tiles of a unit, units, the `Choice` of a head; then for each product of the
    call: units, N, out (null: nobody reads it), row length of out, its parts with the units of their rows, and its
    operands with their row lengths.
    """
    text = remembered(str(spec), spec.encoding, lambda: source(spec))
    needs = choose.NEEDS if spec.head else (MATH,)
    return Function.of(label, text, (*needs, walk.text(spec.encoding)) if walk.walked(spec.encoding) else needs)


def source(spec: Spec) -> str:
    """The C++ of a product."""
    inner = spec.inner
    names, declared = [], []
    at = 4
    for m in range(spec.matrices):
        named = {}
        for part, dtype in parts(spec.encoding).items():
            named[part] = f"p_{part}{m}"
            declared.append(f"const {cpp.CTYPES[dtype]}* p_{part}{m} = (const {cpp.CTYPES[dtype]}*)w[{at}];")
            if m == 0 and not inner.walked:  # the second matrix has rows of the same length
                declared.append(f"const int64_t {interleave.length(part)} = w[{at + 1}];")
                declared.append(f"const Ahead<S, {cpp.CTYPES[dtype]}> ahead_{part}(w[{at + 1}], again);")
            at += 2
        names.append(named)
    operands = []
    for i, by_row in enumerate(spec.operands):
        row = f" + (m + b) * w[{at + 1}]" if by_row else ""
        operands.append(f"const f32x16 o{i} = read((const float*)w[{at}]{row} + 16 * tile, left);")
        at += 2
    body = (_integers if spec.width is not None else _floats)(spec, inner, names)
    lines = [*(f"const f32x16 v{m} = sums[{m} * apart + b];" for m in range(spec.matrices)), *operands, *spec.lines]
    own = inner.walked or inner.places or len(inner.factors) > 1  # registers that no other tile can share
    return TEMPLATE.format(
        title=f"{spec.encoding.form}{'' if spec.width is None else f', int8 activations in groups of {spec.width}'}",
        declared="\n  ".join(declared),
        words=at,
        many=BLOCK,
        matrices=spec.matrices,
        widest=1 if own or inner.columns else 2,  # sums of groups need as many registers again
        beside=1 if own else 2,
        single=1 if own and not inner.places else SINGLE,
        body=body,
        epilogue="\n    ".join(lines),
        result=CHOSEN.format(value=spec.value) if spec.head else WRITTEN.format(value=spec.value),
    )


def _integers(spec: Spec, inner: Inner, names: Sequence[dict[str, str]]) -> str:
    width, ranges = inner.columns, inner.ranges
    assert width is not None
    out = [
        f"  const int64_t groups = K / {width};",
        "  const int8_t* x = (const int8_t*)c[3] + m / W * W * K + m % W * 4;  // [M / W, K / 4, W, 4]",
        "  const float* scales = (const float*)c[4] + m / W * W * groups + m % W;  // [M / W, groups, W]",
        "  const int32_t* sums = (const int32_t*)c[5] + m / W * W * groups + m % W;",
    ]
    for m in range(spec.matrices):  # one after the other: their sums would not fit the registers together
        out += [
            f"  f32x16 acc{m}[S][B] = {{}};",
            "  for (int64_t group = 0; group < groups; group++) {",
            "    i32x16 sum[S][B];",
            f"    EACH(b, B) EACH(s, S) sum[s][b] = {-inner.offset} * sums[group * W + b] - i32x16{{}};",
            f"    for (int64_t step = 0; step < {width // inner.length}; step++) {{",
            f"      const int8_t* xs = x + (group * {width} + step * {inner.length}) * W;",
            *_ahead(inner, names[m]),
        ]
        for i in range(0, inner.length, 4):
            code = cpp.byte_lanes(inner.at(inner.factors[0], i), lane, ranges, names[m])
            out += [
                f"      {{ u8x64 code[S]; TILES code[s] = {code};",
                f"        EACH(b, B) {{ const int32_t four = quad(xs + {i} * W + 4 * b);",
                "          EACH(s, S) sum[s][b] = dot4(sum[s][b], code[s], four); } }",
            ]
        out += [
            "    }",
            "    TILES {",
            f"      const f32x16 scale = {cpp.vector(inner.coefficients[0], lane, LANES, names[m])};",
        ]
        if inner.constant is not None:
            out.append(f"      const f32x16 shift = {cpp.vector(inner.constant, lane, LANES, names[m])};")
        out += [
            "      EACH(b, B) {",
            "        const float by = scales[group * W + b];",
            f"        acc{m}[s][b] = fma(__builtin_convertvector(sum[s][b], f32x16), scale * by, acc{m}[s][b]);",
        ]
        if inner.constant is not None:
            out.append(f"        acc{m}[s][b] = fma(shift, splat(by * (float)sums[group * W + b]), acc{m}[s][b]);")
        out += ["      }", "    }", "  }", f"  EACH(s, S) EACH(b, B) done[{m}][s][b] = acc{m}[s][b];"]
    return "\n".join(out)


def _floats(spec: Spec, inner: Inner, names: Sequence[dict[str, str]]) -> str:
    ranges, length, terms = inner.ranges, inner.length, range(len(inner.factors))
    held = f"K * {inner.kept} / {inner.of}" if inner.places else "K"
    at = f"group * columns + step * {length}"
    at = f"({at}) / {inner.kept} * {inner.of}" if inner.places else at
    columns = str(inner.columns) if inner.columns else f"({held} / {length} * {length})"
    out = [
        f"  const int64_t columns = {columns}, groups = {f'{held} / {inner.columns}' if inner.columns else '1'};",
        "  const float* x[B];  // where rows end, the last one again",
        "  EACH(b, B) x[b] = (const float*)c[3] + (m + b < c[1] ? m + b : c[1] - 1) * K;",
    ]
    for m in range(spec.matrices):
        out += [
            f"  f32x16 acc{m}[S][B] = {{}};",
            "  for (int64_t group = 0; group < groups; group++) {",
            *(
                [f"    {walk.struct(spec.encoding)} walk({', '.join(names[m].values())}, tiles[0], K);"]
                if inner.walked
                else []
            ),
            *(f"    f32x16 sum{t}[S][B] = {{}};" for t in terms),
            f"    for (int64_t step = 0; step < columns / {length}; step++) {{",
            "      const float* xs[B];  // of `x[b] + i` GCC would keep an address for each b and i, in memory",
            f"      EACH(b, B) xs[b] = x[b] + {at};",
            *(["      f32x16 read[4]; walk.next(read);"] if inner.walked else _ahead(inner, names[m])),
        ]
        for i in range(length):
            for t in terms:
                value = f"read[{i}]" if inner.walked else _decoded(inner.at(inner.factors[t], i), ranges, names[m])
                if inner.places:
                    picked = _picked(inner, i, names[m])
                    out.append(f"      TILES {{ const f32x16 v = {value};")
                    out.append(f"        EACH(b, B) sum{t}[s][b] = fma(v, {picked}, sum{t}[s][b]); }}")
                    continue
                out += [
                    f"      {{ f32x16 v[S]; TILES v[s] = {value};",
                    f"        EACH(b, B) {{ const f32x16 a = splat(xs[b][{i}]);",
                    f"          EACH(s, S) sum{t}[s][b] = fma(v[s], a, sum{t}[s][b]); }} }}",
                ]
        out.append("    }")
        out.append("    TILES {")
        for t in terms:
            out.append(f"      const f32x16 scale{t} = {cpp.vector(inner.coefficients[t], lane, LANES, names[m])};")
            out.append(f"      EACH(b, B) acc{m}[s][b] = fma(scale{t}, sum{t}[s][b], acc{m}[s][b]);")
        if inner.constant is not None:
            out.append(f"      const f32x16 shift = {cpp.vector(inner.constant, lane, LANES, names[m])};")
            out.append(
                f"      EACH(b, B) acc{m}[s][b] = "
                f"fma(shift, splat(total(x[b] + group * columns, columns)), acc{m}[s][b]);"
            )
        out += ["    }", "  }"]
        if inner.columns is None and length > 1 and not inner.walked and not inner.places:
            whole = interleave.rewritten(planes.beside(spec.encoding.expr((None, K))))
            whole = folded(substitute(whole, {k: column}), LANES)
            out += [
                "  for (int64_t column = columns; column < K; column++) TILES {  // a row's end that fills no piece",
                f"    const f32x16 v = {cpp.vector(whole, lane, LANES, names[m])};",
                f"    EACH(b, B) acc{m}[s][b] = fma(v, splat(x[b][column]), acc{m}[s][b]);",
                "  }",
            ]
        out.append(f"  EACH(s, S) EACH(b, B) done[{m}][s][b] = acc{m}[s][b];")
    return "\n".join(out)


def _picked(inner: Inner, i: int, names: dict[str, str]) -> str:
    """The activations that the column `i` of a piece is multiplied with, one that each row of a tile picks."""
    place = inner.at(inner.places[0], i)
    match place:
        case Bin("and", a, Const()):  # what lies above a place is not looked at
            at = cpp.low_bits(a, lane, inner.ranges, names)
        case _:
            at = cpp.vector(place, lane, inner.ranges, names)
    return f"pick<{inner.of}>(xs[b] + {i // inner.kept * inner.of}, {at})"


def _ahead(inner: Inner, names: dict[str, str]) -> list[str]:
    """Statements that fetch what the same piece of the loop will read some groups on, a cache line each.

    With eight rows of x between two lines of W the processor's own prefetch comes too late: 8 tokens of the 430 M shape
    take 9.7 ms by w4a8 and 23 in bfloat16, without these 13.9 and 32 (two Zen 5 cores, 2026-11-22).
    """
    lines: dict[tuple[str, sympy.Expr], dict[int, None]] = {}
    for i in range(inner.length):
        for factor in (*inner.factors, *inner.places):
            for load in loads(inner.at(factor, i)):
                wide = across(load.index, lane)
                if wide not in ("words", "contiguous") or load.part not in names:
                    continue
                at = sympy.expand(load.index.subs(lane, 0))
                if wide == "words":
                    at = sympy.expand(at - fold(sympy.Mod(at, 4), inner.ranges))
                elif i * SIZES[load.dtype] % 4:  # sixteen narrower elements are less than a line
                    continue
                more, start = at.as_coeff_Add()
                lines.setdefault((load.part, start), {})[int(more) * SIZES[load.dtype]] = None
    out = ["      if (!m || again) TILES {"]
    for (part, start), places in lines.items():
        out.append(f"        {{ const char* line = ahead_{part}({names[part]}, {cpp.index(start)}, tile);")
        out.append(" ".join(["         ", *(f"__builtin_prefetch(line + {place});" for place in places), "}"]))
    return [*out, "      }"]


def _decoded(factor: Expr, ranges: Ranges, names: dict[str, str]) -> str:
    """A factor as a vector. A code of at most 4 bits is looked up, where that is one instruction."""
    plain = cpp.vector(factor, lane, ranges, names)
    found = _small(factor, ranges, names)
    if found is None:
        return plain
    word, values = found
    return f"DECODE({word}, ({plain}), {', '.join(f'{value!r}f' for value in values)})"


def _small(factor: Expr, ranges: Ranges, names: dict[str, str]) -> tuple[str, list[float]] | None:
    """(word, table) of a function of a code whose value is table[word & 15]: the word may hold more bits above."""
    match factor:
        case Bin("and", a, Const(mask)) if mask in (1, 3, 7, 15):
            return cpp.low_bits(a, lane, ranges, names), [float(i & int(mask)) for i in range(16)]
        case Bin("add", Bin("and", a, Const(3)), Bin("mul", Bin("and", b, Const(1)), Const(4))):
            if found := cpp.nibble(a, b, lane, ranges, names):
                word, low, high = found
                return word, [float((i >> low & 3) + 4 * (i >> high & 1)) for i in range(16)]
        case Bin("add" | "sub" | "mul" as op, a, Const(value)) if inner := _small(a, ranges, names):
            change = {"add": value, "sub": -value}.get(op)
            word, values = inner
            return word, [v + change if change is not None else v * value for v in values]
        case Cast("float32", a) if a.dtype == "int32":
            return _small(a, ranges, names)
    return None
