"""A made-up tokenizer: converters of the side-by-side benchmark want one, though all prompts are token ids."""

from __future__ import annotations

import json
from pathlib import Path


def beside_links(checkpoint: Path, folder: Path) -> None:
    """Fill `folder` with links to the checkpoint's files and a byte-level tokenizer of as many tokens as it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    count = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<end>", *letters][:count]
    merges: list[tuple[str, str]] = []
    for pair in ((a, b) for a in letters for b in letters):
        if len(words) == count:
            break
        merges.append(pair)
        words.append("".join(pair))
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    made.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
