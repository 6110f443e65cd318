"""weights.share: shared pieces are means of what shares them, cost what is counted, and leave other tables alone."""

from __future__ import annotations

import pytest
import torch

from smelt.ir.encoding import packing
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes.base import Samples
from smelt.passes.weights.share import Share
from smelt.passes.weights.untie import Untie

from ..families import VOCABULARY, captured, random_tokens

TABLE, PIECES, BITS = "model.embed_tokens.weight", 8, 3


def texts() -> Samples:
    """In which a third of the tokens never comes."""
    return Samples(random_tokens(4, 32) % (VOCABULARY * 2 // 3))


def shared(program: Program, **options: object) -> Weight:
    made = program.fork()
    Share(**{"pieces": PIECES, "bits": BITS, **options}).apply(made, texts())  # type: ignore[arg-type]
    verify(made)
    return made.weights[TABLE]


@pytest.mark.parametrize("by", ["rows", "context"])
def test_a_piece_is_the_mean_of_those_that_it_stands_for(by: str) -> None:
    program = captured("llama")
    rows, weight = program.weights[TABLE].dense(), shared(program, by=by)
    assert 8 * weight.nbytes == weight.bits == VOCABULARY * PIECES * BITS + 16 * 2**BITS * rows.shape[1]
    codes = packing.unpack(weight.parts, BITS, PIECES, lanes=1).long()
    counts = torch.bincount(texts().tokens.flatten(), minlength=VOCABULARY)
    found, mass = weight.dense(), (counts + 1.0)[:, None]
    told = (counts > 0) | torch.tensor(by == "rows")  # by context, tokens that the text lacks move no piece
    for piece, part in enumerate(rows.chunk(PIECES, 1)):
        at = slice(piece * part.shape[1], (piece + 1) * part.shape[1])
        for code in codes[told, piece].unique():
            same = (codes[:, piece] == code) & told
            mean = (part[same] * mass[same]).sum(0) / mass[same].sum()
            assert (found[same][:, at] - mean).abs().max() < 2e-3 * rows.abs().max()
        if by == "context":  # and take the nearest
            book = weight.parts["book"][piece].float()
            assert torch.equal(codes[~told, piece], torch.cdist(part[~told], book).argmin(1))


def test_tokens_that_are_read_alike_share_and_more_pieces_lose_less() -> None:
    program = captured("llama")
    rows = program.weights[TABLE].dense().clone()
    rows[5] = rows[3]
    program.weights[TABLE] = Weight.of(rows)
    errors = [float((shared(program, by="rows", bits=bits).dense() - rows).square().sum()) for bits in (1, 3)]
    assert 0 < errors[1] < 0.8 * errors[0] < 0.8 * float(rows.square().sum())
    made = shared(program, by="rows").dense()
    assert torch.equal(made[5], made[3]) and not torch.equal(made[5], made[4])
    assert not torch.equal(shared(program, by="context").dense(), made)


def test_the_head_and_positions_are_left_alone() -> None:
    program = captured("gpt2")
    Untie().apply(program, None)
    made = program.fork()
    outcome = Share(pieces=PIECES, bits=BITS).apply(made, texts())
    changed = [name for name, weight in made.weights.items() if weight is not program.weights[name]]
    assert changed == list(outcome.done) == ["transformer.wte.weight"]


def test_what_cannot_be_shared_is_said() -> None:
    program = captured("llama")
    for options, reason in (({"pieces": 5}, "not cut into 5"), ({"bits": 9}, "97 rows take less than 512")):
        outcome = Share(**{"pieces": PIECES, "bits": BITS, **options}).apply(program.fork(), texts())
        assert not outcome.done and reason in outcome.skipped[TABLE]
    with pytest.raises(SmeltError, match="needs sample texts"):
        Share().apply(program, None)
