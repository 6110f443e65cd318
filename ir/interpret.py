"""The interpreter: runs a Program node by node in plain PyTorch. Slow, obviously right, the oracle for everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from .errors import SmeltError
from .ops import CACHED_ATTENTION, OPS
from .program import Program

Watch = Callable[[fx.Node, tuple[Any, ...], Any], None]


class AttendingCache(Protocol):
    """What the interpreter needs of a cache: the two halves of `cached_attention`."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None: ...

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def interpret(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    cache: AttendingCache | None = None,
    watch: Watch | None = None,
) -> dict[str, torch.Tensor]:
    """Named outputs for named inputs. Without a cache every attention site is empty before the call.

    `watch(node, args, value)` is called after every op, with the values of its positional arguments.
    Weights are decoded where they are used and dropped after their last use.
    """
    inputs = {**left_out(program, inputs), **inputs}
    missing = [name for name in program.inputs if name not in inputs]
    if missing:
        raise SmeltError(f"program {program.name} needs the inputs {missing}")
    values: dict[fx.Node, Any] = {}
    dying = _last_uses(program.graph)

    def read(node: fx.Node) -> Any:
        if node.op == "get_attr" and node not in values:  # decoded where it is first read, not where it stands
            values[node] = program.weights[str(node.target)].dense()
        return values[node]

    def value_of(argument: Any) -> Any:
        return fx.node.map_arg(argument, read)

    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            continue
        elif node.op == "output":
            return dict(value_of(node.args[0]))
        else:
            args = value_of(node.args)
            values[node] = call(node, args, value_of(node.kwargs), cache)
            if watch is not None:
                watch(node, args, values[node])
        for dead in dying.get(node, ()):
            values.pop(dead, None)
    raise SmeltError(f"program {program.name} has no output node")


def left_out(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros for inputs [B, T, …] beside `tokens` that are not given and that the facts call optional."""
    told = program.facts.get("inputs") or {}
    names = [name for name in program.inputs if name not in inputs and told.get(name, {}).get("optional")]
    return {
        name: inputs["tokens"].new_zeros(
            *inputs["tokens"].shape, *told[name]["shape"][2:], dtype=getattr(torch, told[name]["dtype"])
        )
        for name in names
    }


def call(node: fx.Node, args: Any, kwargs: Any, cache: AttendingCache | None = None) -> Any:
    """What one call gives for the values of its arguments."""
    if node.target is CACHED_ATTENTION.target and cache is not None:
        a = dict(zip(CACHED_ATTENTION.arguments, args, strict=False)) | kwargs
        cache.append(a["layer"], a["key"], a["value"])
        return cache.attend(a["layer"], a["query"], a["scale"], a.get("window"), a.get("softcap"), a.get("sinks"))
    if node.target in OPS:
        return OPS[node.target].reference(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # an ATen overload or a Python operator


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    dying: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                dying.setdefault(node, []).append(used)
        if node not in seen and node.op not in ("output", "placeholder"):
            dying.setdefault(node, []).append(node)
    return dying
