"""Every launch of a prompt and of steps compiles for a GPU as it is launched there; none is needed.

Triton compiles a kernel for the arguments of a launch: an integer 1 becomes a constant, one that 16 divides is known to
be such, an operand that is None goes away. Signatures written by hand show none of that, and the interpreter neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smelt.codegen import rows_triton
from smelt.runtime import bound_triton
from smelt.runtime.session import Session

from ..codegen.triton_checks import compiled
from .test_triton_target import session

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    compiled,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: launches themselves are tested"),
]
SHARED = 227 << 10  # bytes of a block on sm_90
PROMPT = [5, 9, 77, 30]


class Launches:
    """What was compiled, by kernel: bytes of shared memory of each specialization."""

    def __init__(self) -> None:
        self.shared: dict[str, list[int]] = {}

    def __call__(self, run: Any, kernel: Any, *args: Any, **options: Any) -> None:
        made = run(kernel, *args, **{**options, "warmup": True})
        assert all(size > 0 for size in options["grid"]), f"{kernel.fn.__name__}: an empty grid {options['grid']}"
        self.shared.setdefault(kernel.fn.__name__, []).append(made.metadata.shared)


class Driver:
    """An H100 that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Kernels are compiled and not launched; what they would write is whatever lies there."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made, run = Launches(), JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: made(run, kernel, *args, **options))
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(bound_triton, "device", lambda: torch.device("cpu"))
    rows_triton.kernels.cache_clear()
    yield made
    rows_triton.kernels.cache_clear()


def stepped(session: Session) -> None:
    session.prefill([PROMPT])
    session.step(torch.ones(1, 1, dtype=torch.int64), torch.tensor(session.cache.lengths)[:, None])


def test_every_launch_compiles_as_it_is_asked_for(launches: Launches) -> None:
    """Over a compressed cache, from 4-bit weights; the step's one row and one token are constants."""
    stepped(session("coded", "triton"))
    assert {"gemv", "gather", "rotate_append", "attend", "merge", "scan", "choose"} <= launches.shared.keys()
    assert max(map(max, launches.shared.values())) <= SHARED


def test_a_kernel_that_a_one_breaks_is_caught(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant is no tensor: it has no `to`."""
    right, wrong = "at // T, at % T", "at // T.to(tl.int64), at % T"
    assert right in rows_triton.SOURCE
    monkeypatch.setattr(rows_triton, "SOURCE", rows_triton.SOURCE.replace(right, wrong))
    with pytest.raises(Exception, match=r"no attribute|'to'|constexpr"):
        stepped(session("none", "triton"))
