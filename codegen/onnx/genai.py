"""genai_config.json: what onnxruntime-genai must know of a decoder's folder, and the tokenizer's files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...ir.errors import SmeltError
from ...ir.program import Program

SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")  # of generation_config.json
# Leaves DequantizeLinear as it stands. onnxruntime would repeat it for each reader, and make products that round.
AS_WRITTEN = "session.disable_quant_qdq"
CONTEXT = 1 << 15  # tokens, of a model that names no limit


def genai_files(program: Program, inputs: Sequence[str], assets: Mapping[str, bytes]) -> dict[str, bytes]:
    """All files beside the model; raises SmeltError for layers whose caches differ in shape."""
    assert program.cache is not None
    shapes = {(site.heads, site.kv_heads, site.key_dim) for site in program.cache.sites}
    if len(shapes) > 1:
        raise SmeltError(
            f"{program.name}: its layers cache {len(shapes)} shapes of keys, and genai_config.json holds one; "
            "use style standard"
        )
    config = json.dumps(_config(program, next(iter(shapes)), inputs, assets), indent=4)
    return {**assets, "genai_config.json": config.encode()}


def _config(
    program: Program, shape: tuple[int, int, int], inputs: Sequence[str], assets: Mapping[str, bytes]
) -> dict[str, Any]:
    assert program.cache is not None
    heads, kv_heads, dim = shape
    facts, said = program.facts, json.loads(assets.get("generation_config.json", b"{}"))
    context = int(facts.get("context") or CONTEXT)
    words = int(facts["vocabulary"])
    eos = [int(token) for token in facts.get("eos") or () if int(token) < words]  # one beyond is refused when it loads
    plain = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], AS_WRITTEN: "1"},
        "filename": "model.onnx",
        "head_size": dim,
        "hidden_size": int(facts.get("hidden") or heads * dim),
        "inputs": {
            **plain,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": len(program.cache.sites),
        "num_key_value_heads": kv_heads,
    }
    named = {role: said.get(f"{role}_token_id") for role in ("bos", "pad")}
    bos, pad = (token if isinstance(token, int) and 0 <= token < words else None for token in named.values())
    model = {
        **({} if bos is None else {"bos_token_id": bos}),
        "context_length": context,
        "decoder": decoder,
        "eos_token_id": eos if len(eos) != 1 else eos[0],
        "pad_token_id": pad if pad is not None else next(iter(eos), 0),
        "type": "decoder",  # any that reads tokens and a cache; its graph says the rest
        "vocab_size": words,
    }
    search = {
        **{key: said[key] for key in SEARCH if said.get(key) is not None},
        "max_length": context,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}
