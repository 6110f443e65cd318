"""export_onnx: writes a compiled model as an ONNX folder, and checks it by running it beside the model itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .codegen.onnx import Exported, export
from .codegen.plan import Plan
from .ir.cache import Cache
from .ir.errors import SmeltError
from .ir.interpret import interpret
from .ir.ops import LAYER_NORM, QUANTIZED, RMS_NORM, arguments
from .ir.program import Program
from .ir.weight import Weight
from .runtime.onnx_loop import loop, open_session
from .runtime.session import Session

BAR = 1e-3  # largest error of an output, relative to its largest value, that an export may have
UNREST = 3  # times the model's own unrest that an export may be off: the most of 64 steps lies above that of a sample
STEPS, LONGEST, ROWS = 64, 300, 3
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """One run of the export beside the model: lengths of the prompts of a batch, steps behind them, what differed.

    error: largest difference of an output, relative to the largest value of a row. bar: what is allowed. text: whether
    every greedy token was the same, up to ties within the bar. For what is no decoder `prompts` are the sizes of B and
    T, and there are no steps.
    """

    prompts: tuple[int, ...]
    steps: int
    error: float
    bar: float
    text: bool

    @property
    def agrees(self) -> bool:
        """Whether nothing differs more than it may; a NaN does."""
        return self.error <= self.bar and self.text


@dataclass(frozen=True)
class Export:
    """What was written, and what came of running it; `unchecked` says why nothing was run."""

    written: Exported
    cases: tuple[Case, ...] = ()
    unchecked: str | None = None

    @property
    def error(self) -> float | None:
        """The largest error of all cases."""
        return max((case.error for case in self.cases), default=None)

    def __str__(self) -> str:
        """Size, nodes, checks and remarks, a line each."""
        written = self.written
        count = sum(written.nodes.values())
        lines = [f"{written.folder}: style {written.style}, {count} nodes, {written.nbytes / 1e6:.1f} MB"]
        for case in self.cases:
            told = f"{case.steps} steps behind prompts of" if case.steps else "sizes"
            sizes = ", ".join(map(str, case.prompts))
            same = "" if not case.steps else ", text equal" if case.text else ", text differs"
            lines.append(f"checked in onnxruntime, {told} {sizes}: error {case.error:.1e}{same}")
        if self.unchecked:
            lines.append(f"not checked: {self.unchecked}")
        return "\n".join([*lines, *written.notes])


def export_onnx(
    program: Program,
    plan: Plan,
    folder: str | Path,
    style: str = "standard",
    *,
    assets: Mapping[str, bytes] | None = None,
    facts: Mapping[str, Any] | None = None,
    check: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Export:
    """Write `folder` and run it; nothing is left behind if it differs from the model by more than BAR.

    `plan` runs the model itself. Arguments as in `codegen.onnx.export`. Raises SmeltError for whatever does not export,
    or does not agree.
    """
    say = progress or (lambda what, done, total: None)
    cases: list[Case] = []
    why = None if check else "check=False"
    if check and importlib.util.find_spec("onnxruntime") is None:
        why = "onnxruntime is not installed (pip install 'smelt[onnx]')"

    def accept(draft: Path, described: Mapping[str, Any]) -> Mapping[str, Any]:
        if why is not None:
            return {"unchecked": why}
        rounds = described.get("int8_activations", False)  # asked for: it is told how far off that is, and written
        for case in _cases(program, plan, draft, say):
            if not rounds and not case.agrees:
                raise SmeltError(
                    f"{program.name}: the export differs from the model, {case}; greedy text must be equal and errors "
                    "below the bar, so nothing was written; check=False writes it as it is"
                )
            cases.append(case)
        return {"checked": [asdict(case) for case in cases]}

    written = export(program, folder, style, assets=assets, facts=facts, progress=say, accept=accept, **options)
    return Export(written, tuple(cases), why)


def _cases(program: Program, plan: Plan, draft: Path, say: Progress) -> Sequence[Case]:
    session, bar = open_session(draft), max(BAR, UNREST * _unrest(program))
    inputs = {entry.name for entry in session.get_inputs()}
    if program.cache is not None and inputs != set(program.inputs):
        context = int(program.facts.get("context") or 1 << 17)
        steps = max(1, min(STEPS, context // 2))
        most = max(1, min(LONGEST, context - steps))
        return [
            _decode(program, plan, draft, session, lengths, steps, bar, say)
            for lengths in ((1,), (1, most, (most + 1) // 2))
        ]
    return [_forward(program, session, batch, tokens, bar) for batch, tokens in ((1, 1), (ROWS, _length(program)))]


def _unrest(program: Program) -> float:
    """How far a change of 1e-6 in norm weights moves the outputs of a model that rounds activations or its cache.

    Rounding is a step: w4a8 of the reference model moves by 1e-2, and so far may two orders of summation differ.
    """
    sites = program.cache.sites if program.cache else ()
    if not any(program.calls(QUANTIZED)) and not any(site.keys or site.values for site in sites):
        return 0.0
    random, moved = torch.Generator().manual_seed(0), program.fork()
    for node in program.calls(RMS_NORM, LAYER_NORM):
        name = str(arguments(node)["weight"].target)
        weight = program.weights[name].dense()
        moved.weights[name] = Weight.of(weight * (1 + 1e-6 * torch.randn(weight.shape, generator=random)))
    before, after = _continued(program), _continued(moved)
    return max(_error(before[name], after[name].numpy()) for name in before)


def _continued(program: Program) -> Mapping[str, torch.Tensor]:
    """Outputs of tokens that stand behind a prompt, so that they read what the cache has encoded."""
    length = _length(program)
    new = min(STEPS, length // 4)
    inputs = _inputs(program, ROWS, length)
    if program.cache is None or not new:
        return interpret(program, inputs)
    cache = Cache(program.cache, ROWS, length)
    outputs: Mapping[str, torch.Tensor] = {}
    for part in (slice(0, length - new), slice(length - new, length)):
        given = {name: value[:, part] for name, value in inputs.items()}
        cache.begin(given["positions"])
        outputs = interpret(program, given, cache)
        cache.commit([list(range(given["positions"].shape[1]))] * ROWS)
        cache.end_prefill()
    return outputs


def _decode(
    program: Program,
    plan: Plan,
    draft: Path,
    session: Any,
    lengths: tuple[int, ...],
    steps: int,
    bar: float,
    say: Progress,
) -> Case:
    """Both read the same prompts and then, at every step, the model's own choice."""
    random = torch.Generator().manual_seed(len(lengths))
    words = int(program.facts["vocabulary"])
    prompts = [torch.randint(0, words, (n,), generator=random).tolist() for n in lengths]
    capacity = max(lengths) + steps
    mine = Session(plan, len(lengths), capacity)
    theirs = loop(draft, len(lengths), capacity, session)
    outputs: Mapping[str, torch.Tensor] = mine.prefill(prompts)
    found = theirs.prefill(prompts)
    worst, text = 0.0, True
    for step in range(steps + 1):
        say(f"running {len(lengths)} rows", step, steps)
        worst = max(worst, *(_error(outputs[name], found[name]) for name in found))
        logits = outputs["logits"]
        chosen, other = logits.argmax(-1), torch.from_numpy(found["logits"]).argmax(-1)
        behind = (logits.amax(-1) - logits.gather(-1, other[:, None])[:, 0]) / logits.abs().amax(-1)
        text = text and bool((behind <= bar).all())
        if step == steps:
            break
        at = torch.tensor(mine.cache.lengths)[:, None]
        outputs = {name: value[:, 0].clone() for name, value in mine.step(chosen[:, None], at).items()}
        mine.cache.commit([[0]] * len(lengths))
        found = theirs.step(chosen.tolist())
    return Case(lengths, steps, worst, bar, text)


def _forward(program: Program, session: Any, batch: int, tokens: int, bar: float) -> Case:
    """One call of what has no cache, padding included where there is a mask."""
    inputs = _inputs(program, batch, tokens)
    expected = interpret(program, inputs)
    names = [output.name for output in session.get_outputs()]
    given = {entry.name for entry in session.get_inputs()}  # an input that nothing reads is not one of the graph's
    found = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in given})
    real = inputs["mask"].bool() if "mask" in inputs else None
    worst = 0.0
    for name, value in zip(names, found, strict=True):
        ours, theirs = expected[name], torch.from_numpy(value)
        if real is not None and ours.shape[:2] == real.shape:
            ours, theirs = ours[real], theirs[real]
        worst = max(worst, _error(ours, theirs.numpy()))
    return Case((batch, tokens), 0, worst, bar, True)


def _inputs(program: Program, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random inputs: `batch` for B, `tokens` for T, 32 for other symbols; an encoder's last row is half padding."""
    random = torch.Generator().manual_seed(batch)
    words = int(program.facts.get("vocabulary") or 2)
    made = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        known, dtype = {"B": batch, "T": tokens}, node.meta["dtype"]
        shape = [size if isinstance(size, int) else known.get(str(size), 32) for size in node.meta["shape"]]
        name = str(node.target)
        if name == "positions":
            made[name] = torch.arange(tokens).expand(batch, tokens).contiguous()
        elif name == "mask":
            made[name] = torch.ones(batch, tokens, dtype=dtype)
            made[name][-1, (tokens + 1) // 2 :] = 0
        elif dtype.is_floating_point:
            made[name] = torch.randn(shape, generator=random).to(dtype)
        else:
            made[name] = torch.randint(0, words, shape, generator=random).to(dtype)
    return made


def _length(program: Program) -> int:
    return min(LONGEST, int(program.facts.get("context") or LONGEST + 2) - 2)  # RoBERTa counts positions from 2


def _error(ours: torch.Tensor, theirs: Any) -> float:
    """The largest difference relative to the largest value in the last dim; infinite where either is not finite."""
    other = torch.from_numpy(theirs)
    if ours.shape != other.shape or not bool(
        torch.isfinite(ours.float()).all() and torch.isfinite(other.float()).all()
    ):
        return float("inf")
    if not ours.numel():
        return 0.0
    largest = ours.double().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return float(((ours.double() - other.double()).abs() / largest).max())
