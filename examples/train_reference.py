"""Train a small Llama-layout decoder on the Python sources of this machine; the result is a model folder for smelt.

The bundled reference model was made this way, in about an hour on two cores. `--minutes` sets how long yours takes.
"""

import argparse
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def read_sources(folders, limit_mb, seed):
    """Source texts in random order, one file in fifty held out."""
    files = sorted(p for folder in folders for p in Path(folder).rglob("*.py") if 500 < p.stat().st_size < 200_000)
    random.Random(seed).shuffle(files)
    train, held, size = [], [], 0
    for number, path in enumerate(files):
        text = path.read_text(errors="ignore")
        (held if number % 50 == 0 else train).append(text)
        size += len(text)
        if size > limit_mb * 1e6:
            break
    return train, held


def train_tokenizer(texts, vocabulary):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet)
    )
    return tokenizer


def tokens_of(tokenizer, texts):
    end = tokenizer.token_to_id(END)
    return torch.tensor([i for text in texts for i in (*tokenizer.encode(text).ids, end)])


def windows(stream, batch, length, generator):
    starts = torch.randint(0, len(stream) - length - 1, (batch,), generator=generator)
    return torch.stack([stream[s : s + length + 1] for s in starts.tolist()])


def loss_on(model, block):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(block[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", action="append", help="folder of .py files (default: the standard library)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps even if time is left")
    parser.add_argument("--megabytes", type=float, default=60.0, help="most text to read")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    train, held = read_sources(options.source or [sysconfig.get_path("stdlib")], options.megabytes, options.seed)
    tokenizer = train_tokenizer(train, options.vocabulary)
    stream, held_stream = tokens_of(tokenizer, train), tokens_of(tokenizer, held)
    if min(len(stream), len(held_stream)) <= options.length + 1:
        raise SystemExit(f"too little text: {len(stream)} tokens to train on, {len(held_stream)} held out")
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 128), head_dim=64, max_position_embeddings=4 * options.length,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(stream) / 1e6:.1f} M tokens")

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    start, step, shown = time.monotonic(), 0, 0.0
    while step < options.steps and (spent := time.monotonic() - start) < 60 * options.minutes:
        progress = max(spent / (60 * options.minutes), step / options.steps)
        scale = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * scale
        loss = loss_on(model, windows(stream, options.batch, options.length, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if spent - shown > 30 or step == 1:
            shown = spent
            print(f"{spent / 60:5.1f} min  step {step}  loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        held_loss = sum(loss_on(model, windows(held_stream, 4, options.length, generator)).item() for _ in range(4)) / 4
    print(f"{step} steps, held-out loss {held_loss:.3f} nats a token")
    model.half().save_pretrained(options.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(options.out)
    print(f"saved to {options.out}: smelt compile {options.out} finequant -o model.smelt")


if __name__ == "__main__":
    main()
