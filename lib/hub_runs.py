"""A run on the Hugging Face Hub: its newest checkpoint, its log, its curves and a model card.

    check_targets(cfg, is_new=True)                      # before the first step
    push("org/name", Path("log/<run>/step_000250"))
    checkpoint = pull("hf://org/name", Path("log"))

On disk: log/<run>/step_<step>/ and log.txt; log/.hub/ while a download is incomplete.
"""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib import checkpoint, files, hub, run_folder, run_log
from lib.folders import STATE
from lib.trackers import check_login


def check_targets(cfg: Any, is_new: bool):
    """Raises OSError or ValueError if the run's tracker refuses the login, if checkpoints cannot be sent to
    --hub-repo, or if a new run would replace another's there. A resumed run goes on without the Hub."""
    repo = cfg.hub_repo
    if is_new:
        check_login(cfg.tracker)
    if not repo:
        return
    try:
        hub.check_push(repo, "model")
        _, found = hub.list_hub(repo, None, [STATE], "model")
    except OSError as error:
        if is_new or hub.is_final(error):
            raise
        print(f"note   checkpoints wait for the Hub: {error}", flush=True)
        return
    if found and is_new:
        raise ValueError(
            f"--hub-repo {repo} holds a checkpoint: go on with it (--resume hf://{repo}) or choose another"
        )


def push(repo: str, folder: Path):
    """Sends a checkpoint, its run's log and curves and a model card to the Hub in one commit. Raises OSError
    naming the repository."""
    run, state = folder.parent, json.loads((folder / STATE).read_text(encoding="utf-8"))
    content: dict[str, Path | bytes] = {name: folder / name for name in (*state["files"], STATE)}
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "loss.png"
        if not run_folder.draw_curves(run, picture):
            content["loss.png"] = picture.read_bytes()
    content["log.txt"] = (run / "log.txt").read_bytes()
    content["README.md"] = model_card(repo, state, "loss.png" in content).encode()
    hub.upload(repo, "model", content, f"step {state['step']}")


def model_card(repo: str, state: dict[str, Any], has_picture: bool) -> str:
    """The README on the Hub: data, figures, how to use the model and how to resume its training."""
    run, seen = state["config"], state["step"] * state["config"]["total_batch_tokens"]
    start = f"the weights of {run['init_from']}" if run["init_from"] else "random weights"
    val_loss, hella = state.get("val_loss"), state.get("hellaswag")
    rows = {
        "trained on": f"{state.get('trained_on', run['dataset_path'])}, from {start}",
        "step": f"{state['step']:,} of {run['max_steps']:,}; {seen:,} tokens seen",
        "validation loss": "not measured" if val_loss is None else f"{val_loss:.4f} nats per token",
        "HellaSwag": "not measured" if hella is None else f"{hella:.2%} (acc_norm, completion style)",
        "optimizer": f"{run['optimizer']}, learning rate {run['learning_rate']:g}, "
        f"{run['total_batch_tokens']:,} tokens per step, seed {run['seed']}",
    }
    for stream, value in state.get("figures", {}).items():
        if stream not in run_log.STREAMS:
            rows[run_log.find_stream(stream).label] = run_log.format_value(stream, value)
    dataset = run["dataset_path"].removeprefix(hub.HUB_PREFIX).partition("@")[0]
    is_hub = dataset != run["dataset_path"]
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]",
        *([f"datasets: [{dataset}]"] if is_hub else []), "---", "",
        f"# {repo.partition('/')[2]}", "", state.get("model", "GPT-2") + ".", "",
        *(["![training and validation loss](loss.png)", ""] if has_picture else []),
        "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items()), "",
        "```python", "from transformers import pipeline", "",
        f'pipeline("text-generation", model="{repo}")({json.dumps(run["sample_prompt"])})', "```", "",
        "The repository holds the optimizer's state, too. Training resumes exactly where it stopped:", "",
        "```sh", f"python train_gpt2.py --resume hf://{repo}", "```", "",
    ])  # fmt: skip


def pull(location: str, log_root: Path, run_name: str = "") -> Path:
    """Downloads the checkpoint of hf://org/name[@revision] to log_root/<run>/step_<step> and the run's log
    beside it; <run> is run_name or the run's own name. Several processes may call it at once.

    Raises ValueError for a repository without a checkpoint, OSError if the Hub does not answer.
    """
    repo, revision = hub.parse_hub(location, "model")
    commit, found = hub.list_hub(repo, revision, repo_type="model")
    if STATE not in found:
        raise ValueError(
            f"{location} holds no training state ({STATE}); to begin from its weights: --init-from {repo}"
        )
    incoming = log_root / ".hub" / repo.replace("/", "--") / commit
    incoming.mkdir(parents=True, exist_ok=True)
    with FileLock(incoming.with_suffix(".lock")):
        hub.fetch(found[STATE], incoming)
        state = checkpoint.verify_state(incoming)
        own_name = state.get("config", {}).get("run_name", "")
        origin = "--run-name" if run_name else f"the name of the run in {location}"
        run = run_folder.build_path(log_root, run_name or own_name, origin)
        final = run / f"step_{state['step']:06d}"
        with contextlib.suppress(ValueError):
            if checkpoint.verify(final) == state:  # another process has fetched it, or it was made here
                shutil.rmtree(incoming)
                return final
        for name in state["files"]:
            if name not in found:
                raise ValueError(f"{location} is not whole: {name} is missing")
            hub.fetch(found[name], incoming)
        checkpoint.verify(incoming)
        run_lock = run_folder.lock(run)
        try:
            run.mkdir(exist_ok=True)
            if "log.txt" in found:
                hub.fetch(found["log.txt"], incoming)
                (incoming / "log.txt").replace(run / "log.txt")
            shutil.rmtree(incoming / ".incoming", ignore_errors=True)  # missing if all files were here
            if final.exists():
                shutil.rmtree(checkpoint.set_aside(final))
            incoming.rename(final)
            files.flush(run)
        finally:
            run_folder.unlock(run_lock)
    return final
