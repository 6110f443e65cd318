"""llama.cpp as an engine of the side-by-side benchmark: Q4_0, Q4_K_M, Q8_0 or BF16, made by its own quantizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serve import Clock, Run, serve

BLOCK = {  # tensors of a layer: their name in the checkpoint, and in a GGUF file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def convert(checkpoint: Path, out: Path, variant: str, threads: int) -> dict[str, Any]:
    """Write the bfloat16 weights as GGUF, and let llama.cpp quantize that file."""
    import llama_cpp
    from gguf import GGUFReader

    plain = out.with_suffix(".bf16")
    _write(checkpoint, plain)
    if variant == "BF16":
        plain.replace(out)
    else:
        options = llama_cpp.llama_model_quantize_default_params()
        options.nthread = threads
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}")
        failed = llama_cpp.llama_model_quantize(str(plain).encode(), str(out).encode(), options)
        plain.unlink()
        if failed:
            raise RuntimeError(f"llama_model_quantize to {variant} failed with {failed}")
    sizes = {str(tensor.name): int(tensor.n_bytes) for tensor in GGUFReader(out).tensors}
    whole = sum(sizes.values())
    return {"bytes": whole, "read_bytes": whole - sizes["token_embd.weight"]}


def load(model: Path, variant: str, threads: int, context: int) -> tuple[Run, dict[str, Any]]:
    """The C interface, without the Python class around it: token ids in, logits out, greedy."""
    import llama_cpp
    import numpy

    llama_cpp.llama_backend_init()
    lm = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch = context, context
    options.n_threads = options.n_threads_batch = threads
    state = llama_cpp.llama_init_from_model(lm, options) if lm else None
    if not state:
        raise RuntimeError(f"llama.cpp does not load {model}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(lm))

    def step(tokens: Sequence[int]) -> int:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points at it
        batch = llama_cpp.llama_batch_get_one(ids, len(tokens))
        if failed := llama_cpp.llama_decode(state, batch):
            raise RuntimeError(f"llama_decode failed with {failed}")
        logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(state, -1), (vocabulary,))
        return int(logits.argmax())

    def run(tokens: Sequence[int], new: int) -> dict[str, Any]:
        clock = Clock()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
        clock.tick(step(tokens))
        while len(clock.tokens) < new:
            clock.tick(step(clock.tokens[-1:]))
        return clock.reply()

    return run, {"system": llama_cpp.llama_print_system_info().decode()}


def neighbours(values: Any, heads: int) -> Any:
    """Rows [heads * D, K] so that what rotates together is adjacent: llama.cpp's order, not halves of a head."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write(checkpoint: Path, out: Path) -> None:
    """A GGUF file of the bfloat16 weights, without a tokenizer."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter

    config = json.loads((checkpoint / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, values in _tensors(checkpoint):
        if values.ndim == 1:
            writer.add_tensor(_renamed(name), (values.astype(numpy.uint32) << 16).view(numpy.float32))
            continue
        for kind, count in (("q_proj", heads), ("k_proj", groups)):
            if kind in name:
                values = numpy.ascontiguousarray(neighbours(values, count))
        writer.add_tensor(_renamed(name), values.view(numpy.uint8), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """Names and bfloat16 bits as uint16, read from safetensors by hand: numpy has no bfloat16."""
    import numpy

    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        content = numpy.memmap(path, dtype=numpy.uint8, mode="r", offset=8 + size)
        header.pop("__metadata__", None)
        for name, facts in header.items():
            if facts["dtype"] != "BF16":
                raise RuntimeError(f"{name} is stored as {facts['dtype']}: the benchmark's checkpoint is BF16")
            begin, end = facts["data_offsets"]
            yield name, content[begin:end].view(numpy.uint16).reshape(facts["shape"])


def _renamed(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{BLOCK[rest.removesuffix('.weight')]}.weight"


if __name__ == "__main__":
    serve(convert, load, ("llama-cpp-python",))
