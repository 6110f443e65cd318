"""Drafts with n-grams of a Jacobi window that runs beside the verified tokens (Lookahead Decoding, Fu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ._join import Drafting


@dataclass(frozen=True)
class Lookahead(Drafting):
    """Rows of the step beside the tree run the window; what they choose becomes n-grams that are verified later.

    window: columns; ngram: tokens of an n-gram, one more than the window has levels.
    guesses: n-grams that are kept for each first token, and verified at once.

    Deviations: the window starts with tokens of the prompt, whose own n-grams fill the pool; released code starts at
    random and with an empty pool.
    """

    kind: ClassVar[type[decode.Draft]] = decode.Lookahead

    window: int = 7
    ngram: int = 5
    guesses: int = 7
