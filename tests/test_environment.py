"""The variables of torchrun, SLURM, Kubernetes and users: what a process takes from them, what is refused."""

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
JOB = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "8"}


def setenv(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]):
    for name in (*TORCHRUN, *ARRAY, *JOB, "LOCAL_WORLD_SIZE", "SLURM_ARRAY_TASK_STEP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("read", "variables", "expected"),
    [
        (read_group, {}, None),
        (read_group, {"WORLD_SIZE": "1", "MASTER_ADDR": "node7"}, None),  # as some clusters' images have it
        (read_group, {"RANK": "", "WORLD_SIZE": ""}, None),
        (read_group, TORCHRUN, Group(1, 2, 1, "node7", 29500)),
        (read_group, TORCHRUN | {"LOCAL_RANK": ""}, Group(1, 2, 0, "node7", 29500)),  # Kubernetes' PyTorchJob
        (read_group, TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, Group(1, 2, 1, "node7", 29500)),
        (read_group, TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, Group(0, 1, 1, "127.0.0.1", 29500)),
        (read_group, TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, Group(1, 2, 1, "127.0.0.1", 29500)),
        (read_share, {}, (0, 1)),
        (read_share, {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        (read_share, ARRAY, (3, 9)),
        (read_share, ARRAY | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}, (1, 9)),
        (read_share, ARRAY | {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),  # torchrun inside an array
        (read_share, JOB, (3, 8)),
        (read_share, JOB | {"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "1"}, (0, 1)),
        (read_share, JOB | {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),  # torchrun inside a Job
    ],
)
def test_a_process_knows_its_group_and_its_share(monkeypatch, read, variables, expected):
    setenv(monkeypatch, variables)
    assert read() == expected


@pytest.mark.parametrize(
    ("read", "variables", "reason"),
    [
        (
            read_group,
            {"RANK": "0"},
            "RANK in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with",
        ),
        (read_group, {"WORLD_SIZE": "8"}, "WORLD_SIZE in the environment, but not RANK"),
        (read_group, TORCHRUN | {"MASTER_PORT": ""}, "but not MASTER_PORT"),
        (read_group, TORCHRUN | {"RANK": "2"}, "the variable RANK is 2; WORLD_SIZE is 2: it must be smaller"),
        (
            read_group,
            TORCHRUN | {"RANK": "-1"},
            "the variable RANK is '-1'; it must be a whole number, at least 0",
        ),
        (read_group, TORCHRUN | {"RANK": "one"}, "the variable RANK is 'one'"),
        (
            read_group,
            TORCHRUN | {"WORLD_SIZE": "0"},
            "the variable WORLD_SIZE is '0'; it must be a whole number, at least 1",
        ),
        (read_group, TORCHRUN | {"LOCAL_RANK": "gpu0"}, "the variable LOCAL_RANK is 'gpu0'"),
        (
            read_group,
            TORCHRUN | {"MASTER_PORT": "99999"},
            "the variable MASTER_PORT is '99999'; it must be a whole number, 1 to",
        ),
        (read_group, TORCHRUN | {"MASTER_PORT": "http"}, "the variable MASTER_PORT is 'http'"),
        (read_share, {"RANK": "3"}, "the variable WORLD_SIZE is ''"),
        (read_share, {"WORLD_SIZE": "3"}, "the variable RANK is ''"),
        (read_share, {"RANK": "3", "WORLD_SIZE": "3"}, "RANK is 3; WORLD_SIZE is 3"),
        (read_share, JOB | {"WORLD_SIZE": ""}, "INDEX is 3, but there is no WORLD_SIZE: set it to the Job's"),
        (read_share, JOB | {"WORLD_SIZE": "3"}, "JOB_COMPLETION_INDEX is 3; WORLD_SIZE is 3: it must be"),
        (read_share, ARRAY | {"SLURM_ARRAY_TASK_COUNT": ""}, "the variable SLURM_ARRAY_TASK_COUNT is ''"),
        (
            read_share,
            ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"},
            "the SLURM array has 2 tasks; this is number 3",
        ),
        (read_share, ARRAY | {"SLURM_ARRAY_TASK_STEP": "0"}, "the variable SLURM_ARRAY_TASK_STEP is '0'"),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(monkeypatch, read, variables, reason):
    setenv(monkeypatch, variables)
    with pytest.raises(ValueError) as refused:
        read()
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


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "plot.py", "generate.py", "hellaswag.py"])
def test_a_python_without_the_packages_is_told_how_to_get_them(script):
    command, env = [sys.executable, "-S", str(ROOT / script)], {"PATH": os.environ["PATH"]}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert (
        "activate the environment (. .venv/bin/activate), or: pip install -r requirements.txt" in run.stderr
    )
