"""plot.py: a log read line by line, pictures of one and of two runs, and what it refuses."""

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run_script
from PIL import Image

import plot
from plot import Config

LOG = "0 val 10.9\n0 hella 0.25\n0 lr 0.0001\n1 train 10.8\n2 train 9.5\n2 val 9.25\n2 hella 0.2625\n"


def make_run(folder: Path, log: str = LOG) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(log, encoding="utf-8")
    return folder


def picture(path: Path) -> np.ndarray:
    """The pixels (height, width, 3) of what must be a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def inked(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels are close to a colour."""
    return int((np.abs(pixels - np.array(colour)).max(axis=-1) < 30).sum())


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two


def test_a_log_is_read_by_stream(tmp_path):
    log = plot.read_log(make_run(tmp_path / "run"))
    assert {name: points.tolist() for name, points in log.items()} == {
        "val": [[0, 10.9], [2, 9.25]],
        "hella": [[0, 0.25], [2, 0.2625]],
        "lr": [[0, 0.0001]],
        "train": [[1, 10.8], [2, 9.5]],
    }


def test_the_command_draws_two_runs_into_one_picture(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", LOG.replace("9.", "8."))]
    out = tmp_path / "compare.png"
    done = run_script("plot.py", *map(str, runs), "--out", str(out))
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    pixels = picture(out)
    height, width, _ = pixels.shape
    assert (width, height) == (2400, 750)  # two panels
    for half in (pixels[:, : width // 2], pixels[:, width // 2 :]):  # loss, HellaSwag: both runs are in both
        assert inked(half, BLUE) > 100 and inked(half, ORANGE) > 100
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["compare.png"]


def test_one_run_goes_into_its_folder_without_a_panel_that_it_does_not_need(tmp_path, capsys):
    run = make_run(tmp_path / "run", "1 train 10.8\n2 train 9.5\n2 val 9.25\n")
    assert plot.main(Config(runs=(str(run),))) == run / "loss.png"
    assert capsys.readouterr().out == f"{run / 'loss.png'}\n"
    pixels = picture(run / "loss.png")
    assert pixels.shape[:2] == (750, 1200)
    assert inked(pixels, BLUE) > 100 and inked(pixels, ORANGE) == 0


@pytest.mark.parametrize(
    "log", ["1 train 5.0\n2 train 4.0\n", "0 val 3.5\n9 val 3.2\n", "5 hella 0.3\n", "1 val nan\n"]
)
def test_a_log_with_only_some_of_the_streams_is_drawn(tmp_path, log):
    run = make_run(tmp_path / "run", log)
    assert picture(plot.main(Config(runs=(str(run),)))).shape[0] == 750


def test_gpt2s_line_is_drawn_where_the_loss_comes_near_it(tmp_path):
    gray = (128, 128, 128)
    far = make_run(tmp_path / "far", "0 val 10.0\n100 val 5.0\n")
    near = make_run(tmp_path / "near", "0 val 10.0\n100 val 4.0\n")
    far_ink, near_ink = (inked(picture(plot.main(Config(runs=(str(run),)))), gray) for run in (far, near))
    assert near_ink > far_ink + 500


def test_the_newest_run_is_drawn_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "LOG_ROOT", tmp_path)
    for name, age in (("b", 300), ("a", 100), ("c", 200)):
        os.utime(make_run(tmp_path / name) / "log.txt", (10**9 - age, 10**9 - age))
    assert plot.main(Config()) == tmp_path / "a" / "loss.png"
    monkeypatch.setattr(plot, "LOG_ROOT", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"train_gpt2\.py demo"):
        plot.main(Config())


@pytest.mark.parametrize(
    "line", ["3 train", "three train 3.0", "3 train 3.0 4", "3 train much", "", "-1 train 3.0"]
)
def test_a_malformed_line_is_refused_with_file_and_number(tmp_path, line):
    run = make_run(tmp_path / "run", LOG + line + "\n9 train 1.0\n")
    with pytest.raises(ValueError) as error:
        plot.main(Config(runs=(str(run),)))
    assert str(run / "log.txt") in str(error.value) and "line 8" in str(error.value)
    assert not (run / "loss.png").exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["{tmp}/nowhere"], "nowhere/log.txt"),
        (["{tmp}/run", "{tmp}/nowhere"], "nowhere/log.txt"),
        (["{tmp}/run", "--out", "{tmp}/no/such/folder.png"], "folder.png"),
        (["{tmp}/run", "--out", "{tmp}/loss.xyz"], "xyz"),
        (["{tmp}/empty"], "empty/log.txt"),
    ],
)
def test_what_cannot_be_drawn_exits_2_with_the_reason(tmp_path, monkeypatch, capsys, args, reason):
    make_run(tmp_path / "run")
    make_run(tmp_path / "empty", "")
    monkeypatch.setattr(sys, "argv", ["plot.py", *(arg.format(tmp=tmp_path) for arg in args)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "plot.py"), run_name="__main__")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("plot.py: ") and reason in captured.err
    assert captured.out == ""
