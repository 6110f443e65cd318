"""How much of what stands in a context a recipe's cache still finds: questions known and unknown when it compresses.

Unknown: the context is the prompt; the question is read through the cache that was compressed without it. Known: the
prompt is the context and the question, and the question is asked again through the cache. Either way the question and
the answer are read through the compressed cache, and an answer counts if each of its tokens is the likeliest one, which
is to say that greedy decoding gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smelt.codegen.plan import Plan
from smelt.runtime.session import Session

from .tasks import ANSWER, Case, Question


@dataclass(frozen=True)
class Exam:
    """Cases of one kind, asked by every contestant: contexts of one length, and questions of one."""

    name: str
    cases: tuple[Case, ...]
    known_questions: int = 2
    """Of each case; a prompt of its own each."""

    @property
    def context(self) -> int:
        """Tokens of a context."""
        return len(self.cases[0].context)

    def asked(self, known: bool) -> list[tuple[Sequence[int], list[Question]]]:
        """Prompts, and what is asked behind each."""
        if not known:
            return [(case.context, list(case.questions)) for case in self.cases]
        return [((*case.context, *q.asked), [q]) for case in self.cases for q in case.questions[: self.known_questions]]


@torch.no_grad()
def recall(plan: Plan, exam: Exam, known: bool, rows: int) -> float:
    """Share of the answers that are right. Questions leave no trace in the cache: each is read as if it were first."""
    asked = exam.asked(known)
    right = total = 0
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        length = len(part[0][0])
        session = Session(plan, len(part), length + 8)
        session.prefill([list(prompt) for prompt, _ in part])
        for questions in zip(*(questions for _, questions in part), strict=True):
            found = _answers(session, questions, length)
            right += sum(found)
            total += len(found)
    return right / total


def _answers(session: Session, questions: Sequence[Question], at: int) -> list[bool]:
    """Whether each row answers its question, which stands at position `at`."""
    tokens = torch.tensor([(*q.asked, *q.answer[:-1]) for q in questions])
    wanted = torch.tensor([q.answer for q in questions])
    positions = torch.arange(at, at + tokens.shape[1]).repeat(len(questions), 1)
    logits = session.step(tokens, positions)["logits"]
    chosen = logits[:, -ANSWER:].argmax(-1)
    session.cache.commit([[]] * len(questions))
    return (chosen == wanted).all(1).tolist()
