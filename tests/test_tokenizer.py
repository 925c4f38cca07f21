"""tokenizer.py: three encoders with the same ids, exact round trips, control tokens, Hugging Face's files."""

import base64

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from lib import tokenizer

END = tokenizer.END_OF_TEXT_STRING

# GPT-2's regular expression treats these specially; they are drawn often.
PIECES = ["'s", "'ll", "'RE", "don't", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\x1c", "\x85", "0"]
PIECES += ["12345", "½", "٣", "the", " The", "naïve", "日本語", "🙂", "e\u0301", "!!!", " ...", "_", "\0"]
PIECES += [END, " " + END]
# Unassigned characters are left out: the tokenizers disagree about the letters of Unicode 17.
assigned = st.characters(exclude_categories=["Cs", "Cn"])
texts = st.one_of(
    st.text(assigned),
    st.text(alphabet=st.characters(codec="ascii")),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(assigned, max_size=3))).map("".join),
)
with_surrogates = st.text(alphabet=st.one_of(assigned, st.characters(categories=["Cs"])))
AWKWARD = ["", "\0", "a\0b\n\0", "\ufeffx", "\uffff", " ", "\n\n  x", "x" * 3000, "e" + "\u0301" * 300]
AWKWARD += [END, END * 2]


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    """OpenAI's GPT-2 encoding, from the ranks file and OpenAI's own pattern, without our module."""
    lines = tokenizer.RANKS_FILE.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


def split_stream(stream: np.ndarray) -> list[list[int]]:
    """Splits a stream of encode_corpus into documents, without the 50256 before each."""
    return [part[1:].tolist() for part in np.split(stream, np.flatnonzero(stream == 50256))[1:]]


def from_corpus(text: str) -> list[int]:
    first, *ids = tokenizer.encode_corpus([text]).tolist()
    assert first == 50256
    return ids


ENCODERS = [tokenizer.encode, tokenizer.encode_from_scratch, from_corpus]


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [15496, 11, 995, 0]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("", []),
        ("  two", [220, 734]),
    ],
)
def test_published_ids(encode, text, ids):
    assert encode(text) == ids


@settings(max_examples=150, deadline=None)
@given(texts)
def test_own_merge_tiktoken_and_gigatoken_give_the_same_ids(reference, text):
    expected = reference.encode_ordinary(text)
    assert tokenizer.encode_from_scratch(text) == expected
    assert tokenizer.encode(text) == expected
    assert from_corpus(text) == expected


@pytest.mark.parametrize("text", ["\U000323b0's", "\u088f1\ua7cea"])
def test_letters_of_unicode_17_may_be_cut_otherwise_but_nothing_is_lost(text):
    assert tokenizer.decode(from_corpus(text)) == tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.fault(19)
def test_awkward_texts_give_the_same_ids_and_come_back(reference, text):
    for encode in ENCODERS:
        assert encode(text) == reference.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(texts)
def test_decode_undoes_encode(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode("utf-8")


@settings(max_examples=50, deadline=None)
@given(with_surrogates)
@pytest.mark.fault(19)
def test_texts_with_surrogates_are_encoded_alike_and_decode_to_valid_text(text):
    ids = tokenizer.encode(text)
    assert tokenizer.encode_from_scratch(text) == from_corpus(text) == ids
    assert tokenizer.decode(ids) == tokenizer.replace_surrogates(text)
    tokenizer.decode(ids).encode("utf-8")


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("\ud800", "\ufffd"),
        ("\udfff!", "\ufffd!"),
        ("a\ud83db", "a\ufffdb"),
        ("\ude42\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ude42", "🙂"),
    ],
)
def test_lone_surrogates_become_the_replacement_character_and_pairs_their_character(text, readable):
    assert tokenizer.decode(tokenizer.encode(text)) == readable
    assert tokenizer.decode(from_corpus(text)) == readable


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(texts, with_surrogates), max_size=8))
def test_a_corpus_is_each_document_after_one_end_of_text(documents):
    stream = tokenizer.encode_corpus(documents)
    assert stream.dtype == np.uint16
    assert split_stream(stream) == [tokenizer.encode(document) for document in documents]


def test_a_corpus_without_documents_is_empty():
    stream = tokenizer.encode_corpus([])
    assert stream.shape == (0,)
    assert stream.dtype == np.uint16


def test_end_of_text_is_plain_text_unless_asked_for():
    text = f"one{END}{END} two"
    assert 50256 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, special=True) == [505, 50256, 50256, 734]
    assert tokenizer.decode([505, 50256, 50256, 734]) == text


@pytest.mark.fault(19)
def test_end_of_text_in_a_document_does_not_split_it():
    stream = tokenizer.encode_corpus([f"one{END} two", END])
    assert np.flatnonzero(stream == 50256).tolist() == [0, len(tokenizer.encode(f"one{END} two")) + 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4))
def test_with_special_the_pieces_between_control_tokens_are_encoded_apart(pieces):
    pieces = [piece.replace(END, "") for piece in pieces]
    ids = tokenizer.encode(END.join(pieces), special=True)
    assert split_stream(np.array([50256, *ids])) == [tokenizer.encode(piece) for piece in pieces]


@pytest.mark.parametrize("encode", [tokenizer.encode, from_corpus])
@pytest.mark.parametrize("text", [" " * 1_000_000, "\n" * 1_000_000, " " * 1_000_000 + "x", "a" * 1_000_000])
@pytest.mark.fault(19)
def test_a_run_of_a_million_characters_is_encoded_and_comes_back(encode, text):
    ids = encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text)


def test_long_texts_have_the_ids_that_their_words_have(reference):
    text = "The quick brown fox doesn't jump over 12,345 lazy dogs.  \n" * 4000
    assert len(text) > tokenizer.LONGEST_FOR_TIKTOKEN
    assert tokenizer.encode(text) == reference.encode_ordinary(text)


def test_half_a_character_decodes_to_the_replacement_character():
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids[:1]) == "🙂".encode()[: len(tokenizer.decode_bytes(ids[:1]))]


def test_every_id_decodes_to_its_bytes(reference):
    for id in range(tokenizer.VOCAB_SIZE):
        assert tokenizer.decode_bytes([id]) == reference.decode_bytes([id])


@pytest.mark.parametrize("bad", [-1, 50257, 50303, 2**16, 2**40])
@pytest.mark.fault(16)
def test_decode_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match=f"id {bad} at position 2 .* 0 to 50256"):
        tokenizer.decode([15496, 11, bad])


@pytest.mark.parametrize("ids", [np.array([15496, 11], dtype=np.uint16), (15496, 11), iter([15496, 11])])
def test_decode_takes_any_sequence_of_ids(ids):
    assert tokenizer.decode(ids) == "Hello,"


def flip_a_rank(data: bytes) -> bytes:
    return data.replace(b"IQ== 0", b"IQ== 1", 1)


@pytest.mark.parametrize(
    "damage", [flip_a_rank, lambda data: data[:-1], lambda data: b"", lambda data: data + b"\n"]
)
@pytest.mark.parametrize(
    "use", [lambda: tokenizer.encode("Hello"), lambda: tokenizer.encode_corpus(["Hello"])]
)
def test_a_damaged_ranks_file_is_refused(tmp_path, monkeypatch, damage, use):
    file = tmp_path / "gpt2.tiktoken"
    data = tokenizer.RANKS_FILE.read_bytes()
    file.write_bytes(damage(data))
    assert file.read_bytes() != data
    caches = [tokenizer.load_ranks, tokenizer.load_tiktoken, tokenizer.load_gigatoken]
    monkeypatch.setattr(tokenizer, "RANKS_FILE", file)
    for cached in caches:
        cached.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"gpt2\.tiktoken has SHA-256 .*git checkout"):
            use()
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """The tokenizer that transformers makes of our files."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer.build_hf_files(32).items():
        (folder / name).write_text(content, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(texts.map(lambda text: text.replace(END, "")))
def test_transformers_gives_the_same_ids_and_decodes_them_back(hugging_face, text):
    ids = hugging_face(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert hugging_face.decode(ids) == text


def test_transformers_gives_what_the_model_takes_and_no_more_than_fits(hugging_face):
    assert hugging_face.model_max_length == 32
    # transformers 5 has these names by itself; 4 reads them from the file.
    assert hugging_face.init_kwargs["model_input_names"] == ["input_ids", "attention_mask"]
    assert len(hugging_face("one " * 100, truncation=True)["input_ids"]) == 32


def test_the_large_files_are_built_once():
    first, second = tokenizer.build_hf_files(16), tokenizer.build_hf_files(32)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert first[name] is second[name]


def test_transformers_knows_end_of_text(hugging_face):
    assert hugging_face.eos_token_id == hugging_face.bos_token_id == 50256
    assert len(hugging_face) == tokenizer.VOCAB_SIZE
    assert hugging_face(f"one{END} two")["input_ids"] == tokenizer.encode(f"one{END} two", special=True)
    assert hugging_face.decode([505, 50256, 734], skip_special_tokens=True) == "one two"
