"""Stage 4: text from a model.

    python generate.py --prompt "The sun is"            # the newest checkpoint under log/
    python generate.py --model gpt2 --prompt "The sun is" --temperature 0 --max-tokens 50
    python generate.py --interactive                    # the text grows as you and the model take turns

Standard output is the prompt and its continuation, nothing else. One sample is printed as it is made; several
are made together and parted by an empty line. Top-k 50 and a temperature of 0.8 by default: cautious, for
small models.
"""

import codecs
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import tokenizer
from checkpoint import halve, load_model, pick_dtype
from model import GPT


@dataclass(frozen=True)
class Config:
    model: str = ""
    """A checkpoint, a run folder, a size (gpt2, 124M, ...) or a Hub id; by default the newest run's
    checkpoint."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's matrix products, auto for the fastest; logits are float32 in any case."""
    compile: bool = False
    """Compile the network with torch.compile: half a minute first, then faster; for long texts."""
    prompt: str = "Hello, I'm a language model,"
    """The text to continue."""
    interactive: bool = False
    """Read line after line and continue each; the text so far stays in the context. Ctrl-D ends."""
    max_tokens: int = 128
    """Tokens to add, at most; an <|endoftext|> ends a text earlier."""
    temperature: float = 0.8
    """0 takes the likeliest token each time; 1 samples as the model learnt; higher is wilder."""
    top_k: int = 50
    """Choose among the so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1 for all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred become less likely (1.2 is usual)."""
    num_samples: int = 1
    """Continuations of the same prompt."""
    seed: int = 0
    """The same seed gives the same text on the same machine."""
    special_tokens: bool = False
    """Read <|endoftext|> in the prompt as the control token, not as thirteen characters."""
    json: str = ""
    """Also write prompt, settings and texts to this file."""


def check(cfg: Config):
    """Raises ValueError for a value that cannot work."""
    bounds = {
        "max_tokens": (cfg.max_tokens >= 1, "at least 1"),
        "temperature": (cfg.temperature == 0 or cfg.temperature >= 0.01, "0 (greedy) or at least 0.01"),
        "top_k": (cfg.top_k >= 0, "0 or more"),
        "top_p": (0 < cfg.top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (cfg.repetition_penalty > 0, "above 0"),
        "num_samples": (cfg.num_samples >= 1, "at least 1"),
    }
    for name, (fits, bound) in bounds.items():
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be {bound}")
    if cfg.interactive and (cfg.num_samples > 1 or cfg.json):
        raise ValueError("--interactive makes one text, on the terminal: leave --num-samples and --json out")


def options(cfg: Config, device: torch.device) -> dict:
    """What GPT.stream takes, from the flags."""
    return dict(
        max_new_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k or None,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        generator=torch.Generator(device=device).manual_seed(cfg.seed),
    )


def stream_text(model: GPT, ids: list[int], cfg: Config) -> Iterator[str]:
    """The continuation of ids, piece by piece: each piece as soon as its bytes are whole characters."""
    device = model.wte.weight.device
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in model.stream(torch.tensor([ids], device=device), **options(cfg, device)):
        if token.item() == tokenizer.END_OF_TEXT:
            break
        yield utf8.decode(tokenizer.decode_bytes(token))
    yield utf8.decode(b"", final=True)


def sample_texts(model: GPT, ids: list[int], cfg: Config) -> list[str]:
    """num_samples continuations of ids, made as one batch."""
    device = model.wte.weight.device
    rows = model.generate(torch.tensor([ids] * cfg.num_samples, device=device), **options(cfg, device))[
        :, len(ids) :
    ]
    return [tokenizer.decode_until_end(row) for row in rows.tolist()]


def converse(model: GPT, cfg: Config):
    """Reads lines from the terminal until it ends, and continues the text that they and the model make
    together."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() a history and line editing

    print("Type a beginning and press Enter; Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr)
    text = ""
    turn = 0
    while True:
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = input()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not line:
            continue
        text += ("\n" if text else "") + line
        turn += 1
        print(line, end="", flush=True)
        try:
            for piece in stream_text(
                model, encode_prompt(text, cfg), dataclasses.replace(cfg, seed=cfg.seed + turn)
            ):
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print()


def encode_prompt(prompt: str, cfg: Config) -> list[int]:
    """The prompt's ids; a new text, which begins after <|endoftext|>, where the prompt is empty."""
    return tokenizer.encode(prompt, special=cfg.special_tokens) or [tokenizer.END_OF_TEXT]


def complete(model: GPT, source: str, cfg: Config):
    """Prints the prompt's continuation, or several; writes --json."""
    ids = encode_prompt(cfg.prompt, cfg)
    if cfg.num_samples == 1:
        texts = [""]
        print(cfg.prompt, end="")
        for piece in stream_text(model, ids, cfg):
            texts[0] += piece
            print(piece, end="", flush=True)
        print()
    else:
        texts = sample_texts(model, ids, cfg)
        print("\n\n".join(cfg.prompt + text for text in texts))
    if cfg.json:
        result = {**dataclasses.asdict(cfg), "model": source, "texts": [cfg.prompt + text for text in texts]}
        Path(cfg.json).write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")


def main(cfg: Config):
    check(cfg)
    model, source = load_model(cfg.model, cfg.device)
    device = model.wte.weight.device
    dtype, _ = pick_dtype(cfg.dtype, device)
    halve(model, dtype)
    if cfg.compile:
        model.hidden = torch.compile(model.hidden)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if cfg.interactive:
            converse(model, cfg)
        else:
            complete(model, source, cfg)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
