"""The Triton attention kernel: against the reference in Triton's interpreter, and compiled for two GPUs without one."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smelt.codegen.attention_triton import OCCUPANCY, PIECES, ROWS, TILE, TritonAttention, covers, options, signature
from smelt.codegen.attention_triton_columns import CODE, parted
from smelt.ir.cache import Cache, CachePlan, Select, Site
from smelt.ir.encoding import Affine, Dense
from smelt.ir.encoding.expr import loads

from .triton_checks import compiled, in_the_interpreter, interpreted

pytest.importorskip("triton")

PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=32)
PAGED = replace(
    PLAIN, sink=4, tail=32, page=32, keys=Affine(4, 32, "channel", True), values=Affine(4, 32, "token", True)
)
SITES = {
    "dense": PLAIN,
    "halves": replace(PLAIN, dense="float16", key_dim=48, value_dim=16),
    "kivi": PAGED,
    "kivi halves": replace(PAGED, dense="float16"),
    "kivi padded": replace(
        PAGED, key_dim=96, value_dim=96, keys=Affine(4, 32, "channel", True), values=Affine(4, 32, "token", True)
    ),
    "window": replace(PAGED, window=50, keys=Affine(4, 0), values=None, select=Select("key_norm", 0.75, 96), heads=2),
    "stream": replace(PLAIN, sink=4, tail=40, window=44, select=Select("recency", budget=0)),
}
LENGTHS = [0, 77]  # 77: four sinks, one page, 41 in the tail
TOLERANCE = {"float32": 3e-6, "float16": 3e-3}  # float16: 11 bits in the weights and in the scaled query


def fresh(site: Site, rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of `tokens` new tokens."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, site.heads, tokens, site.key_dim, generator=random),
        torch.randn(rows, site.kv_heads, tokens, site.key_dim, generator=random),
        torch.randn(rows, site.kv_heads, tokens, site.value_dim, generator=random),
    )


def prompted(site: Site, device: str = "cpu", lengths: list[int] = LENGTHS) -> Cache:
    cache, longest = Cache(CachePlan((site,)), len(lengths), 640, device, scratch=8), max(lengths)
    _, keys, values = (x.to(device) for x in fresh(site, len(lengths), longest, 0))
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    cache.begin(torch.arange(longest).expand(len(lengths), -1).to(device), valid.to(device))
    cache.append(0, keys, values)
    cache.commit([list(range(n)) for n in lengths])
    cache.end_prefill()
    return cache


def check(
    site: Site,
    tokens: int,
    device: str = "cpu",
    wrong: float = 1.0,
    lengths: list[int] = LENGTHS,
    programs: int | None = None,
    plain: bool = True,
) -> float:
    """The largest difference from the reference, with padding: a tree with all options, and a plain step."""
    cache, kernel = prompted(site, device, lengths), TritonAttention(site, programs)
    q, keys, values = (x.to(device) for x in fresh(site, len(lengths), tokens, 1))
    valid = torch.ones(len(lengths), tokens, dtype=torch.bool)
    valid[0, tokens // 2 + 1 :] = False
    for x in (keys, values):
        x[~valid[:, None].expand(x.shape[:3])] = float("nan")
    worst = 0.0
    tree = torch.eye(tokens, dtype=torch.bool)
    tree[:, 0] = True
    every = (tree, 5.0, torch.linspace(-2, 3, site.heads))
    for ancestors, softcap, sinks in (every, (None, None, None)) if plain else (every,):
        positions = torch.tensor(lengths)[:, None] + (torch.arange(tokens) if ancestors is None else tree.sum(1) - 1)
        cache.begin(positions.to(device), valid.to(device), ancestors if ancestors is None else ancestors.to(device))
        cache.append(0, keys, values)
        out = torch.full((len(lengths), site.heads, tokens, site.value_dim), float("nan"), device=device)
        sinks = sinks if sinks is None else sinks.to(device)
        launches = kernel.launches(cache, 0, q, out, 0.2 * wrong, softcap, sinks)
        for scratch in kernel.scratch(q):
            scratch.fill_(float("nan"))  # what no piece wrote must not be read
        for launch in launches:
            launch()
        error = (out - cache.attend(0, q, 0.2, site.window, softcap, sinks)).abs().nan_to_num(nan=torch.inf)
        worst = max(worst, float(error.max()))
    return worst


@interpreted
@pytest.mark.parametrize(("name", "tokens"), [*((name, 3) for name in SITES), ("kivi", 1)])
def test_the_kernel_computes_the_reference(name, tokens):
    assert check(SITES[name], tokens) < TOLERANCE[SITES[name].dense]


@interpreted
@pytest.mark.parametrize("programs", [7, 34])
def test_any_number_of_programs_shares_the_tiles(programs):
    """Rows that end around a tile, two blocks of query rows, and more programs than the 32 tiles."""
    site = replace(SITES["kivi"], page=64, tail=16, keys=Affine(4, 16, "channel", True))
    assert check(site, 9, lengths=[31, 0, 129], programs=programs, plain=False) < TOLERANCE["float32"]


@interpreted
def test_a_unit_is_merged_from_many_pieces():
    site = replace(PLAIN, heads=2, kv_heads=1)
    assert 600 / TILE > PIECES
    assert check(site, 2, lengths=[600], programs=600 // TILE) < TOLERANCE["float32"]


@interpreted
@pytest.mark.parametrize("site", [SITES["stream"], replace(PLAIN, window=40)], ids=["sinks", "tail"])
def test_tiles_that_no_query_sees_are_skipped(site):
    """Tokens in front of the window are NaN: whoever read them would pass that on."""
    cache, kernel = prompted(site, lengths=[200, 90]), TritonAttention(site)
    q, keys, values = fresh(site, 2, 1, 1)
    cache.begin(torch.tensor([[200], [90]]))
    cache.append(0, keys, values)
    out = torch.full((2, site.heads, 1, site.value_dim), float("nan"))
    want = cache.attend(0, q, 0.2, site.window)
    segments = cache.segments[0]
    for row, length in enumerate((200, 90)):
        unseen = max(0, int(cache.counts(0)[row, 2]) - site.window + 1) // TILE * TILE
        assert unseen > 0 or site.sink
        segments.tail_v[row, :, :unseen] = float("nan")
        assert length - (site.sink - 1) >= site.window
    segments.sink_v.fill_(float("nan"))
    kernel(cache, 0, q, out, 0.2)
    assert float((out - want).abs().max()) < TOLERANCE["float32"]


@interpreted
def test_the_same_launches_serve_a_growing_cache():
    """What a captured graph does: arguments and grids as they were, while counts, pages and their contents change."""
    site, length = replace(SITES["kivi"], page=16, tail=16, keys=Affine(4, 16, "channel", True)), 150
    cache, kernel = prompted(site, lengths=[length, 3]), TritonAttention(site, programs=5)
    q, out = torch.randn(2, site.heads, 1, site.key_dim), torch.empty(2, site.heads, 1, site.value_dim)
    launches, at, generation, made, pages = (), torch.empty(0), -1, 0, 0
    for step in range(32):  # the first page that leaves makes room for more
        _, keys, values = fresh(site, 2, 1, step)
        cache.begin(torch.tensor([[length + step], [3 + step]]))
        cache.append(0, keys, values)
        (body,) = cache.segments[0].bodies
        if generation != cache.generation:
            launches, at, generation = kernel.launches(cache, 0, q, out, 0.2), cache.step.positions, cache.generation
            made, pages = made + 1, int(body.held[0, 0])
        at.copy_(cache.step.positions)
        if step in (0, 15, 31):
            out.fill_(float("nan"))
            for launch in launches:
                launch()
            assert float((out - cache.attend(0, q, 0.2)).abs().max()) < TOLERANCE["float32"]
        cache.commit([[0], [0]])
    assert int(body.held[0, 0]) > pages and made == 2


@interpreted
def test_the_comparison_catches_a_wrong_kernel(monkeypatch):
    site = SITES["kivi"]
    assert check(site, 3, wrong=1.05) > 100 * TOLERANCE["float32"]
    from smelt.codegen import attention_triton

    text = attention_triton.source(site)
    monkeypatch.setattr(attention_triton, "INTERPRETED", 7)  # cuts a unit inside of its body
    for right, wrong in (
        ("(token < fill)", "(token < fill - 1)"),  # a dropped row of each page
        ("tl.sum(shares * totals, 0)", "tl.sum(totals, 0)"),
        ("high - low == many", "high > low"),  # a piece taken for the whole
        ("(p == first)", "(p != first)"),
        ("(low == 0)", "(low != low)"),
        ("i += high - low", "i = end"),  # a program that stops at its first unit
        ("b * T + t[:, None]", "b * T + 0 * t[:, None]"),  # every query sees what the first one sees
    ):
        assert right in text
        monkeypatch.setattr(attention_triton, "source", lambda site, r=right, w=wrong: text.replace(r, w))
        assert check(site, 3, plain=False) > 100 * TOLERANCE["float32"], right


@compiled
def test_everything_holds_in_the_interpreter():
    in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize(
    ("name", "capability", "rows"),
    [
        *(("halves", 80, 8), ("kivi halves", 80, 8), ("kivi halves", 90, 8), ("kivi halves", 90, 1), ("window", 90, 1)),
        ("kivi wide", 80, 8),
    ],
)
def test_the_kernel_compiles_for_a_gpu_without_spilling(name, capability, rows, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    site = SITES["kivi"] if name == "kivi wide" else SITES[name]
    width = 256 if name == "kivi wide" else 128
    site = replace(site, heads=32, kv_heads=8, key_dim=width, value_dim=width, dense="float16")
    kernel, signatures = TritonAttention(site), signature(site)
    ones = {"B": 1, "T": 1} if rows == 1 else {}  # Triton takes a 1 for a constant
    shared = {"sinks": None, "SINKS": False, "PAIRS": 8 * rows, "M": ROWS, **ones}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for function, types, constants in (
        (kernel.attend, signatures["attend"], {**shared, "SOFTCAP": rows == 1}),
        (kernel.merge, signatures["merge"], shared),
    ):
        types = types | dict.fromkeys(ones, "constexpr")
        # as PyTorch allocates them, and as Triton then specialises
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if "*" in types[name]}
        source = ASTSource(function, types, constants, aligned)
        choice = options(site) if function is kernel.attend else {}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=choice)
        assert made.metadata.shared <= 99 * 1024  # what a block may have on every card since sm_80
        if width == 128:
            assert made.metadata.shared * OCCUPANCY <= 128 * 1024  # of 164 KiB on sm_80
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        dump = [tools / "cuobjdump", "--dump-resource-usage", tmp_path / "kernel.cubin"]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        registers = re.search(r"REG:(\d+) STACK:0 ", usage)
        assert registers, usage
        assert int(registers[1]) * 32 * choice.get("num_warps", 4) <= 65536 // (OCCUPANCY if width == 128 else 1)
        if function is kernel.attend and "kivi" in name:  # a packed byte is read once, sixteen at a time
            assert "cp.async.cg.shared.global" in made.asm["ptx"]
            assert not re.search(r"ld\.global\.(b8|u8|s8)", made.asm["ptx"])


@pytest.mark.gpu
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_kernel_computes_the_reference_on_a_gpu(site, tokens):
    assert check(site, tokens, "cuda") < 10 * TOLERANCE[site.dense]


def test_it_covers_what_it_can_print():
    assert all(covers(site) is None for site in SITES.values())


def test_columns_are_parted_where_words_are_packed():
    packed = parted(Affine(4, 32, "token", True).expr((32, 128)), 128)
    assert packed is not None and packed[:3] == (4, 2, 16)
    assert [CODE in load.index.free_symbols for load in loads(packed.expr)] == [False] * 3  # codes, scale, zero
    assert parted(Affine(4, 32, "token", True).expr((32, 96)), 96) is None
    assert parted(Dense("float16").expr((32, 128)), 128) is None
