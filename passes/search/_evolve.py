"""One parent and its mutants, selected on more and more text (EvoPress, Sieberling et al. 2024, arXiv:2410.14649)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ._additive import Lost, additive, total
from ._budget import Purse
from ._scores import Scores
from ._space import Candidate

MUTANTS = 4  # of which one becomes an offspring


@dataclass(frozen=True)
class Stage:
    """A round of selection.

    texts: on how many candidates are compared.
    survivors: how many of the best go on.
    """

    texts: int
    survivors: int


@dataclass(frozen=True)
class Course:
    """Generations of so many offspring each, through the stages; `count` texts are there to be drawn from."""

    generations: int
    offspring: int
    stages: Sequence[Stage]
    seed: int
    count: int


def evolve(
    purse: Purse, lost: Lost, scores: Scores, course: Course, tell: Callable[[int, float], None]
) -> tuple[Candidate, list[float]]:
    """The best candidate, and the KL of the parent after each generation, the first one's in front.

    The first parent is the best of the additive candidate, the even one and random ones. An offspring is that of a few
    mutants whose sites lose least by the sum of what each loses alone, which costs no evaluation. Parents stand for
    selection in the last stage beside what survived the others, so that on texts that stay the same they never get
    worse.
    """
    random = Random(course.seed)
    first = [purse.chance(random) for _ in range(course.offspring)]
    parent, curve = _selected(first, [additive(purse, lost), purse.even()], scores, course, 0)
    went = [curve]
    for generation in range(1, course.generations + 1):
        tell(generation, went[-1])
        random = Random(course.seed * 1_000_003 + generation)
        drawn = [purse.switched(parent, random) for _ in range(MUTANTS * course.offspring)]
        mutants = [[each for each in drawn[at : at + MUTANTS] if each] for at in range(0, len(drawn), MUTANTS)]
        found = [min(each, key=lambda mutant: total(purse.space, mutant, lost)) for each in mutants if each]
        offspring = {purse.space.key(child): child for child in found}
        if not offspring:
            break
        parent, kl = _selected(list(offspring.values()), [parent], scores, course, generation)
        went.append(kl)
    return parent, went


def _selected(
    candidates: list[Candidate], parents: list[Candidate], scores: Scores, course: Course, generation: int
) -> tuple[Candidate, float]:
    """The best of the candidates and the parents, by its KL in the last stage."""
    drawn = list(range(course.count))
    if course.stages[-1].texts < course.count:
        Random(course.seed + 7919 * generation).shuffle(drawn)  # texts that were not selected on before
    for stage in course.stages:
        last = stage is course.stages[-1]
        if last:
            candidates = [*parents, *candidates]  # in front: they stay where nothing is better
        found = scores(candidates, drawn[: stage.texts])
        ranked = sorted(range(len(candidates)), key=found.__getitem__)
        if last:
            return candidates[ranked[0]], found[ranked[0]]
        candidates = [candidates[i] for i in ranked[: stage.survivors]]
    raise AssertionError("there is a last stage")
