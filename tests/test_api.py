"""The public API: its names, what compile takes, and what a compiled model answers and refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import smelt
from smelt.ir.errors import SmeltError
from smelt.model import KEPT, Compiled
from smelt.passes.events import StepDone
from smelt.recipes import load as load_recipe
from smelt.runtime.artefact import tensor_digest

from . import tiny

PROMPT = "def f(x):\n    return"
INSERT = {"name": "n", "family": "deploy", "does": "x", "steps": ["cache.insert"]}
RECYCLE = {**INSERT, "steps": ["cache.insert", {"decode.recycle": {"nodes": 12}}]}
NOTHING: dict[str, Any] = {**INSERT, "steps": []}


@pytest.fixture(scope="module")
def plain() -> Compiled:
    return smelt.compile(tiny.model(), INSERT)


@pytest.fixture(scope="module")
def drafting() -> Compiled:
    return smelt.compile(tiny.model(), RECYCLE)


def test_the_public_names() -> None:
    assert smelt.__all__ == ["Compiled", "SmeltError", "compile", "load", "reference_model"]
    assert all(callable(getattr(smelt, name)) for name in smelt.__all__)
    assert smelt.SmeltError is SmeltError and smelt.Compiled is Compiled
    assert set(smelt.__all__) <= set(dir(smelt))
    with pytest.raises(AttributeError, match="module 'smelt' has no attribute 'complie'"):
        smelt.complie  # noqa: B018


def test_the_package_imports_without_torch() -> None:
    script = "import sys, smelt; smelt.reference_model(); print('torch' in sys.modules)"
    source = str(Path(smelt.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": source})
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def test_the_reference_model_is_a_model_folder() -> None:
    names = {path.name for path in smelt.reference_model().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_prompt_is_text_ids_or_a_list_of_either(plain: Compiled) -> None:
    ids = plain.tokenizer.encode(PROMPT)
    text = plain.generate(PROMPT, max_new_tokens=8)
    made = plain.generate(ids, max_new_tokens=8)
    assert isinstance(text, str) and text == plain.tokenizer.decode(made) and len(made) == 8
    assert plain.generate([PROMPT, "import"], max_new_tokens=8)[0] == text
    assert plain.generate([ids, ids[:2]], max_new_tokens=8)[0] == made
    for same in (torch.tensor(ids), np.array(ids), tuple(ids), list(np.array(ids))):
        assert plain.generate(same, max_new_tokens=8) == made
    assert plain.generate(torch.tensor([ids, ids]), max_new_tokens=8) == [made, made]
    assert plain.generate([PROMPT, ids], max_new_tokens=8) == [text, made]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt 0 is empty; give at least one character"),
        ([], {}, "the prompt is empty; give text or at least one token id"),
        ([[3], []], {}, "prompt 1 is empty; give at least one token"),
        ([3, 4096], {}, "holds token 4096, the vocabulary has ids 0 to 4095"),
        ([[3, 1.5]], {}, r"prompt 0 holds 1\.5, which is neither text nor a token id"),
        (PROMPT, {"temprature": 1}, r"unknown option 'temprature' \(did you mean 'temperature'\?\); known: max_new"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1, not 0"),
        (PROMPT, {"max_new_tokens": 2.5}, r"whole number from 1, not 2\.5"),
        (PROMPT, {"temperature": -1}, "sampling: temperature must be 0"),
        (PROMPT, {"stop": ["a", ""]}, "stop: an empty string"),
        ([3] * 200, {"max_new_tokens": 58}, "has 200 tokens and 58 more are asked for, but the model's context is 256"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(plain: Compiled, prompt: Any, options: Any, message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        plain.generate(prompt, **options)


def test_complete_takes_a_list(plain: Compiled) -> None:
    for wrong in (PROMPT, []):
        with pytest.raises(SmeltError, match="give a list of prompts with at least one in it"):
            plain.complete(wrong)


def test_the_context_may_be_filled(plain: Compiled) -> None:
    made = plain.complete([[3] * 200], max_new_tokens=57, eos=())
    assert len(made.rows[0].tokens) == 57


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["e", "in"]}], ids=str)
def test_a_streams_pieces_are_the_text(plain: Compiled, drafting: Compiled, options: Any) -> None:
    text = plain.generate(PROMPT, max_new_tokens=30, **options)
    for compiled in (plain, drafting):
        pieces = list(compiled.stream(PROMPT, max_new_tokens=30, **options))
        assert all(pieces) and "".join(pieces) == text == compiled.generate(PROMPT, max_new_tokens=30, **options)


def test_a_stop_string_ends_a_row_and_is_not_told(plain: Compiled, drafting: Compiled) -> None:
    full = plain.generate([PROMPT, "import"], max_new_tokens=40)
    stop = full[0][12:14]
    for compiled in (plain, drafting):
        made = compiled.complete([PROMPT, "import"], max_new_tokens=40, stop=[stop])
        for row, whole in zip(made.rows, full, strict=True):
            assert row.text == whole.split(stop)[0]
            assert row.reason == ("stop" if stop in whole else "length")
            assert stop not in whole or stop in compiled.tokenizer.decode(row.tokens)
    assert made.rows[0].reason == "stop"


def test_an_end_token_of_the_call_replaces_the_models(plain: Compiled) -> None:
    made = plain.complete([PROMPT], max_new_tokens=20, eos=())
    end = made.rows[0].tokens[6]
    first = made.rows[0].tokens.index(end)
    row = plain.complete([PROMPT], max_new_tokens=20, eos=[end]).rows[0]
    assert (row.tokens, row.reason) == (made.rows[0].tokens[: first + 1], "eos")


def test_what_a_generation_took(plain: Compiled, drafting: Compiled) -> None:
    """Tokens per step leave out the first token of each row, which comes out of its prompt."""
    made = plain.complete([PROMPT, "import"], max_new_tokens=9, eos=())
    assert (made.steps, made.step_tokens, made.tokens_per_step) == (8, 16, 2.0)
    assert made.prefill_seconds > 0 and made.tokens_per_second == made.step_tokens / made.decode_seconds
    once = plain.complete([PROMPT], max_new_tokens=1)
    assert (once.steps, once.step_tokens, once.tokens_per_step, once.tokens_per_second) == (0, 0, 0.0, 0.0)
    faster = drafting.complete([[7, 8] * 20], max_new_tokens=60, eos=())
    assert faster.step_tokens == 59 and faster.tokens_per_step == 59 / faster.steps >= 1
    assert (
        faster.rows[0].tokens
        == drafting.complete([[7, 8] * 20], max_new_tokens=60, eos=(), speculate=False).rows[0].tokens
    )


def test_sampling_is_reproducible(plain: Compiled, drafting: Compiled) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
    first = plain.generate(PROMPT, seed=1, **options)
    assert (
        first
        == plain.generate(PROMPT, seed=1, **options)
        == drafting.generate([PROMPT, "import"], seed=1, **options)[0]
    )
    assert first != plain.generate(PROMPT, seed=2, **options)


def test_kernels_and_their_sources(plain: Compiled) -> None:
    rows = plain.kernels
    assert all(row.keys() == {"node", "kernel", "why", "fallback", "role", "source"} and row["source"] for row in rows)
    assert not any(row["fallback"] for row in rows)


def test_the_torch_target_gives_the_same_tokens(plain: Compiled) -> None:
    reference = smelt.compile(tiny.model(), INSERT, target="torch")
    assert reference.generate(PROMPT, max_new_tokens=12) == plain.generate(PROMPT, max_new_tokens=12)
    assert {row["why"] for row in reference.kernels} >= {"target torch runs the reference"}


def test_a_recipe_is_a_dict_a_file_a_name_or_one_that_was_read(plain: Compiled, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: n\nfamily: deploy\ndoes: x\nsteps: [cache.insert]\n")
    known = smelt.passes.catalogue()
    for recipe in (path, str(path), load_recipe(INSERT, known)):
        assert smelt.compile(tiny.model(), recipe).facts["recipe_digest"] == plain.facts["recipe_digest"]
    other = smelt.compile(tiny.model(), INSERT, overrides=["cache.insert.dtype=float32"])
    assert other.program.cache is not None and other.program.cache[0].dense == "float32"
    with pytest.raises(SmeltError, match="recipe"):
        smelt.compile(tiny.model(), "no-such-recipe")


def test_steps_are_told_and_may_end_early() -> None:
    told: list[Any] = []
    compiled = smelt.compile(tiny.model(), RECYCLE, listen=told.append, stop_after="cache.insert")
    assert [event.report.name for event in told if isinstance(event, StepDone)] == ["cache.insert"]
    assert compiled.program.decode is None and compiled.report is not None


def test_what_has_no_fast_kernel_is_refused_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {**INSERT, "steps": [{"weights.quantize": {"group": 8}}, "cache.insert"]}
    refused = lambda encoding, shape, width=None: "no loop" if "group=8" in str(encoding) else None  # noqa: E731
    monkeypatch.setattr("smelt.codegen.gemv.covers", refused)
    with pytest.raises(SmeltError, match=r"no fast kernel for .* group=8.*allow fallback=True"):
        smelt.compile(tiny.model(), recipe, fallback=False)
    assert any(row["fallback"] for row in smelt.compile(tiny.model(), recipe).kernels)


def test_calibration_is_a_file_texts_or_tokens(plain: Compiled, tmp_path: Path) -> None:
    text, path = tiny.tokens(1500), tmp_path / "text.txt"
    path.write_text(text)
    ids = plain.tokenizer.encode(text)
    tokens = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    for given in (path, str(path), [text], (text,), tokens, tokens.int()):
        compiled = smelt.compile(tiny.model(), INSERT, calibration=given)
        assert compiled.facts["calibration"] == tensor_digest(tokens)
    assert "calibration" not in plain.facts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text\.txt: cannot be read \(No such file or directory\)"),
        (b" \n\n", r"text\.txt: the calibration file is empty"),
        (b"ok \xff", r"text\.txt: not UTF-8 text \(byte 3\)"),
        (b"too short", r"text\.txt: [23] tokens are too few to calibrate on; give at least 512"),
    ],
    ids=["missing", "empty", "not text", "short"],
)
def test_a_calibration_file_that_does_not_serve(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SmeltError, match=message):
        smelt.compile(tiny.model(), INSERT, calibration=path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "calibration: 0 tokens are too few"),
        (["text", 5], "5 is not text"),
        (torch.zeros(2, 9), r"whole numbers \[N, T\], not torch.float32 \[2, 9\]"),
        (torch.zeros(9, dtype=torch.int64), r"not torch.int64 \[9\]"),
        (torch.zeros(2, 9, dtype=torch.bool), r"not torch.bool \[2, 9\]"),
        (torch.zeros(0, 9, dtype=torch.int64), r"not torch.int64 \[0, 9\]"),
        (torch.full((2, 9), 4096), "token 4096 is not in the vocabulary of 4096"),
        (torch.full((2, 9), -1), "token -1 is not in the vocabulary"),
        (torch.zeros(2, 257, dtype=torch.int64), "sequences of 257 tokens exceed the model's context of 256"),
    ],
)
def test_calibration_that_does_not_serve(given: Any, message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        smelt.compile(tiny.model(), INSERT, calibration=given)


def test_a_model_without_a_tokenizer_takes_ids_or_the_folder_of_one(plain: Compiled, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny.model(), tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    compiled = smelt.compile(bare, INSERT)
    assert compiled.generate([5, 6], max_new_tokens=3) == plain.generate([5, 6], max_new_tokens=3)
    assert compiled.complete([[5, 6]], max_new_tokens=3).rows[0].text is None
    for ask in (lambda: compiled.generate(PROMPT), lambda: compiled.generate([5], stop="x")):
        with pytest.raises(SmeltError, match="tokenizer"):
            ask()
    with pytest.raises(SmeltError, match="has no tokenizer, so it cannot stream text: use complete on token ids"):
        next(compiled.stream([5]))
    with pytest.raises(SmeltError, match="tokenizer"):
        smelt.compile(bare, INSERT, calibration=["text"] * 600)
    lent = smelt.compile(bare, INSERT, tokenizer=tiny.model())
    assert lent.generate(PROMPT, max_new_tokens=5) == plain.generate(PROMPT, max_new_tokens=5)
    with pytest.raises(SmeltError, match=r"no_such_folder: neither a folder nor a model"):
        smelt.compile(bare, INSERT, tokenizer=str(tmp_path / "no_such_folder"))


def test_where_a_text_ends_is_kept(tmp_path: Path) -> None:
    """generation_config.json goes before config.json, and a loaded artefact ends where the compiled model did."""
    for name, told, wanted in (("both", {"eos_token_id": [9, 11]}, [9, 11]), ("config", None, [5])):
        folder = tiny.write_model(tmp_path / name, eos_token_id=5)
        (folder / "generation_config.json").unlink()
        if told is not None:
            (folder / "generation_config.json").write_text(json.dumps(told))
        compiled = smelt.compile(folder, INSERT)
        compiled.save(tmp_path / f"{name}.smelt")
        read = smelt.load(tmp_path / f"{name}.smelt")
        assert compiled.program.facts["eos"] == read.program.facts["eos"] == wanted


def test_a_saved_model_answers_the_same_and_remembers_how_it_was_made(drafting: Compiled, tmp_path: Path) -> None:
    drafting.save(tmp_path / "a.smelt")
    read = smelt.load(str(tmp_path / "a.smelt"))
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2}
    assert read.generate(PROMPT, **options) == drafting.generate(PROMPT, **options)
    assert drafting.report is not None and read.report is None
    assert read.facts["report"] == json.loads(json.dumps(drafting.report.to_dict()))
    assert read.facts["recipe"] == json.loads(json.dumps(drafting.facts["recipe"]))
    assert set(read.facts["passes"]) == {"cache.insert", "decode.recycle"}
    read.facts["passes"] = dict.fromkeys(read.facts["passes"], "of another version")
    read.save(tmp_path / "b.smelt")
    assert smelt.load(tmp_path / "b.smelt").facts == read.facts


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.tanh(self.inner(x))
        return z + y, z.amax(-1)


@pytest.fixture(scope="module")
def layer() -> tuple[Layer, Compiled]:
    torch.manual_seed(0)
    module = Layer().eval()
    return module, smelt.compile(module, NOTHING, example=(torch.randn(3, 8), torch.randn(3, 6)))


def test_a_module_is_run_on_its_named_inputs(layer: tuple[Layer, Compiled]) -> None:
    module, compiled = layer
    for rows in (1, 2, 150, 2):
        x, y = torch.randn(rows, 8), torch.randn(6, rows).t()
        found = compiled.run(x=x, y=y)
        for value, wanted in zip(found.values(), module(x, y), strict=True):
            assert torch.allclose(value, wanted, atol=1e-5)
        kept = found["output0"].clone()
        compiled.run(y=y + 1, x=x)
        assert torch.equal(found["output0"], kept)  # the caller's own
    for rows in range(1, 3 * KEPT):
        compiled.run(x=torch.randn(rows, 8), y=torch.randn(rows, 6))
    assert len(compiled._bound) == KEPT


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "Layer takes the inputs x, y, not x"),
        ({"x": torch.zeros(2, 8), "y": torch.zeros(2, 6), "z": torch.zeros(1)}, "takes the inputs x, y, not x, y, z"),
        ({"x": torch.zeros(2, 9), "y": torch.zeros(2, 6)}, r"input 'x' must be \[B, 8\], not \[2, 9\]"),
        ({"x": torch.zeros(2, 8), "y": torch.zeros(3, 6)}, r"input 'y' must be \[B, 6\], not \[3, 6\] \(B = 2\)"),
        ({"x": torch.zeros(2, 8), "y": torch.zeros(6)}, r"input 'y' must be \[B, 6\], not \[6\]"),
        ({"x": torch.zeros(0, 8), "y": torch.zeros(0, 6)}, r"input 'x' must be \[B, 8\], not \[0, 8\]"),
        ({"x": [[1.0]], "y": torch.zeros(2, 6)}, "input 'x' must be a tensor, not list"),
        ({"x": torch.ones(2, 8, dtype=torch.int64), "y": torch.zeros(2, 6)}, r"'x' must be float32, not torch\.int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(layer: tuple[Layer, Compiled], inputs: Any, message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        layer[1].run(**inputs)


def test_what_runs_and_what_generates(layer: tuple[Layer, Compiled], plain: Compiled) -> None:
    with pytest.raises(SmeltError, match="Layer has no cache, so it cannot generate"):
        layer[1].generate([1])
    with pytest.raises(SmeltError, match="reads a cache: call generate"):
        plain.run(tokens=torch.ones(1, 1, dtype=torch.int64), positions=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(SmeltError, match="needs `example` inputs"):
        smelt.compile(Layer(), NOTHING)


def test_an_encoder_is_run_on_tokens_and_mask() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=40, **sizes)
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    compiled = smelt.compile(model, NOTHING)
    tokens = torch.randint(0, 50, (3, 11))
    mask = (torch.arange(11) < torch.tensor([11, 7, 3])[:, None]).long()
    with torch.no_grad():
        wanted = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    for kind in (torch.int64, torch.int32):
        found = compiled.run(tokens=tokens.to(kind), mask=mask.to(kind))["hidden"]
        assert (found - wanted)[mask.bool()].abs().max() < 1e-5
    tokens[1, 2] = 50
    with pytest.raises(SmeltError, match="id 50 is not one of the table's 50 rows"):
        compiled.run(tokens=tokens, mask=mask)
    long = torch.ones(1, 41, dtype=torch.int64)
    with pytest.raises((SmeltError, RuntimeError)):
        compiled.run(tokens=long, mask=long)
