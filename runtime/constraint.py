"""What an answer may be: a JSON schema, a regular expression or a grammar, held to token by token.

The engine is llguidance (Microsoft), which knows after every token which ones may follow. Masked tokens are out of the
law before anything else shapes it, so that constraints compose with sampling options and with speculation: a draft that
leaves the grammar is never accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch

from ..ir.errors import SmeltError

Kind = Literal["json_schema", "regex", "grammar"]
NAMES: dict[Kind, str] = {"json_schema": "the JSON schema", "regex": "the regular expression", "grammar": "the grammar"}


@dataclass(frozen=True)
class Constraint:
    """`json_schema`: text of a schema (draft 2020-12); `regex`: in Rust's syntax; `grammar`: in Lark's, from `start`.

    Raises SmeltError where the text is none, or admits no answer at all.
    """

    kind: Kind
    text: str
    tokenizer: str
    """The text of tokenizer.json."""
    vocabulary: int
    eos: int

    def guide(self) -> Guide:
        """A fresh one, for one row."""
        engine = _engine()
        made = engine.LLMatcher(_tokenizer(self.tokenizer, self.vocabulary, self.eos), self._grammar)
        if said := made.get_error():
            raise SmeltError(f"generate: {NAMES[self.kind]} cannot be used: {_brief(said)}")
        guide = Guide(made, self.vocabulary)
        if not guide.allowed.any() or (made.is_stopped() and not made.is_accepting()):
            raise SmeltError(f"generate: {NAMES[self.kind]} admits no answer: no token may begin one")
        return guide

    @cached_property
    def _grammar(self) -> str:
        matcher = _engine().LLMatcher
        make = {
            "json_schema": matcher.grammar_from_json_schema,
            "regex": matcher.grammar_from_regex,
            "grammar": matcher.grammar_from_lark,
        }[self.kind]
        try:
            found: str = make(self.text)
        except ValueError as fault:
            raise SmeltError(f"generate: {NAMES[self.kind]} cannot be used: {_brief(str(fault))}") from fault
        return found


class Guide:
    """Where one row stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def allowed(self) -> torch.Tensor:
        """bool [V]: the tokens that may follow."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(flags.astype(bool))

    @property
    def over(self) -> bool:
        """Whether the answer is complete and nothing but an end may follow."""
        if not self._matcher.is_stopped():
            return False
        if not self._matcher.is_accepting():
            raise SmeltError(f"generate: the grammar leads nowhere from here: {_brief(self._matcher.get_error())}")
        return True

    def take(self, token: int) -> None:
        """The row's next token."""
        if not self._matcher.consume_token(token):
            raise SmeltError(f"generate: token {token} is outside of the grammar: {self._matcher.get_error()}")


def constraint(
    given: Mapping[Kind, Any], tokenizer: bytes | None, vocabulary: int, eos: Sequence[int]
) -> Constraint | None:
    """The constraint among the options of a call, of which there may be one; None without.

    tokenizer: the content of tokenizer.json, if there is one. eos: the tokens that end an answer, the first counts.
    """
    named = {kind: value for kind, value in given.items() if value is not None}
    if not named:
        return None
    if len(named) > 1:
        raise SmeltError(f"generate: {' and '.join(named)} were given; an answer follows one of them")
    ((kind, value),) = named.items()
    if kind == "json_schema" and not isinstance(value, str):
        try:
            value = json.dumps(value)
        except TypeError as fault:
            raise SmeltError(f"generate: the JSON schema is no JSON ({fault})") from fault
    if not isinstance(value, str):
        raise SmeltError(f"generate: {kind} must be text, not {type(value).__name__}")
    if tokenizer is None or not eos:
        raise SmeltError("generate: a constraint needs the model's tokenizer and its end token")
    return Constraint(kind, value, tokenizer.decode("utf-8"), vocabulary, eos[0])


def _engine() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as fault:
        raise SmeltError(
            "generate: constraints need the package llguidance: install smelt with its extra 'grammar'"
        ) from fault
    return llguidance


@lru_cache(maxsize=4)
def _tokenizer(text: str, vocabulary: int, eos: int) -> Any:
    return _engine().LLTokenizer(text, n_vocab=vocabulary, eos_token=eos)


def _brief(said: str) -> str:
    return " ".join(line.strip() for line in said.splitlines() if line.strip())[:300]
