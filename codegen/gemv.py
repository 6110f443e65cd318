"""Matrix times few vectors on a CPU: `y[M, N] = x[M, K] @ W[N, K]^T (+ bias[N])` with W in any encoding it covers.

Activations and accumulation are float32. The encoding's tile expression is split into factors that change along a row
and coefficients that are constant over a group: the inner loop sums factor times x, sixteen columns a vector, and the
coefficients multiply once a group. One source an encoding; M, N and K are arguments.

Every row of x is reduced in one order (groups, then columns, then a pairwise sum of sixteen lanes) whatever M is, so
that a row's result does not depend on the batch it is in. All sums are of vectors: a scalar loop would leave it to the
compiler where to fuse a product into a sum. For M > 1 a weight vector is decoded once for up to four rows.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch

from ..ir.encoding import Encoding
from ..ir.encoding.expr import Expr, indices, k, loads, substitute
from ..ir.errors import SmeltError
from .build import build, threads
from .hoist import Term, folded, span, split
from .printers import cpp
from .ranges import Ranges, across

K = sympy.Symbol("K", integer=True, positive=True)
group, step, lane = sympy.symbols("group step lane", integer=True, nonnegative=True)


@dataclass(frozen=True)
class _Inner:
    """The loop over one group of columns: `vectors[j]` are the terms of columns 16*j .. 16*j+15 of a step."""

    columns: int | None  # in a group; None: the whole row
    vectors: tuple[tuple[Term, ...], ...]
    ranges: Ranges

    @property
    def coefficients(self) -> tuple[Expr, ...]:
        """One a term; the same for every vector of the group."""
        return tuple(coefficient for coefficient, _ in self.vectors[0])


def covers(encoding: Encoding, shape: tuple[int, ...]) -> str | None:
    """Why this kernel cannot serve a weight of that encoding and shape, or None."""
    if len(shape) != 2:
        return f"needs a weight [N, K], not {list(shape)}"
    if reason := encoding.refuses(shape):
        return reason
    inner = _inner(encoding.expr((None, K)))
    return inner if isinstance(inner, str) else None


def source(encoding: Encoding) -> str:
    """The C++ of the kernel, or SmeltError with the reason why there is none."""
    expr = encoding.expr((None, K))
    inner = _inner(expr)
    if isinstance(inner, str):
        raise SmeltError(f"gemv does not cover {encoding}: {inner}")
    return _TEMPLATE.format(prelude=cpp.PRELUDE, encoding=encoding, **_spliced(expr, inner))


def name(encoding: Encoding) -> str:
    """`gemv.affine4.g64`: the encoding with its bits, and its other options where they are not the default."""
    (kind, options), defaults = next(iter(encoding.spec().items())), inspect.signature(type(encoding)).parameters
    words = [kind + str(options.get("bits", ""))]
    for option, value in options.items():
        if option == "bits" or value == defaults[option].default:
            continue
        words.append(option if value is True else value if isinstance(value, str) else f"{option[0]}{value}")
    return ".".join(["gemv", *words])


@dataclass(frozen=True)
class Gemv:
    """The kernel of one encoding; `bind` builds it (or finds it built) and gives it a weight."""

    encoding: Encoding

    def bind(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> Bound:
        """The kernel over a weight's parts, which it keeps alive and reads in place.

        Raises SmeltError where the encoding or shape is not covered, or a part is not contiguous, not on the CPU, or
        of a wrong type or size.
        """
        if reason := covers(self.encoding, shape):
            raise SmeltError(f"gemv does not cover {self.encoding} of shape {list(shape)}: {reason}")
        stored = {load.part: load.dtype for load in loads(self.encoding.expr(shape))}
        kept = {part: parts[part] for part in stored}
        for part, tensor in kept.items():
            if str(tensor.dtype) != f"torch.{stored[part]}" or tensor.device.type != "cpu":
                raise SmeltError(f"gemv: part '{part}' is {tensor.dtype} on {tensor.device}, not {stored[part]} on cpu")
            if not tensor.is_contiguous():
                raise SmeltError(f"gemv: part '{part}' is not contiguous; bind part.contiguous()")
        nbytes = sum(tensor.numel() * tensor.itemsize for tensor in kept.values())
        if 8 * nbytes != self.encoding.bits(shape):
            raise SmeltError(f"gemv: the parts hold {8 * nbytes} bits, {self.encoding} of shape {list(shape)} has "
                             f"{self.encoding.bits(shape)}")  # fmt: skip
        library = build(source(self.encoding), name(self.encoding))
        return Bound(name(self.encoding), shape, nbytes, kept, library.gemv, threads())


class Bound:
    """A kernel with its weight; a call writes `out` and allocates nothing."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        nbytes: int,
        parts: Mapping[str, torch.Tensor],
        function: ctypes._NamedFuncPointer,
        threads: int,
    ) -> None:
        self.name, self.shape, self.nbytes = name, shape, nbytes
        self._parts = parts  # the kernel holds their addresses
        self._n, self._k = shape
        words = [part.data_ptr() for part in parts.values()] + [self._n, self._k, threads]
        self._weight = (ctypes.c_int64 * len(words))(*words)
        self._address = ctypes.c_void_p(ctypes.addressof(self._weight))
        pointer = ctypes.c_void_p
        function.argtypes, function.restype = [pointer, pointer, pointer, pointer, ctypes.c_int64], None
        self._call = function

    def __call__(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`out[M, N] = x[M, K] @ W^T + bias`; all float32 and contiguous. Raises SmeltError on anything else."""
        rows = x.numel() // self._k
        if (
            x.dtype is not torch.float32
            or out.dtype is not torch.float32
            or not x.is_contiguous()
            or not out.is_contiguous()
            or rows * self._k != x.numel()
            or rows * self._n != out.numel()
        ):
            raise SmeltError(
                f"{self.name}: needs contiguous float32 x [M, {self._k}] and out [M, {self._n}], not "
                f"{x.dtype} {list(x.shape)} and {out.dtype} {list(out.shape)}"
            )
        if bias is None:
            self._call(self._address, x.data_ptr(), out.data_ptr(), None, rows)
            return
        if bias.dtype is not torch.float32 or bias.numel() != self._n or not bias.is_contiguous():
            raise SmeltError(f"{self.name}: needs a contiguous float32 bias [{self._n}], not {bias.dtype}")
        self._call(self._address, x.data_ptr(), out.data_ptr(), bias.data_ptr(), rows)


def _inner(expr: Expr) -> _Inner | str:
    """The shortest step without a division left at which every load is a vector or one number, or why there is none."""
    if expr.dtype != "float32":
        return f"its values are {expr.dtype}, not float32"
    for load in loads(expr):
        if load.dtype not in cpp.VECTORS:
            return f"its part '{load.part}' is {load.dtype}"
    columns = span(expr)
    fitting = [length for length in (16, 32, 64, 128) if columns is None or columns % length == 0]
    for length in fitting:
        if inner := _steps(expr, columns, length):
            return inner
    return "its codes do not unpack to vectors of 16 neighbours" + (f" within groups of {columns}" if columns else "")


def _steps(expr: Expr, columns: int | None, length: int) -> _Inner | None:
    ranges = {lane: (0, 15)} | ({step: (0, columns // length - 1)} if columns else {})
    start = (columns * group if columns else 0) + length * step + lane
    vectors = []
    for j in range(0, length, 16):
        placed = folded(substitute(expr, {k: start + j}), ranges)
        if any(across(load.index, lane) == "scattered" for load in loads(placed)):
            return None
        if any(step in part.free_symbols for index in indices(placed) for part in index.atoms(sympy.floor, sympy.Mod)):
            return None
        vectors.append(tuple(split(placed, {step, lane})))
    inner = _Inner(columns, tuple(vectors), ranges)
    same = all(tuple(coefficient for coefficient, _ in terms) == inner.coefficients for terms in vectors)
    return inner if same else None


def _spliced(expr: Expr, inner: _Inner) -> dict[str, str]:
    """The places of the template, in C++."""
    stored = {load.part: load.dtype for load in loads(expr)}
    pointers = [f"const {cpp.CTYPES[dtype]}* {part};" for part, dtype in stored.items()]
    sums = [f"sum{t}" for t, (_, factor) in enumerate(inner.vectors[0]) if factor is not None]
    has_total = any(factor is None for _, factor in inner.vectors[0])
    body = []
    for j, terms in enumerate(inner.vectors):
        body.append(f"      for (int b = 0; b < B; b++) v[b] = load<f32x16>(x + b * K + at + {16 * j});")
        for t, (_, factor) in enumerate(terms):
            if factor is None:
                body.append("      for (int b = 0; b < B; b++) total[b] += v[b];")
                continue
            body.append("      for (int r = 0; r < R; r++) {")
            body.append("        const int64_t n = first + r;")
            body.append(f"        const f32x16 w = {cpp.vector(factor, lane, inner.ranges)};")
            body.append(f"        for (int b = 0; b < B; b++) sum{t}[r][b] = fma(w, v[b], sum{t}[r][b]);")
            body.append("      }")
    close = []
    for t, (coefficient, factor) in enumerate(inner.vectors[0]):
        close.append(f"      const f32x16 c{t} = splat({cpp.scalar(coefficient)});")
        right = "total[b]" if factor is None else f"sum{t}[r][b]"
        close.append(f"      for (int b = 0; b < B; b++) acc[r][b] = fma(c{t}, {right}, acc[r][b]);")
    length = 16 * len(inner.vectors)
    return {
        "pointers": " ".join(pointers),
        "locals": " ".join(f"const {cpp.CTYPES[dtype]}* {part} = weight.{part};" for part, dtype in stored.items()),
        "columns": str(inner.columns) if inner.columns else f"(K / {length} * {length})",
        "groups": f"K / {inner.columns}" if inner.columns else "1",
        "length": str(length),
        "sums": ", ".join(f"{each}[R][B] = {{}}" for each in sums) + (", total[B] = {}" if has_total else ""),
        "body": "\n".join(body),
        "close": "\n".join(close),
        "value": cpp.scalar(expr),
    }


_TEMPLATE = """\
// y[M, N] = x[M, K] @ W[N, K]^T (+ bias), W stored as {encoding}
{prelude}
struct Weight {{ {pointers} int64_t N, K, threads; }};

#ifdef __AVX512F__
enum {{ ROWS = 4, BATCH = 4 }};  // 16 sums in 32 registers of 64 bytes
#else
enum {{ ROWS = 2, BATCH = 2 }};
#endif

// R rows of W from `first` on, times B rows of x
template <int R, int B>
static void tile(const Weight& weight, int64_t first, const float* x, float* y, const float* bias) {{
  const int64_t N = weight.N, K = weight.K;
  {locals}
  const int64_t columns = {columns}, groups = {groups};
  f32x16 acc[R][B] = {{}};
  for (int64_t group = 0; group < groups; group++) {{
    f32x16 {sums}, v[B];
    for (int64_t step = 0; step < columns / {length}; step++) {{
      const int64_t at = group * columns + step * {length};
{body}
    }}
    for (int r = 0; r < R; r++) {{
      const int64_t n = first + r;
{close}
    }}
  }}
  for (int64_t at = columns * groups; at < K; at += 16) {{  // a row's end that fills no vector
    const int64_t left = K - at < 16 ? K - at : 16;
    f32x16 v[B];
    for (int b = 0; b < B; b++) {{
      v[b] = f32x16{{}};
      memcpy(&v[b], x + b * K + at, left * sizeof(float));
    }}
    for (int r = 0; r < R; r++) {{
      const int64_t n = first + r;
      float values[16] = {{}};
      for (int64_t k = at; k < at + left; k++) values[k - at] = {value};
      const f32x16 w = load<f32x16>(values);
      for (int b = 0; b < B; b++) acc[r][b] = fma(w, v[b], acc[r][b]);
    }}
  }}
  for (int r = 0; r < R; r++)
    for (int b = 0; b < B; b++) y[b * N + first + r] = sum(acc[r][b]) + (bias ? bias[first + r] : 0.0f);
}}

template <int R>
static void rows(const Weight& weight, int64_t first, const float* x, float* y, const float* bias, int64_t M) {{
  const int64_t N = weight.N, K = weight.K;
  int64_t m = 0;
  for (; m + BATCH <= M; m += BATCH) tile<R, BATCH>(weight, first, x + m * K, y + m * N, bias);
  for (; m < M; m++) tile<R, 1>(weight, first, x + m * K, y + m * N, bias);
}}

extern "C" void gemv(const Weight* weight, const float* x, float* y, const float* bias, int64_t M) {{
  const int64_t N = weight->N, blocks = (N + ROWS - 1) / ROWS;
  // below about 64 k products a thread's start costs more than it brings
  const int64_t useful = N * weight->K * M / 65536 + 1;
  const int threads = (int)(useful < weight->threads ? useful : weight->threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {{
    const int64_t first = block * ROWS;
    if (first + ROWS <= N)
      rows<ROWS>(*weight, first, x, y, bias, M);
    else
      for (int64_t n = first; n < N; n++) rows<1>(*weight, n, x, y, bias, M);
  }}
}}
"""
