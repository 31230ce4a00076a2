"""What a run will need, against what real models take, and the refusals where that is not there."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher import api

from equipoise import cli
from equipoise.errors import UserError
from equipoise.learning.flat import FlatGroup
from equipoise.learning.optimizer import MasterAdam
from equipoise.learning.shards import Shards
from equipoise.policy.config import PolicyConfig
from equipoise.policy.load import load_policy
from equipoise.policy.shapes import SHAPES
from equipoise.policy.source import resolve
from equipoise.ppo import machine as machines
from equipoise.ppo.machine import MARGIN, Machine, Need, Work, check, fit, inspect_machine, need
from equipoise.ppo.preflight import EIGHT_BIT_GB, slow_to_save
from equipoise.ppo.presets import preset
from equipoise.ppo.train import train
from equipoise.runs import launch
from equipoise.runs.ranks import Ranks
from tests.default import PROMPTS
from tests.tiny import tiny_folder

from .small import small_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROOMY = Machine(gpu="NVIDIA X", gpu_free_gb=100.0, memory_free_gb=100.0, cores=2)
NEED = Need(
    parameters=1000, trained=100, weights=4 * 10**9, reference=3 * 10**9, optimizer=2 * 10**9, activations=10**9,
    checkpoint=5 * 10**9, export=6 * 10**9,
)  # fmt: skip
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch):
    """Sets how many bytes are free on every disk."""
    return lambda free: monkeypatch.setattr(machines.shutil, "disk_usage", lambda path: Usage(10**13, 0, free))


def test_this_machine_is_seen_as_it_is() -> None:
    here = inspect_machine()
    assert (here.gpu is not None) == torch.cuda.is_available()
    assert 0.01 < here.memory_free_gb < 1e5 and here.cores == torch.get_num_threads()
    assert "GB of memory free" in here.lines()[0]


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tied", "average"), [(False, 0.0), (True, 0.9)])
def test_the_estimate_counts_the_parameters_and_bytes_that_are_really_there(
    tmp_path: Path, tuning: str, dtype: str, tied: bool, average: float
) -> None:
    config = PolicyConfig(str(tiny_folder(tmp_path, tied)), tuning, dtype=dtype, device="cpu", lora_rank=3)  # type: ignore[arg-type]
    expected = need(config, resolve(config.model), Work(4, 8, 30, 20, average=average > 0))
    policy = load_policy(config, PROMPTS["raw"])
    trained = {name: p for name, p in policy.trained().items() if not name.startswith("value_head")}
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    assert expected.trained == sum(p.numel() for p in trained.values())
    assert expected.weights == sum(p.nbytes for p in (*frozen, *trained.values()))
    copy = policy.reference.parameters() if policy.reference is not None else ()
    assert expected.reference == sum(p.nbytes for p in copy)

    optimizer = MasterAdam(trained, betas=(0.9, 0.999), eps=1e-8, average=average)
    for parameter in trained.values():
        parameter.sum().backward()
    optimizer.accumulate()
    optimizer.step(1.0)
    weights, moments = optimizer.state()
    saved = sum(x.nbytes for x in (*weights.values(), *moments.values()))
    assert expected.checkpoint == pytest.approx(saved, abs=100)  # Adam's step counts besides


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hidden_layer_of_the_value_head_is_counted(tmp_path: Path, tuning: str, dtype: str) -> None:
    config = PolicyConfig(str(tiny_folder(tmp_path)), tuning, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    source, work = resolve(config.model), Work(4, 8, 30, 20)
    without, foretold = need(config, source, work), need(config, source, replace(work, values=100))
    policy = load_policy(config, PROMPTS["raw"], value_hidden=100)
    head = {name: p for name, p in policy.trained().items() if name.startswith("value_head")}
    optimizer = MasterAdam(head, betas=(0.9, 0.999), eps=1e-8)
    for parameter in head.values():
        parameter.sum().backward()
    optimizer.step(1.0)
    weights, moments = (sum(x.nbytes for x in part.values()) for part in optimizer.state())
    assert foretold.weights - without.weights == weights
    # Moments and gradients; Adam's step count besides.
    assert foretold.optimizer - without.optimizer == pytest.approx(moments + weights, abs=4)
    assert foretold.checkpoint - without.checkpoint == pytest.approx(moments + weights, abs=4)
    # Of each token of a pass, twice on the way there and twice back.
    assert foretold.activations - without.activations == 4 * 20 * 100 * 4 * 4
    assert (foretold.trained, without.values) == (without.trained, 0)
    assert foretold.values == foretold.memory - without.memory
    # Masters and moments in slices of three processes, whole gradients, and a block on its way.
    if tuning == "full":
        alone, shared = (need(config, source, replace(work, processes=3, values=n)).optimizer for n in (0, 100))
        assert shared - alone == pytest.approx(weights + 12 * weights // 4 // 3 + 8 * weights // 4, abs=1)


@pytest.mark.parametrize("units", [10**13, 2**63])
def test_a_hidden_layer_that_does_not_fit_is_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, units: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--device", "cpu"]
    out = tmp_path / "out"
    argv += ["--output-dir", str(out), "--checkpoint-dir", str(out), "--value-hidden", str(units)]
    assert cli.main(["train", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "of memory are free: try a smaller --value-hidden" in err
    assert not out.exists()


def test_more_rows_longer_rows_and_no_recomputing_need_more(tmp_path: Path) -> None:
    config = PolicyConfig(str(tiny_folder(tmp_path)), device="cpu", dtype="float32")
    source, work = resolve(config.model), Work(4, 8, 30, 20)
    base = need(config, source, work)
    for more in ({"rows": 8}, {"batch": 16}, {"prompt": 60}, {"new": 40}):
        assert need(config, source, replace(work, **more)).memory > base.memory
    less = need(replace(config, gradient_checkpointing=True), source, work)
    assert less.activations < base.activations and less.weights == base.weights
    assert need(replace(config, tuning="full"), source, work).memory > base.memory


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU with bfloat16; nothing is loaded onto it."""
    monkeypatch.setattr(machines, "pick_device", lambda name: GPU)
    monkeypatch.setattr(machines, "pick_dtype", lambda name, device: torch.bfloat16)


def test_the_estimate_for_the_8b_shape_is_near_what_an_h100_was_measured_to_take(on_gpu: None) -> None:
    config, work = PolicyConfig("shape:llama-3.1-8b"), Work(16, 64, 64, 32)
    source = resolve(config.model)
    assert need(config, source, work).memory / 1e9 == pytest.approx(22.3, rel=0.1)  # benchmarks/RESULTS.md
    assert need(replace(config, use_8bit=True), source, work).memory / 1e9 < 22
    assert need(config, source, work).memory / 1e9 < 38


def test_the_8b_shape_in_8_bits_is_planned_on_a_card_of_16_gb_and_the_70b_shape_on_one_of_141(on_gpu: None) -> None:
    work = Work(16, 64, 64, 32)
    # Linear layers at a byte a weight, embeddings and head at two, a float32 scale a row; one matrix in bfloat16.
    assert EIGHT_BIT_GB == 16  # a card of 16 GiB has 17.2 of these, less what the driver keeps
    for shape, hidden, inner, layers, card in (("8b", 4096, 14336, 32, 15.6), ("70b", 8192, 28672, 80, 139.0)):
        whole = PolicyConfig(f"shape:llama-3.1-{shape}")
        eight, source = replace(whole, use_8bit=True), resolve(whole.model)
        heads = 2 * hidden * hidden + 2 * hidden * 1024
        matrices = layers * (heads + 3 * hidden * inner)
        rest = 2 * 128256 * hidden + (2 * layers + 1) * hidden
        scales = layers * (2 * hidden + 2 * 1024 + 2 * inner + hidden)
        one = 2 * hidden * inner
        found = need(eight, source, work)
        assert found.loading == pytest.approx(matrices + 2 * rest + 4 * scales + one, abs=60e6)
        assert found.loading < need(whole, source, work).loading == 2 * (matrices + rest)
        plan = fit(eight, source, work, card)
        assert plan.need.memory / 1e9 <= MARGIN * card and plan.line(16) is None
        assert shape == "70b" or card < EIGHT_BIT_GB
        assert need(whole, source, work).memory / 1e9 > card
    eight = PolicyConfig("shape:llama-3.1-8b", use_8bit=True)
    assert need(eight, resolve(eight.model), work).loading < 12e9


def test_full_fine_tuning_of_the_8b_shape_is_planned_on_two_cards_of_141_gb_or_four_of_80(on_gpu: None) -> None:
    config = PolicyConfig("shape:llama-3.1-8b", "full")
    source, weights = resolve(config.model), 8_030_261_248
    alone = need(config, source, Work(16, 64, 64, 32))
    assert alone.optimizer == 18 * weights
    for processes, card in ((2, 141.0), (4, 84.0), (8, 84.0)):
        rows = 16 // processes
        work = Work(rows, 64, 64, 32, processes, piece=rows)
        found = need(config, source, work)
        # Gradients of two bytes, a slice of master and moments of twelve, a block in bfloat16 and in float32.
        assert found.optimizer == 2 * weights + 12 * weights // processes + 6 * 2**26
        assert (found.weights, found.reference, found.checkpoint) == (2 * weights, 2 * weights, 12 * weights)
        plan = fit(config, source, work, card)
        assert plan.need.memory / 1e9 <= MARGIN * card and plan.line(rows) is None
        averaged = need(config, source, replace(work, average=True))  # measured on two H200: 113.9 GB
        assert averaged.optimizer == found.optimizer + 4 * weights // processes
        assert processes != 2 or averaged.memory / 1e9 == pytest.approx(113.9, rel=0.05)
        for more in ({"rows": 1}, {"pieces": 2}):  # gradients are then summed beside those of the next pass
            assert need(config, source, replace(work, **more)).optimizer == found.optimizer + 4 * weights
    assert fit(config, source, Work(8, 64, 64, 32, 2, piece=8), 84.0).need.memory / 1e9 > 84.0
    adapters = replace(config, tuning="lora")
    assert (
        need(adapters, source, Work(8, 64, 64, 32, 2, 8)).optimizer
        == need(adapters, source, Work(8, 64, 64, 32)).optimizer
    )


def test_a_slice_is_what_a_process_is_foretold_to_hold(tmp_path: Path) -> None:
    config = PolicyConfig(str(tiny_folder(tmp_path)), "full", dtype="bfloat16", device="cpu")
    policy = load_policy(config, PROMPTS["raw"])
    trained = {name: p for name, p in policy.trained().items() if not name.startswith("value_head")}
    group = FlatGroup(trained, Ranks(0, 1), sharded=False)
    slices = [Shards(group.buffer.numel(), Ranks(rank, 3)) for rank in range(3)]
    foretold = need(config, resolve(config.model), Work(4, 12, 30, 20, 3, piece=4))
    block = 6 * foretold.trained
    for own in slices:
        assert foretold.optimizer - block == pytest.approx(group.grads.nbytes + 12 * own.own, abs=12 * 16 * 3)


def test_memory_that_only_loading_takes_counts(tmp_path: Path) -> None:
    assert replace(NEED, loading=11 * 10**9).memory == 11 * 10**9
    assert replace(NEED, loading=9 * 10**9).memory == 10 * 10**9


def test_a_plan_takes_smaller_passes_first_then_recomputes_and_says_so(on_gpu: None) -> None:
    config, work = PolicyConfig("shape:llama-3.1-8b"), Work(16, 64, 64, 32)
    source = resolve(config.model)
    seen = []
    for tenths in range(400, 160, -4):
        plan = fit(config, source, work, tenths / 10)
        if plan.need.memory / 1e9 <= MARGIN * tenths / 10:
            seen.append((plan.rows, plan.gradient_checkpointing))
    assert seen == sorted(seen, key=lambda way: (way[1], -way[0]))  # less and less as memory gets scarce
    assert seen[0] == (16, False) and {again for _, again in seen} == {False, True}
    roomy, tight, none = (fit(config, source, work, gb) for gb in (80.0, 21.8, 10.0))
    assert roomy.line(16) is None and (none.rows, none.gradient_checkpointing) == (1, True)  # what needs the least
    line = tight.line(16)
    assert line is not None and "instead of 16" in line and "same result" in line
    assert fit(replace(config, gradient_checkpointing=True), source, work, 80.0).gradient_checkpointing


@pytest.mark.parametrize("name", ["near", "even"])
def test_the_presets_of_large_steps_are_planned_on_cards_of_8_16_and_24_gb(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Logits of the whole batch are there at once only where one pass takes a whole mini-batch."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    monkeypatch.setitem(SHAPES, "smollm2-135m", sizes)
    config, source = preset(name), resolve("shape:smollm2-135m")
    new, batch, rows = config.sampling.max_new_tokens, config.ppo.batch_size, config.ppo.mini_batch_size
    units = config.ppo.value_hidden
    work = Work(rows, batch, 64, new, piece=rows, values=units)
    assert need(config.policy, source, work).parameters == 134_515_008
    plans = [fit(config.policy, source, work, gb) for gb in (7.5, 15.5, 23.5)]
    assert all(plan.need.memory / 1e9 <= MARGIN * gb for plan, gb in zip(plans, (7.5, 15.5, 23.5), strict=True))
    assert 8 <= plans[0].rows < plans[1].rows < plans[2].rows == rows
    # Two bytes a logit and thrice four a unit of the value head, less the sampler's cache, which is at another time:
    # keys and values of 3 heads of 64.
    cache = batch * (64 + new) * 2 * 30 * 3 * 64 * 2
    one = need(config.policy, source, replace(work, rows=1))
    assert need(config.policy, source, replace(work, rows=1, piece=1)).memory - one.memory == (
        (2 * 49152 + 12 * units) * batch * new - cache
    )


def test_on_a_cpu_the_plan_is_what_was_asked_for(tmp_path: Path) -> None:
    config = PolicyConfig(str(tiny_folder(tmp_path)), device="cpu", dtype="float32")
    plan = fit(config, resolve(config.model), Work(16, 64, 64, 32), 0.0)
    assert (plan.rows, plan.gradient_checkpointing) == (16, False) and plan.line(16) is None


def test_too_little_memory_is_refused_with_numbers_and_a_remedy(disk) -> None:
    disk(10**13)
    folders = ("out", "checkpoints")
    assert check(NEED, ROOMY, CPU, folders, 2)
    with pytest.raises(UserError, match=r"needs about 10.0 GB and 9.5 GB of memory are free: try --model bundled"):
        check(NEED, replace(ROOMY, memory_free_gb=9.5), CPU, folders, 2)
    with pytest.raises(UserError, match=r"10.0 GB and 9.5 GB on the GPU are free: try --use-8bit"):
        check(replace(NEED, reference=0, weights=7 * 10**9), replace(ROOMY, gpu_free_gb=9.5), GPU, folders, 2)
    # Where most of it are activations there are smaller passes, and where these are small smaller batches.
    many = replace(NEED, weights=10**9, reference=0, activations=7 * 10**9)
    with pytest.raises(UserError, match=r"try a smaller --micro-batch-size, --model bundled"):
        check(many, replace(ROOMY, memory_free_gb=9.5), CPU, folders, 2)
    with pytest.raises(UserError, match=r"try a smaller --batch-size, --use-8bit"):
        check(many, replace(ROOMY, gpu_free_gb=9.5), GPU, folders, 2)
    # The other kind of memory does not matter.
    assert check(NEED, replace(ROOMY, gpu_free_gb=0.1), CPU, folders, 2)
    assert check(NEED, replace(ROOMY, memory_free_gb=0.1), GPU, folders, 2)


def test_processes_on_one_machine_have_a_gpu_each_and_one_memory_together(disk) -> None:
    disk(10**13)
    folders, tight = ("out", "checkpoints"), replace(ROOMY, gpu_free_gb=10.1, memory_free_gb=19.9)
    assert "10.0 GB of 10.1 GB free for each of 2 processes" in check(NEED, tight, GPU, folders, 2, sharing=2)[0]
    with pytest.raises(UserError, match=r"10.0 GB and 9.9 GB of memory for each of 2 processes are free: try --model"):
        check(NEED, tight, CPU, folders, 2, sharing=2)
    with pytest.raises(
        UserError, match=r"on the GPU are free: try more GPUs \(--gpus\), .* --tuning lora, or a smaller"
    ):
        check(NEED, replace(ROOMY, gpu_free_gb=9.5), GPU, folders, 2)


def test_the_doctor_plans_for_the_number_of_processes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["doctor", "--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--device", "cpu"]
    assert cli.main([*argv, "--tuning", "full", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        "frozen copy as reference, optimizer in 2 slices" in out and "GB free for each of 2 processes: weights" in out
    )
    assert cli.main([*argv, "--tuning", "full"]) == 0
    assert "slices" not in capsys.readouterr().out
    assert cli.main([*argv, "--processes", "0"]) == 2


def test_too_little_disk_is_refused_counting_all_checkpoints_and_the_model(disk) -> None:
    disk(16 * 10**9)  # 2 × 5 + 6
    assert "16.0 GB for 2 checkpoints" in check(NEED, ROOMY, CPU, ("out", "checkpoints"), 2)[1]
    disk(16 * 10**9 - 1)
    with pytest.raises(UserError, match=r"take about 16.0 GB and 16.0 GB of disk are free.*--keep-checkpoints 2"):
        check(NEED, ROOMY, CPU, ("out", "checkpoints"), 2)
    assert check(NEED, ROOMY, CPU, ("out", "checkpoints"), 1)


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_disk_it_will_lie_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**13, 0, 10**13)

    monkeypatch.setattr(machines.shutil, "disk_usage", usage)
    check(NEED, ROOMY, CPU, (str(tmp_path / "a" / "b"), str(tmp_path / "c")), 1)
    assert asked == [tmp_path]


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_run_that_does_not_fit_ends_before_it_begins(
    model: Path, tmp_path: Path, what: str, disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "disk":
        disk(1000)
    else:
        monkeypatch.setattr(machines, "inspect_machine", lambda: replace(ROOMY, gpu=None, memory_free_gb=0.0001))
    argv = ["--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--device", "cpu"]
    for command in ("doctor", "train"):
        out = tmp_path / command
        assert cli.main([command, *argv, "--output-dir", str(out), "--checkpoint-dir", str(out)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"of {what} are free" in err
        assert not out.exists()


def test_a_checkpoint_on_disk_is_as_large_as_foretold(model: Path, tmp_path: Path) -> None:
    config = small_config(model, tmp_path, steps=2, tuning="full")
    train(config)
    foretold = need(config.policy, resolve(str(model)), Work(4, 8, 4, 8))
    # Tensors alone: the documents beside them, the task among them, do not grow with the model.
    files = (tmp_path / "checkpoints" / "checkpoint-2").glob("*.safetensors")
    assert sum(f.stat().st_size for f in files) == pytest.approx(
        foretold.checkpoint, abs=30_000
    )  # random states, headers
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written == pytest.approx(foretold.export, abs=3000)


def test_a_checkpoint_that_takes_longer_than_processes_have_to_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.SHUTDOWN[0], raising=False)
    assert slow_to_save(15 * 10**9) == []  # 30 s at half a GB a second, which is what torchrun gives
    (line,) = slow_to_save(96 * 10**9)
    assert "a checkpoint of 96.0 GB takes some 192 s" in line and "processes 30 s after" in line and "=420" in line
    if not hasattr(api.LaunchConfig, "shutdown_timeout"):
        return  # this torch gives 30 s whatever the environment says
    monkeypatch.setenv(launch.SHUTDOWN[0], "192")
    assert slow_to_save(96 * 10**9) == []
    monkeypatch.setenv(launch.SHUTDOWN[0], "191")
    assert "processes 191 s after" in slow_to_save(96 * 10**9)[0]
    monkeypatch.setenv(launch.SHUTDOWN[0], "soon")
    with pytest.raises(UserError, match=r"is 'soon'.*give seconds"):
        slow_to_save(1)


def test_doctor_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("equipoise.ppo.preflight.SAVING_GB_PER_SECOND", 1e-9)
    monkeypatch.delenv(launch.SHUTDOWN[0], raising=False)
    model = tiny_folder(tmp_path / "model")
    assert cli.main(["doctor", "--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw"]) == 0
    assert capsys.readouterr().out.count("kill their processes 30 s after a signal") == 1
