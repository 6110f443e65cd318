"""The likeliest tokens by blocks are those that a search of whole rows finds."""

import pytest
import torch

from smelt.runtime.drafters import largest as module
from smelt.runtime.drafters.largest import largest


def law(*shape: int, together: bool = False) -> torch.Tensor:
    """No two logits alike; `together`: the largest stand side by side."""
    random = torch.Generator().manual_seed(0)
    flat = torch.stack([torch.randperm(shape[-1], generator=random) for _ in range(shape[0] * shape[1])]).float()
    return (flat.sort(-1).values if together else flat).view(shape)


@pytest.mark.parametrize("vocabulary", [8, 19, 127, 128, 4096, 4099, 32000, 50257])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [1, 8])
def test_equals_a_search_of_whole_rows(vocabulary: int, together: bool, count: int) -> None:
    logits = law(2, 3, vocabulary, together=together)
    assert torch.equal(largest(logits, count), logits.topk(count, -1).indices)


def test_forbidden_tokens_come_last() -> None:
    logits = law(1, 1, 8192)
    allowed = logits.argsort(-1)[..., 100:103]
    masked = torch.full_like(logits, -torch.inf).scatter(-1, allowed, logits.gather(-1, allowed))
    assert largest(masked, 4)[..., :3].tolist() == allowed.flip(-1).tolist()


def test_a_block_too_few_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = law(1, 1, 4099, together=True)  # behind the last whole block stand three
    monkeypatch.setattr(module.torch, "cat", lambda parts, axis: parts[0])
    assert not torch.equal(largest(logits, 8), logits.topk(8, -1).indices)
