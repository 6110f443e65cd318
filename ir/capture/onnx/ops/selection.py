"""Ops that pick elements by what they are: where conditions hold, distinct ones, reversed stretches, n-grams."""

from __future__ import annotations

import torch

from ....errors import SmeltError
from ..registry import Ints, Tensor, op
from .shape import gather, pad

ML = "ai.onnx.ml"


@op("Compress", since=9)
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The slices along an axis (or elements of x flattened) where the condition holds."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@op("Unique", since=11)
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct elements (or slices), the first place of each, which one stands where, and how often."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    size = x.shape[axis]
    first = torch.full_like(counts, size).scatter_reduce(0, inverse, torch.arange(size), "amin")
    if not sorted:
        order = torch.argsort(first)
        values, first, counts = values.index_select(axis, order), first[order], counts[order]
        inverse = torch.argsort(order)[inverse]
    return values, first, inverse, counts


@op("ReverseSequence", since=10)
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first `lengths[b]` steps of each sequence backwards, the rest as they are."""
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    at, length = torch.arange(moved.shape[1]), lengths[:, None]
    source = torch.where(at < length, length - 1 - at, at)
    source = source.reshape(*source.shape, *[1] * (moved.dim() - 2)).expand(moved.shape)
    return torch.gather(moved, 1, source).movedim((0, 1), (batch_axis, time_axis))


@op("CenterCropPad", since=18)
def center_crop_pad(x: Tensor, sizes: Ints, *, axes: Ints | None = None) -> Tensor:
    """x cut or padded with zeros around its centre to the sizes given."""
    for axis, wanted in zip(range(x.dim()) if axes is None else axes, sizes, strict=True):
        size = x.shape[axis]
        if wanted < size:
            x = x.narrow(axis, (size - wanted) // 2, wanted)
        elif wanted > size:
            before = (wanted - size) // 2
            x = pad(x, (before, wanted - size - before), axes=(axis,))
    return x


@op("TfIdfVectorizer", since=9)
def tf_idf_vectorizer(
    x: Tensor,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Ints,
    ngram_indexes: Ints,
    pool_int64s: Ints | None = None,
    weights: tuple[float, ...] | None = None,
) -> Tensor:
    """How often each n-gram of the pool occurs in rows of integers, as counts, flags or weights."""
    if mode not in ("TF", "IDF", "TFIDF"):
        raise SmeltError(f"TfIdfVectorizer: no mode {mode!r}; there are TF, IDF and TFIDF")
    if not pool_int64s:
        raise SmeltError("TfIdfVectorizer over strings: strings have no counterpart in torch")
    rows = x if x.dim() == 2 else x.reshape(1, -1)
    out = torch.zeros(rows.shape[0], max(ngram_indexes) + 1)
    grams = _grams(pool_int64s, ngram_counts)
    for k, (place, gram) in enumerate(zip(ngram_indexes, grams, strict=True)):
        if not min_gram_length <= len(gram) <= max_gram_length:
            continue
        found = torch.zeros(rows.shape[0])
        for skip in range(max_skip_count + 1 if len(gram) > 1 else 1):
            width = rows.shape[1] - (len(gram) - 1) * (skip + 1)
            if width > 0:
                parts = [rows.narrow(1, i * (skip + 1), width) == code for i, code in enumerate(gram)]
                found = found + torch.stack(parts).all(0).sum(1)
        weight = 1.0 if mode == "TF" or weights is None else weights[k]
        counted = (found > 0).float() if mode == "IDF" else found
        out = out.index_add(1, torch.tensor([place]), (counted * weight)[:, None])
    return out if x.dim() == 2 else out.reshape(-1)


def _grams(pool: Ints, starts: Ints) -> list[tuple[int, ...]]:
    """The pool cut into its n-grams: those of length 1 first, each length from its start on."""
    ends = [*starts[1:], len(pool)]
    return [
        tuple(pool[i : i + n])
        for n, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
        for i in range(start, end, n)
    ]


@op("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(x: Tensor, indices: Tensor) -> Tensor:
    """Columns of x in its last axis."""
    return gather(x.reshape(1, -1) if x.dim() == 1 else x, indices.reshape(-1), axis=-1)


@op("Binarizer", domain=ML)
def binarizer(x: Tensor, *, threshold: float = 0.0) -> Tensor:
    """One where x exceeds the threshold, else zero."""
    return (x > threshold).to(x.dtype)
