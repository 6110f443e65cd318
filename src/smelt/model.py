"""What compile returns and load reads back: a lowered program that generates, reports, and saves itself."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch

from .assets import NAMES, Assets
from .codegen.lower import lower
from .codegen.plan import Plan, Target
from .ir.errors import SmeltError
from .ir.program import Program
from .passes import catalogue
from .passes.report import Report
from .runtime import artefact
from .runtime.bound import Bound
from .runtime.generate import Decoding, Limits
from .runtime.sampling import Sampling
from .runtime.session import Session
from .runtime.text import Stream, Tokenizer

Prompt = str | Sequence[int] | torch.Tensor
SLACK = 64  # a session's cache grows in steps of this many tokens, so that similar requests share bindings


@dataclass(frozen=True)
class Completion:
    """One row's result: new tokens, their text (None without a tokenizer), and why it ended: eos, length or stop."""

    tokens: list[int]
    text: str | None
    reason: str


@dataclass(frozen=True)
class Generation:
    """All rows of one call, with what it took: model steps after the prompt, tokens they gave, seconds of each part."""

    rows: list[Completion]
    steps: int
    step_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens per model step, the first token of each row (the prompt's) not counted."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second after the prompt."""
        return self.step_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Compiled:
    """A compiled model. Decoders `generate`; every kind can be called on its named inputs with `run`."""

    def __init__(
        self,
        program: Program,
        facts: Mapping[str, Any],
        assets: Assets,
        target: Target = "cpp",
        fallback: bool = True,
        report: Report | None = None,
    ) -> None:
        """`facts`: what the manifest says of recipe, calibration and report."""
        self.program, self.facts, self.assets, self.report = program, dict(facts), assets, report
        self.plan: Plan = lower(program, target, fallback)
        self._decoded: dict[str, torch.Tensor] = {}
        self._bound: dict[tuple[torch.Size, ...], Bound] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises when text is asked of a model that has none."""
        if self.assets.folder is None:
            raise SmeltError(f"{self.program.name} was compiled without a tokenizer: pass token ids, or tokenizer=FOLDER")
        return Tokenizer(self.assets.folder)

    @property
    def kernels(self) -> list[dict[str, Any]]:
        """One row a node: kernel, source and why it was chosen or refused."""
        rows = self.plan.kernels()
        return [{**row, "source": self.plan.choices[row["node"]].kernel.source} for row in rows]

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(self.program.facts.get("context") or 1 << 17)

    def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Named outputs of an encoder or plain module for named inputs, as tensors of the caller's own."""
        if set(inputs) != set(self.program.inputs):
            raise SmeltError(f"{self.program.name} takes the inputs {list(self.program.inputs)}, not {sorted(inputs)}")
        if self.program.cache is not None:
            raise SmeltError(f"{self.program.name} reads a cache: call generate")
        key = tuple(inputs[name].shape for name in self.program.inputs)
        bound = self._bound.get(key)
        if bound is None:
            buffers = {n: torch.empty_like(t, memory_format=torch.contiguous_format) for n, t in inputs.items()}
            bound = self._bound[key] = Bound(self.plan, buffers, None, self._decoded)
        for name, value in inputs.items():
            bound.inputs[name].copy_(value)
        bound.run()
        return {name: value.clone() for name, value in bound.outputs.items()}

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Any) -> list[int]: ...
    @overload
    def generate(self, prompt: Any, **options: Any) -> Any: ...
    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue text or token ids; returns the new text or ids, in a list for a list of prompts.

        Options: max_new_tokens (64), temperature (0: greedy), top_k, top_p, min_p, typical_p, repetition_penalty, seed,
        stop (strings), speculate (True: use the recipe's drafter; the tokens are the same either way).
        """
        prompts, single = _as_batch(prompt)
        result = self.complete(prompts, **options)
        texts = isinstance(prompts[0], str)
        rows = [row.text if texts else row.tokens for row in result.rows]
        return rows[0] if single else rows

    def complete(self, prompts: Sequence[Prompt], **options: Any) -> Generation:
        """`generate` with everything that is known about the call; always a batch."""
        decoding, streams, start = self._start(prompts, options)
        pieces: list[list[str]] = [[] for _ in prompts]
        ready = None
        for row, tokens in decoding.run():
            ready = ready or time.perf_counter()
            pieces[row].append(_push(decoding, streams, row, tokens))
        end = time.perf_counter()
        rows = []
        for number, row in enumerate(decoding.rows):
            stream = streams[number] if streams else None
            text = "".join(pieces[number]) + stream.finish() if stream else None
            tokens = row.tokens[: stream.count] if stream and stream.stopped else row.tokens
            rows.append(Completion(tokens, text, row.reason))
        counts = decoding.counts
        return Generation(rows, counts.steps, counts.tokens, (ready or end) - start, end - (ready or end))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The text of one prompt's continuation in pieces, as they are decided."""
        decoding, streams, _ = self._start([prompt], {**options})
        if not streams:
            raise SmeltError(f"{self.program.name} has no tokenizer, so it cannot stream text: use complete on token ids")
        for row, tokens in decoding.run():
            text = _push(decoding, streams, row, tokens)
            if text:
                yield text
        yield streams[0].finish()

    def _start(self, prompts: Sequence[Prompt], options: dict[str, Any]) -> tuple[Decoding, list[Stream], float]:
        """A decoding ready to run, one text stream a row where there is a tokenizer, and the time of the call."""
        start = time.perf_counter()
        new_tokens = options.pop("max_new_tokens", 64)
        stop, speculate = options.pop("stop", ()), options.pop("speculate", True)
        eos = options.pop("eos", None)
        known = set(inspect.signature(Sampling).parameters)
        if strange := sorted(set(options) - known):
            raise SmeltError(f"generate: unknown option '{strange[0]}'; known: max_new_tokens, stop, eos, speculate, {', '.join(sorted(known))}")
        if not isinstance(new_tokens, int) or new_tokens < 1:
            raise SmeltError(f"generate: max_new_tokens must be a whole number from 1, not {new_tokens!r}")
        if not prompts:
            raise SmeltError("generate: no prompt was given")
        ids = [self._ids(number, prompt) for number, prompt in enumerate(prompts)]
        ends = self._eos() if eos is None else eos
        need = max(map(len, ids)) + new_tokens
        if need - 1 > self.context:
            raise SmeltError(
                f"generate: the longest prompt has {need - new_tokens} tokens and {new_tokens} more are asked for, but "
                f"the model's context is {self.context}; shorten the prompt or max_new_tokens"
            )
        capacity = min(self.context, -(-need // SLACK) * SLACK)
        session = Session(self.plan, len(ids), capacity, self._decoded)
        decoding = Decoding(session, ids, Sampling(**options), Limits(new_tokens, frozenset(ends)), speculate)
        has_text = self.assets.folder is not None and (self.assets.folder / "tokenizer.json").is_file()
        streams = [Stream(self.tokenizer, stop) for _ in ids] if has_text else []
        if stop and not streams:
            raise SmeltError("generate: stop strings need the model's tokenizer: pass tokenizer=FOLDER to compile")
        return decoding, streams, start

    def _ids(self, number: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not prompt or not ids:
                raise SmeltError(f"generate: prompt {number} is empty; give at least one character")
            return ids
        return [int(token) for token in (prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt)]

    def _eos(self) -> Sequence[int]:
        listed = self.program.facts.get("eos") or []
        if self.assets.folder is None:
            return list(listed)
        return self.tokenizer.eos or list(listed)

    def save(self, folder: str | Path) -> None:
        """Write the artefact folder: program, weights, tokenizer and a manifest of hashes, all at once."""
        used = {record.name for record in self.program.history}
        sources = {name: _source_digest(kind) for name, kind in catalogue().items() if name in used}
        facts = {**self.facts, "passes": sources}
        if self.report is not None:
            facts["report"] = self.report.to_dict()
        artefact.save(Path(folder), self.program, self.assets.files, facts)


def load(folder: str | Path, target: Target = "cpp") -> Compiled:
    """Read an artefact; hashes are checked, nothing is executed, the original model's code is not needed."""
    folder = Path(folder)
    program, manifest = artefact.load(folder)
    files = {name: (folder / name).read_bytes() for name in NAMES if name in manifest["files"]}
    own = ("format", "weights", "files", "passes")
    facts = {key: value for key, value in manifest.items() if key not in own}
    return Compiled(program, facts, Assets(folder if files else None, files), target)


def _as_batch(prompt: Any) -> tuple[list[Prompt], bool]:
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, torch.Tensor):
        return (list(prompt), False) if prompt.dim() == 2 else ([prompt], True)
    items = list(prompt)
    single = bool(items) and isinstance(items[0], int)
    if not items:
        raise SmeltError("generate: the prompt is empty; give text or at least one token id")
    return ([items], True) if single else (items, False)


def _push(decoding: Decoding, streams: list[Stream], row: int, tokens: list[int]) -> str:
    if not streams:
        return ""
    text = streams[row].push(tokens)
    if streams[row].stopped is not None:
        decoding.stop(row)
    return text


def _source_digest(kind: type) -> str:
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
