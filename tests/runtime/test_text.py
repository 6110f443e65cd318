"""Streamed text equals decoded text, whole characters at a time, and nothing of a stop string comes through."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

import smelt
from smelt.ir.errors import SmeltError
from smelt.runtime.text import Stream, Tokenizer

REFERENCE = Tokenizer(Path(smelt.__file__).parent / "reference")
TEXT = "def f(x):  # naïve 😀 中文 한국어\n    return '👩‍👩‍👧', x\n"
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as SentencePiece makes them: `▁` for spaces, the first one dropped, bytes where no token fits."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", "a", "b", "▁a", "▁b", "中", "�"]:
        vocabulary[token] = len(vocabulary)
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("fallback")
    core.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def stream(tokenizer: Tokenizer, ids: list[int], stop: Any = (), chunk: int = 1) -> tuple[list[str], Stream]:
    """The pieces that come out, the last one from `finish`."""
    s = Stream(tokenizer, stop)
    return [s.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)] + [s.finish()], s


def test_text_survives_the_way_there_and_back() -> None:
    ids = REFERENCE.encode(TEXT)
    assert len(ids) > 20 and all(0 <= i < 4096 for i in ids)
    assert REFERENCE.decode(ids) == TEXT


def test_reference_ids_of_end_and_beginning() -> None:
    assert REFERENCE.eos == (0,) and REFERENCE.bos == 0


def test_special_tokens_show_only_on_request() -> None:
    ids = REFERENCE.encode("a<|endoftext|>b")
    assert 0 in ids
    assert REFERENCE.decode(ids) == "ab" and REFERENCE.decode(ids, special=True) == "a<|endoftext|>b"
    assert REFERENCE.is_hidden(0) and REFERENCE.is_hidden(5000) and not REFERENCE.is_hidden(1)


def copy(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None, **files: Any) -> Tokenizer:
    """The reference tokenizer in a folder of its own, with its JSON changed and other files beside it."""
    read = json.loads((REFERENCE.folder / "tokenizer.json").read_text())
    change(read)
    (folder / "tokenizer.json").write_text(json.dumps(read))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer(folder)


def test_tokenizer_json_decides_on_special_tokens(tmp_path: Path) -> None:
    def begin(read: dict[str, Any]) -> None:
        read["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}})
        read["post_processor"]["special_tokens"] = {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        }

    tokenizer = copy(tmp_path, begin)
    assert tokenizer.encode("ab") == [0, *REFERENCE.encode("ab")]
    assert tokenizer.encode("ab", special=False) == REFERENCE.encode("ab")


def test_saved_truncation_and_padding_do_not_touch_a_prompt(tmp_path: Path) -> None:
    def limit(read: dict[str, Any]) -> None:
        read["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        read["padding"] = {
            "strategy": {"Fixed": 99},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

    assert copy(tmp_path, limit).encode(TEXT) == REFERENCE.encode(TEXT)


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config": {"eos_token_id": [7, 9]}, "config": {"eos_token_id": 3}}, (7, 9)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 3}}, (3,)),
        ({"config": {}, "tokenizer_config": {"eos_token": "<|endoftext|>"}}, (0,)),
        ({"tokenizer_config": {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}}, (0,)),
        ({"tokenizer_config": {"eos_token": "<no such token>"}}, ()),
        ({}, ()),
    ],
)
def test_eos_comes_from_the_first_file_that_names_it(
    tmp_path: Path, files: dict[str, Any], eos: tuple[int, ...]
) -> None:
    assert copy(tmp_path, **files).eos == eos


def test_without_a_tokenizer_only_text_is_refused(tmp_path: Path) -> None:
    shutil.copy(REFERENCE.folder / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos == (0,) and tokenizer.bos == 0
    for ask in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1]), lambda: Stream(tokenizer).push(1)):
        with pytest.raises(SmeltError, match=r"no tokenizer\.json.*token ids"):
            ask()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json cannot be read as a tokenizer"),
        ("generation_config.json", "{", r"generation_config\.json is not JSON"),
        ("generation_config.json", "[]", r"generation_config\.json must hold an object"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', r"generation_config\.json: eos_token_id must be"),
        ("generation_config.json", '{"eos_token_id": [1, true]}', r"generation_config\.json: eos_token_id must be"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(SmeltError, match=message):
        tokenizer.encode("a") if name == "tokenizer.json" else tokenizer.eos


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(SmeltError, match="character 1"):
        REFERENCE.encode("a\ud83d")


def test_characters_come_whole_and_as_soon_as_they_are() -> None:
    ids = REFERENCE.encode("a😀中b")
    pieces, s = stream(REFERENCE, ids)
    assert len(ids) > 4, "the characters must be split for this test to say anything"
    assert [piece for piece in pieces if piece] == ["a", "😀", "中", "b"]
    assert pieces[-1] == "" and s.count == len(ids) and s.stopped is None


def test_an_unfinished_character_comes_at_the_end_as_in_decode() -> None:
    ids = REFERENCE.encode("ab😀")[:-1]
    pieces, _ = stream(REFERENCE, ids)
    assert pieces[-1] == "\ufffd" and "".join(pieces) == REFERENCE.decode(ids) == "ab\ufffd"


def test_of_invalid_bytes_only_the_last_is_held() -> None:
    ff = REFERENCE.core.token_to_id("ÿ")  # the byte-level name of 0xFF
    pieces, _ = stream(REFERENCE, [ff, ff, ff])
    assert pieces == ["", "\ufffd", "\ufffd", "\ufffd"]


IDS = st.lists(st.integers(0, 4095) | st.integers(0, 260) | st.integers(4090, 4200), max_size=40)


@given(ids=IDS | PLAIN.map(REFERENCE.encode), chunk=st.integers(1, 7))
@example(ids=REFERENCE.encode(TEXT), chunk=1)
def test_pieces_join_to_the_decoded_text(ids: list[int], chunk: int) -> None:
    assert "".join(stream(REFERENCE, ids, chunk=chunk)[0]) == REFERENCE.decode(ids)


@given(data=st.data())
def test_pieces_join_where_bytes_fall_back(fallback: Tokenizer, data: st.DataObject) -> None:
    """Runs of bytes, valid or not, with special tokens and ids beyond the tokenizer in between."""
    emoji = [3 + byte for byte in "😀".encode()]
    part = st.sampled_from([[i] for i in (*range(3), *range(259, 268), *emoji, 3 + 0x0A)] + [emoji, emoji[:3], [300]])
    ids = [i for some in data.draw(st.lists(part, max_size=12)) for i in some]
    assert "".join(stream(fallback, ids)[0]) == fallback.decode(ids)


@pytest.mark.parametrize(
    "pieces",
    [
        ["a", "</s>", "▁b"],  # the space of `▁b` is dropped only at the beginning of the text
        ["▁", "▁", "▁a", "</s>", "</s>", "▁"],
        ["<0x61>", "</s>", "<0xFF>"],  # one run: the second byte makes the first invalid
        ["<0xE4>", "<s>", "<0xB8>", "<0xAD>", "a"],
        ["a", "�", "<0xE4>", "�", "b"],
    ],
    ids=str,
)
def test_neighbours_matter(fallback: Tokenizer, pieces: list[str]) -> None:
    ids = [fallback.core.token_to_id(piece) for piece in pieces]
    assert "".join(stream(fallback, ids)[0]) == fallback.decode(ids)


def test_a_run_of_bytes_is_held_until_it_ends(fallback: Tokenizer) -> None:
    ids = fallback.encode("a é b")
    pieces, _ = stream(fallback, ids)
    assert "é" in pieces[-3] + pieces[-2] and "".join(pieces) == fallback.decode(ids) == "a é b"


def test_the_window_does_not_grow_with_the_text() -> None:
    s = Stream(REFERENCE)
    s.push(REFERENCE.encode(TEXT) * 20)
    assert len(s._window) < 12


def emitting_at_once(tokenizer: Tokenizer, ids: list[int]) -> str:
    return "".join(tokenizer.decode([i]) for i in ids)


def dropping_replacements(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids).replace("\ufffd", "")


def losing_the_first_space(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids[:2]) + tokenizer.decode(ids[2:])


@pytest.mark.parametrize("mutant", [emitting_at_once, dropping_replacements, losing_the_first_space])
def test_simpler_streams_are_wrong_on_these_texts(mutant: Callable[..., str], fallback: Tokenizer) -> None:
    """The texts above can tell: each shortcut fails on one of them."""
    cases = [(REFERENCE, REFERENCE.encode(TEXT)[:-8]), (REFERENCE, REFERENCE.encode("ab😀")[:-1])]
    cases.append((fallback, fallback.encode("a b a b")))
    assert any(mutant(tokenizer, ids) != tokenizer.decode(ids) for tokenizer, ids in cases)


def cut(text: str, stops: list[str]) -> str:
    """What a reader who gets the text a character at a time has seen before a stop string is complete."""
    for end in range(len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(map(len, ends))]
    return text


@given(data=st.data(), chunk=st.integers(1, 5))
def test_text_ends_before_the_first_stop_string(data: st.DataObject, chunk: int) -> None:
    letters = st.text("ab\n😀", max_size=24)
    text = data.draw(letters)
    stops = data.draw(st.lists(st.text("ab\n😀", min_size=1, max_size=4), max_size=3))
    ids = REFERENCE.encode(text)
    pieces, s = stream(REFERENCE, ids, stops, chunk)
    assert "".join(pieces) == cut(text, stops)
    assert (s.stopped in stops) if any(stop in text for stop in stops) else s.stopped is None
    one, alone = stream(REFERENCE, ids, stops, 1)
    assert (alone.count, alone.stopped) == (s.count, s.stopped), "how many ids arrive at once must not matter"
    seen = ""
    for piece in one:
        seen += piece
        assert not any(stop in seen for stop in stops)


def test_a_stop_string_over_several_tokens() -> None:
    ids = REFERENCE.encode("x = 1\n\nclass Foo: pass\n")
    assert len(REFERENCE.encode("\n\nclass")) > 1
    pieces, s = stream(REFERENCE, ids, ["\n\nclass", "zzz"])
    assert "".join(pieces) == "x = 1" and s.stopped == "\n\nclass"
    assert REFERENCE.decode(ids[: s.count]).startswith("x = 1\n\nclass")
    assert "class" not in REFERENCE.decode(ids[: s.count - 1])
    assert s.push(ids) == "" and s.count < len(ids), "nothing is taken in after a stop"


def test_a_beginning_that_leads_nowhere_is_released() -> None:
    s = Stream(REFERENCE, "abX")
    a, b = REFERENCE.encode("a"), REFERENCE.encode("b")
    assert [s.push(a), s.push(b), s.push(a), s.push(a), s.push(b), s.finish()] == ["", "", "ab", "a", "", "ab"]


def test_a_stop_string_completed_at_the_end(fallback: Tokenizer) -> None:
    """A line feed is a byte token here: held back as part of a run, and found when the run ends with the text."""
    pieces, s = stream(fallback, fallback.encode("a b\n"), "\n")
    assert "".join(pieces) == "a b" and s.stopped == "\n"


def test_of_overlapping_stop_strings_the_first_to_end_wins() -> None:
    for chunk in (1, 9):
        pieces, s = stream(REFERENCE, REFERENCE.encode("xabcd"), ["abcd", "bc"], chunk)
        assert "".join(pieces) == "xa" and s.stopped == "bc"
        pieces, s = stream(REFERENCE, REFERENCE.encode("xabcd"), ["bc", "abc"], chunk)
        assert "".join(pieces) == "x" and s.stopped == "abc"
    ids = REFERENCE.encode(" return")
    assert len(ids) == 1, "within one token as between tokens"
    pieces, s = stream(REFERENCE, ids, ["eturn", "tu"])
    assert "".join(pieces) == " re" and s.stopped == "tu"


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: Any) -> None:
    with pytest.raises(SmeltError, match="stop"):
        Stream(REFERENCE, stop)
