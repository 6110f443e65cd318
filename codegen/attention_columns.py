"""Tile expressions as vectors over tokens: one number of 16 neighbouring tokens of a page in a vector.

A part that stores M numbers a token is first dealt: words of 16 tokens are moved so that a number's 16 instances lie
side by side. What such a vector is multiplied with then sums up without sums over its lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from ..ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, Take, n
from .printers.cpp import LANES, vector
from .ranges import fold

LANE = sympy.Symbol("lane", integer=True, nonnegative=True)
HALF = sympy.Symbol("half[h]", integer=True, nonnegative=True)  # tokens 16 * half … 16 * half + 15 of the page
DEALT = "_dealt"
MOST = 32  # words a token that are dealt


@dataclass(frozen=True)
class Columns:
    """Expressions over `lane`, and the numbers a token of each part that is dealt before: words, or halves."""

    exprs: tuple[Expr, ...]
    shifts: tuple[int, ...]  # each is to be multiplied by 2^-shift
    words: Mapping[str, int]
    halves: Mapping[str, int]
    codes: bool  # whether bytes are read

    def deal(self, names: Mapping[str, str], wide: int) -> list[str]:
        """C++ statements that deal the parts for 16 · `wide` tokens of tile `j`; `names`: the parts' pointers.

        Of `halves` times 16 tokens; what is behind them repeats the first.
        """
        halves = ", ".join(f"j * {wide} + (halves > {h} ? {h} : 0)" for h in range(wide))
        lines = [f"const int64_t half[{wide}] = {{{halves}}};"]
        for kind, ctype, dealt in (("words", "int32_t", self.words), ("halves", "uint16_t", self.halves)):
            for part, many in dealt.items():
                name, size = names[part], LANES * many
                at = f"(const {ctype}*){name} + half[h] * {size}"
                lines.append(f"alignas(64) {ctype} {name}{DEALT}[{wide}][{size}];")
                lines.append(f"for (int h = 0; h < {wide}; h++) deal_{kind}<{many}>({at}, {name}{DEALT}[h]);")
        return lines

    def print(self, names: Mapping[str, str]) -> list[str]:
        """Each expression as a C++ vector, of the 16 tokens `h` of those that were dealt."""
        held = {**names, **{part + DEALT: f"{names[part]}{DEALT}[h]" for part in (*self.words, *self.halves)}}
        return [vector(expr, LANE, {}, held) for expr in self.exprs]


def columns(exprs: Sequence[Expr], cap: int, shifts: bool = False) -> Columns | None:
    """The expressions over token `n` of a page of `cap` tokens as vectors over tokens; None where that has no form.

    `shifts`: fields of bits may stay where they are, if who multiplies with them takes the power of two.
    """
    if cap % LANES:
        return None
    spread = _Spread({}, {})
    try:
        found = tuple(spread.over(expr) for expr in exprs)
    except NotImplementedError:
        return None
    pairs = [_unshifted(expr) if shifts else (expr, 0) for expr in found]
    kept, powers = tuple(expr for expr, _ in pairs), tuple(power for _, power in pairs)
    return Columns(kept, powers, spread.words, spread.halves, spread.codes)


@dataclass
class _Spread:
    words: dict[str, int]
    halves: dict[str, int]
    codes: bool = False

    def over(self, expr: Expr) -> Expr:
        match expr:
            case Cast("int32", Load(part, index, "uint8")) if n in index.free_symbols:
                self.codes = True
                many, column = _row(index)
                held = Load(part + DEALT, LANES * (column // 4) + LANE, "int32")
                self._deal(self.words, part, many, 4)
                return _masked(_shifted(held, 8 * (column % 4)), 255)
            case Load(part, index, dtype):
                return self._load(part, sympy.sympify(index), dtype)
            case Bin("and", a, Const(mask)):
                return _masked(self.over(a), int(mask))
            case Bin("shr", a, (Index(by) | Const(by))) if sympy.sympify(by).is_Integer:
                return _shifted(self.over(a), int(by))
            case Bin(op, a, b):
                return Bin(op, self.over(a), self.over(b))
            case Take(part, size, at, dtype):
                return Take(part, size, self.over(at), dtype)
            case Cast(dtype, a):
                return Cast(dtype, self.over(a))
            case Const():
                return expr
        raise NotImplementedError(f"{expr} over tokens")

    def _load(self, part: str, index: sympy.Expr, dtype: str) -> Expr:
        if n not in index.free_symbols:
            return Load(part, index, dtype)
        try:
            many, column = _row(index)
        except NotImplementedError:
            uniform = fold(index.subs(n, LANES * HALF + LANE), {LANE: (0, LANES - 1)})
            if LANE in uniform.free_symbols:
                raise
            return Load(part, uniform, dtype)
        if dtype in ("float16", "bfloat16") and (many == 1 or many % 2 == 0):
            self._deal(self.halves, part, many, 2)
        elif dtype == "float32":
            self._deal(self.words, part, many, 1)
        else:
            raise NotImplementedError(f"{dtype} over tokens")
        return Load(part + DEALT, LANES * column + LANE, dtype)

    def _deal(self, dealt: dict[str, int], part: str, many: int, a_word: int) -> None:
        words = max(1, many // a_word)
        if (many % a_word and many > 1) or words & (words - 1) or words > MOST or (a_word == 4 and many < 4):
            raise NotImplementedError(f"{many} numbers a token")
        dealt[part] = many if a_word == 2 else words


def _unshifted(expr: Expr) -> tuple[Expr, int]:
    match expr:
        case Cast("float32", Bin("and", Bin("shr", a, Const(by)), Const(mask))) if int(mask) << int(by) < 1 << 31:
            return Cast("float32", Bin("and", a, Const(int(mask) << int(by), "int32"))), int(by)
    return expr, 0


def _row(index: sympy.Expr) -> tuple[int, int]:
    """(M, c) of an index M · n + c."""
    index = sympy.expand(sympy.sympify(index))
    many = index.coeff(n)
    column = sympy.expand(index - many * n)
    if not (many.is_Integer and column.is_Integer and 0 <= column < many):
        raise NotImplementedError(f"{index} over tokens")
    return int(many), int(column)


def _shifted(expr: Expr, by: int) -> Expr:
    match expr:
        case Bin("and", a, Const(mask)):
            return _masked(_shifted(a, by), int(mask) >> by)
        case Bin("shr", a, Const(before)):
            return _shifted(a, by + int(before))
    return Bin("shr", expr, Const(by, "int32")) if by else expr


def _masked(expr: Expr, mask: int) -> Expr:
    match expr:
        case Bin("and", a, Const(before)):
            return _masked(a, mask & int(before))
    return Bin("and", expr, Const(mask, "int32"))
