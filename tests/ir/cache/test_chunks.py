"""Prompts read in chunks with the question behind each (Finch): the pieces, what is kept, and how much is held."""

import math
from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import Cache, CachePlan, Hyper, Merge, Retrieve, Rope, Score, Select, Site
from smelt.ir.cache.chunks import readings
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError

ROPE = Rope(tuple(10000 ** (-i / 8) for i in range(8)))
QUESTION, CHUNK, SINK, TAIL = 6, 16, 2, 4
SELECT = Select(Score("attention", QUESTION, normalize="length"), 0.25, when="prompt", chunk=CHUNK)
SITE = Site(
    0, 4, 2, 32, 16, sink=SINK, tail=TAIL, page=8, rope=ROPE, select=SELECT, frame="pre", compact=True
)  # fmt: skip
PROMPT = 75


def data(length: int = PROMPT) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of tokens, before they are turned by any position."""
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(heads, length, dim, generator=random) for heads, dim in ((4, 32), (2, 32), (2, 16)))


def read(cache: Cache, tokens: tuple[torch.Tensor, ...], prompt: int) -> list[tuple[int, int]]:
    """Read a prompt of the tokens 0 … prompt - 1; what was stored, and allocated, before each chunk ended."""
    held = []
    for (ids,), question in readings(cache.plan, [range(prompt)]):
        ids, at = list(ids), torch.arange(len(ids)) + cache.lengths[0]
        q, k, v = (x[None, :, ids] for x in tokens)
        cache.begin(at[None])
        cache.append(0, ROPE.turn(k, at), v)
        cache.attend(0, ROPE.turn(q, at), SITE.attention_scale)
        cache.commit([list(range(len(ids)))])
        held.append((cache.stored(0)[0], cache.nbytes().allocated))
        cache.end_chunk(question)
    cache.end_prefill()
    return held


def kept(tokens: tuple[torch.Tensor, ...], head: int, mutant: str = "") -> list[int]:
    """Finch in words: the tokens that a KV head keeps between sinks and tail of the prompt."""
    q, k, _ = tokens
    context, held, read = PROMPT - QUESTION, [], 0
    question = list(range(context, PROMPT))
    while read < context:
        end = min(read + CHUNK, context)
        new = [*range(max(read, SINK), end), *(question[:-TAIL] if end == context else ())]
        order = [*range(SINK), *held, *range(max(read, SINK), end), *question]
        at = torch.arange(end + QUESTION - len(order), end + QUESTION)  # side by side, up to the question
        if mutant == "where they stood":
            at[: SINK + len(held)] = torch.tensor(order[: SINK + len(held)])
        logits = ROPE.turn(q[2 * head : 2 * head + 2, question], at[-QUESTION:]) @ ROPE.turn(k[head, order], at).T
        seen = at <= at[-QUESTION:, None]
        mass = torch.softmax((logits * SITE.attention_scale).masked_fill(~seen, -torch.inf), -1)
        if mutant != "plain softmax":
            mass = mass * seen.sum(-1, keepdim=True)
        candidates = new if mutant == "chunks by themselves" else [*held, *new]
        scores = mass.sum((0, 1))[[order.index(token) for token in candidates]]
        last = end + (QUESTION - TAIL if end == context else 0)
        count = math.ceil(0.25 * (last - SINK)) - (len(held) if mutant == "chunks by themselves" else 0)
        best = [candidates[i] for i in scores.topk(count).indices]
        held = sorted([*held, *best] if mutant == "chunks by themselves" else best)
        read = end
    return held


def test_prompts_come_in_chunks_with_their_question_behind_each():
    plan, rows = CachePlan((SITE,)), [list(range(length)) for length in (45, 22, 23, 3)]
    first, second, third = readings(plan, rows)
    assert first.texts == [[*range(16), *range(39, 45)], [*range(22)], [*range(16), *range(17, 23)], [0, 1, 2]]
    assert second.texts == [[*range(16, 32), *range(39, 45)], [], [*range(16, 23)], []]
    assert third.texts == [[*range(32, 45)], [], [], []]
    assert [r.questions for r in (first, second, third)] == [[6, 0, 6, 0], [6, 0, 0, 0], [0] * 4]
    whole = CachePlan((replace(SITE, select=replace(SELECT, chunk=None)),))
    assert list(readings(whole, rows)) == [(rows, [0] * 4)]


def test_what_a_question_keeps_of_chunk_after_chunk():
    tokens, cache = data(), Cache(CachePlan((SITE,)), 1, 128)
    read(cache, tokens, PROMPT)
    decoded = cache.segments[0].bodies[0].decoded(0)
    assert decoded is not None and cache.counts(0).tolist() == [[SINK, 18, TAIL, PROMPT]]
    for head in (0, 1):
        ids = kept(tokens, head)
        assert torch.equal(decoded.values[head, : len(ids)], tokens[2][head, ids])
        places = torch.arange(PROMPT - TAIL - len(ids), PROMPT - TAIL)  # right in front of the tail
        assert torch.allclose(decoded.keys[head, : len(ids)], ROPE.turn(tokens[1][head, ids], places), atol=1e-5)
    for mutant in ("where they stood", "plain softmax", "chunks by themselves"):
        assert any(kept(tokens, head, mutant) != kept(tokens, head) for head in (0, 1)), mutant


def test_the_rest_of_the_cache_is_as_if_the_prompt_were_one_chunk():
    """Bytes by the formula; and where one chunk holds the prompt, bit for bit."""
    tokens, held = data(), {}
    for chunk in (None, PROMPT - QUESTION, CHUNK):
        site = replace(SITE, select=replace(SELECT, chunk=chunk))
        cache = Cache(CachePlan((site,)), 1, 128)
        read(cache, tokens, PROMPT)
        assert 8 * cache.nbytes().used == site.bits(PROMPT, PROMPT)
        held[chunk] = cache.segments[0].bodies[0].decoded(0).keys
    assert torch.equal(held[None], held[PROMPT - QUESTION]) and not torch.equal(held[None], held[CHUNK])


def test_no_more_is_held_than_what_is_kept_a_chunk_and_the_question():
    tokens, most, peaks = data(400), SINK + 24 + CHUNK + QUESTION, {}
    for chunk in (CHUNK, None):
        site = replace(SITE, select=replace(SELECT, keep=1.0, budget=24, chunk=chunk))
        for prompt in (200, 400):
            held = read(Cache(CachePlan((site,)), 1, 512, scratch=1), tokens, prompt)
            peaks[chunk, prompt] = max(stored for stored, _ in held), max(size for _, size in held)
    assert peaks[CHUNK, 200] == peaks[CHUNK, 400] and peaks[CHUNK, 400][0] == most
    assert peaks[None, 400][0] == 400 and peaks[None, 400][1] > 5 * peaks[CHUNK, 400][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(SELECT, chunk=0), "a chunk of 0 tokens reads nothing of the prompt"),
        (lambda: replace(SELECT, when="page"), "it needs when: prompt, heads: even"),
        (lambda: replace(SELECT, heads="adaptive"), "it needs when: prompt, heads: even"),
        (lambda: replace(SELECT, score=Score("attention", 0.1)), "whose queries are a number of tokens"),
        (lambda: replace(SELECT, score=Score("attention", 4, 0.1)), "without probes"),
        (lambda: replace(SELECT, score="key_norm"), "needs a score by attention"),
        (lambda: replace(SITE, select=replace(SELECT, chunk=7)), "a chunk of 7 tokens does not hold one page of 8"),
        (lambda: replace(SITE, tail=8), "the tail keeps 8 tokens of a prompt, but only the question of 6"),
        (lambda: replace(SITE, values=Affine(8, 0)), "chunk: 16 drops single tokens .* values are stored as affine"),
        (lambda: replace(SITE, merge=Merge()), "merging needs prompts as a whole"),
        (lambda: replace(SITE, hyper=Hyper()), "attention.hyper needs prompts as a whole"),
        (lambda: replace(SITE, compact=False, retrieve=Retrieve("pages", 8)), "retrieve needs prompts as a whole"),
        (
            lambda: CachePlan((SITE, replace(SITE, layer=1, select=replace(SELECT, chunk=32)))),
            r"chunks \(and questions\) of \[\(16, 6\), \(32, 6\)\]: give all of them one",
        ),
    ],
)
def test_what_cannot_be_read_in_chunks_is_refused(change, message):
    with pytest.raises(SmeltError, match=message):
        change()
