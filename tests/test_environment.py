"""The variables of torchrun, SLURM and users: what a process takes from them, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, flags

from lib.environment import Group, read_group, read_number, read_share

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
ARRAY = {f"SLURM_ARRAY_TASK_{name}": value for name, value in {"ID": "3", "MIN": "0", "COUNT": "9"}.items()}


def setenv(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]):
    for name in (*TORCHRUN, *ARRAY, "LOCAL_WORLD_SIZE", "SLURM_ARRAY_TASK_STEP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "group"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "node7"}, None),  # as some clusters' images have it
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        (TORCHRUN, Group(1, 2, 1, "node7", 29500)),
        (TORCHRUN | {"LOCAL_RANK": ""}, Group(1, 2, 0, "node7", 29500)),  # Kubernetes' PyTorchJob
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, Group(1, 2, 1, "node7", 29500)),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, Group(0, 1, 1, "127.0.0.1", 29500)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, Group(1, 2, 1, "127.0.0.1", 29500)),
    ],
)
def test_a_process_knows_its_group(monkeypatch, variables, group):
    setenv(monkeypatch, variables)
    assert read_group() == group


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"RANK": "0"}, "RANK in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE in the environment, but not RANK"),
        (TORCHRUN | {"MASTER_PORT": ""}, "but not MASTER_PORT"),
        (TORCHRUN | {"RANK": "2"}, "the variable RANK is 2; WORLD_SIZE is 2: it must be smaller"),
        (TORCHRUN | {"RANK": "-1"}, "the variable RANK is '-1'; it must be a whole number, at least 0"),
        (TORCHRUN | {"RANK": "one"}, "the variable RANK is 'one'"),
        (
            TORCHRUN | {"WORLD_SIZE": "0"},
            "the variable WORLD_SIZE is '0'; it must be a whole number, at least 1",
        ),
        (TORCHRUN | {"LOCAL_RANK": "gpu0"}, "the variable LOCAL_RANK is 'gpu0'"),
        (
            TORCHRUN | {"MASTER_PORT": "99999"},
            "the variable MASTER_PORT is '99999'; it must be a whole number, 1 to",
        ),
        (TORCHRUN | {"MASTER_PORT": "http"}, "the variable MASTER_PORT is 'http'"),
    ],
)
def test_half_a_group_is_refused_by_name(monkeypatch, variables, reason):
    setenv(monkeypatch, variables)
    with pytest.raises(ValueError) as refused:
        read_group()
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        (ARRAY, (3, 9)),
        (ARRAY | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}, (1, 9)),
        (ARRAY | {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),  # torchrun inside an array
    ],
)
def test_a_process_knows_its_share(monkeypatch, variables, share):
    setenv(monkeypatch, variables)
    assert read_share() == share


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"RANK": "3"}, "the variable WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "3"}, "the variable RANK is ''"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, "RANK is 3; WORLD_SIZE is 3"),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": ""}, "the variable SLURM_ARRAY_TASK_COUNT is ''"),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}, "the SLURM array has 2 tasks; this is number 3"),
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "0"}, "the variable SLURM_ARRAY_TASK_STEP is '0'"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(monkeypatch, variables, reason):
    setenv(monkeypatch, variables)
    with pytest.raises(ValueError) as refused:
        read_share()
    assert reason in str(refused.value)


def test_a_number_may_have_a_default(monkeypatch):
    setenv(monkeypatch, {"RANK": " 7\n"})
    assert (read_number("RANK"), read_number("WORLD_SIZE", 5)) == (7, 5)


def run_alone(config, *prefix: str, num_gpus: int = 1, **variables: str):
    """train_gpt2.py behind a prefix, with more variables in its environment."""
    words = [sys.executable, str(ROOT / "train_gpt2.py"), *flags(config), "--num-gpus", str(num_gpus)]
    options: Any = dict(capture_output=True, text=True, timeout=120, check=False)
    return subprocess.run([*prefix, *words], env=os.environ | variables, **options)


def test_a_rank_alone_ends_a_training_with_its_reason(config):
    done = run_alone(config, RANK="0")
    assert done.returncode == 2 and not Path(config.log_dir, config.run_name).exists()
    assert done.stderr.startswith("train_gpt2.py: RANK in the environment, but not WORLD_SIZE"), done.stderr


@pytest.mark.slow
def test_training_needs_no_user_name_no_home_and_no_host_name(config):
    stranger = ("unshare", "--uts", "--user", "--map-user=54321", "--map-group=54321")
    if subprocess.run([*stranger, "true"], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces need util-linux and the right to make them")
    unset = [word for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME") for word in ("-u", name)]
    rename = ("unshare", "--uts", "sh", "-c", 'hostname no.such.host.invalid; exec "$@"', "sh")
    done = run_alone(config, *rename, *stranger, "env", *unset, num_gpus=2)
    assert done.returncode == 0, done.stderr
    assert "54321" in subprocess.run([*stranger, "id"], check=True, capture_output=True, text=True).stdout
