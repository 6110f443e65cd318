"""Tables of tokens whose rows are put together from shared pieces (Subspace Embedding, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from ...ir.encoding import Codebook, clusters, packing
from ...ir.errors import SmeltError
from ...ir.ops import EMBEDDING, HEAD, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from .._walk import Walk
from ..base import Calibration, Effect, Outcome, Pass, Samples
from ._matrices import Matrix, all_dense, matrices

aten = torch.ops.aten


@dataclass(frozen=True)
class Share(Pass):
    """Cuts the rows of a table of tokens [V, D] into `pieces`, of each of which tokens share 2^bits.

    Lightweight Adaptation of Neural Language Models via Subspace Embedding (Jaiswal and Liu, 2023, arXiv 2308.08688).
    A token takes pieces * bits bits, and the shared ones 16 * 2^bits * D together. A shared piece is the mean of those
    that it stands for, weighed by how often the text has their tokens, and once more for every token. A head that is
    the same table reads the same pieces; behind weights.untie it keeps its own.

    pieces: of a row. bits: of the number of a piece.
    by: what tokens have in common that share a piece: that part of their `rows`, or of the mean state with which the
        model leaves them in the text (`context`; tokens that the text lacks go by their rows).

    Deviations: the paper goes by context and trains a masked language model anew over that assignment. Here the pieces
    come from the table and tune.recover trains them, for which rows are the better guide: perplexity grows 1.3 times by
    rows and 61 times by context, before training (64 pieces of 6 bits, the reference model). Two tokens may have all
    pieces in common, which the report counts.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    pieces: int = 64
    bits: int = 6
    by: Literal["rows", "context"] = "rows"

    def __post_init__(self) -> None:
        """Refuses options that no table can satisfy."""
        if self.pieces < 1:
            raise SmeltError(f"pieces is a positive number, not {self.pieces}")
        _ = Codebook(1, self.bits)

    @property
    def calibration(self) -> Calibration:
        """Text in which tokens are counted, and read in their context."""
        return "text"

    def requires(self, program: Program) -> Iterator[str]:
        """Tables that are dense."""
        yield from all_dense(program, list(_tables(program)))

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Encode every table by whose rows tokens are looked up."""
        if samples is None:
            raise SmeltError("weights.share needs sample texts: pass calibration texts to compile")
        done: dict[str, Weight] = {}
        skipped: dict[str, str] = {}
        alike: dict[str, int] = {}
        for name, lookup in _tables(program).items():
            weight = program.weights[name]
            if weight.shape[1] % self.pieces:
                skipped[name] = f"rows of {weight.shape[1]} are not cut into {self.pieces} pieces of a size"
                continue
            encoding = Codebook(weight.shape[1] // self.pieces, self.bits)
            if reason := encoding.refuses(weight.shape):
                skipped[name] = reason
            elif int(encoding.stored_bits(weight.shape) + encoding.table_bits(weight.shape)) >= weight.bits:
                skipped[name] = f"its {weight.shape[0]} rows take less than {2**self.bits} shared ones of each piece"
            else:
                codes, book = self._shared(program, samples, lookup, weight)
                alike[name] = len(codes) - len(codes.unique(dim=0))
                parts = packing.pack(codes.int(), self.bits, lanes=1) | {"book": book.half()}
                done[name] = Weight(weight.shape, encoding, parts)
        program.weights |= done
        program.touch(*done)
        return Outcome(tuple(done), skipped, {"tokens_alike": alike})

    def _shared(
        self, program: Program, samples: Samples, lookup: fx.Node, weight: Weight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of pieces int64 [V, pieces], and the pieces [pieces, 2^bits, D / pieces]."""
        rows, contexts, counts = weight.dense(), None, torch.zeros(weight.shape[0])
        walk = Walk(program, samples)
        texts = [ids.flatten() for (ids,) in walk.values(arguments(lookup)["ids"])]
        for ids in texts:
            counts += torch.bincount(ids, minlength=len(counts))
        if self.by == "context":
            for ids, (state,) in zip(texts, walk.values(_state(program)), strict=True):
                contexts = torch.zeros(len(counts), state.shape[-1]) if contexts is None else contexts
                contexts.index_add_(0, ids, state.flatten(0, -2).float())
            assert contexts is not None
            contexts = contexts / counts.clamp_min(1)[:, None]
        codes, book = [], []
        for i, part in enumerate(rows.chunk(self.pieces, 1)):
            if contexts is None:
                held = clusters.fitted(part, counts + 1, 2**self.bits)
                found = clusters.assigned(part, held)[0]
            else:
                found, held = self._by(contexts.tensor_split(self.pieces, 1)[i], part, counts)
            codes.append(found)
            book.append(held)
        return torch.stack(codes, 1), torch.stack(book)

    def _by(self, context: torch.Tensor, part: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers [V] and pieces [2^bits, d] of tokens that share by their context [V, c]."""
        seen = counts > 0
        entries = clusters.fitted(context[seen], counts[seen] + 1, 2**self.bits)
        codes, _ = clusters.assigned(context, entries)
        mass = (counts + 1)[seen]
        total = torch.zeros(len(entries)).index_add_(0, codes[seen], mass)
        held = torch.zeros(len(entries), part.shape[1]).index_add_(0, codes[seen], part[seen] * mass[:, None])
        held = held / total.clamp_min(1)[:, None]
        codes[~seen] = clusters.assigned(part[~seen], held)[0]
        return codes, held


def _tables(program: Program) -> dict[str, fx.Node]:
    """The lookups of tokens by the weights that they read."""
    found: dict[str, fx.Node] = {}
    for name, matrix in matrices(program).items():
        for reader in matrix.readers if isinstance(matrix, Matrix) else ():
            if is_op(reader, EMBEDDING) and _source(arguments(reader)["ids"]) == "tokens":
                found[name] = reader
    return found


def _source(ids: fx.Node) -> str:
    """The input that ids are, whatever their shape."""
    while ids.target in (aten.reshape.default, aten.view.default):
        ids = ids.all_input_nodes[0]
    return str(ids.target)


def _state(program: Program) -> fx.Node:
    """What the model leaves its tokens with: what the head reads, or the hidden state of an encoder."""
    node: fx.Node = next(iter(program.outputs.values()))
    state: fx.Node = arguments(node)["x"] if is_op(node, HEAD) else node
    return state
