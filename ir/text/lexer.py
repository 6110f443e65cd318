"""Tokens of the text form, and a reader that names line and column when something else was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from ..errors import SmeltError

NESTING = 64  # deeper brackets than any program prints; recursion ends here instead of in the interpreter's stack
_STRING = r'"(?:[^"\\\n]|\\.)*"'
_TOKEN = re.compile(
    rf"""(?P<space>[ \t\r\n]+)
    |(?P<string>{_STRING})
    |(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    |(?P<hash>\#[0-9a-f]{{12}})
    |(?P<node>%[A-Za-z_]\w*)
    |(?P<weight>@(?:\w+(?:\.\w+)*|{_STRING}))
    |(?P<word>[A-Za-z_]\w*(?:\.\w+)*)
    |(?P<sign>\*\*|[][(){{}},:=+*/-])""",
    re.ASCII | re.VERBOSE,
)


class Token(NamedTuple):
    """A piece of text; `at` is its offset. Kinds: string, number, hash, node, weight, word, sign, end."""

    kind: str
    text: str
    at: int


class Reader:
    """Walks over the tokens of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._index = 0
        self._depth = 0
        self.tokens = self._split(text)

    def _split(self, text: str) -> list[Token]:
        tokens, at = [], 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                self.fail(f"cannot read {text[at : at + 12]!r}", at)
            if found.lastgroup != "space":
                tokens.append(Token(str(found.lastgroup), found[0], at))
            at = found.end()
        return [*tokens, Token("end", "", at)]

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        """SmeltError at an offset, by default that of the next token."""
        at = self.peek().at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        raise SmeltError(f"program text, line {line}, column {column}: {message}")

    def peek(self, ahead: int = 0) -> Token:
        """A coming token; the end stays the end."""
        return self.tokens[min(self._index + ahead, len(self.tokens) - 1)]

    def next(self) -> Token:
        """The next token, read."""
        token = self.peek()
        self._index += 1
        return token

    def accept(self, *texts: str) -> Token | None:
        """The next token if it is one of these signs or words, else None and nothing is read."""
        token = self.peek()
        return self.next() if token.kind in ("sign", "word") and token.text in texts else None

    def expect(self, text: str) -> Token:
        """The next token, which must be this sign or word."""
        return self.accept(text) or self.fail(f"expected '{text}', got {self._shown()}")

    def kind(self, kind: str) -> Token:
        """The next token, which must be of this kind."""
        return self.next() if self.peek().kind == kind else self.fail(f"expected a {kind}, got {self._shown()}")

    def string(self) -> str:
        """The next token, a string, unquoted."""
        return self.unquoted(self.kind("string"))

    def integer(self) -> int:
        """The next token, a non-negative integer of at most 63 bits."""
        token = self.kind("number")
        if not token.text.isdigit() or len(token.text) > 19:
            self.fail(f"expected an integer, got {token.text[:24]}", token.at)
        return int(token.text)

    def unquoted(self, token: Token) -> str:
        """What a string token, or a weight token behind its @, says."""
        quoted = token.text.removeprefix("@")
        if not quoted.startswith('"'):
            return quoted
        try:
            return str(json.loads(quoted))
        except ValueError as fault:
            self.fail(f"broken string ({fault})", token.at)

    def items(self, close: str) -> Iterator[None]:
        """One step for each comma-separated item up to and including `close`; a comma may stand behind the last."""
        with self.nested():
            while not self.accept(close):
                yield
                if not self.accept(","):
                    self.expect(close)
                    return

    @contextmanager
    def nested(self) -> Iterator[None]:
        """A bracket or a sign that opens a level."""
        self._depth += 1
        if self._depth > NESTING:
            self.fail(f"nested more than {NESTING} deep")
        yield
        self._depth -= 1

    def _shown(self) -> str:
        token = self.peek()
        return "the end of the text" if token.kind == "end" else f"'{token.text[:40]}'"
