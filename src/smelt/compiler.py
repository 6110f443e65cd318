"""compile: capture a model, run a recipe's passes over it, and lower what comes out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from . import kept
from .assets import Assets, model_assets
from .codegen.loss_cuda import register as register_loss
from .codegen.lower import lower
from .codegen.plan import Target
from .ir.capture import capture
from .ir.errors import SmeltError
from .ir.program import Program
from .ir.shapes import derive
from .model import Compiled, base_program, check_device, load
from .passes import catalogue
from .passes.events import Event, ignore
from .passes.manager import run
from .recipes import Recipe
from .recipes import load as load_recipe
from .runtime.artefact import tensor_digest
from .runtime.session import Session
from .runtime.text import Tokenizer
from .samples import Inputs, Texts, samples

Model: TypeAlias = str | Path | nn.Module

STEPS = 32  # decode steps by which a program is timed, the first quarter of which warms up


def compile(
    model: Model,
    recipe: str | Path | Mapping[str, Any] | Recipe = "none",
    *,
    calibration: Texts | Inputs | None = None,
    train: Texts | None = None,
    checkpoints: str | Path | None = None,
    example: Sequence[torch.Tensor] | None = None,
    tokenizer: str | Path | None = None,
    overrides: Sequence[str] = (),
    target: Target = "cpp",
    fallback: bool = True,
    listen: Callable[[Event], None] | None = None,
    stop_after: str | None = None,
    anew: bool = False,
    draft: Compiled | str | Path | None = None,
    base: Compiled | str | Path | None = None,
) -> Compiled:
    """Compile `model` by `recipe`.

    model: a folder or hub id of a transformers model, such a model itself, or a torch module (then with `example`).
    recipe: a shipped name, a YAML file, or its content as a dict; `overrides` such as `cache.encode.tail=128`.
    calibration: a text file, texts, or tokens int64 [N, T], for the steps that look at data; of what reads something
    else, values of its inputs by name, [N, …] each.
    train: texts or tokens, for steps that train; the calibration text where it is not given, and the other way round.
    checkpoints: a folder where trainings leave their state and take it up again; else they do so in the cache folder.
    tokenizer: the folder of the tokenizer, where the model is not one.
    target: `cpp` for generated kernels, `triton` for those of GPUs, `torch` for the reference; `fallback=False` refuses
    what has no fast kernel.
    listen: is told when a step starts, goes on and ends. stop_after: the name of the last step to run.
    anew: run every step, for who listens to them. Otherwise what was compiled before from the same files is read back
    and no step runs; `SMELT_KEEP=0` keeps nothing.
    draft: a smaller compiled model of the same tokenizer, or its artefact, which drafts where the recipe has the step
    decode.draft.
    base: the model that `model` was fine-tuned from, in any of these forms, where the recipe has weights.residual; for
    tune.mask `model` itself.
    Raises SmeltError for anything wrong with what was given.
    """
    check_device(target)
    register_loss()
    if isinstance(draft, str | Path):
        draft = load(draft, target)
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, catalogue(), overrides)
    words = tokenizer if tokenizer is not None else model
    # what is kept are whole recipes on files alone
    whole = all(each is None for each in (stop_after, example, draft, base))
    key = kept.key(resolved.digest(), (model, words), calibration, train) if whole else None
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
        if spelled and any(hasattr(step.pass_, "ends") for step in resolved.steps):
            program.facts["token_breaks"] = Tokenizer(assets.folder).breaks()
    if draft is not None:
        program.draft = _drafting(draft, assets)
    if base is not None:
        program.base = base_program(base)
    given = samples(calibration, train, assets.folder, program.facts, checkpoints)
    if given is not None:
        given = replace(given, clock=partial(_step_time, target, fallback))
    result = run(program, resolved.steps, given, listen or ignore, stop_after)
    facts = {"recipe": resolved.to_dict(), "recipe_digest": resolved.digest()}
    if given is not None:
        digests = {name: tensor_digest(value) for name, value in given.inputs.items()}
        facts["calibration"] = digests["tokens"] if list(digests) == ["tokens"] else digests
        if given.training is not None:
            facts["training"] = tensor_digest(given.training)
    if key is not None:
        kept.keep(key, result.program, facts, result.report)
    if kept.room():
        kept.trim(kept.trainings())
    return Compiled(result.program, facts, assets, target, fallback, result.report)


def _step_time(target: Target, fallback: bool, program: Program, context: int) -> float:
    """Median milliseconds of a decode step of a program behind so many tokens, or what its context has room for."""
    context = min(context, int(program.facts.get("context") or context + STEPS) - STEPS)
    session = Session(lower(program, target, fallback), 1, context + STEPS)
    session.prefill([[0] * context])
    token, taken = torch.zeros(1, 1, dtype=torch.int64), []
    for at in range(context, context + STEPS):
        begun = time.perf_counter()
        session.step(token, torch.full((1, 1), at))["logits"].flatten()[0].item()  # waits for a GPU
        taken.append(time.perf_counter() - begun)
        session.cache.commit([[0]])
    return 1e3 * statistics.median(taken[STEPS // 4 :])


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
