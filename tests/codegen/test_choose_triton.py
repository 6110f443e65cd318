"""Tokens chosen by Triton kernels: those that the noise of the reference chooses, interpreted and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smelt.codegen import choose_triton
from smelt.codegen.autotune_triton import Tile
from smelt.codegen.choose_triton import TritonChooser, likes, signatures, splits
from smelt.codegen.triton_module import load
from smelt.runtime import noise
from smelt.runtime.sampling import Sampling, choose_with_margin

from .triton_checks import compiled, in_the_interpreter, interpreted, usage

pytest.importorskip("triton", reason="triton is not installed")

SURE = 1e-5  # a lead that rounding does not take away
SHAPES = [(1, 1, 63), (3, 1, 150), (2, 5, 129)]  # of one block a part, with parts that are empty, of several blocks
SETTINGS = [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.3, seed=2**64 - 5)]


class Rows:
    """Logits [B, T, V] with the choice behind each; flat ones, so that noise decides."""

    def __init__(self, batch: int, tokens: int, vocabulary: int, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(vocabulary)
        self.logits = (torch.randn(batch, tokens, vocabulary, generator=random) * 0.3).to(device)
        self.positions = torch.randint(0, 5000, (batch, tokens), generator=random).to(device)
        self.requests = torch.arange(7, 7 + batch)
        self.here = likes(batch)
        self.there = {name: like.to(device) for name, like in self.here.items()}
        places = self.here, self.there, torch.empty(batch, tokens, dtype=torch.int64)
        self.chooser = TritonChooser(self.logits, self.positions, *places)

    def run(self) -> torch.Tensor:
        for name, value in self.here.items():
            self.there[name].copy_(value)
        for call in self.chooser.calls:
            call()
        return self.chooser.chosen.clone()

    def chosen(self, sampling: Sampling) -> torch.Tensor:
        """One step's choices [B, T]."""
        self.chooser.start(sampling.seed, sampling.temperature, self.requests, logits=False)
        found = self.run()
        self.chooser.stop()
        return found

    def expected(self, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's choices [B, T] and their leads."""
        rows = self.requests.repeat_interleave(self.logits.shape[1]).to(self.logits.device)
        processed = sampling.process(self.logits.flatten(0, 1))
        found = choose_with_margin(processed, sampling, rows, self.positions.flatten() + 1)
        return tuple(each.view(self.positions.shape).cpu() for each in found)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def small_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter several blocks a part and several parts a row, of few ids."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(choose_triton, "BLOCK", 32)
        monkeypatch.setattr(choose_triton, "PROGRAMS", 20)


def wrong(made: Rows, sampling: Sampling) -> int:
    """How many of the sure choices differ from the reference's."""
    chosen, (token, margin) = made.chosen(sampling), made.expected(sampling)
    assert (margin > SURE).all()
    return int((chosen != token).sum())


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_choices_are_the_references(shape: tuple[int, int, int]) -> None:
    """The same launches whatever is chosen by: a captured step replays them."""
    made = Rows(*shape)
    assert [wrong(made, sampling) for sampling in SETTINGS] == [0, 0, 0]
    made.positions += 3
    made.requests += 1
    assert wrong(made, SETTINGS[1]) == 0


def test_parts_cover_the_vocabulary_and_fill_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert splits(1, 63) == (2, 32) and splits(3, 150) == (8, 32) and splits(10, 129) == (2, 96)
    monkeypatch.undo()
    assert splits(1, 152064) == (256, 1024) and splits(64, 152064) == (8, 19456) and splits(1000, 97) == (1, 1024)


MUTANTS = {
    "noise of the position itself": ("tl.load(positions + m) + 1", "tl.load(positions + m)"),
    "noise of the next request": ("(request + 1)", "(request + 2)"),
    "noise of the first request": (" + m // T)", ")"),
    "noise of the neighbouring id": ("(token + 1).to", "(token + 2).to"),
    "noise of another seed": ("tl.load(words + 1)", "(tl.load(words + 1) + 1)"),
    "half of the noise": ("- tl.log(-tl.log(u))", "- 0.5 * tl.log(-tl.log(u))"),
    "noise of the lowest bits": ("(bits >> 12)", "(bits << 12 >> 12)"),
    "no temperature": ("tl.div_rn(x, heat + tl.zeros_like(x))", "x"),
    "a shift forgotten": ("(x >> 27)", "(x >> 28)"),
    "a tenth of those that may win": (f"* {1.001 * 2**24}", f"* {0.1 * 2**24}"),
    "the first block alone": ("if most > best:", "if (most > best) & (first == split * span):"),
    "the first part alone": ("tl.minimum((split + 1) * span, V)", "tl.minimum(span, V)"),
    "the last id lost": ("mask=token < V", "mask=token < V - 1"),
}


@interpreted
@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
def test_mutants_choose_other_tokens(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *change)
    made = Rows(2, 5, 129)
    made.logits[0, 4, 128] += 3.0  # the last id
    assert wrong(made, Sampling(temperature=0.3)) > 0


def mutate(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert right in choose_triton.KERNELS
    mutant = load(choose_triton.KERNELS.replace(right, wrong), "choose")
    monkeypatch.setattr(choose_triton, "module", lambda: mutant)


@interpreted
def test_equal_logits_leave_the_noise_to_decide() -> None:
    made = Rows(1, 12, 200)
    made.logits.fill_(-4.0)
    made.positions.copy_(torch.arange(12))
    want = noise.gumbel(3, 7, made.positions[0] + 1, 200).argmax(-1)
    assert torch.equal(made.chosen(Sampling(temperature=1.0, seed=3))[0], want)


@interpreted
@pytest.mark.parametrize("tied", [(0, 1), (5, 6), (31, 32, 199), (70, 100, 130), (198, 199)], ids=str)
def test_of_tied_tokens_the_lowest_id_wins(tied: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a block, between blocks, and between parts."""
    monkeypatch.setattr(choose_triton, "PROGRAMS", 4)
    assert splits(1, 200) == (4, 64)
    made = Rows(1, 1, 200)
    made.logits[..., list(tied)] = 9.0
    assert made.chosen(Sampling()).tolist() == [[tied[0]]]


@interpreted
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
def test_a_row_without_a_finite_best_score_has_no_token(temperature: float) -> None:
    made = Rows(6, 1, 100)
    made.logits[0] = float("-inf")
    made.logits[1, 0, 99] = float("inf")
    made.logits[2, 0, 40] = float("nan")
    made.logits[3, 0, 3], made.logits[3, 0, 90] = float("inf"), float("nan")
    made.logits[4] = float("-inf")
    made.logits[4, 0, 77] = -3e4
    sampling = Sampling(temperature=temperature)
    alone = Rows(6, 1, 100)
    assert made.chosen(sampling)[:, 0].tolist() == [-1] * 4 + [77, int(alone.expected(sampling)[0][5])]


@interpreted
def test_who_is_switched_off_writes_nothing() -> None:
    made = Rows(2, 1, 100)
    first = made.chosen(SETTINGS[1])
    made.logits.copy_(-made.logits)
    assert torch.equal(made.run(), first) and not torch.equal(made.chosen(SETTINGS[1]), first)


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_a_spill(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    warps = {"scan": choose_triton.OPTIONS["num_warps"], "choose": 1}
    for name, types in signatures().items():
        constants = {"BLOCK": choose_triton.BLOCK} if name == "scan" else {"SPLITS": splits(1, 256000)[0]}
        kernel = getattr(choose_triton.module(), name)
        used = usage(kernel, types, constants, Tile(warps=warps[name]), capability, tmp_path)
        assert used.spilled == 0 and used.registers <= 64 and used.shared <= 1024, (name, used)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1, 128256), (4, 1, 32000), (2, 33, 50257), (1, 1, 97)], ids=str)
def test_choices_are_the_references_on_a_gpu(shape: tuple[int, int, int]) -> None:
    made, off, sure = Rows(*shape, "cuda"), 0, 0
    for sampling in [*SETTINGS, *(Sampling(temperature=0.7, seed=seed) for seed in range(20))]:
        chosen, (token, margin) = made.chosen(sampling), made.expected(sampling)
        sure += int((margin > SURE).sum())
        off += int(((chosen != token) & (margin > SURE)).sum())
    assert off == 0 and sure >= 20 * made.positions.numel()
    made.logits[0, 0, 50] = float("nan")
    assert made.chosen(SETTINGS[1])[0, 0] == -1 == made.chosen(SETTINGS[0])[0, 0]
