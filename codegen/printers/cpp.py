"""Tile expressions as C++: one element at a time, or sixteen in the vector extensions that GCC and Clang share.

No intrinsics: a 64-byte vector compiles to AVX-512, to two AVX2 registers, to four NEON ones. A kernel's source is
`PRELUDE` of prelude.py, followed by code that contains expressions printed here.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ...ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, Scatter, Take
from ..ranges import Ranges, across, fold
from .index import text

LANES = 16
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "shr": ">>"}
# how a part is declared; both half precisions travel as their bits
CTYPES = {
    "float32": "float", "float16": "uint16_t", "bfloat16": "uint16_t",
    "int64": "int64_t", "int32": "int32_t", "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t",
}  # fmt: skip
VECTORS = {
    "float32": "f32x16", "float16": "u16x16", "bfloat16": "u16x16",
    "int32": "i32x16", "int16": "i16x16", "int8": "i8x16", "uint8": "u8x16",
}  # fmt: skip


def index(e: sympy.Expr) -> str:
    """A nonnegative integer expression in C++ (int64_t where its symbols are)."""
    return text(e, "/")


def scalar(expr: Expr, names: Mapping[str, str] | None = None) -> str:
    """One element; `names` maps a part to its pointer in the kernel (its own name when left out)."""
    match expr:
        case Load(part, at, _):
            return f"{(names or {}).get(part, part)}[{index(at)}]"
        case Take(part, _, at, _):
            return f"{(names or {}).get(part, part)}[{scalar(at, names)}]"
        case Const(value, dtype):
            return _literal(value, dtype)
        case Index(value):
            return f"(int32_t)({index(value)})"
        case Bin(op, a, b):
            return f"({scalar(a, names)} {OPERATORS[op]} {scalar(b, names)})"
        case Cast(to, a):
            return _cast_scalar(to, a.dtype, scalar(a, names))
        case Scatter(_, _, _, place):
            pairs = ((scalar(at, names), scalar(value, names)) for at, value in expr.entries)
            return f"({' + '.join(f'({at} == {index(place)} ? {value} : 0.0f)' for at, value in pairs)})"


def vector(expr: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str] | None = None) -> str:
    """Sixteen elements, `lane` = 0..15, as a vector; what does not vary over the lanes is computed once and spread."""
    value, varies = _vector(expr, lane, {**ranges, lane: (0, LANES - 1)}, names or {})
    if varies:
        return value
    return f"splat({value})" if expr.dtype == "float32" else f"({value} - {VECTORS[expr.dtype]}{{}})"


def _vector(expr: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str]) -> tuple[str, bool]:
    """The text, and whether it is a vector or a scalar that holds for every lane."""
    match expr:
        case Load(part, at, dtype):
            name, at = names.get(part, part), fold(at, ranges)
            match across(at, lane):
                case "uniform":
                    return f"{name}[{index(at)}]", False
                case "contiguous":
                    return f"load<{VECTORS[dtype]}>({name} + {index(at - lane)})", True
            each = (f"{name}[{index(fold(at.subs(lane, i), ranges))}]" for i in range(LANES))
            return f"{VECTORS[dtype]}{{{', '.join(each)}}}", True
        case Take(part, size, at, dtype):
            position, varies = _vector(at, lane, ranges, names)
            table = names.get(part, part)
            return (f"take_{dtype}<{size}>({table}, {position})" if varies else f"{table}[{position}]"), varies
        case Index(value):
            value = fold(value, ranges)
            if across(value, lane) == "uniform":
                return f"(int32_t)({index(value)})", False
            each = (f"(int32_t)({index(fold(value.subs(lane, i), ranges))})" for i in range(LANES))
            return f"i32x16{{{', '.join(each)}}}", True
        case Const(number, dtype):
            return _literal(number, dtype), False
        case Bin(op, a, b):
            (left, left_varies), (right, right_varies) = (_vector(side, lane, ranges, names) for side in (a, b))
            return f"({left} {OPERATORS[op]} {right})", left_varies or right_varies
        case Cast(to, Load() as load) if word := _word(load, lane, ranges, names):
            return _cast_vector(to, "int32", word), True
        case Cast(to, a):
            operand, varies = _vector(a, lane, ranges, names)
            return (_cast_vector if varies else _cast_scalar)(to, a.dtype, operand), varies
        case Scatter():
            return _scattered(expr, lane, ranges, names), True


def _scattered(expr: Scatter, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str]) -> str:
    """Every slot's value in the lanes whose place it names: a comparison and a mask."""
    terms = []
    place, moves = _vector(Index(expr.place), lane, ranges, names)
    for at, value in expr.entries:
        index, varies = _vector(at, lane, ranges, names)
        number, many = _vector(value, lane, ranges, names)
        same = f"{index} == {place}" if varies or moves else f"(i32x16{{}} + {index}) == {place}"
        terms.append(f"(f32x16)(({same}) & (i32x16){number if many else f'splat({number})'})")
    return f"({' + '.join(terms)})"


def low_bits(expr: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str] | None = None) -> str:
    """An int32 expression as a vector of which only the low bits count: what lies above need not be cut off."""
    found = _shifted(expr, lane, ranges, names)
    return vector(expr, lane, ranges, names) if found is None else _shift(*found)


def nibble(
    low: Expr, high: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str] | None = None
) -> tuple[str, int, int] | None:
    """Two bits of one word and one of another as low bits of a vector, and where among its lowest four each begins.

    None where they are not words of the lanes' own, or the bits are not within one nibble and apart.
    """
    lower, upper = (_shifted(each, lane, ranges, names) for each in (low, high))
    if lower is None or upper is None:
        return None
    at, bit = (fold(sympy.Mod(shift, 4), ranges) for _, shift in (lower, upper))
    start = sympy.expand(lower[1] - at)
    if start != sympy.expand(upper[1] - bit) or at not in (0, 1, 2) or bit not in {0, 1, 2, 3} - {at, at + 1}:
        return None
    word = f"either({0x11111111 << int(bit):#x}, {upper[0]}, {lower[0]})"
    return _shift(word, start), int(at), int(bit)


def _shift(word: str, by: sympy.Expr) -> str:
    return word if by == 0 else f"({word} >> (int32_t)({index(by)}))"


def _shifted(
    expr: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str] | None
) -> tuple[str, sympy.Expr] | None:
    """A byte, shifted to the right, as a shift of the word that each lane has of its own; None where it has none."""
    shift: sympy.Expr = sympy.Integer(0)
    match expr:
        case Bin("shr", Cast("int32", Load() as load), (Index() | Const()) as by):
            shift = sympy.sympify(by.value)
        case Cast("int32", Load() as load):
            pass
        case _:
            return None
    at, shift = fold(load.index, ranges), fold(shift, ranges)
    if load.dtype != "uint8" or across(at, lane) != "words" or lane in shift.free_symbols:
        return None
    first = fold(at.subs(lane, 0), ranges)
    within = fold(sympy.Mod(first, 4), ranges)
    word = f"load_words({(names or {}).get(load.part, load.part)} + {index(sympy.expand(first - within))})"
    return word, fold(8 * within + shift, ranges)


def _word(load: Load, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str]) -> str | None:
    """One byte of the 32-bit word that each lane has of its own, as int32, or None for a load of another kind."""
    at = fold(load.index, ranges)
    if load.dtype not in ("uint8", "int8") or across(at, lane) != "words":
        return None
    first = fold(at.subs(lane, 0), ranges)
    within = fold(sympy.Mod(first, 4), ranges)
    word = f"load_words({names.get(load.part, load.part)} + {index(sympy.expand(first - within))})"
    if load.dtype == "uint8":
        return f"({word} >> (int32_t)({index(8 * within)}) & 255)"
    return f"({word} << (int32_t)(24 - {index(8 * within)}) >> 24)"


def byte_lanes(expr: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str] | None = None) -> str | None:
    """An int32 expression in 0..255 as 64 bytes, or None if it is no such thing.

    Byte 4 * i + j is the value at lane i and at the j-th of four neighbouring columns: `expr` holds the first of them,
    whose bytes must be the low ends of words that the lanes have of their own.
    """
    match expr:
        case Cast("int32", Load(part, at, "uint8")):
            at = fold(at, ranges)
            if across(at, lane) != "words" or fold(sympy.Mod(at.subs(lane, 0), 4), ranges) != 0:
                return None
            return f"load_bytes({(names or {}).get(part, part)} + {index(fold(at.subs(lane, 0), ranges))})"
        case Bin("and", a, Const(mask)) if 0 <= mask <= 255:
            inner = byte_lanes(a, lane, ranges, names)
            return inner and f"({inner} & {int(mask)})"
        case Bin("shr", a, (Index() | Const()) as by):
            shift = fold(sympy.sympify(by.value), ranges)
            inner = byte_lanes(a, lane, ranges, names)
            if inner is None or not shift.is_Integer:
                return None
            return inner if shift == 0 else f"({inner} >> {int(shift)})"
    return None


def _literal(value: float, dtype: str) -> str:
    if dtype != "float32":
        return str(int(value))
    return f"{float(value)!r}f"


def _cast_scalar(to: str, source: str, value: str) -> str:
    if source in ("float16", "bfloat16"):
        return _half(to, source, value)
    return value if to == source else f"({CTYPES[to]}){value}"


def _cast_vector(to: str, source: str, value: str) -> str:
    if source in ("float16", "bfloat16"):
        return _half(to, source, value)
    if source in ("uint8", "int8"):
        value, source = f"widen({value})", "int32"
    return value if to == source else f"__builtin_convertvector({value}, {VECTORS[to]})"


def _half(to: str, source: str, value: str) -> str:
    if to != "float32":
        raise NotImplementedError(f"{source} converts to float32 only, not {to}")
    return f"{'f16' if source == 'float16' else 'bf16'}_to_f32({value})"
