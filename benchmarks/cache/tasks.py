"""Recall tasks as tokens: lines `@key value value` hidden in code, and questions `@key` that ask for the values.

A needle is one line in a context, multi-key recall has many. Words of a line are single tokens, and no two lines of a
context share one, so that an answer is right or wrong and cannot be guessed.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from smelt.ir.errors import SmeltError
from smelt.runtime.text import Tokenizer

ANSWER = 2  # values of a line
WORD = re.compile(r"Ġ?[A-Za-z]{3,}")  # Ġ: a space in byte-level vocabularies


@dataclass(frozen=True)
class Words:
    """The tokens that lines are made of; `filler` is the text around them, without marks."""

    mark: int
    end: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    filler: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> Words:
        """Keys are words at the beginning of a line, values such behind a space; `text` becomes the filler."""
        entries = tokenizer.core.get_vocab()
        known = sorted(token for token in entries if WORD.fullmatch(token))
        keys = tuple(entries[token] for token in known if not token.startswith("Ġ"))
        values = tuple(entries[token] for token in known if token.startswith("Ġ"))
        if "@" not in entries or "Ċ" not in entries or min(len(keys), len(values)) < 256:
            raise SmeltError("recall needs a byte-level tokenizer with '@', a line's end and 256 words of one token")
        mark = entries["@"]
        filler = tuple(token for token in tokenizer.encode(text, special=False) if token != mark)
        return cls(mark, entries["Ċ"], keys, values, filler)


@dataclass(frozen=True)
class Question:
    """What is asked, and the tokens that answer it."""

    asked: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A context with its lines hidden in it, and questions about them in random order."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]


def case(words: Words, length: int, pairs: int, asked: int, source: random.Random) -> Case:
    """A context of `length` tokens with `pairs` lines at random places, and questions about `asked` of them."""
    size = ANSWER + 3
    free = length - pairs * size
    if pairs < 1 or asked > pairs or free < 0:
        raise ValueError(f"{length} tokens do not hold {pairs} lines of {size}, or {asked} questions are too many")
    keys = source.sample(words.keys, pairs)
    values = source.sample(words.values, pairs * ANSWER)
    answers = [tuple(values[i * ANSWER : (i + 1) * ANSWER]) for i in range(pairs)]
    start = source.randrange(len(words.filler) - free)
    filler, places = words.filler[start : start + free], sorted(source.randrange(free + 1) for _ in range(pairs))
    context: list[int] = []
    for i, (at, until) in enumerate(zip([0, *places], [*places, free], strict=True)):
        context += filler[at:until]
        if i < pairs:
            context += [words.mark, keys[i], *answers[i], words.end]
    chosen = source.sample(range(pairs), asked)
    return Case(tuple(context), tuple(Question((words.mark, keys[i]), answers[i]) for i in chosen))


def cases(words: Words, count: int, length: int, pairs: int, asked: int, seed: int) -> list[Case]:
    """The same for the same seed."""
    source = random.Random(f"{seed} {length} {pairs}")
    return [case(words, length, pairs, asked, source) for _ in range(count)]


def lesson(words: Words, length: int, source: random.Random) -> tuple[list[int], list[int]]:
    """Tokens to train on, `length` of them, and the places whose next token is one of an answer.

    Some questions come twice and are answered the second time only, as when a question ends a prompt that a cache
    compresses, and is asked again behind it.
    """
    size = ANSWER + 3
    most = max(1, length // (4 * size))
    pairs = source.choice((most, source.randint(1, most)))
    asked = min(pairs, 32)
    end = asked * 2 * size
    made = case(words, length - end, pairs, asked, source)
    tokens, places = list(made.context), []
    for question in made.questions:
        if source.random() < 0.15:
            tokens += question.asked
        tokens += question.asked
        places += [len(tokens) - 1 + i for i in range(ANSWER)]
        tokens += [*question.answer, words.end]
    tokens += [words.end] * (length - len(tokens))
    return tokens, places
