"""What a GPU could do otherwise than a CPU. Without one, the tests run on the CPU, so that they do not rot.

python -m pytest tests/test_cuda.py -m "slow or not slow" --numprocesses=0
"""

import dataclasses
import signal

import pytest
import torch
import torch.distributed as dist
from helpers import ITEM, Training, end_of, links, random_model, resume, train, values
from torch.distributed import FileStore  # type: ignore[attr-defined]

import hellaswag
from lib import checkpoint, parallel, plan
from lib.decoding import keep_decoders
from lib.device import allow_cudnn_attention, autocast, pick_device, pick_dtype
from lib.optimizers import Muon, gather
from lib.processes import Process
from lib.shards import ShardReader
from train_gpt2 import Config

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if ON_GPU else "cpu"


@pytest.fixture
def device() -> torch.device:
    return pick_device(DEVICE)


@pytest.fixture
def config(config) -> Config:
    """Twelve steps with dropout, accumulation and checkpoints, on the GPU if there is one."""
    return dataclasses.replace(config, device=DEVICE, n_embd=8)


def loss_and_gradients(
    model: torch.nn.Module, device: torch.device, dtype: torch.dtype, rows: int = 4
) -> tuple[float, dict[str, torch.Tensor]]:
    """A training pass over the same tokens, with the attention of training, of any wrapped model."""
    idx = torch.randint(300, (rows, 32), generator=torch.Generator().manual_seed(0)).to(device)
    parallel.zero_gradients(model.train())
    with autocast(device, dtype), allow_cudnn_attention(True):
        loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    named = {name.split("transformer.")[-1]: gather(p.grad) for name, p in model.named_parameters()}
    return loss.item(), {name: grad.cpu().clone() for name, grad in named.items()}


def assert_close(ours, theirs, tolerance: float):
    """The same loss, and gradients whose difference is small beside their size."""
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 20
    for name, gradient in theirs[1].items():
        difference = (ours[1][name] - gradient).norm()
        assert difference <= 10 * tolerance * gradient.norm(), f"{name}: {difference / gradient.norm():.2g}"


# -----------------------------------------------------------------------------
# a step


def test_the_device_asked_for_is_the_current_one(monkeypatch):
    """Triton and NCCL use the current device. A GPU that is not there is pretended."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: None)
    assert pick_device("cuda:1") == chosen[0] == torch.device("cuda", 1)
    pick_device("cpu")
    assert len(chosen) == 1


def test_a_pass_in_float32_equals_the_cpu_s(device):
    model = random_model()
    on_cpu = loss_and_gradients(model, torch.device("cpu"), torch.float32)
    assert_close(loss_and_gradients(model.to(device), device, torch.float32), on_cpu, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pass_in_half_the_precision_is_near_float32(device, dtype):
    model = random_model().to(device)
    exact = loss_and_gradients(model, device, torch.float32)
    assert_close(loss_and_gradients(model, device, dtype), exact, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32][: 1 + ON_GPU])
def test_a_compiled_pass_equals_an_eager_one(device, dtype):
    model = random_model().to(device)
    eager = loss_and_gradients(model, device, dtype)
    idx = torch.zeros(4, 32, dtype=torch.long, device=device)
    with allow_cudnn_attention(True):
        fast, outcome = parallel.compile_model(model, (idx, idx), autocast(device, dtype))
    assert outcome.startswith("compiled in")
    assert_close(loss_and_gradients(fast, device, dtype), eager, 1e-5 if dtype == torch.float32 else 1e-2)


def test_muon_on_the_device_takes_the_cpu_s_step(device):
    steps = []
    for where in (torch.device("cpu"), device):
        model = random_model().to(where)
        matrices = [p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2]
        before = [p.detach().cpu().clone() for p in matrices]
        loss_and_gradients(model, where, torch.float32)
        Muon(matrices, 0.02, 0.1, torch.bfloat16).step()
        steps.append(torch.cat([(p.detach().cpu() - old).flatten() for p, old in zip(matrices, before)]))
    assert (steps[0] - steps[1]).norm() < 0.05 * steps[0].norm()  # bfloat16


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_one_process_of_nccl_has_the_gradients_of_none(device, wrap, tmp_path):
    """NCCL on a GPU, else gloo. DDP's gradients stay in its buckets over two micro-steps."""
    plain = loss_and_gradients(random_model().to(device), device, torch.float32)
    store = FileStore(str(tmp_path / "store"), 1)
    options: dict = dict(device_id=device) if ON_GPU else {}
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1, **options)
    try:
        model: torch.nn.Module = random_model().to(device)
        if wrap == "ddp":
            model = parallel.wrap_ddp(model, "float32", device)
            loss_and_gradients(model, device, torch.float32)  # after it, DDP arranges its buckets
        else:
            model = parallel.wrap_fsdp(model, Process(0, 1, device), "float32")  # type: ignore[arg-type]
            parallel.set_gradient_sync(model, is_last=False)  # FSDP exchanges gradients all the same
        passes = []
        for _ in range(2):
            assert_close(loss_and_gradients(model, device, torch.float32), plain, 1e-5)
            passes.append({p.grad.data_ptr() for p in model.parameters() if p.grad is not None})
        assert wrap == "fsdp" or passes[0] == passes[1]
        totals = Process(0, 2, device).all_reduce(torch.ones((), device=device), 2.5)
        assert totals == [1.0, 2.5]
        del model
    finally:
        dist.destroy_process_group()


def test_batches_for_a_gpu_are_pinned(data):
    reader = ShardReader(data, "train", 16)
    batches = reader.batches(range(2), 1, 2, 2, 0, 1, pin_memory=ON_GPU)
    assert [t.is_pinned() for t in next(batches)] == [ON_GPU, ON_GPU]


# -----------------------------------------------------------------------------
# a run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_killed_run_resumes_with_the_same_end(config, dtype, tmp_path):
    """In float16 with its gradient scaler's state. A GPU's attention adds up over several blocks of keys."""
    cfg = dataclasses.replace(config, dtype=dtype, deterministic=True, log_dir=str(tmp_path / "whole"))
    run = train(cfg, **(dict(seq_len=512, total_batch_tokens=1024) if ON_GPU else {}))
    part = links(run, tmp_path / "part", 4)
    assert end_of(resume(part)) == end_of(run)
    scales = [checkpoint.verify(folder)["scaler"] for folder in checkpoint.list_steps(run)]
    assert all(scale.get("scale", 0) > 1 for scale in scales) == (dtype == "float16")


def test_sigkill_loses_only_the_steps_since_the_last_checkpoint(launch, config, tmp_path):
    config = dataclasses.replace(config, max_steps=16, deterministic=True)
    whole = train(config, log_dir=str(tmp_path / "whole"))
    training = launch(config)
    training.wait_for(" 5/16 | loss")
    training.signal(signal.SIGKILL)
    training.wait()
    run = tmp_path / "run"
    Training(tmp_path, ["--resume", run]).finish()
    assert end_of(run) == end_of(whole)


def test_a_deterministic_run_asks_torch_for_it_until_its_end(config, device, monkeypatch):
    asked, step = [], Muon.step

    def note(*args):
        only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
        is_on = torch.are_deterministic_algorithms_enabled() and not only_warns
        asked.append((is_on, torch.backends.cuda.cudnn_sdp_enabled()))
        return step(*args)

    monkeypatch.setattr(Muon, "step", note)
    for deterministic in (True, False):
        train(config, deterministic=deterministic, optimizer="muon", max_steps=1, run_name=f"{deterministic}")
    assert asked == [(True, False), (False, True)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert not ON_GPU or torch.get_float32_matmul_precision() == "highest"


def test_losses_are_those_of_the_cpu(config, tmp_path):
    """Without dropout, whose random numbers differ."""
    runs = [
        train(config, device=name, dropout=0.0, run_name=f"{i}") for i, name in enumerate((DEVICE, "cpu"))
    ]
    assert values(runs[0]) == pytest.approx(values(runs[1]), abs=2e-3)  # TF32


def test_the_automatic_batch_trains_without_running_out_of_memory(config, device):
    free, cfg = plan.free_memory(device, 1)[0], dataclasses.replace(config, batch_size="auto", max_steps=1)
    if ON_GPU:  # a batch that fills the memory
        shape = dict(n_layer=12, n_head=12, n_embd=768, seq_len=256)
        cfg = dataclasses.replace(cfg, **shape, total_batch_tokens=256 * 4096, dtype="auto")
    run = train(cfg)
    assert len(values(run)) == 1
    if ON_GPU:
        assert 0.3 * free < torch.cuda.max_memory_reserved() < free


@pytest.mark.fault(*[28] * ON_GPU)
def test_a_batch_that_is_too_large_is_refused_before_step_0_with_the_one_that_fits(config, device):
    free = plan.free_memory(device, 1)[0]
    sequences = 2 ** int(free / 16e6).bit_length()  # a sequence takes more than 16 megabytes
    cfg = dataclasses.replace(
        config, n_embd=512, n_layer=8, seq_len=256, batch_size=sequences, total_batch_tokens=sequences * 256,
        max_steps=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"--batch-size \d+ .*(, or auto|fits)") as refusal:
        train(cfg)
    assert str(sequences) in str(refusal.value)
    if ON_GPU:
        fitting = int(str(refusal.value).split("give --batch-size ")[1].split(",")[0])
        assert len(values(train(cfg, batch_size=fitting, run_name="fits"))) == 1


# -----------------------------------------------------------------------------
# evaluation


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_cached_generation_equals_uncached(device, dtype):
    model = random_model(block_size=64).to(device)
    prompts = torch.randint(300, (3, 7), generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device, pick_dtype(dtype, device)[0]):
        cached, whole = (
            list(model.stream_with_logits(prompts, 40, temperature=0.0, stop_token=None, use_cache=on))
            for on in (True, False)
        )
    for (_, ours), (_, theirs) in zip(cached[:20], whole[:20]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 if dtype == "float32" else 0.5)
    if dtype == "float32":
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(cached, whole))


def test_a_cuda_graph_makes_the_same_text(device):
    model = random_model(block_size=16).to(device)
    prompts = torch.randint(300, (3, 7), generator=torch.Generator().manual_seed(0)).to(device)
    options: dict = dict(temperature=0.0, stop_token=None)
    plain = model.generate(prompts, 40, **options)
    model.make_decoder = keep_decoders()
    assert torch.equal(model.generate(prompts, 40, **options), plain)


def test_hellaswag_s_predictions_equal_the_cpu_s(device):
    model = random_model(vocab_size=50257, block_size=64)
    items = [
        {**ITEM, "ctx": f"{ITEM['ctx']} {word}"} for word in ["one", "two", "three", "four", "five", "six"]
    ]
    rows = [row for item in items for row in hellaswag.render(item, "completion")[0]]
    on_cpu = torch.tensor(hellaswag.score(model, rows, 64)).view(-1, 4)
    found = torch.tensor(hellaswag.score(model.to(device), rows, hellaswag.pick_batch_size(model)))
    torch.testing.assert_close(found.view(-1, 4), on_cpu, rtol=1e-4, atol=1e-3)
    assert found.view(-1, 4).argmax(1).tolist() == on_cpu.argmax(1).tolist()
