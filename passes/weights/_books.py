"""Fits codes and codebooks of a matrix together, to the error of its products on sample text.

Extreme Compression of Large Language Models via Additive Quantization (AQLM, Egiazarian et al., 2024, arXiv
2401.06118): beam search over codes and books in turn. Codes begin with the errors of neighbours carried on, as in
GPTVQ (van Baalen et al., 2024, arXiv 2402.15319).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...ir.encoding import Codebook, Encoding, Sum, packing
from ._gptq import Solved, inverse_factor, lost

BEAM = 8  # combinations that are followed from one codebook to the next
STEPS = 12  # of conjugate gradients, for all books at once


@dataclass
class Books:
    """One term: codes int64 [N, K / dims], book float32 [banks, 2^bits, dims], bank int64 [N], scale [N, 1]."""

    encoding: Codebook
    codes: torch.Tensor
    book: torch.Tensor
    bank: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, encoding: Codebook, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Books:
        """Of stored parts."""
        rows, groups = shape[0], shape[1] // encoding.dims
        bank = parts["bank"][:, 0].long() if "bank" in parts else torch.zeros(rows, dtype=torch.int64)
        scale = parts["scale"].float() if "scale" in parts else torch.ones(rows, 1)
        codes = packing.unpack(parts, encoding.bits, groups, lanes=1).long()
        return cls(encoding, codes, parts["book"].float(), bank, scale)

    def parts(self) -> dict[str, torch.Tensor]:
        """As they are stored."""
        held = packing.pack(self.codes.int(), self.encoding.bits, lanes=1) | {"book": self.book.half()}
        if self.encoding.norm:
            held["scale"] = self.scale.half()
        return held | ({"bank": self.bank.to(torch.uint8)[:, None]} if self.encoding.banks > 1 else {})

    def places(self) -> torch.Tensor:
        """The entry of all books that each code names, [N * K / dims]."""
        return (self.codes + self.bank[:, None] * self.book.shape[1]).flatten()

    def values(self, book: torch.Tensor) -> torch.Tensor:
        """What the codes stand for in these books, [N, K], without the scale."""
        return book.flatten(0, 1)[self.places()].view(len(self.codes), -1)


def shared(encoding: Encoding) -> tuple[Codebook, ...]:
    """The codebooks of equal dims that an encoding adds up, each for all columns; none where it is something else."""
    found = encoding.terms if isinstance(encoding, Sum) else (encoding,)
    books = tuple(each for each in found if isinstance(each, Codebook) and each.shared and each.calibrated)
    return books if len(books) == len(found) and len({each.dims for each in books}) == 1 else ()


def books(encoding: Encoding, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, Books]:
    """The terms of such an encoding, by what the names of their parts begin with."""
    prefixes = [f"{letter}_" for letter in "abcdefgh"] if isinstance(encoding, Sum) else [""]
    found = {}
    for prefix, term in zip(prefixes, shared(encoding), strict=False):
        own = {part.removeprefix(prefix): parts[part] for part in parts if part.startswith(prefix)}
        found[prefix] = Books.of(term, own, shape)
    return found


def solve(weight: torch.Tensor, hessian: torch.Tensor, encoding: Encoding, damp: float, rounds: int) -> Solved:
    """The matrix float32 [N, K] in shared codebooks, or a sum of some, for inputs of the moments float64 [K, K].

    damp: as in GPTQ. rounds: how often books, scales and codes are improved in turn at most; a round that gains less
    than 1 % is the last.
    """
    shape = weight.shape[0], weight.shape[1]
    upper, damped = inverse_factor(hessian, damp)
    size = float(hessian.diagonal().mean()) or 1.0
    inner = hessian.clone()
    inner.diagonal().add_(damped * size).masked_fill_(hessian.diagonal() == 0, size)
    matrix = (inner / size).float()
    parts = encoding.alone(weight, (matrix.diagonal() * weight.square().mean(1, keepdim=True)).expand(shape))
    terms = books(encoding, parts, shape)
    held = list(terms.values())
    _carried(held, weight, upper)
    best = _loss(held, weight, matrix)
    for _ in range(rounds):
        _refit(held, weight, matrix)
        _rescale(held, weight, matrix)
        _descend(held, weight, matrix)
        now = _loss(held, weight, matrix)
        if now > 0.99 * best:
            break
        best = now
    found = {prefix + part: v for prefix, term in terms.items() for part, v in term.parts().items()}
    return Solved(found, damped, lost(weight, encoding.decode(found, shape), hessian))


def _loss(held: list[Books], weight: torch.Tensor, matrix: torch.Tensor) -> float:
    rest = weight - _decoded(held)
    return float(((rest @ matrix) * rest).sum())


def _decoded(held: list[Books]) -> torch.Tensor:
    first, *others = (term.values(term.book) * term.scale for term in held)
    for other in others:
        first = first + other
    return first


def _carried(held: list[Books], weight: torch.Tensor, upper: torch.Tensor) -> None:
    """Codes from left to right, each group's error being made up for by those behind it."""
    dims, left = held[0].encoding.dims, weight.clone()
    for g in range(weight.shape[1] // dims):
        at = slice(g * dims, (g + 1) * dims)
        turn = torch.linalg.inv(upper[at, at])  # an error e costs |e turn|² when all behind it make up for it
        wanted = left[:, at]
        codes, value = nearest(held, wanted, turn)
        for term, found in zip(held, codes, strict=True):
            term.codes[:, g] = found
        left[:, at.stop :].addmm_((wanted - value) @ turn, upper[at, at.stop :], alpha=-1)


def _descend(held: list[Books], weight: torch.Tensor, matrix: torch.Tensor) -> None:
    """One group of codes after the other to what is best with all others as they are."""
    dims, value = held[0].encoding.dims, _decoded(held)
    rest = weight - value
    for g in range(weight.shape[1] // dims):
        at = slice(g * dims, (g + 1) * dims)
        turn = torch.linalg.cholesky(matrix[at, at])
        old = value[:, at]
        wanted = old + torch.cholesky_solve((rest @ matrix[:, at]).T, turn).T
        codes, new = nearest(held, wanted, turn)
        better = ((wanted - new) @ turn).square().sum(1) < ((wanted - old) @ turn).square().sum(1)
        for term, found in zip(held, codes, strict=True):
            term.codes[:, g] = torch.where(better, found, term.codes[:, g])
        rest[:, at] = torch.where(better[:, None], weight[:, at] - new, rest[:, at])


def nearest(held: list[Books], wanted: torch.Tensor, turn: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Codes [N] of each term for vectors [N, dims] where |(wanted - value) turn| is small, and that value."""
    rest = (wanted @ turn)[:, None]  # [N, combinations, dims]
    cost = torch.zeros(rest.shape[:2])
    chosen: list[torch.Tensor] = []
    for i, term in enumerate(held):
        book = term.book @ turn
        mine = book[0] if len(book) == 1 else book[term.bank]  # [N or not, entries, dims]
        scale = term.scale[..., None]
        sizes = mine.square().sum(-1)
        near = cost[..., None] + scale.square() * (sizes if sizes.dim() == 1 else sizes[:, None])
        near = (near - 2 * scale * (rest @ mine.mT)).flatten(1)
        count = 1 if i == len(held) - 1 else min(BEAM, near.shape[1])
        cost, best = near.topk(count, 1, largest=False)
        before, code = best // book.shape[1], best % book.shape[1]
        chosen = [each.gather(1, before) for each in chosen] + [code]
        taken = book[term.bank[:, None], code] * scale
        rest = rest.gather(1, before[..., None].expand(*before.shape, rest.shape[2])) - taken
    codes = [each[:, 0] for each in chosen]
    value = torch.zeros_like(wanted)
    for term, code in zip(held, codes, strict=True):
        value = value + term.book[term.bank, code] * term.scale
    return codes, value


def _refit(held: list[Books], weight: torch.Tensor, matrix: torch.Tensor) -> None:
    """The books with the least error for these codes and scales, by conjugate gradients from those there are."""

    def seen(rows: torch.Tensor) -> list[torch.Tensor]:
        """What rows @ H [N, K] mean to each entry."""
        turned = rows @ matrix
        found = []
        for term in held:
            vectors = (turned * term.scale).view(-1, term.encoding.dims)
            found.append(torch.zeros_like(term.book).flatten(0, 1).index_add_(0, term.places(), vectors))
        return [each.view_as(term.book) for each, term in zip(found, held, strict=True)]

    def said(books: list[torch.Tensor]) -> torch.Tensor:
        return sum((t.values(b) * t.scale for t, b in zip(held, books, strict=True)), torch.zeros(()))

    rest = seen(weight - _decoded(held))
    way = [each.clone() for each in rest]
    size = _dot(rest, rest)
    for _ in range(STEPS):
        ahead = seen(said(way))
        curve = _dot(way, ahead)
        if curve <= 0 or size <= 0:
            break
        step = size / curve
        for term, w, r, a in zip(held, way, rest, ahead, strict=True):
            term.book = term.book + step * w
            r -= step * a
        size, last = _dot(rest, rest), size
        way = [r + size / last * w for r, w in zip(rest, way, strict=True)]
    for term in held:
        term.book = term.book.half().float()


def _rescale(held: list[Books], weight: torch.Tensor, matrix: torch.Tensor) -> None:
    """The scales of each row with the least error for these codes and books."""
    scaled = [term for term in held if term.encoding.norm]
    if not scaled:
        return
    values = torch.stack([term.values(term.book) for term in scaled], 1)  # [N, terms, K]
    fixed = [term for term in held if not term.encoding.norm]
    rest = weight - (_decoded(fixed) if fixed else 0)
    turned = values @ matrix
    gram, right = turned @ values.mT, turned @ rest[..., None]
    gram.diagonal(dim1=1, dim2=2).add_(1e-6 * gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True).clamp_min(1e-30))
    found = torch.linalg.solve(gram, right)[..., 0]  # [N, terms]
    for i, term in enumerate(scaled):
        term.scale = found[:, i : i + 1].half().float()


def _dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
