"""Captures a plain torch module from example inputs; token models with their own positions become decoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from ..errors import SmeltError
from ..interpret import interpret
from ..program import Program
from ..raising import raise_program
from ..raising.linear import raise_head
from ..weight import Weight
from .decoder import as_decoder
from .exported import evaluating, export, first_line, to_program
from .names import all_tensors, tied_names
from .variants import ALONE, TOLERANCE, alone_inputs, broken_weight, mixed_tokens, relative_error, side_by_side


def capture_module(module: nn.Module, example: Sequence[torch.Tensor], name: str | None = None) -> Program:
    """A Program of `module`, traced on `example`: positional tensors whose first dimension is the batch.

    Integer inputs [B, T] are dynamic in T too. One integer input and one output [B, T, V] over causal attention make a
    decoder: `arange(T)` becomes the input `positions`, the output `logits`. Other outputs go by their key if the module
    returns a dict, else by `output0`, `output1`, …. Raises SmeltError naming what cannot be captured.
    """
    name = name or type(module).__name__
    if not example:
        raise SmeltError(f"{name}: capturing a plain module needs `example` inputs, one tensor each")
    _require_float32(name, module, example)
    with evaluating(module), torch.no_grad():
        return _capture(module, tuple(example), name)


def _capture(module: nn.Module, example: tuple[torch.Tensor, ...], name: str) -> Program:
    names = _input_names(module, len(example))
    is_tokens = [_is_tokens(e) for e in example]
    # each size on its own and as far as the module allows: a table of positions may end T
    shapes = tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if tokens else {0: Dim.DYNAMIC} for tokens in is_tokens)
    outputs = tuple(_run(module, example, name))
    tensors = all_tensors(module)
    exported = export(_Wrapped(module), tuple(_widened(e) for e in example), (shapes,), name)
    program = to_program(exported, name, names, outputs, lambda n: Weight.of(tensors[n]), tied_names(module))
    program.facts = {"kind": "module", "source": name, "inputs": _describe(names, example, is_tokens)}
    raise_program(program)
    if is_tokens == [True] and len(outputs) == 1:
        program = _decoder_if_it_is(program, example[0])
    for inputs in (example, _other_sizes(example)):
        _check(program, module, inputs)
    return program


def _decoder_if_it_is(program: Program, tokens: torch.Tensor) -> Program:
    """The Program as a decoder, or itself with the reason why it is none in `facts["no_decoder"]`."""
    decoder = program.fork()
    why = as_decoder(decoder)
    if why is None:
        raise_head(decoder)
        answers = interpret(side_by_side(decoder, ALONE), alone_inputs(tokens[:1], _positions(tokens[:1])))
        why = mixed_tokens(answers)
    if why is None:
        return decoder
    program.facts["no_decoder"] = why
    return program


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand(tokens.shape)


class _Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_named(self.model(*inputs)).values())


def _named(out: Any) -> dict[str, Any]:
    if isinstance(out, Mapping):
        return dict(out)
    return {f"output{i}": value for i, value in enumerate(out if isinstance(out, tuple | list) else (out,))}


def _run(module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str) -> dict[str, torch.Tensor]:
    try:
        out = _named(module(*inputs))
    except Exception as fault:  # a module raises anything on inputs that do not fit
        raise SmeltError(f"{name}: fails on the example inputs: {first_line(fault)}") from fault
    strange = next((key for key, value in out.items() if not isinstance(value, torch.Tensor)), None)
    if strange is not None:
        raise SmeltError(f"{name}: returns a {type(out[strange]).__name__} as '{strange}'; capture takes tensors only")
    return out


def _require_float32(name: str, module: nn.Module, example: Sequence[Any]) -> None:
    if strange := next((e for e in example if not isinstance(e, torch.Tensor) or not e.dim()), None):
        raise SmeltError(f"{name}: `example` takes tensors with a batch dimension, not {strange!r}")
    for key, tensor in (*(("an example input", e) for e in example), *all_tensors(module).items()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise SmeltError(
                f"{name}: {key} is {tensor.dtype}; capture traces plain modules in float32: module.float()"
            )


def _input_names(module: nn.Module, count: int) -> tuple[str, ...]:
    found = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(found[:count]) if len(found) >= count else tuple(f"input{i}" for i in range(count))


def _is_tokens(example: torch.Tensor) -> bool:
    return not example.is_floating_point() and example.dim() == 2


def _widened(example: torch.Tensor) -> torch.Tensor:
    """At least two of everything dynamic: torch.export takes a dimension of one for a constant."""
    if example.shape[0] == 1:
        example = torch.cat([example, example])
    if _is_tokens(example) and example.shape[1] == 1:
        example = torch.cat([example, example], 1)
    return example


def _other_sizes(example: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """One row instead of several or two instead of one, half the tokens: a graph may hold for one size only."""
    rows = (torch.cat([e, e]) if e.shape[0] == 1 else e[:1] for e in example)
    return tuple(e[:, : max(1, e.shape[1] // 2)] if _is_tokens(e) else e for e in rows)


def _describe(names: tuple[str, ...], example: tuple[torch.Tensor, ...], tokens: list[bool]) -> dict[str, Any]:
    return {
        n: {"shape": ["B", *(["T"] if t else map(int, e.shape[1:]))], "dtype": str(e.dtype).removeprefix("torch.")}
        for n, e, t in zip(names, example, tokens, strict=True)
    }


def _check(program: Program, module: nn.Module, example: tuple[torch.Tensor, ...]) -> None:
    inputs = dict(zip(program.inputs, example, strict=False))
    if program.facts["kind"] == "decoder":
        inputs["positions"] = _positions(inputs["tokens"])
    answers = interpret(program, inputs)
    theirs = _run(module, example, program.name)
    for (key, mine), meant in zip(answers.items(), theirs.values(), strict=True):
        if not torch.isfinite(meant).all():
            raise SmeltError(f"{program.name}: outputs are not finite; {broken_weight(program.weights)}")
        error = relative_error(mine, meant)
        if not error <= TOLERANCE:
            raise SmeltError(
                f"{program.name}: the captured graph differs from the module in '{key}' (relative error {error:.1e}, "
                f"allowed {TOLERANCE:.0e}); does it behave differently for other batch sizes, or at random?"
            )
