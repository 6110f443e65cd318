"""ONNX's recurrent layers RNN, GRU and LSTM, step by step over a length that is known.

Shapes: x [T, B, I] (layout 1: [B, T, I]), w [D, gates H, I], r [D, gates H, H], b [D, 2 gates H] with D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ....errors import SmeltError
from ..registry import Tensor, op

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]  # h, and c of an LSTM: [B, H]
Cell = Callable[[Tensor, State], State]

_ACTIVATIONS: dict[str, Callable[[Tensor, float | None, float | None], Tensor]] = {
    "relu": lambda x, a, b: torch.relu(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "affine": lambda x, a, b: (1.0 if a is None else a) * x + (b or 0.0),
    "leakyrelu": lambda x, a, b: F.leaky_relu(x, 0.01 if a is None else a),
    "thresholdedrelu": lambda x, a, b: torch.where(x > (1.0 if a is None else a), x, torch.zeros_like(x)),
    "scaledtanh": lambda x, a, b: (1.0 if a is None else a) * torch.tanh((1.0 if b is None else b) * x),
    "hardsigmoid": lambda x, a, b: ((0.2 if a is None else a) * x + (0.5 if b is None else b)).clamp(0, 1),
    "elu": lambda x, a, b: F.elu(x, 1.0 if a is None else a),
    "softsign": lambda x, a, b: x / (1 + x.abs()),
    "softplus": lambda x, a, b: torch.logaddexp(x, torch.zeros_like(x)),
}


@dataclass(frozen=True)
class _Options:
    """What the three layers have in common."""

    default: tuple[str, ...]
    activation_alpha: Sequence[float] | None
    activation_beta: Sequence[float] | None
    activations: Sequence[str] | None
    clip: float | None
    direction: str
    layout: int

    @property
    def directions(self) -> int:
        if self.direction not in ("forward", "reverse", "bidirectional"):
            raise SmeltError(f"no direction {self.direction!r}; there are forward, reverse and bidirectional")
        return 2 if self.direction == "bidirectional" else 1

    def functions(self, d: int) -> list[Activation]:
        """The activation functions of direction `d`, each behind the clip."""
        names = [n.lower() for n in self.activations or self.default * self.directions]
        if unknown := [n for n in names if n not in _ACTIVATIONS]:
            raise SmeltError(f"no activation {unknown[0]!r} in a recurrent layer; there are {sorted(_ACTIVATIONS)}")
        count = len(self.default)
        return [self._function(names, i) for i in range(d * count, (d + 1) * count)]

    def _function(self, names: list[str], i: int) -> Activation:
        alpha = self.activation_alpha[i] if self.activation_alpha and i < len(self.activation_alpha) else None
        beta = self.activation_beta[i] if self.activation_beta and i < len(self.activation_beta) else None
        function, clip = _ACTIVATIONS[names[i]], self.clip

        def activated(x: Tensor) -> Tensor:
            return function(x if clip is None else x.clamp(-clip, clip), alpha, beta)

        return activated


def _run(cells: list[Cell], x: Tensor, starts: list[State], lengths: Tensor | None, options: _Options) -> State:
    """All steps of all directions: the outputs [T, D, B, H] and each last state [D, B, H]."""
    x = x.transpose(0, 1) if options.layout else x
    every, last = [], []
    for d, (cell, start) in enumerate(zip(cells, starts, strict=True)):
        backwards = options.direction == "reverse" or d == 1
        outs, state = _walk(cell, x, start, lengths, backwards)
        every.append(outs)
        last.append(state)
    y = torch.stack(every, 1)
    ends = [torch.stack(states) for states in zip(*last, strict=True)]
    if options.layout:
        y, ends = y.permute(2, 0, 1, 3), [end.transpose(0, 1) for end in ends]
    return y, *ends


def _walk(cell: Cell, x: Tensor, state: State, lengths: Tensor | None, backwards: bool) -> tuple[Tensor, State]:
    if not isinstance(x.shape[0], int):
        raise SmeltError("a recurrent layer is unrolled, so its length must be known; give the input a fixed length")
    outs: list[Tensor] = []
    steps = range(x.shape[0])
    for t in reversed(steps) if backwards else steps:
        after = cell(x[t], state)
        if lengths is None:
            outs.append(after[0])
        else:  # behind a sequence's end the state stays and the output is zero
            inside = (lengths > t)[:, None]
            after = tuple(torch.where(inside, new, old) for new, old in zip(after, state, strict=True))
            outs.append(torch.where(inside, after[0], torch.zeros_like(after[0])))
        state = after
    return torch.stack(outs[::-1] if backwards else outs), state


def _starts(x: Tensor, r: Tensor, options: _Options, *given: Tensor | None) -> list[State]:
    batch = x.shape[0] if options.layout else x.shape[1]
    zero = x.new_zeros(batch, r.shape[2])
    per = [None if g is None else (g.transpose(0, 1) if options.layout else g) for g in given]
    return [tuple(zero if g is None else g[d] for g in per) for d in range(r.shape[0])]


def _biases(b: Tensor | None, d: int, r: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the input and of the state."""
    if b is None:
        zero = r.new_zeros(r.shape[1])
        return zero, zero
    first, second = b[d].chunk(2)
    return first, second


@op("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> State:
    """h = f(w x + r h + b)."""
    options = _Options(("Tanh",), activation_alpha, activation_beta, activations, clip, direction, layout)

    def cell(d: int) -> Cell:
        (f,), (wb, rb) = options.functions(d), _biases(b, d, r)
        return lambda at, state: (f(F.linear(at, w[d], wb) + F.linear(state[0], r[d], rb)),)

    return _run([cell(d) for d in range(options.directions)], x, _starts(x, r, options, initial_h), lengths, options)


@op("GRU")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> State:
    """h = (1 - z) g(candidate) + z h with the update gate z; the reset gate acts on h, or behind its product."""
    options = _Options(("Sigmoid", "Tanh"), activation_alpha, activation_beta, activations, clip, direction, layout)

    def cell(d: int) -> Cell:
        (f, g), (wb, rb) = options.functions(d), _biases(b, d, r)
        rz, rh = r[d].split([2 * r.shape[2], r.shape[2]])
        rbz, rbh = rb.split([2 * r.shape[2], r.shape[2]])

        def step(at: Tensor, state: State) -> State:
            h = state[0]
            gates, candidate = F.linear(at, w[d], wb).split([2 * r.shape[2], r.shape[2]], -1)
            z, reset = f(gates + F.linear(h, rz, rbz)).chunk(2, -1)
            if linear_before_reset:
                new = g(candidate + reset * F.linear(h, rh, rbh))
            else:
                new = g(candidate + F.linear(reset * h, rh, rbh))
            return ((1 - z) * new + z * h,)

        return step

    return _run([cell(d) for d in range(options.directions)], x, _starts(x, r, options, initial_h), lengths, options)


@op("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peephole: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> State:
    """c = forget c + input g(candidate), h = output h(c); gates stand in the order input, output, forget, candidate."""
    default = ("Sigmoid", "Tanh", "Tanh")
    options = _Options(default, activation_alpha, activation_beta, activations, clip, direction, layout)

    def cell(d: int) -> Cell:
        (f, g, squash), (wb, rb) = options.functions(d), _biases(b, d, r)
        peep_i, peep_o, peep_f = (0, 0, 0) if peephole is None else peephole[d].chunk(3)

        def step(at: Tensor, state: State) -> State:
            h, c = state
            i, o, forget, candidate = (F.linear(at, w[d], wb) + F.linear(h, r[d], rb)).chunk(4, -1)
            i = f(i + peep_i * c)
            forget = 1 - i if input_forget else f(forget + peep_f * c)
            c = forget * c + i * g(candidate)
            return f(o + peep_o * c) * squash(c), c

        return step

    starts = _starts(x, r, options, initial_h, initial_c)
    return _run([cell(d) for d in range(options.directions)], x, starts, lengths, options)
