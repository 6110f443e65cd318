"""A text to train on."""

import inspect
import json

import pytest
import torch

from smelt.passes import Samples


@pytest.fixture(scope="session")
def text() -> Samples:
    """Source of the standard library, one byte a token."""
    codes = [min(c, 96) for c in inspect.getsource(json.decoder).encode()]
    return Samples(torch.tensor(codes[: len(codes) // 64 * 64]).view(-1, 64))
