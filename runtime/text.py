"""Text at the edges of a model: its tokenizer, and a stream that turns tokens into text as they arrive."""

import json
import re
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..ir.errors import SmeltError

_REPLACEMENT = "\ufffd"  # what decoders put where bytes are not (or not yet) UTF-8
BREAKS = (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """The tokenizer files of a model folder: `tokenizer.json`, and the ids that end and begin a text.

    Files are read when first needed: a model without a tokenizer serves token ids, and only text is refused.
    Whether `encode` adds special tokens is what `tokenizer.json` says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text. `special=False` leaves out the begin token and its like, for text that spells them out."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SmeltError(f"prompt: character {error.start} is half of a surrogate pair, not text") from None
        return list(self.core.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some ids; special tokens are left out unless asked for."""
        return str(self.core.decode(list(ids), skip_special_tokens=not special))

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """The ids that end a text, from the first file that names any: generation_config, config, tokenizer_config."""
        return self._special_ids("eos")

    @cached_property
    def bos(self) -> int | None:
        """The id that begins a text, if the model has one; whether `encode` adds it is up to `tokenizer.json`."""
        return next(iter(self._special_ids("bos")), None)

    def classes(self) -> dict[str, list[int]]:
        """Ids of special tokens, and of those that spell nothing but punctuation."""
        special = [at for at, token in self.core.get_added_tokens_decoder().items() if token.special]
        words = {at: self.core.decode([at]).strip() for at in range(self.core.get_vocab_size())}
        marks = [at for at, word in words.items() if word and not set(word) - set(string.punctuation)]
        return {"special": sorted(special), "punctuation": sorted(set(marks) - set(special))}

    def breaks(self) -> list[int]:
        """Ids of tokens that spell the end of a phrase: their text ends in punctuation that closes one, or a line."""
        texts = {at: self.core.decode([at]).rstrip(" ") for at in range(self.core.get_vocab_size())}
        return [at for at, text in texts.items() if text.endswith(BREAKS) and not self.is_hidden(at)]

    @cached_property
    def core(self) -> tokenizers.Tokenizer:
        """The tokenizer itself; SmeltError where there is none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise SmeltError(
                f"{self.folder} has no tokenizer.json, which text needs: pass token ids instead, or save a fast "
                "tokenizer there (AutoTokenizer.from_pretrained(model).save_pretrained(folder))"
            )
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise SmeltError(f"{path} cannot be read as a tokenizer: {error}") from error
        # left-overs of training that some files carry; either would change a prompt silently
        core.no_truncation()
        core.no_padding()
        return core

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Ids of the tokens `<0x00>`..`<0xFF>`, where the decoder joins runs of them to characters (byte fallback)."""
        decoder = self.core.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():  # its JSON
            return frozenset()
        return frozenset(i for token, i in self.core.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))

    def is_hidden(self, token: int) -> bool:
        """Whether `decode` leaves the token out: special, or beyond the tokenizer (padding of the embedding)."""
        return token in self._hidden or self.core.id_to_token(token) is None

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(i for i, token in self.core.get_added_tokens_decoder().items() if token.special)

    def _special_ids(self, which: str) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            found = self._read(name).get(f"{which}_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                if not all(type(i) is int for i in ids):
                    raise SmeltError(
                        f"{self.folder / name}: {which}_token_id must be an id or a list of ids, got {found!r}"
                    )
                return tuple(ids)
        token = self._read("tokenizer_config.json").get(f"{which}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content is None or not (self.folder / "tokenizer.json").is_file():
            return ()
        found = self.core.token_to_id(content)
        return () if found is None else (found,)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SmeltError(f"{path} is not JSON: {error}") from error
        if not isinstance(read, dict):
            raise SmeltError(f"{path} must hold an object of keys and values")
        return read


class Stream:
    """Tokens in, text out: whole characters only, and nothing of a stop string.

    All that `push` and `finish` return, joined, is `tokenizer.decode` of the ids, cut before the first stop string.
    Where text stops depends on the ids alone, not on how many arrive at once. First is the stop string that ends first;
    of those that end together, the longest.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self.stop):
            raise SmeltError("stop: an empty string would stop before the first token; leave it out")
        self.stopped: str | None = None
        """The stop string that was found."""
        self.count = 0
        """How many ids were taken in: once stopped, up to and including the one that made the stop string certain."""
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the ids decoded at each push: those not yet final, and before them ...
        self._context = 0  # ... as many that are, because the text of a token may depend on the one before it
        self._taken = 0  # characters of the window's text that went on to `_release`
        self._in_bytes = False  # inside a run of byte tokens
        self._pending = ""  # held back: it may grow into a stop string

    def push(self, ids: int | Iterable[int]) -> str:
        """Takes in one id or several; returns the text that is now certain. Nothing is taken in after a stop."""
        return "".join(self._push(i) for i in ([ids] if isinstance(ids, int) else ids))

    def ends(self, ids: Iterable[int]) -> bool:
        """Takes ids in as well, and says whether a stop string has ended the text."""
        self.push(ids)
        return self.stopped is not None

    def finish(self) -> str:
        """The text held back, once no more ids will come: an incomplete character, the beginning of a stop string."""
        if self.stopped is not None:
            return ""
        out = self._take(self._tokenizer.decode(self._window))
        if self.stopped is None:
            out, self._pending = out + self._pending, ""
        return out

    def _push(self, token: int) -> str:
        if self.stopped is not None:
            return ""
        self.count += 1
        self._window.append(token)
        if not self._tokenizer.is_hidden(token):
            self._in_bytes = token in self._tokenizer.byte_tokens
        if self._in_bytes:
            return ""  # one more byte can still turn the whole run invalid
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            # perhaps the first bytes of a character, which the decoder shows as one replacement; all before it is final
            return self._take(text[:-1])
        if len(text) == self._taken:
            return ""  # no text of its own (special, or a space that is dropped): no context for the next either
        out = self._take(text)
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._taken = len(self._tokenizer.decode(self._window))
        return out

    def _take(self, final: str) -> str:
        """Passes on what is new in the window's final text."""
        new = final[self._taken :]
        self._taken = len(final)
        return self._release(new)

    def _release(self, text: str) -> str:
        """Adds text to what is pending; returns what can no longer belong to a stop string."""
        text = self._pending + text
        found = [(start + len(stop), start, stop) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            return text[:start]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        cut = len(text) - held
        self._pending = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
