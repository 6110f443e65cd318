"""Every pair of passes over the cache is refused with a reason or right, and the written table says which."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "interactions.py"


@pytest.fixture(scope="module")
def interactions() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("interactions", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["interactions"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_pair_is_refused_with_a_reason_or_right(interactions: ModuleType) -> None:
    verdicts = list(interactions.table())
    assert not [(v.first, v.then, v.wrong) for v in verdicts if v.wrong]
    assert not [v.refused for v in verdicts if v.refused.startswith("when it runs")]
    legal = [v for v in verdicts if not v.refused]
    assert len(legal) > len(verdicts) // 4 and any(v.kl > 1e-3 for v in legal)
    number = re.compile(r"\d\.\de[-+]\d+")  # how much a pair costs may differ in its digits from machine to machine
    written = FILE.with_name("results").joinpath("interactions.md").read_text(encoding="utf-8")
    assert number.sub("kl", interactions.text(verdicts)) == number.sub("kl", written), (
        "python benchmarks/interactions.py --write"
    )


def test_a_wrong_pair_is_found(interactions: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body whose tokens are one position off gives other bytes or logits than its formula and its steps."""
    import torch

    from smelt.ir.cache.segments import Segments
    from smelt.passes.measure import replay

    program = interactions.model()
    tokens = torch.randint(
        0, 64, (1, interactions.PROMPT + interactions.NEW), generator=torch.Generator().manual_seed(0)
    )
    dense = replay(program, tokens, interactions.PROMPT, 1)
    used = Segments.used_bytes
    monkeypatch.setattr(Segments, "used_bytes", lambda self, row, counts: used(self, row, counts) + 8)
    found = interactions.tried(program, "encode: channel", "score", tokens, dense)
    assert "bytes are stored" in found.wrong
