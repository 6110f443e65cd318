"""The five layers stand at the root and are linked into src/smelt: links and folders agree, and the model is there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

LAYERS = {"ir", "passes", "codegen", "runtime", "recipes"}


def faults(root: Path) -> list[str]:
    """Everything in which the links of src/smelt and the folders at the root disagree, one line each."""
    package = root / "src" / "smelt"
    folders = {path.parent.name for path in root.glob("*/__init__.py")} - {"tests", "examples", "benchmarks"}
    links = {path.name for path in package.iterdir() if path.is_symlink()}
    found = [f"{name}/ has no link src/smelt/{name}" for name in sorted(folders - links)]
    found += [f"src/smelt/{name} links to no layer" for name in sorted(links - folders)]
    for name in sorted(links & folders):
        target = os.readlink(package / name)
        if target != f"../../{name}":
            found.append(f"src/smelt/{name} links to {target}, not to ../../{name}")
    for layer in sorted(folders):
        holds_code = {path.parent for path in (root / layer).rglob("*.py")}
        bare = sorted(str(path.relative_to(root)) for path in holds_code if not (path / "__init__.py").exists())
        found += [f"{path}/ holds modules but no __init__.py: import-linter does not see it" for path in bare]
    return found


def test_links_and_folders_agree(root: Path) -> None:
    assert faults(root) == []
    assert {path.name for path in (root / "src" / "smelt").iterdir() if path.is_symlink()} == LAYERS


def text_for_link(root: Path) -> None:
    """What git leaves where it is told to make no links (core.symlinks=false)."""
    (root / "src/smelt/ir").unlink()
    (root / "src/smelt/ir").write_text("../../ir")


def absolute_link(root: Path) -> None:
    (root / "src/smelt/ir").unlink()
    (root / "src/smelt/ir").symlink_to(root / "ir")


def sixth_layer(root: Path) -> None:
    (root / "tuning").mkdir()
    (root / "tuning/__init__.py").touch()


def folder_without_init(root: Path) -> None:
    (root / "codegen/unseen").mkdir()
    (root / "codegen/unseen/kernel.py").touch()


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (text_for_link, "ir/ has no link"),
        (absolute_link, "not to ../../ir"),
        (sixth_layer, "tuning/ has no link"),
        (folder_without_init, "codegen/unseen/ holds modules but no __init__.py"),
    ],
)
def test_names_what_disagrees(harm: Callable[[Path], None], named: str, checkout: Callable[[], Path]) -> None:
    copy = checkout()
    before = faults(copy)
    harm(copy)
    new = [line for line in faults(copy) if line not in before]
    assert len(new) == 1 and named in new[0]


def test_tracebacks_name_the_real_files(root: Path) -> None:
    import smelt.ir.errors

    assert Path(smelt.ir.errors.__file__) == root / "ir" / "errors.py"


def test_the_reference_model_is_whole(reference_path: Path) -> None:
    config = json.loads((reference_path / "config.json").read_text())
    assert (reference_path / "tokenizer.json").stat().st_size > 100_000
    with safe_open(reference_path / "model.safetensors", framework="numpy") as weights:
        names = set(weights.keys())
        embedding = weights.get_slice("model.embed_tokens.weight").get_shape()
    assert embedding == [config["vocab_size"], config["hidden_size"]]
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    assert layers == {str(i) for i in range(config["num_hidden_layers"])}
