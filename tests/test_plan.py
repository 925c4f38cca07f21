"""plan.py: the memory it foretells is the peak of real steps; what a device has free; what fits."""

import weakref
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lib import device, plan
from model import GPT, GPTConfig
from train_gpt2 import Config


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it, and their highest sum."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.storages:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def forget(self, storage: int):
        self.now -= self.storages.pop(storage)


@pytest.mark.parametrize(
    ("batch_size", "changes"),
    [
        (2, {}),
        (16, {}),
        (16, dict(dtype=torch.float32)),
        (16, dict(dropout=0.1)),
        (16, dict(recompute=True)),
        (2, dict(micro_steps=2)),
    ],
    ids=str,
)
def test_the_memory_of_the_plan_is_the_peak_of_a_step(batch_size, changes):
    settings = dict(dtype=torch.bfloat16, dropout=0.0, recompute=False, micro_steps=1) | changes
    dtype, recompute, micro_steps = (settings[name] for name in ("dtype", "recompute", "micro_steps"))
    config = GPTConfig(block_size=128, n_layer=12, n_head=4, n_embd=128, dropout=settings["dropout"])
    with FakeTensorMode(), PeakMemory() as memory:  # tensors without values, as large as real ones
        model = GPT(config)
        model.recompute = recompute
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        idx = torch.randint(50257, (batch_size, 128))
        for step in range(2):
            if step:
                memory.peak = memory.now
            for _ in range(micro_steps):
                with torch.autocast("cpu", dtype, dtype != torch.float32, cache_enabled=not recompute):
                    loss = model(idx, idx)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    # What a CPU's kernels take for themselves is not seen here; its dropout is not CUDA's, and its LayerNorm
    # keeps the residual stream in bfloat16.
    device_type = "cpu" if config.dropout else "cuda"
    total = micro_steps * batch_size * 128
    work = plan.Workload(config, 128, total, dtype=dtype, device_type=device_type, recompute=recompute)
    parts = work.step_bytes(batch_size)
    assert sum(parts.values()) - parts.get("rest", 0) == pytest.approx(memory.peak, rel=0.07)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100", 8, "H100"), ("h100", 0, "H100"), ("64 x nvidia h100 80GB", 64, "H100"),
        ("4090", 0, "RTX 4090"),
        ("a100-40gb", 0, "A100 40GB"), ("2×A100-SXM4-80GB", 2, "A100"), ("a6000", 0, "RTX A6000"),
        ("V100-16GB", 0, "V100"), ("h100_pcie", 0, "H100 PCIe"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_however_its_name_is_written(text, count, name):
    assert plan.find_gpu(text) == (count, name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("H10", "did you mean"), ("0xH100", "give 8xH100"), ("tpu-v5", "is .tpu-v5.; give 8xH100, or one of B")],
)
def test_a_gpu_that_is_not_listed_is_refused_with_near_names(text, reason):
    with pytest.raises(ValueError, match=reason):
        plan.find_gpu(text)


def test_what_plan_for_implies_and_what_contradicts_it():
    cfg = plan.apply_plan_for(Config(plan_for="8xV100"))
    assert (cfg.dry_run, cfg.num_gpus, cfg.device, cfg.dtype) == (True, 8, "cpu", "float16")
    assert plan.apply_plan_for(cfg) == cfg and plan.apply_plan_for(Config()) == Config()
    assert plan.apply_plan_for(Config(plan_for="A10", num_gpus=4, dtype="float32")).num_gpus == 4
    with pytest.raises(ValueError, match="8xV100, but --num-gpus is 4"):
        plan.apply_plan_for(Config(plan_for="8xV100", num_gpus=4))


def test_a_device_has_the_peak_of_its_own_line(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA L40": 181e12, "NVIDIA A10G": 70e12, "NVIDIA GeForce RTX 4090": 165.2e12, "Tesla T4": 65e12,
        "NVIDIA H200 NVL": 835e12, "NVIDIA RTX 6000 Ada Generation": 364e12, "NVIDIA GB200": 0.0,
    }  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device.peak_flops(torch.device("cuda"), torch.bfloat16) == peak, name
    assert device.peak_flops(torch.device("cuda"), torch.float32) == 0.0


@pytest.fixture
def toy_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=4))


def test_on_cuda_the_largest_batch_that_was_tried_within_nine_tenths_is_taken(toy_model, monkeypatch):
    """The GPU is simulated: 0.9 GB may be used, 100 MB per sequence; 20 sequences are too many to try."""
    tried = []
    weights = sum(p.nbytes for p in toy_model.parameters())
    room, oom = (1e9 + weights) * 0.9, float("inf")

    def peak(model, batch_size, seq_len, dtype, beside, has_gradients):
        tried.append((batch_size, beside, has_gradients))
        return room + 1 if batch_size == 10 else oom if batch_size > 10 else 1e8 * batch_size

    def planned(work, batch_size):
        return {"optimizer": 5.0, "activations": 1.3 * room / 19.9 * batch_size}

    monkeypatch.setattr(plan, "free_memory", lambda device, processes: (1e9, "free on the GPU"))
    monkeypatch.setattr(plan, "peak_of_step", peak)
    monkeypatch.setattr(plan.Workload, "step_bytes", planned)
    chosen, how = plan.Workload(toy_model.config, 16, 16 * 40).fitting_batch(toy_model, torch.device("cuda"))
    assert chosen == 8 and "tried: within 0.9 GB of the 1.0 GB" in how and "10% are left alone" in how
    assert tried[1:] == [(10, 5.0, True), (8, 5.0, True)]  # the first is for CUDA's libraries


def test_a_process_of_a_sharded_model_counts_its_share_of_the_weights_only(toy_model, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device, processes: (0.0, "free on the GPU"))
    monkeypatch.setattr(
        plan.Workload, "step_bytes", lambda work, batch_size: {"activations": 1000.0 * batch_size}
    )
    weights = 4 * toy_model.config.num_params
    for world_size in (1, 4):
        work = plan.Workload(toy_model.config, 16, 16 * 10000, world_size=world_size, fsdp=True)
        chosen, _ = work.fitting_batch(toy_model, torch.device("cuda"))
        share = 10000 // world_size
        assert chosen == max(
            n for n in range(1, 700) if share % n == 0 and 1000 * n <= 0.8 * weights / world_size
        )


def test_a_step_is_tried_without_a_trace_and_does_not_fail_for_want_of_memory(toy_model, monkeypatch):
    held = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: held.append(grads()) or 123)

    def grads() -> list[bool]:
        return [p.grad is not None for p in toy_model.parameters()]

    before = [p.clone() for p in toy_model.parameters()]
    peak = partial(plan.peak_of_step, toy_model, 2, 16, torch.float32, 1000.0)
    assert peak(True) == peak(False) == 123 and all(all(there) for there in held)
    assert not any(grads()) and all(map(torch.equal, before, toy_model.parameters()))

    seen = []

    def full(*args):
        seen.append(grads())
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(toy_model, "hidden", full)
    assert peak(True) == peak(False) == float("inf") and not any(grads())
    assert [all(there) for there in seen] == [True, False]  # an earlier micro-step's are there, or not


def test_the_limit_of_a_container_counts_as_does_what_is_free(tmp_path, monkeypatch):
    def write(path: str, text: str):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")

    write("proc/self/cgroup", "5:memory:/jobs/one\n3:cpu:/\n0::/a/b\n")
    assert plan.cgroup_room(tmp_path) == float("inf")
    for folder, limit in (("a/b", "max"), ("a", "5000"), (".", "9000")):  # version 2
        write(f"sys/fs/cgroup/{folder}/memory.max", limit)
        write(f"sys/fs/cgroup/{folder}/memory.current", "1000")
        write(f"sys/fs/cgroup/{folder}/memory.stat", "active_file 7\ninactive_file 300\nslab 1\n")
    assert plan.cgroup_room(tmp_path) == 5000 - (1000 - 300)
    write("sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes", "4000")  # version 1
    write("sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes", "2000")
    write("sys/fs/cgroup/memory/jobs/one/memory.stat", "cache 1\ninactive_file 500\n")
    assert plan.cgroup_room(tmp_path) == 4000 - (2000 - 500)

    cpu = torch.device("cpu")
    monkeypatch.setattr(plan, "cgroup_room", lambda: 2500.0)
    assert plan.free_memory(cpu, 1) == (2500, "within the limit of its cgroup")
    monkeypatch.setattr(plan, "cgroup_room", lambda: 1e18)
    assert plan.free_memory(cpu, 1)[1] == "MemAvailable"
    half = plan.free_memory(cpu, 2)
    assert half[0] == pytest.approx(plan.free_memory(cpu, 1)[0] / 2, rel=0.2) and "2 processes" in half[1]
