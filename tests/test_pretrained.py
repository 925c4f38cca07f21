"""pretrained.py: other programs' models are read with their logits or refused; none of their code runs."""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import VOCAB_SIZE, random_model, run_script
from safetensors.torch import load_file, save_file, save_model
from test_model import random_theirs
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import train_gpt2
from lib import checkpoint, tokenizer
from lib.pretrained import config_from_hf
from model import GPT, GPTConfig, config_to_hf

SHAPE = dict(block_size=24, vocab_size=257, n_layer=3, n_head=4, n_embd=32)
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    return random_theirs(SHAPE)


def logits_of(model: torch.nn.Module, vocab_size: int = 257) -> torch.Tensor:
    idx = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = model.eval()(idx)
    return result if isinstance(result, torch.Tensor) else result.logits


def edit_json(path: Path, **entries):
    content = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    path.write_text(json.dumps(content), encoding="utf-8")


# -----------------------------------------------------------------------------
# Hugging Face directories


def rename(prefix: str, old: str = ""):
    return lambda w: {prefix + name.removeprefix(old): value for name, value in w.items()}


def without(w: dict, *names: str) -> dict:
    return {name: value for name, value in w.items() if name not in names}


def with_masks(w: dict) -> dict:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(3)}
    return rename("", "transformer.")(w) | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}


WEIGHTS = {  # what people's tools make of the weights, and what the reader says; "" if they are read
    "half": (lambda w: {name: value.half() for name, value in w.items()}, ""),
    "bfloat16": (lambda w: {name: value.bfloat16() for name, value in w.items()}, ""),
    "float64": (lambda w: {name: value.double() for name, value in w.items()}, ""),
    "OpenAI's": (with_masks, ""),
    "compiled": (rename("_orig_mod."), ""),
    "DDP": (rename("module."), ""),
    "both": (rename("module._orig_mod."), ""),
    "compiled blocks": (lambda w: {n.replace(".attn.", "._orig_mod.attn."): t for n, t in w.items()}, ""),
    "head, too": (lambda w: {**w, HEAD: w[WTE].clone()}, ""),
    "only head": (lambda w: {**without(w, WTE), HEAD: w[WTE]}, ""),
    "value head": (lambda w: {**w, "v_head.summary.weight": torch.ones(1, 32)}, ""),
    "another head": (lambda w: {**w, HEAD: w[WTE].flip(1).contiguous()}, "differs from another wte"),
    "longer head": (lambda w: {**w, HEAD: torch.cat([w[WTE], w[WTE]])}, "differs from another wte"),
    "two kinds of a name": (lambda w: {**w, "h.0.ln_1.bias": torch.ones(32)}, "h.0.ln_1.bias differs"),
    "no head at all": (lambda w: without(w, WTE), "no wte.weight"),
    "nothing": (lambda w: {"x": torch.ones(1)}, "no wte.weight"),
    "a tensor missing": (lambda w: without(w, "transformer.ln_f.bias"), "ln_f.bias"),
    "a layer more": (lambda w: {**w, "transformer.h.3.ln_1.bias": torch.ones(32)}, "h.3.ln_1.bias"),
    "adapters": (lambda w: {**w, "transformer.h.0.attn.c_attn.lora_A": torch.ones(2, 32)}, "lora_A"),
    "8 bits": (lambda w: {**w, WTE: w[WTE].to(torch.int8)}, "is torch.int8; quantised"),
    "as nn.Linear": (lambda w: {n: t.t().contiguous() if "c_" in n else t for n, t in w.items()}, "c_attn"),
}


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_read_as_transformers_reads_them_or_refused(name, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    path, (change, refusal) = tmp_path / "model.safetensors", WEIGHTS[name]
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    if refusal:
        with pytest.raises(ValueError, match=refusal) as caught:
            GPT.from_pretrained(tmp_path)
        assert str(tmp_path) in str(caught.value)
        return
    ours = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    # transformers replaces weights of compiled and wrapped modules by random ones.
    is_wrapped = name in ("compiled", "DDP", "both", "compiled blocks")
    expected = theirs if is_wrapped else GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits_of(ours), logits_of(expected), rtol=0, atol=1e-4)


def test_what_is_left_out_is_said(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "score.weight": torch.ones(2, 32)}, path)
    with pytest.warns(UserWarning, match=r"left out what GPT-2 does not have: score\.weight"):
        GPT.from_pretrained(tmp_path)


CONFIGS = {  # entries of config.json, and what the reader says
    "aliases": (dict(n_layer=None, num_hidden_layers=3, n_embd=None, hidden_size=32), ""),
    "explicit n_inner": (dict(n_inner=128), ""),
    "exact GELU": (dict(activation_function="gelu"), ""),
    "another GELU's name": (dict(activation_function="gelu_pytorch_tanh"), ""),
    "not tied, one matrix": (dict(tie_word_embeddings=False), "not both there"),
    "fewer positions": (dict(n_positions=9), "wpe"),
    "fewer tokens": (dict(vocab_size=99), "wte"),
    "fewer layers": (dict(n_layer=2), r"h\.2\."),
    "n_inner": (dict(n_inner=64), "n_inner = 64"),
    "a word": (dict(n_layer="3"), "n_layer is '3'"),
    "nothing": (dict(n_head=None), "n_head is None"),
    "quantised": (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "GPT-J": (dict(model_type="gptj"), "model_type = 'gptj'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_transformers_reads_it_or_refused(name, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    entries, refusal = CONFIGS[name]
    edit_json(tmp_path / "config.json", **entries)
    if name == "aliases":
        content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        content = {key: value for key, value in content.items() if value is not None or key == "n_inner"}
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            GPT.from_pretrained(tmp_path)
    else:
        expected = GPT2LMHeadModel.from_pretrained(tmp_path)
        torch.testing.assert_close(
            logits_of(GPT.from_pretrained(tmp_path)), logits_of(expected), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("is_equal", [True, False])
def test_an_untied_model_is_read_if_its_two_matrices_are_equal(is_equal, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    head = weights[WTE].clone() if is_equal else weights[WTE].flip(1).contiguous()
    save_file({**weights, HEAD: head}, path, metadata={"format": "pt"})
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    if is_equal:
        expected = logits_of(GPT2LMHeadModel.from_pretrained(tmp_path))
        torch.testing.assert_close(logits_of(GPT.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="differs from another wte"):
            GPT.from_pretrained(tmp_path)


INDEX = "model.safetensors.index.json"
FILES = {  # what happened to a model in parts, and what the reader says
    "whole": (lambda d: None, ""),
    "saved again in one file": (lambda d: save_model(random_theirs(SHAPE), str(d / "model.safetensors")), ""),
    "a part missing": (lambda d: sorted(d.glob("model-*"))[1].unlink(), "model-00002"),
    "no parts": (lambda d: [path.unlink() for path in d.glob("model-*")], "model-00001"),
    "a pointer of Git LFS": (lambda d: sorted(d.glob("model-*"))[1].write_text("version"), "model-00002"),
    "an empty index": (lambda d: (d / INDEX).write_text("{}"), "weight_map"),
    "an index that is a list": (lambda d: (d / INDEX).write_text("[]"), r"it is \[\]; it must be an object"),
    "an index cut off": (lambda d: (d / INDEX).write_text('{"weight_map'), "is not JSON"),
    "a list as weight_map": (lambda d: edit_json(d / INDEX, weight_map=["x"]), "weight_map"),
    "parts elsewhere": (lambda d: edit_json(d / INDEX, weight_map={"x": "../x"}), "not a file in"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "a comma too many": (lambda d: (d / "config.json").write_text('{"n_layer": 3,}'), "is not JSON"),
    "a list as config": (lambda d: (d / "config.json").write_text("[1]"), r"config\.json: it is \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_model_in_parts_is_read_or_refused_by_the_files_name(name, theirs, tmp_path):
    change, refusal = FILES[name]
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*"))) > 2
    change(tmp_path)
    if refusal:
        with pytest.raises((ValueError, FileNotFoundError), match=refusal):
            GPT.from_pretrained(tmp_path)
    else:
        torch.testing.assert_close(
            logits_of(GPT.from_pretrained(tmp_path)), logits_of(theirs), rtol=0, atol=1e-4
        )


def test_a_config_survives_the_way_to_hugging_face_and_back():
    config = GPTConfig(block_size=77, vocab_size=500, n_layer=3, n_head=5, n_embd=35, gelu="none")
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(GPT2Config().to_dict()) == GPTConfig()
    assert config_from_hf({"model_type": "gpt2", "n_inner": 3072}, dropout=0.1) == GPTConfig(dropout=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", None),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_a_config_that_is_not_gpt2_is_refused_by_entry_and_value(key, value):
    with pytest.raises(ValueError) as error:
        config_from_hf({**config_to_hf(GPTConfig()), key: value})
    assert key in str(error.value) and repr(value) in str(error.value)


def test_a_name_that_is_nothing_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"no/such/folder.*124M.*gpt2-xl"):
        GPT.from_pretrained("no/such/folder")


# -----------------------------------------------------------------------------
# tokenizers


@pytest.fixture(scope="module")
def added(tmp_path_factory) -> Path:
    """A model with GPT-2's tokens and two more, as transformers saves it."""
    folder = tmp_path_factory.mktemp("tokens") / "added"
    shape = dict(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=VOCAB_SIZE)
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3))  # type: ignore[arg-type]
    model.resize_token_embeddings(VOCAB_SIZE + 2, mean_resizing=False)
    model.generation_config.eos_token_id = VOCAB_SIZE + 1
    model.save_pretrained(folder)
    for name, text in tokenizer.build_hf_files(32).items():
        (folder / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"pad_token": "<|pad|>"})
    theirs.add_tokens(["<|end|>"])
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    theirs.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Evil"})
    return folder


def test_a_model_that_is_read_and_saved_keeps_its_tokenizer(added, tmp_path):
    GPT.from_pretrained(added).save_pretrained(tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("a<|end|>")["input_ids"] == [64, VOCAB_SIZE + 1]


def test_added_tokens_are_in_every_checkpoint_of_a_run_that_began_with_them(added, config):
    shape = dict(n_layer=None, n_head=None, n_embd=None, max_steps=2, checkpoint_every=1)
    run = train_gpt2.main(dataclasses.replace(config, init_from=str(added), **shape))
    train_gpt2.main(*train_gpt2.parse_args(["--resume", str(run / "step_000001"), "--max-steps", "3"]))
    for step in checkpoint.list_steps(run):
        theirs = AutoTokenizer.from_pretrained(step)
        assert theirs("a<|end|> b<|pad|>")["input_ids"] == [64, VOCAB_SIZE + 1, 275, VOCAB_SIZE]
        assert theirs.pad_token_id == VOCAB_SIZE and len(theirs) == VOCAB_SIZE + 2
        model = GPT2LMHeadModel.from_pretrained(step)
        assert model.config.vocab_size == VOCAB_SIZE + 2
        assert model.generation_config.eos_token_id == VOCAB_SIZE + 1
        assert "evil" not in (step / "tokenizer_config.json").read_text(encoding="utf-8")
        ours, _ = checkpoint.load_model(str(step), "cpu")
        expected = logits_of(model, VOCAB_SIZE + 2)
        torch.testing.assert_close(logits_of(ours, VOCAB_SIZE + 2), expected, rtol=0, atol=1e-4)
    assert len(checkpoint.list_steps(run)) == 3


def edit_tokenizer(folder: Path, **entries):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in entries.items():
        place = content["model"] if key in content["model"] else content
        place[key] = value(place[key]) if callable(value) else value
    path.write_text(json.dumps(content), encoding="utf-8")


def swap(vocab: dict[str, int]) -> dict[str, int]:
    return {token: {7: 8, 8: 7}.get(id, id) for token, id in vocab.items()}


TOKENIZERS = {  # changes to a tokenizer, and what the reader says
    "as it is": (lambda d: None, ""),
    "merges as texts": (lambda d: edit_tokenizer(d, merges=lambda merges: list(map(" ".join, merges))), ""),
    "older files": (lambda d: (d / "tokenizer.json").unlink(), ""),
    "none": (lambda d: [(d / name).unlink() for name in tokenizer.HF_FILES if (d / name).is_file()], ""),
    "two ids swapped": (lambda d: edit_tokenizer(d, vocab=swap), "token 7 is '\\)', not '\\('"),
    "another order": (lambda d: edit_tokenizer(d, merges=lambda m: m[::-1]), "merges come in another order"),
    "lower case": (lambda d: edit_tokenizer(d, normalizer={"type": "Lowercase"}), "Lowercase"),
    "words": (lambda d: edit_tokenizer(d, pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "unigrams": (lambda d: edit_tokenizer(d, vocab=[["a", 0.5]]), "no byte-pair tokenizer"),
    "no JSON": (lambda d: (d / "tokenizer.json").write_text("{"), "no byte-pair tokenizer"),
    "another vocab.json": (lambda d: (d / "vocab.json").write_text('{"a": 0}'), r"vocab\.json .* 0 is 'a'"),
    "other merges": (lambda d: (d / "merges.txt").write_text("#version: 0.2\na b\n"), r"merges\.txt"),
    "a list of words": (
        lambda d: [(d / "tokenizer.json").unlink(), (d / "vocab.json").rename(d / "vocab.txt")],
        r"vocab\.txt is another tokenizer's",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A model directory with GPT-2's tokenizer in its older and newer files."""
    run = tmp_path_factory.mktemp("plain")
    model = random_model(vocab_size=VOCAB_SIZE)
    files = tokenizer.build_hf_files(32)
    folder = checkpoint.save(run, 1, model.config, model.state_dict(), {"x": torch.ones(1)}, {}, files)
    for name in ("state.json", "optimizer.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_model_with_another_tokenizer_is_refused(name, plain, tmp_path):
    folder, (change, refusal) = tmp_path / "model", TOKENIZERS[name]
    shutil.copytree(plain, folder)
    change(folder)
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            checkpoint.load_model(str(folder), "cpu")
        assert isinstance(GPT.from_pretrained(folder), GPT)  # the network itself reads ids, not text
    else:
        assert checkpoint.load_model(str(folder), "cpu")[0].config.vocab_size == VOCAB_SIZE


def test_the_older_files_are_openais_and_transformers_slow_tokenizer_reads_them(plain):
    import hashlib
    import inspect

    from tiktoken_ext import openai_public

    published = inspect.getsource(openai_public.gpt2)
    for name in ("vocab.json", "merges.txt"):
        assert hashlib.sha256((plain / name).read_bytes()).hexdigest() in published
    theirs = GPT2Tokenizer(str(plain / "vocab.json"), str(plain / "merges.txt"))
    assert theirs("Hello,  naïve 🙂")["input_ids"] == tokenizer.encode("Hello,  naïve 🙂")


# -----------------------------------------------------------------------------
# nanoGPT and build-nanogpt


@dataclasses.dataclass
class NanoConfig:
    """build-nanogpt's configuration; in its files it is `__main__.GPTConfig`."""

    block_size: int = 24
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16


NanoConfig.__module__, NanoConfig.__qualname__ = "__main__", "GPTConfig"


def write_nano(path: Path, kind: str, prefix: str = "", bias: bool = True, is_zip: bool = True, **changes):
    """A file as nanoGPT or build-nanogpt writes it. Returns transformers' model of the same function."""
    shape = {**dataclasses.asdict(NanoConfig()), **changes}
    activation = {"activation_function": "gelu" if kind == "nanoGPT" else "gelu_new"}
    theirs = random_theirs(shape, **activation)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith(".bias") and not bias:
                p.zero_()
    weights = {name: t for name, t in theirs.state_dict().items() if bias or not name.endswith(".bias")}
    weights = {prefix + name: t.t() if ".c_" in name and t.dim() == 2 else t for name, t in weights.items()}
    if kind == "nanoGPT":
        args = shape | {"bias": bias, "dropout": 0.1}
        optimizer = torch.optim.AdamW(theirs.parameters()).state_dict()
        content = {"model": weights, "optimizer": optimizer, "model_args": args, "iter_num": 7}
        content |= {"best_val_loss": torch.tensor(3.1), "config": {"out_dir": "out", "dtype": "bfloat16"}}
    else:
        content = {"model": weights, "config": NanoConfig(**shape), "step": 7, "val_loss": 3.1}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return theirs


@pytest.fixture
def as_main(monkeypatch):
    """`__main__` has the GPTConfig that is pickled, as in build-nanogpt."""
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", NanoConfig, raising=False)


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="nanoGPT"),
        dict(kind="nanoGPT", prefix="_orig_mod.", bias=False),
        dict(kind="nanoGPT", vocab_size=50257, is_zip=False),
        dict(kind="build-nanogpt"),
        dict(kind="build-nanogpt", prefix="_orig_mod.", n_head=4),
    ],
)
def test_a_peers_file_gives_its_logits_here_and_in_our_checkpoint_of_it(
    options, as_main, config, tmp_path, monkeypatch
):
    path = tmp_path / "model_00007.pt"
    theirs = write_nano(path, **options)
    monkeypatch.delattr(sys.modules["__main__"], "GPTConfig")
    model, source = checkpoint.load_model(str(path), "cpu")
    assert source == str(path) and model.config.vocab_size == options.get("vocab_size", 50304)
    assert all(p.requires_grad for p in model.parameters())
    assert train_gpt2.read_flags(["--init-from", str(path)]).seq_len == model.config.block_size
    expected = logits_of(theirs, 50257)
    torch.testing.assert_close(logits_of(model, 50257), expected, rtol=0, atol=1e-4)
    shape = dict(n_layer=None, n_head=None, n_embd=None, seq_len=16, max_steps=1, checkpoint_every=1)
    run = train_gpt2.main(
        dataclasses.replace(config, init_from=str(path), learning_rate=1e-9, warmup_steps=0, **shape)
    )
    trained = GPT2LMHeadModel.from_pretrained(run / "step_000001")
    torch.testing.assert_close(logits_of(trained, 50257), expected, rtol=0, atol=1e-3)


def test_a_folder_with_a_peers_file_says_which_file_to_give(as_main, tmp_path):
    write_nano(tmp_path / "ckpt.pt", "nanoGPT")
    with pytest.raises(FileNotFoundError, match=r"give .*ckpt\.pt"):
        checkpoint.load_model(str(tmp_path), "cpu")
    done = run_script(
        "generate.py", "--model", str(tmp_path / "ckpt.pt"), "--max-tokens", "2", "--prompt", "a"
    )
    assert done.returncode == 0 and done.stdout.startswith("a"), done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": {}}, "neither model_args nor config"),
        (torch.zeros(3), "neither model_args nor config"),
        ({"model": {1: torch.zeros(3)}, "model_args": dict(SHAPE)}, "not a dict of tensors by name"),
        ({"model": {"a": [1]}, "model_args": dict(SHAPE)}, "not a dict of tensors by name"),
        ({"model": {"module": torch.zeros(3)}, "model_args": dict(SHAPE)}, "no wte.weight"),
        ({"model": {}, "model_args": {"n_layer": 2}}, "it lacks vocab_size, n_head, n_embd, block_size"),
        ({"model": {}, "config": {}}, "is not a checkpoint of nanoGPT"),
        ({"model": [], "model_args": dict(SHAPE)}, "is not a checkpoint of nanoGPT"),
        ({"model": {}, "model_args": dict(SHAPE)}, "no wte.weight"),
        ({"model": {}, "model_args": dict(SHAPE, use_rmsnorm=True)}, "use_rmsnorm"),
        ({"model": {}, "model_args": dict(SHAPE, n_layer="2")}, "n_layer is '2'"),
        ([1, 2], "is not a checkpoint of nanoGPT"),
        ({"transformer.wte.weight": torch.ones(2, 2)}, "neither model_args nor config"),
    ],
)
def test_another_file_of_torch_is_refused(content, said, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=said) as caught:
        GPT.from_pretrained(tmp_path / "x.pt")
    assert "x.pt" in str(caught.value)


def test_a_model_of_characters_is_refused(as_main, tmp_path):
    write_nano(tmp_path / "ckpt.pt", "nanoGPT", vocab_size=65)
    with pytest.raises(ValueError, match="65 tokens; GPT-2's tokenizer has 50257"):
        checkpoint.load_model(str(tmp_path / "ckpt.pt"), "cpu")


# -----------------------------------------------------------------------------
# no code runs


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class SetsState(Canary):
    """Its state is a canary."""

    def __reduce__(self):
        return (NanoConfig, (), {"n_layer": Canary(self.path)})


class CallsConfig(Canary):
    def __reduce__(self):
        return (NanoConfig, (Canary(self.path),))


@pytest.mark.fault(24)
@pytest.mark.parametrize("kind", ["model", "config", "model_args", "optimizer"])
@pytest.mark.parametrize("evil", [Canary, SetsState, CallsConfig])
@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_peers_file_is_not_run(evil, kind, is_zip, as_main, tmp_path):
    path, canary = tmp_path / "ckpt.pt", tmp_path / "canary"
    content = {"model": {}, "config": NanoConfig(), kind: evil(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    for read in (GPT.from_pretrained, lambda name: checkpoint.load_model(str(name), "cpu")):
        with pytest.raises(ValueError, match=r"ckpt\.pt is not a checkpoint of nanoGPT"):
            read(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have been


def test_a_pickled_model_in_a_directory_is_refused_and_not_opened(theirs, tmp_path):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    theirs.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        GPT.from_pretrained(folder)
    assert not canary.exists()
