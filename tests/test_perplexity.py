"""perplexity.py: against Hugging Face's strided recipe and figures worked out by hand; what it refuses."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, VOCAB_SIZE, random_model, run_script, save_checkpoint
from transformers import AutoModelForCausalLM

import perplexity
import tokenizer
from perplexity import Config

CONTEXT = 32
TEXT = "The naïve café — 日本語 — is open.\nIt opens at 8:30 and it\u00a0closes, 🙂 some say, at noon.  " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = random_model(vocab_size=VOCAB_SIZE, block_size=CONTEXT)
    return save_checkpoint(tmp_path_factory.mktemp("run"), model)


def write_text(tmp_path: Path, text: str = TEXT) -> str:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
    return str(tmp_path / "text.txt")


def shard(folder: Path, name: str, documents: list[str]):
    folder.mkdir(exist_ok=True)
    ids = [id for document in documents for id in (50256, *tokenizer.encode(document))]
    np.save(folder / name, np.array(ids, dtype=np.uint16))


@torch.no_grad()
def strided_recipe(folder: Path, ids: list[int], stride: int) -> tuple[float, int]:
    """Hugging Face's "Perplexity of fixed-length models" with transformers' model: windows a stride apart,
    of which only what the window before did not reach is counted. Total nats, and tokens counted."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count, reached = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + CONTEXT, len(ids))
        logp = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(dim=-1)
        for position in range(max(reached, begin + 1), end):  # a window's first token has nothing before it
            total -= logp[position - 1 - begin, ids[position]].item()
            count += 1
        reached = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize("stride", [1, 7, 16, 31, CONTEXT])
@pytest.mark.parametrize("length", [2, 20, CONTEXT, CONTEXT + 1, 2 * CONTEXT + 1, 110])
def test_the_figures_are_those_of_hugging_faces_strided_recipe(folder, stride, length):
    ids = tokenizer.encode(TEXT)[:length]
    assert len(ids) == length
    model, _ = perplexity.load_model(str(folder), "cpu")
    expected, tokens = strided_recipe(folder, ids, stride)
    for batch_size in (1, 3):
        total, count = perplexity.total_nll(model, np.array(ids, dtype=np.uint16), stride, batch_size)
        assert count == tokens
        assert total == pytest.approx(expected, rel=1e-5)


def test_the_command_gives_token_word_and_byte_figures(folder, tmp_path):
    data, out = write_text(tmp_path), tmp_path / "out.json"
    done = run_script(
        *("perplexity.py", "--model", str(folder), "--data", data, "--device", "cpu"),
        *("--stride", "10", "--json", str(out)),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    ids = tokenizer.encode(TEXT)
    total, count = strided_recipe(folder, ids, 10)
    assert count == len(ids) - 1 == result["tokens"]
    assert (result["model"], result["data"]) == (str(folder), data)
    assert (result["context"], result["stride"]) == (CONTEXT, 10)
    assert result["words"] == len(TEXT.split())
    assert result["bytes"] == len(TEXT.encode())
    assert result["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["word_perplexity"] == pytest.approx(math.exp(total / result["words"]), rel=1e-3)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"], rel=1e-5)
    for figure in ("token_perplexity", "word_perplexity"):
        assert f"{result[figure]:.2f}" in done.stdout
    assert f"{result['bits_per_byte']:.4f}" in done.stdout and "stride 10" in done.stdout


def test_without_overlap_the_unscored_first_tokens_count_as_the_average(folder, tmp_path, capsys):
    cfg = Config(data=write_text(tmp_path), model=str(folder), device="cpu", stride=CONTEXT)
    result = perplexity.main(cfg)
    ids = tokenizer.encode(TEXT)
    total, count = strided_recipe(folder, ids, CONTEXT)
    assert result["tokens"] == count == len(ids) - math.ceil(len(ids) / CONTEXT)
    expected = total / count * (len(ids) - 1) / math.log(2) / len(TEXT.encode())
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert str(count) in capsys.readouterr().out


def test_the_stride_is_half_a_context_by_default_and_a_limit_cuts_the_text(folder, tmp_path):
    cfg = Config(data=write_text(tmp_path), model=str(folder), device="cpu", limit=50)
    result = perplexity.main(cfg)
    ids = tokenizer.encode(TEXT)[:50]
    total, count = strided_recipe(folder, ids, CONTEXT // 2)
    assert (result["stride"], result["tokens"]) == (CONTEXT // 2, 49)
    assert result["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["bytes"] == len(tokenizer.decode_bytes(ids))


def test_a_split_of_shards_is_scored_as_one_stream_and_counted_document_by_document(folder, tmp_path):
    documents = ["one two", "three four", "five"]
    shard(tmp_path / "data", "tiny_val_000000.npy", documents[:2])
    shard(tmp_path / "data", "tiny_val_000001.npy", documents[2:])
    shard(tmp_path / "data", "tiny_train_000000.npy", ["not this"])
    result = perplexity.main(Config(data=str(tmp_path / "data"), model=str(folder), device="cpu"))
    ids = [id for document in documents for id in (50256, *tokenizer.encode(document))]
    total, count = strided_recipe(folder, ids, CONTEXT // 2)
    assert result["tokens"] == count == len(ids) - 1
    assert result["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["bytes"] == sum(len(document) for document in documents)
    assert result["words"] == 5
    cfg = Config(data=str(tmp_path / "data"), model=str(folder), device="cpu", split="train")
    assert perplexity.main(cfg)["words"] == 2


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (dict(data="nowhere.txt"), ["nowhere.txt"]),
        (dict(data="{tmp}/short.txt"), ["short.txt", "1 tokens"]),
        (dict(data="{tmp}/latin1.txt"), []),
        (dict(data="{tmp}/text.txt", stride="33"), ["--stride is 33", "32"]),
        (dict(data="{tmp}/text.txt", stride="-1"), ["--stride is -1"]),
        (dict(data="{tmp}/text.txt", batch_size="0"), ["batch-size", "0"]),
        (dict(data="{tmp}/text.txt", batch_size="-2"), ["batch-size", "-2"]),
        (dict(data="{tmp}/text.txt", limit="-5"), ["limit", "-5"]),
        (dict(data="{tmp}/shards", split="test"), ["shards", "'test'"]),
        (dict(data="{tmp}/empty"), ["empty", "fineweb.py"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_scored_exits_2_with_the_reason(
    folder, tmp_path, monkeypatch, capsys, options, reasons
):
    write_text(tmp_path)
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    shard(tmp_path / "shards", "tiny_val_000000.npy", ["one two"])
    args = [f"--{name.replace('_', '-')}={value.format(tmp=tmp_path)}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["perplexity.py", "--model", str(folder), "--device", "cpu", *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "perplexity.py"), run_name="__main__")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for reason in ["perplexity.py: ", *reasons]:
        assert reason in message
