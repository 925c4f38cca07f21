"""plot.py: a log is read, drawn (checked in the figure, or in the text of an SVG), and printed; refusals."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import plot
from plot import Config, Run

LOG = "0 val 10.9\n0 hella 0.25\n0 lr 0.0001\n1 train 10.8\n2 train 9.5\n2 val 9.25\n2 hella 0.2625\n"


def make_run(folder: Path, log: str = LOG, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(log, encoding="utf-8")
    if settings:
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def figure_of(*runs: Path, **options: Any) -> Any:
    return plot.draw([Run(run) for run in runs], Config(**options))


def curves(axes: Any) -> list[tuple[list[float], list[float]]]:
    """The curves on the axes, in order, without the grey lines."""
    lines = [line for line in axes.lines if line.get_color() != plot.GREY and len(line.get_xdata())]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def legend(of: Any) -> list[str]:
    """The labels in the legend of a panel, or of a whole figure."""
    found = of.legends[0] if hasattr(of, "legends") else of.get_legend()
    return [text.get_text() for text in found.get_texts()]


def words(svg: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


# -----------------------------------------------------------------------------
# reading and arithmetic


def test_a_log_is_read_by_stream_and_half_a_last_line_is_left_out(tmp_path):
    log = plot.read_log(make_run(tmp_path / "run", LOG + "3 train 8."))
    assert {name: points.tolist() for name, points in log.items()} == {
        "val": [[0, 10.9], [2, 9.25]],
        "hella": [[0, 0.25], [2, 0.2625]],
        "lr": [[0, 0.0001]],
        "train": [[1, 10.8], [2, 9.5]],
    }


def test_the_mean_is_centred_narrow_at_the_beginning_and_one_sided_at_the_end():
    values = np.array([9.0, 4, 1, 7, 4, 10, 1, 4, 7, 4, 4, 10])
    means = [9, 4, 1, 7, (7 + 4 + 10) / 3, 5, 5, 4, (1 + 4 + 7 + 4 + 4) / 5, 29 / 5, 25 / 4, 18 / 3]
    assert plot.smooth(values, 5).tolist() == pytest.approx(means)
    assert plot.smooth(values, 1).tolist() == values.tolist()
    assert plot.smooth(values[:0], 5).tolist() == []
    line = np.arange(1000.0)
    assert plot.smooth(line, 101)[:950] == pytest.approx(line[:950])  # no lag, no bend


def test_steps_tokens_and_hours(tmp_path):
    """Steps of 900 tokens that take 9, 3 and 18 s: step 2 begins after 12 s of training."""
    log = "0 val 9\n0 train 9\n0 toks 100\n1 train 8\n1 toks 300\n2 val 7\n2 train 6\n2 toks 50\n3 val 5\n"
    run = make_run(tmp_path / "run", log, total_batch_tokens=900)
    expected = {
        "step": ([0, 1, 2], [0, 2, 3], "step"),
        "tokens": ([0, 900, 1800], [0, 1800, 2700], "tokens of training"),
        "hours": ([0, 9 / 3600, 12 / 3600], [0, 12 / 3600, 30 / 3600], "hours of training (no evaluation)"),
    }
    for unit, (train, val, label) in expected.items():
        axes = figure_of(run, x=unit).axes[0]
        (_, (x, y), (val_x, val_y)) = curves(axes)
        assert x == pytest.approx(train) and y == [9, 8, 6]
        assert val_x == pytest.approx(val) and val_y == [9, 7, 5]
        assert axes.get_xlabel() == label


def test_a_run_that_began_late_counts_its_hours_from_there(tmp_path):
    run = make_run(tmp_path / "run", "5 train 9\n5 toks 1\n6 train 8\n6 toks 1\n", total_batch_tokens=3600)
    assert Run(run).curve("train", "hours")[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("unit", "settings", "log", "reason"),
    [
        ("tokens", {}, LOG, "total_batch_tokens in .*settings.json"),
        ("hours", {}, LOG, "total_batch_tokens in .*settings.json"),
        ("hours", {"total_batch_tokens": 8}, LOG, "toks in .*log.txt"),
    ],
)
def test_an_axis_that_the_run_cannot_give_is_refused(tmp_path, unit, settings, log, reason):
    run = make_run(tmp_path / "run", log, **settings)
    with pytest.raises(ValueError, match=reason):
        plot.main(Config(runs=(str(run),), x=unit))
    assert not (run / "loss.png").exists()


# -----------------------------------------------------------------------------
# the picture


def test_the_raw_curve_is_faint_beneath_its_mean(tmp_path):
    losses = [9.0, 9, 9, 9, 7, 8, 6, 7]
    run = make_run(tmp_path / "run", "".join(f"{i} train {loss}\n" for i, loss in enumerate(losses)))
    axes = figure_of(run, smooth=2).axes[0]  # even: 3
    raw, mean = (line for line in axes.lines if len(line.get_xdata()))
    assert list(raw.get_ydata()) == losses and raw.get_alpha() < 0.5
    assert list(mean.get_ydata()) == pytest.approx([9, 9, 9, 9, 8, 7, 7, 6.5]) and mean.get_alpha() is None
    assert "mean of 3 steps" in axes.get_title(loc="left")
    axes = figure_of(run).axes[0]  # a fiftieth of eight steps is none
    assert [y for _, y in curves(axes)] == [losses, losses] and "mean" not in axes.get_title(loc="left")


def test_by_default_the_mean_is_over_a_fiftieth_of_a_runs_steps(tmp_path):
    logs = {n: "".join(f"{i} train {i % 2}\n" for i in range(n)) for n in (100, 350)}
    runs = [make_run(tmp_path / f"{n}", log) for n, log in logs.items()]
    axes = figure_of(*runs).axes[0]
    assert "mean of 3 to 7 steps" in axes.get_title(loc="left")
    _, (_, short), _, (_, long) = curves(axes)
    assert {round(3 * y) for y in short[4:-1]} == {1, 2} and {round(7 * y) for y in long[12:-3]} == {3, 4}
    assert "mean of 9 steps" in figure_of(*runs, smooth=9).axes[0].get_title(loc="left")


def test_the_command_draws_two_runs_into_one_picture(script, tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", LOG.replace("9.25", "8.5"))]
    out = tmp_path / "compare.svg"
    done = script("plot.py", *runs, "--out", out)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["run", "last", "step", "validation", "loss", "HellaSwag", "acc_norm"],
        ["b", "2", "8.5000", "26.25%"],  # the lower loss comes first
        ["a", "2", "9.2500", "26.25%"],
        [str(out)],
    ]
    found = words(out)
    for expected in (
        "best validation loss, HellaSwag", "a: 9.250, 26.25%", "b: 8.500, 26.25%", "loss (nats per token)",
        "GPT-2 124M (build-nanogpt): 29.55%", "GPT-3 Small (Brown et al., 2020): 33.7%",
    ):  # fmt: skip
        assert expected in found, expected
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["compare.svg"]


def test_each_run_is_drawn_in_a_look_of_its_own(tmp_path):
    runs = [make_run(tmp_path / f"{i}") for i in range(20)]
    lines = figure_of(*runs).axes[1].lines
    looks = {(line.get_color(), line.get_linestyle()) for line in lines if line.get_color() != plot.GREY}
    assert len(looks) == 20


@pytest.mark.parametrize(("number", "name"), [(2, "run"), (12, "run"), (30, "gpt2-124M_2026-11-21_10-30-")])
def test_the_names_of_many_runs_can_be_read(tmp_path, number, name):
    """They are inside the picture and beside the panels, and do not overlap."""
    figure = figure_of(*(make_run(tmp_path / f"{name}{i}") for i in range(number)))
    FigureCanvasAgg(figure).draw()
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == [f"{name}{i}: 9.250, 26.25%" for i in range(number)]
    boxes = [text.get_window_extent() for text in texts]
    for box, below in zip(boxes, boxes[1:]):
        assert box.y0 >= below.y1 - 1
    panels, whole = [axes.get_window_extent() for axes in figure.axes], figure.bbox
    for box in boxes:
        assert max(panel.x1 for panel in panels) < box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert min(panel.width for panel in panels) > 500  # they have kept their room


def test_runs_of_the_same_name_have_their_paths(tmp_path):
    runs = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    assert legend(figure_of(*runs)) == [f"{run}: 9.250, 26.25%" for run in runs]


SMALLEST = ["GPT-2 124M (build-nanogpt): 29.55%", "GPT-3 Small (Brown et al., 2020): 33.7%"]
MEDIUM = ["GPT-2 350M (llm.c): 37.52%", "GPT-3 Medium (Brown et al., 2020): 43.6%"]
LARGE = ["GPT-2 774M (llm.c): 43.2%", "GPT-3 Large (Brown et al., 2020): 51%"]
XL = ["GPT-2 1558M (build-nanogpt): 48.93%", "GPT-3 XL (Brown et al., 2020): 54.7%"]


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, SMALLEST),
        ({"model_size": "774M", "n_layer": 4}, SMALLEST),
        ({"model_size": "350M", "n_layer": None}, MEDIUM),
        ({"model_size": "774M"}, LARGE),
        ({"model_size": "124M", "init_from": "gpt2-xl"}, XL),
    ],
)
def test_the_grey_lines_are_those_of_the_models_size(tmp_path, settings, lines):
    hella = figure_of(make_run(tmp_path / "run", **settings)).axes[1]
    assert legend(hella) == lines
    drawn = [line.get_ydata()[0] for line in hella.lines if line.get_color() == plot.GREY]
    assert [f"{100 * height:.4g}%" for height in drawn] == [line.rpartition(" ")[2] for line in lines]


def test_gpt2s_loss_is_drawn_where_a_run_comes_near_it_and_is_of_its_size(tmp_path):
    far = make_run(tmp_path / "far", "0 val 10.0\n100 val 5.0\n")
    near = make_run(tmp_path / "near", "0 val 10.0\n100 val 4.0\n")
    large = make_run(tmp_path / "large", "0 val 10.0\n100 val 3.0\n", model_size="774M")
    reference = "GPT-2 124M on FineWeb-Edu (build-nanogpt): 3.29"
    assert reference in legend(figure_of(far, near)) + legend(figure_of(near).axes[0])
    assert reference not in legend(figure_of(far).axes[0]) + legend(figure_of(large).axes[0])


def test_a_logarithmic_axis(tmp_path):
    run = make_run(tmp_path / "run", total_batch_tokens=500_000)
    figure = figure_of(run, log=True, x="tokens")
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    FigureCanvasAgg(figure).draw()
    assert "1M" in [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert figure.axes[0].get_xlim()[0] > 100_000  # step 0 is not on the axis, and does not stretch it
    assert not np.isfinite(figure.axes[0].transData.transform((0, 9))[0])  # and no line begins there


def test_the_steep_beginning_can_be_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    assert figure_of(run, max_loss=9.75).axes[0].get_ylim() == (pytest.approx(9.225), 9.75)
    assert figure_of(run).axes[0].get_ylim()[1] > 10.9
    with pytest.raises(ValueError, match=r"--max-loss is 9\.0; it must be above the lowest loss, 9\.250"):
        figure_of(run, max_loss=9.0)


@pytest.mark.parametrize(("theme", "paper"), [("light", (255, 255, 255)), ("dark", (13, 17, 23))])
def test_a_png_in_the_themes_colours(tmp_path, theme, paper):
    run = make_run(tmp_path / "run", "1 train 10.8\n2 train 9.5\n2 val 9.25\n")
    assert plot.main(Config(runs=(str(run),), theme=theme)) == run / "loss.png"
    with Image.open(run / "loss.png") as image:
        assert (image.format, image.size) == ("PNG", (1280, 800))  # one panel: there is no HellaSwag
        pixels = np.asarray(image.convert("RGB")).astype(int)
    distance = np.abs(pixels - np.array(paper)).max(axis=-1)
    assert (pixels[0, 0] == paper).all() and 0.8 < (distance < 8).mean() < 0.999
    blue = [int(plot.THEMES[theme][3][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels - blue).max(axis=-1) < 8).sum() > 500


@pytest.mark.parametrize(("name", "begin"), [("a.pdf", b"%PDF"), ("a.SVG", b"<?xml"), ("a", b"\x89PNG")])
def test_the_suffix_chooses_the_format(tmp_path, name, begin):
    run = make_run(tmp_path / "run")
    out = plot.main(Config(runs=(str(run),), out=str(tmp_path / name)))
    assert out and out.read_bytes().startswith(begin)
    assert out.name == (name if "." in name else "a.png")


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    (run / "loss.png").write_bytes(b"the old one")

    def fail(figure, file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    before = {path.name for path in run.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        plot.main(Config(runs=(str(run),)))
    assert (run / "loss.png").read_bytes() == b"the old one"
    assert {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize(
    "log",
    ["1 train 5.0\n2 train 4.0\n", "0 val 3.5\n9 val 3.2\n", "5 hella 0.3\n", "1 val nan\n", "1 lr 0.1\n"],
)
def test_a_log_with_only_some_of_the_streams_is_drawn(tmp_path, log):
    run = make_run(tmp_path / "run", log)
    assert plot.main(Config(runs=(str(run),), text=True, out=str(tmp_path / "a.svg")))
    assert "loss (nats per token)" in words(tmp_path / "a.svg")


def test_a_loss_that_is_not_finite_leaves_the_others_as_they_are(tmp_path):
    losses = [9, 9, "nan", 9, "inf", 9, 8, 7]
    log = "".join(f"{i} train {loss}\n" for i, loss in enumerate(losses)) + "4 val nan\n5 val 6\n"
    axes = figure_of(make_run(tmp_path / "run", log), smooth=3).axes[0]
    assert curves(axes)[1:] == [([0, 1, 3, 5, 6, 7], pytest.approx([9, 9, 9, 9, 8, 7.5])), ([5], [6])]
    assert legend(axes) == ["run: 6.000"]


def test_values_that_are_not_finite_are_counted_and_a_speed_of_zero_divides_nothing(tmp_path, capsys):
    log = "0 train 3.0\n0 toks 0\n0 val nan\n1 train inf\n1 toks 100\n1 val nan\n2 train 2.0\n2 toks 100\n"
    run = make_run(tmp_path / "run", log, total_batch_tokens=3600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.main(Config(runs=(str(run),), text=True, out=str(tmp_path / "a.png"), x="hours"))
    captured = capsys.readouterr()
    assert f"{run}: 1 of 3 values of train are not finite" in captured.err
    assert f"{run}: 2 of 2 values of val are not finite" in captured.err
    with pytest.raises(ValueError, match=r"--max-loss is 1\.0, but no loss is finite"):
        nothing = make_run(tmp_path / "nothing", "0 train nan\n0 val nan\n")
        plot.main(Config(runs=(str(nothing),), max_loss=1.0))


def test_the_newest_run_is_drawn_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.files, "LOGS", tmp_path)
    for name, age in (("b", 300), ("a", 100), ("c", 200)):
        os.utime(make_run(tmp_path / name) / "log.txt", (10**9 - age, 10**9 - age))
    assert plot.main(Config()) == tmp_path / "a" / "loss.png"
    monkeypatch.setattr(plot.files, "LOGS", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"train_gpt2\.py demo"):
        plot.main(Config())


# -----------------------------------------------------------------------------
# several seeds, other streams


def test_seeds_are_one_curve_with_a_band_and_changed_code_is_another(tmp_path):
    """The last validation losses of `new` are 7, 8 and 9: their standard deviation is 1."""
    runs = []
    for name, first in (("old", 8), ("new", 7)):  # the same settings: the code was changed
        for seed in (1, 2, 3):
            loss = first + seed - 1
            log = f"0 train 10\n0 val 10\n1 train {loss}\n1 mine {loss}\n2 val {loss}\n"
            log += f"2 train {loss}\n" if seed < 3 else ""  # a run that is behind
            settings = {"seed": seed, "run_name": f"{name}-{seed}", "learning_rate": 1e-3}
            runs.append(make_run(tmp_path / f"{name}-s{seed}", log, **settings))
    other = make_run(tmp_path / "new-s4", "0 train 9\n2 val 5\n", seed=4, learning_rate=2e-3)
    figure = figure_of(*runs, other, band=True)
    names = ["old (3 seeds): 9.000", "new (3 seeds): 8.000", "new-s4: 5.000"]
    assert legend(figure) == names and "lowest to highest" in figure.legends[0].get_title().get_text()
    loss, mine = figure.axes
    assert curves(loss)[2:4] == [([0, 1], [10, 8]), ([0, 2], [10, 8])]  # train and val of `new`
    low, high = (f(loss.collections[2].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert (low, high) == (7, 10)  # at step 1: 7 to 9
    assert mine.get_title(loc="left") == "Mine" and curves(mine) == [([1], [9]), ([1], [8])]
    table = plot.format_table(plot.group_runs([Run(run) for run in [*runs, other]], Config(band=True)))
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["new-s4", "2", "5.0000", "-"],
        ["new", "(3", "seeds)", "2", "8.0000", "±", "1.0000", "8", "±", "1"],
        ["old", "(3", "seeds)", "2", "9.0000", "±", "1.0000", "9", "±", "1"],
    ]
    assert len(legend(figure_of(*runs))) == 6  # without --band
    with pytest.raises(ValueError, match=r"new-s1 and new-s5 have the same --seed, 1"):
        figure_of(*runs, shutil.copytree(runs[3], tmp_path / "new-s5"), band=True)


def test_runs_of_another_model_py_are_no_seeds_of_one_run(tmp_path):
    for number, code in (1, "a"), (2, "a"), (3, "b"):
        run = make_run(tmp_path / f"x-{number}", "0 val 9\n", seed=number, learning_rate=1e-3)
        (run / "step_000001").mkdir()
        (run / "step_000001" / "state.json").write_text(json.dumps({"model_py": code}), encoding="utf-8")
    runs = [tmp_path / f"x-{number}" for number in (1, 2, 3)]
    assert legend(figure_of(*runs, band=True)) == ["x (2 seeds): 9.000", "x-3: 9.000"]


def test_names_that_differ_in_more_than_the_last_number_are_no_seeds_of_one_run(tmp_path):
    names = ("relu-1", "relu-2", "relu2-1", "relu2-2")
    log, settings = "0 train 10\n1 val 9\n", {"learning_rate": 1e-3}
    runs = [make_run(tmp_path / name, log, seed=int(name[-1]), **settings) for name in names]
    assert legend(figure_of(*runs, band=True)) == ["relu (2 seeds): 9.000", "relu2 (2 seeds): 9.000"]


def test_more_streams_have_panels_of_their_own(tmp_path):
    log = LOG + "".join(f"{i} norm {i % 2}\n" for i in range(200))
    run = make_run(tmp_path / "run", log + "2 train 9\n")
    assert len(figure_of(run).axes) == 2
    axes = figure_of(run, streams=("norm", "lr"), smooth=3).axes
    assert [a.get_title(loc="left") for a in axes[2:]] == ["Learning rate", "Gradient norm before clipping"]
    assert curves(axes[2]) == [([0], [0.0001])]
    assert curves(axes[3])[0][1][100] == pytest.approx(2 / 3)  # many values: their mean
    with pytest.raises(ValueError, match="--streams norms is in no log; the runs have train, val, hella, lr"):
        figure_of(run, streams=("norms",))


# -----------------------------------------------------------------------------
# the terminal


def test_a_curve_as_bars():
    down = np.arange(8.0)[::-1]
    assert plot.draw_bars(np.linspace(0, 1, 8), down, 8) == "█▇▆▅▄▃▂▁"
    assert plot.draw_bars(np.linspace(0, 0.5, 8), down, 15) == "█▇▆▅▄▃▂▁       "  # it ends in the middle
    assert plot.draw_bars(np.array([0.0, 1.0]), np.array([2.0, 3.0]), 5) == "▁   █"  # and nothing is made up
    x, y = np.array([0.0, 0.01, 1.0]), np.array([0.0, 4.0, 9.0])
    assert plot.draw_bars(x, y, 5) == "▁   █"  # means, 2 and 9
    assert plot.draw_bars(np.array([0.0, 1.0]), np.array([2.0, 2.0]), 2) == "▁▁"


def test_the_command_prints_the_curves_of_each_run_and_draws_only_if_told(script, tmp_path):
    run = make_run(tmp_path / "a", "".join(f"{i} train {14 - i}\n{i} val {10 - i}\n" for i in range(8)))
    runs = [run, make_run(tmp_path / "b", "0 hella 0.25\n2000 hella 0.3\n")]
    done = script("plot.py", *runs, "--text")
    assert done.returncode == 0, done.stderr
    title_a, train, val, title_b, hella = done.stdout.splitlines()[3:]  # below the table
    assert (title_a, title_b) == ("a, steps 0 to 7", "b, steps 0 to 2,000")
    assert train.startswith("train      14 █") and train.endswith("▁ 7")
    assert val.startswith("val        10 █") and val.endswith("▁ 3, best 3")
    assert hella.startswith("hella    0.25 ▁") and hella.endswith("█ 0.3, best 0.3")
    assert not list(tmp_path.rglob("*.png"))
    done = script("plot.py", run, "--text", "--out", tmp_path / "a.png")
    assert len(done.stdout.splitlines()) == 4 and (tmp_path / "a.png").exists()


# -----------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "line", ["3 train", "three train 3.0", "3 train 3.0 4", "3 train much", "a note", "-1 train 3.0"]
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
        (["{tmp}/run", "--out", "{tmp}/loss.xyz"], "loss.xyz ends in .xyz; it must be one of .png, .svg,"),
        (["{tmp}/empty"], "empty/log.txt"),
        (["{tmp}/run", "--smooth", "0"], "--smooth is 0; it must be at least 1"),
        (["{tmp}/cut"], "cut/config.json"),
        (["{tmp}/odd"], "odd/settings.json: the field total_batch_tokens is"),
    ],
)
def test_what_cannot_be_drawn_exits_2_with_the_reason(script, tmp_path, args, reason):
    make_run(tmp_path / "run")
    make_run(tmp_path / "empty", "")
    (make_run(tmp_path / "cut") / "config.json").write_text('{"model', encoding="utf-8")  # as of earlier days
    make_run(tmp_path / "odd", total_batch_tokens="many")
    done = script("plot.py", *(arg.format(tmp=tmp_path) for arg in args))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("plot.py: ") and reason in done.stderr
