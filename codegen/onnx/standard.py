"""The standard style: operators of ONNX alone; a decoder's cache goes in and comes out in its compressed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.program import Program
from . import state
from .builder import Builder, Value, onnx_type


@dataclass(frozen=True)
class Standard:
    """`cache=False` exports a decoder as it reads a whole text at once, without inputs of the past."""

    cache: bool = True

    @property
    def name(self) -> str:
        """What forms are registered under."""
        return "standard"

    def inputs(self, builder: Builder, program: Program) -> dict[str, Value]:
        """The Program's inputs; of a decoder with a cache `tokens`, `lengths` and `counts`, and the cache."""
        places = {str(node.target): node for node in program.graph.nodes if node.op == "placeholder"}
        if self.cache and program.cache is not None:
            return state.inputs(builder, program, places)
        made = {}
        for name, node in places.items():
            shape, dtype = node.meta["shape"], node.meta["dtype"]
            made[name] = Value(builder.input(name, onnx_type(dtype), shape), shape, dtype)
        return made

    def outputs(self, builder: Builder, program: Program, results: Mapping[str, Value]) -> None:
        """The Program's outputs, and the cache behind the step."""
        for name, value in results.items():
            assert value.shape is not None
            builder.output(name, value, onnx_type(value.dtype), value.shape)
        if self.cache and program.cache is not None:
            state.outputs(builder, program)

    def manifest(self, builder: Builder, program: Program) -> dict[str, Any]:
        """How the cache is laid out and what it starts with."""
        return state.manifest(builder, program) if self.cache and program.cache is not None else {}

    def files(self, builder: Builder, program: Program, assets: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """The tokenizer's files."""
        return assets
