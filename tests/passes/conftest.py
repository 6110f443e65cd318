"""A small random llama, captured once: as it is, and with a dense cache plan."""

from collections.abc import Callable

import pytest
import torch

from smelt.ir.program import Program
from smelt.passes.cache.insert import Insert

CONTEXT = 256


@pytest.fixture(scope="session")
def _captured() -> Program:
    transformers = pytest.importorskip("transformers")
    from smelt.ir.capture.hf import capture_hf

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # what 2-bit codes fill whole words with
        vocab_size=97,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # as they are initialised, logits would be flat
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.15
    return capture_hf(model)


@pytest.fixture
def llama(_captured: Program) -> Program:
    """Two layers, 4 heads of 64 over 2 KV heads, vocabulary 97, context 256; no cache."""
    return _captured.fork()


@pytest.fixture
def cached(llama: Program) -> Program:
    """The same with a cache plan of dense float32 sites."""
    Insert("float32").apply(llama, None)
    return llama


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """Random token ids int64 [rows, length]."""

    def make(rows: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make
