"""What every test may rely on: @gpu skips with a reason, hypothesis has no deadline, the reference model has a path."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# a busy machine is no fault of the code under test
settings.register_profile("smelt", deadline=None)
settings.load_profile("smelt")


def pytest_configure(config: pytest.Config) -> None:
    """A test of compiling compiles; what is kept between compiles has tests of its own."""
    os.environ["SMELT_KEEP"] = "0"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the tests import stays: to look for garbage in it, then and in every test, took an eighth of a run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries tell what is left when Python ends."""
    gc.unfreeze()


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
    import smelt

    return Path(smelt.__file__).parent / "reference"
