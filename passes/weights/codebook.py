"""Weights as numbers into tables that are fitted to them on sample text (AQLM, 2024; JLCM, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.encoding import Codebook as Encoded
from ...ir.encoding import Encoding, Sum
from ...ir.errors import SmeltError
from ._books import solve
from ._coded import Fitted
from ._gptq import Solved


@dataclass(frozen=True)
class Codebook(Fitted):
    """Stores matrices as codes of neighbouring weights, the entries of learned tables, times a scale a row.

    Codes, tables and scales are fitted in turn to what the products lose on sample text: codes by beam search (AQLM,
    Egiazarian et al., 2024, arXiv 2401.06118), tables and scales by least squares. `dims: 1` is a table of numbers, of
    which rows of different distributions may have different ones (JLCM, Yvinec et al., 2023, arXiv 2309.17361).

    dims: neighbours in a row that have one code.
    bits: width of a code; a weight takes books * bits / dims, and the tables what they take, all of which is counted.
    books: tables whose entries are added up, each with a code of its own.
    banks: sets of tables, of which each row takes one; 8 bits a row.
    norm: whether rows have scales, one for each book.

    Deviations: AQLM trains the tables on the output of whole blocks, tune.recover does on the output of the model; it
    has one scale a row for all books. JLCM reorders rows by their distribution and trains codes by gradients that
    prefer near entries; here a byte names a row's table, and codes come from coordinate descent.
    """

    dims: int = 1
    bits: int = 4
    books: int = 1
    banks: int = 1
    norm: bool = True

    def __post_init__(self) -> None:
        """Refuses options that no matrix can satisfy."""
        super().__post_init__()
        if not 1 <= self.books <= 8:
            raise SmeltError(f"books is a number of tables from 1 to 8, not {self.books}")
        _ = self.encoding

    @property
    def encoding(self) -> Encoding:
        """One term for each book."""
        term = Encoded(self.dims, self.bits, shared=True, norm=self.norm, banks=self.banks)
        return term if self.books == 1 else Sum((term,) * self.books)

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor) -> Solved:
        """Everything together."""
        return solve(weight, hessian, self.encoding, self.damp, self.rounds)
