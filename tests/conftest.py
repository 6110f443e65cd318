"""What every test may rely on: @gpu skips with a reason, hypothesis has no deadline, the reference model has a path."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

import smelt

# a busy machine is no fault of the code under test
settings.register_profile("smelt", deadline=None)
settings.load_profile("smelt")


def pytest_configure() -> None:
    """A test of compiling compiles; what is kept between compiles has tests of its own."""
    os.environ["SMELT_KEEP"] = "0"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` where torch sees no CUDA device."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch.cuda.is_available() is false")


@pytest.fixture(scope="session")
def reference_path() -> Path:
    """The folder of the reference model: config, tokenizer and fp16 weights."""
    return Path(smelt.__file__).parent / "reference"
