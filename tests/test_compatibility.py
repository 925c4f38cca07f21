"""Files of earlier commits still work: tests/fixtures/run_<commit>.tar.xz is a run of each.

The fixture is a run of twelve steps: its shards, its log of all steps and its checkpoint of step 6. Embedding
rows that the data do not use are zero, which keeps it small.
"""

import tarfile
from pathlib import Path

import pytest
from helpers import ROOT, lines_of, values

from lib import checkpoint, shards


@pytest.fixture
def begun(tmp_path) -> Path:
    with tarfile.open(ROOT / "tests" / "fixtures" / "run_6bad787.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "begun"


def test_a_run_begun_by_6bad787_goes_on_with_its_very_losses(begun, launch):
    before = {stream: values(begun, stream) for stream in ("train", "val", "lr", "norm")}
    printed = launch(None, "--resume", str(begun), "--dataset-path", str(begun.parent / "toy")).finish()
    assert "resumed at step 6" in printed and len(lines_of(begun)) == 12
    assert "another model.py" not in printed  # its checkpoint has no hash of one
    assert (begun / "settings.json").is_file() and not (begun / "config.json").exists()
    for stream, expected in before.items():
        assert values(begun, stream) == pytest.approx(expected, rel=1e-5)


def test_its_shards_checkpoint_and_model_are_read(begun):
    manifest = shards.verify(begun.parent / "toy")
    assert sum(shard["tokens"] for shard in manifest["shards"]) == 3000
    assert checkpoint.verify(begun / "step_000006")["step"] == 6
    assert checkpoint.load_model(str(begun), "cpu")[1] == str(begun / "step_000006")
