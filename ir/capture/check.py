"""Capture checks itself: a Program's outputs against the source model's own eager forward, weights streamed through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import SmeltError
from ..interpret import interpret
from ..program import Program
from ..weight import Weight

TOLERANCE = 1e-4  # relative to the largest logit, fp32


def check_against_source(program: Program, model: Any, weights: Mapping[str, Weight], decoder: bool) -> None:
    """Raises SmeltError if outputs on a probe batch differ by more than TOLERANCE, or are not finite."""
    context = program.facts.get("context") or 64
    length = max(2, min(24, context))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, program.facts["vocabulary"], (2, length), generator=generator)
    positions = torch.arange(length).expand(2, -1)
    second = positions if decoder else torch.ones_like(tokens)
    if not decoder:
        second[1, length // 2 :] = 0
    with torch.no_grad():
        mine = interpret(program, dict(zip(program.inputs, (tokens, second), strict=True)))
        mine_out = mine["logits" if decoder else "hidden"].float()
        if not torch.isfinite(mine_out).all():
            raise SmeltError(f"{program.name}: outputs are not finite; {_broken_weight(weights)}")
        with _eager(model), streamed(model, weights):
            if decoder:
                theirs = model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
            else:
                theirs = model(input_ids=tokens, attention_mask=second).last_hidden_state.float()
    if not decoder:  # what stands at padded places is nobody's promise
        mine_out, theirs = mine_out[second.bool()], theirs[second.bool()]
    error = ((mine_out - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= TOLERANCE:
        raise SmeltError(
            f"{program.name}: the captured graph differs from transformers' eager model (relative error {error:.1e}, "
            f"allowed {TOLERANCE:.0e}); {_suspect(model)}"
        )
    program.facts["capture_error"] = error


def _broken_weight(weights: Mapping[str, Weight]) -> str:
    for name, weight in weights.items():
        tensor = weight.parts["data"]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"weight '{name}' holds NaN or infinite values"
    return "every weight is finite, so an op overflows"


def _suspect(model: Any) -> str:
    config = model.config
    for key, what in (("alibi", "ALiBi attention bias"), ("attention_sink", "attention sinks")):
        if getattr(config, key, None):
            return f"the model uses {what}, which capture does not express yet"
    return "some construct of this family bypasses transformers' attention interface"


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    before = {i: (c._attn_implementation, getattr(c, "_experts_implementation", None)) for i, c in configs.items()}
    for config in configs.values():
        config._attn_implementation = "eager"
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    try:
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation, experts = before[i]
            if experts is not None:
                config._experts_implementation = experts


@contextmanager
def streamed(model: nn.Module, weights: Mapping[str, Weight]) -> Iterator[None]:
    """The model in fp32 with each module's parameters present only while that module runs."""
    table = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    name_of = {id(t): first.setdefault(id(t), n) for n, t in table.items()}
    hooks = []
    for module in model.modules():
        slots = [
            (slot, key, tensor, weights[name_of[id(tensor)]])
            for slot in (module._parameters, module._buffers)
            for key, tensor in slot.items()
            if tensor is not None and name_of[id(tensor)] in weights
        ]
        if slots:
            hooks.append(module.register_forward_pre_hook(_enter(slots)))
            hooks.append(module.register_forward_hook(_leave(slots), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _enter(slots: list[tuple[dict[str, Any], str, Any, Weight]]) -> Any:
    def pre(module: nn.Module, args: Any) -> None:
        for slot, key, tensor, weight in slots:
            value = weight.dense()
            slot[key] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value

    return pre


def _leave(slots: list[tuple[dict[str, Any], str, Any, Weight]]) -> Any:
    def post(module: nn.Module, args: Any, output: Any) -> None:
        for slot, key, tensor, _ in slots:
            slot[key] = tensor

    return post
