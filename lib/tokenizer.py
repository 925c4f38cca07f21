"""GPT-2's tokenizer, offline: text to ids and back, one document or a whole corpus.

    from lib import tokenizer
    tokenizer.encode("Hello, world!")                # [15496, 11, 995, 0]
    tokenizer.decode([15496, 11, 995, 0])            # 'Hello, world!'
    tokenizer.encode_corpus(["one", "two"])          # uint16 stream for a shard; 50256 precedes each document

GPT-2 uses byte-level byte-pair encoding (Radford et al., 2019, section 2.2). A regular expression cuts the
UTF-8 text into words. In each word, the adjacent pair of lowest rank is merged, until no pair is in the
vocabulary. `encode_from_scratch` is the reference, in 30 lines. tiktoken encodes one text and gigatoken a
corpus, with the same ids.

The 50,256 ranks are in assets/gpt2.tiktoken, the file that OpenAI publishes as r50k_base.tiktoken (MIT).
"""

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib import files

if TYPE_CHECKING:
    import pyarrow as pa

RANKS_FILE = files.ASSETS / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
VOCAB_SIZE = 50257
END_OF_TEXT = 50256
END_OF_TEXT_STRING = "<|endoftext|>"
HF_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
CODE = ("auto_map", "custom_generate", "trust_remote_code")  # entries that ask transformers to run code

# Contractions; a run of letters, of digits or of other signs, each with at most one space before it; white
# space, which leaves its last blank to the word that follows (openai/gpt-2, src/encoder.py).
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken's regular expression can overflow its stack on one very long run; Python cannot catch that.
LONGEST_FOR_TIKTOKEN = 100_000


@functools.lru_cache(maxsize=1)
def load_ranks() -> dict[bytes, int]:
    """Returns the vocabulary, bytes to id. A merge's id is its rank. Raises ValueError for a changed file."""
    data = RANKS_FILE.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != RANKS_SHA256:
        raise ValueError(
            f"{RANKS_FILE} has SHA-256 {found}, not {RANKS_SHA256}: restore it with git checkout"
        )
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}


def merge_bytes(word: bytes, max_rank: int = VOCAB_SIZE) -> list[bytes]:
    """Encodes one word: merges the adjacent pair of lowest rank until no pair is in the vocabulary. With
    max_rank, merges only pairs of a lower rank."""
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [(load_ranks().get(a + b, VOCAB_SIZE), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(pairs, default=(VOCAB_SIZE, 0))
        if rank >= max_rank:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def encode_from_scratch(text: str) -> list[int]:
    """Encodes by the algorithm's definition; the ids equal those of `encode`. Slow: for readers and tests."""
    import regex  # `re` has no \p{L}

    words = regex.findall(SPLIT_PATTERN, replace_surrogates(text))
    return [load_ranks()[part] for word in words for part in merge_bytes(word.encode("utf-8"))]


@functools.lru_cache(maxsize=1)
def load_tiktoken():
    import tiktoken

    ranks, special = load_ranks(), {END_OF_TEXT_STRING: END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@functools.lru_cache(maxsize=1)
def load_gigatoken():
    import gigatoken

    load_ranks()  # checks the file's hash
    return gigatoken.Tokenizer.from_tiktoken(RANKS_FILE, "gpt2")  # no special tokens: what documents need


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot hold, by U+FFFD, and each pair by its character."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode(text: str, special: bool = False) -> list[int]:
    """Encodes a text. "<|endoftext|>" in it is plain text, or with special=True the control token 50256."""
    text = replace_surrogates(text)
    if special:
        first, *rest = text.split(END_OF_TEXT_STRING)
        return encode(first) + [id for piece in rest for id in (END_OF_TEXT, *encode(piece))]
    if len(text) > LONGEST_FOR_TIKTOKEN:
        return load_gigatoken().encode(text).tolist()
    return load_tiktoken().encode_ordinary(text)


def decode(ids) -> str:
    """Decodes ids. Bytes that are not UTF-8, such as half a character, become U+FFFD. Raises ValueError for
    an id outside the vocabulary."""
    return decode_bytes(ids).decode("utf-8", errors="replace")


def decode_until_end(ids: list[int]) -> str:
    """Decodes the ids before the first <|endoftext|>, or all of them if there is none."""
    return decode(ids[: ids.index(END_OF_TEXT)] if END_OF_TEXT in ids else ids)


def decode_bytes(ids) -> bytes:
    """Returns the exact bytes of the ids. Raises ValueError for an id outside the vocabulary."""
    ids = [int(id) for id in ids]
    for position, id in enumerate(ids):
        if not 0 <= id < VOCAB_SIZE:
            raise ValueError(
                f"id {id} at position {position} is outside the vocabulary, 0 to {VOCAB_SIZE - 1}"
            )
    return load_tiktoken().decode_bytes(ids)


def encode_corpus(documents: "list[str] | pa.Array", continues: bool = False) -> np.ndarray:
    """Encodes a list or an Arrow array of strings as one uint16 stream (N,), with 50256 before each document.
    If `continues`, the first string continues an earlier document and gets none.

    RAYON_NUM_THREADS threads (by default all cores) encode; their number does not change the result. The ids
    equal those of `encode`, except near the 4,657 letters that Unicode 17 (2025) added: tiktoken 0.14 does
    not know them.
    """
    import awkward as ak
    import pyarrow as pa

    if not len(documents):
        return np.empty(0, dtype=np.uint16)
    texts: Any = documents
    if isinstance(documents, list):
        texts = pa.array(map(replace_surrogates, documents), pa.large_string())
    texts = ak.from_arrow(texts.cast(pa.large_string()).fill_null(""))  # without a copy of the text
    layout: Any = load_gigatoken().encode_batch(texts).layout
    offsets = np.asarray(layout.offsets.data, dtype=np.int64)
    ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(np.uint16)
    return np.insert(ids, offsets[1 if continues else 0 : -1] - offsets[0], END_OF_TEXT)


@functools.lru_cache(maxsize=1)
def load_letters() -> dict[int, str]:
    """Returns the character that Hugging Face writes for each byte: itself, or if it is not printable, one
    from U+0100 on (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \u00a0\u00ad"]
    moved = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}


def spell(token: bytes) -> str:
    """Returns a token as Hugging Face writes it."""
    return "".join(map(load_letters().__getitem__, token))


@functools.lru_cache(maxsize=1)
def build_vocabulary_files() -> dict[str, str]:
    """Returns tokenizer.json for the Hugging Face libraries, and OpenAI's two files, byte for byte. They are
    built once: every checkpoint has a copy."""
    vocab = {spell(token): rank for token, rank in load_ranks().items()} | {END_OF_TEXT_STRING: END_OF_TEXT}
    merges = [
        [spell(p) for p in merge_bytes(token, rank)] for token, rank in load_ranks().items() if len(token) > 1
    ]
    special = {"id": END_OF_TEXT, "content": END_OF_TEXT_STRING, "special": True, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [{**special, "single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return {
        "tokenizer.json": json.dumps(tokenizer_json, ensure_ascii=False),
        "vocab.json": json.dumps(vocab),
        "merges.txt": "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)]),
    }


def build_hf_files(positions: int, own: dict[str, str] | None = None) -> dict[str, str]:
    """Returns the tokenizer's files for transformers, by name, for a model of so many positions. `own`, of
    `read_hf_files`, take precedence."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_STRING),
        "clean_up_tokenization_spaces": False,
    }
    built = {"tokenizer_config.json": json.dumps(config, indent=2)}
    if not own or "tokenizer.json" in own:  # else transformers makes it of the older files
        built |= build_vocabulary_files()
    return built | (own or {})


def remove_code(content: dict) -> dict:
    return {key: value for key, value in content.items() if key not in CODE}


def read_hf_files(folder: Path) -> dict[str, str]:
    """Returns the tokenizer's files of a model directory, by name, and its generation_config.json: what the
    checkpoints of a run that began with it keep. Without references to code."""
    texts = {}
    for path in (folder / name for name in HF_FILES):
        if path.is_file():
            try:
                text = texts[path.name] = path.read_text(encoding="utf-8-sig")
                if path.name.endswith("config.json") and any(f'"{key}"' in text for key in CODE):
                    texts[path.name] = json.dumps(json.loads(text, object_hook=remove_code), indent=2)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error
    return texts


def check_hf_files(folder: Path, texts: dict[str, str]):
    """Raises ValueError, naming a difference, if the tokenizer of a model directory is not GPT-2's. It may
    have more tokens, from id 50257 on. A directory without tokenizer is taken to have GPT-2's."""
    tokens = [*map(spell, load_ranks()), END_OF_TEXT_STRING]
    others = [name for name in ("vocab.txt", "spiece.model", "tokenizer.model") if (folder / name).is_file()]
    if others and not texts.keys() & {"tokenizer.json", "vocab.json"}:
        raise ValueError(f"{folder / others[0]} is another tokenizer's; only GPT-2's is used here")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        try:
            theirs, merges, rules = parse_hf_file(name, texts[name]) if name in texts else (None, None, None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / name} is no byte-pair tokenizer: {error!r}") from error
        what, wrong = "", [id for id, token in enumerate(tokens) if theirs and theirs.get(id) != token]
        if theirs and wrong:
            what = f"token {wrong[0]} is {theirs.get(wrong[0])!r}, not {tokens[wrong[0]]!r}"
        elif merges and merges != tokens[256:END_OF_TEXT]:
            what = "the merges come in another order"
        elif rules and rules != (None, "ByteLevel", False, True):
            what = f"normalizer, pre_tokenizer, add_prefix_space and use_regex are {rules}"
        if what:
            raise ValueError(f"{folder / name} is not GPT-2's tokenizer, the only one used here: {what}")


def parse_hf_file(name: str, text: str) -> tuple[dict[int, str] | None, list[str] | None, tuple | None]:
    """Returns what a tokenizer's file tells: the tokens by id; the tokens that its merges make, in their
    order; the types of normalizer and pre_tokenizer, and the latter's rules."""
    if name == "merges.txt":
        lines = [line for line in text.splitlines() if line and not line.startswith("#version:")]
        return None, [line.replace(" ", "") for line in lines], None
    content = json.loads(text)
    if name == "vocab.json":
        return {id: token for token, id in content.items()}, None, None
    vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    merges = ["".join(merge).replace(" ", "") for merge in content["model"]["merges"]]  # pairs, or "a b"
    splitter = content.get("pre_tokenizer") or {}
    rules = ((content.get("normalizer") or {}).get("type"), splitter.get("type"))
    rules += (splitter.get("add_prefix_space", True), splitter.get("use_regex", True))
    return {id: token for token, id in vocab.items()}, merges, rules
