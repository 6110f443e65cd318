"""tune.mask: weights are as they were or 0, for a text that comes out likelier, in whatever they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smelt.ir.encoding import Affine, Bitmap, Dense
from smelt.ir.errors import SmeltError
from smelt.ir.weight import Upon, Weight
from smelt.passes.base import Samples
from smelt.passes.tune._masked import Masked, masked, scores
from smelt.passes.tune.mask import Mask
from smelt.passes.weights.quantize import Quantize
from smelt.runtime import artefact

from ..families import VOCABULARY, answer, captured

SHORT = {"steps": 40, "batch": 4, "length": 16, "rate": 5e-2, "checks": 2, "holdout": 0.25}
TASK = (torch.arange(32 * 16).view(32, 16) % 7 * 11) % VOCABULARY  # text of seven tokens in turn


def test_a_mask_follows_its_scores_and_they_the_values_behind_it() -> None:
    score = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
    weight = Masked((1, 3), Dense("float32"), {"data": torch.tensor([[2.0, 3.0, -4.0]]), "score": score})
    assert weight.dense().tolist() == [[2, 0, 0]]
    (10 * weight.dense()).sum().backward()
    assert score.grad is not None and score.grad.tolist() == [[20, 30, -40]]
    drawn = scores((200, 200), 0.1, torch.Generator().manual_seed(0))
    assert float((drawn <= 0).float().mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("bits", [0, 4])
def test_a_text_comes_out_likelier_and_values_stay_or_go(bits: int) -> None:
    program = captured("llama")
    if bits:
        Quantize(bits=4, group=32, smallest=32, head="keep").apply(program, None)
    before = dict(program.weights)
    outcome = Mask(**SHORT, skip=1).apply(program, Samples(TASK, source=captured("llama")))
    assert outcome.notes["loss"]["after"] < outcome.notes["loss"]["before"] - 0.2
    removed = total = 0
    for name, weight in program.weights.items():
        old, new = before[name].dense(), weight.dense()
        kept = new != 0
        assert torch.equal(new[kept], old[kept]) and weight.nbytes == before[name].nbytes
        assert (name in outcome.done) == ("layers.1." in name and "proj" in name)
        if name in outcome.done:
            removed, total = removed + int((~kept & (old != 0)).sum()), total + kept.numel()
        else:
            assert torch.equal(new, old)
    assert 0.02 < removed / total < 0.5 and outcome.notes["masks"]["bytes"] == total / 8
    assert outcome.notes["masks"]["removed"] == pytest.approx(removed / total, abs=0.05)
    assert "below those that are masked" in outcome.skipped["model.layers.0.self_attn.q_proj.weight"]


def test_what_is_masked_is_stored_in_what_takes_least() -> None:
    random = torch.Generator().manual_seed(0)
    dense = Weight.of(torch.randn(32, 64, generator=random).half())
    for removed, stored in ((0.02, Dense), (0.5, Bitmap)):
        mask = torch.rand(32, 64, generator=random) >= removed
        made = masked(dense, mask)
        assert isinstance(made.encoding, stored) and torch.equal(made.dense(), dense.dense() * mask)
        coded = masked(dense.encoded(Affine(4, 32)), mask)
        assert torch.equal(coded.dense(), dense.encoded(Affine(4, 32)).dense() * mask)


def test_upon_its_base_a_mask_takes_a_bit_a_weight(tmp_path: Path) -> None:
    program = captured("llama")
    program.weights = {name: Weight.of(weight.dense(torch.float16)) for name, weight in program.weights.items()}
    base = program.base = program.fork()
    outcome = Mask(**SHORT).apply(program, Samples(TASK, source=captured("llama")))
    masks = outcome.notes["masks"]
    assert masks["upon_base"] == len(outcome.done) > 0 and program.nbytes == masks["bytes"]
    assert program.nbytes == sum(program.weights[name].dense().numel() for name in outcome.done) / 8
    for name, weight in program.weights.items():
        old, new = base.weights[name].dense(), weight.dense()
        assert torch.equal(new, torch.where(new != 0, old, 0)) and weight.bits == 8 * weight.nbytes
        assert torch.equal(new, old) == (name not in outcome.done)

    artefact.save(tmp_path / "out", program, {}, {})
    stored = (tmp_path / "out" / "weights.safetensors").read_bytes()
    assert len(stored) - 8 - int.from_bytes(stored[:8], "little") == masks["bytes"]
    read, tokens = artefact.load(tmp_path / "out", base)[0], TASK[:1, :8]
    assert torch.equal(answer(read, tokens), answer(program, tokens))
    assert torch.equal(answer(read.merged(), tokens), answer(program, tokens))
    assert (answer(base, tokens) - answer(program, tokens)).abs().max() > 0.1 * answer(program, tokens).abs().max()
    with pytest.raises(SmeltError, match="holds only what its model adds to"):
        artefact.load(tmp_path / "out")
    other, name = base.fork(), outcome.done[0]
    other.weights[name] = Weight.of(1.05 * other.weights[name].dense(torch.float16))
    with pytest.raises(SmeltError, match=r"but the base given is .*, which hashes to"):
        artefact.load(tmp_path / "out", other)


def test_what_is_not_the_bases_is_stored_whole() -> None:
    program = captured("llama")
    program.base = program.fork()
    name = "model.layers.1.mlp.up_proj.weight"
    program.base.weights[name] = Weight.of(1.05 * program.weights[name].dense())
    outcome = Mask(**SHORT, skip=1).apply(program, Samples(TASK, source=captured("llama")))
    assert outcome.notes["masks"]["upon_base"] == len(outcome.done) - 1
    assert not isinstance(program.weights[name].parts, Upon) and isinstance(program.weights[name].encoding, Dense)


def test_another_model_as_base_is_refused() -> None:
    program = captured("llama")
    program.base = program.fork()
    program.base.weights |= {name: Weight.of(1.05 * w.dense()) for name, w in program.weights.items()}
    with pytest.raises(SmeltError, match=r"no matrix of .* give the model itself as base"):
        Mask(**SHORT).apply(program, Samples(TASK, source=captured("llama")))


def test_what_cannot_be_masked_is_told() -> None:
    for options, why in [({"removed": 1.0}, "removed is a share"), ({"skip": -1}, "skip is a number of layers")]:
        with pytest.raises(SmeltError, match=why):
            Mask(**options)
    program = captured("llama")
    with pytest.raises(SmeltError, match=r"tune\.mask needs texts"):
        Mask().apply(program, None)
    Quantize(bits=4, group=32, smallest=32, zero=True).apply(program, None)
    outcome = Mask(**SHORT).apply(program, Samples(TASK, source=captured("llama")))
    assert not outcome.done and "no zero of its own" in outcome.skipped["model.layers.0.mlp.up_proj.weight"]
