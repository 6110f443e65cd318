"""decode.trigrams and the unions of drafters: counts against a loop, what is added and what is refused."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir import decode
from smelt.ir.errors import SmeltError
from smelt.passes.base import Samples
from smelt.passes.decode.lookup import Lookup
from smelt.passes.decode.recycle import Recycle
from smelt.passes.decode.suffix import Suffix
from smelt.passes.decode.trigrams import Trigrams, counted
from smelt.passes.decode.union import Union

ROWS = st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4)


@given(ROWS, st.integers(1, 4))
def test_counts_are_those_of_a_loop(rows, successors):
    tables = counted(torch.tensor(rows), 5, successors)
    seen = Counter((a, b, c) for row in rows for a, b, c in zip(row, row[1:], row[2:], strict=False))
    wanted = {}
    for (a, b, c), times in sorted(seen.items()):
        wanted.setdefault(a * 5 + b, []).append((-times, c))
    assert tables["trigrams.pairs"].tolist() == sorted(wanted)
    for at, pair in enumerate(sorted(wanted)):
        total = -sum(times for times, _ in wanted[pair])
        best = sorted(wanted[pair])[:successors]
        assert tables["trigrams.tokens"][at].tolist()[: len(best)] == [token for _, token in best]
        weights = tables["trigrams.weights"][at].tolist()
        assert weights[: len(best)] == pytest.approx([-times / total for times, _ in best])
        assert weights[len(best) :] == [0] * (successors - len(best))


def test_a_text_is_counted_if_there_is_one(cached):
    other = cached.fork()
    assert Trigrams(successors=2).apply(cached, None).notes == {"most": 24, "pairs": 0, "bytes": 0}
    outcome = Trigrams(successors=2).apply(other, Samples(torch.tensor([[1, 2, 3, 1, 2, 4]])))
    assert outcome.notes == {"most": 24, "pairs": 3, "bytes": 3 * (8 + 2 * 4 + 2 * 4)}
    assert cached.decode.tables == {} and other.decode.stamp and cached.decode != other.decode


def test_sequences_of_two_tokens_hold_no_trigram(cached):
    with pytest.raises(SmeltError, match="sequences of 2 tokens hold no three in a row"):
        Trigrams().apply(cached, Samples(torch.zeros(3, 2, dtype=torch.int64)))


def test_drafters_join(cached):
    Recycle(width=2, nodes=3).apply(cached, None)
    Lookup(tokens=4).apply(cached, None)
    assert cached.decode.drafter == "union" and cached.decode.draft.most == 7
    Trigrams(nodes=60).apply(cached, Samples(torch.tensor([[1, 2, 3]])))
    assert [decode.draft.kind(d) for d in cached.decode.draft.parts] == ["recycle", "lookup", "trigrams"]
    assert cached.decode.draft.most == 63 and len(cached.decode.tables) == 3
    Union(nodes=9).apply(cached, None)
    Suffix().apply(cached, None)
    assert cached.decode.draft.most == 9 and len(cached.decode.draft.parts) == 4
    assert list(Lookup().requires(cached)) == ["llama must not draft by lookup twice: keep one of the two steps"]


def test_what_cannot_join_is_refused(cached):
    cached.decode = decode.DecodePlan(decode.Lookahead())
    (said,) = Lookup().requires(cached)
    assert said.startswith("llama already decodes by lookahead, and only drafts that their context fixes")
    cached.decode = decode.DecodePlan(decode.Lookup())
    (said,) = Union().requires(cached)
    assert said == "llama must have two drafters or more: put such steps as decode.lookup in front"
