"""Reads a printed Program back, by recursive descent; a text names what a Program may hold, and nothing is executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import fx

from ..cache.plan import CachePlan
from ..choice import ChoicePlan
from ..decode import DecodePlan
from ..depth import DepthPlan
from ..errors import SmeltError, nearest
from ..program import Program, Record
from ..targets import find_target
from ..weight import Weight
from .encodings import read_encoding
from .lexer import Reader, Token
from .printer import VERSION, content_hash
from .types import read_type
from .values import read_mapping, read_value

_FAULTS = (SmeltError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError)


def parse_program(text: str, weights: Mapping[str, Weight], sealed: bool = False) -> Program:
    """The Program of a text that `print_program` wrote.

    `weights` holds the values of the text's weights by name; each must have the printed shape, encoding and, where
    the text carries one, content hash. `sealed`: text and values are under one hash already, which was checked; then
    the values are not read for theirs. Raises SmeltError with line and column.
    """
    reader = Reader(text)
    at = reader.expect("smelt").at
    if (version := reader.integer()) != VERSION:
        reader.fail(f"text form {version}; this smelt reads form {VERSION}", at)
    reader.expect("program")
    program = Program(reader.string(), fx.Graph(), {})
    if reader.accept("facts"):
        program.facts = read_mapping(reader)
    if reader.accept("cache"):
        program.cache = _made(reader, lambda sites: CachePlan.from_dict({"sites": sites}))
    if reader.accept("decode"):
        program.decode = _made(reader, DecodePlan.from_dict)
    if reader.accept("choice"):
        program.choice = _made(reader, ChoicePlan.from_dict)
    if reader.accept("depth"):
        program.depth = _made(reader, DepthPlan.from_dict)
    _read_history(reader, program)
    _read_weights(reader, program, weights, sealed)
    _Body(reader, program).read()
    if reader.peek().kind != "end":
        reader.fail("something follows the graph")
    return program


def _made(reader: Reader, make: Any) -> Any:
    at = reader.peek().at
    data = read_value(reader)
    try:
        return make(data)
    except _FAULTS as fault:
        named = fault if isinstance(fault, SmeltError) else f"{type(fault).__name__}: {fault}"
        reader.fail(f"not a plan ({named})", at)


def _read_history(reader: Reader, program: Program) -> None:
    while reader.accept("step"):
        record = Record(reader.integer(), reader.string(), read_mapping(reader), read_mapping(reader))
        program.history += (record,)
        if reader.accept("changed"):
            reader.expect("[")
            program.origin |= {reader.string(): record for _ in reader.items("]")}


def _read_weights(reader: Reader, program: Program, weights: Mapping[str, Weight], sealed: bool) -> None:
    reader.expect("weights")
    reader.expect("{")
    while not reader.accept("}"):
        token = reader.kind("weight")
        name = reader.unquoted(token)
        if name in program.weights:
            reader.fail(f"weight '{name}' stands here twice", token.at)
        if name not in weights:
            reader.fail(f"weight '{name}' has no value{nearest(name, weights)}", token.at)
        reader.expect(":")
        reader.expect("[")
        shape = tuple(reader.integer() for _ in reader.items("]"))
        encoding = read_encoding(reader)
        program.weights[name] = weight = weights[name]
        if weight.shape != shape or weight.encoding != encoding:
            stored = f"{weight.encoding} {list(weight.shape)}"
            reader.fail(f"weight '{name}' is {encoding} {list(shape)} in the text, but its value is {stored}", token.at)
        told = reader.next().text if reader.peek().kind == "hash" else None
        if told is not None and not sealed and told != f"#{content_hash(weight)}":
            reader.fail(f"the value of weight '{name}' is not the one that was printed: its hash differs", token.at)


class _Body:
    """The graph section: nodes by name, and a `get_attr` node for each weight before its first use."""

    def __init__(self, reader: Reader, program: Program) -> None:
        self.reader, self.program = reader, program
        self.nodes: dict[str, fx.Node] = {}
        self.weights: dict[str, fx.Node] = {}
        self.names = {token.text[1:] for token in reader.tokens if token.kind == "node"}

    def read(self) -> None:
        """All nodes up to the closing brace."""
        reader = self.reader
        reader.expect("graph")
        reader.expect("{")
        while not reader.accept("return"):
            self._node()
        at = reader.peek().at
        outputs = read_value(reader, self._refer)
        if not isinstance(outputs, dict) or not all(isinstance(node, fx.Node) for node in outputs.values()):
            reader.fail('a graph returns its outputs by name, such as {"logits": %head}', at)
        self.program.graph.output(outputs)
        reader.expect("}")

    def _node(self) -> None:
        reader = self.reader
        token = reader.kind("node")
        name = token.text[1:]
        if name in self.nodes:
            reader.fail(f"%{name} is defined twice", token.at)
        meta = read_type(reader) if reader.accept(":") else {}
        reader.expect("=")
        called = reader.kind("word")
        reader.expect("(")
        args, kwargs = self._arguments()
        if called.text == "input":
            node = self._input(name, args, kwargs, called)
        else:
            try:
                target = find_target(called.text)
            except SmeltError as fault:
                reader.fail(str(fault), called.at)
            node = self.program.graph.create_node("call_function", target, args, kwargs, name)
        if node.name != name:
            reader.fail(f"a node cannot be called %{name}", token.at)
        node.meta.update(meta)
        self.nodes[name] = node

    def _input(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], called: Token) -> fx.Node:
        if kwargs or len(args) != 1 or not isinstance(args[0], str) or args[0] in self.program.inputs:
            self.reader.fail('an input has one name of its own, such as input("tokens")', called.at)
        return self.program.graph.create_node("placeholder", args[0], name=name)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        reader = self.reader
        for _ in reader.items(")"):
            token = reader.peek()
            if token.kind == "word" and reader.peek(1).text == "=":
                if token.text in kwargs:
                    reader.fail(f"the argument '{token.text}' stands here twice", token.at)
                reader.next()
                reader.next()
                kwargs[token.text] = read_value(reader, self._refer)
            elif kwargs:
                reader.fail("a positional argument stands behind a named one", token.at)
            else:
                args.append(read_value(reader, self._refer))
        return tuple(args), kwargs

    def _refer(self, token: Token) -> fx.Node:
        if token.kind == "node":
            name = token.text[1:]
            return self.nodes.get(name) or self.reader.fail(f"%{name} is not defined above", token.at)
        name = self.reader.unquoted(token)
        if name not in self.program.weights:
            self.reader.fail(f"no weight '{name}' in the table above{nearest(name, self.program.weights)}", token.at)
        if name not in self.weights:
            self.weights[name] = self._weight_node(name)
        return self.weights[name]

    def _weight_node(self, name: str) -> fx.Node:
        """A node whose own name is none of those in the text."""
        wanted = re.sub(r"\W", "_", name, flags=re.ASCII)
        node = self.program.graph.create_node("get_attr", name, name=wanted)
        while node.name in self.names:
            self.program.graph.erase_node(node)
            wanted += "_"
            node = self.program.graph.create_node("get_attr", name, name=wanted)
        return node
