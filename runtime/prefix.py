"""A prompt that was read once: its tokens and its compressed cache, to continue from, to edit, to keep in a file.

`Reader` makes prefixes with one compiled plan. A prefix belongs to the program that made it: the same weights, the same
steps of its recipe; another program refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..codegen.plan import Plan
from ..ir.cache import Cache
from ..ir.cache.saved import Saved, cut, join, put_back, take_out, turned
from ..ir.errors import SmeltError
from . import prefix_code, prefix_lossless
from .prefix_file import Blocks, write
from .prefix_levels import TEXT, Offer, choose
from .session import Session

Ids: TypeAlias = Sequence[int]
LOSSLESS = "lossless"
SINK = 4  # first tokens of the first piece that all pieces see, where nothing else is said


@dataclass(frozen=True)
class Prefix:
    """`tokens` and what the cache stores of them; `notes`: levels and bytes of a file, pieces, edits."""

    tokens: tuple[int, ...]
    saved: Saved
    reader: Reader = field(repr=False, compare=False)
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache of these tokens takes."""
        return self.saved.nbytes

    def save(self, path: str | Path, levels: Sequence[str] | None = None) -> int:
        """Write a file, whole or not at all, and return its bytes; `Compiled.load_prefix` reads it in any process.

        levels: names of the recipe's levels (cache.code), all of them by default; `lossless` alone stores the cache bit
        for bit, and is the default of recipes without levels.
        """
        return self.reader.save(self, Path(path), levels)

    def edit(self, start: int, end: int, new: str | Ids, recompute: int | None = None) -> Prefix:
        """The prefix with tokens `start` … `end - 1` replaced by `new`, text or ids; this one stays as it is.

        Positional Integrity Encoding (Let the Code LLM Edit Itself When You Edit the Code, 2024): the keys behind are
        turned to their new positions and nothing behind is read again, but the first `recompute` tokens (default: what
        the recipe's step cache.edit says, else none).
        """
        return self.reader.edit(self, start, end, new, recompute)


class Reader:
    """Reads contexts with a plan; `session(batch, tokens)` lends a session with room for so many tokens a row."""

    def __init__(
        self,
        plan: Plan,
        session: Callable[[int, int], Session],
        encode: Callable[[str | Ids], list[int]],
        context: int,
        stamp: Mapping[str, str],
    ) -> None:
        """`stamp`: what tells this program from others, by name: `model`, `recipe` and `program`, a hash of it all."""
        assert plan.program.cache is not None
        self.plan, self.cache_plan, self.stamp = plan, plan.program.cache, dict(stamp)
        self._session, self._encode, self._context = session, encode, context

    def read(self, context: Any, sink: str | Ids | None = None) -> Prefix:
        """Read one context, or a list of pieces that do not see each other; see `Compiled.read`."""
        pieces: list[Any] = list(context) if isinstance(context, list | tuple) else [0]
        if not pieces or not isinstance(pieces[0], str | Sequence | torch.Tensor):
            if sink is not None:
                raise SmeltError("read: a sink stands before a list of pieces; one context has its own beginning")
            tokens = self._ids("the context", context)
            self._fits(len(tokens))
            session = self._session(1, len(tokens))
            session.prefill([tokens])
            return Prefix(tuple(tokens), take_out(session.cache, 0), self)
        return self._parallel([self._ids(f"piece {number}", piece) for number, piece in enumerate(pieces)], sink)

    def check(self, prefix: Prefix) -> None:
        """Raises SmeltError for a prefix that another program made."""
        self._check_stamp(prefix.reader.stamp, "the prefix")

    def edit(self, prefix: Prefix, start: int, end: int, new: str | Ids, recompute: int | None) -> Prefix:
        """See `Prefix.edit`."""
        length = len(prefix)
        if not 0 <= start <= end <= length:
            raise SmeltError(f"edit: tokens {start} to {end} do not lie in the prefix's {length}")
        given = self.plan.program.facts.get("edit") or {}
        again = int(given.get("recompute", 0)) if recompute is None else recompute
        if again < 0:
            raise SmeltError(f"edit: recompute counts tokens behind the edit, {again} is negative")
        fresh = list(self._encode(new)) if len(new) else []
        again = min(again, length - end)
        if not fresh and end + again == length and not start:
            raise SmeltError("edit: nothing of the prefix would be left")
        tokens = [*prefix.tokens[:start], *fresh, *prefix.tokens[end:]]
        self._fits(len(tokens))
        old = self._opened(prefix.saved, "an edit")
        shift = len(fresh) - (end - start)
        behind = turned(cut(old, end + again, length), self.cache_plan, shift)
        pieces = [cut(old, 0, start)]
        if read := [*fresh, *prefix.tokens[end : end + again]]:
            pieces.append(self._compute(pieces[0], read))
        notes = {"edits": prefix.notes.get("edits", 0) + 1}
        return Prefix(tuple(tokens), self._closed(join([*pieces, behind])), self, notes)

    def save(self, prefix: Prefix, path: Path, levels: Sequence[str] | None) -> int:
        """See `Prefix.save`."""
        code = next((site.code for site in self.cache_plan.sites if site.code is not None), None)
        if isinstance(levels, str):
            levels = [levels]
        names = ([level.name for level in code.levels] if code else [LOSSLESS]) if levels is None else list(levels)
        saved = prefix.saved
        facts = {"stamp": self.stamp, "length": saved.length, "prompt": saved.prompt}
        blocks = {"tokens": torch.tensor(prefix.tokens, dtype=torch.int32).numpy().astype("<i4").tobytes()}
        if names == [LOSSLESS]:
            more, made = prefix_lossless.pack(saved.parts)
            return write(path, {**facts, LOSSLESS: more}, {**blocks, **made})
        if code is None:
            raise SmeltError(
                f"save: the recipe has no levels, so it can store a prefix as {LOSSLESS} only, not {names}; "
                "compile with a step cache.code, as the recipe cachegen has one"
            )
        if not names or len(set(names)) < len(names) or LOSSLESS in names:
            raise SmeltError(f"save: give names of levels, each once, or {LOSSLESS} alone, not {names}")
        more, made = prefix_code.encode(self._opened(saved, "a coded level"), self.cache_plan, code, names)
        return write(path, {**facts, "coded": more}, {**blocks, **made})

    def load(
        self, path: Path, bandwidth: float | None = None, seconds: float | None = None, speed: float | None = None
    ) -> Prefix:
        """See `Compiled.load_prefix`."""
        blocks = Blocks(path)
        try:
            return self._loaded(blocks, bandwidth, seconds, speed)
        except SmeltError as error:
            raise error if str(path) in str(error) else SmeltError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as fault:
            raise SmeltError(f"{path}: the header does not describe a prefix ({fault!r})") from fault

    def _loaded(self, blocks: Blocks, bandwidth: float | None, seconds: float | None, speed: float | None) -> Prefix:
        facts = blocks.facts
        self._check_stamp(facts["stamp"], "it")
        length, prompt = int(facts["length"]), int(facts["prompt"])
        if not 0 < length <= self._context or not 0 <= prompt <= length:
            raise SmeltError(f"it says that it has {length} tokens, the model's context is {self._context}")
        tokens = torch.frombuffer(bytearray(blocks.read("tokens")), dtype=torch.int32).tolist()
        vocabulary = int(self.plan.program.facts["vocabulary"])
        if len(tokens) != length or not all(0 <= token < vocabulary for token in tokens):
            raise SmeltError("its tokens are not of this model")
        if LOSSLESS in facts:
            if seconds is not None:
                raise SmeltError("it is stored lossless, so there is no level to choose; load it without `seconds`")
            parts = prefix_lossless.unpack(facts[LOSSLESS], blocks.read, self._most(length))
            saved = Saved(length, prompt, False, parts)
            put_back(self._scratch(length), saved)  # refuses what the plan does not store
            return Prefix(tuple(tokens), saved, self, {"levels": [LOSSLESS], "bytes": blocks.taken})
        decoder = prefix_code.Decoder(facts["coded"], blocks.read, self.cache_plan, length)
        choices = self._choices(blocks, decoder, bandwidth, seconds, speed)
        pieces, waiting = [decoder.sinks()], []
        for number, choice in enumerate(choices):
            if choice == TEXT:
                waiting += tokens[decoder.chunks[number]]
                continue
            if waiting:
                pieces, waiting = [*pieces, self._compute(join(pieces), waiting)], []
            pieces.append(decoder.chunk(number, decoder.levels[choice]))
        if waiting:
            pieces.append(self._compute(join(pieces), waiting))
        named = ["text" if choice == TEXT else decoder.levels[choice] for choice in choices]
        return Prefix(tuple(tokens), self._closed(join(pieces)), self, {"levels": named, "bytes": blocks.taken})

    def _choices(
        self,
        blocks: Blocks,
        decoder: prefix_code.Decoder,
        bandwidth: float | None,
        seconds: float | None,
        speed: float | None,
    ) -> list[int]:
        """The level of each chunk: the finest where no time is given."""
        if (bandwidth is None) != (seconds is None):
            raise SmeltError("load_prefix: bandwidth (bytes/s) and seconds (to the first token) come together")
        if bandwidth is None or seconds is None:
            return [0] * len(decoder.chunks)
        offers = []
        for number, chunk in enumerate(decoder.chunks):
            sizes = tuple(blocks.size(f"{name}.{number}") for name in decoder.levels)
            tokens = chunk.stop - chunk.start
            offers.append(Offer(sizes, 4 * tokens, tokens / speed if speed else math.inf))
        return choose(offers, bandwidth, seconds)

    def _parallel(self, pieces: list[list[int]], sink: str | Ids | None) -> Prefix:
        """Pieces behind a shared sink, each of which sees the sink and itself, at positions one behind the other."""
        if sink is None:
            shared = int((self.plan.program.facts.get("parallel") or {}).get("sink", SINK))
            first, pieces = pieces[0][:shared], [pieces[0][shared:], *pieces[1:]]
        else:
            first = self._ids("the sink", sink)
        tokens = [*first, *(token for piece in pieces for token in piece)]
        self._fits(len(tokens))
        parts = [self._compute(self._nothing(), first)] if first else [self._nothing()]
        session = self._session(len(pieces), len(first) + max(map(len, pieces)))
        put_back(session.cache, parts[0])
        session.prefill(pieces, end=False)
        start = len(first)
        for row, piece in enumerate(pieces):
            own = cut(take_out(session.cache, row), len(first), len(first) + len(piece))
            parts.append(turned(own, self.cache_plan, start - len(first)))
            start += len(piece)
        return Prefix(tuple(tokens), self._closed(join(parts)), self, {"pieces": [len(piece) for piece in pieces]})

    def _compute(self, before: Saved, tokens: list[int]) -> Saved:
        """What the cache stores of these tokens behind an open row, before anything is encoded."""
        length = before.length + len(tokens)
        session = self._session(1, length)
        put_back(session.cache, before)
        session.prefill([tokens], end=False)
        return cut(take_out(session.cache, 0), before.length, length)

    def _nothing(self) -> Saved:
        return take_out(self._scratch(1), 0)

    def _closed(self, saved: Saved) -> Saved:
        """An open row with its prompt at an end: what is due has left the tail, encoded as the plan says."""
        cache = self._scratch(saved.length)
        put_back(cache, saved)
        cache.end_prefill()
        return take_out(cache, 0)

    def _opened(self, saved: Saved, what: str) -> Saved:
        """A row of which nothing has left the tail, as it was before its prompt ended."""
        for site in self.cache_plan.sites:
            if left := site.left(saved.length, saved.prompt):
                raise SmeltError(
                    f"{what} needs all tokens as they were read, but {left} have left the tail of layer {site.layer} "
                    f"and are stored as {site.key_encoding} and {site.value_encoding}: compile with a recipe whose "
                    "cache stays dense, such as pie, or a longer tail"
                )
        return replace(saved, open=True, prompt=0)

    def _scratch(self, length: int) -> Cache:
        """A cache of one row that runs nothing."""
        return Cache(self.cache_plan, 1, max(1, length), scratch=1)

    def _most(self, length: int) -> int:
        """Bytes that no cache of so many tokens exceeds: every encoding stores less than float64 numbers take."""
        values = sum((s.heads + s.kv_heads) * s.key_dim + s.kv_heads * s.value_dim for s in self.cache_plan.sites)
        return (1 << 20) + 8 * values * (length + max(s.page + s.sink for s in self.cache_plan.sites))

    def _fits(self, tokens: int) -> None:
        if tokens > self._context:
            raise SmeltError(f"the prefix would have {tokens} tokens, but the model's context is {self._context}")

    def _ids(self, what: str, text: str | Ids) -> list[int]:
        ids = list(self._encode(text)) if len(text) else []
        if not ids:
            raise SmeltError(f"read: {what} is empty; give at least one token")
        return ids

    def _check_stamp(self, stamp: Mapping[str, str], what: str) -> None:
        """Say which of model and recipe is another one."""
        if stamp["program"] == self.stamp["program"]:
            return
        for name in ("model", "recipe"):
            if stamp[name] != self.stamp[name]:
                raise SmeltError(
                    f"{what} was made by the {name} {stamp[name]}, this is {self.stamp[name]}: "
                    "read the context again with this one"
                )
        raise SmeltError(
            f"{what} was made by another {stamp['model']} with the recipe {stamp['recipe']}: its weights or the "
            "recipe's options differ; read the context again with this one"
        )
