"""What strangers may have prepared: code in files and settings, names that lead out of a folder; secrets.

These are rows 24 to 26 of the table in docs/reliability.md.
"""

import base64
import contextlib
import dataclasses
import io
import json
import pickle
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from faults import each_training_forward
from helpers import ROOT, flags, resealed, resume, train
from hub_server import TOKEN, HubServer, see_hub
from safetensors import SafetensorError
from test_hub_runs import PULL, listing, on_the_hub, without

import fineweb
import generate
import hellaswag
import perplexity
import train_gpt2
from lib import checkpoint, files
from train_gpt2 import Config


@pytest.fixture(scope="module")
def toy(toy, tmp_path_factory) -> Config:
    """Four steps and two checkpoints of it."""
    changes = dict(total_batch_tokens=32, max_steps=4, checkpoint_every=2, dropout=0.0)
    return dataclasses.replace(toy, log_dir=str(tmp_path_factory.mktemp("log")), **changes)


@pytest.fixture(scope="module")
def whole(toy) -> Path:
    return train_gpt2.main(toy)


@pytest.fixture
def config(toy, tmp_path) -> Config:
    return dataclasses.replace(toy, log_dir=str(tmp_path / "log"), run_name="run")


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(whole, tmp_path / "log" / "whole"))


# -----------------------------------------------------------------------------
# 24: code where data belong


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def canary(tmp_path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Canary(canary))


def ascii_pickled(canary: Path) -> bytes:
    """A pickle that is a text, too."""
    return pickle.dumps(Canary(canary), protocol=0)


def torch_saved(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Canary(canary)}, buffer)
    return buffer.getvalue()


def object_array(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def object_archive(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.array([Canary(canary)], dtype=object))
    return buffer.getvalue()


PICKLES: dict[str, tuple[Callable[[Path], bytes], Callable[[bytes], Any]]] = {
    "pickle": (pickled, pickle.loads),
    "text pickle": (ascii_pickled, pickle.loads),
    "torch": (torch_saved, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
    "npy": (object_array, lambda data: np.load(io.BytesIO(data), allow_pickle=True)),
    "npz": (object_archive, lambda data: np.load(io.BytesIO(data), allow_pickle=True)["arr_0"]),
}


@pytest.mark.fault(24)
@pytest.mark.parametrize("kind", PICKLES)
def test_the_canaries_fire_where_pickles_are_loaded(kind, tmp_path):
    make, load = PICKLES[kind]
    load(make(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


@pytest.mark.fault(24)
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_among_weights_is_not_run(kind, config, run, canary, tmp_path):
    evil = PICKLES[kind][0](canary)
    # A model of Hugging Face's with pickled weights, with a pickle named as safetensors, with both in parts.
    for names in (
        ["pytorch_model.bin"], ["model.pt"], ["model.safetensors"],
        ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "pytorch_model.bin"],
    ):  # fmt: skip
        folder = tmp_path / names[0]
        folder.mkdir()
        shutil.copy(run / "step_000004" / "config.json", folder / "config.json")
        for name in names:
            (folder / name).write_bytes(evil)
        if names[0].endswith("index.json"):
            index = {"weight_map": {"transformer.wte.weight": names[1]}}
            (folder / names[0]).write_text(json.dumps(index), encoding="utf-8")
        refused(config, folder)
    # The same as a file; inside a checkpoint, whose state was sealed again; beside its files.
    for name in ("evil.pt", "evil.safetensors"):
        (tmp_path / name).write_bytes(evil)
        refused(config, tmp_path / name)
    for name in ("model.safetensors", "optimizer.safetensors"):
        folder = Path(shutil.copytree(run, tmp_path / f"log/{name}")) / "step_000004"
        (folder / name).write_bytes(evil)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            resume(folder)
        resealed(folder, files=digests(folder))
        with pytest.raises((ValueError, SafetensorError)):
            resume(folder)
    (run / "step_000004" / "pytorch_model.bin").write_bytes(evil)
    (run / "step_000004" / "training_args.bin").write_bytes(evil)
    checkpoint.load_model(str(run), "cpu")


def refused(config: Config, model: Path):
    """Each script that takes a model refuses this one, naming it."""
    runs: list[Callable[[], Any]] = [
        lambda: generate.main(generate.Config(model=str(model), device="cpu")),
        lambda: hellaswag.main(
            hellaswag.Config(model=str(model), device="cpu", data=str(ROOT / "README.md"))
        ),
        lambda: perplexity.main(
            perplexity.Config(model=str(model), device="cpu", data=str(ROOT / "LICENSE"))
        ),
        lambda: train(config, init_from=str(model), n_layer=None, n_head=None, n_embd=None),
        lambda: train_gpt2.parse_args(["--resume", str(model)]),
    ]
    for script in runs:
        with pytest.raises((ValueError, OSError)) as caught:
            script()
        assert model.name in str(caught.value), caught.value


def digests(folder: Path) -> dict[str, str]:
    names = json.loads((folder / "state.json").read_text(encoding="utf-8"))["files"]
    return {name: files.hash_file(folder / name) for name in names}


@pytest.mark.fault(24)
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_among_data_is_not_run(kind, config, data, run, canary, tmp_path):
    evil = PICKLES[kind][0](canary)
    for suffix in ("npy", "bin"):
        for has_manifest in (False, True):
            folder = tmp_path / f"{suffix}{has_manifest}"
            folder.mkdir()
            entries = []
            for split in ("val", "train"):
                name = f"evil_{split}_000000.{suffix}"
                (folder / name).write_bytes(evil)
                digest = files.hash_file(folder / name)
                entries.append(dict(file=name, split=split, tokens=100, sha256=digest, documents=1))
            if has_manifest:
                manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
                manifest["shards"] = entries
                (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            scripts: list[Callable[[], Any]] = [
                lambda folder=folder: train(config, dataset_path=str(folder)),
                lambda folder=folder: perplexity.main(
                    perplexity.Config(data=str(folder), model=str(run), device="cpu")
                ),
                lambda folder=folder: fineweb.main(fineweb.Config(out_dir=str(folder), inspect=True)),
                lambda folder=folder: fineweb.main(fineweb.Config(out_dir=str(folder), verify=True)),
            ]
            for script in scripts:
                with pytest.raises((ValueError, OSError), match=str(folder)):
                    script()
    for suffix in ("txt", "md", "raw", "jsonl", "parquet", "txt.gz", "txt.zst"):
        path = tmp_path / f"evil.{suffix}"
        path.write_bytes(evil)
        out = tmp_path / f"shards_of_{suffix}"
        is_text = kind == "text pickle" and suffix in ("txt", "md", "raw")  # it becomes tokens like any other
        source = fineweb.Config(source=str(path), out_dir=str(out), val_tokens=2, workers=1)
        if is_text:
            fineweb.main(source)
        else:
            with pytest.raises((ValueError, OSError), match=rf"evil\.{suffix}"):
                fineweb.main(source)
    with pytest.raises(ValueError, match=r"evil\.jsonl"):
        hellaswag.load_items(tmp_path / "evil.jsonl")


def codes(canary: Path) -> dict[str, Callable[[str], Any]]:
    """Code that makes the canary, and who would run it."""
    return {
        f"__import__('pathlib').Path({str(canary)!r}).touch()": eval,
        f"$(touch {canary})": lambda code: subprocess.run(f'echo "{code}"', shell=True, check=True),
        f"`touch {canary}`": lambda code: subprocess.run(f'echo "{code}"', shell=True, check=True),
        f"; touch {canary} #": lambda code: subprocess.run(f"true {code}", shell=True, check=True),
        f"!!python/object/apply:os.system ['touch {canary}']": lambda code: yaml.unsafe_load(code),
    }


@pytest.mark.fault(24)
def test_code_on_the_command_line_is_not_run(config, run, canary, tmp_path, capfd, tally):
    for attempt in tally(2, len(codes(canary))):
        code, runs_it = list(codes(canary).items())[attempt.number]
        runs_it(code)
        canary.unlink()  # made, as said
        for name in ("n-layer", "learning-rate", "max-steps", "optimizer", "compile", "dtype", "resume"):
            with pytest.raises((SystemExit, ValueError, OSError)):
                train_gpt2.main(*train_gpt2.parse_args([*flags(config), f"--{name}", code]))
        for change in ("dataset_path", "model_size", "init_from", "run_name", "device"):
            with pytest.raises((ValueError, OSError)):
                train(config, **{change: code})
        log_dir = tmp_path / f"log{attempt.number}"
        prompted = dict(log_dir=str(log_dir), sample_prompt=code, sample_every=4, max_steps=1, val_every=1)
        train(config, **prompted, val_tokens=100)
        generate.main(generate.Config(model=str(run), device="cpu", prompt=code, max_tokens=1))
        assert code in capfd.readouterr().out
        with pytest.raises((ValueError, OSError)):
            fineweb.main(fineweb.Config(source=code, out_dir=str(tmp_path / "out")))


@pytest.mark.fault(24)
def test_code_in_a_checkpoints_settings_is_not_run(run, canary, tally):
    folder = run / "step_000002"
    settings = json.loads((folder / "state.json").read_text(encoding="utf-8"))["config"]
    first = ["n_layer", "learning_rate", "dataset_path", "sample_prompt", "optimizer", "init_from"]
    names = [*first, *(name for name in settings if name not in first)]
    cases = [(code, name) for code in codes(canary) for name in names]
    for attempt in tally(len(first), len(cases)):
        code, name = cases[attempt.number]
        others = {code: code, "model": code} if attempt.number % 2 else {"dtype": code, "versions": code}
        resealed(folder, config={**settings, name: code}, **(others if attempt.number > len(first) else {}))
        words = ["--override"] if attempt.number % 3 else []
        with contextlib.suppress(Exception, SystemExit):  # refused, or it has no effect
            resume(folder, *words)
        assert not canary.exists()
        shutil.rmtree(run / "step_000004", ignore_errors=True)


EVIL_MODULE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import GPT2Config as EvilConfig, GPT2LMHeadModel as EvilModel
"""


def with_remote_code(folder: Path, canary: Path) -> Path:
    """Makes of a model directory one that asks for its own code to be run."""
    (folder / "modeling_evil.py").write_text(EVIL_MODULE.format(canary=str(canary)), encoding="utf-8")
    auto = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content |= {"auto_map": auto, "trust_remote_code": True, "custom_generate": "modeling_evil.py"}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.fault(24)
@pytest.mark.slow
def test_a_models_own_code_is_not_run(client, shared_hub, repo, run, config, tmp_path, canary):
    folder = with_remote_code(run / "step_000004", canary)
    runpy.run_path(str(folder / "modeling_evil.py"))
    canary.unlink()  # it would have been made
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        checkpoint.load_model(str(folder), "cpu")
    resealed(folder, files=digests(folder))
    checkpoint.load_model(str(folder), "cpu")
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    for name in ("state.json", "optimizer.safetensors"):
        (plain / name).unlink()
    generate.main(generate.Config(model=str(plain), device="cpu", max_tokens=1))
    train(config, init_from=str(plain), n_layer=None, n_head=None, n_embd=None)
    with pytest.raises(FileNotFoundError, match=f"no training state; .* --init-from {plain}"):
        train_gpt2.parse_args(["--resume", str(plain)])
    # The same on the Hub, as a model to begin from and as a run to go on with.
    shared_hub.requests.clear()
    shared_hub.commit(repo, on_the_hub(run, 4))
    client("from lib import checkpoint; checkpoint.load_model(name, 'cpu')", name=repo)
    assert shared_hub.downloads() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not shared_hub.downloads() & {"modeling_evil.py", "optimizer.safetensors", "state.json"}
    client(PULL, location=f"hf://{repo}", log=tmp_path / "pulled", name="")
    assert "modeling_evil.py" not in shared_hub.downloads()
    pickles = without(on_the_hub(run, 4), "model.safetensors") | {"pytorch_model.bin": torch_saved(canary)}
    shared_hub.commit(f"{repo}-2", pickles)
    answer = client.refusal(
        "from lib import checkpoint; checkpoint.load_model(name, 'cpu')", name=f"{repo}-2"
    )
    assert "only safetensors weights are read" in answer["message"]


@pytest.mark.fault(24)
@pytest.mark.parametrize("trust", [{}, {"HF_DATASETS_TRUST_REMOTE_CODE": "1"}], ids=["", "trusting"])
def test_a_data_sets_script_is_not_run(client, shared_hub, repo, tmp_path, canary, trust):
    script = EVIL_MODULE.format(canary=str(canary)).encode()
    shared_hub.commit(f"datasets/{repo}", {f"{repo[4:]}.py": script, "README.md": b"# evil"})
    code = "import os; os.environ.update(trust); fineweb.main(fineweb.Config(**cfg))"
    cfg = dict(source=f"hf:{repo}", out_dir=str(tmp_path / "out"))
    answer = client.ask(code, cfg=cfg, trust=trust)
    assert {"ValueError", "OSError"} & set(answer["error"]) and repo[4:] in answer["message"], answer


# -----------------------------------------------------------------------------
# 25: names that lead elsewhere


def two_by_default(*values: str) -> list:
    """Parameters of which the default test run has the first two; the campaign, and CI with -m slow, all."""
    return [*values[:2], *(pytest.param(value, marks=pytest.mark.slow) for value in values[2:])]


BAD_NAMES = [
    "../x", "/tmp/x", "a/b", "   ", ".", "..", "a\0b", "a\nb", "a\n", "-a", ".a", "a\\b", "~", "a b", "é",
    "a/../../b", "CON:", "$HOME", "*",
]  # fmt: skip


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_of_a_run_or_a_data_set_that_is_no_name_is_refused(name, config, tmp_path):
    before = listing(tmp_path)
    with pytest.raises(ValueError) as caught:
        train(config, run_name=name)
    assert f"--run-name is {name!r}" in str(caught.value)
    words = flags(dataclasses.replace(config, run_name=""))
    with pytest.raises(ValueError) as caught:
        train_gpt2.parse_args([*words, f"--run-name={name}", "--resume"])
    assert f"--run-name is {name!r}" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        fineweb.main(fineweb.Config(source="pydocs", name=name))
    assert f"--name is {name!r}" in str(caught.value)
    assert listing(tmp_path) == before


@pytest.fixture
def outside(tmp_path) -> Iterator[Path]:
    """A folder that nothing may touch, with a whole run in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious.txt").write_text("precious", encoding="utf-8")
    yield folder


@pytest.mark.fault(25)
def test_a_run_name_that_is_a_link_is_refused(config, run, outside, tmp_path):
    shutil.copytree(run, outside / "run")
    (tmp_path / "log" / "run").symlink_to(outside / "run")
    before = listing(outside)
    for newest in ("", "newest"):
        with pytest.raises(ValueError, match="log/run is a link to another place"):
            cfg = dataclasses.replace(config, resume=newest)
            train_gpt2.main(*train_gpt2.parse_args(flags(cfg)))
    assert listing(outside) == before


@pytest.mark.fault(25)
def test_links_in_place_of_checkpoints_and_their_files_are_not_followed(run, outside, tmp_path):
    for step in ("step_000002", "step_000004"):
        (run / step).rename(outside / step)
        (run / step).symlink_to(outside / step)
    before = listing(outside)
    for script in (
        lambda: train_gpt2.parse_args(["--resume", str(run)]),
        lambda: checkpoint.load_model(str(run), "cpu"),
    ):
        with pytest.raises((ValueError, OSError)):
            script()
    (run / "step_000004").unlink()
    for name in ("model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"):
        shutil.copytree(outside / "step_000004", run / "step_000004")
        (run / "step_000004" / name).unlink()
        (run / "step_000004" / name).symlink_to(outside / "step_000004" / name)
        with pytest.raises(ValueError, match=f"lists '{name}', which is not a file in its folder"):
            checkpoint.verify(run / "step_000004")
        with pytest.raises(ValueError, match=f"{name}"):
            resume(run / "step_000004")
        with pytest.raises(ValueError, match=f"{name}"):
            checkpoint.load_model(str(run), "cpu")
        shutil.rmtree(run / "step_000004")
    assert listing(outside) == before


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    "name", two_by_default(".tmp_step_000004", "step_000004", ".old_step_000004", "step_000003")
)
def test_links_in_place_of_what_saving_makes_are_not_followed(name, run, outside):
    shutil.rmtree(run / "step_000004")
    (run / name).symlink_to(outside)
    before = listing(outside)
    with contextlib.suppress(ValueError, OSError):
        resume(run / "step_000002")
    assert listing(outside) == before


@pytest.mark.fault(25)
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
@pytest.mark.parametrize("name", ["settings.json", "log.txt", "loss.png"])
def test_links_in_place_of_a_runs_other_files_are_not_followed(name, there, run, outside, pictures):
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / ("precious.txt" if there else "new.txt"))
    before = listing(outside)
    with contextlib.suppress(ValueError, OSError):
        words = ["--resume", str(run / "step_000002"), "--val-every", "4", "--val-tokens", "100"]
        train_gpt2.main(*train_gpt2.parse_args(words))
    assert listing(outside) == before
    assert (outside / "precious.txt").read_text(encoding="utf-8") == "precious"


EVIL_PATHS = ["../../precious.txt", "../precious.txt", "/etc/passwd", "a/b", "..", ".", "", "a\0b"]


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", two_by_default(*EVIL_PATHS))
def test_a_checkpoint_that_lists_a_file_elsewhere_is_refused(name, run, client, shared_hub, repo, tmp_path):
    folder = run / "step_000004"
    (tmp_path / "log" / "precious.txt").write_text("precious", encoding="utf-8")
    (tmp_path / "precious.txt").write_text("precious", encoding="utf-8")
    listed = digests(folder) | {name: files.hash_file(tmp_path / "precious.txt")}
    resealed(folder, files=listed)

    for script in (
        lambda: checkpoint.verify(folder),
        lambda: checkpoint.load_model(str(folder), "cpu"),
        lambda: resume(folder),
    ):
        with pytest.raises(ValueError):
            script()
    shared_hub.commit(repo, on_the_hub(run, 4))
    before = listing(tmp_path)
    answer = client.refusal(PULL, "ValueError", location=f"hf://{repo}", log=tmp_path / "new", name="")
    assert repr(name) in answer["message"] or f"{name} is missing" in answer["message"], answer
    left = {path: when for path, when in listing(tmp_path).items() if "/new" not in path}
    assert left == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".hub"]


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", two_by_default("../../evil", "/tmp/evil", "a/b", "..", "", " ", ".hub"))
def test_a_run_on_the_hub_with_a_bad_name_is_refused(name, run, client, shared_hub, repo, tmp_path):
    folder = run / "step_000004"
    settings = json.loads((folder / "state.json").read_text(encoding="utf-8"))["config"]
    resealed(folder, config={**settings, "run_name": name, "log_dir": "/tmp/evil"})
    shared_hub.commit(repo, on_the_hub(run, 4))
    before = listing(tmp_path)
    where = dict(location=f"hf://{repo}", log=tmp_path / "new")
    answer = client.refusal(PULL, "ValueError", **where, name="")
    assert f" is {name!r}; choose a --run-name" in answer["message"]
    left = {path: when for path, when in listing(tmp_path).items() if "/new" not in path}
    assert left == before and [path.name for path in (tmp_path / "new").iterdir()] == [".hub"]
    assert client(PULL, **where, name="good") == str(tmp_path / "new" / "good" / "step_000004")


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    "path", two_by_default("../evil", "a/../../evil", "/tmp/evil", "..\\evil", "../../model.safetensors")
)
def test_a_hub_listing_that_leads_out_is_refused(path, run, client, shared_hub, repo, home, tmp_path):
    shared_hub.commit(repo, on_the_hub(run, 4) | {path: b"evil"})
    before = listing(tmp_path)
    answer = client.refusal(PULL, location=f"hf://{repo}", log=tmp_path / "new", name="")
    assert repr(path) in answer["message"] and "leads out of its folder" in answer["message"]
    assert listing(tmp_path) == before
    shared_hub.commit(f"datasets/{repo}", {path: b"evil"})
    code = "hub_shards.HubFolder(f'hf://datasets/{repo}')"
    assert repr(path) in client.refusal(code, repo=repo)["message"]
    # A model to begin from is fetched by huggingface_hub itself; its name must fit what we ask it for.
    shared_hub.commit(f"{repo}-2", on_the_hub(run, 4) | {f"model/../{path}.safetensors": b"evil"})
    client.ask("from lib import checkpoint; checkpoint.load_model(name, 'cpu')", name=f"{repo}-2")
    assert not any(home.parent.rglob("*evil*"))
    assert list(home.parent.iterdir()) == [home]


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    "name", two_by_default("../x_train_000000.npy", "/tmp/x_train_000000.npy", "a/x_train_000000.npy", "..")
)
def test_a_manifest_on_the_hub_that_leads_out_is_refused(name, data, client, shared_hub, repo, tmp_path):
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    manifest["shards"][-1]["file"] = name
    files = {path.name: path.read_bytes() for path in data.iterdir()}
    shared_hub.commit(f"datasets/{repo}", files | {"manifest.json": json.dumps(manifest).encode()})
    before = listing(tmp_path)
    for code in (
        "hub_shards.HUB_CACHE = Path(cache); hub_shards.HubFolder(source)",
        "hub_shards.HUB_CACHE = Path(cache);"
        "fineweb.main(fineweb.Config(source=source, out_dir=cache + '/out'))",
    ):
        names = dict(source=f"hf://datasets/{repo}", cache=str(tmp_path / "cache"))
        assert repr(name) in client.refusal(code, "ValueError", **names)["message"]
    left = {path: when for path, when in listing(tmp_path).items() if "/cache" not in path}
    assert left == before
    assert not any("x_train" in path for path in listing(tmp_path))


# -----------------------------------------------------------------------------
# 26: secrets

SECRETS = {
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f001234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYSECRETKEY123",
    "MY_PASSWORD": "correct-horse-battery-staple",
}


def crash_in_step(step: int):
    """An error that no code expects, in the middle of a step."""

    def crash(at_step: int, micro_step: int):
        if at_step == step:
            raise KeyError("of nobody's making")

    each_training_forward(crash)


def assert_secret(printed: str, folder: Path, server: HubServer, token: str):
    """The secrets are neither in what was printed, nor in a file, nor in what the Hub was told."""
    places = {"the output": printed.encode(), "what the Hub heard": "".join(server.heard).encode()}
    for repo, commits in server.commits.items():
        for listed in commits.values():
            places |= {f"{repo}/{name}": content for name, content in listed.items()}
    places |= {f"uploaded {name}": content for name, content in server.uploads.items()}
    places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for secret in (token, *SECRETS.values()):
        for place, content in places.items():
            assert secret.encode() not in content, f"{place} has {secret}"
            assert base64.b64encode(secret.encode())[:-4] not in content, f"{place} has {secret}"


WRONG = "hf_AnotherSecretThatIsWrong"
FAILURES: list[tuple[str, Any]] = [
    ("", None), ("crash", None), ("wrong token", None), ("commit", 403), ("commit", 500), ("lfs", "drop"),
    ("commit", 401), ("commit", "html"), ("whoami", "html"), ("whoami", 500), ("create", 403),
    ("auth-check", 401), ("lfs", 403), ("lfs", 500), ("objects/batch", "html"), ("preupload", "drop"),
]  # fmt: skip
METHODS = {"lfs": "PUT", "whoami": "GET", "auth-check": "GET"}


@pytest.mark.fault(26)
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_secrets_are_not_in_a_runs_output_its_files_or_on_the_hub(launch, config, tmp_path, tally):
    for attempt in tally(3, len(FAILURES)):
        (where, kind), folder = FAILURES[attempt.number], tmp_path / f"{attempt.number}"
        with HubServer({}) as server:
            token = WRONG if where == "wrong token" else TOKEN
            if kind:
                server.fault(kind, where, times=1000, method=METHODS.get(where, "POST"))
            cfg = dataclasses.replace(config, log_dir=str(folder / "log"), hub_repo="me/toy")
            patches = [partial(see_hub, server.environment(folder / "home", token) | SECRETS, 2)]
            if where == "crash":
                patches.append(partial(crash_in_step, 3))
            training = launch(cfg, patches=patches)
            (code,) = training.wait()
            printed = training.printed()
            if where == "crash":
                assert code == 1 and "Traceback" in printed and "nobody's making" in printed
            elif where in ("", "commit", "lfs", "objects/batch", "preupload"):
                assert code == 0 and ("is not on the Hub; to send it" in printed) == (where != "")
            else:
                assert code == 2 and "Traceback" not in printed and "me/toy" in printed, printed
            assert code == 2 or (folder / "log" / "run" / "log.txt").exists()
            assert_secret(printed, folder, server, token)


@pytest.mark.fault(26)
@pytest.mark.timeout(600)
def test_secrets_are_not_in_what_fineweb_prints_writes_and_pushes(launch, tmp_path, tally):
    (tmp_path / "text.txt").write_text("A text of some words, and some more. " * 50, encoding="utf-8")
    failures = [failure for failure in FAILURES if failure[0] != "crash"]
    failures.insert(1, failures.pop(3))  # commit 500
    for attempt in tally(2, len(failures)):
        (where, kind), folder = failures[attempt.number], tmp_path / f"{attempt.number}"
        with HubServer({}) as server:
            token = WRONG if where == "wrong token" else TOKEN
            if kind:
                server.fault(kind, where, times=1000, method=METHODS.get(where, "POST"))
            training = launch(
                None, "--source", tmp_path / "text.txt", "--out-dir", folder / "out", "--val-tokens", "50",
                "--push-to", "me/toy", script="fineweb.py",
                patches=[partial(see_hub, server.environment(folder / "home", token) | SECRETS, 2)],
            )  # fmt: skip
            assert training.wait(timeout=200) == [2 if where else 0], training.printed()
            assert "Traceback" not in training.printed() and "me/toy" in training.printed()
            assert_secret(training.printed(), folder, server, token)
