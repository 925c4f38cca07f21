"""Stage 4: text from a model.

    python generate.py --prompt "The sun is"            # the newest checkpoint under log/
    python generate.py --model gpt2 --prompt "The sun is" --temperature 0 --max-tokens 50
    cat story.txt | python generate.py --stop "The end" --num-samples 3
    python generate.py --prompt-file prompts.txt --each-line --json texts.json    # a prompt per line
    python generate.py --interactive                    # you and the model take turns at one text

Standard output is the prompt and its continuation, nothing else. A single text is printed while it is
generated. Several are generated in batches and separated by empty lines. The default temperature and top-k
are cautious, for small models.
"""

import lib.startup  # noqa: F401

import codecs
import dataclasses
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from lib import cli, console, documents, files, terminal, tokenizer
from lib.checkpoint import load_model
from lib.decoding import speed_up
from lib.device import autocast, cast_linears, pick_dtype
from model import GPT

# The settings that /set changes in a conversation.
SETTINGS = (
    "max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed", "special_tokens",
    "show_probs",
)  # fmt: skip

WELCOME = "Type a beginning and press Enter; Ctrl-C stops a text, Ctrl-D ends, /help lists commands."
COMMANDS = """\
/set NAME VALUE   change a setting, as its flag does: /set temperature 0.7, /set stop "\\n", /set show-probs
                  (and back: /set stop "", /set no-show-probs)
/show             the settings
/reset            forget the text so far
/help             this list
/quit, /exit      end
Ctrl-C stops a text, Ctrl-D ends. A line that begins with / is a command, with a blank before it a text."""

BATCH_ROWS, CACHE_BYTES = 64, 5e9  # of prompts by lines: texts at once, and memory of their key-value caches

Stops = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Config:
    # model
    model: cli.PathName = cli.knob(
        "", "a checkpoint, run folder, size (gpt2) or Hub id; by default the newest run"
    )
    device: str = cli.knob("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: cli.Dtype = cli.knob(
        "float32", "precision of the matrix products, auto for the fastest; logits are always float32"
    )
    compile: bool = cli.knob(False, "slower start, then faster: a CUDA graph, elsewhere torch.compile")
    # prompt
    prompt: str = cli.knob("Hello, I'm a language model,", "the text to continue; without it, a pipe's text")
    prompt_file: cli.PathName = cli.knob(
        "", "a file with the prompt; - for standard input; a trailing newline is left out"
    )
    each_line: bool = cli.knob(False, "each line of --prompt-file, or of a pipe, is a prompt of its own")
    interactive: bool = cli.knob(False, "continue each line that is typed; the context is the whole text")
    # sampling
    max_tokens: int = cli.knob(128, "tokens to add, at most; <|endoftext|> ends a text earlier", at_least=1)
    temperature: float = cli.knob(0.8, "0 takes the likeliest token; 1 samples as trained; higher is wilder")
    top_k: int = cli.knob(50, "choose among this many likeliest tokens; 0 for all", at_least=0)
    top_p: float = cli.knob(1.0, "choose among the likeliest tokens of this joint probability; 1 for all")
    repetition_penalty: float = cli.knob(1.0, "above 1, makes repeats less likely (1.2 is usual)", above=0)
    stop: Stops = cli.knob((), "end before this text (\\n is a newline)")
    num_samples: int = cli.knob(1, "continuations of the same prompt", at_least=1)
    seed: int = cli.knob(0, "the same seed gives the same text on the same machine")
    # tokens and files
    special_tokens: bool = cli.knob(False, "read <|endoftext|> in the prompt as the control token")
    show_probs: bool = cli.knob(
        False,
        "colour each token by its probability in the model, before penalty, temperature, top-k and top-p; "
        "without colours (NO_COLOR, no terminal), a table on standard error; --json has them, too",
    )
    json: cli.PathName = cli.knob("", "also write prompt, settings and texts to this file")


def check(cfg: Config):
    """Raises ValueError for a value that cannot work."""
    cli.check_bounds(cfg)
    files.check_target(cfg.json)
    if not (cfg.temperature == 0 or cfg.temperature >= 0.01):
        raise ValueError(f"--temperature is {cfg.temperature}; it must be 0 (greedy) or at least 0.01")
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"--top-p is {cfg.top_p}; it must be above 0 and at most 1")
    if cfg.prompt_file and has_prompt(cfg):
        raise ValueError("--prompt and --prompt-file are two prompts: leave one out")
    for name in ("prompt", "prompt_file", "each_line", "num_samples", "json"):
        if cfg.interactive and getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--interactive makes one text from typed lines: leave {cli.flag(name)} out")
    if cfg.each_line and has_prompt(cfg):
        raise ValueError("--each-line takes the lines of a file or a pipe: leave --prompt out")


def has_prompt(cfg: Config) -> bool:
    """Whether --prompt was given, be it with the default's words: only the default is the same object."""
    return cfg.prompt is not Config.prompt


def read_prompts(cfg: Config) -> list[str]:
    """The text to continue, or with --each-line the texts: of --prompt-file, else --prompt, else a pipe, else
    the default. Raises OSError for a file that cannot be read, ValueError if it is not a text."""
    text, is_piped = "", cfg.prompt_file == "-" or (not has_prompt(cfg) and terminal.is_piped())
    if cfg.prompt_file not in ("", "-"):
        text = documents.read_text(Path(cfg.prompt_file))
    elif is_piped:
        text = "".join(documents.decode_text(terminal.read_pipe(), Path("-")))
    if cfg.each_line and not text:
        name = cfg.prompt_file or ("standard input" if is_piped else "")
        reason = f"{name} is empty" if name else "there are none"
        raise ValueError(f"--each-line needs lines, and {reason}: give --prompt-file FILE, or pipe them in")
    if cfg.each_line:
        return text.removesuffix("\n").split("\n")
    return [text.removesuffix("\n") if text or cfg.prompt_file else cfg.prompt]


def encode_prompt(prompt: str, cfg: Config) -> list[int]:
    """The prompt's ids; <|endoftext|>, after which a new text begins, if the prompt is empty."""
    return tokenizer.encode(prompt, special=cfg.special_tokens) or [tokenizer.END_OF_TEXT]


# -----------------------------------------------------------------------------
# tokens become text


class Piece(NamedTuple):
    """The text that a token adds: none as long as its character is incomplete."""

    id: int | None  # None for the replacement character of an incomplete last character
    text: str
    probability: float


class Sample:
    """A continuation while it is generated: takes tokens, returns pieces of text. It ends at <|endoftext|>
    or before the first complete stop string. Tokens that may begin a stop string are held back."""

    def __init__(self, stops: Sequence[str] = ()):
        self.stops = [stop.replace("\\n", "\n") for stop in stops if stop]
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held: list[Piece] = []
        self.done = False

    def add(self, token: int, probability: float) -> list[Piece]:
        """Takes the next token. Returns the pieces that no stop string can contain any more."""
        if self.done:
            return []
        if token == tokenizer.END_OF_TEXT:
            return self.end()
        self.held.append(Piece(token, self.utf8.decode(tokenizer.decode_bytes([token])), probability))
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
        """Removes and returns the held pieces that lie within the first `size` characters."""
        taken = []
        while self.held and len(self.held[0].text) <= size:
            taken.append(self.held.pop(0))
            size -= len(taken[-1].text)
        return taken

    def end(self) -> list[Piece]:
        """Ends the text. Returns the pieces that were held back."""
        if self.done:
            return []
        self.done, rest = True, self.utf8.decode(b"", final=True)
        return self.held + ([Piece(None, rest, 0.0)] if rest else [])


def stream_pieces(model: GPT, prompts: list[list[int]], cfg: Config) -> Iterator[list[list[Piece]]]:
    """Continues prompts of equal length, as one batch. Yields, for each step, the new pieces of each."""
    device = model.wte.weight.device
    samples = [Sample(cfg.stop) for _ in prompts]
    idx = torch.tensor(prompts, device=device)
    generator = torch.Generator(device=device).manual_seed(cfg.seed)
    choice = (cfg.temperature, cfg.top_k or None, cfg.top_p, cfg.repetition_penalty)
    for tokens, logits in model.stream_with_logits(idx, cfg.max_tokens, *choice, generator=generator):
        probabilities = torch.zeros(len(samples))
        if cfg.show_probs:
            probabilities = logits.softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        new = zip(samples, tokens.tolist(), probabilities.tolist())
        yield [sample.add(token, probability) for sample, token, probability in new]
        if all(sample.done for sample in samples):
            return
    yield [sample.end() for sample in samples]


def render(pieces: list[Piece], cfg: Config) -> str:
    """The pieces' text, coloured if --show-probs asks for it and the terminal has colours."""
    if cfg.show_probs and console.has_colours():
        return "".join(terminal.colour(piece.text, piece.probability) for piece in pieces if piece.text)
    return "".join(piece.text for piece in pieces)


def print_probabilities(samples: list[list[Piece]]):
    """Prints on standard error the colours' legend or, without colours, a table of probabilities."""
    if console.has_colours():
        print("probability in the model:", terminal.format_legend(), file=sys.stderr)
        return
    for number, pieces in enumerate(samples, 1):
        print(f"sample {number}: probability in the model, id, token", file=sys.stderr)
        for piece in pieces:
            if piece.id is not None:
                token = tokenizer.decode([piece.id])
                print(f"{piece.probability:9.3g}  {piece.id:5}  {token!r}", file=sys.stderr)


# -----------------------------------------------------------------------------
# a prompt, or a conversation


def divide_prompts(model: GPT, prompts: list[list[int]], cfg: Config) -> Iterator[list[int]]:
    """Yields the places of the prompts of each batch. They have the same number of tokens: without padding,
    each text is the one that its prompt alone would get."""
    by_length: dict[int, list[int]] = {}
    for place, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(place)
    shape = model.config
    row_bytes = 2 * 4 * shape.n_layer * shape.n_embd * shape.block_size
    count = max(1, min(BATCH_ROWS, int(CACHE_BYTES / row_bytes)) // cfg.num_samples)
    for places in by_length.values():
        yield from (places[i : i + count] for i in range(0, len(places), count))


def complete(model: GPT, source: str, prompts: list[str], cfg: Config):
    """Prints each prompt and its continuations, in order; writes --json."""
    is_single = len(prompts) == cfg.num_samples == 1
    made: dict[int, list[list[Piece]]] = {}  # by the prompt's place, its samples
    encoded, printed = [encode_prompt(prompt, cfg) for prompt in prompts], 0
    if is_single:
        print(prompts[0], end="", flush=True)
    for number, places in enumerate(divide_prompts(model, encoded, cfg)):
        rows = [encoded[place] for place in places for _ in range(cfg.num_samples)]
        samples: list[list[Piece]] = [[] for _ in rows]
        for new in stream_pieces(model, rows, dataclasses.replace(cfg, seed=cfg.seed + number)):
            for sample, pieces in zip(samples, new):
                sample += pieces
            if is_single:
                print(render(new[0], cfg), end="", flush=True)
        made |= {place: [samples.pop(0) for _ in range(cfg.num_samples)] for place in places}
        while printed in made and not is_single:  # all before it have been printed
            texts = [prompts[printed] + render(sample, cfg) for sample in made[printed]]
            print("\n" if printed else "", "\n\n".join(texts), sep="", flush=True)
            printed += 1
    if is_single:
        print()
    if cfg.show_probs:
        print_probabilities([sample for place in range(len(prompts)) for sample in made[place]])
    if cfg.json:
        entries = [describe_texts(prompt, made[place], cfg) for place, prompt in enumerate(prompts)]
        result = {**dataclasses.asdict(cfg), "model": source}
        if cfg.each_line:
            del result["prompt"]
            entries = [{"prompts": entries}]
        files.write_json(Path(cfg.json), result | entries[0])


def describe_texts(prompt: str, samples: list[list[Piece]], cfg: Config) -> dict[str, Any]:
    """The entry of a prompt in --json: prompt, texts and, with --show-probs, their tokens."""
    texts = [prompt + "".join(piece.text for piece in sample) for sample in samples]
    tokens = [[piece._asdict() for piece in sample if piece.id is not None] for sample in samples]
    return {"prompt": prompt, "texts": texts} | ({"tokens": tokens} if cfg.show_probs else {})


def converse(model: GPT, source: str, cfg: Config):
    """Reads lines until they end, obeys commands, and continues the text of the user and the model."""
    print(WELCOME, file=sys.stderr)
    text, turns = "", itertools.count(1)
    for line in terminal.read_lines():
        if line.startswith("/"):
            command, *words = line.split(maxsplit=1)
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                text = ""
            elif command == "/set" and words:
                cfg = change_setting(cfg, words[0])
            elif command == "/show":
                settings = [f"{name.replace('_', '-')} {getattr(cfg, name)}" for name in SETTINGS]
                print(f"model {source}", *settings, sep="\n", file=sys.stderr)
            else:
                wrong = "" if command == "/help" else f"{line} is no command. There are:\n"
                print(wrong + COMMANDS, file=sys.stderr)
        elif line:
            text += ("\n" if text else "") + line
            print(line, end="", flush=True)
            text += take_turn(model, text, dataclasses.replace(cfg, seed=cfg.seed + next(turns)))


def take_turn(model: GPT, text: str, cfg: Config) -> str:
    """Prints the continuation of the text, up to its end or Ctrl-C. Returns it."""
    made: list[Piece] = []
    try:
        for (pieces,) in stream_pieces(model, [encode_prompt(text, cfg)], cfg):
            print(render(pieces, cfg), end="", flush=True)
            made += pieces
    except KeyboardInterrupt:
        pass
    print()
    if cfg.show_probs:
        print_probabilities([made])
    return "".join(piece.text for piece in made)


def change_setting(cfg: Config, words: str) -> Config:
    """cfg after `/set words`. Prints the flag's message for a value that the flag refuses."""
    try:
        name, *values = shlex.split(words)
        flag, setting = f"--{name.lstrip('-')}", re.sub("^-*(no-)?|=.*", "", name).replace("-", "_")
        if setting not in SETTINGS:
            raise ValueError(f"{flag} is no setting of a conversation; /show lists them")
        # The default's stop strings are left out because a repeated flag adds to them; /set replaces them.
        args = [arg for value in values for arg in (flag, value)] or [flag]
        new = cli.parse(Config, None, args, dataclasses.replace(cfg, stop=()))
        new = dataclasses.replace(new, stop=new.stop or cfg.stop)
        check(new)
        return new
    except ValueError as error:
        print(error, file=sys.stderr)
    except SystemExit:  # cli.parse has printed the reason
        pass
    return cfg


def read_flags(argv: list[str]) -> Config:
    """A command line as a configuration. Raises ValueError for a text that no flag takes."""
    switches = [field.name for field in dataclasses.fields(Config) if isinstance(field.default, bool)]
    for before, word in zip(["", *argv], argv):
        name = re.sub("^--(no-)?", "", before).replace("-", "_")
        # A word after an unknown flag is left to that flag's message.
        is_value = before.startswith("--") and "=" not in before and name not in switches
        if not word.startswith("-") and not is_value:
            command = cli.format_command("generate.py", "--prompt", word)
            raise ValueError(f"{word!r} has no flag before it; to continue this text: {command}")
    return cli.parse(Config, __doc__, argv)


def main(cfg: Config):
    check(cfg)
    prompts = [] if cfg.interactive else read_prompts(cfg)
    model, source = load_model(cfg.model, cfg.device)
    if Path(source) != Path(cfg.model):
        print(f"model: {cli.format_path(source)}", file=sys.stderr)
    device = model.wte.weight.device
    dtype, _ = pick_dtype(cfg.dtype, device)
    cast_linears(model, dtype)
    if cfg.compile:
        speed_up(model)
    with autocast(device, dtype):
        if cfg.interactive:
            converse(model, source, cfg)
        else:
            complete(model, source, prompts, cfg)


if __name__ == "__main__":
    cli.run(lambda: main(read_flags(sys.argv[1:])))
