"""The verifier: raises for a Program that cannot be what it says it is. It runs after capture and after every pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn
from weakref import WeakSet

from torch import fx

from .blocks import blocks
from .cache.plan import Site
from .decode import Fused, Heads, Model, Recycle
from .encoding import Dense
from .errors import SmeltError, nearest
from .ops import CACHED_ATTENTION, OPS, arguments
from .program import Program
from .rules import faults, same, same_shape, shown
from .shapes import derive, symbol
from .targets import refusal
from .weight import Weight

PADDING_BITS = 64  # most bits that rounding a part up to whole words may add to an encoding's formula
_sound: WeakSet[Weight] = WeakSet()  # weights are values: each is measured once, which may map its file


def verify(program: Program) -> None:
    """Raises SmeltError naming the node, weight or plan at fault; sets the shapes of every node (`derive`).

    A Program holds a well-formed graph of ATen and dialect calls that write nothing in place, returns named tensors,
    reads every weight it carries, stores each weight as its encoding says, and has for each cache site exactly one
    `cached_attention` of its geometry. Its decode plan finds the outputs that it drafts from, its choice
    plan those that it reads, its depth plan the blocks that it leaves out, and its draft model holds all this too.
    """
    _graph(program)
    _weights(program)
    derive(program)
    for node in program.graph.nodes:
        for fault in faults(node):
            _refuse(program, f"{_at(node)}: {fault}")
    _results(program)
    _cache(program)
    if program.draft is not None:
        verify(program.draft)
    _decode(program)
    _choice(program)
    _depth(program)


def _refuse(program: Program, fault: str) -> NoReturn:
    raise SmeltError(f"{program.name}: {fault}")


def _at(node: fx.Node) -> str:
    name = f"smelt.{OPS[node.target].name}" if node.target in OPS else node.target
    return f"%{node.name} = {name}"


def _graph(program: Program) -> None:
    try:
        program.graph.lint()
    except Exception as fault:  # lint raises several kinds
        _refuse(program, f"the graph is malformed: {str(fault).splitlines()[0]}")
    nodes = list(program.graph.nodes)
    outputs = nodes[-1].args[0] if nodes and nodes[-1].op == "output" else None
    if not isinstance(outputs, dict) or not outputs or sum(node.op == "output" for node in nodes) != 1:
        _refuse(program, "the graph must end in one output node that names its results")
    for name, node in outputs.items():
        if not isinstance(name, str) or not isinstance(node, fx.Node):
            _refuse(program, f"output {name!r} is {node!r}; outputs are nodes by name")
    if len(set(program.inputs)) != len(program.inputs):
        _refuse(program, f"two inputs have one name: {', '.join(program.inputs)}")
    for node in nodes:
        if node.op == "call_function" and (reason := refusal(node.target)):
            _refuse(program, f"%{node.name}: {reason}")
        if node.op not in ("call_function", "placeholder", "get_attr", "output"):
            _refuse(program, f"%{node.name}: a node of kind {node.op} has no place in a program")


def _weights(program: Program) -> None:
    reads = [node for node in program.graph.nodes if node.op == "get_attr"]
    for node in reads:
        if node.target not in program.weights:
            name = str(node.target)
            _refuse(
                program, f"%{node.name} reads the weight '{name}', which is missing{nearest(name, program.weights)}"
            )
    unread = program.weights.keys() - {node.target for node in reads if node.users}
    if unread:
        _refuse(program, f"nothing reads the weight '{min(unread)}'; drop it with `prune`")
    for name, weight in program.weights.items():
        if weight in _sound:
            continue
        for fault in _misfits(weight):
            _refuse(
                program, f"weight '{name}' {list(weight.shape)} {weight.encoding}: {fault}{program.changed_by(name)}"
            )
        _sound.add(weight)


def _misfits(weight: Weight) -> Iterator[str]:
    if reason := weight.encoding.refuses(weight.shape):
        yield reason
        return
    if isinstance(weight.encoding, Dense):
        data = weight.parts["data"]
        if tuple(data.shape) != weight.shape or data.dtype != weight.encoding.torch_dtype:
            yield f"its part is {data.dtype} {list(data.shape)}"
        return
    formula, measured = weight.bits, 8 * weight.nbytes
    if not formula <= measured <= formula + PADDING_BITS * len(weight.parts):
        yield f"its parts hold {measured} bits, the encoding asks for {formula}"


def _results(program: Program) -> None:
    """Outputs are tensors, and a decoder looks like one."""
    for name, node in program.outputs.items():
        if isinstance(node.meta["dtype"], tuple) or "value" in node.meta:
            _refuse(program, f"output '{name}' is %{node.name}, which is not one tensor")
    if program.facts.get("kind") != "decoder":
        return
    if missing := [name for name in ("tokens", "positions") if name not in program.inputs]:
        _refuse(program, f"a decoder has the inputs tokens and positions; {missing[0]} is missing")
    if "logits" not in program.outputs:
        _refuse(program, f"a decoder has the output logits, not only {', '.join(program.outputs)}")
    logits = program.outputs["logits"].meta["shape"]
    vocabulary = program.facts.get("vocabulary", logits[-1])
    ahead = [program.facts["ahead"]] if "ahead" in program.facts else []  # tokens that a draft model guesses at once
    wanted = (symbol("B"), symbol("T"), *ahead, vocabulary)
    if not same_shape(logits, wanted):
        _refuse(program, f"logits are {shown(logits)}, a decoder of {vocabulary} tokens yields {shown(wanted)}")


def _cache(program: Program) -> None:
    nodes = list(program.calls(CACHED_ATTENTION))
    if program.cache is None:
        if nodes:
            _refuse(program, f"{_at(nodes[0])} has no cache plan; cache.insert makes both")
        return
    sites = {site.layer: site for site in program.cache.sites}
    readers: dict[int, fx.Node] = {}
    for node in nodes:
        a = arguments(node)
        if a["layer"] not in sites:
            _refuse(program, f"{_at(node)} attends over layer {a['layer']}, for which the cache plan has no site")
        if a["layer"] in readers:
            _refuse(
                program, f"{_at(node)} and %{readers[a['layer']].name} both write the cache site of layer {a['layer']}"
            )
        readers[a["layer"]] = node
        for fault in _misplaced(sites[a["layer"]], a):
            _refuse(program, f"{_at(node)}: {fault}{program.changed_by('cache')}")
    if unread := [layer for layer in sites if layer not in readers]:
        _refuse(program, f"no cached_attention reads the cache site of layer {unread[0]}")


def _misplaced(site: Site, a: dict[str, Any]) -> Iterator[str]:
    """How a node differs from the site that it reads."""
    _, heads, _, key_dim = a["query"].meta["shape"]
    _, kv_heads, _, value_dim = a["value"].meta["shape"]
    found = {"heads": heads, "kv_heads": kv_heads, "key_dim": key_dim, "value_dim": value_dim, "window": a["window"]}
    for name, value in found.items():
        planned = getattr(site, name)
        if planned is not value and (None in (planned, value) or not same(planned, value)):
            yield f"the cache site of layer {site.layer} has {name} {planned}, the node {value}"


def _decode(program: Program) -> None:
    plan = program.decode
    if plan is None:
        return
    if "logits" not in program.outputs:
        _refuse(program, "decode plan: verifying drafts needs the output 'logits'")
    vocabulary = program.outputs["logits"].meta["shape"][-1]
    if any(isinstance(draft, Model) for draft in plan.draft.parts):
        _draft_model(program, vocabulary)
    for draft in plan.draft.parts:
        if isinstance(draft, Recycle | Heads | Fused) and draft.width > vocabulary:
            _refuse(program, f"decode plan: drafts {draft.width} candidates out of {vocabulary} tokens")
        if isinstance(draft, Heads):
            _heads(program, draft, vocabulary)
        if isinstance(draft, Fused):
            _fused(program, draft, vocabulary)


def _choice(program: Program) -> None:
    """A search finds the outputs that it reads, and does not meet a drafter."""
    plan = program.choice
    if plan is None or plan.search is None:
        return
    if program.decode is not None:
        _refuse(program, f"choice plan: {plan.name} search chooses without drafts, but there is a decode plan")
    if program.depth is not None:
        _refuse(program, f"choice plan: {plan.name} search looks ahead, where other blocks may be left out: drop one")
    if "logits" not in program.outputs:
        _refuse(program, f"choice plan: {plan.name} search reads the output 'logits', which is missing")
    logits = program.outputs["logits"].meta["shape"]
    for name in plan.search.inputs:
        if name not in program.inputs:
            _refuse(program, f"choice plan: {plan.name} search writes the input '{name}', which is missing")
    for name in plan.search.outputs:
        if name not in program.outputs:
            _refuse(program, f"choice plan: {plan.name} search reads the output '{name}', which is missing")
        shape = program.outputs[name].meta["shape"]
        if len(shape) != 3 or not same_shape(shape[:2], logits[:2]):
            _refuse(program, f"choice plan: the output '{name}' is {shown(shape)}, it must be [B, T, width]")


def _depth(program: Program) -> None:
    """A depth plan leaves out blocks that are there and that no other layer's cache needs, and meets no drafts."""
    if program.draft is not None and program.draft.depth is not None:
        _refuse(program, f"the draft model {program.draft.name} leaves blocks out by position, which no draft may")
    plan = program.depth
    if plan is None:
        return
    if program.cache is None:
        _refuse(program, "depth plan: only steps over a cache leave blocks out, and there is no cache plan")
    if program.decode is not None:
        _refuse(
            program,
            f"blocks are left out by a token's position{program.changed_by('decode')}, and drafted tokens of one step "
            f"stand at several: drop the drafter ({program.decode.drafter}) or the depth plan",
        )
    found = {(block.kind, block.layer) for block in blocks(program)}
    for stage in plan.stages:
        asked = {("attention", layer) for layer in stage.attention} | {("feedforward", n) for n in stage.feedforward}
        if missing := sorted(asked - found):
            kind, layer = missing[0]
            _refuse(program, f"depth plan: there is no {kind} of layer {layer} that could be left out")
        if not found - asked:
            _refuse(program, f"depth plan: nothing is left to run from token {stage.start} on")
    for fault in plan.faults(program.cache):
        _refuse(program, f"depth plan: {fault}")


def _draft_model(program: Program, vocabulary: Any) -> None:
    """There is a decoder of the same tokens that drafts."""
    if program.draft is None or program.draft.cache is None or "logits" not in program.draft.outputs:
        _refuse(program, "decode plan: drafts come from a draft model, which the program does not have")
    words = program.draft.outputs["logits"].meta["shape"][-1]
    if words != vocabulary:
        _refuse(program, f"decode plan: the draft model has {words} tokens, the model {vocabulary}")
    for name in program.draft.inputs:
        if name not in ("tokens", "positions", *program.outputs):
            _refuse(program, f"decode plan: the draft model reads '{name}', which is no output of the model")


def _fused(program: Program, draft: Fused, vocabulary: Any) -> None:
    """There is a layer over the model's features whose heads fit the tree."""
    layer, depth = program.draft, max(draft.tree.depths)
    if layer is None or layer.cache is None or "features" not in layer.inputs or "features" not in program.outputs:
        _refuse(program, "decode plan: drafts come from a layer over the output 'features', which is missing")
    heads, words = layer.facts.get("ahead", 1), layer.outputs["logits"].meta["shape"][-1]
    if words != vocabulary:
        _refuse(program, f"decode plan: the draft model has {words} tokens, the model {vocabulary}")
    if depth > heads:
        _refuse(program, f"decode plan: the tree is {depth} deep, but the layer over the features has {heads} heads")


def _heads(program: Program, draft: Heads, vocabulary: Any) -> None:
    """The output that heads draft from fits the tree."""
    if "heads" not in program.outputs:
        _refuse(program, "decode plan: the drafter 'heads' reads the output 'heads', which the program does not have")
    heads, depth = program.outputs["heads"].meta["shape"], max(draft.tree.depths)
    if len(heads) != 4 or not same_shape((*heads[:2], heads[3]), program.outputs["logits"].meta["shape"]):
        _refuse(program, f"decode plan: the output 'heads' is {shown(heads)}, it must be [B, T, heads, {vocabulary}]")
    if depth > heads[2]:
        _refuse(
            program, f"decode plan: the tree is {depth} deep, but there are {heads[2]} heads, one for each place ahead"
        )
