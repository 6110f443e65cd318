"""Captures an .onnx file: plain graphs as they are, language models as decoders without a cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ...errors import SmeltError
from ...interpret import interpret
from ...ops import ATTENTION, arguments
from ...program import Program
from ...raising import raise_program
from ...raising.linear import raise_head
from ..variants import ALONE, TOLERANCE, alone_inputs, broken_weight, mixed_tokens, relative_error, side_by_side
from .decoder import POSITIONS, SYMBOLS, Decoder, counted, facts, find_decoder, settle_masks, tables, with_positions
from .load import FILE, Model, load
from .module import OnnxModule
from .ops.attention import every_query_sees
from .rounding import with_rounding
from .rows import with_rows
from .steps import is_step, whole_text
from .trace import Feed, example_sizes, feeds_of, trace
from .weights import adopt

_NUMBERED = re.compile(r"val_\d+|onnx::|_\d+$|w\d+$")


def capture_onnx(source: Path) -> Program:
    """A Program of an .onnx file or of a folder with `model.onnx`; raises SmeltError naming what cannot be captured."""
    path = source / FILE if source.is_dir() else source
    if not path.is_file():
        raise SmeltError(f"{path}: no such file")
    return capture_model(load(path), path.stem)


def capture_model(model: Model, name: str) -> Program:
    """A Program of a checked model: a decoder if it is one, else the graph as it is."""
    with torch.no_grad():
        adopted = with_rows(adopt(with_rounding(model)))
    must = is_step(model)  # be a decoder
    if must:
        with torch.no_grad():
            adopted = whole_text(adopted)
        model = adopted.model
    parts, why = find_decoder(model), None
    must = must or bool(parts is not None and parts.past)
    with torch.no_grad():
        if parts is not None:
            found = _try_decoder(OnnxModule(with_positions(adopted.model), weights=adopted.weights), parts, name, must)
            why = found if isinstance(found, str) else None
            if why is not None and must:
                raise SmeltError(f"{model.where}: is a decoder with a cache, but {why}")
        if parts is None or why is not None:
            found = _plain(OnnxModule(adopted.model, weights=adopted.weights), name)
    assert isinstance(found, Program)  # texts were dealt with
    if why is not None:
        found.facts["no_decoder"] = why
    if adopted.notes:
        found.facts["notes"] = adopted.notes
    return found


def _plain(module: OnnxModule, name: str) -> Program:
    """The graph with the inputs and outputs that the file has."""
    model = module.model
    feeds = feeds_of(model.graph.inputs, model.where)
    outputs = {port.name: i for i, port in enumerate(model.graph.outputs)}
    program = trace(module, feeds, lambda *inputs: inputs, outputs, name)
    program.facts |= {"kind": "module", "source": name}
    raise_program(program)
    tidy_names(program, model)
    check(program, module, feeds)
    return program


def _try_decoder(module: OnnxModule, parts: Decoder, name: str, must: bool) -> Program | str:
    """A decoder, or why it is none; what need not be one may be anything if it cannot be captured as one."""
    try:
        return _decoder(module, parts, name)
    except SmeltError as fault:
        if must:
            raise
        return f"cannot be captured as one: {fault}"


def _decoder(module: OnnxModule, parts: Decoder, name: str) -> Program | str:
    """A decoder over `tokens` and `positions`, or why it is none."""
    where = module.model.where
    names = counted(module, parts)

    def arrange(tokens: torch.Tensor, positions: torch.Tensor) -> list[Any]:
        module.replaced, module.added = dict.fromkeys(names, positions), {POSITIONS: positions}
        return parts.arrange(tokens, positions)

    try:
        with every_query_sees():
            program = trace(module, SYMBOLS, arrange, {"logits": parts.logits}, name)
    finally:
        module.replaced = {}
    looked_up = tables(program)
    del program.facts["inputs"]
    program.facts["kind"] = "decoder"
    raise_program(program)
    why = settle_masks(program, where)
    attention = [arguments(node) for node in program.calls(ATTENTION)]
    if why is not None:
        return why
    if not attention or not all(a["causal"] and a["mask"] is None for a in attention):
        return "it has no causal attention" if not attention else "its attention looks both ways"
    program.facts |= facts(program, module.model, parts, looked_up) | {"source": name}
    if not raise_head(program) and "logits" not in module.model.graph.outputs[parts.logits].name.lower():
        return "its output is no product over a vocabulary"
    tidy_names(program, module.model)
    tokens = torch.randint(0, program.facts["vocabulary"], (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, -1)
    module.added = {POSITIONS: positions}
    meant = module(*parts.arrange(tokens, positions))[parts.logits]
    compare(program, interpret(program, {"tokens": tokens, "positions": positions}), {"logits": meant})
    alone = interpret(side_by_side(program, ALONE), alone_inputs(tokens[:1, :6], positions[:1, :6]))
    if (mixed := mixed_tokens(alone)) is not None:
        return mixed
    return program


def tidy_names(program: Program, model: Model) -> None:
    """Weights that an exporter numbered get the name of the module that they come from; turned ones their own again."""
    scopes = {name: node.scope for node in model.graph.nodes for name in node.inputs[1:2] if node.scope}
    taken = set(program.weights)
    for old in list(program.weights):
        base = old.removesuffix(".transposed")
        scope = scopes.get(base, "")
        name = f"{scope}.weight" if scope and _NUMBERED.match(base) else base
        if name == old or name in taken:
            continue
        taken.add(name)
        program.weights[name] = program.weights.pop(old)
        for node in program.graph.nodes:
            if node.op == "get_attr" and node.target == old:
                node.target = name


def check(program: Program, module: OnnxModule, feeds: list[Feed]) -> None:
    """Raises SmeltError if the Program and the file's nodes, run one by one, give different answers."""
    sizes = example_sizes(feeds)
    generator = torch.Generator().manual_seed(0)
    for change in (0, 1):
        inputs = {}
        for feed, told in zip(feeds, program.facts["inputs"].values(), strict=True):
            dims = [sizes[d] + change if isinstance(d, str) else d for d in told["shape"]]
            if feed.dtype.is_floating_point:
                inputs[feed.name] = torch.randn(dims, generator=generator)
            else:
                inputs[feed.name] = torch.randint(0, 2, dims, generator=generator).to(feed.dtype)
        theirs = module(*inputs.values())
        mine = interpret(program, inputs)
        compare(program, mine, dict(zip(program.outputs, theirs, strict=True)))


def compare(program: Program, mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Raises SmeltError naming the output that differs or is not finite."""
    for name, meant in theirs.items():
        if not torch.isfinite(meant.float()).all() and not torch.equal(mine[name], meant):
            raise SmeltError(f"{program.name}: outputs are not finite; {broken_weight(program.weights)}")
        error = relative_error(mine[name], meant)
        if not error <= TOLERANCE:
            raise SmeltError(
                f"{program.name}: the captured graph differs from the file's nodes in '{name}' (relative error "
                f"{error:.1e}, allowed {TOLERANCE:.0e})"
            )
