"""onnx's backend suite: nine cases of ten pass as Programs, the others are refused with a reason, none is wrong."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from .backend_cases import PASSED, REFUSED, STRINGS, WRONG, Outcome, cases, outcome

LISTED: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "backend_unsupported.yaml").read_text())
SHARE = 0.90  # of the cases whose types torch can hold

pytestmark = [
    pytest.mark.slow,
    # the suite makes its data when it is loaded, infinities and NaN among them
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def _reason(name: str) -> str | None:
    for group in LISTED:
        if any(name == case[:-1] if case.endswith("$") else name.startswith(case) for case in group["cases"]):
            return str(group["reason"])
    return None


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    logging.disable(logging.CRITICAL)  # torch tells every step of a trace, and pytest keeps it all
    try:
        return [outcome(case) for case in cases()]
    finally:
        logging.disable(logging.NOTSET)


def test_nine_of_ten_pass_and_none_is_wrong(outcomes: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(o.verdict for o in outcomes)
    holdable = len(outcomes) - counts[STRINGS]
    with capsys.disabled():
        print(
            f"\nonnx backend suite: {len(outcomes)} cases, {holdable} without strings, {counts[PASSED]} passed "
            f"({counts[PASSED] / holdable:.1%}; {sum(bool(o.fixed) for o in outcomes)} with shapes or axes given at "
            f"import), {counts[REFUSED]} refused, {counts[WRONG]} wrong"
        )
    assert not [o for o in outcomes if o.verdict == WRONG]
    assert counts[PASSED] >= SHARE * holdable
    assert len(outcomes) >= 1900


def test_refuses_what_is_listed_and_nothing_else(outcomes: list[Outcome]) -> None:
    refused = {o.name for o in outcomes if o.verdict == REFUSED}
    listed = {o.name for o in outcomes if _reason(o.name) is not None and o.verdict != STRINGS}
    assert {o.name: o.reason for o in outcomes if o.name in refused - listed} == {}
    assert listed - refused == set()


def test_every_reason_is_of_a_case(outcomes: list[Outcome]) -> None:
    names = [o.name for o in outcomes]
    for group in LISTED:
        for case in group["cases"]:
            assert any(name == case[:-1] if case.endswith("$") else name.startswith(case) for name in names), case


@pytest.mark.parametrize(
    "spoil",
    [lambda r: r * 1.05, lambda r: r.flip(0), lambda r: r[:-1], lambda r: r.double()],
    ids=["5 % more", "rows in another order", "one row less", "another type"],
)
def test_notices_a_wrong_answer(spoil: Any) -> None:
    some = {"test_add", "test_matmul_2d", "test_concat_2d_axis_0", "test_tanh"}
    spoilt = [case for case in cases() if case.name in some]
    assert [outcome(case).verdict for case in spoilt] == [PASSED] * len(some)
    made = [outcome(case, lambda r: spoil(r) if isinstance(r, torch.Tensor) else r) for case in spoilt]
    assert [o.verdict for o in made] == [WRONG] * len(some)
