"""What an answer may be: a JSON schema, a regular expression or a grammar, held to token by token.

The engine is llguidance (Microsoft), which knows after every token which ones may follow. Masked tokens are out of the
law before anything else shapes it, so that constraints compose with sampling options and with speculation: a draft that
leaves the grammar is never accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from ..ir.choice import Constrain
from ..ir.errors import SmeltError
from .align import Aligned, Alignment
from .guide import Guide, brief
from .reject import Tested

__all__ = ["NAMES", "Constraint", "Guide", "Kind", "constraint"]

Kind = Literal["json_schema", "regex", "grammar"]
NAMES: dict[Kind, str] = {"json_schema": "the JSON schema", "regex": "the regular expression", "grammar": "the grammar"}


@dataclass(frozen=True)
class Constraint:
    """`json_schema`: text of a schema (draft 2020-12); `regex`: in Rust's syntax; `grammar`: in Lark's, from `start`.

    `by`: `mask` takes what may not follow out of the law; `align` also weighs what may, so that answers tend to the
    model's law given the grammar (`align.py`); `reject` makes the choices of `mask` and tests few tokens (`reject.py`).
    Raises SmeltError where the text is none, or admits no answer at all.
    """

    kind: Kind
    text: str
    tokenizer: str
    """The text of tokenizer.json."""
    vocabulary: int
    eos: int
    by: Constrain = "mask"
    alignment: Alignment | None = field(default=None, compare=False)
    """What `align` learns from and adds to."""

    def guide(self, prompt: Sequence[int] = ()) -> Guide:
        """A fresh one, for one row that continues this prompt."""
        engine = _engine()
        made = engine.LLMatcher(_tokenizer(self.tokenizer, self.vocabulary, self.eos), self._grammar)
        if said := made.get_error():
            raise SmeltError(f"generate: {NAMES[self.kind]} cannot be used: {brief(said)}")
        guide = self._holding(made, prompt)
        if not guide.allowed.any() or (made.is_stopped() and not made.is_accepting()):
            raise SmeltError(f"generate: {NAMES[self.kind]} admits no answer: no token may begin one")
        return guide

    def _holding(self, matcher: Any, prompt: Sequence[int]) -> Guide:
        if self.by == "reject":
            return Tested(matcher, self.vocabulary)
        if self.alignment is None:
            return Guide(matcher, self.vocabulary)
        return Aligned(matcher, self.vocabulary, self.alignment, (self.kind, self.text, self.eos, *prompt))

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
            raise SmeltError(f"generate: {NAMES[self.kind]} cannot be used: {brief(str(fault))}") from fault
        return found


def constraint(
    given: Mapping[Kind, Any],
    tokenizer: bytes | None,
    vocabulary: int,
    eos: Sequence[int],
    by: Constrain = "mask",
    alignment: Alignment | None = None,
) -> Constraint | None:
    """The constraint among the options of a call, of which there may be one; None without.

    tokenizer: the content of tokenizer.json, if there is one. eos: the tokens that end an answer, the first counts.
    by: how answers are held to it; `align` takes an alignment.
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
    held = alignment if by == "align" else None
    return Constraint(kind, value, tokenizer.decode("utf-8"), vocabulary, eos[0], by, held)


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
