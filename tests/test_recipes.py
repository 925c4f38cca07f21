"""The bench of recipes trains as train_gpt2.py does, and each technique does what its flag says."""

import dataclasses
import json
import math

import pytest
import torch

import train_gpt2
from lib import device
from log.recipes import recipe as trial
from log.recipes import sweep
from log.recipes.recipe import Recipe, TrialMuon
from tests.helpers import train, values

STEPS = 6


@pytest.fixture
def tiny(toy) -> Recipe:
    """A recipe of six steps, with the shape and the data of the toy run."""
    tokens = toy.total_batch_tokens
    return Recipe(
        data=toy.dataset_path, n_layer=toy.n_layer, n_head=toy.n_head, n_embd=toy.n_embd, seq_len=toy.seq_len,
        batch_tokens=tokens, tokens=STEPS * tokens, val_tokens=toy.val_tokens, warmup_ratio=1 / 3, lr=1e-2,
        seed=3,
    )  # fmt: skip


def take_step(matrix: torch.Tensor, gradient: torch.Tensor, **techniques) -> torch.Tensor:
    """The matrix after a step of Muon at rate 1, without decay unless it is given."""
    recipe = Recipe(**{"weight_decay": 0.0, "lr": 1.0, **techniques})
    parameter = torch.nn.Parameter(matrix.clone())
    parameter.grad = gradient
    TrialMuon({"h.0.attn.c_attn.weight": parameter}, recipe, torch.float32).step()
    return parameter.detach()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_with_the_trainer_s_settings_a_recipe_trains_as_the_trainer_does(
    tiny, toy, tmp_path, monkeypatch, optimizer, schedule
):
    monkeypatch.setattr(trial, "MICRO_BATCH", 3)  # of four windows a step
    recipe = dataclasses.replace(
        tiny, optimizer=optimizer, schedule=schedule, embedding_lr_ratio=3.0, position_lr_ratio=0.2,
        momentum=0.8,
    )  # fmt: skip
    result = trial.train(recipe)
    run = train(
        toy, optimizer=optimizer, seed=tiny.seed, learning_rate=tiny.lr, max_steps=STEPS, warmup_steps=2,
        schedule=schedule, embedding_lr_ratio=3.0, position_lr_ratio=0.2, momentum=0.8, dropout=0.0,
        dtype="auto", val_every=STEPS, checkpoint_every=0, log_dir=str(tmp_path),
    )  # fmt: skip
    assert [loss for _, loss in result["train"]] == pytest.approx(values(run), abs=1e-4)
    assert result["val"] == pytest.approx(values(run, "val")[-1], abs=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "decay"), [(10, 0.4), (10, 0.95), (10, 0.0), (0, 1.0)])
def test_the_schedule_is_the_trainer_s(schedule, warmup, decay):
    recipe = Recipe(
        tokens=100 * 256, batch_tokens=256, warmup_ratio=warmup / 100, schedule=schedule, decay_ratio=decay
    )
    cfg = train_gpt2.Config(
        learning_rate=recipe.lr, max_steps=100, warmup_steps=warmup, schedule=schedule, decay_ratio=decay
    )
    found = [trial.get_lr(recipe, 256 * step, 256, decay) for step in range(100)]
    assert found == pytest.approx([train_gpt2.get_lr(step, cfg) for step in range(100)])


def test_a_warm_up_that_ends_amid_a_step_does_not_pass_the_peak():
    recipe = Recipe(tokens=100 * 256, batch_tokens=256, warmup_ratio=0.035)
    assert max(trial.get_lr(recipe, 256 * step, 256, 0.4) for step in range(100)) == recipe.lr


@pytest.mark.parametrize(
    "changes", [{"tokens": 1000}, {"batch_tokens": 1000}, {"batch_tokens": 512, "grow_batch": True}]
)
def test_steps_that_are_not_whole_are_refused(changes):
    with pytest.raises(ValueError, match=r"must be a multiple of"):
        Recipe(**{"tokens": 1024 * 1000, **changes})


def test_each_group_has_its_rate_its_decay_and_the_embedding_its_moments():
    recipe = Recipe(
        n_layer=1, n_head=1, n_embd=8, seq_len=8, lr=0.5, embedding_lr_ratio=4, position_lr_ratio=3,
        vector_lr_ratio=2, decay_ratio=0.7, rest_decay_ratio=0.9, embedding_beta1=0.8, embedding_beta2=0.99,
        embedding_eps=1e-10, weight_decay=0.2, optimizer="adamw",
    )  # fmt: skip
    model = trial.make_model(recipe)
    (adamw,) = trial.make_optimizers(recipe, model, torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    by_name = {names[p]: group for group in adamw.param_groups for p in group["params"]}
    assert by_name.keys() == set(names.values())

    def facts(name: str) -> tuple:
        group = by_name[f"transformer.{name}"]
        return tuple(group[key] for key in ("lr_ratio", "decay_ratio", "betas", "eps", "weight_decay"))

    assert facts("wte.weight") == (4, 0.9, (0.8, 0.99), 1e-10, 0.2)
    assert facts("wpe.weight") == (3, 0.9, (0.9, 0.95), 1e-8, 0.2)
    assert facts("ln_f.bias") == facts("h.0.mlp.c_fc.bias") == (2, 0.9, (0.9, 0.95), 1e-8, 0.0)
    assert facts("h.0.mlp.c_fc.weight") == (1, 0.7, (0.9, 0.95), 1e-8, 0.2)
    with_muon = dataclasses.replace(recipe, optimizer="muon")
    adamw, muon = trial.make_optimizers(with_muon, model, torch.float32)
    assert [group["lr_ratio"] for group in adamw.param_groups] == [4, 3, 2]
    (group,) = muon.param_groups
    assert (group["lr_ratio"], group["decay_ratio"], group["weight_decay"]) == (1, 0.7, 0.2)
    assert {names[p] for p in group["params"]} == {
        name for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name
    }


def test_query_key_and_value_can_be_matrices_of_their_own():
    gradient = draw(24, 8)
    joint = take_step(torch.zeros(24, 8), gradient, split_qkv=True)
    apart = [take_step(torch.zeros(8, 8), part.clone()) for part in gradient.chunk(3)]
    torch.testing.assert_close(joint, torch.cat(apart))
    assert not torch.allclose(joint, take_step(torch.zeros(24, 8), gradient))


def test_normuon_gives_rows_one_size_and_keeps_the_matrix_s():
    plain = take_step(torch.zeros(24, 8), draw(24, 8))
    rows = take_step(torch.zeros(24, 8), draw(24, 8), normuon=True).norm(dim=1)
    torch.testing.assert_close(rows, rows[:1].expand(24))
    torch.testing.assert_close(rows.norm(), plain.norm())


def test_normuon_leaves_a_matrix_without_a_gradient_as_it_is():
    """As in the first step of projections that begin at zero."""
    matrix = draw(24, 8)
    assert torch.equal(take_step(matrix, torch.zeros(24, 8), normuon=True), matrix)


def test_normuon_weighs_the_last_steps_as_an_average_that_begins_at_zero():
    matrix, updates = torch.zeros(3, 4), [draw(3, 4), draw(3, 5)[:, :4]]
    muon = TrialMuon({"h.0.mlp.c_fc.weight": matrix}, Recipe(normuon=True), torch.float32)
    first, second = (muon.normalize_rows(matrix, update) for update in updates)
    squares = [update.square().mean(1, keepdim=True) for update in updates]
    expected = updates[1] / (0.95 * squares[0] + squares[1]).sqrt()
    torch.testing.assert_close(second / second.norm(), expected / expected.norm())
    assert not torch.allclose(first, second)


def test_polar_express_applies_its_five_polynomials_to_the_singular_values():
    step = take_step(torch.zeros(32, 32), draw(32, 32), polar_express=True) / (0.2 * math.sqrt(32))
    s = torch.linalg.svdvals(draw(32, 32))
    s = s / s.norm() / 1.01
    for a, b, c in trial.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(torch.linalg.svdvals(step), s.sort(descending=True).values, atol=1e-4, rtol=0)
    x = 0.5  # the first polynomial: 8.287 x / 1.01 and so on
    a, b, c = trial.POLAR_EXPRESS[0]
    first = (
        8.28721201814563 * x / 1.01
        - 23.595886519098837 * (x / 1.01) ** 3
        + 17.300387312530933 * (x / 1.01) ** 5
    )
    assert a * x + b * x**3 + c * x**5 == pytest.approx(first)


def test_cautious_decay_only_shrinks_what_the_step_shrinks_too():
    matrix, gradient = draw(8, 8), draw(8, 9)[:, :8].contiguous()
    update = -take_step(torch.zeros(8, 8), gradient)
    after = take_step(matrix, gradient, weight_decay=0.1, cautious=True)
    torch.testing.assert_close(after, matrix * torch.where(update * matrix > 0, 0.9, 1.0) - update)


def test_momentum_rises_and_falls():
    recipe = Recipe(momentum_warmup=0.2, momentum_cooldown=0.1)
    found = [trial.get_momentum(recipe, progress) for progress in (0.0, 0.1, 0.2, 0.5, 0.9, 0.95, 1.0)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.95, 0.9, 0.85])


def test_a_run_s_momentum_is_the_recipe_s(tiny, monkeypatch):
    found, step = [], TrialMuon.step
    monkeypatch.setattr(
        TrialMuon, "step", lambda self: found.append(self.param_groups[0]["momentum"]) or step(self)
    )
    trial.train(dataclasses.replace(tiny, momentum_warmup=0.5))
    assert found == pytest.approx([0.85, 0.85 + 0.1 / 3, 0.85 + 0.2 / 3, 0.95, 0.95, 0.95])


def test_batches_and_sequences_grow(tiny, monkeypatch):
    whole = dataclasses.replace(tiny, tokens=12 * 64)
    grown = trial.train(dataclasses.replace(whole, grow_batch=True))
    steps = [b - a for (a, _), (b, _) in zip([[0, 0], *grown["train"]], grown["train"])]
    assert steps == [16] * 16 + [32] * 8 + [64] * 4
    shapes, forward = [], trial.GPT.forward
    monkeypatch.setattr(
        trial.GPT, "forward", lambda self, x, y: shapes.append((*x.shape,)) or forward(self, x, y)
    )
    trial.train(dataclasses.replace(whole, grow_sequences=True))
    assert shapes[:12] == [(16, 4)] * 4 + [(8, 8)] * 4 + [(4, 16)] * 4


def test_weights_are_averaged_over_the_last_steps(tiny):
    """The mean of one step's weights is that step's; the mean of all steps' is another model."""
    one, all_ = (trial.train(dataclasses.replace(tiny, average=share)) for share in (1 / STEPS, 1.0))
    assert one["val"] == one["last"] == all_["last"] != all_["val"]


def test_projections_can_begin_at_zero():
    model = trial.make_model(Recipe(n_layer=1, n_head=1, n_embd=8, seq_len=8, zero_projections=True))
    zero = {name for name, p in model.named_parameters() if p.dim() == 2 and not p.any()}
    assert {name.split(".h.0.")[1] for name in zero} == {"attn.c_proj.weight", "mlp.c_proj.weight"}


def test_a_sweep_goes_on_where_it_was_stopped_and_compares(tiny, tmp_path, monkeypatch, capsys):
    changed = {
        f.name: getattr(tiny, f.name) for f in dataclasses.fields(tiny) if f.default != getattr(tiny, f.name)
    }
    flags = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in changed.items() if name != "seed"
    )
    recipes = tmp_path / "few.txt"
    recipes.write_text(f"all: {flags}  # as the toy run\nbase:\nslow: --lr 1e-5\n")
    folder = tmp_path / "runs" / "few"
    folder.mkdir(parents=True)
    there = {"val": 1.0, "train": [], "dtype": str(device.pick_dtype("auto", torch.device("cpu"))[0])}
    there["recipe"] = dataclasses.asdict(dataclasses.replace(tiny, seed=1))
    (folder / "base_1.json").write_text(json.dumps(there))  # is not run again
    monkeypatch.setattr(sweep, "HERE", tmp_path)
    sweep.main(sweep.Config(recipes, seeds=("1", "2")))
    found = {path.stem: json.loads(path.read_text())["val"] for path in folder.iterdir()}
    assert found.keys() == {"base_1", "base_2", "slow_1", "slow_2"} and found["base_1"] == 1.0
    assert found["slow_2"] > found["base_2"] > 1
    gains = [1.0 - found["slow_1"], found["base_2"] - found["slow_2"]]
    assert f"{sum(gains) / 2:.4f} ± {abs(gains[0] - gains[1]) / 2:.4f}" in capsys.readouterr().out


@pytest.fixture
def write(tmp_path):
    """Writes a result, whose curve has two points."""

    def write(name: str, seed: int, tokens: int, loss: float, dtype: str = "torch.float32"):
        recipe = dataclasses.asdict(Recipe(tokens=tokens, batch_tokens=256, seed=seed))
        curve = [[tokens // 2, loss + 1], [tokens, loss]]
        result = {"val": loss, "recipe": recipe, "train": curve, "dtype": dtype}
        (tmp_path / f"{name}_{seed}.json").write_text(json.dumps(result))
        return {name: ["--batch-tokens", "256", "--tokens", str(tokens)]}

    return write


def test_the_tokens_to_a_reference_s_loss_are_found_between_two_budgets(write, tmp_path, capsys):
    """A loss of 10 - log2(tokens). "fast" needs a half, then a quarter of the tokens; "weak" has too few."""
    recipes = {}
    for seed in (1, 2):
        recipes |= write("adamw", seed, 1024, 1 + math.log2(seed))
        for budget in (256, 2048):
            recipes |= write(f"fast@{budget}", seed, budget, 10 - math.log2(budget))
            recipes |= write(f"weak@{budget}", seed, budget, 12.5 - math.log2(budget))
    results = sweep.load_results(recipes, tmp_path)
    sweep.print_ratios(results)
    out = capsys.readouterr().out
    assert f"fast needs {0.375:7.4f} ± {math.sqrt(2) / 8:.4f} of the tokens of adamw" in out
    assert "weak: 1 losses of adamw are outside" in out and "weak needs" not in out
    assert out.count("\n") == 2
    sweep.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_gains_are_over_the_list_s_first_recipe_only(write, tmp_path, capsys):
    recipes = {"base": ["--lr", "1"], **write("one", 1, 1024, 3.0), **write("two", 1, 1024, 2.0)}
    sweep.print_table(sweep.load_results(recipes, tmp_path))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["one", "1", "3.0000"], ["two", "1", "2.0000"]]


def test_results_of_other_flags_or_of_two_precisions_are_refused(write, tmp_path):
    recipes = write("one", 1, 1024, 3.0)
    with pytest.raises(ValueError, match=r"one_1\.json is of other flags than .*--lr 1: remove it"):
        sweep.load_results({"one": [*recipes["one"], "--lr", "1"]}, tmp_path)
    recipes |= write("two", 1, 1024, 3.0, dtype="torch.bfloat16")
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and torch\.float32"):
        sweep.load_results(recipes, tmp_path)


@pytest.mark.parametrize("path", sorted(sweep.HERE.glob("*.txt")), ids=lambda path: path.stem)
def test_the_results_that_are_here_are_of_their_list(path):
    folder = sweep.HERE / "runs" / path.stem
    results = sweep.load_results(sweep.read_list(path), folder)
    assert sum(map(len, results.values())) == len([*folder.glob("*.json")])


def test_a_failed_run_stops_the_sweep(tmp_path, monkeypatch):
    started = []

    def fail(flags: list[str], out):
        started.append(out.stem)
        raise RuntimeError("no memory")

    monkeypatch.setattr(sweep, "run", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        sweep.run_all({str(n): [] for n in range(100)}, tmp_path, sweep.Config(jobs=1))
    assert len(started) < 100
