"""perplexity.py against Hugging Face's strided recipe, lm_eval, and figures computed by hand; refusals."""

import dataclasses
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import compress, prepare, to_jsonl, to_parquet
from helpers import VOCAB_SIZE, random_model, save_checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import perplexity
from lib import tokenizer
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
    each of which counts the tokens after the window before. Returns the total in nats and the tokens."""
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
        windows = perplexity.make_strided_windows(np.array(ids, dtype=np.uint16), CONTEXT, stride)
        total, count = perplexity.sum_losses(model, windows, batch_size)
        assert count == tokens
        assert total == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def guide_perplexity(folder: Path, ids: list[int], stride: int) -> float:
    """The guide's own arithmetic: transformers' mean loss of each window, with labels of -100 for the tokens
    of the window before, weighted by the number of labels less one."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, weights, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + CONTEXT, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, : before - end] = -100
        weight = int((labels != -100).sum()) - 1
        total += model(window, labels=labels).loss.double().item() * weight
        weights, before = weights + weight, end
        if end == len(ids):
            break
    return math.exp(total / weights)


@pytest.mark.parametrize(("stride", "length"), [(CONTEXT, 110), (16, CONTEXT), (16, 110), (10, 100)])
def test_the_guides_own_figure_differs_by_its_weights_alone(folder, stride, length):
    ids = tokenizer.encode(TEXT)[:length]
    model, _ = perplexity.load_model(str(folder), "cpu")
    windows = perplexity.make_strided_windows(np.array(ids, dtype=np.uint16), CONTEXT, stride)
    means, weights = [], []
    for number, window in enumerate(windows):
        total, count = perplexity.sum_losses(model, [window])
        means.append(total / count)
        weights.append(count - (number > 0 and stride < CONTEXT))
    theirs = guide_perplexity(folder, ids, stride)
    assert theirs == pytest.approx(math.exp(np.average(means, weights=weights)), rel=1e-5)
    total, count = perplexity.sum_losses(model, windows)
    is_same = stride == CONTEXT or len(windows) == 1
    assert theirs == pytest.approx(math.exp(total / count), rel=1e-5 if is_same else 0.02)


def test_the_bar_shows_the_perplexity_so_far(folder, monkeypatch):
    bars = []

    def make_bar(steps, **options) -> tqdm:
        bars.append(tqdm(steps, **{**options, "disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(perplexity, "tqdm", make_bar)
    windows = perplexity.make_rolling_windows(np.array(tokenizer.encode(TEXT)), CONTEXT)
    total, count = perplexity.sum_losses(perplexity.load_model(str(folder), "cpu")[0], windows, 2)
    assert bars[0].postfix == f"{math.exp(total / count):.2f} so far" and bars[0].n > 1


# lm_eval

LINES = [
    *("", "= Ann Example =", ""),
    'Ann Example ( born 1 @.@ 5 years ago ) said : " it \'s 1 @,@ 000 m . "',
    *("= = Early life = =", "", "She lived at 20 ° N in the ' 90s , [ in ] a well @-@ known { place } .", ""),
    *("= = = Naïve 日本語 = = =", "", "The Smiths ' house ; N houses ! Why ?", ""),
    *("= Bob ( a song ) =", "", "Bob sang = = and = it rained .", "", "= Cy =", "", "A short page ."),
]
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
ARTICLES = "".join(f" {line} \n" if line else " \n" for line in LINES)


def lm_evals_figures(folder: Path, tmp_path: Path, texts: list[str], **task) -> dict:
    """The results of the lm_eval package for a rolling task over these texts."""
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    data = tmp_path / "pages.jsonl"
    data.write_text("".join(json.dumps({"page": text}) + "\n" for text in texts), encoding="utf-8")
    config = dict(
        task="invented", dataset_path="json", test_split="test", output_type="loglikelihood_rolling",
        dataset_kwargs={"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        doc_to_text="", metric_list=[{"metric": name} for name in METRICS], **task,
    )  # fmt: skip
    make_lm: Any = huggingface.HFLM  # lm_eval's decorators hide these signatures from type checkers
    simple_evaluate: Any = evaluator.simple_evaluate
    lm = make_lm(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    return simple_evaluate(lm, tasks=[config], bootstrap_iters=0)["results"]["invented"]


def assert_same_figures(ours: dict, theirs: dict):
    ours = {**ours, "byte_perplexity": 2 ** ours["bits_per_byte"]}
    expected = [theirs[f"{name},none"] for name in METRICS]
    assert [ours[name] for name in METRICS] == pytest.approx(expected, 1e-4)


@pytest.mark.slow  # lm_eval takes ten seconds to import
@pytest.mark.parametrize("as_shards", [False, True])
def test_the_wikitext_protocol_gives_the_figures_of_lm_evals_task(folder, tmp_path, as_shards):
    from lm_eval.tasks.wikitext import preprocess_wikitext

    pages = perplexity.split_wikitext(ARTICLES)
    theirs = lm_evals_figures(
        *(folder, tmp_path, pages),
        doc_to_target=preprocess_wikitext.wikitext_detokenizer,
        process_results=preprocess_wikitext.process_results,
    )
    data = write_text(tmp_path, ARTICLES)
    if as_shards:  # documents that are no pages: these are found in the joined text
        half = ARTICLES.index("= = Early")
        shard(tmp_path / "data", "tiny_val_000000.npy", [ARTICLES[:half], ARTICLES[half:]])
        data = str(tmp_path / "data")
    cfg = Config(data=data, model=str(folder), device="cpu", protocol="wikitext", batch_size=3)
    ours = perplexity.main(cfg)
    assert_same_figures(ours, theirs)
    assert (ours["documents"], ours["stride"]) == (3, CONTEXT)
    assert ours["tokens"] == sum(len(tokenizer.encode(perplexity.detokenize(page))) for page in pages)
    assert ours["bytes"] == sum(len(page.encode()) for page in pages)


@pytest.mark.slow
def test_the_rolling_protocol_gives_lm_evals_figures_for_each_document(folder, tmp_path):
    texts = [TEXT, "one", " two words ", TEXT[:90], "a" + TEXT[:60]]
    theirs = lm_evals_figures(folder, tmp_path, texts, doc_to_target="{{page}}")
    shard(tmp_path / "data", "tiny_val_000000.npy", texts)
    cfg = Config(data=str(tmp_path / "data"), model=str(folder), device="cpu", protocol="rolling")
    ours = perplexity.main(cfg)
    assert_same_figures(ours, theirs)
    assert (ours["documents"], ours["tokens"]) == (5, sum(len(tokenizer.encode(text)) for text in texts))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 40])
def test_rolling_windows_are_lm_evals(length):
    from lm_eval.utils import get_rolling_token_windows

    ids = np.arange(100, 100 + length, dtype=np.uint16)
    theirs = get_rolling_token_windows(ids.tolist(), prefix_token=50256, max_seq_len=8, context_len=1)
    windows = perplexity.make_rolling_windows(ids, 8)
    assert [(w.tokens[:-1].tolist(), w.tokens[-w.scored :].tolist()) for w in windows] == list(theirs)


def test_text_is_detokenized_as_lm_eval_does():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    signs = [*" \n'\"()[]{}:;.!?,=°Na1", "  ", "s '", "'s", "@-@", "@,@", "@.@", "日本", "= = =", "= = = ="]
    rng = random.Random(0)
    for _ in range(2000):
        words = [rng.choice(signs) for _ in range(rng.randint(1, 25))]
        for text in ("".join(words), " ".join(words)):
            assert perplexity.detokenize(text) == wikitext_detokenizer({"page": text})


def test_pages_begin_with_headings_of_the_first_level():
    pages = perplexity.split_wikitext(ARTICLES)
    titles = [page.split("\n")[0] for page in pages]
    assert titles == [" = Ann Example = ", " = Bob ( a song ) = ", " = Cy = "]
    assert " \n" + "\n".join(pages) == ARTICLES
    assert perplexity.split_wikitext("no\nheading") == ["no\nheading"]
    assert perplexity.split_wikitext(" \n") == [" \n"]


# The command


def test_the_command_gives_token_word_and_byte_figures(script, folder, tmp_path):
    data, out = write_text(tmp_path), tmp_path / "out.json"
    words = ("--model", folder, "--data", data, "--device", "cpu", "--stride", "10", "--json", out)
    done = script("perplexity.py", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    ids = tokenizer.encode(TEXT)
    total, count = strided_recipe(folder, ids, 10)
    assert count == len(ids) - 1 == result["tokens"]
    assert (result["model"], result["data"]) == (str(folder), data)
    assert (result["protocol"], result["context"], result["stride"]) == ("stride", CONTEXT, 10)
    assert result["words"] == len(TEXT.split())
    assert result["bytes"] == len(TEXT.encode())
    assert result["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["word_perplexity"] == pytest.approx(math.exp(total / result["words"]), rel=1e-3)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"], rel=1e-5)
    for figure in ("token_perplexity", "word_perplexity"):
        assert f"{result[figure]:.2f}" in done.stdout
    assert f"{result['bits_per_byte']:.4f}" in done.stdout
    assert f"protocol stride, context {CONTEXT}, stride 10" in done.stdout


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
    ids = [id for document in documents for id in (50256, *tokenizer.encode(document))][1:]  # as of a file
    total, count = strided_recipe(folder, ids, CONTEXT // 2)
    assert result["tokens"] == count == len(ids) - 1
    assert result["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["bytes"] == sum(len(document) for document in documents)
    assert result["words"] == 5
    cfg = Config(data=str(tmp_path / "data"), model=str(folder), device="cpu", split="train")
    assert perplexity.main(cfg)["words"] == 2


@pytest.mark.parametrize("protocol", ["stride", "rolling"])
def test_a_text_has_the_same_figures_in_every_format_and_encoding(folder, tmp_path, protocol):
    text = TEXT.replace(".\n", ".\n\n")
    crlf = text.replace("\n", "\r\n")
    files = {
        "a.txt": text.encode(), "crlf.txt": crlf.encode(), "mac.TXT": text.replace("\n", "\r").encode(),
        "bom.txt": b"\xef\xbb\xbf" + text.encode(), "utf16.md": crlf.encode("utf-16"),
        "be.txt": b"\xfe\xff" + text.encode("utf-16-be"), "utf32.txt": text.encode("utf-32"),
        "a.jsonl": to_jsonl([crlf]), "a.parquet": to_parquet([crlf]), "no suffix": text.encode(),
        **{f"a{end}.txt{end}": compress(crlf.encode(), end) for end in (".gz", ".zst")},
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    prepare(tmp_path / "crlf.txt", tmp_path / "shards", val_tokens=0)
    figures = []
    for name in (*files, "shards"):
        cfg = Config(
            data=str(tmp_path / name), model=str(folder), device="cpu", protocol=protocol, split="train"
        )
        figures.append({key: value for key, value in perplexity.main(cfg).items() if key != "data"})
    assert figures[0]["bytes"] == len(text.encode())
    assert all(result == figures[0] for result in figures)


def test_a_perplexity_beyond_float64_is_infinite_and_sums_that_are_not_finite_are_refused(tmp_path, capsys):
    write_text(tmp_path)
    model = random_model(vocab_size=VOCAB_SIZE, block_size=CONTEXT)
    with torch.no_grad():
        model.wte.weight *= 1e5
    cfg = Config(data=str(tmp_path / "text.txt"), model=str(save_checkpoint(tmp_path, model)), device="cpu")
    result = perplexity.main(dataclasses.replace(cfg, json=str(tmp_path / "out.json")))
    assert result["token_perplexity"] == result["word_perplexity"] == math.inf
    assert math.isfinite(result["bits_per_byte"]) and "perplexity        inf" in capsys.readouterr().out
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["token_perplexity"] is None
    with torch.no_grad():
        model.wte.weight *= 1e25
        model.transformer["ln_f"].weight *= 1e30  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="the model's losses are not finite"):
        perplexity.main(dataclasses.replace(cfg, model=str(save_checkpoint(tmp_path, model, step=2))))


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (dict(data="nowhere.txt"), ["nowhere.txt"]),
        (dict(data="{tmp}/short.txt"), ["short.txt", "1 tokens"]),
        (dict(data="{tmp}/latin1.txt"), ["line 1: byte 0xef is not utf-8", "| iconv -t utf-8 -f latin1 >"]),
        (dict(data="{tmp}/text.txt", stride="33"), ["--stride is 33", "32"]),
        (dict(data="{tmp}/text.txt", stride="-1"), ["--stride is -1"]),
        (dict(data="{tmp}/text.txt", stride="8", protocol="wikitext"), ["--stride is 8", "wikitext"]),
        (dict(data="{tmp}/void", protocol="rolling"), ["void", "no text"]),
        (dict(data="{tmp}/text.txt", batch_size="0"), ["batch-size", "0"]),
        (dict(data="{tmp}/text.txt", batch_size="-2"), ["batch-size", "-2"]),
        (dict(data="{tmp}/text.txt", limit="-5"), ["limit", "-5"]),
        (dict(data="{tmp}/shards", split="test"), ["shards", "'test'"]),
        (dict(data="{tmp}/empty"), ["empty", "fineweb.py"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_scored_exits_2_with_the_reason(script, folder, tmp_path, options, reasons):
    write_text(tmp_path)
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    shard(tmp_path / "shards", "tiny_val_000000.npy", ["one two"])
    shard(tmp_path / "void", "tiny_val_000000.npy", ["", ""])
    args = [f"--{name.replace('_', '-')}={value.format(tmp=tmp_path)}" for name, value in options.items()]
    done = script("perplexity.py", "--model", folder, "--device", "cpu", *args)
    assert done.returncode == 2
    assert not [reason for reason in ["perplexity.py: ", *reasons] if reason not in done.stderr]


def test_dtype_is_the_precision_of_the_products_and_is_said(folder, tmp_path, capsys):
    cfg = Config(data=write_text(tmp_path), model=str(folder), device="cpu")
    exact = perplexity.main(cfg)
    rough = perplexity.main(dataclasses.replace(cfg, dtype="bfloat16", json=str(tmp_path / "out.json")))
    assert (exact["dtype"], rough["dtype"]) == ("float32", "bfloat16")
    assert rough["token_perplexity"] == pytest.approx(exact["token_perplexity"], rel=0.01)
    assert rough["token_perplexity"] != exact["token_perplexity"]
    assert ", bfloat16\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
