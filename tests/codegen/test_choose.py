"""A token chosen in the kernel of the head: the one that the logits and the noise of the reference choose."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import pytest
import torch

from smelt.codegen import interleave, product
from smelt.codegen.choose import OUT, Chooser
from smelt.codegen.loops import K
from smelt.codegen.product import Spec
from smelt.codegen.unit import Unit, call
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.runtime import noise
from smelt.runtime.sampling import Sampling, choose_with_margin

from .mutants import mutant

VOCABULARY, WIDTH = 1003, 64  # the last tile is not full
SURE = 1e-5  # a lead that rounding does not take away


class Head:
    """One unit: logits of x [B, T, WIDTH] and the choice behind each."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, encoding: Encoding) -> None:
        batch, tokens, _ = x.shape
        spec = Spec(encoding, head=True)
        self.logits = torch.full((batch, tokens, VOCABULARY), float("nan"))
        self.ids, self.positions = torch.zeros_like(positions), positions
        tiles = -(-VOCABULARY // interleave.ROWS)
        parts = interleave.pack(encoding.expr((None, K)), encoding.encode(weight), VOCABULARY, torch.Tensor.contiguous)
        packed = [w for part in parts.values() for w in (part, part.shape[1] if part.dim() > 2 else 0)]
        words = (batch * tokens, WIDTH, x, None, None, 4, -(-tiles // 4), 0, -(-tiles // 4), VOCABULARY)
        self.head = call(product.function(spec, "head"), *words, self.logits, VOCABULARY, *packed, writes=[self.logits])
        self.chooser = Chooser(self.head, positions, self.ids, ranks=2)
        self.unit = Unit([self.head, self.chooser.call])

    def chosen(self, sampling: Sampling, requests: torch.Tensor, logits: bool = True) -> torch.Tensor:
        """One step's choices [B, T]."""
        self.chooser.start(sampling.seed, sampling.temperature, requests, logits)
        self.unit()
        self.chooser.stop()
        return self.chooser.chosen.clone()


def head(batch: int, tokens: int, scale: float = 1.0, encoding: Encoding | None = None) -> Head:
    random = torch.Generator().manual_seed(batch + 10 * tokens)
    x = torch.randn(batch, tokens, WIDTH, generator=random)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random) * scale
    positions = torch.randint(0, 5000, (batch, tokens), generator=random)
    return Head(x, weight, positions, encoding or Dense("float32"))


def expected(made: Head, sampling: Sampling, requests: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's choices [B, T] and their leads."""
    batch, tokens, _ = made.logits.shape
    rows = requests.repeat_interleave(tokens)
    found = choose_with_margin(
        sampling.process(made.logits.flatten(0, 1)), sampling, rows, made.positions.flatten() + 1
    )
    return found[0].view(batch, tokens), found[1].view(batch, tokens)


def wrong(sampling: Sampling, seeds: int = 40) -> int:
    """How many of some hundred sure choices differ from the reference's."""
    off = sure = 0
    for batch, tokens in ((1, 1), (3, 1), (2, 5)):
        made = head(batch, tokens, 0.02)  # flat logits: noise decides
        requests = torch.arange(7, 7 + batch)
        for seed in range(seeds):
            asked = Sampling(temperature=sampling.temperature, seed=sampling.seed + seed)
            chosen = made.chosen(asked, requests)
            token, margin = expected(made, asked, requests)
            sure += int((margin > SURE).sum())
            off += int(((chosen != token) & (margin > SURE)).sum())
    assert sure > 10 * seeds  # a test of 14 choices a seed
    return off


@pytest.mark.parametrize("encoding", [Dense("float32"), Affine(4, 32), Affine(8, 32)], ids=str)
def test_greedy_is_the_argmax(encoding: Encoding) -> None:
    made = head(3, 4, encoding=encoding)
    assert torch.equal(made.chosen(Sampling(), torch.zeros(3, dtype=torch.int64)), made.logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.3, seed=2**64 - 50)], ids=str)
def test_sampled_is_the_reference_draw(sampling: Sampling) -> None:
    assert wrong(sampling) == 0


MUTANTS = {
    "noise of the position itself": ("g->positions[m] + 2", "g->positions[m] + 1"),
    "noise of the next request": ("g->requests[row] + 1", "g->requests[row] + 2"),
    "noise of the neighbouring id": ("u64x8{1, 2, 3,", "u64x8{2, 2, 3,"),
    "half of the noise": ("return -logarithm(-logarithm(u));", "return -0.5 * logarithm(-logarithm(u));"),
    "no temperature": ("logits / g->temperature", "logits"),
    "a third of those that may win": ("1.001f * 16777216", "0.33f * 16777216"),
    "a rough logarithm of 2": ("0.693147180559945309", "0.68"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
def test_mutants_draw_other_tokens(change: tuple[str, str]) -> None:
    with mutant(*change):
        assert wrong(Sampling(temperature=0.3), seeds=40) > 0


def test_noise_is_the_reference_to_the_last_bit_of_float32() -> None:
    """Equal logits leave the noise alone to decide: its argmax over ids, for many positions."""
    positions = torch.arange(64)[None]
    made = Head(torch.zeros(1, 64, WIDTH), torch.zeros(VOCABULARY, WIDTH), positions, Dense("float32"))
    chosen = made.chosen(Sampling(temperature=1.0, seed=3), torch.tensor([5]))
    assert torch.equal(chosen[0], noise.gumbel(3, 5, positions[0] + 1, VOCABULARY).argmax(-1))


def test_of_tied_tokens_the_lowest_id_wins_whoever_saw_it_first() -> None:
    made = head(2, 1)
    made = Head(torch.zeros(2, 1, WIDTH), torch.zeros(VOCABULARY, WIDTH), made.positions, Dense("float32"))
    assert made.chosen(Sampling(), torch.zeros(2, dtype=torch.int64)).tolist() == [[0], [0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_best_score_has_no_token(bad: float, temperature: float) -> None:
    weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    weight[500] = bad
    if bad == float("-inf"):
        weight[:] = bad
    x = torch.zeros(2, 1, WIDTH)
    x[0, 0, 0] = x[1, 0, 0] = 1.0
    x[1] = x[1].nan_to_num(0)
    made = Head(x.abs() + 1e-3, weight, torch.zeros(2, 1, dtype=torch.int64), Dense("float32"))
    assert made.chosen(Sampling(temperature=temperature), torch.zeros(2, dtype=torch.int64)).tolist() == [[-1], [-1]]


def test_logits_that_nobody_reads_are_not_written() -> None:
    made = head(2, 3)
    requests = torch.zeros(2, dtype=torch.int64)
    unseen = made.chosen(Sampling(), requests, logits=False)
    assert made.logits.isnan().all()
    assert torch.equal(made.chosen(Sampling(), requests), unseen)
    assert made.head.words[OUT] == made.logits.data_ptr()


def test_moving_on_feeds_the_choice_and_counts_it() -> None:
    made = head(3, 1)
    before = made.positions.clone()
    tables = torch.zeros(70, 3, 4, dtype=torch.int32)  # every layer may have a schedule of its own
    made.chooser.start(0, 0.0, torch.zeros(3, dtype=torch.int64), False)
    made.chooser.move([True, False, True], list(tables))
    made.unit()
    made.unit.again()
    moved = torch.tensor([[2], [0], [2]])
    assert torch.equal(made.positions, before + moved)
    assert torch.equal(made.ids, made.chooser.chosen * (moved > 0))
    counted = torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0], [0, 0, 2, 2]], dtype=torch.int32)
    assert torch.equal(tables, counted.expand(70, -1, -1))


def test_the_structure_is_laid_out_as_the_source_says() -> None:
    from smelt.codegen.choose import _Choice

    offsets = [getattr(_Choice, name).offset for name, _ in _Choice._fields_]
    assert all(a < b for a, b in pairwise(offsets))
    assert ctypes.sizeof(_Choice) == 6 * 8 + 8 + 7 * 8
