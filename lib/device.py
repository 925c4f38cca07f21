"""The device, its precision and speed settings; the versions for a fault report.

    device = pick_device("auto")                     # cuda, else mps, else cpu, with its speed settings
    dtype, why = pick_dtype("auto", device)          # bfloat16 if the device has it

GPUS lists the GPUs whose peak and memory are known.
"""

import contextlib
import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from lib.files import ROOT


class GPU(NamedTuple):
    peak: float  # dense FLOP/s of bfloat16 products with float32 sums; of float16 if it has no bfloat16
    memory: float  # bytes, as it is sold: the system reports up to 7% more
    has_bfloat16: bool = True


# From NVIDIA's data sheets, of which those since Ampere print the peak with sparsity, twice the dense one.
# GeForce: the white papers of GA102, Ada and RTX Blackwell, appendix A. A10G: AWS, which alone has it.
# Not looked up again: H100 NVL, H200 NVL, RTX 6000 Ada.
GPUS = {
    "B200": GPU(2250e12, 180e9),
    "H200 NVL": GPU(835e12, 141e9),
    "H200": GPU(989e12, 141e9),
    "H100 PCIe": GPU(756e12, 80e9),
    "H100 NVL": GPU(835e12, 94e9),
    "H100": GPU(989e12, 80e9),  # SXM
    "A100 40GB": GPU(312e12, 40e9),
    "A100": GPU(312e12, 80e9),
    "RTX 6000 Ada": GPU(364e12, 48e9),
    "L40S": GPU(362e12, 48e9),
    "L40": GPU(181e12, 48e9),
    "RTX A6000": GPU(154.8e12, 48e9),
    "A40": GPU(149.7e12, 48e9),
    "L4": GPU(121e12, 24e9),
    "A10G": GPU(70e12, 24e9),
    "A10": GPU(125e12, 24e9),
    "RTX 5090": GPU(209.5e12, 32e9),
    "RTX 4090": GPU(165.2e12, 24e9),
    "RTX 3090": GPU(71e12, 24e9),
    "V100 32GB": GPU(125e12, 32e9, has_bfloat16=False),
    "V100": GPU(125e12, 16e9, has_bfloat16=False),  # SXM2
    "T4": GPU(65e12, 16e9, has_bfloat16=False),
}


def pick_device(name: str, spare_memory: bool = False) -> torch.device:
    """The device that --device names, with its speed settings. "auto" is CUDA, else Apple's MPS, else CPU.

    spare_memory: on a CPU, return freed memory to the system. Raises ValueError for a device that does not
    exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:  # torch raises either, by backend
        reason = re.split(r"\n|\. ", str(error))[0]  # torch lists all its backends after the first sentence
        raise ValueError(f"--device {name!r} cannot be used ({reason}); leave it out, or give cpu") from error
    torch.backends.cuda.enable_cudnn_sdp(False)  # only training turns it on
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton and NCCL use the current device
    if device.type == "cpu" and not spare_memory and platform.libc_ver()[0] == "glibc":
        # By default glibc returns large freed buffers to the system and fetches them again page by page. That
        # took more than half of a training step on two cores (on the demo, 0.4 of the time remained).
        # Under FSDP, gathered weights leave holes that no other buffer fits, so it keeps the default.
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take no buffer from outside the heap
    if (
        device.type == "cpu"
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    ):
        # This setting makes torch use oneDNN for float32 products. Without AMX, oneDNN still computes them in
        # float32, and on an AMD twice as fast as MKL does (two cores of a Turin: 0.37 against 0.18 TFLOP/s,
        # both with errors of 2e-6 in large products).
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    return device


@contextlib.contextmanager
def training_settings(device: torch.device, deterministic: bool) -> Iterator[None]:
    """On a GPU, float32 products in TF32, and cuDNN's attention. If deterministic, kernels that give the same
    bytes in every run, where torch has them; cuDNN's attention is not one of them."""
    if deterministic:
        for name, value in [("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("TORCHINDUCTOR_DETERMINISTIC", "1")]:
            os.environ.setdefault(name, value)  # cuBLAS and Inductor read these at their first use
        # With warn_only, flash attention's backward pass would keep its order of additions, which varies.
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        with allow_cudnn_attention(not deterministic):
            yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(False)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def allow_cudnn_attention(is_on: bool) -> Iterator[None]:
    """Whether attention may use cuDNN. On Hopper it is the fastest for training. But it plans each new shape,
    which takes 0.05 to 0.4 s, and an evaluation has a thousand shapes."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def pick_dtype(name: str, device: torch.device, before: str | None = None) -> tuple[torch.dtype, str]:
    """The precision of matrix products that --dtype names, and the reason; `before`: a resumed run's."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if before:
        return getattr(torch, before), "as before"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has it"
        return torch.float16, "this GPU has no bfloat16; gradients are scaled"
    if device.type == "mps" and torch.backends.mps.is_macos_or_newer(14, 0):
        return torch.bfloat16, "macOS 14 and later have it"
    if device.type == "cpu" and has_bfloat16():
        return torch.bfloat16, "this CPU has instructions for it"
    return torch.float32, f"this {device.type} has no fast bfloat16"


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products that torch uses: AVX512_BF16 or AMX, or on
    Linux those of ARM."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    find = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.11 has none
    return platform.system() == "Linux" and bool(find().get("bf16"))


def autocast(device: torch.device, dtype: torch.dtype, cache: bool = True) -> torch.autocast:
    """A context in which matrix products are in dtype; with float32 it changes nothing. cache: keep the cast
    weights until the context ends."""
    return torch.autocast(device.type, dtype, dtype != torch.float32, cache)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to the device. The CPU does not wait for a GPU, which copies from pinned memory by itself."""
    if device.type != "cuda":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def cast_linears(model: torch.nn.Module, dtype: torch.dtype):
    """Casts the linear layers to dtype once; autocast would do it in every forward pass."""
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.to(dtype)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's peak in GPUS, in FLOP/s; 0 if it is unknown, or for float32."""
    if device.type != "cuda" or dtype == torch.float32:
        return 0.0
    name, others = torch.cuda.get_device_name(device), r"(?!.*\b(Laptop|Ti|D|SUPER|MIG)\b)"
    return next((gpu.peak for part, gpu in GPUS.items() if re.search(rf"\b{part}\b{others}", name)), 0.0)


def versions() -> str:
    """What a fault report needs, one line per fact: this commit, the packages and the machine."""
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git clone"
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):  # Linux has its full name
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = re.findall(r"^model name\s*: (.*)", text, flags=re.MULTILINE)[0]
    names = ("numpy", "tiktoken", "gigatoken", "transformers", "datasets", "huggingface_hub")
    packages = dict.fromkeys(names, "not installed")
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    facts = {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with its build: the package's own version leaves out +cu130
        "cuda": f"{torch.version.cuda or 'none'}, cuDNN {torch.backends.cudnn.version() or 'none'}",
        **packages,
        "system": platform.platform(),
        "cpu": f"{processor}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        "gpu": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
        or ("Apple MPS" if torch.backends.mps.is_available() else "none"),
    }
    return "\n".join(f"{name:16}{fact}" for name, fact in facts.items())
