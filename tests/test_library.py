"""The project as a library: the code blocks of README.md and docs/clients.md, and a changed model.py."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, VOCAB_SIZE, random_model, resealed, save_checkpoint

from lib import checkpoint, files, tokenizer
from model import GPT


def block(page: str, heading: str = "") -> str:
    """The first Python block of a page, or the first below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(
        r"```python\n(.*?)```", text.partition(heading)[2] if heading else text, flags=re.DOTALL
    )[0]


def test_the_library_block_loads_generates_trains_and_saves(tmp_path, monkeypatch, capsys):
    model = random_model(vocab_size=VOCAB_SIZE)
    model.transformer["wte"].weight.data.mul_(0.1)  # type: ignore[union-attr]
    step = save_checkpoint(tmp_path / "log" / "my-run", model, step=2)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(block("README.md"), scope)
    ids, loss = scope["ids"], scope["loss"]
    assert capsys.readouterr().out == tokenizer.decode(model.generate(ids, 20, temperature=0)[0]) + "\n"
    assert loss.item() == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item())
    trained = GPT.from_pretrained(tmp_path / "mine")
    assert {p.name for p in step.iterdir()} - {"optimizer.safetensors", "state.json"} == {
        p.name for p in (tmp_path / "mine").iterdir()
    }
    assert trained(ids[:, :-1], ids[:, 1:]) < loss
    assert torch.equal(trained(ids), scope["model"](ids))


def test_model_py_works_alone(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    code = block("docs/clients.md", "## model.py alone") + "print(loss.item(), tokens.shape)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=True, encoding="utf-8",
    )  # fmt: skip
    assert re.fullmatch(r"10\.\d+ torch\.Size\(\[1, 13\]\)\n", done.stdout)


def test_code_is_hashed_without_comments_docstrings_and_layout(tmp_path):
    def hash_text(text: str) -> str:
        (tmp_path / "x.py").write_text(text, encoding="utf-8")
        return files.hash_code(tmp_path / "x.py")

    text = 'class A:\n    """Doc."""\n\n    def f(self, x):\n        return x * 2  # twice\n'
    assert hash_text(text) == hash_text("class A:\n def f(self, x): return (x\n  * 2)\n")
    assert len({hash_text(text.replace(old, new)) for old, new in (("", ""), ("2", "3"), ("*", "+"))}) == 3


def test_a_checkpoint_of_another_model_py_is_loaded_with_a_note(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "run", random_model(vocab_size=VOCAB_SIZE))
    note = f"note   {folder} was trained with another model.py; if its network differs, results are wrong\n"
    entries = {"none": "", "same": files.hash_code(ROOT / "model.py"), "other": "0" * 64}
    for kind, entry in entries.items():
        resealed(folder, **({"model_py": entry} if entry else {}))
        for load in (
            lambda: checkpoint.load(folder),
            lambda: checkpoint.load_model(str(folder), "cpu"),
            lambda: checkpoint.load_model(str(folder.parent), "cpu"),
        ):
            load()
            assert capsys.readouterr() == ("", note if kind == "other" else "")
