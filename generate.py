"""Stage 4: text from a model.

    python generate.py --prompt "The sun is"            # the newest checkpoint under log/
    python generate.py --model gpt2 --prompt "The sun is" --temperature 0 --max-tokens 50
    python generate.py --prompt-file story.txt --stop "The end"
    cat story.txt | python generate.py --prompt-file -
    python generate.py --num-samples 3 --show-probs
    python generate.py --interactive                    # the text grows as you and the model take turns

Standard output is the prompt and its continuation, nothing else. One sample is printed as it is made. Several
are made together and parted by an empty line; on a terminal they stand side by side. Top-k 50 and a
temperature of 0.8 by default: cautious, for small models.
"""

import atexit
import codecs
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from lib import tokenizer
from lib.checkpoint import load_model
from lib.device import cast_linears, pick_dtype
from model import GPT

# What /set changes in a conversation.
SETTINGS = (
    "max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed", "special_tokens",
    "show_probs",
)  # fmt: skip

COMMANDS = """\
/set NAME VALUE   change a setting, as its flag does: /set temperature 0.7, /set stop "\\n", /set show-probs
                  (and back: /set stop "", /set no-show-probs)
/show             the settings
/reset            forget the text so far
/help             this list
Ctrl-C stops a text, Ctrl-D ends. A line that begins with / is no text; put a blank before it."""

# Probabilities below the first number have the second as their colour, of a terminal's 256.
SHADES = ((0.01, 196), (0.05, 208), (0.2, 220), (0.5, 112), (2.0, 34))


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
    prompt_file: str = ""
    """Continue the text of this file instead; - for standard input. A line end at its end is left out."""
    interactive: bool = False
    """Read line after line and continue each; the text so far stays in the context. /help lists commands,
    Ctrl-D ends."""
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
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text (\\n is a line end); may be given several times."""
    num_samples: int = 1
    """Continuations of the same prompt."""
    seed: int = 0
    """The same seed gives the same text on the same machine."""
    special_tokens: bool = False
    """Read <|endoftext|> in the prompt as the control token, not as thirteen characters."""
    show_probs: bool = False
    """Colour each token by the probability that the model gave it, before penalty, temperature, top-k and
    top-p; without colours (NO_COLOR, no terminal) a table on standard error. --json has them, too."""
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
    if cfg.prompt_file and cfg.prompt != Config.prompt:
        raise ValueError("--prompt and --prompt-file are two prompts: leave one out")
    for name in ("prompt", "prompt_file", "num_samples", "json"):
        if cfg.interactive and getattr(cfg, name) != getattr(Config, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--interactive makes one text, from the lines that it reads: leave {flag} out")


def read_prompt(cfg: Config) -> str:
    """The text to continue. Raises OSError for a file that cannot be read, ValueError if it is not UTF-8."""
    if not cfg.prompt_file:
        return cfg.prompt
    is_stdin = cfg.prompt_file == "-"
    try:
        with open(0 if is_stdin else cfg.prompt_file, encoding="utf-8", closefd=not is_stdin) as file:
            return file.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {cfg.prompt_file}: {error}") from error


def options(cfg: Config, device: torch.device) -> dict:
    """What GPT.stream_with_logits takes, from the flags."""
    return dict(
        max_new_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k or None,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        generator=torch.Generator(device=device).manual_seed(cfg.seed),
    )


class Piece(NamedTuple):
    """What a token adds to the text: nothing, where its character is not yet whole."""

    text: str
    token: int | None  # none for the sign that stands for a character cut off at the end
    probability: float  # 0 where it was not asked for


class Sample:
    """A continuation while it is made: tokens go in, pieces of text come out.

    It ends at <|endoftext|>, or before the stop string that is complete first. Tokens that may yet be part of
    one are held back.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.stops = [stop.replace("\\n", "\n") for stop in stops if stop]
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held: list[Piece] = []
        self.done = False

    def add(self, token: int, probability: float) -> list[Piece]:
        """Takes the next token; returns the pieces that no stop string can reach any more."""
        if self.done:
            return []
        if token == tokenizer.END_OF_TEXT:
            return self.end()
        self.held.append(Piece(self.utf8.decode(tokenizer.decode_bytes([token])), token, probability))
        text = "".join(piece.text for piece in self.held)
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]
        if ends:
            self.done, (_, begin) = True, min(ends)
            kept = self.take(begin)
            rest = text[sum(len(piece.text) for piece in kept) : begin]
            return kept + ([self.held[0]._replace(text=rest)] if rest else [])
        begun = [n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])]
        return self.take(len(text) - max(begun, default=0))

    def take(self, size: int) -> list[Piece]:
        """The pieces that lie within the first `size` characters of what is held."""
        taken = []
        while self.held and len(self.held[0].text) <= size:
            taken.append(self.held.pop(0))
            size -= len(taken[-1].text)
        return taken

    def end(self) -> list[Piece]:
        """No token follows: the pieces that were held back."""
        if self.done:
            return []
        self.done, rest = True, self.utf8.decode(b"", final=True)
        return self.held + ([Piece(rest, None, 0.0)] if rest else [])


def stream_pieces(model: GPT, ids: list[int], cfg: Config) -> Iterator[list[list[Piece]]]:
    """num_samples continuations of ids, made together: for each step, the new pieces of each."""
    device = model.wte.weight.device
    samples = [Sample(cfg.stop) for _ in range(cfg.num_samples)]
    idx = torch.tensor([ids] * cfg.num_samples, device=device)
    for tokens, logits in model.stream_with_logits(idx, **options(cfg, device)):
        probabilities = torch.zeros(len(samples))
        if cfg.show_probs:
            probabilities = logits.softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        new = zip(samples, tokens.tolist(), probabilities.tolist())
        yield [sample.add(token, probability) for sample, token, probability in new]
        if all(sample.done for sample in samples):
            return
    yield [sample.end() for sample in samples]


def has_colours() -> bool:
    """Whether standard output shows colours, and nobody minds (no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def shaded(text: str, probability: float) -> str:
    """The text in its probability's colour."""
    return f"\x1b[38;5;{next(shade for bound, shade in SHADES if probability < bound)}m{text}\x1b[0m"


def rendered(pieces: list[Piece], cfg: Config) -> str:
    """The pieces as they are printed: text, coloured where that is asked for and can be."""
    if cfg.show_probs and has_colours():
        return "".join(shaded(piece.text, piece.probability) for piece in pieces if piece.text)
    return "".join(piece.text for piece in pieces)


def explain(samples: list[list[Piece]]):
    """The colours' legend, or the probabilities as a table, on standard error."""
    if has_colours():
        bounds = [0.0, *(bound for bound, _ in SHADES)]
        legend = [shaded(f"from {low:.0%}", low) for low in bounds[:-1]]
        print("probability in the model:", *legend, file=sys.stderr)
        return
    for number, pieces in enumerate(samples, 1):
        print(f"sample {number}: probability in the model, id, token", file=sys.stderr)
        for piece in pieces:
            if piece.token is not None:
                token = tokenizer.decode([piece.token])
                print(f"{piece.probability:9.3g}  {piece.token:5}  {token!r}", file=sys.stderr)


def columns(texts: list[str], width: int) -> str:
    """The texts side by side, in lines of `width` cells; one below the other where they would be narrow."""
    gap = "   "
    share = (width + len(gap)) // len(texts) - len(gap)
    if share < 20:
        return "\n\n".join(texts)
    # A wide character takes two cells: while lines are measured, a filler makes it two characters.
    filled = [
        "".join(c + "\0" if unicodedata.east_asian_width(c) in "FW" else c for c in text) for text in texts
    ]
    wrapped = [
        [part for line in text.splitlines() for part in textwrap.wrap(line, share) or [""]] for text in filled
    ]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return "\n".join(gap.join(part.ljust(share) for part in row).rstrip() for row in rows).replace("\0", "")


def converse(model: GPT, source: str, cfg: Config):
    """Reads lines until they end, and continues the text that they and the model make together. A line that
    begins with / is a command."""
    print(
        "Type a beginning and press Enter; Ctrl-C stops a text, Ctrl-D ends, /help lists commands.",
        file=sys.stderr,
    )
    text, turns = "", itertools.count(1)
    for line in typed_lines():
        if line.startswith("/"):
            command, *words = line.split(maxsplit=1)
            if command == "/reset":
                text = ""
            elif command == "/set" and words:
                cfg = changed(cfg, words[0])
            elif command == "/show":
                print(f"model {source}\n{settings(cfg)}", file=sys.stderr)
            else:
                wrong = "" if command == "/help" else f"{line} is no command. There are:\n"
                print(wrong + COMMANDS, file=sys.stderr)
        elif line:
            text += ("\n" if text else "") + line
            print(line, end="", flush=True)
            text += take_turn(model, text, dataclasses.replace(cfg, seed=cfg.seed + next(turns)))


def settings(cfg: Config) -> str:
    """What /set changes, a line each."""
    return "\n".join(f"{name.replace('_', '-')} {getattr(cfg, name)}" for name in SETTINGS)


def take_turn(model: GPT, text: str, cfg: Config) -> str:
    """Prints the continuation of the text, up to its end or Ctrl-C; returns it."""
    made: list[Piece] = []
    try:
        for (pieces,) in stream_pieces(model, encode_prompt(text, cfg), cfg):
            print(rendered(pieces, cfg), end="", flush=True)
            made += pieces
    except KeyboardInterrupt:
        pass
    print()
    if cfg.show_probs:
        explain([made])
    return "".join(piece.text for piece in made)


def typed_lines() -> Iterator[str]:
    """Lines from a terminal, with a history and line editing, or from a pipe, until they end."""
    is_terminal = sys.stdin.isatty()
    has_editor = is_terminal and sys.stdout.isatty()  # else input() would print its prompt into the text
    if has_editor:
        keep_history()
    while True:
        try:
            if is_terminal and not has_editor:
                print("> ", end="", file=sys.stderr, flush=True)
            yield input("> " if has_editor else "")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(file=sys.stderr)


def keep_history():
    """Line editing, and a history that outlives the session, in a file for its owner's eyes."""
    try:
        import readline
    except ImportError:  # Windows, where the console has both
        return
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2_generate_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if path.stat().st_size:  # macOS's editline refuses an empty file
            readline.read_history_file(path)
    except OSError as error:
        print(f"the history is not kept: {error}", file=sys.stderr)
        return
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, path)


def changed(cfg: Config, words: str) -> Config:
    """cfg after /set: `temperature 0.7` does what the flag would have done. What the flag would refuse is
    refused in its words, and nothing changes."""
    try:
        name, *values = shlex.split(words)
        flag = f"--{name.lstrip('-')}"
        args = [arg for value in values for arg in (flag, value)] or [flag]
        # A repeated flag adds to the default, and /set replaces.
        new = tyro.cli(Config, args=args, default=dataclasses.replace(cfg, stop=()), add_help=False)
        new = dataclasses.replace(new, stop=new.stop or cfg.stop)
        check(new)
        for field in dataclasses.fields(Config):
            if field.name not in SETTINGS and getattr(new, field.name) != getattr(cfg, field.name):
                raise ValueError(f"{flag} stays as it is in a conversation; /show names what can be set")
        return new
    except ValueError as error:
        print(error, file=sys.stderr)
    except SystemExit:
        pass  # tyro has said why
    return cfg


def encode_prompt(prompt: str, cfg: Config) -> list[int]:
    """The prompt's ids; a new text, which begins after <|endoftext|>, where the prompt is empty."""
    return tokenizer.encode(prompt, special=cfg.special_tokens) or [tokenizer.END_OF_TEXT]


def complete(model: GPT, source: str, cfg: Config):
    """Prints the prompt's continuation, or several; writes --json."""
    samples: list[list[Piece]] = [[] for _ in range(cfg.num_samples)]
    if cfg.num_samples == 1:
        print(cfg.prompt, end="", flush=True)
    for new in stream_pieces(model, encode_prompt(cfg.prompt, cfg), cfg):
        for sample, pieces in zip(samples, new):
            sample += pieces
        if cfg.num_samples == 1:
            print(rendered(new[0], cfg), end="", flush=True)
    texts = [cfg.prompt + "".join(piece.text for piece in sample) for sample in samples]
    if cfg.num_samples == 1:
        print()
    elif sys.stdout.isatty() and not cfg.show_probs:
        print(columns(texts, shutil.get_terminal_size().columns))
    else:
        print("\n\n".join(cfg.prompt + rendered(sample, cfg) for sample in samples))
    if cfg.show_probs:
        explain(samples)
    if cfg.json:
        result = {**dataclasses.asdict(cfg), "model": source, "texts": texts}
        if cfg.show_probs:
            result["tokens"] = [
                [dict(id=p.token, text=p.text, probability=p.probability) for p in s if p.token is not None]
                for s in samples
            ]
        Path(cfg.json).write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")


def main(cfg: Config):
    check(cfg)
    cfg = dataclasses.replace(cfg, prompt=read_prompt(cfg))
    model, source = load_model(cfg.model, cfg.device)
    device = model.wte.weight.device
    dtype, _ = pick_dtype(cfg.dtype, device)
    cast_linears(model, dtype)
    if cfg.compile:
        model.hidden = torch.compile(model.hidden)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if cfg.interactive:
            converse(model, source, cfg)
        else:
            complete(model, source, cfg)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, say `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
