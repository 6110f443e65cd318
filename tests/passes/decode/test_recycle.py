"""decode.recycle: the plan it makes, that nothing else changes, and that it has no rival."""

import pytest

from smelt.ir import decode as drafts
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.errors import SmeltError
from smelt.passes import Exactness
from smelt.passes.decode.recycle import Recycle
from smelt.passes.structure import same_computation


def test_the_defaults_are_the_papers_size(cached):
    outcome = Recycle().apply(cached, None)
    assert cached.decode.drafter == "recycle" and cached.decode.draft.width == 8
    assert len(cached.decode.draft.tree) == 1 + 80
    assert outcome.notes == {"nodes": 80, "levels": [8, 21, 25, 17, 8, 1]}
    assert cached.touched >= {"decode"}


def test_a_small_tree_drafts_a_chain_first(cached):
    Recycle(width=2, nodes=3).apply(cached, None)
    assert cached.decode == DecodePlan(drafts.Recycle(Tree.from_paths([(0,), (0, 0), (0, 0, 0)]), 2))


def test_the_model_stays_as_it_is(cached):
    before = cached.fork()
    Recycle().apply(cached, None)
    assert Recycle.exactness is Exactness.EXACT and Recycle.effects == {"decode"}
    assert same_computation(before, cached) and same_computation(cached, before)


def test_there_must_be_a_cache(llama):
    assert list(Recycle().requires(llama)) == ["llama must have a cache plan, but has none: put cache.insert in front"]


def test_one_drafter_of_a_kind_is_enough(cached):
    Recycle().apply(cached, None)
    assert list(Recycle().requires(cached)) == ["llama must not draft by recycle twice: keep one of the two steps"]


def test_rows_are_filled_from_the_vocabulary(cached):
    assert list(Recycle(width=98).requires(cached)) == ["width must be at most the vocabulary of 97 tokens, but is 98"]


@pytest.mark.parametrize("options", [{"width": 0}, {"nodes": 0}])
def test_nothing_to_draft_is_an_error(options):
    with pytest.raises(SmeltError, match="width and nodes count from 1"):
        Recycle(**options)
