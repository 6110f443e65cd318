"""Checkpoint tensors by the names of a model, converted as transformers converts them while loading, but lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SmeltError, nearest
from ..weight import Weight
from .checkpoint import Entry, entries


@dataclass(frozen=True)
class Computed(Mapping[str, torch.Tensor]):
    """Parts that a conversion computes anew on each access, so that nothing stays resident."""

    compute: Callable[[], torch.Tensor]

    def __getitem__(self, part: str) -> torch.Tensor:
        if part != "data":
            raise KeyError(part)
        return self.compute()

    def __iter__(self) -> Iterator[str]:
        return iter(("data",))

    def __len__(self) -> int:
        return 1


class Checkpoint:
    """The weights of a model folder by the names of the model's own state dict; tied tensors answer to one name."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        """Raises SmeltError for files that are missing or broken, and for shapes other than the model's."""
        self.folder, self._raw = folder, entries(folder)
        wanted = model.state_dict()
        found = {n: w for n, w in _converted(model, self._raw, wanted).items() if n in wanted}
        for name, weight in found.items():
            if weight.shape != tuple(wanted[name].shape):
                raise SmeltError(
                    f"{folder}: '{name}' has shape {list(weight.shape)}, but config.json asks for "
                    f"{list(wanted[name].shape)}; one of the two belongs to another model"
                )
        self.weights = self._tied(model, found)

    def __call__(self, name: str) -> Weight:
        """The weight called `name`; raises SmeltError if the checkpoint does not have it."""
        if name not in self.weights:
            raise SmeltError(f"{self.folder}: the checkpoint has no tensor for '{name}'{nearest(name, self._raw)}")
        return self.weights[name]

    def _tied(self, model: nn.Module, found: dict[str, Weight]) -> dict[str, Weight]:
        weights: dict[str, Weight] = {}
        held: dict[str, str] = {}
        for name, first in tied_names(model).items():
            if name not in found:
                continue
            if first in weights and not torch.equal(weights[first].parts["data"], found[name].parts["data"]):
                raise SmeltError(
                    f"{self.folder}: config.json ties '{held[first]}' and '{name}', but the checkpoint holds different "
                    "values for them; set tie_word_embeddings to false"
                )
            weights.setdefault(first, found[name])
            held.setdefault(first, name)
        return weights


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every tensor's name, mapped to the first name of that tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in all_tensors(model).items()}


def _converted(model: Any, raw: Mapping[str, Entry], wanted: dict[str, torch.Tensor]) -> dict[str, Weight]:
    """Renamed and merged by transformers' table for this model; the steps are those of its own loader."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, Weight] = {}
    merges: dict[str, _Merge] = {}
    for key in sorted(raw, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if pattern is None:
            found[name] = raw[key].weight()
        else:
            merges.setdefault(name, _Merge(name, by_pattern[pattern], model)).sources.append((key, pattern, raw[key]))
    for merge in merges.values():
        found |= merge.weights()
    return found


class _Merge:
    """One conversion that makes one or several tensors out of several, such as an expert stack of its experts."""

    def __init__(self, name: str, converter: Any, model: Any) -> None:
        self.name, self.converter, self.model = name, converter, model
        self.sources: list[tuple[str, str, Entry]] = []

    def weights(self) -> dict[str, Weight]:
        """What comes out, shapes found on the meta device."""
        stored = self.sources[0][2].encoding
        empty = self._run(lambda entry: torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        return {n: Weight(tuple(t.shape), stored, Computed(partial(self._made, n))) for n, t in empty.items()}

    def _made(self, name: str) -> torch.Tensor:
        return self._run(Entry.read)[name]

    def _run(self, read: Callable[[Entry], torch.Tensor]) -> dict[str, torch.Tensor]:
        fresh = deepcopy(self.converter)
        for key, pattern, entry in self.sources:
            fresh.add_tensor(self.name, key, pattern, partial(read, entry))
        try:
            made = fresh.convert(self.name, model=self.model, config=self.model.config)
        except Exception as fault:  # a conversion raises anything when a part is missing
            raise SmeltError(f"{self.sources[0][2].path}: '{self.name}' cannot be put together: {fault}") from fault
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
