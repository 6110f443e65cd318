"""Sessions: equal to the interpreter, a row by itself whatever its batch, a token by itself whatever its tree."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.codegen.unit import Unit
from smelt.ir import decode as drafts
from smelt.ir.cache import Cache, Select
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.runtime import session as session_module
from smelt.runtime.drafters import base
from smelt.runtime.session import CHUNK, Draw, Session

from ..ir.programs import FAMILIES, cached, captured, quantized

TOLERANCE = 1e-5  # of the largest logit; two layers in float32
VOCABULARY = 97
CACHES: dict[str, dict[str, Any]] = {
    "dense": {},
    "halves": {"dense": "float16"},
    # pages of 8 leave a tail of 8 to 16, so that short sequences are encoded too
    "coded": {"sink": 2, "tail": 8, "page": 8, "keys": Affine(8, 8, "channel", True), "values": Affine(8, 16)},
    "selected": {"sink": 2, "tail": 8, "page": 8, "select": Select("key_norm", 0.5), "values": Affine(8, 16)},
}


@cache
def plan(family: str = "llama", stored: str = "dense", bits: int | None = None) -> Plan:
    program = captured(family) if bits is None else quantized(captured(family), Affine(bits, 32))
    return lower(cached(program, **CACHES[stored]))


def prompt(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCABULARY, (length,), generator=random).tolist()


def stepped(session: Session, rows: list[list[int]], first: int) -> torch.Tensor:
    """Logits [B, n, V] behind the tokens of each row from `first` on, fed one at a time and committed."""
    out = []
    for at in range(first, len(rows[0])):
        positions = torch.tensor(session.cache.lengths)[:, None]
        out.append(session.step(torch.tensor([[row[at]] for row in rows]), positions)["logits"].clone())
        session.cache.commit([[0]] * len(rows))
    return torch.cat(out, 1)


def meant(program: Program, tokens: list[int], first: int, stored: bool) -> torch.Tensor:
    """The same of one row by the interpreter, over the reference cache or over the whole text at once."""
    ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None]
    if not stored:
        return interpret(program, {"tokens": ids, "positions": positions})["logits"][:, first:]
    assert program.cache is not None
    store, out = Cache(program.cache, 1, len(tokens)), []
    for piece in ([0, first], *([at, at + 1] for at in range(first, len(tokens)))):
        inputs = {"tokens": ids[:, slice(*piece)], "positions": positions[:, slice(*piece)]}
        store.begin(inputs["positions"])
        out.append(interpret(program, inputs, store)["logits"])
        store.commit([list(range(piece[1] - piece[0]))])
        store.end_prefill()
    return torch.cat(out[1:], 1)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float(((found - wanted).abs().max() / wanted.abs().max()).nan_to_num(nan=float("inf")))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_the_whole_text_at_once(family: str) -> None:
    tokens = prompt(40)
    for first in (1, 7, 33):
        session = Session(plan(family), 1, 64)
        last = session.prefill([tokens[:first]])["logits"]
        steps = torch.cat([last[:, None], stepped(session, [tokens], first)], 1)
        assert off(steps, meant(captured(family), tokens, first - 1, False)) < TOLERANCE


@pytest.mark.parametrize("stored", ["halves", "coded", "selected"])
@pytest.mark.parametrize("bits", [None, 4])
def test_steps_equal_the_interpreter_over_a_compressed_cache(stored: str, bits: int | None) -> None:
    """To a quarter of what the cache loses: between two codes the last bit of a value decides which it gets."""
    compiled, tokens = plan("llama", stored, bits), prompt(60)
    session = Session(compiled, 1, 64)
    session.prefill([tokens[:21]])
    wanted = meant(compiled.program, tokens, 21, True)
    lost = meant(plan("llama", "dense", bits).program, tokens, 21, False) - wanted
    assert (stepped(session, [tokens], 21) - wanted).square().mean() < lost.square().mean() / 16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", ["dense", "coded"])
def test_a_row_of_a_ragged_batch_equals_the_row_alone(family: str, stored: str) -> None:
    """Bit for bit, however long its neighbours are."""
    rows = [prompt(length) for length in (1, 5, 64, 65, 97)]
    batch = Session(plan(family, stored), len(rows), 160)
    together = batch.prefill(rows)["logits"].clone()
    more = [row + prompt(30, seed=9) for row in rows]
    later = stepped_from(batch, more)
    for number, row in enumerate(rows):
        single = Session(plan(family, stored), 1, 160)
        assert torch.equal(single.prefill([row])["logits"][0], together[number])
        assert torch.equal(stepped(single, [more[number]], len(row))[0], later[number])


def stepped_from(session: Session, rows: list[list[int]]) -> torch.Tensor:
    """As `stepped`, each row from its own length on, for as many tokens as the shortest rest has."""
    count = min(len(row) - length for row, length in zip(rows, session.cache.lengths, strict=True))
    out = []
    for _ in range(count):
        lengths = session.cache.lengths
        tokens = torch.tensor([[row[length]] for row, length in zip(rows, lengths, strict=True)])
        out.append(session.step(tokens, torch.tensor(lengths)[:, None])["logits"].clone())
        session.cache.commit([[0]] * len(rows))
    return torch.cat(out, 1)


LONG = (127, 128, 129, CHUNK, CHUNK + 188, 2 * CHUNK)


def test_long_prompts_are_read_in_chunks() -> None:
    rows = [prompt(length) for length in LONG]
    batch = Session(plan(), len(rows), 2 * CHUNK + 8)
    together = batch.prefill(rows)["logits"]
    assert batch.cache.lengths == list(LONG)
    for number, row in enumerate(rows):
        wanted = meant(captured("llama"), row, len(row) - 1, False)[0, 0]
        assert off(together[number], wanted) < TOLERANCE
        alone = Session(plan(), 1, 2 * CHUNK + 8).prefill([row])["logits"][0]
        assert off(together[number], alone) < TOLERANCE
    steps = stepped_from(batch, [row + prompt(3, seed=9) for row in rows])
    for number, row in enumerate(rows):
        wanted = meant(captured("llama"), row + prompt(3, seed=9), len(row), False)[0]
        assert off(steps[number], wanted) < TOLERANCE


def test_a_large_vocabulary_reads_fewer_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    row, widths = prompt(CHUNK + 5), []
    right = Session.step
    monkeypatch.setattr(
        Session,
        "step",
        lambda self, tokens, *rest, **more: widths.append(tokens.shape[1]) or right(self, tokens, *rest, **more),
    )
    whole = Session(plan(), 1, 2 * CHUNK).prefill([row])["logits"].clone()
    assert widths == [CHUNK, 8]
    widths.clear()
    monkeypatch.setattr(session_module, "LOGITS", 256 * VOCABULARY + 1)
    assert torch.equal(Session(plan(), 1, 2 * CHUNK).prefill([row])["logits"], whole)
    assert widths == [CHUNK, 8]  # of a chunk's logits only the last token's are there
    widths.clear()
    read = Session(plan(), 1, 2 * CHUNK).prefill([row], lambda *_: None)["logits"]
    assert torch.equal(read, whole) and widths == [256, 256, 8]


def test_every_prompt_token_is_harvested_with_the_logits_behind_it() -> None:
    rows = [prompt(length) for length in (3, 130)]
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    logits: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def harvest(row: int, tokens: torch.Tensor, behind: torch.Tensor) -> None:
        seen[row].append(tokens.clone())
        logits[row].append(behind.clone())

    Session(plan(), 2, 256).prefill(rows, harvest)
    for number, row in enumerate(rows):
        assert torch.cat(seen[number]).tolist() == row
        assert off(torch.cat(logits[number]), meant(captured("llama"), row, 0, False)[0]) < TOLERANCE


PARENTS = (0, 0, 0, 1, 1, 4, 5, 2, 3)
PATH = [0, 1, 4, 5, 6]


SHAPES = ([0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 1, 1])  # of trees: each node's parent


def drafted(session: Session, parents: list[int]) -> torch.Tensor:
    """Logits of a tree behind what the session holds; it is dropped."""
    seen = base.ancestors(tuple(parents), len(parents))
    positions = session.cache.lengths[0] + seen.sum(1)[None] - 1
    logits = session.step(torch.arange(5, 5 + len(parents))[None], positions, None, seen)["logits"].clone()
    session.cache.step = None
    return logits


def read_and_drafted(session: Session) -> list[torch.Tensor]:
    """Each tree twice, before and after the buffers of the cache move to make room for a wide one."""
    out = [drafted(session, parents) for parents in SHAPES for _ in range(2)]
    before = session.cache.generation
    drafted(session, [0] * 40)
    assert session.cache.generation > before
    return out + [drafted(session, parents) for parents in SHAPES]


def alone(parents: list[int]) -> torch.Tensor:
    session = Session(plan(), 1, 24, nodes=4)
    session.prefill([prompt(9)])
    return drafted(session, parents)


def test_a_step_finds_what_moved_and_sets_nothing_that_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are set again where trees or buffers of the cache lie elsewhere, and only there."""
    want = [*(alone(parents) for parents in SHAPES for _ in range(2)), *(alone(parents) for parents in SHAPES)]
    session, told = Session(plan(), 1, 24, nodes=4), list[bool]()
    session.prefill([prompt(9)])
    right = Unit.__call__

    def counted(self: Unit, moved: bool = True) -> None:
        told.append(moved)
        right(self, moved)

    with monkeypatch.context() as patch:
        patch.setattr(Unit, "__call__", counted)
        found = read_and_drafted(session)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert told.count(False) >= len(SHAPES) - 1 and told.count(True) >= len(SHAPES)


def test_the_comparison_sees_addresses_that_are_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    want, right, seen = [alone(parents) for parents in SHAPES], Unit.__call__, set[int]()
    session = Session(plan(), 1, 24, nodes=4)
    session.prefill([prompt(9)])

    def stale(self: Unit, moved: bool = True) -> None:
        right(self, moved and id(self) not in seen)
        seen.add(id(self))

    monkeypatch.setattr(Unit, "__call__", stale)
    held = [drafted(session, parents) for parents in SHAPES]
    assert torch.equal(held[0], want[0]) and not torch.equal(held[1], want[1])


def ancestors() -> torch.Tensor:
    seen = torch.eye(len(PARENTS), dtype=torch.bool)
    for node in range(1, len(PARENTS)):
        seen[node] |= seen[PARENTS[node]]
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stored", "bits"), [("dense", None), ("coded", 4), ("selected", None)])
def test_a_token_in_a_tree_gets_the_logits_it_gets_alone(family: str, stored: str, bits: int | None) -> None:
    """Bit for bit, in a batch of many rows: what makes speculation exact."""
    tree = DecodePlan(drafts.Recycle(Tree(PARENTS, (0, 0, 1, 0, 1, 0, 0, 0, 0)), 2))
    compiled = plan(family, stored, bits)
    drafted = lower(compiled.program.fork())
    drafted.program.decode = tree
    rows = [prompt(length) for length in (1, 20, 41, *range(50, 62))]
    session = Session(drafted, len(rows), 80)
    session.prefill(rows)
    tokens = torch.randint(0, VOCABULARY, (len(rows), len(PARENTS)), generator=torch.Generator().manual_seed(2))
    depths = ancestors().sum(1) - 1
    positions = torch.tensor(session.cache.lengths)[:, None] + depths
    logits = session.step(tokens, positions, None, ancestors())["logits"].clone()
    for number, row in enumerate(rows[:3]):
        alone = Session(compiled, 1, 80)
        alone.prefill([row])
        path = PATH[: session.cache.room()[number]]
        steps = stepped(alone, [row + tokens[number, path].tolist()], len(row))[0]
        assert torch.equal(steps, logits[number, path])
    # a query that sees its siblings too gets other logits
    session.step(tokens, positions, None, torch.ones(len(PARENTS), len(PARENTS), dtype=torch.bool).tril())
    assert not torch.equal(session.bound(len(PARENTS)).outputs["logits"][:3, 2:], logits[:3, 2:])


@pytest.mark.parametrize(("stored", "bits"), [("dense", None), ("halves", 4), ("coded", 4), ("selected", None)])
def test_a_step_allocates_nothing(stored: str, bits: int | None) -> None:
    """Bytes that torch's allocator gave out in a step of one token and its commit, between flushes of a page."""
    session = Session(plan("llama", stored, bits), 1, 64)
    session.prefill([prompt(19)])  # 2 sinks, 8 in the body, 9 in the tail: 7 more make a page leave
    token, position = torch.tensor([[5]]), torch.tensor([[19]])

    def step() -> None:
        session.step(token, position)
        session.cache.commit([[0]])
        position.add_(1)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        for _ in range(4):
            step()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    given = sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
    assert session.cache.lengths == [24] and 0 < given < 4 * 64
    logits = session.bound(1).outputs["logits"]
    session.step(token, position)
    assert session.bound(1).outputs["logits"] is logits


def test_a_prompts_large_buffers_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(plan(), 1, 600)
    session.prefill([prompt(520)])
    assert list(session._bound) == [(512, True, 0), (8, True, 0)]
    held = [bound.nbytes for bound in session._bound.values()]
    monkeypatch.setattr(session_module, "HELD", sum(held) // 2)
    session.cache.restart()
    session.prefill([prompt(520)])
    assert list(session._bound) == [(8, True, 0)]
    session.step(torch.tensor([[1]]), torch.tensor([[520]]))
    assert list(session._bound) == [(8, True, 0), (1, False, 0)]


def test_the_context_ends() -> None:
    session = Session(plan(), 1, 8)
    with pytest.raises(SmeltError, match="would reach 9 tokens, but the cache was made for a context of 8"):
        session.prefill([prompt(9)])
    session = Session(plan(), 1, 8)
    session.prefill([prompt(8)])
    with pytest.raises(SmeltError, match="would reach 9 tokens"):
        session.step(torch.tensor([[1]]), torch.tensor([[8]]))


def test_a_program_without_a_cache_has_no_session() -> None:
    with pytest.raises(SmeltError, match=r"llama has no cache, so it cannot generate: add the step cache\.insert"):
        Session(lower(captured("llama")), 1, 8)


def chained(session: Session, tokens: list[int], new: int, running: list[bool]) -> list[list[int]]:
    """Greedy tokens of every row, by chains that end where a page leaves."""
    out: list[list[int]] = []
    draw = Draw(0, 0.0, torch.zeros(len(tokens), dtype=torch.int64))
    while len(out) < new:
        room = min(r for r, runs in zip(session.cache.room(), running, strict=True) if runs)
        last = out[-1] if out else tokens
        out += session.chain(last, running, min(room, new - len(out)), draw)
    return out


@pytest.mark.parametrize("stored", CACHES)
def test_a_chain_is_its_steps_one_by_one(stored: str) -> None:
    prompts, new = [prompt(9), prompt(14, 1)], 30
    single, several = Session(plan(stored=stored), 2, 64), Session(plan(stored=stored), 2, 64)
    logits = single.prefill(prompts)["logits"]
    first = several.prefill(prompts)["logits"].argmax(-1).tolist()
    tokens = []
    for _ in range(new + 1):
        tokens.append(logits.argmax(-1).tolist())
        at = torch.tensor(single.cache.lengths)[:, None]
        logits = single.step(torch.tensor(tokens[-1])[:, None], at)["logits"][:, 0]
        single.cache.commit([[0], [0]])
    assert [first, *chained(several, first, new, [True, True])] == tokens
    assert several.cache.lengths == [9 + new, 14 + new]
    assert several.cache.stored(0) == [sum(plan(stored=stored).program.cache[0].counts(n)) for n in (9 + new, 14 + new)]  # type: ignore[index]  # it has a cache


def test_a_chain_that_is_closed_keeps_what_it_yielded() -> None:
    session = Session(plan(), 1, 64)
    first = session.prefill([prompt(9)])["logits"].argmax(-1).tolist()
    chain = session.chain(first, [True], 20, Draw(0, 0.0, torch.zeros(1, dtype=torch.int64)))
    begun = [next(chain)[0], next(chain)[0]]
    chain.close()
    assert session.cache.lengths == [11]
    rest = chained(session, [begun[-1]], 5, [True])
    other = Session(plan(), 1, 64)
    assert other.prefill([prompt(9)])["logits"].argmax(-1).tolist() == first
    assert chained(other, first, 7, [True]) == [[t] for t in begun] + rest


def test_a_row_that_stands_still_in_a_chain_is_as_it_was() -> None:
    alone, both = Session(plan(), 1, 64), Session(plan(), 2, 64)
    first = alone.prefill([prompt(9)])["logits"].argmax(-1).tolist()
    both.prefill([prompt(9), prompt(14, 1)])
    moved = chained(both, [first[0], 3], 6, [True, False])
    assert both.cache.lengths == [15, 14]
    assert [tokens[0] for tokens in moved] == [tokens[0] for tokens in chained(alone, first, 6, [True])]
