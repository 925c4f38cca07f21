"""generate.py: what the command prints, equality with transformers, streaming, conversation, refusals."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, VOCAB_SIZE, random_model, run_script, save_checkpoint, scripted_model

import generate
import tokenizer
from generate import Config

MIXED = " naïve 日本語 🙂 end"  # its characters span tokens
PROMPT = "The sun is"
lm_head = generate.GPT.lm_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = random_model(vocab_size=VOCAB_SIZE, block_size=64)
    return save_checkpoint(tmp_path_factory.mktemp("run"), model)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> Path:
    """A checkpoint that goes on with MIXED, an end of text and more, after the 3 tokens of PROMPT."""
    ids = [0, 0, *tokenizer.encode(MIXED), 50256, *tokenizer.encode(" never")]
    return save_checkpoint(tmp_path_factory.mktemp("run"), scripted_model(ids))


def command(folder: Path, *args: str, stdin: str = "") -> str:
    done = run_script("generate.py", "--model", str(folder), "--device", "cpu", *args, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def continuation(folder: Path, prompt: str, **options) -> str:
    """In this process: the text that generate.py's settings give."""
    cfg = Config(**options)
    model, _ = generate.load_model(str(folder), "cpu")
    return "".join(generate.stream_text(model, generate.encode_prompt(prompt, cfg), cfg))


def test_greedy_output_is_the_prompt_and_the_text_of_transformers_pipeline(folder):
    from transformers import pipeline

    out = command(folder, "--prompt", PROMPT, "--temperature", "0", "--max-tokens", "40")
    pipe = pipeline("text-generation", model=str(folder))
    (theirs,) = pipe(PROMPT, max_new_tokens=40, do_sample=False)
    assert out == theirs["generated_text"] + "\n"
    assert out.startswith(PROMPT) and len(out) > len(PROMPT) + 40


def test_the_same_seed_gives_the_same_text_and_another_seed_another(folder):
    out = command(folder, "--prompt", PROMPT, "--max-tokens", "20", "--seed", "7")
    same, other = (continuation(folder, PROMPT, max_tokens=20, seed=seed) for seed in (7, 8))
    assert out == PROMPT + same + "\n"
    assert same != other


def generated(capsys, folder: Path, **options) -> str:
    generate.main(Config(model=str(folder), device="cpu", **options))
    return capsys.readouterr().out


def test_a_compiled_model_makes_the_same_texts_in_one_piece_whatever_their_length(folder):
    """Prompts of other lengths, and past the 64 positions, where half of the context is read anew."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, _ = generate.load_model(str(folder), "cpu")
    fast, _ = generate.load_model(str(folder), "cpu")
    fast.hidden = torch.compile(fast.hidden, backend="eager")
    for length, count in ((3, 10), (5, 10), (20, 80)):
        idx = torch.arange(length)[None] + 7
        texts = [model.generate(idx, count, temperature=0.0, stop_token=None) for model in (plain, fast)]
        assert torch.equal(*texts)
    assert not counters["graph_break"] and 2 <= counters["stats"]["unique_graphs"] <= 6


def test_the_flag_compile_compiles_and_changes_nothing(folder, capsys):
    options = dict(prompt=PROMPT, temperature=0, max_tokens=10)
    torch._dynamo.utils.counters.clear()
    assert generated(capsys, folder, compile=True, **options) == generated(capsys, folder, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_in_bfloat16_the_layers_are_cast_and_the_logits_are_not(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(generate.GPT, "lm_head", lambda self, x: seen.append(self) or lm_head(self, x))
    text = generated(capsys, folder, dtype="bfloat16", temperature=0, max_tokens=5, prompt=PROMPT)
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 5
    dtypes = {name: p.dtype for name, p in seen[0].named_parameters()}
    assert dtypes["transformer.h.0.mlp.c_fc.weight"] == torch.bfloat16
    assert dtypes["transformer.wte.weight"] == dtypes["transformer.h.0.ln_1.weight"] == torch.float32
    plain, _ = generate.load_model(str(folder), "cpu")
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.autocast("cpu", torch.bfloat16):
        exact = plain.lm_head(seen[0].hidden(ids))
        torch.testing.assert_close(
            exact, plain(ids), rtol=0, atol=1e-6
        )  # what autocast computes with float32 weights
    assert exact.dtype == torch.float32 and not torch.equal(exact, exact.bfloat16().float())


def test_several_samples_are_parted_by_an_empty_line_and_written_as_json(folder, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = dict(prompt=PROMPT, num_samples=3, max_tokens=8, temperature=1.5)
    generate.main(Config(model=str(folder), device="cpu", json=str(path), **options))  # pyright: ignore
    result = json.loads(path.read_text(encoding="utf-8"))
    assert capsys.readouterr().out == "\n\n".join(result["texts"]) + "\n"
    assert len(set(result["texts"])) == 3
    assert all(text.startswith(PROMPT) for text in result["texts"])
    assert (result["model"], result["prompt"], result["num_samples"]) == (str(folder), PROMPT, 3)
    assert (result["max_tokens"], result["temperature"], result["seed"]) == (8, 1.5, 0)


def test_the_text_ends_at_end_of_text_and_keeps_characters_that_span_tokens(scripted, tmp_path):
    path = tmp_path / "out.json"
    out = command(scripted, "--prompt", PROMPT, "--temperature", "0", "--json", str(path))
    assert out == PROMPT + MIXED + "\n"
    assert json.loads(path.read_text(encoding="utf-8"))["texts"] == [PROMPT + MIXED]


def test_text_streams_in_whole_characters_token_by_token(scripted):
    model, _ = generate.load_model(str(scripted), "cpu")
    pieces = list(generate.stream_text(model, tokenizer.encode(PROMPT), Config(temperature=0)))
    assert "".join(pieces) == MIXED
    assert len(pieces) == len(tokenizer.encode(MIXED)) + 1  # one a token, some empty, and the rest
    assert "" in pieces[:-1] and "�" not in "".join(pieces)


def test_a_text_cut_inside_a_character_ends_with_a_replacement_sign(scripted):
    ids = tokenizer.encode(MIXED)
    cut = next(n for n in range(1, len(ids)) if "�" in tokenizer.decode(ids[:n]))
    text = continuation(scripted, PROMPT, temperature=0, max_tokens=cut)
    assert text == tokenizer.decode(ids[:cut]) and text.endswith("�")


def test_samples_made_as_a_batch_end_at_end_of_text_too(scripted):
    model, _ = generate.load_model(str(scripted), "cpu")
    cfg = Config(temperature=0, num_samples=2)
    assert generate.sample_texts(model, tokenizer.encode(PROMPT), cfg) == [MIXED, MIXED]


@pytest.mark.parametrize(
    "options", [dict(top_k=1), dict(top_k=0, top_p=1e-6), dict(temperature=0, top_k=3, seed=5)]
)
def test_narrow_options_reach_the_sampler(folder, options):
    assert continuation(folder, PROMPT, **options) == continuation(folder, PROMPT, temperature=0)


def test_wide_options_reach_the_sampler(folder):
    base = dict(max_tokens=20, seed=1)
    texts = [
        continuation(folder, PROMPT, **base, **more)
        for more in (dict(), dict(temperature=3), dict(top_k=0), dict(top_p=0.3), dict(repetition_penalty=2))
    ]
    assert len(set(texts)) == len(texts)


def test_end_of_text_in_a_prompt_is_text_unless_asked_for():
    prompt = "a<|endoftext|>b"
    assert tokenizer.decode(generate.encode_prompt(prompt, Config())) == prompt
    assert 50256 not in generate.encode_prompt(prompt, Config())
    assert generate.encode_prompt(prompt, Config(special_tokens=True)) == [64, 50256, 65]
    assert generate.encode_prompt("", Config()) == [50256]


def test_an_empty_prompt_begins_a_text_of_its_own(tmp_path, capsys):
    folder = save_checkpoint(tmp_path, scripted_model([*tokenizer.encode("Once"), 50256]))
    generate.main(Config(model=str(folder), device="cpu", prompt="", temperature=0))
    assert capsys.readouterr().out == "Once\n"


def test_a_conversation_through_a_pipe_continues_the_text_so_far(folder):
    options = dict(temperature=1.5, max_tokens=5)
    flags = ("--interactive", "--temperature", "1.5", "--max-tokens", "5")
    out = command(folder, *flags, stdin="One\n\nTwo\n")
    first = "One" + continuation(folder, "One", **options, seed=1)  # each turn has its own seed
    second = continuation(folder, first + "\nTwo", **options, seed=2)
    assert second != continuation(folder, "Two", **options, seed=2)
    assert out == first + "\nTwo" + second + "\n"


def run_as_main(monkeypatch, *args: str) -> int | str | None:
    """Runs the script in this process as `python generate.py ...` does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "generate.py"), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--max-tokens", "0", "at least 1"),
        ("--temperature", "-0.5", "0 (greedy) or at least 0.01"),
        ("--temperature", "nan", "0 (greedy) or at least 0.01"),
        ("--top-k", "-1", "0 or more"),
        ("--top-p", "0.0", "above 0 and at most 1"),
        ("--top-p", "1.5", "above 0 and at most 1"),
        ("--repetition-penalty", "0.0", "above 0"),
        ("--num-samples", "0", "at least 1"),
    ],
)
def test_a_value_that_cannot_work_exits_2_with_flag_value_and_bound(monkeypatch, capsys, flag, value, reason):
    assert run_as_main(monkeypatch, flag, value) == 2
    captured = capsys.readouterr()
    assert captured.err == f"generate.py: {flag} is {value}; it must be {reason}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("args", "reasons"),
    [
        (["--temprature", "1"], ["temprature"]),
        (["--top-k", "many"], ["top-k", "many"]),
        (["--model", "no-such-model"], ["no-such-model", "124M"]),
        (["--device", "abacus", "--model", "{folder}"], ["abacus", "cuda"]),
    ],
)
def test_a_bad_flag_model_or_device_exits_2_with_the_reason(monkeypatch, capsys, folder, args, reasons):
    assert run_as_main(monkeypatch, *(arg.format(folder=folder) for arg in args)) == 2
    captured = capsys.readouterr()
    for reason in reasons:
        assert reason in captured.err
    assert captured.out == ""


def test_the_process_itself_exits_2():
    done = run_script("generate.py", "--top-p", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--top-p is 2.0" in done.stderr


def test_a_prompt_longer_than_the_context_is_continued(folder):
    prompt = "word " * 100
    model, _ = generate.load_model(str(folder), "cpu")
    last = torch.tensor([tokenizer.encode(prompt)[-64:]])
    expected = tokenizer.decode([int(model(last)[0, -1].argmax())])
    assert continuation(folder, prompt, temperature=0, max_tokens=1) == expected
