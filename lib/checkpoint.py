"""A checkpoint: a Hugging Face model directory, and beside it what training needs to go on.

    log/<run>/step_000250/
        model.safetensors  config.json  generation_config.json
        tokenizer.json  tokenizer_config.json  vocab.json  merges.txt
        optimizer.safetensors           # the optimizer's tensors, by parameter name
        state.json                      # step, configuration, ...; SHA-256 of every file and of itself

    transformers.pipeline("text-generation", model="log/<run>/step_000250")      # works as it is

A directory of that name is whole or does not exist: it is written under a temporary name, flushed file by
file, and renamed. Loading it runs no code.
"""

import dataclasses
import errno
import inspect
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import cli, disk, files, pretrained, schema, tokenizer
from lib.device import pick_device
from lib.environment import is_local_main
from lib.folders import OPTIMIZER, STATE, STEP_NAME, identify, list_steps, newest_run, suggest_folder
from lib.sharded import gather
from model import END_OF_TEXT, GPT, HUB_NAMES, SIZE_NAMES, SIZES, GPTConfig

FORMAT_VERSION = 1  # of state.json, whose seal must stay; earlier versions wrote none


@dataclass(frozen=True)
class Checkpoint:
    """The model, the optimizer's tensors by name, and the state given to `save`."""

    model: GPT
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


class Found(NamedTuple):
    """A verified checkpoint: its folder, and the content of its state.json."""

    folder: Path
    state: dict[str, Any]


def gather_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> tuple[dict, dict]:
    """Copies of the weights and of the optimizers' tensors by name, on the CPU. All ranks must call it.
    Only rank 0 gets them."""
    from torch.distributed.checkpoint import state_dict as dcp

    weights: Any
    optimizer: Any
    weights, optimizer = dcp.get_state_dict(model, optimizers)  # whatever wraps or shards the model
    tensors = {
        f"{name}/{key}": value for name, values in optimizer["state"].items() for key, value in values.items()
    }
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    copies: tuple[dict, dict] = {}, {}
    for copy, group in zip(copies, (weights, tensors)):
        for name, part in group.items():
            whole = gather(part)
            if "wte" in name and whole.dim() == 2:
                whole = whole[: model.config.vocab_size]  # its padding stays out of checkpoints
            if is_main:  # a copy also of what is on the CPU: training changes it while it is written
                copy[name] = torch.empty_like(whole, device="cpu").copy_(whole)
    return copies


def load_optimizers(model: GPT, optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]):
    """Gives the optimizers the tensors of `gather_state`. Rates and decay come from the flags."""
    from torch.distributed.checkpoint import state_dict as dcp

    state_dict: Any = dcp.get_optimizer_state_dict(model, optimizers)
    padding = (0, 0, 0, model.config.padded_vocab_size - model.config.vocab_size)
    for name, values in state_dict["state"].items():
        saved = {key: tensors[f"{name}/{key}"] for key in values}
        # `values` stays as it is, because torch reads from it how the tensors are sharded.
        state_dict["state"][name] = {
            key: torch.nn.functional.pad(tensor, padding) if "wte" in name and tensor.dim() == 2 else tensor
            for key, tensor in saved.items()
        }
    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    dcp.set_optimizer_state_dict(model, optimizers, state_dict, options=whole)


def save(
    run: Path,
    step: int,
    model_config: GPTConfig,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    tokenizer_files: dict[str, str],
) -> Path:
    """Writes run/step_<step> and returns it.

    weights: the unwrapped model's state dict; optimizer: tensors by name; state: JSON values;
    tokenizer_files: text by file name. An existing directory of that name is replaced. Raises OSError naming
    the directory and, if the disk is full, the space that is needed.
    """
    final, temporary = run / f"step_{step:06d}", run / f".tmp_step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    files.make_folder(run)
    need = sum(tensor.nbytes for tensor in (*weights.values(), *optimizer.values()))
    free = shutil.disk_usage(run).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{final} needs {need / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free: make room and "
            "go on with --resume, or keep fewer checkpoints (--keep-last)",
        )
    try:
        temporary.mkdir()
        pretrained.write_directory(temporary, model_config, weights, tokenizer_files)
        save_file(optimizer, temporary / OPTIMIZER)
        mode = (temporary / "config.json").stat().st_mode  # the umask's; safetensors has its own
        for name in ("model.safetensors", OPTIMIZER):
            (temporary / name).chmod(mode)
        digests = {path.name: files.hash_file(path) for path in sorted(temporary.iterdir())}
        body = {"format": FORMAT_VERSION, "step": step, **state, "files": digests}
        sealed = {**body, "sha256": files.hash_json(body)}
        (temporary / STATE).write_text(json.dumps(sealed, indent=2), encoding="utf-8")
        for path in temporary.iterdir():
            files.flush(path)
        files.flush(temporary)
        old = set_aside(final) if final.exists() else None
        temporary.rename(final)
        files.flush(run)
        if old:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        reason = f"{error}{disk.explain(OSError(number, ''), final)}"
        raise OSError(number, f"{final} ({need / 1e6:,.0f} MB) could not be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def set_aside(folder: Path) -> Path:
    """Renames a checkpoint so that no reader finds it; returns its new place."""
    aside = folder.with_name(f".old_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


# -----------------------------------------------------------------------------
# reading


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after its files were hashed. Raises ValueError naming the first file whose
    bytes are not those that were written, and LaterVersionError for a later format."""
    body = verify_state(folder)
    for name, digest in body["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if files.hash_file(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {STATE}")
    return body


def verify_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json. Raises ValueError if its bytes have changed, or if it lists a
    file outside its folder."""
    path = folder / STATE
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        seal, names = body.pop("sha256"), list(body["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__})") from error
    if files.hash_json(body) != seal or text != json.dumps({**body, "sha256": seal}, indent=2):
        raise ValueError(f"{path} is damaged: its own SHA-256 does not fit")
    schema.check_format(body, FORMAT_VERSION, path)
    schema.check_fields(body, {"step": int, "files": dict[str, str]}, path)
    step = STEP_NAME.fullmatch(folder.resolve().name)
    if step and int(step[1]) != body["step"]:
        raise ValueError(f"{path} is of step {body['step']}, not of {folder.name}")
    for name in names:
        if Path(name).name != name or (folder / name).is_symlink():
            raise ValueError(f"{path} lists {name!r}, which is not a file in its folder")
    return body


def hash_model_py() -> str:
    return files.hash_code(Path(inspect.getfile(GPT)))


def note_other_network(folder: Path, state: dict[str, Any]):
    """Says on standard error if a checkpoint was trained with another model.py. Earlier versions did not keep
    its hash."""
    now = hash_model_py()
    if state.get("model_py", now) != now and is_local_main():
        text = "was trained with another model.py; if its network differs, results are wrong"
        print(f"note   {folder} {text}", file=sys.stderr)


def load(folder: Path, dropout: float = 0.0, state: dict[str, Any] | None = None) -> Checkpoint:
    """Reads a checkpoint. Verifies it first, unless `state` is what `verify` has just returned. Raises
    ValueError if it is damaged."""
    state = state or verify(folder)
    note_other_network(folder, state)
    try:
        optimizer = load_file(folder / OPTIMIZER)
    except SafetensorError as error:  # although its hash is right
        raise ValueError(f"{folder / OPTIMIZER} is not a safetensors file: {error}") from error
    model = pretrained.read_model(folder, dropout)
    return Checkpoint(model, optimizer, state)


def find_newest_valid(run: Path) -> tuple[Found | None, list[str]]:
    """The newest checkpoint of a run that verifies, and why newer ones were passed over. Raises
    LaterVersionError instead of passing over a later version's."""
    passed_over = []
    for folder in reversed(list_steps(run)):
        try:
            return Found(folder, verify(folder)), passed_over
        except schema.LaterVersionError:
            raise
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over


SHAPE = ("model_size", "n_layer", "n_head", "n_embd")


def build_model(cfg: Any) -> GPT:
    """The network of a new run, on the CPU: --init-from's, or initialised from the seed; for a dry run
    without memory. cfg: train_gpt2.py's settings."""
    if cfg.init_from:
        check_init_from(cfg)
        model, source = load_model(cfg.init_from, torch.device("cpu"), cfg.dropout)
        check_context(cfg, model.config.block_size, source)
        return model
    shape = {key: value for key in SHAPE[1:] if (value := getattr(cfg, key)) is not None}
    torch.manual_seed(cfg.seed)
    with torch.device("meta" if cfg.dry_run else "cpu"):
        return GPT(GPTConfig.named(cfg.model_size, block_size=cfg.seq_len, dropout=cfg.dropout, **shape))


def check_init_from(cfg: Any):
    """Raises FileNotFoundError if --init-from is no model, and ValueError for settings of a shape beside it.
    cfg: train_gpt2.py's settings."""
    check_name(cfg.init_from, "--init-from")
    if extra := [cli.flag(name) for name in SHAPE if getattr(cfg, name) != getattr(type(cfg), name)]:
        raise ValueError(f"--init-from {cfg.init_from} brings its own shape: leave out {', '.join(extra)}")
    check_context(cfg, read_context(cfg.init_from), cfg.init_from)


def check_context(cfg: Any, longest: int | None, source: str):
    """Raises ValueError if --seq-len is longer than the context of a model, if that is known."""
    if longest and cfg.seq_len > longest:
        raise ValueError(f"--seq-len {cfg.seq_len} is longer than the {longest} of {source}: take {longest}")


def adopt_shape(presets: dict[str, Any], init_from: str) -> dict[str, Any]:
    """train_gpt2.py's presets for a run from other weights: without a shape, and with a context that is no
    longer than that of a local model."""
    shape = {name: getattr(type(next(iter(presets.values()))), name) for name in SHAPE}
    longest = read_context(init_from)
    return {
        name: dataclasses.replace(preset, **shape, seq_len=min(preset.seq_len, longest or preset.seq_len))
        for name, preset in presets.items()
    }


def read_context(name: str) -> int | None:
    """The context of a local model, None for any other name. Raises ValueError if it is no GPT-2."""
    path = Path(name)
    if identify(path) == "run":
        path = steps[-1] if (steps := list_steps(path)) else path
    if path.is_file():
        return pretrained.read_torch_file(path, 0.0)[1].block_size
    if not (path / "config.json").is_file():
        return None
    hf = schema.read_json(path / "config.json", {})
    return pretrained.config_from_hf(hf, source=path / "config.json").block_size


def check_name(name: str, flag: str = "--model"):
    """Raises FileNotFoundError, with near names, for a flag's value that names no model here and cannot be a
    size or a Hub id."""
    path = Path(name)
    if path.is_dir() and not identify(path):
        inside = [str(file) for file in sorted(path.glob("*.pt"))[-3:]]
        hint = f"; give {' or '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{path} is neither a model directory nor a run with checkpoints in it{hint}")
    is_hub_id = name.count("/") == 1 and not path.parent.is_dir()
    if not path.exists() and name.lower() not in SIZE_NAMES and not is_hub_id:
        sizes = ", ".join([*SIZES, *HUB_NAMES])
        near = suggest_folder(path) or cli.suggest(name, SIZE_NAMES)
        raise FileNotFoundError(
            f"{flag} {name!r} is no directory here, no size ({sizes}) and no Hub id (org/name){near}"
        )


def load_model(name: str, device: str | torch.device = "auto", dropout: float = 0.0) -> tuple[GPT, str]:
    """The model that a --model flag names, in evaluation mode, and the directory or name it was read from.

    name: a checkpoint or another Hugging Face directory, a run folder (its newest valid checkpoint), a .pt
    file of nanoGPT or build-nanogpt, a size name, a Hub id, or "" for the newest run. device: a name for
    `pick_device`, or a device whose speed settings stay as they are. Raises ValueError or
    FileNotFoundError for anything else.
    """
    if name:
        check_name(name)
    path = Path(name) if name else newest_run()
    kind = identify(path)
    if kind == "run":
        found, passed_over = find_newest_valid(path)
        if found is None:
            raise ValueError(f"{path} has no valid checkpoint: {'; '.join(passed_over) or 'it has none'}")
        for reason in passed_over:
            print(f"passed over a checkpoint: {reason}", file=sys.stderr)
        path = found.folder
        note_other_network(path, found.state)
    elif kind == "checkpoint":
        note_other_network(path, verify(path))
    source = str(path) if path.exists() else name
    where = pretrained.locate(source)
    model = pretrained.read_model(where, dropout)
    if model.config.vocab_size <= END_OF_TEXT:
        raise ValueError(
            f"{source} has {model.config.vocab_size} tokens; GPT-2's tokenizer has {END_OF_TEXT + 1}"
        )
    tokenizer.check_hf_files(where, model.tokenizer_files)
    check_finite(model, source)
    return model.to(pick_device(device) if isinstance(device, str) else device).eval(), source


def check_finite(model: GPT, source: str):
    """Raises ValueError, naming the first, if a weight is not finite."""
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            bad = f"{(~weight.isfinite()).sum():,} of {weight.numel():,} values of {name}"
            raise ValueError(
                f"{source}: the model is not finite: {bad} are nan or infinite; take an earlier checkpoint"
            )
