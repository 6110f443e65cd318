"""What compile returns and load reads back: a lowered program that generates, reports, and saves itself."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import torch

from .assets import CONFIG, NAMES, Assets
from .codegen.lower import lower
from .codegen.plan import Plan, Target
from .completion import Completion, Generation
from .export import Export, Progress, export_onnx
from .export_hf import HFExport, export_hf
from .inputs import check_inputs
from .ir.cache.saved import put_back
from .ir.errors import SmeltError
from .ir.program import Program
from .ir.text import print_program
from .passes import catalogue
from .passes.report import Report
from .request import Prompt, as_batch, request
from .runtime import artefact
from .runtime.align import Alignment
from .runtime.bound import Bound, binding
from .runtime.constraint import constraint
from .runtime.pace import Pace
from .runtime.prefix import Prefix, Reader
from .runtime.profile import Timing, profile
from .runtime.search.make import writer
from .runtime.session import Session
from .runtime.text import Stream, Tokenizer
from .runtime.writer import Writer

ROUND = 256  # tokens in which a session's context is counted, so that the next call may take it over
KEPT = 8  # shapes of inputs whose buffers `run` keeps


class Compiled:
    """A compiled model. Decoders `generate`; encoders and plain modules are called on their named inputs with `run`.

    `report` says what each pass did. A loaded artefact has none, and what it was saved with in `facts["report"]`.
    """

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
        self.program, self.facts, self.assets, self.report = program.merged(), dict(facts), assets, report
        self.plan: Plan = lower(self.program, target, fallback)
        self.coded = False  # whether `save` writes Huffman codes unless told: as the artefact that this was loaded from
        self._stored = program.weights
        self._decoded: dict[str, torch.Tensor] = {}
        self._bound: dict[tuple[torch.Size, ...], Bound] = {}
        self._idle: Session | None = None
        self._paces: dict[tuple[bool, int], Pace] = {}  # greedy or not, and rows
        self.alignment = Alignment()
        """What answers drawn with constrain="align" have shown; `constrain=Alignment()` brings another one."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises when text is asked of a model that has none."""
        if self.assets.folder is None:
            raise SmeltError(
                f"{self.program.name} was compiled without a tokenizer: pass token ids, or tokenizer=FOLDER to compile"
            )
        return Tokenizer(self.assets.folder)

    @property
    def stored(self) -> Program:
        """The program as `save` writes it, which of weights upon a base is what they add; `program` has them merged."""
        return replace(self.program, weights=self._stored)

    @property
    def kernels(self) -> list[dict[str, Any]]:
        """One row a node: kernel, source and why it was chosen or refused."""
        return self.plan.kernels()

    def build(self) -> None:
        """Build the kernels of a decoder's prompts and steps now, so that the first call finds them built."""
        if self.program.cache is not None and self.plan.target == "cpp":
            session = Session(self.plan, 1, min(self.context, 4), self._decoded)
            session.prefill([[0, 0]])
            session.step(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 2))
            for stage in range(1, 1 + len(self.plan.stages)):
                session.bound(1, stage=stage)

    def profile(self, tokens: int = 1, context: int = 128) -> list[Timing]:
        """What each kernel of a decoder's step takes on this machine: calls, seconds, bytes, share of the bandwidth."""
        if self.program.cache is None or self.plan.target != "cpp":
            raise SmeltError(f"{self.program.name}: only the step of a decoder with target cpp is timed by kernel")
        return profile(self.plan, tokens, context)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(self.program.facts.get("context") or 1 << 17)

    @property
    def ahead(self) -> int:
        """Tokens of the context that a search looks ahead beyond prompt and answer."""
        choice = self.program.choice
        return choice.search.ahead if choice is not None and choice.search is not None else 0

    def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Named outputs of an encoder or plain module for named inputs, as tensors of the caller's own.

        Raises SmeltError for inputs of other names, types or shapes than the program's.
        """
        if self.program.cache is not None:
            raise SmeltError(f"{self.program.name} reads a cache: call generate, or compile it without cache.insert")
        checked = check_inputs(self.program, inputs)
        key = tuple(value.shape for value in checked.values())
        if key not in self._bound:
            if len(self._bound) == KEPT:
                self._bound.pop(next(iter(self._bound)))
            buffers = {n: torch.empty_like(v, memory_format=torch.contiguous_format) for n, v in checked.items()}
            self._bound[key] = binding(self.plan)(self.plan, buffers, None, self._decoded)
        bound = self._bound[key]
        for name, value in checked.items():
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

        Options: max_new_tokens (64), temperature (0: greedy), top_k, top_p, min_p, typical_p, repetition_penalty (by
        default what the recipe presets), seed, stop (strings), eos (token ids, the model's own by default), speculate
        (True: the recipe's drafter drafts, and pauses while that costs more time than it saves, if no token depends on
        it; "always": without a pause; False: never), prefix (what `read` gave: every prompt continues it), against
        (another prompt, or one for each, where the recipe contrasts prompts), and one of json_schema (a dict or text),
        regex and grammar (Lark's syntax), which the answer then follows, held to it as constrain says (mask, align, an
        Alignment, or reject; by default the recipe's way).
        """
        prompts, single = as_batch(prompt)
        result = self.complete(prompts, **options)
        rows = [
            row.text if isinstance(asked, str) else row.tokens for asked, row in zip(prompts, result.rows, strict=True)
        ]
        return rows[0] if single else rows

    def complete(self, prompts: Sequence[Prompt], **options: Any) -> Generation:
        """`generate` with everything that is known about the call; always a batch."""
        decoding, streams, start = self._start(prompts, options)
        pieces: list[list[str]] = [[] for _ in prompts]
        ready = None
        for number, tokens in decoding.run():
            ready = ready or time.perf_counter()
            pieces[number].append(_push(decoding, streams, number, tokens))
        end = time.perf_counter()
        self._idle = decoding.session
        rows = []
        for number, row in enumerate(decoding.rows):
            more = decoding.log_weight(number), decoding.others(number)
            if not streams:
                rows.append(Completion(row.tokens, None, row.reason, *more))
                continue
            text = "".join(pieces[number]) + streams[number].finish()
            rows.append(Completion(row.tokens[: streams[number].count], text, row.reason, *more))
        counts = decoding.counts
        return Generation(rows, counts.steps, counts.tokens, (ready or end) - start, end - (ready or end))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The text of one prompt's continuation in pieces, as they are decided."""
        decoding, streams, _ = self._start([prompt], options)
        if not streams:
            raise SmeltError(
                f"{self.program.name} has no tokenizer, so it cannot stream text: use complete on token ids"
            )
        for number, tokens in decoding.run():
            if text := _push(decoding, streams, number, tokens):
                yield text
        self._idle = decoding.session
        if text := streams[0].finish():
            yield text

    def read(self, context: Any, sink: str | Sequence[int] | None = None) -> Prefix:
        """Read a context once, to continue it often: `generate(question, prefix=…)`; text or token ids.

        A list of texts (or of lists of ids) is read in parallel: every piece sees the sink and itself, and what
        continues sees all (Attention Entropy is a Key Factor, 2024). sink: what stands before the first piece for all
        of them; by default its first tokens, 4 or as the recipe's step cache.parallel says.
        """
        return self._reader.read(context, sink)

    def load_prefix(
        self,
        path: str | Path,
        bandwidth: float | None = None,
        seconds: float | None = None,
        speed: float | None = None,
    ) -> Prefix:
        """A prefix that `Prefix.save` wrote, with this model and recipe, in this process or another.

        From a file with levels (recipe cachegen) each chunk is taken in the finest quality that lets the whole arrive
        within `seconds` at `bandwidth` bytes per second; without these, in the finest there is. speed: tokens per
        second at which this machine reads; with it a chunk may also come as text, to be read again.
        """
        return self._reader.load(Path(path), bandwidth, seconds, speed)

    @cached_property
    def _reader(self) -> Reader:
        if self.program.cache is None:
            raise SmeltError(f"{self.program.name} has no cache, so it cannot read ahead: add the step cache.insert")
        digest = hashlib.sha256(print_program(self.program).encode()).hexdigest()
        recipe = str((self.facts.get("recipe") or {}).get("name", "unknown"))
        stamp = {"model": self.program.name, "recipe": recipe, "program": digest}
        return Reader(self.plan, self._lend, lambda given: self._ids(0, given), self.context, stamp)

    def _lend(self, batch: int, need: int) -> Session:
        """A session for a call that is over before the next one begins."""
        self._idle = session = self._session(batch, need)
        return session

    def save(self, folder: str | Path, *, huffman: bool | None = None) -> None:
        """Write the artefact folder: program, weights, tokenizer and a manifest of hashes, all at once.

        huffman: tensors in Huffman codes, less on disk and the same bits when loaded; by default as it was loaded.
        """
        known = catalogue()
        used = {record.name for record in self.program.history}
        sources = {name: _source_digest(kind) for name, kind in known.items() if name in used}
        facts = {"passes": sources, **self.facts}  # a loaded artefact remembers the passes that made it
        facts.pop("certificate", None)  # which is of the files that were measured
        if self.report is not None:
            facts["report"] = self.report.to_dict()
        artefact.save(Path(folder), self.stored, self.assets.files, facts, self.coded if huffman is None else huffman)

    def export_onnx(
        self,
        folder: str | Path,
        style: str = "standard",
        *,
        check: bool = True,
        progress: Progress | None = None,
        **options: Any,
    ) -> Export:
        """Write an ONNX folder that other runtimes load, and check it by running it beside this model.

        style: `standard` uses ONNX's own operators, `ort` those of onnxruntime too, for onnxruntime-genai. The folder
        appears whole or not at all. options: allow_decoded (an encoding that ONNX cannot say is written as float32
        instead of refused), and the style's own.
        """
        facts = {key: value for key, value in self.facts.items() if key != "report"}
        return export_onnx(
            self.program, self.plan, folder, style,
            assets=self.assets.files, facts=facts, check=check, progress=progress, **options,
        )  # fmt: skip

    def export_hf(self, folder: str | Path, *, check: bool = True, allow_decoded: bool = False) -> HFExport:
        """Write a folder that transformers and vLLM load, matrices in the layout of compressed-tensors.

        Weights alone go there: what was left out, such as the cache's plan, is among the notes of what comes back. The
        folder appears whole or not at all. check: transformers' model must compute the same with these weights.
        allow_decoded: an encoding that the layout cannot say is written dense instead of refused.
        """
        facts = {key: value for key, value in self.facts.items() if key != "report"}
        return export_hf(
            self.program, folder, assets=self.assets.files, facts=facts, check=check, allow_decoded=allow_decoded
        )

    def _start(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> tuple[Writer, list[Stream], float]:
        """A decoding ready to run, one text stream a row where there is a tokenizer, and the time of the call."""
        start, program = time.perf_counter(), self.program
        asked = request(options, program.facts, program.choice)
        if isinstance(prompts, str) or not len(prompts):
            raise SmeltError("generate: give a list of prompts with at least one in it")
        prefix, new_tokens = asked.prefix, asked.limits.new_tokens
        if prefix is not None:
            self._reader.check(prefix)
        before = list(prefix.tokens) if prefix is not None else []
        ids = [before + self._ids(number, prompt) for number, prompt in enumerate(prompts)]
        longest = max(map(len, ids))
        need = longest + new_tokens - 1 + self.ahead  # the last token is not read again
        if (longest if self._endless else need) > self.context:
            more = "" if self._endless else f" and {new_tokens} more are asked for"
            more += f", behind which the search looks {self.ahead} ahead" if self.ahead and more else ""
            raise SmeltError(
                f"generate: the longest prompt has {longest} tokens{more}, but the model's context is {self.context}; "
                f"shorten the prompt{'' if self._endless else ' or max_new_tokens'}"
            )
        session = self._session(len(ids), need)
        if prefix is not None:
            put_back(session.cache, prefix.saved)
        has_text = self.assets.folder is not None and (self.assets.folder / "tokenizer.json").is_file()
        spelled = self.assets.files.get("tokenizer.json")
        vocabulary, eos = int(program.facts.get("vocabulary") or 0), program.facts.get("eos") or ()
        alignment = self.alignment if asked.alignment is None else asked.alignment
        held = constraint(asked.constraints, spelled, vocabulary, eos, asked.constrain, alignment)
        against = None if asked.against is None else self._others(asked.against, before, len(ids))
        pace = self._paces.setdefault((asked.sampling.greedy, len(ids)), Pace()) if asked.speculate is True else None
        limits = asked.limits
        if asked.stop:
            limits = replace(limits, listen=lambda: Stream(self.tokenizer, asked.stop).ends)
        written = writer(session, ids, asked.sampling, limits, bool(asked.speculate), held, against, pace)
        if asked.stop and not has_text:
            raise SmeltError("generate: stop strings need the model's tokenizer: pass tokenizer=FOLDER to compile")
        return written, [Stream(self.tokenizer, asked.stop) for _ in ids] if has_text else [], start

    def _others(self, given: Any, before: list[int], count: int) -> list[list[int]]:
        """The prompts that `count` are written against; a single one is for all."""
        others, single = as_batch(given)
        ids = [before + self._ids(number, other) for number, other in enumerate(others)]
        return ids * count if single else ids

    def _session(self, batch: int, need: int) -> Session:
        """The last finished call's session, if it fits; binding a plan anew takes as long as some tokens."""
        idle, self._idle = self._idle, None
        if idle is not None and idle.plan is self.plan and idle.cache.batch == batch and idle.cache.capacity >= need:
            idle.cache.restart()
            return idle
        room = -(-need // ROUND) * ROUND
        return Session(self.plan, batch, room if self._endless else min(self.context, room), self._decoded)

    @property
    def _endless(self) -> bool:
        return self.program.cache is not None and self.program.cache.endless

    def _ids(self, number: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not prompt or not ids:
                raise SmeltError(f"generate: prompt {number} is empty; give at least one character")
            return ids
        items = prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
        if strange := [item for item in items if not isinstance(item, Integral)]:
            raise SmeltError(f"generate: prompt {number} holds {strange[0]!r}, which is neither text nor a token id")
        return [int(item) for item in items]


def check_device(target: Target) -> None:
    """Raises SmeltError for a target whose device this process does not have."""
    if target == "triton":
        from .codegen.device_triton import device

        device()


def load(folder: str | Path, target: Target = "cpp", *, base: Compiled | str | Path | None = None) -> Compiled:
    """Read an artefact; hashes are checked, nothing is executed, the original model's code is not needed.

    target: whose kernels run it, as in `compile`. base: as in `compile`, for an artefact that stands upon one.
    """
    check_device(target)
    folder = Path(folder)
    program, manifest = artefact.load(folder, None if base is None else base_program(base))
    files = {name: (folder / name).read_bytes() for name in NAMES if name in manifest["files"]}
    told = ("format", "weights", "draft", "base", "files", artefact.DISK)  # of what is made anew whenever it is saved
    facts = {key: value for key, value in manifest.items() if key not in told}
    compiled = Compiled(program, facts, Assets(folder if files.keys() - {CONFIG} else None, files), target)
    compiled.coded = artefact.DISK in manifest
    return compiled


def base_program(base: Compiled | str | Path) -> Program:
    """The program that a fine-tuned model stands upon: of a compiled model, an artefact, a model folder or hub id."""
    from .ir.capture import capture  # an artefact needs no model code

    if isinstance(base, Compiled):
        return base.stored
    if (Path(base) / artefact.MANIFEST).is_file():
        return artefact.load(Path(base))[0]
    return capture(base)


def _push(decoding: Writer, streams: list[Stream], number: int, tokens: list[int]) -> str:
    """The text that new tokens make certain; the row ends at a stop string."""
    if not streams:
        return ""
    text = streams[number].push(tokens)
    if streams[number].stopped is not None:
        decoding.stop(number)
    return text


def _source_digest(kind: type) -> str:
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
