"""What a node yields, in the text form: `f32[B, T, 256]`, `int(B*T)` for a size, `(…, …)` for several results."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ..shapes import symbol
from .lexer import Reader

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_DTYPES |= {name: dtype for dtype, name in _SHORT.items()}
_FUNCTIONS: dict[str, Any] = {
    "floor": sympy.floor, "ceiling": sympy.ceiling, "Mod": sympy.Mod, "Max": sympy.Max, "Min": sympy.Min,
}  # fmt: skip
_ARITIES = {"floor": (1,), "ceiling": (1,), "Mod": (2,), "Max": range(2, 9), "Min": range(2, 9)}
_LARGEST_EXPONENT = 8  # so that a short text cannot ask for astronomic numbers


def show_type(meta: dict[str, Any]) -> str | None:
    """The type in a node's meta, or None where shapes were not derived."""
    if "shape" not in meta:
        return None
    if "value" in meta:
        return f"int({meta['value']})"
    return _show(meta["shape"], meta["dtype"])


def _show(shape: Any, dtype: Any) -> str:
    if isinstance(dtype, tuple):
        return "(" + ", ".join(_show(s, d) for s, d in zip(shape, dtype, strict=True)) + ")"
    return f"{_SHORT.get(dtype, str(dtype))}[{', '.join(map(str, shape))}]"


def read_type(reader: Reader) -> dict[str, Any]:
    """The meta entries `shape`, `dtype` and, for a size, `value`."""
    if reader.accept("int"):
        reader.expect("(")
        value = _dim(reader)
        reader.expect(")")
        return {"shape": (), "dtype": torch.int64, "value": value}
    shape, dtype = _read(reader)
    return {"shape": shape, "dtype": dtype}


def _read(reader: Reader) -> tuple[Any, Any]:
    if reader.accept("("):
        members = [_read(reader) for _ in reader.items(")")]
        return tuple(shape for shape, _ in members), tuple(dtype for _, dtype in members)
    token = reader.kind("word")
    if token.text not in _DTYPES:
        reader.fail(f"unknown type '{token.text[:40]}'; known: {', '.join(_SHORT.values())}", token.at)
    reader.expect("[")
    return tuple(_dim(reader) for _ in reader.items("]")), _DTYPES[token.text]


def _dim(reader: Reader) -> Any:
    """A size: an int, or a sympy expression over symbols."""
    at = reader.peek().at
    try:
        size = _sum(reader)
    except (TypeError, ValueError, ArithmeticError) as fault:  # such as Mod(T, 0)
        reader.fail(f"not a size ({fault})", at)
    if size.has(sympy.nan, sympy.zoo, sympy.oo):
        reader.fail("not a size: it is infinite or undefined", at)
    return int(size) if size.is_Integer else size


def _sum(reader: Reader) -> Any:
    total = _product(reader)
    while True:
        if reader.accept("+"):
            total += _product(reader)
        elif reader.accept("-"):
            total -= _product(reader)
        else:
            return total


def _product(reader: Reader) -> Any:
    product = _signed(reader)
    while True:
        if reader.accept("*"):
            product *= _signed(reader)
        elif reader.accept("/"):
            product /= _signed(reader)
        else:
            return product


def _signed(reader: Reader) -> Any:
    if not reader.accept("-"):
        return _power(reader)
    with reader.nested():
        return -_signed(reader)


def _power(reader: Reader) -> Any:
    base = _atom(reader)
    if not reader.accept("**"):
        return base
    at, exponent = reader.peek().at, reader.integer()
    huge = any(abs(number.p) >> 63 for number in base.atoms(sympy.Rational))
    if exponent > _LARGEST_EXPONENT or base.is_Number or base.has(sympy.Pow) or huge:
        reader.fail(f"not the power of a size: of a number or a power, or above {_LARGEST_EXPONENT}", at)
    return base**exponent


def _atom(reader: Reader) -> Any:
    if reader.peek().kind == "number":
        return sympy.Integer(reader.integer())
    if reader.accept("("):
        with reader.nested():
            inner = _sum(reader)
        reader.expect(")")
        return inner
    token = reader.kind("word")
    if token.text not in _FUNCTIONS:
        return symbol(token.text)
    reader.expect("(")
    arguments = [_sum(reader) for _ in reader.items(")")]
    if len(arguments) not in _ARITIES[token.text]:
        reader.fail(f"{token.text} of {len(arguments)} arguments", token.at)
    return _FUNCTIONS[token.text](*arguments)
