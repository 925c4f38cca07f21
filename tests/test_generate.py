"""generate.py: what the command prints, equality with transformers, stop strings, probabilities, refusals; a
conversation through a pipe (on a terminal: test_terminal.py)."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, VOCAB_SIZE, random_model, run_script, save_checkpoint, scripted_model

import generate
from generate import Config
from lib import tokenizer

MIXED = " naïve 日本語 🙂 end"  # its characters span tokens
PROMPT = "The sun is"
lm_head = generate.GPT.lm_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = random_model(vocab_size=VOCAB_SIZE, block_size=64)
    return save_checkpoint(tmp_path_factory.mktemp("run"), model)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> Path:
    """A checkpoint that continues the 3 tokens of PROMPT with MIXED, an end of text, and more."""
    ids = [0, 0, *tokenizer.encode(MIXED), 50256, *tokenizer.encode(" never")]
    return save_checkpoint(tmp_path_factory.mktemp("run"), scripted_model(ids))


@pytest.fixture
def command(script) -> Callable[..., str]:
    """Runs generate.py with a checkpoint; returns what it prints."""

    def command(folder: Path, *args: str, stdin: str = "") -> str:
        done = script("generate.py", "--model", folder, "--device", "cpu", *args, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return command


def continuation(folder: Path, prompt: str, **options) -> str:
    """The text that generate.py makes with these settings, in this process."""
    cfg = Config(**options)
    model, _ = generate.load_model(str(folder), "cpu")
    return "".join(piece.text for piece in pieces_of(model, prompt, cfg))


def pieces_of(model: generate.GPT, prompt: str, cfg: Config) -> list[generate.Piece]:
    steps = generate.stream_pieces(model, [generate.encode_prompt(prompt, cfg)], cfg)
    return [piece for (pieces,) in steps for piece in pieces]


def test_greedy_output_is_the_prompt_and_the_text_of_transformers_pipeline(command, folder):
    from transformers import pipeline

    out = command(folder, "--prompt", PROMPT, "--temperature", "0", "--max-tokens", "40")
    pipe = pipeline("text-generation", model=str(folder))
    (theirs,) = pipe(PROMPT, max_new_tokens=40, do_sample=False)
    assert out == theirs["generated_text"] + "\n"
    assert out.startswith(PROMPT) and len(out) > len(PROMPT) + 40


def test_the_same_seed_gives_the_same_text_and_another_seed_another(command, folder):
    out = command(folder, "--prompt", PROMPT, "--max-tokens", "20", "--seed", "7")
    same, other = (continuation(folder, PROMPT, max_tokens=20, seed=seed) for seed in (7, 8))
    assert out == PROMPT + same + "\n"
    assert same != other


def generated(capsys, folder: Path, **options) -> str:
    generate.main(Config(model=str(folder), device="cpu", **options))
    return capsys.readouterr().out


def test_a_compiled_model_makes_the_same_texts_in_one_piece_whatever_their_length(folder):
    """Several lengths of prompts; texts past the 64 positions, where half of the context is read again."""
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


@pytest.mark.slow
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
        torch.testing.assert_close(exact, plain(ids), rtol=0, atol=1e-6)  # autocast with float32 weights
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


def test_the_text_ends_at_end_of_text_and_keeps_characters_that_span_tokens(command, scripted, tmp_path):
    path = tmp_path / "out.json"
    out = command(scripted, "--prompt", PROMPT, "--temperature", "0", "--json", str(path))
    assert out == PROMPT + MIXED + "\n"
    assert json.loads(path.read_text(encoding="utf-8"))["texts"] == [PROMPT + MIXED]


def test_text_streams_in_whole_characters_token_by_token(scripted):
    model, _ = generate.load_model(str(scripted), "cpu")
    pieces = pieces_of(model, PROMPT, Config(temperature=0))
    assert "".join(piece.text for piece in pieces) == MIXED
    assert [piece.id for piece in pieces] == tokenizer.encode(MIXED)  # some with no text yet
    assert "" in [piece.text for piece in pieces] and "�" not in "".join(piece.text for piece in pieces)


def test_a_text_cut_inside_a_character_ends_with_a_replacement_sign(scripted):
    ids = tokenizer.encode(MIXED)
    cut = next(n for n in range(1, len(ids)) if "�" in tokenizer.decode(ids[:n]))
    text = continuation(scripted, PROMPT, temperature=0, max_tokens=cut)
    assert text == tokenizer.decode(ids[:cut]) and text.endswith("�")


# Stop strings


def before_the_stop(text: str, stops: list[str]) -> str:
    """The definition: character by character, until one of the stop strings is complete."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one two three", ["two"]),
        ("one two three", ["four", "three"]),
        ("one two three", ["one"]),
        ("one two three", ["twofold", "e three "]),
        ("abababac", ["abac"]),  # begins again inside what was held back
        ("abcd", ["c", "abcd"]),  # the first that is complete, not the first that begins
        ("xabc", ["bc", "abc"]),
        ("a 日本語 🙂 b", ["本", "🙂"]),
        ("a 日本語", ["語!"]),
        ("nothing", []),
    ],
)
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut_into_tokens(text, stops):
    expected = before_the_stop(text, stops)
    data, rng = text.encode(), random.Random(0)
    id_of = tokenizer.load_ranks()
    for _ in range(50):
        sample, shown, rest = generate.Sample(stops), "", data
        while rest and not sample.done:
            size = rng.choice([n for n in range(1, 6) if rest[:n] in id_of])
            pieces, rest = sample.add(id_of[rest[:size]], 0.5), rest[size:]
            shown += "".join(piece.text for piece in pieces)
            assert expected.startswith(shown)  # no part of a stop string is shown
        assert shown + "".join(piece.text for piece in sample.end()) == expected


def test_only_what_may_become_a_stop_string_is_held_back():
    sample = generate.Sample(["zebra crossing"])
    words = [b"A", b" z", b"eb", b"ra", b" cross", b"es", b"."]
    shown = ["".join(p.text for p in sample.add(tokenizer.load_ranks()[word], 0.5)) for word in words]
    assert shown == ["A", "", "", "", "", " zebra crosses", "."]


def test_the_flag_stop_ends_the_making_too(command, scripted, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(generate.GPT, "lm_head", lambda self, x: calls.append(1) or lm_head(self, x))
    options = dict(prompt=PROMPT, temperature=0)
    for number in (1, 2):
        calls.clear()
        out = generated(capsys, scripted, stop=("nowhere", "本語"), num_samples=number, **options)
        assert out == "\n\n".join([PROMPT + " naïve 日"] * number) + "\n"
        assert len(calls) < len(tokenizer.encode(MIXED))
    flags = ("--prompt", PROMPT, "--temperature", "0", "--stop", "x", "--stop", "語 ")
    assert command(scripted, *flags, stdin="this is not asked for") == PROMPT + " naïve 日本\n"


def test_a_stop_string_may_name_a_line_end_and_an_empty_one_stops_nothing():
    assert generate.Sample(["\\n", ""]).stops == ["\n"]


# Prompts from files and pipes


def test_a_prompt_comes_from_a_file_or_from_standard_input(scripted, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "日 is\r\n".encode())  # 3 tokens, as the scripted model expects
    assert len(tokenizer.encode("日 is")) == 3
    out = tmp_path / "out.json"
    text = generated(capsys, scripted, prompt_file=str(path), temperature=0, json=str(out))
    assert text == "日 is" + MIXED + "\n"
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["prompt"], result["prompt_file"]) == ("日 is", str(path))
    words = ("--model", scripted, "--device", "cpu", "--prompt-file", "-", "--temperature", "0")
    assert run_script("generate.py", *words, stdin="日 is\n").stdout == text


@contextlib.contextmanager
def standard_input(file: int) -> Iterator[None]:
    """File descriptor 0 is this file in the block."""
    before = os.dup(0)
    os.dup2(file, 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def piped(data: bytes) -> int:
    """The end to read of a pipe with this content."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def test_a_pipe_or_a_file_is_the_prompt_unless_one_is_given(tmp_path):
    default, file = Config.prompt, tmp_path / "prompt.txt"
    file.write_bytes(b"Two\n\n")
    endless, _ = os.pipe()
    for stdin, flags, prompts in [
        (piped("日 is\r\n".encode()), [], ["日 is"]),
        (os.open(file, os.O_RDONLY), [], ["Two\n"]),  # one newline is dropped
        (piped(b"\n"), [], [""]),
        (piped(b""), [], [default]),
        (os.open(os.devnull, os.O_RDONLY), [], [default]),
        (endless, ["--prompt", "One"], ["One"]),
        (endless, ["--prompt", default.encode().decode()], [default]),  # as from a shell, a copy
        (endless, ["--prompt-file", str(file)], ["Two\n"]),
        (endless, ["--prompt-file", str(file), "--each-line"], ["Two", ""]),
        (piped(b"a\x0b\n\nb"), ["--each-line"], ["a\x0b", "", "b"]),
        (piped(b"a\nb\n"), ["--each-line", "--prompt-file", "-"], ["a", "b"]),
    ]:
        with standard_input(stdin):
            assert generate.read_prompts(generate.read_flags(flags)) == prompts
    with standard_input(piped(b"")), pytest.raises(ValueError, match="standard input is empty: give"):
        generate.read_prompts(generate.read_flags(["--each-line"]))


def test_a_wait_for_a_pipe_is_said(scripted):
    words = ["--model", scripted.parent, "--device", "cpu", "--temperature", "0"]  # the run's newest
    command = [sys.executable, str(ROOT / "generate.py"), *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") as process:
        assert process.stderr
        assert process.stderr.readline().startswith("reading the prompt from standard input")
        out, err = process.communicate(f"{PROMPT}\n", timeout=60)
    assert (process.returncode, out) == (0, PROMPT + MIXED + "\n"), err
    assert err == f"model: {scripted}\n"


def test_each_line_gets_the_text_that_it_gets_alone(folder, tmp_path, capsys, monkeypatch):
    lines = ["The sun is", "One", "", "The moon is", "A longer line than the others", "Two", "One"]
    file, out = tmp_path / "lines.txt", tmp_path / "out.json"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(generate, "BATCH_ROWS", 4)
    rows, stream = [], generate.stream_pieces
    monkeypatch.setattr(generate, "stream_pieces", lambda *args: rows.append(len(args[1])) or stream(*args))
    options = dict(max_tokens=12, prompt_file=str(file), each_line=True, json=str(out))
    text = generated(capsys, folder, temperature=0, num_samples=2, show_probs=True, **options)
    assert sorted(rows) == [2, 4, 4, 4]  # two of three tokens; one, one, one and none; a longer one
    expected = [line + continuation(folder, line, temperature=0, max_tokens=12) for line in lines]
    assert text == "\n\n".join(one for one in expected for _ in range(2)) + "\n"
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(one["prompt"], one["texts"]) for one in result["prompts"]] == [
        (line, [one] * 2) for line, one in zip(lines, expected)
    ]
    assert all(len(tokens) == 12 for one in result["prompts"] for tokens in one["tokens"])
    assert "prompt" not in result and "texts" not in result and result["max_tokens"] == 12
    generated(capsys, folder, temperature=1.5, **options)
    result = json.loads(out.read_text(encoding="utf-8"))
    first, last = (result["prompts"][place]["texts"][0] for place in (1, -1))
    assert first != last  # drawn, not copied


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--prompt-file", "{tmp}/none.txt"], "none.txt"),
        (["--prompt-file", "{tmp}/latin1.txt"], "latin1.txt: line 1: byte 0xef is not utf-8"),
        (["--prompt-file", "{tmp}/two.jsonl"], "two.jsonl holds 2 documents"),
        (["--prompt-file", "a.txt", "--prompt", "b"], "--prompt and --prompt-file"),
        (["--interactive", "--prompt", "b"], "leave --prompt out"),
        (["--interactive", "--prompt-file", "a.txt"], "leave --prompt-file out"),
        (["--interactive", "--num-samples", "2"], "leave --num-samples out"),
        (["--interactive", "--json", "a.json"], "leave --json out"),
        (["--interactive", "--each-line"], "leave --each-line out"),
        (["--each-line"], "--each-line needs lines, and there are none: give --prompt-file FILE, or pipe"),
        (["--each-line", "--prompt", "b"], "leave --prompt out"),
        (["--each-line", "--prompt-file", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--top-k", "5", "The sun"], 'generate.py --prompt "The sun"'),
        (["--show-probs", "Once"], "generate.py --prompt Once"),
    ],
)
def test_a_prompt_that_cannot_be_had_exits_2_with_the_reason(script, tmp_path, args, reason):
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "two.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}')
    done = script("generate.py", *(arg.format(tmp=tmp_path) for arg in args))
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr and done.stderr.startswith("generate.py: ")


# Probabilities


def test_probabilities_are_the_models_own_whatever_the_settings(folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out.json"
    options = dict(temperature=2, top_k=5, top_p=0.9, repetition_penalty=3, max_tokens=12, num_samples=2)
    generated(capsys, folder, prompt=PROMPT, show_probs=True, json=str(out), **options)
    result = json.loads(out.read_text(encoding="utf-8"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for text, tokens in zip(result["texts"], result["tokens"], strict=True):
        ids = tokenizer.encode(PROMPT) + [token["id"] for token in tokens]
        with torch.no_grad():
            logp = theirs(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        expected = [logp[position - 1, ids[position]].exp().item() for position in range(3, len(ids))]
        assert [token["probability"] for token in tokens] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert len(tokens) == 12 and text == tokenizer.decode(ids)
        joined = PROMPT + "".join(token["text"] for token in tokens)
        assert text in (joined, joined + "�")  # the last character may be cut
    generated(capsys, folder, prompt=PROMPT, json=str(out), **options)
    assert "tokens" not in json.loads(out.read_text(encoding="utf-8"))


def test_without_colours_probabilities_are_a_table_on_standard_error(scripted, capsys):
    options = dict(model=str(scripted), device="cpu", prompt=PROMPT, temperature=0.0)
    generate.main(Config(**options, show_probs=True, num_samples=2))  # pyright: ignore
    captured = capsys.readouterr()
    assert captured.out == f"{PROMPT}{MIXED}\n\n{PROMPT}{MIXED}\n"
    lines = captured.err.splitlines()
    ids = tokenizer.encode(MIXED)
    assert [line for line in lines if "sample" in line] == [lines[0], lines[len(ids) + 1]]
    for line, token in zip(lines[1:], ids):
        probability, id, text = line.split(maxsplit=2)
        assert 0 < float(probability) < 1
        assert (int(id), text) == (token, repr(tokenizer.decode([token])))


# Narrow and wide choices


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


# Conversation


def conversation(monkeypatch, capsys, folder: Path, *lines: str, **options) -> tuple[str, list[str]]:
    """The output of a conversation through a pipe, and its lines on standard error."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    generate.main(Config(model=str(folder), device="cpu", interactive=True, **options))
    captured = capsys.readouterr()
    return captured.out, captured.err.splitlines()[1:]  # the first says what to do


def test_a_conversation_through_a_pipe_continues_the_text_so_far(command, folder):
    options = dict(temperature=1.5, max_tokens=5)
    flags = ("--interactive", "--temperature", "1.5", "--max-tokens", "5")
    out = command(folder, *flags, stdin="One\n\nTwo\n")
    first = "One" + continuation(folder, "One", **options, seed=1)  # each turn has its own seed
    second = continuation(folder, first + "\nTwo", **options, seed=2)
    assert second != continuation(folder, "Two", **options, seed=2)
    assert out == first + "\nTwo" + second + "\n"


def test_a_setting_changes_what_follows_and_reset_forgets_the_text(folder, monkeypatch, capsys):
    settings = ("/set max-tokens 4", "/set --top_k=7", '/set stop "\\n" x', "/set temperature 0", "/show")
    lines = ("One", *settings, "Two", "/reset", "Three", '/set stop ""', "/show")
    out, err = conversation(monkeypatch, capsys, folder, *lines, max_tokens=5)
    first = "One" + continuation(folder, "One", max_tokens=5, seed=1)
    options = dict(max_tokens=4, temperature=0, stop=("\n", "x"))
    second = continuation(folder, first + "\nTwo", **options)
    third = continuation(folder, "Three", **options)
    assert out == f"{first}\nTwo{second}\nThree{third}\n"
    shown = ["max-tokens 4", "temperature 0.0", "top-k 7", r"stop ('\\n', 'x')", "seed 0"]
    assert f"model {folder}" in err and not [line for line in shown if line not in err]
    assert "stop ('',)" in err


@pytest.mark.parametrize(
    ("flag", "value"), [("--temperature", "-1"), ("--top-p", "1.5"), ("--max-tokens", "many")]
)
def test_a_bad_setting_gets_the_flags_message_and_the_session_goes_on(
    script, folder, monkeypatch, capsys, flag, value
):
    done = script("generate.py", flag, value)
    assert done.returncode == 2
    out, err = conversation(
        *(monkeypatch, capsys, folder, f"/set {flag.removeprefix('--')} {value}", "One"), max_tokens=5
    )
    assert out == "One" + continuation(folder, "One", max_tokens=5, seed=1) + "\n"
    reason = next(line for line in done.stderr.removeprefix("generate.py: ").splitlines() if flag in line)
    assert reason.strip(" │") in [line.strip(" │") for line in err]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/set model gpt2", "--model is no setting"),
        ("/set no-interactive", "--no-interactive is no setting"),
        ("/set num-samples 3", "--num-samples is no setting"),
        ("/set temprature 1", "--temprature is no setting"),
        ("/set help", "--help is no setting"),
        ('/set stop "', "No closing quotation"),
        ("/set temperature", "Missing value"),
        ("/set", "/set NAME VALUE"),
        ("/help", "/reset"),
        ("/temperature 3", "/set NAME VALUE"),
    ],
)
def test_what_is_no_setting_and_no_command_is_said(folder, monkeypatch, capsys, line, reason):
    out, err = conversation(monkeypatch, capsys, folder, line, " /no command", max_tokens=5)
    assert out == " /no command" + continuation(folder, " /no command", max_tokens=5, seed=1) + "\n"
    assert reason in "\n".join(err)


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_a_conversation_ends_at_a_command(folder, monkeypatch, capsys, command):
    out, err = conversation(monkeypatch, capsys, folder, command, "One")
    assert (out, err) == ("", [])


def test_probabilities_can_be_asked_for_in_a_conversation(folder, monkeypatch, capsys):
    lines = ("One", "/set show-probs", "Two", "/set no-show-probs", "Three")
    _, err = conversation(monkeypatch, capsys, folder, *lines, max_tokens=3)
    assert len([line for line in err if line.startswith("sample 1")]) == 1


# Refusals


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--max-tokens", "0", "at least 1"),
        ("--temperature", "-0.5", "0 (greedy) or at least 0.01"),
        ("--temperature", "nan", "0 (greedy) or at least 0.01"),
        ("--top-k", "-1", "at least 0"),
        ("--top-p", "0.0", "above 0 and at most 1"),
        ("--top-p", "1.5", "above 0 and at most 1"),
        ("--repetition-penalty", "0.0", "a number above 0"),
        ("--num-samples", "0", "at least 1"),
    ],
)
def test_a_value_that_cannot_work_exits_2_with_flag_value_and_bound(script, flag, value, reason):
    done = script("generate.py", flag, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"generate.py: {flag} is {value}; it must be {reason}\n"


@pytest.mark.parametrize(
    ("args", "reasons"),
    [
        (["--temprature", "1"], ["temprature"]),
        (["--top-k", "many"], ["top-k", "many"]),
        (["--model", "no-such-model"], ["no-such-model", "124M"]),
        (["--device", "abacus", "--model", "{folder}"], ["abacus", "cuda"]),
    ],
)
def test_a_bad_flag_model_or_device_exits_2_with_the_reason(script, folder, args, reasons):
    done = script("generate.py", *(arg.format(folder=folder) for arg in args))
    assert (done.returncode, done.stdout) == (2, "")
    assert not [reason for reason in reasons if reason not in done.stderr]


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
