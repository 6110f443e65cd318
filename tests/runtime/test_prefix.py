"""A prefix that was read once: continued, kept in files, edited and joined, as if the context had been read there."""

import struct
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import smelt
from smelt.ir.errors import SmeltError
from smelt.runtime import prefix_file
from smelt.runtime.prefix import Prefix

from .. import tiny

pytest.importorskip("constriction")
CODED = [
    {"cache.insert": {"dtype": "float16"}},
    {"cache.select": {"score": "key_norm", "keep": 0.5, "sink": 2, "tail": 16, "page": 16, "skip_layers": [0]}},
    {"cache.encode": {"keys": {"affine": {"bits": 8, "group": 8, "axis": "channel"}},
                      "values": {"affine": {"bits": 8, "group": 16}}, "sink": 2, "tail": 16, "page": 16}},
]  # fmt: skip
CONTEXT = list(range(700, 830))
QUESTION = [5, 900, 33]


@cache
def compiled(recipe: str = "none", *overrides: str) -> Any:
    """The tiny model, run by the interpreter: what is tested here is no kernel."""
    given: Any = {"name": recipe, "family": "cache", "does": "x", "steps": CODED} if recipe == "coded" else recipe
    return smelt.compile(tiny.model(), given, target="torch", overrides=overrides)


def parts_close(a: Prefix, b: Prefix, tolerance: float = 2e-3) -> bool:
    """Equal up to the rounding of float16."""
    pairs = [(a.saved.parts[name], part) for name, part in b.saved.parts.items()]
    return all(x.shape == y.shape and torch.allclose(x.float(), y.float(), tolerance, tolerance) for x, y in pairs)


@pytest.mark.parametrize("recipe", ["none", "token-recycling"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}])
def test_continuing_a_prefix_is_reading_it_all(recipe: str, options: dict[str, Any]) -> None:
    lm = compiled(recipe)
    prefix = lm.read(CONTEXT)
    whole = lm.generate(CONTEXT + QUESTION, max_new_tokens=12, **options)
    for _ in range(2):  # it is not used up
        assert lm.generate(QUESTION, prefix=prefix, max_new_tokens=12, **options) == whole
    assert lm.generate(QUESTION, max_new_tokens=12, **options) != whole
    batch = lm.generate([QUESTION, [*QUESTION, 7, 8]], prefix=prefix, max_new_tokens=12)
    assert batch == [lm.generate(CONTEXT + more, max_new_tokens=12) for more in (QUESTION, [*QUESTION, 7, 8])]


def test_text_is_read_as_tokens_are() -> None:
    lm = compiled()
    text = "def area(width, height):\n    return width"
    prefix = lm.read(text)
    assert list(prefix.tokens) == lm.tokenizer.encode(text) and len(prefix) == len(prefix.tokens)
    assert lm.generate(" * ", prefix=prefix, max_new_tokens=5) == lm.generate(
        " * ", prefix=lm.read(torch.tensor(prefix.tokens)), max_new_tokens=5
    )
    assert "".join(lm.stream(" * ", prefix=prefix, max_new_tokens=5)) == lm.generate(
        " * ", prefix=prefix, max_new_tokens=5
    )


@pytest.mark.parametrize("recipe", ["none", "coded", "cachegen"])
def test_a_lossless_file_gives_every_bit_back(recipe: str, tmp_path: Path) -> None:
    lm = compiled(recipe)
    prefix = lm.read(CONTEXT)
    size = prefix.save(tmp_path / "a.kv", ["lossless"])
    assert size == (tmp_path / "a.kv").stat().st_size
    back = lm.load_prefix(tmp_path / "a.kv")
    assert back.tokens == prefix.tokens and back.saved.parts.keys() == prefix.saved.parts.keys()
    for name, part in prefix.saved.parts.items():
        assert part.dtype == back.saved.parts[name].dtype and torch.equal(part, back.saved.parts[name])
    wanted = lm.generate(QUESTION, prefix=prefix, max_new_tokens=20)
    assert lm.generate(QUESTION, prefix=back, max_new_tokens=20) == wanted


@pytest.mark.parametrize("recipe", ["coded", "cachegen"])
def test_an_artefact_loads_what_the_compiled_model_saved(recipe: str, tmp_path: Path) -> None:
    lm = compiled(recipe)
    lm.save(tmp_path / "lm.smelt")
    lm.read(CONTEXT).save(tmp_path / "a.kv", ["lossless"])
    again = smelt.load(tmp_path / "lm.smelt", target="torch")
    prefix = again.load_prefix(tmp_path / "a.kv")
    assert again.generate(QUESTION, prefix=prefix) == lm.generate(QUESTION, prefix=lm.read(CONTEXT))


def test_a_level_is_off_by_half_a_step_at_most_and_smaller_than_the_next_finer(tmp_path: Path) -> None:
    lm = compiled("cachegen")
    prefix, sizes = lm.read(CONTEXT), []
    for level in ("high", "medium", "low"):
        sizes.append(prefix.save(tmp_path / level, [level]))
        back = lm.load_prefix(tmp_path / level)
        assert back.notes["levels"] == [level] and back.notes["bytes"] == sizes[-1]
        assert all(torch.equal(a[:, :4], back.saved.parts[n][:, :4]) for n, a in prefix.saved.parts.items() if a.dim())
        for name, part in prefix.saved.parts.items():
            if "tail_v" in name:
                spread = part[:, 4:].float().std(1, unbiased=False, keepdim=True)
                off = ((back.saved.parts[name] - part).float().abs()[:, 4:] / spread).max()
                step = {"high": 0.5, "medium": 1.0, "low": 1.75}[level]
                assert step / 4 < off < step / 2 + 0.01
        assert isinstance(lm.generate(QUESTION, prefix=back, max_new_tokens=3), list)
    assert sizes == sorted(sizes, reverse=True)


def test_a_time_to_first_token_chooses_levels_and_text(tmp_path: Path) -> None:
    lm = compiled("cachegen", "cache.code.chunk=32")
    prefix = lm.read(CONTEXT)
    size = prefix.save(tmp_path / "all.kv")
    plenty = lm.load_prefix(tmp_path / "all.kv", bandwidth=1e6, seconds=1.0)
    assert plenty.notes["levels"] == ["high"] * 4 and plenty.notes["bytes"] < size
    little = lm.load_prefix(tmp_path / "all.kv", bandwidth=1e6, seconds=0.0)
    assert little.notes["levels"] == ["low"] * 4 and little.notes["bytes"] < plenty.notes["bytes"]
    text = lm.load_prefix(tmp_path / "all.kv", bandwidth=1e3, seconds=1.0, speed=1e4)
    assert text.notes["levels"] == ["text"] * 4 and parts_close(text, prefix)
    assert not parts_close(plenty, prefix)
    with pytest.raises(SmeltError, match="come together"):
        lm.load_prefix(tmp_path / "all.kv", bandwidth=1.0)


def test_text_between_levels_is_read_behind_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = compiled("cachegen", "cache.code.chunk=32")
    prefix = lm.read(CONTEXT)
    prefix.save(tmp_path / "all.kv")
    monkeypatch.setattr("smelt.runtime.prefix.choose", lambda *_: [0, -1, -1, 0])
    mixed = lm.load_prefix(tmp_path / "all.kv", bandwidth=1.0, seconds=1.0)
    assert mixed.notes["levels"] == ["high", "text", "text", "high"]
    for name in ("0.tail_k", "0.tail_v"):  # the first layer's do not depend on what stands before
        mine, exact = mixed.saved.parts[name], prefix.saved.parts[name]
        assert torch.allclose(mine[:, 36:100].float(), exact[:, 36:100].float(), atol=2e-3)
        assert not torch.allclose(mine[:, 100:].float(), exact[:, 100:].float(), atol=2e-3)


def test_another_model_recipe_or_option_is_refused_by_name(tmp_path: Path) -> None:
    prefix = compiled("none").read(CONTEXT)
    prefix.save(tmp_path / "a.kv")
    other = smelt.compile(tiny.write_model(tmp_path / "other", rms_norm_eps=1e-3), "none", target="torch")
    for lm, message in [
        (compiled("coded"), "made by the recipe none, this is coded"),
        (other, "made by the model model, this is other|made by another"),
    ]:
        with pytest.raises(SmeltError, match=message):
            lm.load_prefix(tmp_path / "a.kv")
        with pytest.raises(SmeltError, match=message):
            lm.generate(QUESTION, prefix=prefix)
    tuned = compiled("none", "cache.insert.dtype=float16")
    with pytest.raises(SmeltError, match="the recipe's options differ"):
        tuned.load_prefix(tmp_path / "a.kv")


@pytest.mark.parametrize("recipe", ["coded", "cachegen"])
def test_a_cut_or_altered_file_loads_nothing(recipe: str, tmp_path: Path) -> None:
    lm = compiled(recipe)
    prefix, path = lm.read(CONTEXT), tmp_path / "a.kv"
    prefix.save(path)
    whole = path.read_bytes()
    for at in range(7, len(whole), len(whole) // 25):
        for bad in (whole[:at], whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]):
            path.write_bytes(bad)
            with pytest.raises(SmeltError, match=str(path)):
                loaded = lm.load_prefix(path)
                assert loaded.notes["bytes"] < len(whole)  # a level that was not read may be damaged
                raise SmeltError(str(path))


@pytest.mark.parametrize("recipe", ["coded", "cachegen"])
def test_a_forged_file_is_refused_before_it_takes_memory(recipe: str, tmp_path: Path) -> None:
    """Hashes only say that a file is whole: one that was made to harm has right hashes."""
    lm = compiled(recipe)
    path = tmp_path / "a.kv"
    lm.read(CONTEXT).save(path)
    read = prefix_file.Blocks(path)
    blocks = {name: read.read(name) for name in read.names}

    def refused(facts: dict[str, Any], blocks: dict[str, bytes], message: str) -> None:
        prefix_file.write(path, facts, blocks)
        with pytest.raises(SmeltError, match=message):
            lm.load_prefix(path)

    facts = read.facts
    refused({}, blocks, "does not describe a prefix")
    refused({**facts, "length": 1 << 40}, blocks, "context is 256")
    refused({**facts, "length": 129, "prompt": 129}, blocks, "its tokens are not of this model")
    refused(facts, {**blocks, "tokens": struct.pack("<130i", *[1 << 30] * 130)}, "its tokens are not of this model")
    refused(facts, {name: data for name, data in blocks.items() if name != "tokens"}, "no block 'tokens'")
    if recipe == "coded":
        parts = facts["lossless"]["parts"]
        huge = [[parts[0][0], parts[0][1], [1 << 20, 1 << 20], parts[0][3]], *parts[1:]]
        refused({**facts, "lossless": {"parts": huge}}, blocks, "would take more than")
        for wrong in (["0.x", "object", [1], [0]], ["0.x", "uint8", [-1], [0]], ["0.x", "uint8", [1], [0, 0]], ["0.x"]):
            refused({**facts, "lossless": {"parts": [wrong, *parts]}}, blocks, "part '0.x'|does not describe")
        refused({**facts, "lossless": {"parts": parts[1:]}}, blocks, "tables|part|symbols|too short|made for")
        refused(facts, {**blocks, "lossless.tables": b"\0" * 512}, "tables|weight|rows")
        return
    code = facts["coded"]
    refused({**facts, "coded": {**code, "tables": {}}}, blocks, "it has no level")
    refused({**facts, "coded": {**code, "code": {**code["code"], "chunk": 0}}}, blocks, "cannot be")
    refused({**facts, "coded": {**code, "tables": {"high": {"keys": [1 << 30, 4]}}}}, blocks, "tables of keys")
    refused(facts, {**blocks, "scales": blocks["scales"][:-2]}, "scales")
    refused(facts, {**blocks, "sinks": b""}, "sinks")
    refused(facts, {**blocks, "high.0": blocks["high.0"][:9]}, "cut|damaged")


def test_levels_that_are_not_there_are_named(tmp_path: Path) -> None:
    prefix = compiled("cachegen").read(CONTEXT)
    for levels, message in [(["best"], "no level 'best'"), ([], "give names"), (["low", "low"], "give names")]:
        with pytest.raises(SmeltError, match=message):
            prefix.save(tmp_path / "a.kv", levels)
    with pytest.raises(SmeltError, match="compile with a step"):
        compiled("none").read(CONTEXT).save(tmp_path / "a.kv", ["high"])
    assert not list(tmp_path.iterdir())


EDITS = [
    (40, 50, [9, 8, 7]),
    (40, 43, [9] * 20),
    (0, 5, [3]),
    (60, 60, [1, 2]),
    (20, 90, []),
    (0, 3, []),
    (130, 130, [4]),
]


@pytest.mark.parametrize(("start", "end", "new"), EDITS)
def test_an_edit_is_exact_where_nothing_stands_before_and_in_the_first_layer(
    start: int, end: int, new: list[int]
) -> None:
    lm = compiled("pie")
    prefix = lm.read(CONTEXT)
    edited = prefix.edit(start, end, new)
    tokens = CONTEXT[:start] + new + CONTEXT[end:]
    assert list(edited.tokens) == tokens and edited.notes == {"edits": 1} and len(prefix) == 130
    whole = lm.read(tokens)
    fresh = start + len(new)
    for name, part in whole.saved.parts.items():
        mine = edited.saved.parts[name]
        if not part.dim():
            continue
        exact = slice(None) if name.startswith("0.") else slice(0, fresh)  # layer 0 knows tokens and positions alone
        assert mine.shape == part.shape
        assert torch.allclose(mine[:, exact].float(), part[:, exact].float(), atol=4e-3)
    if 0 < fresh < len(tokens) and (start, end) != (0, 3):
        assert not torch.allclose(
            edited.saved.parts["1.tail_v"].float(), whole.saved.parts["1.tail_v"].float(), atol=4e-3
        )
    unturned = torch.cat([whole.saved.parts["0.tail_k"][:, :fresh], prefix.saved.parts["0.tail_k"][:, end:]], 1)
    if fresh != end and fresh < len(tokens):  # mutant: keys that stay as they were
        assert not torch.allclose(unturned.float(), whole.saved.parts["0.tail_k"].float(), atol=4e-2)


def test_what_is_read_again_behind_an_edit_comes_nearer_to_reading_it_all() -> None:
    lm = compiled("pie")
    prefix, whole = lm.read(CONTEXT), lm.read([*CONTEXT[:40], 9, *CONTEXT[50:]])
    off = []
    for recompute in (0, 40, 1000):
        edited = prefix.edit(40, 50, [9], recompute)
        off.append(float((edited.saved.parts["1.tail_v"] - whole.saved.parts["1.tail_v"]).float().norm()))
    assert off[0] > off[1] > off[2] and off[2] < 1e-2
    eager = compiled("pie", "cache.edit.recompute=1000")
    assert parts_close(eager.read(CONTEXT).edit(40, 50, [9]), eager.read([*CONTEXT[:40], 9, *CONTEXT[50:]]))


def test_an_edited_prefix_goes_on_and_is_edited_again() -> None:
    lm = compiled("pie")
    edited = lm.read(CONTEXT).edit(10, 20, [1, 2]).edit(100, 100, [3])
    assert edited.notes == {"edits": 2} and len(edited) == 123
    assert len(lm.generate(QUESTION, prefix=edited, max_new_tokens=4)) == 4


def test_edits_that_cannot_be_say_why() -> None:
    prefix = compiled("pie").read(CONTEXT)
    for given, message in [
        ((5, 3, [1]), "do not lie in the prefix's 130"),
        ((0, 131, [1]), "do not lie in the prefix's 130"),
        ((0, 130, []), "nothing of the prefix would be left"),
        ((0, 1, [1] * 200), "would have 329 tokens, but the model's context is 256"),
        ((0, 1, [1], -1), "-1 is negative"),
    ]:
        with pytest.raises(SmeltError, match=message):
            prefix.edit(*given)
    with pytest.raises(SmeltError, match="have left the tail of layer 0 and are stored as affine"):
        compiled("coded").read(CONTEXT).edit(0, 1, [1])


@pytest.mark.parametrize("recipe", ["parallel-context", "coded"])
def test_one_piece_is_the_context(recipe: str) -> None:
    lm = compiled(recipe)
    assert parts_close(lm.read([CONTEXT]), lm.read(CONTEXT))
    assert parts_close(lm.read([CONTEXT[6:]], sink=CONTEXT[:6]), lm.read(CONTEXT))


def test_pieces_see_the_sink_and_themselves() -> None:
    lm = compiled("parallel-context")
    pieces = [CONTEXT[:30], CONTEXT[30:37], CONTEXT[37:]]
    sink = [11, 12]
    joined = lm.read(pieces, sink=sink)
    assert list(joined.tokens) == sink + CONTEXT and joined.notes == {"pieces": [30, 7, 93]}
    at = 2
    for piece in pieces:
        alone = lm.read(sink + piece).saved.parts
        for layer in range(2):
            mine = joined.saved.parts[f"{layer}.tail_v"][:, at : at + len(piece)]
            assert torch.allclose(mine.float(), alone[f"{layer}.tail_v"][:, 2:].float(), atol=4e-3)
        at += len(piece)
    whole = lm.read(sink + CONTEXT).saved.parts
    keys = joined.saved.parts["0.tail_k"]
    assert torch.allclose(keys.float(), whole["0.tail_k"].float(), atol=6e-3)  # each at its place in the whole
    assert not torch.allclose(joined.saved.parts["1.tail_v"].float(), whole["1.tail_v"].float(), atol=4e-3)


def test_what_follows_attends_to_all_pieces() -> None:
    lm = compiled("parallel-context")
    pieces = [CONTEXT[:40], CONTEXT[40:80], CONTEXT[80:]]
    base = lm.complete([QUESTION], prefix=lm.read(pieces), max_new_tokens=8).rows[0].tokens
    for number in range(3):
        other = [list(piece) for piece in pieces]
        other[number] = [t + 1500 for t in other[number]]
        assert lm.complete([QUESTION], prefix=lm.read(other), max_new_tokens=8).rows[0].tokens != base


def test_pieces_by_default_share_the_first_tokens_of_the_first() -> None:
    lm = compiled("parallel-context")
    pieces = [CONTEXT[:30], CONTEXT[30:60]]
    assert parts_close(lm.read(pieces), lm.read([CONTEXT[4:30], CONTEXT[30:60]], sink=CONTEXT[:4]), 0)


def test_a_question_may_read_the_best_of_the_pieces_alone() -> None:
    """The paper's selective attention is a retrieval behind the joined context."""
    steps: list[Any] = [{"cache.insert": {"dtype": "float16"}}, {"cache.parallel": {"sink": 4}}]
    given = {"by": "scan", "dense_layers": 0, "sink": 4, "tail": 8, "page": 8}
    out = []
    for budget in (16, 240):
        recipe = {
            "name": "x",
            "family": "cache",
            "does": "x",
            "steps": [*steps, {"cache.retrieve": {**given, "budget": budget}}],
        }
        lm = smelt.compile(tiny.model(), recipe, target="torch")
        out.append(lm.generate(QUESTION, prefix=lm.read([CONTEXT[:60], CONTEXT[60:]]), max_new_tokens=12))
    lm = compiled("parallel-context")
    dense = lm.generate(QUESTION, prefix=lm.read([CONTEXT[:60], CONTEXT[60:]]), max_new_tokens=12)
    assert out[1] == dense and out[0] != dense


def test_contexts_that_cannot_be_read_say_why() -> None:
    lm = compiled("parallel-context")
    for context, sink, message in [
        ([], None, "the context is empty"),
        ("", None, "the context is empty"),
        ([[1], []], None, "piece 1 is empty"),
        ([1, 2], [3], "one context has its own beginning"),
        ([[1] * 200, [2] * 100], None, "would have 300 tokens, but the model's context is 256"),
        ([1] * 300, None, "would have 300 tokens"),
    ]:
        with pytest.raises(SmeltError, match=message):
            lm.read(context, sink=sink)
    with pytest.raises(SmeltError, match="more are asked for"):
        lm.generate([1] * 100, prefix=lm.read(CONTEXT), max_new_tokens=64)
    with pytest.raises(SmeltError, match="not a str"):
        lm.generate(QUESTION, prefix="text")
    with pytest.raises(SmeltError, match="prompt 0 is empty"):
        lm.generate("", prefix=lm.read(CONTEXT))


def test_a_prefix_is_a_value() -> None:
    prefix = compiled().read(CONTEXT)
    assert prefix.nbytes == sum(part.numel() * part.element_size() for part in prefix.saved.parts.values())
    assert replace(prefix, notes={"x": 1}) == prefix
