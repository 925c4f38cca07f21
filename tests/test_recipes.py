"""The bench of recipes trains as train_gpt2.py does, and each technique does what its flag says."""

import dataclasses
import json
import math

import pytest
import torch

from lib.optimizers import orthogonalize
from log.recipes import recipe as bench
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
        batch_tokens=tokens, tokens=STEPS * tokens, val_tokens=toy.val_tokens, warmup=1 / 3, lr=1e-2, seed=3,
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
    tiny, toy, tmp_path, optimizer, schedule
):
    kind = "linear" if schedule == "wsd" else schedule
    result = bench.train(dataclasses.replace(tiny, optimizer=optimizer, schedule=kind, embedding_lr=3.0))
    run = train(
        toy, optimizer=optimizer, seed=tiny.seed, learning_rate=tiny.lr, max_steps=STEPS, warmup_steps=2,
        schedule=schedule, embedding_lr_ratio=3.0, dropout=0.0, dtype="auto", val_every=STEPS,
        checkpoint_every=0, log_dir=str(tmp_path),
    )  # fmt: skip
    assert [loss for _, loss in result["train"]] == pytest.approx(values(run), abs=1e-4)
    assert result["val"] == pytest.approx(values(run, "val")[-1], abs=1e-4)


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


def test_normuon_weighs_the_last_steps_as_an_average_that_begins_at_zero():
    matrix, updates = torch.zeros(3, 4), [draw(3, 4), draw(3, 5)[:, :4]]
    muon = TrialMuon({"h.0.mlp.c_fc.weight": matrix}, Recipe(normuon=True), torch.float32)
    first, second = (muon.normalize_rows(matrix, update) for update in updates)
    squares = [update.square().mean(1, keepdim=True) for update in updates]
    expected = updates[1] / (0.95 * squares[0] + squares[1]).sqrt()
    torch.testing.assert_close(second / second.norm(), expected / expected.norm())
    assert not torch.allclose(first, second)


def test_polar_express_comes_nearer_to_an_orthogonal_matrix():
    step = take_step(torch.zeros(32, 32), draw(32, 32), polar_express=True) / (0.2 * math.sqrt(32))
    errors = (torch.linalg.svdvals(step) - 1).abs()
    assert errors.max() < (torch.linalg.svdvals(orthogonalize(draw(1, 32, 32))[0]) - 1).abs().max()


def test_cautious_decay_only_shrinks_what_the_step_shrinks_too():
    matrix, gradient = draw(8, 8), draw(8, 9)[:, :8].contiguous()
    update = -take_step(torch.zeros(8, 8), gradient)
    after = take_step(matrix, gradient, weight_decay=0.1, cautious=True)
    torch.testing.assert_close(after, matrix * torch.where(update * matrix > 0, 0.9, 1.0) - update)


def test_momentum_rises_and_falls():
    recipe = Recipe(momentum_warmup=0.2, momentum_cooldown=0.1)
    found = [bench.get_momentum(recipe, progress) for progress in (0.0, 0.1, 0.2, 0.5, 0.9, 0.95, 1.0)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.95, 0.9, 0.85])


def test_batches_and_sequences_grow(tiny, monkeypatch):
    whole = dataclasses.replace(tiny, tokens=12 * 64)
    grown = bench.train(dataclasses.replace(whole, grow_batch=True))
    steps = [b - a for (a, _), (b, _) in zip([[0, 0], *grown["train"]], grown["train"])]
    assert steps == [16] * 16 + [32] * 8 + [64] * 4
    shapes, forward = [], bench.GPT.forward
    monkeypatch.setattr(
        bench.GPT, "forward", lambda self, x, y: shapes.append((*x.shape,)) or forward(self, x, y)
    )
    bench.train(dataclasses.replace(whole, grow_sequences=True))
    assert shapes[:12] == [(16, 4)] * 4 + [(8, 8)] * 4 + [(4, 16)] * 4


def test_weights_are_averaged_over_the_last_steps(tiny):
    """The mean of one step's weights is that step's; the mean of all steps' is another model."""
    one, all_ = (bench.train(dataclasses.replace(tiny, average=share)) for share in (1 / STEPS, 1.0))
    assert one["val"] == one["last"] == all_["last"] != all_["val"]


def test_projections_can_begin_at_zero():
    model = bench.make_model(Recipe(n_layer=1, n_head=1, n_embd=8, seq_len=8, zero_projections=True))
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
    (folder / "base_1.json").write_text(json.dumps({"val": 1.0}))  # is not run again
    monkeypatch.setattr(sweep, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["sweep", str(recipes), "--seeds", "1", "2"])
    sweep.main()
    found = {path.stem: json.loads(path.read_text())["val"] for path in folder.iterdir()}
    assert found.keys() == {"base_1", "base_2", "slow_1", "slow_2"} and found["base_1"] == 1.0
    assert found["slow_2"] > found["base_2"] > 1
    gains = [1.0 - found["slow_1"], found["base_2"] - found["slow_2"]]
    assert f"{sum(gains) / 2:.4f} ± {abs(gains[0] - gains[1]) / 2:.4f}" in capsys.readouterr().out


def test_the_tokens_to_a_reference_s_loss_are_found_between_two_budgets(tmp_path, capsys):
    """A loss of 10 - log2(tokens). "fast" needs a half, then a quarter of the tokens; "weak" has too few."""

    def write(name: str, seed: int, tokens: int, loss: float):
        result = {
            "val": loss,
            "recipe": {"tokens": tokens},
            "train": [[tokens // 2, loss + 1], [tokens, loss]],
        }
        (tmp_path / f"{name}_{seed}.json").write_text(json.dumps(result))

    for seed in (1, 2):
        write("adamw", seed, 1024, 1 + math.log2(seed))
        for budget in (256, 2048):
            write(f"fast@{budget}", seed, budget, 10 - math.log2(budget))
            write(f"weak@{budget}", seed, budget, 20 - math.log2(budget))
    results = sweep.load_results(["adamw", "fast@256", "fast@2048", "weak@256", "weak@2048"], tmp_path)
    sweep.print_ratios(results)
    out = capsys.readouterr().out
    assert f"fast needs {0.375:7.4f} ± {math.sqrt(2) / 8:.4f} of the tokens of adamw" in out
    assert "weak needs" not in out and out.count("\n") == 1
    sweep.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
