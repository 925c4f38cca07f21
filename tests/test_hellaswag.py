"""hellaswag.py: its rows and scores against hand-written ids, a plain loop and lm_eval; its data."""

import gzip
import io
import json
import math
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import VOCAB_SIZE, forkserver, random_model, save_checkpoint
from tqdm import tqdm

import hellaswag
from lib import files, tokenizer
from lib.checkpoint import load_model
from lib.processes import Process
from model import GPT


def item(activity: str, ctx_a: str, ctx_b: str, label: int, *endings: str) -> dict:
    """Returns an item of the real file's form: ctx is ctx_a, a blank and ctx_b."""
    ctx = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
    return dict(
        ind=len(ctx), activity_label=activity, ctx_a=ctx_a, ctx_b=ctx_b, ctx=ctx, split="val",
        split_type="indomain", label=label, endings=list(endings), source_id=f"invented~{activity}",
    )  # fmt: skip


HAND = item("Sitting", "A man sits down.", "he", 1, "eats.", "reads a book.", "reads.", "eats a book.")

ITEMS = [HAND, *(item(*words) for words in [
    ("Kite", "Two girls run on a beach.", "they", 2, "hold a kite.", "sleep.", "let it fly.", "eat sand."),
    ("Tea", "A kettle boils.", "a woman", 0, "pours it out.", "drinks the kettle.", "boils, too.", "left"),
    ("Rowing", "The boat drifts off", "", 3,
     "a cliff.", "the page.", "its rails.", "the shore and into fog."),
    ("Wood", "He splits a log.", "the log", 1, "thanks him.", "falls in two.", "is 3.5m long.", "smokes."),
    ("Ça va", "Ein Mädchen tanzt — schön.", "the café", 0, "applauds.", "ist naïve.", "日本語.", "🙂"),
    ("Food and Entertaining",
     "[header] How to keep bread fresh [title] Cool it first. [step] Warm bread sweats in a bag.", "", 1,
     "[title] Eat all of it. [step] At once.", "Wait for two hours. [substeps] Use a rack.",
     "Bread is a  metaphor.", "[title] Never bake."),
    ("Home and Garden",
     "[header] How to plant a tree [title] Dig a hole twice as wide as the roots.", "[step] the roots", 2,
     "must be painted. [title] Use oil.", "are not needed.  Cut them off.",
     "need loose soil. [title] Water it. [step] Every day.", "[step] sing."),
    ("Pets",
     "[header] How to wash a cat [title] Trim the claws [title] Wait until it is asleep.", "", 3,
     "[step] It wakes.", "Call a dog [title] Any dog.", "Wash yourself, [step] and say so.",
     "Use a soft brush first. [step] Then lukewarm water."),
    ("Sports and Fitness",
     "[header] How to sail [title] Watch the wind. [step]", "", 0,  # cleaned, it ends with a blank
     "Wet a finger and hold it up.", "Wet the wind.", "[title] Row.", "It is blue. [title] So is the sea."),
    ("Chess", "She moves her queen. ", "her rival", 0,
     "resigns.", "moves her queen, too!", "is a rook.", "e4"),
    ("Snow", "A child rolls a ball of snow", "and", 2,
     "melts.", "rolls.", "sets it on another one.", "snow."),
    ("Violin", "He tunes the strings,", "then he", 3,
     "tunes.", "eats the bow.", "is tuned.", "plays a scale."),
])]  # fmt: skip


def turned(items: list[dict]) -> list[dict]:
    """The same items, with another ending as the right one."""
    return [{**one, "endings": one["endings"][1:] + one["endings"][:1]} for one in items]


def write_items(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in items), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(seed=2, vocab_size=VOCAB_SIZE, block_size=64)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run"), model)


# Rows


def test_the_rows_of_a_completion_are_the_raw_text():
    rows, lengths = hellaswag.render(HAND, "completion")
    context = [32, 582, 10718, 866, 13, 339]  # A| man| sits| down|.| he
    assert rows == [
        (context, [25365, 13]),  # eats|.
        (context, [9743, 257, 1492, 13]),  # reads| a| book|.
        (context, [9743, 13]),
        (context, [25365, 257, 1492, 13]),
    ]
    assert lengths == [2, 4, 2, 4]  # tokens


def test_the_rows_of_the_harness_begin_with_the_activity_and_a_capital():
    rows, lengths = hellaswag.render(HAND, "harness")
    context = [50, 2535, 25, 317, 582, 10718, 866, 13, 679]  # S|itting|:| A| man| sits| down|.| He
    assert rows == [
        (context, [25365, 13]),
        (context, [9743, 257, 1492, 13]),
        (context, [9743, 13]),
        (context, [25365, 257, 1492, 13]),
    ]
    assert lengths == [5, 13, 6, 12]  # characters


def test_the_harness_drops_wikihows_marks_and_completion_keeps_them():
    bread, sail = ITEMS[6], ITEMS[9]
    rows, lengths = hellaswag.render(bread, "harness")
    assert tokenizer.decode(rows[1][0]) == (
        "Food and Entertaining: How to keep bread fresh. Cool it first. Warm bread sweats in a bag."
    )
    assert tokenizer.decode(rows[1][1]) == " Wait for two hours. Use a rack."
    assert lengths[1] == len("Wait for two hours. Use a rack.")
    rows, lengths = hellaswag.render(sail, "harness")
    assert tokenizer.decode(rows[1][0]) == "Sports and Fitness: How to sail. Watch the wind."
    assert tokenizer.decode(rows[1][1]) == "  Wet the wind."  # the context's last blank goes to the ending
    assert lengths[1] == len("Wet the wind.")
    rows, _ = hellaswag.render(bread, "completion")
    assert tokenizer.decode(rows[0][0] + rows[0][1]) == bread["ctx"] + " " + bread["endings"][0]


@pytest.mark.parametrize("one", [*ITEMS, *turned(ITEMS)[6:10]], ids=lambda one: one["activity_label"])
def test_the_harness_rows_are_lm_evals(one, tmp_path):
    import datasets
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    # lm_eval's rule that splits a text into context and continuation reads only these two of its model.
    encoder: Any = SimpleNamespace(backend="causal", tok_encode=lambda text, **_: tokenizer.encode(text))
    doc = process_docs(datasets.Dataset.from_list([one]))[0]
    rows, lengths = hellaswag.render(one, "harness")
    assert rows == [TemplateLM._encode_pair(encoder, doc["query"], " " + choice) for choice in doc["choices"]]
    assert lengths == [len(choice) for choice in doc["choices"]]


# Scores


def test_a_row_is_scored_by_exactly_its_endings_tokens(model):
    scores = hellaswag.score(model, [([10, 20, 30], [40, 50]), ([60], [70])], batch_size=2)
    logp = model(torch.tensor([[10, 20, 30, 40]])).log_softmax(dim=-1)[0]
    assert scores[0] == pytest.approx((logp[2, 40] + logp[3, 50]).item(), abs=1e-4)
    logp = model(torch.tensor([[60]])).log_softmax(dim=-1)[0]
    assert scores[1] == pytest.approx(logp[0, 70].item(), abs=1e-4)


def plain_text(one: dict, protocol: str) -> tuple[str, list[str]]:
    if protocol == "completion":
        return one["ctx"], one["endings"]

    def cleaned(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        for mark in ("header", "title", "step", "substeps"):
            text = text.replace(f"[{mark}]", "")
        return text.replace("  ", " ")

    context = one["ctx_a"] + " " + one["ctx_b"].capitalize()
    return cleaned(one["activity_label"] + ": " + context), [cleaned(ending) for ending in one["endings"]]


@torch.no_grad()
def plain_loop(model: GPT, items: list[dict], protocol: str) -> tuple[list[float], float, float]:
    """Each row's log-probability, acc and acc_norm, computed for one item, ending and token at a time."""
    scores, right, right_norm = [], 0, 0
    for one in items:
        context, endings = plain_text(one, protocol)
        begin = len(tokenizer.encode(context.rstrip()))
        best, best_norm = [], []
        for ending in endings:
            ids = tokenizer.encode(context + " " + ending)
            total = 0.0
            for position in range(begin, len(ids)):
                read = ids[max(0, len(ids) - 65) : position]
                total += model(torch.tensor([read]))[0, -1].log_softmax(dim=-1)[ids[position]].item()
            scores.append(total)
            best.append(total)
            best_norm.append(total / (len(ids) - begin if protocol == "completion" else len(ending)))
        right += best.index(max(best)) == one["label"]
        right_norm += best_norm.index(max(best_norm)) == one["label"]
    return scores, right / len(items), right_norm / len(items)


@pytest.mark.parametrize("protocol", hellaswag.PROTOCOLS)
def test_scores_and_accuracies_are_those_of_a_plain_loop(model, protocol):
    items = [one for one in (*ITEMS, *turned(ITEMS)) if not one["ctx"].endswith(" ")]
    scores, acc, acc_norm = plain_loop(model, items, protocol)
    rows = [row for one in items for row in hellaswag.render(one, protocol)[0]]
    assert hellaswag.score(model, rows, batch_size=10) == pytest.approx(scores, abs=2e-3)
    result = hellaswag.evaluate(model, items, protocols=(protocol,), show=False)
    assert result["n"] == len(items)
    assert 0 < acc < 1 and 0 < acc_norm < 1 and acc != acc_norm  # else the comparison shows little
    assert result[protocol]["acc"] == pytest.approx(acc, abs=1e-6)
    assert result[protocol]["acc_norm"] == pytest.approx(acc_norm, abs=1e-6)
    for name, value in (("acc", acc), ("acc_norm", acc_norm)):
        error = math.sqrt(value * (1 - value) / (len(items) - 1))
        assert result[protocol][f"{name}_stderr"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 200])
def test_the_batch_size_does_not_change_scores(model, batch_size):
    rows = [row for one in ITEMS for row in hellaswag.render(one, "harness")[0]]
    expected = hellaswag.score(model, rows, batch_size=16)
    got = hellaswag.score(model, rows, batch_size=batch_size)
    assert got == pytest.approx(expected, abs=1e-4, rel=0)


def test_many_rows_have_the_scores_that_each_has_alone(model):
    """The rows have more tokens than one block of logits, shared contexts and many lengths."""
    draw = random.Random(0)
    ids = [draw.randrange(VOCAB_SIZE) for _ in range(64)]
    rows = [(ids[: draw.randint(2, 6)], ids[-draw.randint(1, 40) :]) for _ in range(120)]
    assert sum(len(ending) for _, ending in rows) > 2000
    alone = [hellaswag.score(model, [row], batch_size=1)[0] for row in rows]
    assert hellaswag.score(model, rows, batch_size=16) == pytest.approx(alone, abs=1e-3, rel=0)


def test_a_batch_of_enough_tokens_is_hardly_padded():
    draw = random.Random(0)
    lengths = {row: draw.randint(1, 40) for row in range(500)}
    batches = list(hellaswag.batch_by_length(lengths, batch_size=32, least=128))
    assert sorted(row for batch in batches for row in batch) == sorted(lengths)
    for batch in batches:
        widths = [lengths[row] for row in batch]
        assert len(batch) <= 32 and widths == sorted(widths)
        before_last = sum(widths[:-1])
        assert before_last < 128 or sum(widths) >= 0.9 * len(batch) * widths[-1]
    assert max(map(len, batches)) == 32 and len(batches) < 40


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", -1), ("limit", -1)])
def test_a_number_below_its_bound_is_refused_with_its_value(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {value}; it must be at least"):
        hellaswag.main(hellaswag.Config(**{name: value}))


def test_under_autocast_the_logits_are_still_in_float32(model):
    with torch.autocast("cpu", torch.bfloat16):
        (score,) = hellaswag.score(model, [([10, 20, 30], [40, 50])], batch_size=1)
        x = model.hidden(torch.tensor([[10, 20, 30, 40]]))
    logp = model.lm_head(x.float()).log_softmax(dim=-1)[0]
    assert score == pytest.approx((logp[2, 40] + logp[3, 50]).item(), abs=1e-4)


def test_a_row_longer_than_the_context_loses_its_beginning(model):
    ids = torch.randint(VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    long, cut, ending_only = hellaswag.score(
        model, [(ids[:95], ids[95:]), (ids[35:95], ids[95:]), (ids[:5], ids[5:])], batch_size=3
    )
    assert long == pytest.approx(cut, abs=1e-4)
    logp = model(torch.tensor([ids[35:99]])).log_softmax(dim=-1)[0]
    expected = logp.gather(1, torch.tensor(ids[36:])[:, None]).sum().item()
    assert ending_only == pytest.approx(expected, abs=1e-2)  # an ending that alone is too long


def rank_of_two(rank: int, folder: str, data: str, out: str):
    """One of two processes: evaluates, and writes its result and how many rows it scored."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    scored = []
    score = hellaswag.score
    hellaswag.score = lambda model, rows, *rest: scored.append(len(rows)) or score(model, rows, *rest)
    process, (model, _) = Process(rank, 2, torch.device("cpu")), load_model(folder, "cpu")
    result = hellaswag.evaluate(model, hellaswag.load_items(data), process, show=False)
    (Path(out) / f"{rank}.json").write_text(json.dumps([result, scored]), encoding="utf-8")
    dist.destroy_process_group()


def test_two_processes_give_exactly_the_figures_of_one_and_share_the_rows(model, folder, tmp_path):
    items = ITEMS[:7]
    data = write_items(tmp_path / "items.jsonl", items)
    where = (str(folder), str(data), str(tmp_path))
    ranks = [forkserver.Process(target=rank_of_two, args=(rank, *where)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    results = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    expected = hellaswag.evaluate(model, items, show=False)
    assert [result for result, _ in results] == [expected, expected]
    assert [scored for _, scored in results] == [[16, 16], [12, 12]]


@pytest.mark.slow  # lm_eval takes ten seconds to import
def test_the_harness_protocol_gives_lm_evals_own_figures(model, folder, tmp_path):
    from lm_eval import evaluator
    from lm_eval.models import huggingface
    from lm_eval.tasks.hellaswag.utils import process_docs

    items = [*ITEMS, *turned(ITEMS)]
    data = write_items(tmp_path / "items.jsonl", items)
    task = {
        "task": "invented_hellaswag",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    make_lm: Any = huggingface.HFLM  # lm_eval's decorators hide these signatures from type checkers
    simple_evaluate: Any = evaluator.simple_evaluate
    lm = make_lm(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    theirs = simple_evaluate(lm, tasks=[task], bootstrap_iters=0)
    samples = sorted(theirs["samples"]["invented_hellaswag"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(items)
    for one, sample in zip(items, samples):
        ours = hellaswag.evaluate(model, [one], protocols=("harness",), show=False)["harness"]
        assert (ours["acc"], ours["acc_norm"]) == (sample["acc"], sample["acc_norm"]), one["ctx"]
        scores = hellaswag.score(model, hellaswag.render(one, "harness")[0], batch_size=4)
        assert scores == pytest.approx([logp for logp, _ in sample["filtered_resps"]], abs=1e-3)
    ours = hellaswag.evaluate(model, items, show=False)["harness"]
    for name in ("acc", "acc_norm"):
        figure = theirs["results"]["invented_hellaswag"][f"{name},none"]
        assert ours[name] == pytest.approx(figure, abs=1e-6)
        assert 0 < figure < 1


def test_the_bar_shows_acc_norm_with_its_standard_error(model):
    rendered = [hellaswag.render(item, "completion") for item in ITEMS]
    rows = [row for item_rows, _ in rendered for row in item_rows]
    lengths = torch.tensor([lengths for _, lengths in rendered])
    labels = torch.tensor([item["label"] for item in ITEMS])
    with tqdm(total=len(rows), file=io.StringIO()) as bar:
        moved = []

        def report(scores: torch.Tensor):
            hellaswag.show_accuracy(bar, lengths, labels, scores)
            moved.append((bar.n, bar.postfix))

        hellaswag.score(model, rows, 1, report)
    figures = hellaswag.evaluate(model, ITEMS, show=False)["completion"]
    shown = f"acc_norm {100 * figures['acc_norm']:.2f} ± {100 * figures['acc_norm_stderr']:.2f}"
    assert moved[-1] == (len(rows), shown)
    assert moved == sorted(moved, key=lambda item: item[0]) and 0 < moved[0][0] < moved[1][0] < len(rows)


def test_scores_that_are_not_finite_are_no_accuracies(folder, tmp_path, capsys):
    model, _ = load_model(str(folder), "cpu")
    with torch.no_grad():
        model.wte.weight[:50257] *= 1e30  # finite weights, whose products are not
        model.transformer["ln_f"].weight *= 1e30  # type: ignore[operator, union-attr]
    figures = hellaswag.evaluate(model, ITEMS[:3], show=False)["completion"]
    assert all(math.isnan(figure) for figure in figures.values())
    overflowing, data = save_checkpoint(tmp_path, model), write_items(tmp_path / "items.jsonl", ITEMS[:3])
    with pytest.raises(ValueError, match="the scores are not finite"):
        hellaswag.main(hellaswag.Config(model=str(overflowing), data=str(data), device="cpu"))
    with torch.no_grad():
        model.wte.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"the model is not finite: 1 of .*wte\.weight are nan or infinite"):
        load_model(str(save_checkpoint(tmp_path, model, step=2)), "cpu")


def test_the_command_prints_and_writes_both_protocols(script, folder, tmp_path):
    data, out = write_items(tmp_path / "items.jsonl", ITEMS), tmp_path / "scores.json"
    words = ("--model", folder, "--data", data, "--device", "cpu", "--limit", "9", "--json", out)
    done = script("hellaswag.py", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    expected = hellaswag.evaluate(load_model(str(folder), "cpu")[0], ITEMS[:9], show=False)
    assert result.pop("model") == str(folder)
    assert result == expected and result["n"] == 9
    lines = done.stdout.splitlines()
    assert "9 items" in lines[0] and str(folder) in lines[0]
    for line, protocol in zip(lines[1:], ("completion", "harness")):
        keys = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        figures = [f"{100 * result[protocol][key]:.2f}" for key in keys]
        assert line.replace("±", "").split() == [protocol, "acc", *figures[:2], "acc_norm", *figures[2:]]


# The data file


def test_items_are_read_and_limited(tmp_path):
    data = write_items(tmp_path / "items.jsonl", ITEMS)
    assert hellaswag.load_items(data) == ITEMS
    packed = tmp_path / "items.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    assert hellaswag.load_items(packed) == ITEMS
    packed.rename(tmp_path / "packed.jsonl")  # another name
    with pytest.raises(ValueError, match="byte 0x8b is not utf-8") as caught:
        hellaswag.load_items(tmp_path / "packed.jsonl")
    assert len(str(caught.value)) < 400
    for encoding in ("utf-8-sig", "utf-16"):
        text = data.read_text(encoding="utf-8").replace("\n", "\r\n")
        (tmp_path / "windows.jsonl").write_bytes(text.encode(encoding))
        assert hellaswag.load_items(tmp_path / "windows.jsonl") == ITEMS
    assert hellaswag.load_items(data, limit=5) == ITEMS[:5]


def test_line_separators_inside_a_text_are_no_line_ends(tmp_path):
    odd = {**HAND, "ctx": "A man\u2028sits\x85down. he"}
    data = tmp_path / "items.jsonl"
    data.write_text(json.dumps(odd, ensure_ascii=False) + "\n", encoding="utf-8")
    assert hellaswag.load_items(data) == [odd]


def without(key: str) -> str:
    return json.dumps({name: value for name, value in HAND.items() if name != key})


@pytest.mark.parametrize(
    "content",
    [
        *("", "<html>rate limited</html>", "[1, 2]", "7", json.dumps(HAND) + "\n" + json.dumps(HAND)[:40]),
        *(json.dumps({**HAND, "label": label}) for label in ("", 4)),
        json.dumps({**HAND, "endings": HAND["endings"][:3]}),
        *map(without, ("label", "endings", "ctx", "ctx_a", "ctx_b", "activity_label")),
    ],
)
def test_a_file_that_is_not_hellaswag_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        hellaswag.load_items(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("ctx", None), ("ctx", " "), ("ctx_a", 3), ("ctx_b", None), ("activity_label", ["a"])),
        *(
            ("endings", [1, 2, 3, 4]),
            ("endings", "four"),
            ("endings", ["a", "b", "c", ""]),
            ("endings", None),
        ),
        *(
            ("endings", ["a"] * 5),
            ("label", -1),
            ("label", True),
            ("label", 1.0),
            ("label", "4"),
            ("label", None),
        ),
    ],
)
def test_an_item_of_another_shape_is_refused_with_line_and_field(tmp_path, field, value):
    data = write_items(tmp_path / "bad.jsonl", [HAND, HAND | {field: value}])
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: the field {field}"):
        hellaswag.load_items(data)


def test_a_label_may_be_a_text_and_a_text_of_the_context_empty(tmp_path):
    items = [HAND | {"label": "3"}, HAND | {"ctx_b": ""}]
    assert hellaswag.load_items(write_items(tmp_path / "items.jsonl", items)) == items


def test_compressed_or_binary_data_are_refused_without_their_content(tmp_path):
    (tmp_path / "items.jsonl.png").write_bytes(bytes(range(256)) * 1000)
    with pytest.raises(ValueError) as error:
        hellaswag.load_items(tmp_path / "items.jsonl.png")
    assert len(str(error.value)) < 500


# The download


def test_a_download_that_fails_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9/nothing .*refused.*--data FILE"):
        hellaswag.download("http://127.0.0.1:9/nothing", tmp_path / "items.jsonl", "", tries=1)


def test_all_processes_of_a_training_get_the_items_or_the_reason_why_not(tmp_path, monkeypatch):
    """Rank 0 alone downloads; the other has what rank 0 has broadcast."""
    data, said, notes = tmp_path / "items.jsonl", [], []
    monkeypatch.setattr(hellaswag.download, "__defaults__", ("http://127.0.0.1:9/nothing", data, "", 1))
    ranks: list[Any] = [
        SimpleNamespace(rank=0, broadcast=lambda value: said.append(value) or value, print=notes.append),
        SimpleNamespace(rank=1, broadcast=lambda value: said[-1], print=notes.append),
    ]
    load = partial(hellaswag.load_for_training, limit=2)
    assert [load(process, is_needed=False) for process in ranks] == [[], []]
    assert (
        all("HellaSwag is left out" in note and "--data FILE" in note for note in notes) and len(notes) == 2
    )
    for process in ranks:
        with pytest.raises(ValueError, match=r"--eval-only has nothing .* HellaSwag: .*--data FILE"):
            load(process, is_needed=True)
    write_items(data, ITEMS)
    assert [load(process, is_needed=False) for process in ranks] == [[], []]
    assert f"{data} is not the file of http://127.0.0.1:9/nothing" in notes[-1]
    promised = ("http://127.0.0.1:9/nothing", data, files.hash_file(data), 1)
    monkeypatch.setattr(hellaswag.download, "__defaults__", promised)
    assert [load(process, is_needed=True) for process in ranks] == [ITEMS[:2]] * 2


@pytest.mark.parametrize("target", ["no/such/x.json", "."])
def test_a_target_that_cannot_be_written_is_refused_before_the_work(script, tmp_path, target):
    done = script("hellaswag.py", "--model", "nothing", "--json", tmp_path / target)
    assert done.returncode == 2 and "nothing can be written there" in done.stderr
