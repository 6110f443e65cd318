"""What every test may rely on: @gpu skips with a reason, hypothesis has no deadline, the reference model has a path."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

import smelt
from smelt.codegen.compiler import find, flags
from smelt.ir.errors import SmeltError

# what generated kernels include: half of the time that a small one takes to compile
HEADERS = """
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cmath>
#include <utility>
"""

# a busy machine is no fault of the code under test
settings.register_profile("smelt", deadline=None)
settings.load_profile("smelt")


def pytest_configure(config: pytest.Config) -> None:
    """A test of compiling compiles; what is kept between compiles has tests of its own."""
    os.environ["SMELT_KEEP"] = "0"
    if not getattr(config.option, "numprocesses", None):  # else the processes that xdist starts run the tests
        _precompile(config)


def _precompile(config: pytest.Config) -> None:
    """Have GCC read its headers once: libraries are the same, byte for byte. With other flags it reads them itself."""
    if "CPLUS_INCLUDE_PATH" in os.environ:  # of the user, or of a test that starts pytest
        return
    folder = tempfile.TemporaryDirectory(prefix="smelt-headers-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    source = Path(folder.name, "headers.h")
    source.write_text(HEADERS)
    options = [flag for flag in flags() if flag != "-shared"]
    try:
        find().run(source, source.with_name("cstdint.gch"), (*options, "-x", "c++-header"))
    except SmeltError:  # there is no compiler: the tests say so
        return
    os.environ["CPLUS_INCLUDE_PATH"] = folder.name  # there GCC finds <cstdint> first; Clang reads no .gch
    config.add_cleanup(lambda: os.environ.pop("CPLUS_INCLUDE_PATH"))


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
