"""Models that other programs wrote: Hugging Face directories, nanoGPT's ckpt.pt, build-nanogpt's model_*.pt.

    model = read_model(locate("gpt2"))               # a size or Hub id is downloaded, once
    model = read_model(Path("out/ckpt.pt"))

A directory is read as transformers reads it, or refused. No code of a file or a repository runs: tensors are
in safetensors, and torch.load reads the others with weights_only=True.
"""

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import folders, schema, tokenizer
from model import GPT, HUB_NAMES, SIZE_NAMES, TRANSPOSED, GPTConfig, config_to_hf, to_hf

# Components of names that torch.compile, DDP, FSDP and activation checkpointing add; and GPT-2's own prefix,
# which OpenAI's files on the Hub do not have.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "transformer")
# transformers takes these names, too.
ALIASES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip
SHAPE = ("vocab_size", "n_layer", "n_head", "n_embd")


def locate(name: str | Path) -> Path:
    """A directory or file of this name, for a run its newest checkpoint, or else the folder of a downloaded
    size or Hub id. Raises ValueError for a name that is none of these, FileNotFoundError if the Hub cannot be
    reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (path := Path(name)).exists():
        steps = folders.list_steps(path) if folders.identify(path) == "run" else []
        return steps[-1] if steps else path
    hub_ids = {size: hub for hub, size in HUB_NAMES.items()}
    name = hub_ids.get(SIZE_NAMES.get(str(name).lower(), ""), str(name))
    repo = f"openai-community/{name}" if name in HUB_NAMES else name
    if repo.count("/") != 1 or repo.startswith((".", "/")):
        sizes = ", ".join([*hub_ids, *HUB_NAMES])
        raise ValueError(f"{name!r} is no directory here, no size ({sizes}) and no Hub id (org/name)")
    wanted = ["*config.json", "model*.safetensors*", "*token*.json", "vocab.*", "merges.txt", "*.jinja"]
    try:  # repositories also hold other frameworks' weights
        return Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns="*/*"))
    except LocalEntryNotFoundError as error:
        reason = f"{repo} is not on this machine, and the Hub cannot be reached"
        own = "give the folder of a copy, or the log/<run> of `python train_gpt2.py demo`, which needs no Hub"
        raise FileNotFoundError(f"{reason}; {own}") from error


def read_model(path: Path, dropout: float = 0.0) -> GPT:
    """The model in a Hugging Face directory or a .pt file. Raises ValueError for a model that is not GPT-2,
    FileNotFoundError for a directory without weights."""
    weights, config = read_directory(path, dropout) if path.is_dir() else read_torch_file(path, dropout)
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # a tensor is missing, unknown or of another shape
        raise ValueError(f"{path}: the weights do not fit the configuration: {error}") from error
    model.tokenizer_files = tokenizer.read_hf_files(path)
    return model


# -----------------------------------------------------------------------------
# Hugging Face


def read_directory(folder: Path, dropout: float) -> tuple[dict[str, torch.Tensor], GPTConfig]:
    """The weights, by our names, and the configuration of a Hugging Face directory."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face model directory")
    hf = schema.read_json(folder / "config.json", {})
    config = config_from_hf(hf, dropout, folder / "config.json")
    parts, weights = ["model.safetensors"], {}
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / parts[0]).is_file():  # a large model comes in parts
        file_of = schema.read_json(index, {}).get("weight_map")  # by tensor
        if not isinstance(file_of, dict) or not file_of:
            raise ValueError(f"{index} has no weight_map, which names the file of each tensor")
        parts = sorted(set(map(str, file_of.values())))
    for part in parts:
        if Path(part).name != part:
            raise ValueError(f"{index} lists {part!r}, which is not a file in its folder")
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder} has no {part}; only safetensors weights are read")
        try:
            weights.update(load_file(folder / part))
        except SafetensorError as error:
            raise ValueError(f"{folder / part} is not a whole safetensors file: {error}") from error
    matrices = [name for name in weights if name.endswith(("wte.weight", "lm_head.weight"))]
    if hf.get("tie_word_embeddings") is False and len(matrices) != 2:
        raise ValueError(f"{folder}: tie_word_embeddings is false; wte and lm_head are not both there")
    return from_hf(weights, config, folder), config


def write_directory(
    folder: Path, config: GPTConfig, weights: dict[str, torch.Tensor], tokenizer_files: dict[str, str]
):
    """Fills a Hugging Face directory. weights: our state dict; tokenizer_files: text by file name."""
    save_file(to_hf(weights, config), folder / "model.safetensors", metadata={"format": "pt"})
    hf = config_to_hf(config)
    special = {key: hf[key] for key in ("bos_token_id", "eos_token_id")}
    contents = {"config.json": hf, "generation_config.json": special | {"pad_token_id": hf["eos_token_id"]}}
    texts = {name: json.dumps(content, indent=2) for name, content in contents.items()}
    for name, text in (texts | tokenizer_files).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def write_model(model: GPT, folder: Path):
    """Writes a model as a Hugging Face directory. With GPT-2's vocabulary, it has GPT-2's tokenizer."""
    has_text = model.config.vocab_size >= tokenizer.VOCAB_SIZE
    texts = tokenizer.build_hf_files(model.config.block_size, model.tokenizer_files) if has_text else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_directory(folder, model.config, model.state_dict(), texts)


def from_hf(
    weights: dict[str, torch.Tensor], config: GPTConfig, source: Path | str, is_linear: bool = False
) -> dict[str, torch.Tensor]:
    """The reverse of `to_hf`. Also takes lm_head, which is wte, and names with or without WRAPPERS. With
    is_linear, the matrices are (out, in), as ours are.

    Warns of tensors that no GPT-2 has, such as another head's. Raises ValueError if two tensors contradict
    each other.
    """
    state, left_out = {}, []
    for name, value in weights.items():
        parts = ["wte" if part == "lm_head" else part for part in name.split(".") if part not in WRAPPERS]
        key = "transformer." + ".".join(parts)
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks, which old files have
        if not parts or parts[0] not in ("wte", "wpe", "h", "ln_f"):
            left_out.append(name)
            continue
        if not value.is_floating_point():
            raise ValueError(f"{source}: {name} is {value.dtype}; quantised weights cannot be read")
        value = (value.t() if key.endswith(TRANSPOSED) and not is_linear else value).float().contiguous()
        if key in state and not torch.equal(state[key], value):
            raise ValueError(
                f"{source}: {name} differs from another {parts[0]}; lm_head and wte are one matrix"
            )
        state[key] = value
    if (wte := state.get("transformer.wte.weight")) is None:
        raise ValueError(f"{source} holds no wte.weight: this is not a GPT-2")
    if left_out:
        warnings.warn(f"{source}: left out what GPT-2 does not have: {', '.join(left_out)}", stacklevel=2)
    padding = config.padded_vocab_size - config.vocab_size
    state["transformer.wte.weight"] = F.pad(wte, (0, 0, 0, padding))
    return state


def config_from_hf(hf: dict, dropout: float = 0.0, source: Path | str = "config.json") -> GPTConfig:
    """The reverse of `config_to_hf`. Raises ValueError, naming the entry, for a model that is not GPT-2."""
    hf = {ALIASES.get(key, key): value for key, value in hf.items()}
    expected = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "n_inner": (None, 4 * hf.get("n_embd", 768)),
        "quantization_config": (None,),
        "pruned_heads": ({}, None),
    }
    for key, allowed in expected.items():
        default = allowed[0] if key != "model_type" else None
        if hf.get(key, default) not in allowed:
            raise ValueError(f"{source} has {key} = {hf.get(key)!r}; GPT-2 has {allowed[0]!r}")
    gelu = "none" if hf.get("activation_function") == "gelu" else "tanh"
    shape = {key: hf[key] for key in SHAPE if key in hf}
    return make_config(source, block_size=hf.get("n_positions", 1024), dropout=dropout, gelu=gelu, **shape)


def make_config(source: Path | str, **fields: Any) -> GPTConfig:
    """The GPTConfig with these fields. Raises ValueError, naming their source, for an impossible shape."""
    try:
        return GPTConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


# -----------------------------------------------------------------------------
# nanoGPT and build-nanogpt


class SavedConfig:
    """Stands in for the GPTConfig that build-nanogpt pickles: takes its fields, does nothing."""


def read_torch_file(path: Path, dropout: float) -> tuple[dict[str, torch.Tensor], GPTConfig]:
    """The weights, by our names, and the configuration of nanoGPT's or build-nanogpt's file. Raises
    ValueError for any other file, and for one with objects beside tensors and plain values."""
    known = "a checkpoint of nanoGPT (ckpt.pt) or build-nanogpt (model_*.pt)"
    harmless: Any = [(SavedConfig, f"{module}.GPTConfig") for module in ("__main__", "model", "train_gpt2")]
    try:
        with torch.serialization.safe_globals(harmless):
            # With mmap, the optimizer's state is not read, which is twice as large as the model.
            saved = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of many types, for a file that is something else
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not {known}: {type(error).__name__}: {reason}") from error
    is_nanogpt = isinstance(saved, dict) and isinstance(saved.get("model_args"), dict)
    if not is_nanogpt and not (isinstance(saved, dict) and isinstance(saved.get("config"), SavedConfig)):
        raise ValueError(f"{path} is not {known}: it has neither model_args nor config")
    settings = dict(saved["model_args"] if is_nanogpt else vars(saved["config"]))
    if missing := [key for key in (*SHAPE, "block_size") if key not in settings]:
        raise ValueError(f"{path} is not {known}: it lacks {', '.join(missing)}")
    shape = {key: settings.pop(key) for key in (*SHAPE, "block_size")}
    weights = saved.get("model")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"{path} is not {known}: its model is not a dict of tensors by name")
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    has_bias = settings.pop("bias", True)
    settings.pop("dropout", None)
    if changes := {name: value for name, value in settings.items() if value}:
        raise ValueError(f"{path} has settings that GPT-2 does not have: {changes}")
    # nanoGPT's GELU is the exact one, build-nanogpt's is GPT-2's.
    config = make_config(path, dropout=dropout, gelu="none" if is_nanogpt else "tanh", **shape)
    state = from_hf(weights, config, path, is_linear=True)
    if not has_bias:  # a bias of 0 computes the same
        with torch.device("meta"):
            names = {name: p.shape for name, p in GPT(config).named_parameters() if name.endswith(".bias")}
        state = {name: torch.zeros(size) for name, size in names.items()} | state
    return state, config
