"""The reference attention over segments, against loops over single tokens; windows, trees, ragged rows, padding."""

import math
from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import Cache, CachePlan, Select, Site
from smelt.ir.cache import attend as attend_module
from smelt.ir.encoding import Affine

SITE = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=64, sink=2, tail=16, page=8)
CODED = replace(
    SITE,
    keys=Affine(4, 8, axis="channel", zero=True),
    values=Affine(8, 32, zero=True),
    select=Select("key_norm", 1.0),
)
SPARSE = replace(SITE, select=Select("key_norm", 0.5, 12))
TOLERANCE = 2e-6  # float32, sums of at most a hundred terms of order 1


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompted(site: Site, lengths: list[int], seed: int = 0) -> tuple[Cache, torch.Tensor, torch.Tensor]:
    """A cache with a ragged prompt, and the keys and values that went in."""
    rows, longest = len(lengths), max(lengths)
    k = random(rows, site.kv_heads, longest, site.key_dim, seed=seed)
    v = random(rows, site.kv_heads, longest, site.value_dim, seed=seed + 1)
    cache = Cache(CachePlan((site,)), rows, 200)
    cache.begin(torch.arange(longest).expand(rows, -1), torch.arange(longest) < torch.tensor(lengths)[:, None])
    cache.append(0, k, v)
    cache.commit([list(range(n)) for n in lengths])
    cache.end_prefill()
    return cache, k, v


def one_query(q, keys, values, scale, softcap=None, sink=None):
    """softmax over lists of key and value vectors, in Python floats."""
    logits = [scale * sum(a * b for a, b in zip(q.tolist(), key.tolist(), strict=True)) for key in keys]
    logits = [softcap * math.tanh(x / softcap) for x in logits] if softcap else logits
    top = max(logits + ([sink] if sink is not None else []))
    shares = [math.exp(x - top) for x in logits]
    total = sum(shares) + (math.exp(sink - top) if sink is not None else 0.0)
    return torch.tensor(
        [sum(p * v for p, v in zip(shares, column, strict=True)) / total for column in torch.stack(values).T.tolist()]
    )


def naive(q, stored, new, sees, scale, softcap=None, sinks=None):
    """out [H, T, E] of one row: `stored` lists (k [G, D], v [G, E]), `new` [T] likewise, `sees(i, t, h)` per token."""
    heads, count, _ = q.shape
    groups = len((stored + new)[0][0])
    out = []
    for h in range(heads):
        g = h // (heads // groups)
        for i in range(count):
            seen = [token for t, token in enumerate(stored + new) if sees(i, t, g)]
            sink = sinks[h].item() if sinks is not None else None
            out.append(one_query(q[h, i], [k[g] for k, _ in seen], [v[g] for _, v in seen], scale, softcap, sink))
    return torch.stack(out).view(heads, count, -1)


def continued(site: Site, new: int = 3):
    """A prompt of 41 tokens and a step of `new`: cache, queries, and all tokens as lists of (k, v)."""
    cache, k, v = prompted(site, [41])
    nk, nv, q = random(1, 2, new, 32, seed=3), random(1, 2, new, 64, seed=4), random(1, 4, new, 32, seed=5)
    cache.begin(torch.arange(41, 41 + new)[None])
    cache.append(0, nk, nv)
    stored = [(k[0, :, t], v[0, :, t]) for t in range(41)]
    return cache, q, stored, [(nk[0, :, t], nv[0, :, t]) for t in range(new)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("sinks", [None, random(4, seed=6)], ids=["", "sinks"])
def test_dense_segments_read_as_plain_attention(softcap, window, sinks):
    """Nothing is lost by segments alone: sinks, a dense body and a tail read like one list of tokens."""
    cache, q, stored, fresh = continued(replace(SITE, window=window))
    assert cache.counts(0).tolist() == [[2, 16, 23, 41]]

    def sees(i, t, g):
        return t <= 41 + i and (window is None or 41 + i - t < window)

    want = naive(q[0], stored, fresh, sees, 0.3, softcap, sinks)
    assert (cache.attend(0, q, 0.3, window, softcap, sinks)[0] - want).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("window", "drop", "scale"), [(8, None, 0.3), (10, None, 0.3), (9, 38, 0.3), (9, None, 0.315)], ids=str
)
def test_the_comparison_sees_a_wrong_answer(window, drop, scale):
    cache, q, stored, fresh = continued(SITE)
    wrong = naive(q[0], stored, fresh, lambda i, t, g: 41 + i - window < t <= 41 + i and t != drop, scale)
    assert (cache.attend(0, q, 0.3, 9)[0] - wrong).abs().max() > 100 * TOLERANCE


def test_a_window_counts_positions_where_tokens_are_missing():
    """Selection leaves gaps: the window is measured in positions, not in stored tokens."""
    cache, q, stored, fresh = continued(replace(SPARSE, window=28), 1)
    places = cache.segments[0].bodies[0].decoded(0).positions
    there = [set(places[g].tolist()) | {0, 1} | set(range(18, 42)) for g in (0, 1)]
    assert any(14 <= t < 18 and t not in there[g] for g in (0, 1) for t in range(14, 18))
    want = naive(q[0], stored, fresh, lambda i, t, g: t in there[g] and 41 - t < 28, 0.3)
    assert (cache.attend(0, q, 0.3, 28)[0] - want).abs().max() < TOLERANCE
    shifted = naive(q[0], stored, fresh, lambda i, t, g: t in there[g] and 41 - t < 24, 0.3)
    assert (cache.attend(0, q, 0.3, 28)[0] - shifted).abs().max() > 100 * TOLERANCE


def test_selection_drops_tokens_for_each_head_alone():
    cache, q, stored, fresh = continued(SPARSE, 1)
    norms = torch.stack([key for key, _ in stored], 1).norm(dim=-1)

    def sees(i, t, g):
        if not 2 <= t < 18:  # sinks and tail
            return True
        first = 2 + (t - 2) // 8 * 8
        return t in sorted(range(first, first + 8), key=lambda s: norms[g, s])[:4]

    want = naive(q[0], stored, fresh, sees, 0.3)
    assert (cache.attend(0, q, 0.3)[0] - want).abs().max() < TOLERANCE


def test_a_coded_body_reads_as_its_decoded_pages():
    _, k, v = prompted(CODED, [41])
    decoded = [k[0].clone(), v[0].clone()]
    for x, encoding in zip(decoded, (CODED.keys, CODED.values), strict=True):
        pages = x[:, 2:18].unflatten(1, (2, 8))
        x[:, 2:18] = encoding.decode(encoding.encode(pages), tuple(pages.shape)).flatten(1, 2)
    cache, q, exact, fresh = continued(CODED, 1)
    stored = [(decoded[0][:, t], decoded[1][:, t]) for t in range(41)]
    got = cache.attend(0, q, 0.3)[0]
    assert (got - naive(q[0], stored, fresh, lambda *_: True, 0.3)).abs().max() < TOLERANCE
    assert (got - naive(q[0], exact, fresh, lambda *_: True, 0.3)).abs().max() > 100 * TOLERANCE  # codes lose something


@pytest.mark.parametrize("site", [SITE, CODED, SPARSE], ids=["dense", "coded", "sparse"])
def test_a_tree_reads_every_path_as_if_it_were_alone(site):
    parents = [0, 0, 0, 1, 1, 4]
    ancestors = torch.eye(6, dtype=torch.bool)
    for node in range(1, 6):
        ancestors[node] |= ancestors[parents[node]]
    depth = ancestors.sum(1) - 1
    cache, _, _ = prompted(site, [41])
    nk, nv, q = random(1, 2, 6, 32, seed=3), random(1, 2, 6, 64, seed=4), random(1, 4, 6, 32, seed=5)
    cache.begin((41 + depth)[None], ancestors=ancestors)
    cache.append(0, nk, nv)
    tree = cache.attend(0, q, 0.3)
    causal = torch.ones(6, 6).tril().bool()
    cache.begin((41 + depth)[None], ancestors=causal)
    cache.append(0, nk, nv)
    assert (cache.attend(0, q, 0.3) - tree).abs().max() > 100 * TOLERANCE
    for node in range(6):
        path = ancestors[node].nonzero().flatten()
        cache.begin(torch.arange(41, 41 + len(path))[None])
        cache.append(0, nk[:, :, path], nv[:, :, path])
        alone = cache.attend(0, q[:, :, path], 0.3)
        assert (alone[:, :, -1] - tree[:, :, node]).abs().max() < TOLERANCE


def test_ragged_rows_with_padding_read_as_single_rows():
    lengths = [1, 41, 17, 63]
    together, k, v = prompted(CODED, lengths)
    nk, nv, q = random(4, 2, 3, 32, seed=3), random(4, 2, 3, 64, seed=4), random(4, 4, 3, 32, seed=5)
    fresh = [3, 1, 0, 2]
    valid = torch.arange(3) < torch.tensor(fresh)[:, None]
    for x in (nk, nv, q):
        x[~valid[:, None].expand(x.shape[:3])] = float("nan")  # padding may hold anything
    together.begin(torch.tensor(lengths)[:, None] + torch.arange(3), valid)
    together.append(0, nk, nv)
    got = together.attend(0, q, 0.3)
    assert got.isfinite().all() and (got[~valid[:, None].expand(got.shape[:3])] == 0).all()
    for row, (length, new) in enumerate(zip(lengths, fresh, strict=True)):
        if not new:
            continue
        alone = Cache(CachePlan((CODED,)), 1, 200)
        alone.begin(torch.arange(length)[None])
        alone.append(0, k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        alone.commit([list(range(length))])
        alone.end_prefill()
        alone.begin(torch.arange(length, length + new)[None])
        alone.append(0, nk[row : row + 1, :, :new], nv[row : row + 1, :, :new])
        single = alone.attend(0, q[row : row + 1, :, :new], 0.3)
        assert (single - got[row : row + 1, :, :new]).abs().max() < TOLERANCE


def test_blocks_of_queries_do_not_show(monkeypatch):
    cache, _, _ = prompted(SITE, [41])
    nk, nv, q = random(1, 2, 9, 32, seed=3), random(1, 2, 9, 64, seed=4), random(1, 4, 9, 32, seed=5)
    cache.begin(torch.arange(41, 50)[None])
    cache.append(0, nk, nv)
    whole = cache.attend(0, q, 0.3, 7, 5.0)
    monkeypatch.setattr(attend_module, "LOGITS", 4 * 50 * 2)
    assert (cache.attend(0, q, 0.3, 7, 5.0) - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize("tokens", [2, 64, 65, 130])
@pytest.mark.parametrize("tree", [False, True], ids=["causal", "tree"])
def test_the_bitset_says_what_the_mask_says(tokens, tree):
    cache, chance = Cache(CachePlan((SITE,)), 2, 200), torch.Generator().manual_seed(0)
    valid = torch.rand(2, tokens, generator=chance) < 0.7
    ancestors = torch.rand(2, tokens, tokens, generator=chance) < 0.5 if tree else None
    cache.begin((valid.cumsum(1) - 1).clamp_min(0), valid, ancestors)
    words = cache.step.words
    assert words.shape == (2, tokens, -(-tokens // 64)) and words.dtype == torch.int64
    unpacked = torch.stack([(words[..., j // 64] >> (j % 64)) & 1 for j in range(tokens)], -1).bool()
    assert torch.equal(unpacked, torch.stack([cache.step.sees(row, slice(None)) for row in (0, 1)]))
    itself = torch.eye(tokens, dtype=torch.bool)
    seen = (ancestors | itself) if tree else torch.ones(tokens, tokens).tril().bool()
    assert torch.equal(unpacked, seen & valid[:, None] & valid[..., None])


def test_the_bitset_of_one_token_is_its_validity():
    cache = Cache(CachePlan((SITE,)), 2, 200)
    cache.begin(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[True], [False]]))
    assert cache.step.words.tolist() == [[[1]], [[0]]]
