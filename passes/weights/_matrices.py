"""The weights that are matrices: which may be stored in fewer bits, why others may not, and which read the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ...ir.encoding import NM, Affine, Dense, Encoding
from ...ir.ops import EMBEDDING, EXPERTS, HEAD, LINEAR, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight

# the operands of each op that are weight matrices
_OPERANDS = {LINEAR: ("weight",), HEAD: ("weight",), EMBEDDING: ("weight",), EXPERTS: ("gate_up", "down")}


@dataclass(frozen=True)
class Matrix:
    """A weight that nothing reads but matrix products and lookups; `vocabulary`: heads and tables among them."""

    name: str
    readers: tuple[fx.Node, ...]

    @property
    def vocabulary(self) -> bool:
        """Whether it has a row for each token."""
        return any(is_op(reader, HEAD, EMBEDDING) for reader in self.readers)


@dataclass(frozen=True)
class Siblings:
    """Matrix products `nodes` of one tensor `x`, in graph order, and the names of their weights."""

    x: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weights, each once."""
        return tuple(dict.fromkeys(str(arguments(node)["weight"].target) for node in self.nodes))


def matrices(program: Program) -> dict[str, Matrix | str]:
    """Every weight by name: the matrix that it is, or why it is none that may lose precision."""
    readers: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend((user, node) for user in node.users)
    routers = _routers(program)
    return {name: _matrix(program, name, read, routers) for name, read in readers.items()}


def siblings(program: Program) -> list[Siblings]:
    """Products with a weight by the tensor that they read, in the order in which the first of each runs."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in program.calls(LINEAR, HEAD):
        if arguments(node)["weight"].op == "get_attr":
            found.setdefault(arguments(node)["x"], []).append(node)
    return [Siblings(x, tuple(nodes)) for x, nodes in found.items()]


def all_dense(program: Program, names: list[str], sparse: bool = False) -> Iterator[str]:
    """The contract of passes that encode weights: each is still Dense; with `sparse`, or what N:M sparsity keeps is."""

    def open_to(encoding: Encoding) -> bool:
        return isinstance(encoding.values if sparse and isinstance(encoding, NM) else encoding, Dense)

    coded = [name for name in names if not open_to(program.weights[name].encoding)]
    if coded:
        yield (
            f"weights of {coded[0]} must be Dense, but are {program.weights[coded[0]].encoding}"
            f"{program.changed_by(coded[0])}{f', and {len(coded) - 1} more' if len(coded) > 1 else ''}: "
            "encode them once"
        )


def stored_in(weight: Weight, encoding: Affine) -> Affine | NM | str:
    """What stores a matrix in these codes, or why nothing does; groups count what N:M sparsity removed as well."""
    sparse = weight.encoding
    if not isinstance(sparse, NM):
        return encoding.refuses(weight.shape) or encoding
    if encoding.group * sparse.keep % sparse.of:
        return f"groups of {encoding.group} are no whole groups of {sparse.of} neighbours"
    kept = encoding.group * sparse.keep // sparse.of
    held = replace(sparse, values=Affine(encoding.width, kept, encoding.axis, encoding.zero, encoding.scale))
    return held.refuses(weight.shape) or held


def _matrix(program: Program, name: str, read: list[tuple[fx.Node, fx.Node]], routers: set[fx.Node]) -> Matrix | str:
    if not read:
        return "nothing reads it"
    users = tuple(dict.fromkeys(user for user, _ in read))
    others = sorted({user.name for user, node in read if not _is_operand(user, node)})
    if len(others) == len(users):
        if len(program.weights[name].shape) < 2:
            return "a vector or scalar, not a matrix"
        return f"read by {', '.join(others)}, which is neither a matrix product nor a lookup"
    if others:
        return f"also read by {', '.join(others)}, which is neither a matrix product nor a lookup"
    if routers.intersection(users):
        return "routes tokens to experts, where rounding sends tokens elsewhere"
    return Matrix(name, users)


def _is_operand(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` reads the weight at `node` as one of its matrices, and as nothing else."""
    operands: Mapping[str, Any] = arguments(user) if is_op(user, *_OPERANDS) else {}
    named = next((names for op, names in _OPERANDS.items() if is_op(user, op)), ())
    reads = [name for name, value in operands.items() if value is node]
    return bool(reads) and all(name in named for name in reads)


def _routers(program: Program) -> set[fx.Node]:
    """The matrix products whose results choose experts: the nearest ones behind `chosen`."""
    found: set[fx.Node] = set()
    for node in program.calls(EXPERTS):
        ahead, seen = [arguments(node)["chosen"]], set()
        while ahead:
            at = ahead.pop()
            if is_op(at, LINEAR):
                found.add(at)
            elif at not in seen:
                seen.add(at)
                ahead.extend(at.all_input_nodes)
    return found
