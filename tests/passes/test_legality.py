"""Orders of steps that contracts refuse, through the pass manager: each says which step made it so, and the way out."""

from collections.abc import Callable

import pytest
import torch

from smelt.ir.encoding import parse
from smelt.ir.program import Program
from smelt.passes import Samples, catalogue
from smelt.passes.manager import StepFailed, run
from smelt.recipes import Step

KEYS = {"keys": parse("affine(bits=4, axis=channel, group=32, zero=True)")}
VALUES = {"values": parse("affine(bits=4, group=32, zero=True)")}
TRAIN = {"steps": 1, "batch": 1, "length": 16}

INSERT = ("cache.insert", {"dtype": "float32"})
SELECT = ("cache.select", {"skip_layers": (), "page": 128})
ENCODE = ("cache.encode", KEYS)
RECYCLE = ("decode.recycle", {"nodes": 4})
HEADS = ("decode.heads", {"heads": 2, "nodes": 4})
DRILL = ("train.heads", TRAIN)
QUANTIZE = ("weights.quantize", {"group": 32})

Order = tuple[tuple[str, dict], ...]


def steps(order: Order) -> list[Step]:
    passes = catalogue()
    return [Step(name, name, passes[name](**options), {}) for name, options in order]


def refusal(program: Program, order: Order, samples: Samples | None = None) -> str:
    with pytest.raises(StepFailed) as caught:
        run(program, steps(order), samples)
    return str(caught.value)


@pytest.fixture
def text(tokens: Callable[..., torch.Tensor]) -> Samples:
    return Samples(tokens(8, 32))


REFUSED = {
    "encode before insert": (
        (ENCODE, INSERT),
        "step 1, cache.encode: llama must have a cache plan, but has none: put cache.insert in front",
    ),
    "select before insert": (
        (SELECT, INSERT),
        "step 1, cache.select: llama must have a cache plan, but has none: put cache.insert in front",
    ),
    "draft before insert": (
        (RECYCLE, INSERT),
        "step 1, decode.recycle: llama must have a cache plan, but has none: put cache.insert in front",
    ),
    "heads before insert": (
        (HEADS, INSERT),
        "step 1, decode.heads: llama must have a cache plan, but has none: put cache.insert in front",
    ),
    "insert twice": (
        (INSERT, INSERT),
        "step 2, cache.insert: llama must have no cache plan, but has one since step 1, cache.insert",
    ),
    "select after per-channel codes": (
        (INSERT, ENCODE, SELECT),
        "step 3, cache.select: token-granular selection must come before keys are stored per channel "
        "(since step 2, cache.encode): move cache.select in front",
    ),
    "select twice": (
        (INSERT, SELECT, SELECT),
        "step 3, cache.select: layer 0 must keep every token, but already keeps 0.5 of them by key_norm since step 2, "
        "cache.select: put both into one cache.select",
    ),
    "encode twice": (
        (INSERT, ENCODE, ENCODE),
        "step 3, cache.encode: keys of layer 0 must be dense, but are "
        "affine(bits=4, group=32, axis=channel, zero=True, "
        "scale=float16) since step 2, cache.encode: a cache is encoded once",
    ),
    "a tail shorter than a group": (
        (INSERT, ("cache.encode", {**KEYS, "tail": 16})),
        "step 2, cache.encode: cache site of layer 0: keys affine(bits=4, group=32, axis=channel, zero=True, "
        "scale=float16) closes groups of 32 tokens, but the tail keeps 16: set tail to 32 or more, or a smaller group "
        "(and so for 1 more layers)",
    ),
    "a page that keeps less than a group": (
        (INSERT, ("cache.select", {"skip_layers": (), "keep": 0.25}), ENCODE),
        "step 3, cache.encode: cache site of layer 0: keys affine(bits=4, group=32, axis=channel, zero=True, "
        "scale=float16) cannot store a page (page 64 keeps 16 tokens): dim -2 is 16, not a multiple of group=32; "
        "change group, page or keep (and so for 1 more layers)",
    ),
    "a head that groups do not divide": (
        (INSERT, ("cache.encode", {"values": parse("affine(bits=8, group=48)")})),
        "step 2, cache.encode: cache site of layer 0: values affine(bits=8, group=48, axis=token, zero=False, "
        "scale=float16) cannot store a page (page 64 keeps 64 tokens): dim -1 is 64, not a multiple of group=48; "
        "change group, page or keep (and so for 1 more layers)",
    ),
    "a drafter twice": (
        (INSERT, RECYCLE, HEADS, RECYCLE),
        "step 4, decode.recycle: llama must not draft by recycle twice since step 3, decode.heads: keep one of the two "
        "steps",
    ),
    "training what is not there": (
        (INSERT, DRILL),
        "step 2, train.heads: llama must decode by heads, but has no drafter: put decode.heads in front",
    ),
    "training for another drafter": (
        (INSERT, RECYCLE, DRILL),
        "step 3, train.heads: llama must decode by heads, but decodes by recycle since step 2, decode.recycle: "
        "put decode.heads in front",
    ),
    "training twice": (
        (INSERT, HEADS, DRILL, DRILL),
        "step 4, train.heads: the heads of llama must be untrained, but are trained since step 3, train.heads: "
        "train them once",
    ),
    "training what is encoded": (
        (INSERT, HEADS, QUANTIZE, DRILL),
        "step 4, train.heads: heads.0.block.weight must be Dense to be trained, but is affine(bits=4, group=32, "
        "axis=token, zero=False, scale=float16) since step 3, weights.quantize: move train.heads in front",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case, llama, text):
    order, message = REFUSED[case]
    assert refusal(llama, order, text) == message


LEGAL = {
    "select, encode, draft": (INSERT, SELECT, ENCODE, RECYCLE),
    "values in groups of channels leave tokens free": (INSERT, ("cache.encode", VALUES), SELECT),
    "draft first": (INSERT, RECYCLE, SELECT, ENCODE),
    "quantise last": (INSERT, HEADS, DRILL, QUANTIZE),
}


@pytest.mark.parametrize("case", LEGAL)
def test_is_legal(case, llama, text):
    result = run(llama, steps(LEGAL[case]), text)
    assert [step.status for step in result.report.steps] == ["done"] * len(LEGAL[case])


def test_a_model_that_is_no_decoder_has_no_decode_step(llama):
    llama.facts["kind"] = "encoder"
    assert refusal(llama, (INSERT,)).startswith("step 1, cache.insert: llama must be a decoder, but is a")


def test_training_without_text(llama):
    message = refusal(llama, (INSERT, HEADS, DRILL))
    assert (
        message == "step 3, train.heads: calibrates on samples, and there are none: "
        "give texts with --calibration FILE, or calibration="
    )
