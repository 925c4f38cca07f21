"""play.ipynb runs from top to bottom, offline, with a checkpoint and without; its outputs are of one pass."""

import dataclasses
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from helpers import write_shards
from nbclient import NotebookClient

import train_gpt2
from lib import tokenizer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "play.ipynb"


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures_in(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


@pytest.mark.slow
def test_the_notebook_runs_on_a_checkpoint(tmp_path):
    ids = tokenizer.encode_corpus(["Return the array as a list of numbers, one after the other."] * 200)
    write_shards(tmp_path / "data", ids, shard_tokens=10_000, val_tokens=300)
    cfg = dataclasses.replace(
        train_gpt2.PRESETS["demo"], dataset_path=str(tmp_path / "data"), log_dir=str(tmp_path),
        run_name="run", n_layer=1, n_head=2, n_embd=16, seq_len=64, total_batch_tokens=1024, max_steps=2,
        sample_every=0, device="cpu", dtype="float32",
    )  # fmt: skip
    run = train_gpt2.main(cfg)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = pictures_in(notebook)
    notebook.cells[1].source = f"MODEL = {str(run)!r}"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert pictures_in(notebook) == committed == 8
    printed = "".join(output.get("text", "") for output in outputs_of(notebook))
    assert "transformer.wte.weight" in printed and "acc chooses" in printed and "run, steps 0 to 2" in printed
    first, last = re.findall(r"loss (\S+) at first, (\S+) at the end", printed)[0]
    assert abs(float(first) - 10.82) < 0.3 and float(last) < 0.05  # the batch is learnt by heart
    assert "and it recites it fine." in printed.partition("at the end")[2]


@pytest.mark.slow
def test_without_a_checkpoint_the_notebook_trains_one(tmp_path, monkeypatch):
    left_out = shutil.ignore_patterns(".*", "log", "data", "tests", "docs")
    root = Path(shutil.copytree(ROOT, tmp_path / "fresh", ignore=left_out))
    monkeypatch.setenv("PYTHONPATH", str(root))  # conftest.py set it to ROOT
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(root)}}).execute()
    printed = "".join(output.get("text", "") for output in outputs_of(notebook))
    (run,) = (root / "log").iterdir()
    assert run.name.startswith("notebook_") and f"{run.name}/step_000080 on" in printed
    assert "holds no checkpoint" in printed and "trains a very small model" in printed
    assert pictures_in(notebook) == 8
    losses = [float(loss) for loss in re.findall(r"validation loss (\S+) \|", printed)]
    assert losses[0] > 10.5 and losses[-1] < 7


def test_the_committed_outputs_are_of_one_pass_and_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    assert NOTEBOOK.stat().st_size < 700_000
