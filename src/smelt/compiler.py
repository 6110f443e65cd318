"""compile: capture a model, run a recipe's passes over it, and lower what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from . import kept
from .assets import Assets, model_assets
from .codegen.loss_cuda import register as register_loss
from .codegen.plan import Target
from .ir.capture import capture
from .ir.errors import SmeltError
from .ir.program import Program
from .ir.shapes import derive
from .model import Compiled, check_device, load
from .passes import Samples, catalogue
from .passes.events import Event, ignore
from .passes.manager import run
from .recipes import Recipe
from .recipes import load as load_recipe
from .runtime.artefact import tensor_digest
from .runtime.text import Tokenizer

LENGTH = 256  # tokens of one calibration sequence, fewer where the model's context ends before
LEAST = 512  # calibration tokens below which statistics mean nothing

Model: TypeAlias = str | Path | nn.Module
Calibration: TypeAlias = str | Path | Sequence[str] | torch.Tensor


def compile(
    model: Model,
    recipe: str | Path | Mapping[str, Any] | Recipe = "none",
    *,
    calibration: Calibration | None = None,
    example: Sequence[torch.Tensor] | None = None,
    tokenizer: str | Path | None = None,
    overrides: Sequence[str] = (),
    target: Target = "cpp",
    fallback: bool = True,
    listen: Callable[[Event], None] | None = None,
    stop_after: str | None = None,
    anew: bool = False,
    draft: Compiled | str | Path | None = None,
) -> Compiled:
    """Compile `model` by `recipe`.

    model: a folder or hub id of a transformers model, such a model itself, or a torch module (then with `example`).
    recipe: a shipped name, a YAML file, or its content as a dict; `overrides` such as `cache.encode.tail=128`.
    calibration: a text file, texts, or tokens int64 [N, T], for the steps that look at data.
    tokenizer: the folder of the tokenizer, where the model is not one.
    target: `cpp` for generated kernels, `triton` for those of GPUs, `torch` for the reference; `fallback=False` refuses
    what has no fast kernel.
    listen: is told when a step starts, goes on and ends. stop_after: the name of the last step to run.
    anew: run every step, for who listens to them. Otherwise what was compiled before from the same files is read back
    and no step runs; `SMELT_KEEP=0` keeps nothing.
    draft: a smaller compiled model of the same tokenizer, or its artefact, which drafts where the recipe has the step
    decode.draft.
    Raises SmeltError for anything wrong with what was given.
    """
    check_device(target)
    register_loss()
    if isinstance(draft, str | Path):
        draft = load(draft, target)
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, catalogue(), overrides)
    words = tokenizer if tokenizer is not None else model
    whole = stop_after is None and example is None and draft is None  # what is kept are whole recipes on files alone
    key = kept.key(resolved.digest(), (model, words), calibration) if whole else None
    if key is not None and not anew and (found := kept.find(key)) is not None:
        return Compiled(found.program, found.facts, model_assets(words), target, fallback, found.report)
    program = capture(model, example)
    derive(program)
    assets = model_assets(words)
    if assets.folder is not None and program.facts.get("kind") == "decoder":
        # what generation_config.json or the tokenizer names goes before the model's own configuration
        program.facts["eos"] = list(Tokenizer(assets.folder).eos) or program.facts.get("eos") or []
        spelled = (assets.folder / "tokenizer.json").is_file()
        if spelled and any(getattr(step.pass_, "policy", None) is not None for step in resolved.steps):
            program.facts["token_classes"] = Tokenizer(assets.folder).classes()
    if draft is not None:
        program.draft = _drafting(draft, assets)
    samples = _samples(calibration, assets.folder, program.facts)
    result = run(program, resolved.steps, samples, listen or ignore, stop_after)
    facts = {"recipe": resolved.to_dict(), "recipe_digest": resolved.digest()}
    if samples is not None:
        facts["calibration"] = tensor_digest(samples.tokens)
    if key is not None:
        kept.keep(key, result.program, facts, result.report)
    return Compiled(result.program, facts, assets, target, fallback, result.report)


def _drafting(draft: Compiled, assets: Assets) -> Program:
    """The program of a draft model; SmeltError if it reads other tokens."""
    ours, theirs = (each.files.get("tokenizer.json") for each in (assets, draft.assets))
    if draft.program.cache is None:
        raise SmeltError(f"the draft model {draft.program.name} has no cache, so it cannot generate: compile a decoder")
    if ours is not None and theirs is not None and ours != theirs:
        raise SmeltError(
            f"the draft model {draft.program.name} has another tokenizer than the model: its tokens mean other text; "
            "take one of the same family"
        )
    return draft.program


def _samples(calibration: Calibration | None, folder: Path | None, facts: Mapping[str, Any]) -> Samples | None:
    """Calibration as tokens; `folder` holds the tokenizer, `facts` are the program's."""
    if calibration is None:
        return None
    if isinstance(calibration, torch.Tensor):
        return Samples(_tokens(calibration, facts))
    if isinstance(calibration, str | Path):
        texts, place = [_read(Path(calibration))], str(calibration)
    else:
        texts, place = list(calibration), "calibration"
        if strange := [text for text in texts if not isinstance(text, str)]:
            raise SmeltError(f"{place}: {strange[0]!r} is not text; give texts, a file, or tokens as a tensor [N, T]")
    if folder is None:
        raise SmeltError(f"{place}: text needs the model's tokenizer; pass tokenizer=FOLDER, or tokens int64 [N, T]")
    encode = Tokenizer(folder).encode
    tokens = [token for text in texts for token in encode(text)]
    if len(tokens) < LEAST:
        raise SmeltError(f"{place}: {len(tokens)} tokens are too few to calibrate on; give at least {LEAST}")
    length = min(LENGTH, int(facts.get("context") or LENGTH))
    count = len(tokens) // length
    return Samples(torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length))


def _tokens(given: torch.Tensor, facts: Mapping[str, Any]) -> torch.Tensor:
    """Calibration tokens of the caller, checked."""
    if given.dim() != 2 or given.is_floating_point() or given.dtype is torch.bool or not given.numel():
        raise SmeltError(f"calibration: tokens must be whole numbers [N, T], not {given.dtype} {list(given.shape)}")
    low, high, words = int(given.min()), int(given.max()), int(facts.get("vocabulary") or 1 << 62)
    if low < 0 or high >= words:
        raise SmeltError(f"calibration: token {low if low < 0 else high} is not in the vocabulary of {words}")
    context = int(facts.get("context") or given.shape[1])
    if given.shape[1] > context:
        raise SmeltError(f"calibration: sequences of {given.shape[1]} tokens exceed the model's context of {context}")
    return given.detach().cpu().long()


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise SmeltError(f"{path}: cannot be read ({fault.strerror})") from fault
    except UnicodeDecodeError as fault:
        raise SmeltError(f"{path}: not UTF-8 text (byte {fault.start})") from fault
    if not text.strip():
        raise SmeltError(f"{path}: the calibration file is empty")
    return text
