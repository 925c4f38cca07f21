"""docs/experiment.md: each diff is applied to a copy of the repository, which then trains."""

import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from corpora import decode_shards
from helpers import ROOT, lines_of, links, values

import plot
import train_gpt2
from lib import checkpoint, cli
from train_gpt2 import Config

PAGE = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
SECTIONS = [section.partition("\n") for section in PAGE.split("\n## ")[1:]]
DIFFS = {
    title: text.split("```diff\n")[1].split("```")[0] for title, _, text in SECTIONS if "```diff" in text
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def import_from(copy: Path):
    """Makes this process import the project's files from a copy."""
    for name in [name for name in sys.modules if name.partition(".")[0] in SCRIPTS | {"lib"}]:
        del sys.modules[name]
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # of the processes that it starts


@pytest.fixture
def run_changed(launch, tmp_path):
    """`run_changed(heading, cfg, ...)` applies the diff below a heading and runs a script of the copy."""
    copy = tmp_path / "copy"

    def run(heading: str, cfg: Config | None, *words: object, script: str = "train_gpt2.py") -> str:
        if not copy.exists():
            shutil.copytree(ROOT / "lib", copy / "lib", ignore=shutil.ignore_patterns("__pycache__"))
            for path in ROOT.glob("*.py"):
                shutil.copy(path, copy)
            (copy / "assets").symlink_to(ROOT / "assets")
            command = ["git", "apply", "-C1", "-"]
            done = subprocess.run(command, input=DIFFS[heading].encode(), cwd=copy, capture_output=True)
            assert not done.returncode, done.stderr.decode()
        patches = [partial(import_from, copy)]
        return launch(cfg, *words, script=str(copy / script), patches=patches).finish()

    return run


def test_every_diff_has_a_test():
    assert set(DIFFS) == {
        "An optimizer", "An evaluation", "A data source", "A change to a block", "A loss term"
    }  # fmt: skip


def test_an_optimizer(config, whole, run_changed, tmp_path):
    """It trains otherwise than AdamW, and resumes as if it had not stopped."""
    run = tmp_path / "run"
    run_changed("An optimizer", config, "--optimizer", "lion", "--learning-rate", "1e-3")
    losses = lines_of(run)
    assert losses != lines_of(whole()) and values(run)[-1] < values(run)[0] - 0.02
    assert "momentum" in "".join(checkpoint.load(run / "step_000012").optimizer)
    links(run, tmp_path / "again", 4)
    shutil.copy(run / "settings.json", tmp_path / "again")
    run_changed("An optimizer", None, "--resume", tmp_path / "again")
    assert lines_of(tmp_path / "again") == losses


def test_an_evaluation(config, whole, run_changed, tmp_path):
    """Its values come at their steps, once, though the run was resumed; training stays as it was."""
    run = tmp_path / "run"
    printed = run_changed("An evaluation", config, "--repeat-every", "2", "--max-steps", "4")
    assert f"step 4/4 | repeat {values(run, 'repeat')[-1]:.4g}" in printed
    assert "; repeat " in printed  # in the summary
    before = lines_of(run, "repeat")
    with open(run / "log.txt", "a", encoding="utf-8") as log:
        log.write("4 train 9\n4 repeat 9\n")  # of a training step after the checkpoint, then killed
    run_changed("An evaluation", None, "--resume", run, "--max-steps", "6")
    assert [int(line.split()[0]) for line in lines_of(run, "repeat")] == [0, 2, 4, 6]
    assert lines_of(run, "repeat")[:3] == before
    assert all(8 < value < 14 for value in values(run, "repeat"))  # a model that knows nothing has log(50257)
    assert lines_of(run)[:3] == lines_of(whole())[:3]  # while the learning rate rises alike
    state = checkpoint.verify(run / "step_000006")
    assert state["figures"]["repeat"] == pytest.approx(values(run, "repeat")[-1], rel=1e-4)
    panels = plot.draw([plot.Run(run)], plot.Config()).axes
    assert [axes.get_title(loc="left") for axes in panels][1:] == ["Repeat"]
    evaluated = run_changed("An evaluation", None, "--resume", run, "--eval-only")
    assert "step 6/6 | repeat" in evaluated


def test_a_data_source(run_changed, tmp_path):
    (tmp_path / "reviews.csv").write_text('stars,review\n5,"Good,\nvery good."\n1,"A ""bad"" one."\n')
    words = ("--source", tmp_path / "reviews.csv", "--text-field", "review", "--val-tokens", 5)
    run_changed("A data source", None, *words, "--out-dir", tmp_path / "data", script="fineweb.py")
    assert decode_shards(tmp_path / "data") == ["Good,\nvery good.", 'A "bad" one.']


def test_a_change_to_a_block(config, whole, run_changed, tmp_path):
    run_changed("A change to a block", config)
    ours, theirs = values(tmp_path / "run"), values(whole())
    assert ours != theirs and ours[-1] < ours[0]


def test_a_loss_term(config, whole, run_changed, tmp_path):
    """Training has the term, evaluation does not; the gradient is autograd's."""
    run_changed("A loss term", config, "--val-every", "12", "--learning-rate", "1e-9")
    base = values(whole())
    added = values(tmp_path / "run")[0] - base[0]
    assert added == pytest.approx(1e-4 * torch.tensor(50257.0).log().item() ** 2, rel=0.02)
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "copy" / "model.py")
    assert spec and spec.loader
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 4, generator=generator, requires_grad=True) for n in (16, 32))
    targets = torch.arange(16)
    changed.LinearCrossEntropy.apply(x, weight, targets, 30, True).backward()
    logits = (x2 := x.detach().requires_grad_()) @ (w2 := weight.detach().requires_grad_())[:30].t()
    loss = F.cross_entropy(logits, targets) + changed.Z_LOSS * logits.logsumexp(-1).square().mean()
    loss.backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(weight.grad, w2.grad)


def test_the_loops_of_the_page_parse():
    """Each command in them, with one value of the loop's variable."""
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    commands = re.findall(r"python (\w+)\.py ([^;\n]+)", re.sub(r"\$\w+", "1", lines))
    assert len(commands) == 7
    for script, words in commands:
        module = importlib.import_module(script)
        read = train_gpt2.read_flags if script == "train_gpt2" else partial(cli.parse, module.Config, "")
        read(shlex.split(words))


# -----------------------------------------------------------------------------
# settings for experiments


def test_a_run_like_another_has_its_settings_and_trains_as_it_did(whole, tmp_path, launch):
    first = whole()
    words = ["--like", str(first), "--log-dir", str(tmp_path)]
    cfg, _ = train_gpt2.parse_args([*words, "--learning-rate", "1e-4"])
    assert (cfg.learning_rate, cfg.n_embd, cfg.run_name, cfg.resume) == (1e-4, 4, "", "")
    launch(None, *words, "--run-name", "again").finish()
    assert lines_of(tmp_path / "again") == lines_of(first)
    for wrong, reason in (
        (["demo", "--like", str(first)], "leave out demo"),
        (["--like", str(first), "--resume"], "leave one of them out"),
        (["--like", str(tmp_path)], "give a run folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            train_gpt2.parse_args(wrong)


def test_one_batch_is_learnt_by_heart(config):
    """The first step's losses are those of any run; then every step has the same batch."""
    cfg = dataclasses.replace(config, dropout=0.0, learning_rate=0.0001, warmup_steps=0, checkpoint_every=0)
    usual = values(train_gpt2.main(cfg))
    one = values(train_gpt2.main(dataclasses.replace(cfg, overfit_one_batch=True, run_name="one")))
    assert one[0] == usual[0] and one[1:] != usual[1:]
    assert one == sorted(one, reverse=True)  # with another batch in each step, it goes up and down
    assert usual != sorted(usual, reverse=True)
