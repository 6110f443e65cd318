"""search.spend: budgets are met and spent, the oracle is found, and what was finished outlives a kill."""

import errno
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from smelt.ir.blocks import blocks
from smelt.ir.encoding import NM, Affine, Dense
from smelt.ir.errors import SmeltError
from smelt.ir.text import parse_program, print_program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import Samples
from smelt.passes.base import Checkpoints
from smelt.passes.measure import replay
from smelt.passes.prune.drop import Drop
from smelt.passes.search import _judge, _workers
from smelt.passes.search._additive import additive, outdone
from smelt.passes.search._budget import Budget, Purse, Resource
from smelt.passes.search._evolve import Stage
from smelt.passes.search._judge import Judge
from smelt.passes.search._space import Site, Space, Stored, block_sites
from smelt.passes.search.spend import Spend

BITS = tuple(Affine(bits, 32) for bits in (2, 3, 4, 8))
ALL = (Stage(4, 1),)


@pytest.fixture
def samples(tokens):
    return Samples(tokens(4, 24))


def spend(program, samples, budget, **options):
    options = {"stages": (Stage(1, 3), *ALL), "generations": 6, "offspring": 6} | options
    outcome = Spend(budget, **options).apply(program, samples)
    verify(program)
    return outcome


def test_evolution_finds_what_listing_all_finds(llama, samples):
    found = {}
    for by in ("exhaustive", "evolution", "additive"):
        program = llama.fork()
        found[by] = spend(program, samples, Budget(blocks=2), depth=True, by=by).notes
        assert len(blocks(program)) == 2 and found[by]["spent"] == {"blocks kept": 2}
    assert found["evolution"]["kl"] == found["exhaustive"]["kl"] <= found["additive"]["kl"]
    assert found["evolution"]["levels"] == found["exhaustive"]["levels"]
    assert found["exhaustive"]["evaluations"]["made"] == 5  # of 6 pairs, without the one that leaves no attention
    space = Space(llama, tuple(block_sites(llama)[0]), {}, {}, {})
    influence = llama.fork()
    left = Drop(0.5, unit="block").apply(influence, samples).done
    theirs = Judge(space, samples.tokens)(tuple(int(site.name not in left) for site in space.sites), range(4))
    assert found["evolution"]["kl"] <= sum(theirs.values()) / 4 + 1e-6


def test_sparse_levels_are_solved_like_the_others(llama, samples):
    sparse = (NM(2, 4, Affine(4, 32)), NM(2, 4))
    options = {"weights": sparse[:1], "generations": 1, "offspring": 1}
    nearest, solved = (
        spend(llama.fork(), samples, Budget(bits=3.8), solver=how, **options).notes for how in ("nearest", "gptq")
    )
    options["weights"] = (*sparse, Affine(8, 32))
    assert nearest["spent"] == solved["spent"] and solved["kl"] < 0.9 * nearest["kl"]
    spend(llama, samples, Budget(bits=10.0), solver="gptq", **options)
    kept = [w for name, w in llama.weights.items() if "_proj" in name and w.encoding == sparse[1]]
    assert kept and all(bool(((w.dense() != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()) for w in kept)


def test_the_same_bits_spent_unevenly_lose_less(llama, samples):
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # a layer that says next to nothing needs no bits
        weight = llama.weights[f"model.layers.0.{name}.weight"]
        llama.weights[f"model.layers.0.{name}.weight"] = Weight.of(weight.dense() * 1e-3)
    once = {"weights": BITS[1:2], "generations": 1, "offspring": 1}
    even = spend(llama.fork(), samples, Budget(bits=3.5), **once).notes
    solved = spend(llama.fork(), samples, Budget(bits=3.5), solver="gptq", **once).notes
    uneven = spend(llama, samples, Budget(bits=3.5), weights=BITS[:3]).notes
    assert even["spent"] == solved["spent"] == {"bits a weight": 3.5}
    assert 3.4 < uneven["spent"]["bits a weight"] <= 3.5
    assert solved["kl"] < 0.9 * even["kl"] > uneven["kl"] == min(uneven["curve"])
    coded = [weight.encoding for name, weight in llama.weights.items() if "_proj" in name]
    assert len(coded) == 14 and len(set(coded)) > 1 and set(coded) <= set(BITS)
    assert isinstance(llama.weights["lm_head.weight"].encoding, Dense)


def test_levels_that_another_outdoes_are_stepped_over(llama):
    sites = tuple(Site("weight", name, name, ("small", "middle", "large")) for name in "ab")
    purse = Purse(Space(llama, sites, {}, {}, {}), (Resource("bytes", 6, 0, [[1, 2, 4], [1, 2, 4]]),))
    lost = [[3.0, 3.5, 0.0], [3.0, 1.0, 0.0]]
    assert outdone(purse, lost) == {(0, 1)}
    purse = replace(purse, outdone=outdone(purse, lost))
    assert additive(purse, lost) == (2, 1)
    assert purse.moved((0, 0), 0, 1) == (2, 0) and purse.moved((0, 0), 1, 1) == (0, 1)
    assert purse.moved((2, 1), 0, -1) == (0, 1)
    found = {purse.chance(Random(seed)) for seed in range(20)}
    assert found == {(2, 1), (0, 2)}
    doubled = replace(purse, resources=(*purse.resources, Resource("ms", 9, 0, [[2, 1, 3], [2, 1, 3]])))
    assert outdone(doubled, lost) == frozenset()  # the middle level takes less of the other limit


def test_evolution_begins_with_the_best_sum(llama, samples):
    options = {"weights": BITS, "generations": 1, "offspring": 1, "stages": ALL}
    summed, evolved = (
        spend(llama.fork(), samples, Budget(bits=3.5), by=by, **options).notes for by in ("additive", "evolution")
    )
    assert evolved["curve"][0] <= summed["kl"] and len(set(summed["levels"].values())) > 1


def test_levels_are_made_once_for_all_searches_on_a_text(llama, samples, tmp_path):
    kept = replace(samples, checkpoints=Checkpoints(tmp_path))
    spend(llama.fork(), kept, Budget(bits=3.5), weights=BITS[:3], generations=1)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    spend(llama, kept, Budget(share=0.5), weights=BITS, depth=True, generations=1)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(again) > len(made) > 0 and made.items() <= again.items() and len({path.parent for path in again}) == 1
    assert len(list(tmp_path.rglob("evaluations-*.jsonl"))) == 2


def test_a_budget_of_bytes_over_unlike_sites(cached, samples):
    stored = Stored(Affine(2, 16, "channel", True), Affine(2, 16, "token", True))
    whole = cached.nbytes + int(cached.cache.bits(64)) // 8
    budget = Budget(share=0.5, context=64)
    options = {"weights": BITS, "depth": True, "vocabulary": True, "cache": (Stored(), stored)}
    outcome = spend(cached, samples, budget, generations=2, **options)
    measured = cached.nbytes + int(cached.cache.bits(64)) // 8
    assert outcome.notes["spent"] == {"of the bytes": pytest.approx(measured / whole, abs=1e-4)}
    assert measured <= 0.5 * whole


def test_sites_of_a_cache_are_counted_anew(cached, samples):
    space, program = Space(cached, tuple(block_sites(cached)[0]), {}, {}, {}), cached.fork()
    space.put((0, 1, 1, 1), program)
    verify(program)
    assert [site.layer for site in program.cache.sites] == [0]
    meant = space.build((0, 1, 1, 1))
    meant.cache = None
    found = replay(program, samples.tokens, 12)
    torch.testing.assert_close(found, replay(meant, samples.tokens, 12), rtol=1e-4, atol=1e-3)


def test_a_budget_below_all_says_the_nearest(llama, samples):
    with pytest.raises(SmeltError, match=r"a budget of 2 bits a weight cannot be met: the least .* is 2\.5; ask"):
        spend(llama.fork(), samples, Budget(bits=2.0), weights=BITS[:1])
    spent = spend(llama, samples, Budget(bits=2.5), weights=BITS[:1], generations=1).notes["spent"]
    assert spent == {"bits a weight": 2.5}


def test_options_that_ask_for_nothing_are_refused(llama):
    for given, match in (
        ({"budget": Budget(bits=3.0)}, "nothing to choose among"),
        ({"budget": Budget(blocks=1), "weights": BITS}, "say depth: true"),
        ({"budget": Budget(bits=3.0), "depth": True}, "give encodings as weights"),
        ({"budget": Budget(blocks=1), "depth": True, "stages": (Stage(0, 1),)}, "count texts and survivors from 1"),
    ):
        with pytest.raises(SmeltError, match=match):
            Spend(**given)
    with pytest.raises(SmeltError, match="give a limit"):
        Budget()
    assert "leaves all 4 of them out" in next(iter(Spend(Budget(blocks=4), depth=True).requires(llama)))
    assert "must have a cache plan" in next(iter(Spend(Budget(share=1.0), cache=(Stored(BITS[0]),)).requires(llama)))


def test_of_a_large_vocabulary_the_likeliest_tokens_are_compared(llama, samples, monkeypatch):
    space = Space(llama, tuple(block_sites(llama)[0]), {}, {}, {})
    whole = Judge(space, samples.tokens)((1, 0, 1, 1), range(4))
    monkeypatch.setattr(_judge, "WHOLE", 8)
    monkeypatch.setattr(_judge, "KEPT", 64)
    some = Judge(space, samples.tokens)((1, 0, 1, 1), range(4))
    assert all(0.5 * whole[row] < some[row] <= whole[row] + 1e-5 for row in range(4))


def search(file: Path, folder: Path, kill_at: int | None = None):
    """Leave 2 blocks of the program in a file out; killed when a generation begins."""
    text, weights, rows = pickle.loads(file.read_bytes())

    def progress(done: int, total: int, what: str) -> None:
        if done == kill_at and what.startswith("generation"):
            os.kill(os.getpid(), signal.SIGKILL)

    options = {"depth": True, "generations": 5, "offspring": 3, "stages": (Stage(1, 2), Stage(2, 1))}
    samples = Samples(rows, progress, checkpoints=Checkpoints(folder))
    return Spend(Budget(blocks=2), **options).apply(parse_program(text, weights, sealed=True), samples)


def kept(llama, samples, tmp_path):
    file = tmp_path / "program"
    file.write_bytes(pickle.dumps((print_program(llama, hashes=False), dict(llama.weights), samples.tokens)))
    return file


def test_a_killed_search_loses_no_evaluation(llama, samples, tmp_path):
    file = kept(llama, samples, tmp_path)
    whole = search(file, tmp_path / "whole")
    code = (
        "import sys; from pathlib import Path as P; import test_spend as t; t.search(P(sys.argv[1]), P(sys.argv[2]), 2)"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, file, tmp_path / "killed"], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (log,) = (tmp_path / "killed").rglob("evaluations-*.jsonl")
    lines = log.read_bytes().splitlines()
    log.write_bytes(log.read_bytes() + lines[-1][:20])  # a line that was broken off
    again = search(file, tmp_path / "killed")
    assert 0 < len(lines) < whole.notes["evaluations"]["made"]
    assert again.notes["evaluations"]["made"] == whole.notes["evaluations"]["made"] - len(lines)
    assert again.notes["curve"] == whole.notes["curve"] and again.notes["levels"] == whole.notes["levels"]
    assert log.read_bytes().count(b"\n") == whole.notes["evaluations"]["made"]


def test_a_full_disk_leaves_nothing_half_written(llama, samples, tmp_path, monkeypatch):
    file = kept(llama, samples, tmp_path)
    flushed, calls = os.fsync, iter(range(100))

    def full(number: int) -> None:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        flushed(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SmeltError, match=r"the search cannot be saved \(No space left on device\); make room"):
        search(file, tmp_path / "full")
    (log,) = (tmp_path / "full").rglob("evaluations-*.jsonl")
    assert log.read_bytes().endswith(b"}\n") and log.read_bytes().count(b"\n") == 3
    assert search(file, tmp_path / "full").notes["evaluations"]["made"] > 0


@pytest.mark.parametrize("by", ["processes", "ray"])
def test_processes_find_the_same(llama, samples, by, monkeypatch):
    if by == "ray":
        pytest.importorskip("ray")
    else:
        monkeypatch.setattr(_workers, "find_spec", lambda name: None)
    options = {"depth": True, "generations": 1, "offspring": 3}
    alone = spend(llama.fork(), samples, Budget(blocks=2), **options).notes
    spread = spend(llama, samples, Budget(blocks=2), processes=2, **options).notes
    assert spread["levels"] == alone["levels"] and spread["kl"] == pytest.approx(alone["kl"], abs=1e-5)


def test_milliseconds_are_measured_by_kind_of_site(cached, samples):
    """A clock for which an attention takes 4, a feed-forward part 2, a bit of a product's weights 0.25, the rest 1."""
    spent = []

    def clock(program, context):
        coded = [w.encoding.width for name, w in program.weights.items() if "_proj" in name]
        kinds = [block.kind for block in blocks(program)]
        spent.append(1 + 4 * kinds.count("attention") + 2 * kinds.count("feedforward") + 0.25 * sum(coded))
        assert context == 96
        return spent[-1]

    timed = Samples(samples.tokens, clock=clock)
    outcome = spend(cached, timed, Budget(ms=15.0, context=96), weights=BITS[:3], depth=True, generations=2)
    assert 13 < clock(cached, 96) <= 15 and outcome.notes["spent"]["milliseconds a step"] == pytest.approx(spent[-1])
