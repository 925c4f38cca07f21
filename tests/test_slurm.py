"""train.sbatch with stand-ins for SLURM's commands: its signal, and the job that queues itself again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from lib import checkpoint

SRUN = """#!/usr/bin/env bash
# Two tasks on this machine; the highest exit code is srun's.
shift # --kill-on-bad-exit=0
export SLURM_NTASKS=2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & echo $! >>"$TASKS"; done
code=0
for task in $(cat "$TASKS"); do wait "$task" || { c=$?; [ $c -gt $code ] && code=$c; }; done
exit $code
"""

SCONTROL = """#!/usr/bin/env bash
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.mark.slow
@pytest.mark.fault(7)
@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_a_job_that_is_signaled_saves_is_queued_again_and_goes_on(config, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    tasks, requeued = tmp_path / "tasks", tmp_path / "requeued"
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ, "PATH": path, "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "job",
        "TASKS": str(tasks), "REQUEUED": str(requeued),
    }  # fmt: skip
    words = [
        "--dataset-path", config.dataset_path, "--log-dir", str(tmp_path), "--n-layer", "1", "--n-head", "1",
        "--n-embd", "16", "--seq-len", "32", "--batch-size", "2", "--total-batch-tokens", "256",
        "--device", "cpu", "--no-compile", "--val-every", "0", "--hellaswag-every", "0",
        "--sample-every", "0", "--warmup-steps", "2",
    ]  # fmt: skip

    output = open(tmp_path / "output.txt", "a", encoding="utf-8")

    def printed() -> str:
        return (tmp_path / "output.txt").read_text(encoding="utf-8")

    def job(*more: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "train.sbatch"), *words, *more]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    run = tmp_path / f"job-{os.getpid()}"
    first = job("--max-steps", "100000")
    deadline = time.monotonic() + 60
    while not (run / "log.txt").exists() or not (run / "log.txt").read_text(encoding="utf-8"):
        assert first.poll() is None and time.monotonic() < deadline, printed()
        time.sleep(0.1)
    for task in tasks.read_text(encoding="utf-8").split():
        os.kill(int(task), signal.SIGUSR1)
    assert first.wait(60) == 0, printed()
    assert requeued.read_text(encoding="utf-8").split() == [str(os.getpid())]
    (saved,) = checkpoint.list_steps(run)
    step = checkpoint.verify(saved)["step"]

    tasks.unlink()
    assert job("--max-steps", str(step + 3)).wait(60) == 0, printed()
    assert checkpoint.list_steps(run)[-1].name == f"step_{step + 3:06d}"
    assert len(requeued.read_text(encoding="utf-8").split()) == 1
