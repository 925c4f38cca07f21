"""play.ipynb runs from top to bottom, offline, on a small run."""

import dataclasses
from pathlib import Path

import nbformat
from helpers import write_shards
from nbclient import NotebookClient

import tokenizer
import train_gpt2

ROOT = Path(__file__).resolve().parent.parent


def test_the_notebook_runs_on_a_checkpoint(tmp_path):
    ids = tokenizer.encode_corpus(["Return the array as a list of numbers, one after the other."] * 200)
    write_shards(tmp_path / "data", ids, shard_tokens=10_000, val_tokens=300)
    cfg = dataclasses.replace(
        train_gpt2.PRESETS["demo"], dataset_path=str(tmp_path / "data"), log_dir=str(tmp_path),
        run_name="run", n_layer=1, n_head=2, n_embd=16, seq_len=64, total_batch_tokens=1024, max_steps=2,
        sample_every=0, device="cpu", dtype="float32",
    )  # fmt: skip
    run = train_gpt2.main(cfg)
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    notebook.cells[1].source = f"MODEL = {str(run)!r}"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 2
    assert "transformer.wte.weight" in printed and "goes on with" in printed
