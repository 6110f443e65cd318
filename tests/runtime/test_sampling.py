"""Warpers and their chain equal transformers' on values and on what they forbid; bad parameters are named."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smelt.ir.errors import SmeltError
from smelt.runtime import sampling
from smelt.runtime.sampling import Context, Sampling, tree_paths


def logits(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Same tokens forbidden, same values elsewhere."""
    return torch.equal(ours == -math.inf, theirs == -math.inf) and torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


WARPERS: list[tuple[str, Callable[[torch.Tensor, Any], torch.Tensor], str, list[float]]] = [
    ("top_k", sampling.keep_top_k, "TopKLogitsWarper", [1, 5, 50, 10_000]),
    ("top_p", sampling.keep_top_p, "TopPLogitsWarper", [0.0, 0.3, 0.9, 0.99]),
    ("min_p", sampling.keep_min_p, "MinPLogitsWarper", [0.01, 0.2, 1.0]),
    ("typical_p", sampling.keep_typical, "TypicalLogitsWarper", [0.2, 0.9, 0.99]),
]
CASES = [
    pytest.param(ours, theirs, value, id=f"{name}={value}")
    for name, ours, theirs, values in WARPERS
    for value in values
]
# below, between and above the sizes of head that the warpers try; peaked and flat laws
SHAPES = [(7, 3.0), (300, 0.5), (1000, 4.0), (5000, 3.0), (5000, 0.1)]


def warp(name: str, value: float, x: torch.Tensor) -> torch.Tensor:
    process = pytest.importorskip("transformers.generation.logits_process")
    out = getattr(process, name)(value)(torch.zeros(len(x), 1, dtype=torch.long), x.clone())
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize(("ours", "theirs", "value"), CASES)
def test_warper_equals_transformers(ours: Callable[..., torch.Tensor], theirs: str, value: float) -> None:
    for vocabulary, scale in SHAPES:
        x = logits(6, vocabulary, scale)
        before = x.clone()
        assert same(ours(x, value), warp(theirs, value, x)), (vocabulary, scale)
        assert torch.equal(x, before), "the input is not ours to change"


MUTANTS: dict[str, tuple[str, float, Callable[[torch.Tensor], torch.Tensor]]] = {
    "one token more": ("TopKLogitsWarper", 5, lambda x: sampling.keep_top_k(x, 6)),
    "no warper": ("TopKLogitsWarper", 5, lambda x: x),
    "5 % more mass": ("TopPLogitsWarper", 0.9, lambda x: sampling.keep_top_p(x, 0.945)),
    "5 % less mass": ("TopPLogitsWarper", 0.9, lambda x: sampling.keep_top_p(x, 0.855)),
    "5 % higher bar": ("MinPLogitsWarper", 0.05, lambda x: sampling.keep_min_p(x, 0.0525)),
    "bar without the top": (
        "MinPLogitsWarper",
        0.05,
        lambda x: x.masked_fill(x.softmax(-1) < 0.05, -math.inf),
    ),
    "mass from the likeliest": ("TypicalLogitsWarper", 0.2, lambda x: sampling.keep_top_p(x, 0.2)),
    "a row dropped": ("TypicalLogitsWarper", 0.9, lambda x: sampling.keep_typical(x[:1], 0.9).expand_as(x)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_warper_is_seen(mutant: str) -> None:
    theirs, value, ours = MUTANTS[mutant]
    x = logits(6, 1000)
    assert not same(ours(x), warp(theirs, value, x))


def test_ties_fall_as_in_a_full_stable_sort() -> None:
    """Half-precision models tie often; the head that is sorted must not decide which of the tied tokens stay."""
    for vocabulary, scale in ((40, 2.0), (1000, 0.0), (1000, 2.0), (6000, 2.0)):
        x = (logits(8, vocabulary, scale) * 2).round() / 2
        for p in (0.0, 0.1003, 0.5003, 0.9003):  # not where the cut hangs on the last bit of a sum
            ascending, order = x.sort(dim=-1, stable=True)
            removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
            removed[:, -1] = False
            expected = x.masked_fill(removed.scatter(1, order, removed), -math.inf)
            assert same(sampling.keep_top_p(x, p), expected), (vocabulary, scale, p)


def test_a_mass_that_is_just_reached_is_enough() -> None:
    x = torch.zeros(1, 4)
    assert (sampling.keep_top_p(x, 0.5) > -math.inf).tolist() == [[False, False, True, True]]
    assert same(sampling.keep_top_p(x, 0.5), warp("TopPLogitsWarper", 0.5, x))


def test_typical_keeps_ties_at_the_cut() -> None:
    x = (logits(8, 6000, 2.0) * 2).round() / 2
    assert same(sampling.keep_typical(x, 0.5), warp("TypicalLogitsWarper", 0.5, x))


def test_warpers_take_forbidden_tokens() -> None:
    x = logits(4, 400)
    x[:, 3:] = -math.inf
    for _, ours, theirs, values in WARPERS:
        assert same(ours(x, values[-1]), warp(theirs, values[-1], x))


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.1, "typical_p": 0.6},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.8},
    {"temperature": 0.0, "top_k": 2, "top_p": 0.1, "repetition_penalty": 1.5},
]


@pytest.fixture(scope="module")
def generate() -> Callable[..., Any]:
    """transformers' own loop over a tiny model, with the logits before and after processing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 20  # laws with a peak

    def run(options: dict[str, Any]) -> Any:
        options = {"top_k": 0, "do_sample": options["temperature"] > 0} | options
        if not options["do_sample"]:
            options = {"do_sample": False, "repetition_penalty": options["repetition_penalty"]}
        prompt = torch.tensor([[5, 9, 5, 200]])
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **options,
        )

    return run


def replayed(out: Any, process: Callable[[torch.Tensor, Context], torch.Tensor]) -> bool:
    """Whether `process` makes of every step's logits what `generate` made of them."""
    seen = torch.zeros(300, dtype=torch.bool)
    start = out.sequences.shape[1] - len(out.scores)
    verdicts = []
    for step, (raw, processed) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen[out.sequences[0, : start + step]] = True
        verdicts.append(same(process(raw, Context(seen=seen)), processed))
    return all(verdicts)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_process_equals_generate(options: dict[str, Any], generate: Callable[..., Any]) -> None:
    assert replayed(generate(options), Sampling(**options).process)


def test_the_order_of_the_steps_is_seen(generate: Callable[..., Any]) -> None:
    out = generate({"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.5})
    right = Sampling(temperature=0.5, top_p=0.8, repetition_penalty=1.5)
    assert replayed(out, right.process)
    assert not replayed(out, lambda x, c: sampling.keep_top_p(sampling.penalize(x, c, 1.5), 0.8) / 0.5)
    assert not replayed(out, lambda x, c: sampling.penalize(sampling.keep_top_p(x / 0.5, 0.8), c, 1.5))
    assert not replayed(out, lambda x, c: right.process(x, Context(seen=torch.zeros(300, dtype=torch.bool))))


def test_greedy_leaves_the_warpers_out() -> None:
    """Typical sampling may forbid the likeliest token; greedy must still choose it."""
    x = torch.tensor([[0.4] + [0.1] * 6]).log()
    assert Sampling(temperature=1, typical_p=0.5).process(x)[0, 0] == -math.inf
    assert torch.equal(Sampling(typical_p=0.5, top_k=1).process(x), x)


def test_process_takes_half_precision_and_keeps_its_input() -> None:
    x = logits(3, 50).half()
    before = x.clone()
    out = Sampling(temperature=0.5, repetition_penalty=2.0).process(x, Context(paths=torch.tensor([[1], [2], [3]])))
    assert out.dtype == torch.float32 and torch.equal(x, before)


PARENTS = torch.tensor([0, 0, 0, 1, 3, 2, 4])
TOKENS = torch.tensor([5, 7, 8, 7, 5, 29, 11])
COMMITTED = [2, 7, 2, 9]


def penalized_by_path(x: torch.Tensor, penalty: float) -> torch.Tensor:
    """transformers' penalty, one node at a time, over the whole prefix of the node."""
    process = pytest.importorskip("transformers.generation.logits_process")
    rows = []
    for node in range(len(PARENTS)):
        path, at = [int(TOKENS[node])], node
        while at:
            at = int(PARENTS[at])
            path.append(int(TOKENS[at]))
        prefix = torch.tensor([COMMITTED + path])
        rows.append(process.RepetitionPenaltyLogitsProcessor(penalty)(prefix, x[node : node + 1].clone()))
    return torch.cat(rows)


def seen_tokens(vocabulary: int) -> torch.Tensor:
    return torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, torch.tensor(COMMITTED), True)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_penalty_follows_the_path_of_each_node(penalty: float) -> None:
    x = logits(7, 30)
    context = Context(seen=seen_tokens(30), paths=tree_paths(TOKENS, PARENTS))
    expected = penalized_by_path(x, penalty)
    assert same(sampling.penalize(x, context, penalty), expected)

    mutants = {
        "path forgotten": sampling.penalize(x, Context(seen=seen_tokens(30)), penalty),
        "committed tokens forgotten": sampling.penalize(x, Context(paths=tree_paths(TOKENS, PARENTS)), penalty),
        "twice": sampling.penalize(sampling.penalize(x, context, penalty), context, penalty),
        "own token only": sampling.penalize(x, Context(seen_tokens(30), TOKENS[:, None]), penalty),
        "all tokens of the tree": sampling.penalize(x, Context(seen_tokens(30), TOKENS.expand(7, -1)), penalty),
        "5 % off": sampling.penalize(x, context, penalty * 1.05),
    }
    for name, mutant in mutants.items():
        assert not same(mutant, expected), name


def test_seen_may_differ_by_row() -> None:
    x = logits(7, 30)
    context = Context(seen=seen_tokens(30).expand(7, -1), paths=tree_paths(TOKENS, PARENTS))
    assert same(sampling.penalize(x, context, 1.3), penalized_by_path(x, 1.3))


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_padding_of_paths_changes_nothing(penalty: float) -> None:
    x = logits(2, 10)
    bare = sampling.penalize(x, Context(paths=torch.tensor([[0, 9], [4, 4]])), penalty)
    padded = sampling.penalize(x, Context(paths=torch.tensor([[-1, 0, 9, 10], [4, 77, -1, -1]])), penalty)
    assert torch.equal(padded, bare)
    assert torch.equal(sampling.penalize(x, Context(paths=torch.full((2, 3), -1)), penalty), x)


def test_tree_paths_name_every_ancestor() -> None:
    paths = tree_paths(TOKENS, PARENTS)
    assert paths.shape == (7, 5)
    assert [set(row) for row in paths.tolist()] == [{5}, {5, 7}, {5, 8}, {5, 7}, {5, 7}, {5, 8, 29}, {5, 7, 11}]
    assert tree_paths(torch.tensor([3]), torch.tensor([0])).tolist() == [[3]]


def test_penalty_without_context_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="context"):
        Sampling(repetition_penalty=1.1).process(logits(1, 4))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("min_p", 1.5),
        ("typical_p", 0.0),
        ("typical_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1),
        ("repetition_penalty", None),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_bad_parameter_is_named(name: str, value: Any) -> None:
    with pytest.raises(SmeltError, match=f"sampling: {name} must be") as error:
        Sampling(**{name: value})
    assert repr(value) in str(error.value)


def test_whole_numbers_and_limits_are_fine() -> None:
    Sampling(temperature=1, top_k=0, top_p=0, min_p=1, typical_p=1, repetition_penalty=2, seed=2**64 - 1)
    assert Sampling().greedy and not Sampling(temperature=0.1).greedy
