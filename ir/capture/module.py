"""Captures a plain torch module from example inputs; token models with their own positions become decoders."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from ..errors import SmeltError
from ..interpret import interpret
from ..ops import ATTENTION, EMBEDDING, arguments
from ..program import Program
from ..raising import raise_program
from ..weight import Weight
from .check import TOLERANCE
from .exported import strip_prefix, to_program

aten = torch.ops.aten


def capture_module(module: nn.Module, example: Sequence[torch.Tensor], name: str | None = None) -> Program:
    """A Program of `module`, traced on `example`: positional tensors whose first dimension is the batch.

    Integer inputs [B, T] are dynamic in T too. One integer input and one output [B, T, V] over causal attention make a
    decoder: `arange(T)` becomes the input `positions`. Outputs are named `logits` there, else `output0`, `output1`, ….
    """
    if not example:
        raise SmeltError(f"{type(module).__name__}: capturing a plain module needs `example` inputs, one tensor each")
    name = name or type(module).__name__
    was_training = module.training
    module.eval()
    try:
        program = _capture(module, tuple(example), name)
    finally:
        module.train(was_training)
    return program


def _capture(module: nn.Module, example: tuple[torch.Tensor, ...], name: str) -> Program:
    names = _input_names(module, len(example))
    is_tokens = [not e.is_floating_point() and e.dim() == 2 for e in example]
    batch, length = Dim("B", min=1, max=1 << 16), Dim("T", min=1, max=_longest(module))
    shapes = tuple({0: batch, 1: length} if tokens else {0: batch} for tokens in is_tokens)
    traced = tuple(_widened(e) for e in example)
    with torch.no_grad():
        results = module(*example)
        count = len(results) if isinstance(results, tuple | list) else 1
        exported = _export(_Wrapped(module), traced, (shapes,), name)
    strip_prefix(exported)
    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {n: first.setdefault(id(t), n) for n, t in state.items()}
    outputs = tuple(f"output{i}" for i in range(count))
    program = to_program(exported, name, names, outputs, lambda n: Weight.of(state[n]), tied)
    program.facts = {"kind": "module", "source": name, "inputs": _describe(names, example, is_tokens)}
    if len(example) == 1 and is_tokens[0] and count == 1:
        _as_decoder(program, module)
    raise_program(program)
    _settle_kind(program)
    _check(program, module, example, is_tokens)
    return program


class _Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, *inputs: torch.Tensor) -> Any:
        out = self.model(*inputs)
        return tuple(out) if isinstance(out, tuple | list) else (out,)


def _export(module: nn.Module, example: Any, shapes: Any, name: str) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except Exception as fault:  # export raises dozens of kinds; each means a construct it cannot trace
        first = next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
        raise SmeltError(f"{name}: cannot be captured yet, torch.export stops at: {first.strip()[:300]}") from fault


def _input_names(module: nn.Module, count: int) -> tuple[str, ...]:
    found = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(found[:count]) if len(found) >= count else tuple(f"input{i}" for i in range(count))


def _widened(example: torch.Tensor) -> torch.Tensor:
    """At least two of everything dynamic: torch.export takes a dimension of one for a constant."""
    if example.shape[0] == 1:
        example = torch.cat([example, example])
    if not example.is_floating_point() and example.dim() == 2 and example.shape[1] == 1:
        example = torch.cat([example, example], 1)
    return example


def _longest(module: nn.Module) -> int:
    """The smallest learned position table could bound T; torch.export says so itself, this is only a start."""
    return int(getattr(module, "context", 0) or getattr(module, "block_size", 0) or 1 << 20)


def _describe(names: tuple[str, ...], example: tuple[torch.Tensor, ...], tokens: list[bool]) -> dict[str, Any]:
    return {
        n: {"shape": ["B", *(["T"] if t else map(int, e.shape[1:]))], "dtype": str(e.dtype).removeprefix("torch.")}
        for n, e, t in zip(names, example, tokens, strict=True)
    }


def _as_decoder(program: Program, module: nn.Module) -> None:
    """Name the inputs as a decoder's and let `arange(T)` be the input `positions`."""
    tokens = next(n for n in program.graph.nodes if n.op == "placeholder")
    ranges = [n for n in program.calls(aten.arange.default, aten.arange.start, aten.arange.start_step)]
    if not ranges:
        return
    with program.graph.inserting_after(tokens):
        positions = program.graph.placeholder("positions")
    for node in ranges:
        for user in list(node.users):
            if user.target is aten.unsqueeze.default and user.args[1] == 0:
                user.replace_all_uses_with(positions)
            elif user.target is aten.embedding.default:
                user.replace_input_with(node, positions)
    program.prune()
    if list(program.calls(aten.arange.default, aten.arange.start, aten.arange.start_step)) or not positions.users:
        raise SmeltError(f"{program.name}: uses arange for more than positions, which cannot be captured as a decoder yet")
    tokens.target = tokens.name = "tokens"
    program.facts = {"kind": "decoder", "family": program.name, "source": program.name, "eos": []}
    output = program.outputs.pop("output0")
    program.graph.output_node().args = ({"logits": output},)


def _settle_kind(program: Program) -> None:
    if program.facts["kind"] != "decoder":
        return
    causal = [bool(arguments(n)["causal"]) for n in program.calls(ATTENTION)]
    if not causal or not all(causal):
        raise SmeltError(f"{program.name}: a token model needs causal scaled_dot_product_attention (is_causal=True)")
    tables = {str(n.args[0]): n.args[1] for n in program.calls(EMBEDDING)}
    words, places = (program.weights[str(tables[k].target)].shape[0] for k in ("tokens", "positions"))
    hidden = program.weights[str(tables["tokens"].target)].shape[1]
    program.facts |= {"vocabulary": words, "context": places, "hidden": hidden}


def _check(program: Program, module: nn.Module, example: tuple[torch.Tensor, ...], tokens: list[bool]) -> None:
    inputs: dict[str, torch.Tensor] = dict(zip(program.inputs, example, strict=False))
    if program.facts["kind"] == "decoder":
        inputs["positions"] = torch.arange(example[0].shape[1]).expand(example[0].shape[0], -1)
    with torch.no_grad():
        mine = list(interpret(program, inputs).values())
        out = module(*example)
    theirs = list(out) if isinstance(out, tuple | list) else [out]
    for a, b in zip(mine, theirs, strict=True):
        error = ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30)).item()
        if not error <= TOLERANCE:
            raise SmeltError(
                f"{program.name}: the captured graph differs from the module (relative error {error:.1e}, allowed "
                f"{TOLERANCE:.0e}); does it hold NaN weights, or branch on its data?"
            )

