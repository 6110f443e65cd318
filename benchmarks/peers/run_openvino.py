"""OpenVINO GenAI as an engine of the side-by-side benchmark: the weights in int4 with groups of 32."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve import Clock, Run, serve
from tokenizer import beside_links


def convert(checkpoint: Path, out: Path, variant: str, threads: int) -> dict[str, Any]:
    """Export by optimum-intel. Symmetric codes; the head and the embedding stay in 8 bits, as it does by default."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    shutil.rmtree(out, ignore_errors=True)
    coding = OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        source = Path(work)
        beside_links(checkpoint, source)
        lm = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=coding, compile=False)
        lm.save_pretrained(out)
    whole = (out / "openvino_model.bin").stat().st_size
    return {"bytes": whole, "read_bytes": whole - _embedding_bytes(out / "openvino_model.xml")}


def load(model: Path, variant: str, threads: int, context: int) -> tuple[Run, dict[str, Any]]:
    """The pipeline on the CPU, fed with token ids."""
    import numpy
    import openvino
    import openvino_genai as genai

    lm = genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    def run(tokens: Sequence[int], new: int) -> dict[str, Any]:
        options = genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = new, True, False
        ids = openvino.Tensor(numpy.array([list(tokens)], dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, len(tokens)), dtype=numpy.int64))
        clock = Clock()
        lm.generate(genai.TokenizedInputs(ids, mask), options, streamer=_Ticks(clock))
        return clock.reply()

    return run, {}


def _embedding_bytes(model: Path) -> int:
    """Of the table that a step reads one row of, with its scales."""
    import openvino

    nodes = openvino.Core().read_model(model).get_ops()
    named = [node for node in nodes if "embed_tokens" in node.get_friendly_name()]
    return sum(node.get_byte_size() for node in named if node.get_type_name() == "Constant")


def _Ticks(clock: Clock) -> Any:
    """A streamer that tells the clock each token."""
    import openvino_genai as genai

    class Ticks(genai.StreamerBase):  # type: ignore[misc]  # the package has no types
        def write(self, token: int | Sequence[int]) -> Any:
            for one in [token] if isinstance(token, int) else token:
                clock.tick(one)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing is held back."""

    return Ticks()


if __name__ == "__main__":
    serve(convert, load, ("openvino-genai", "openvino"))
