"""What the stages promise: exact resume after a kill, the same losses however a batch is spread, checkpoints that the
engine reads strictly, and errors before training starts."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from engine.errors import CheckpointError, InvalidInput
from engine.models import base, checkpoint, layout
from engine.models.language_model import FAMILIES
from tests import m3d_data
from tests import toy_models as toy
from tests.conftest import ROOT
from training import align_projector, finetune, lamed, merge_lora, pretrain_clip, record, trainer
from training.config import build, check_trainer, read
from training.data import selection
from training.data.skip_broken import TooManyBroken
from training.lamed import Start, TrainedLamed
from training.losses import contrastive_loss
from training.packing import Packer
from training.record import started_from

pytestmark = pytest.mark.integration

_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Runs a stage that kills itself: before step N, or in the middle of writing the optimizer's state of checkpoint N.
_KILLED = """
import os, signal, sys
import torch
from training import config, finetune, pretrain_clip, trainer
stage, file, where, number = sys.argv[1:]
def die(): os.kill(os.getpid(), signal.SIGKILL)
step, save, calls = trainer.StageTrainer.training_step, torch.save, {"step": 0, "save": 0}
def counted_step(self, *args, **kwargs):
    calls["step"] += 1
    if where == "step" and calls["step"] == int(number): die()
    return step(self, *args, **kwargs)
def torn_save(value, target, *args, **kwargs):
    if str(target).endswith("optimizer.pt"):
        calls["save"] += 1
        if where == "save" and calls["save"] == int(number):
            open(target, "wb").write(b"half")
            die()
    return save(value, target, *args, **kwargs)
trainer.StageTrainer.training_step, torch.save = counted_step, torn_save
module = {"finetune": finetune, "pretrain_clip": pretrain_clip}[stage]
settings = config.read(module.Settings, file)
torch.manual_seed(settings.seed)
module.train(settings)
"""

# Two processes train from beginning to end; then two of which one kills itself before step N; then two that go on. They
# are forks of one, which imports everything once. As torchrun does, the others are killed when one fails.
_TWO_PROCESSES = """
import os, signal, socket, sys, traceback
import torch
from training import config, finetune, trainer
whole, torn, killed, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
step = trainer.StageTrainer.training_step
def die_before_step(self, *args, **kwargs):
    if self.args.process_index == killed and self.state.global_step + 1 == number: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
def work(file):
    settings = config.read(finetune.Settings, file)
    torch.manual_seed(settings.seed)
    finetune.train(settings)
    torch.distributed.destroy_process_group()
def run(file):
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    ranks, codes = {}, [None, None]
    for rank in (0, 1):
        child = os.fork()
        if not child:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
                           "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            try: work(file)
            except BaseException: traceback.print_exc(); os._exit(1)
            os._exit(0)
        ranks[child] = rank
    while ranks:
        child, status = os.wait()
        codes[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in ranks: os.kill(other, signal.SIGKILL)
    return codes
assert run(whole) == [0, 0]
trainer.StageTrainer.training_step = die_before_step
assert run(torn)[killed] == -signal.SIGKILL
kept = sorted(path.name for path in config.read(finetune.Settings, torn).out.glob("checkpoint-*"))
assert kept[-1] == f"checkpoint-{number - 1}" and not (config.read(finetune.Settings, torn).out / "final").exists(), \
kept
trainer.StageTrainer.training_step = step
assert run(torn) == [0, 0]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return m3d_data.write_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return toy.language_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return toy.text_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are started here: sums over several threads differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(module, values: dict) -> Path:
    """A stage in this process, seeded as its command does."""
    settings = build(module.Settings, values)
    torch.manual_seed(settings.seed)
    return module.train(settings)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, data, llm) -> Path:
    """A finished run of instruction tuning."""
    return run(finetune, toy.finetune_configuration(tmp_path_factory.mktemp("runs") / "tuned", data, llm))


@pytest.fixture(scope="module")
def pretrained_clip(tmp_path_factory, data, encoder) -> Path:
    return run(pretrain_clip, toy.clip_configuration(tmp_path_factory.mktemp("runs") / "clip", data, encoder))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}:{key}": value
        for file in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def same_bits(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def killed(stage: str, file: Path, where: str, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, stage, str(file), where, str(number)],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


# --- exact resume ----------------------------------------------------------------------------------------------------
@pytest.mark.slow(group="faults")
def test_a_killed_and_resumed_run_of_instruction_tuning_ends_with_the_same_bits(tmp_path, data, llm, tuned):
    """Dropout is on: random numbers are resumed, too."""
    values = toy.finetune_configuration(tmp_path / "run", data, llm)
    number = random.randint(2, 4)
    killed("finetune", toy.written(values, tmp_path / "run.json"), "step", number)
    assert not (tmp_path / "run" / "final").exists() and (tmp_path / "run" / f"checkpoint-{number - 1}").is_dir()
    assert same_bits(run(finetune, values), tuned), f"killed before step {number}"


@pytest.mark.slow(group="faults")
def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path, data, encoder, pretrained_clip):
    """Four steps of two pairs out of four: the kill also falls into another epoch than the first."""
    values = toy.clip_configuration(tmp_path / "run", data, encoder)
    killed("pretrain_clip", toy.written(values, tmp_path / "run.json"), "save", 3)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert same_bits(run(pretrain_clip, values), pretrained_clip)


@pytest.mark.slow(group="faults")
def test_a_run_with_processes_that_load_is_resumed_with_the_bits_of_one_without(tmp_path, data, llm, tuned):
    values = toy.finetune_configuration(tmp_path / "run", data, llm, dataloader_num_workers=2)
    number = random.randint(2, 4)
    killed("finetune", toy.written(values, tmp_path / "run.json"), "step", number)
    assert same_bits(run(finetune, values), tuned), f"killed before step {number}"


def test_a_run_of_two_processes_one_of_which_is_killed_ends_with_the_same_bits_when_resumed(tmp_path, data, llm):
    whole, torn = (
        toy.written(toy.finetune_configuration(tmp_path / name, data, llm), tmp_path / f"{name}.json")
        for name in ("whole", "torn")
    )
    rank, number = random.randint(0, 1), random.randint(2, 4)
    done = subprocess.run(
        [sys.executable, "-c", _TWO_PROCESSES, str(whole), str(torn), str(rank), str(number)],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_bits(tmp_path / "torn" / "final", tmp_path / "whole" / "final"), f"{rank} killed before step {number}"


def test_a_machine_that_does_not_see_the_first_one_s_checkpoint_stops_with_words(tmp_path, data, llm, monkeypatch):
    def of_the_first(objects: list) -> None:
        objects[:] = [["/elsewhere/checkpoint-3"]]

    monkeypatch.setattr(trainer, "broadcast_object_list", of_the_first)
    with pytest.raises(
        InvalidInput, match="/elsewhere/checkpoint-3, .* is not on this machine: `out` must be a folder"
    ):
        run(finetune, toy.finetune_configuration(tmp_path / "run", data, llm))


def test_a_run_killed_between_its_last_checkpoint_and_its_end_takes_no_step_more(tmp_path, data, llm, tuned):
    shutil.copytree(tuned.parent, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    assert same_bits(run(finetune, toy.finetune_configuration(tmp_path / "run", data, llm)), tuned)


def test_another_seed_trains_another_model(tmp_path, data, encoder, pretrained_clip):
    values = {**toy.clip_configuration(tmp_path / "run", data, encoder), "seed": 2}
    assert not same_bits(run(pretrain_clip, values), pretrained_clip)


def test_a_run_goes_on_only_with_the_settings_and_data_it_began_with(tmp_path, data, llm, tuned):
    shutil.copytree(tuned.parent, tmp_path / "run")
    values = toy.finetune_configuration(tmp_path / "run", data, llm, learning_rate=2e-3)
    with pytest.raises(InvalidInput, match=r"trainer.learning_rate: 0.001 -> 0.002"):
        run(finetune, values)
    other = shutil.copytree(data, tmp_path / "data")
    index = other / "M3D_RefSeg_npy" / "M3D_RefSeg_train.csv"
    index.write_text(index.read_text().replace("lesion", "tumour"))
    with pytest.raises(InvalidInput, match="begun with something else.*M3D_RefSeg_train.csv"):
        run(finetune, toy.finetune_configuration(tmp_path / "run", other, llm))


@pytest.mark.parametrize(
    "stage, changes, processes",
    [
        ("finetune", {"ddp_timeout": 7200}, 8),
        ("finetune", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 8),
        ("finetune", {"per_device_train_batch_size": 8}, 4),
        ("finetune", {"gradient_accumulation_steps": 2}, 4),
        ("finetune", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, 16),
        ("pretrain_clip", {"per_device_train_batch_size": 8}, 4),
    ],
)
def test_a_run_goes_on_with_what_does_not_change_its_result(tmp_path, stage, changes, processes):
    trainer = {"per_device_train_batch_size": 4}
    record.begin(tmp_path, stage, {"trainer": trainer}, {}, 8)
    record.begin(tmp_path, stage, {"trainer": trainer | changes}, {}, processes)


@pytest.mark.parametrize(
    "stage, before, changes, processes, named",
    [
        ("finetune", {}, {}, 4, "processes: 8 -> 4"),
        ("finetune", {}, {"per_device_train_batch_size": 8}, 8, "per_device_train_batch_size: 4 -> 8"),
        ("pretrain_clip", {}, {"gradient_accumulation_steps": 2}, 4, "gradient_accumulation_steps: None -> 2"),
        ("finetune", {"deepspeed": "zero2.json"}, {"per_device_train_batch_size": 8}, 4, "processes: 8 -> 4"),
        ("finetune", {"fsdp": True}, {"per_device_train_batch_size": 8}, 4, "processes: 8 -> 4"),
    ],
)
def test_a_run_does_not_go_on_with_another_batch(tmp_path, stage, before, changes, processes, named):
    trainer = {"per_device_train_batch_size": 4} | before
    record.begin(tmp_path, stage, {"trainer": trainer}, {}, 8)
    with pytest.raises(InvalidInput, match=named):
        record.begin(tmp_path, stage, {"trainer": trainer | changes}, {}, processes)


def test_a_run_that_goes_on_with_its_batch_spread_otherwise_ends_as_it_would_have(tmp_path, data, llm, monkeypatch):
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}

    def values(name: str, **spread) -> dict:
        return only(toy.finetune_configuration(tmp_path / name, data, llm, dropout=0.0, **settings, **spread))

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

    whole = weights(run(finetune, values("whole", per_device_train_batch_size=4)))
    with monkeypatch.context() as stopped:
        stopped.setattr(trainer._Clock, "on_step_end", stop)
        with pytest.raises(InvalidInput, match="stopped at step 2"):
            run(finetune, values("torn", per_device_train_batch_size=4))
    torn = weights(run(finetune, values("torn", per_device_train_batch_size=2, gradient_accumulation_steps=2)))
    for key, value in whole.items():
        torch.testing.assert_close(torn[key], value, atol=1e-5, rtol=1e-4, msg=key)


# --- broken samples, epochs ------------------------------------------------------------------------------------------
def only(values: dict, *tasks: str, broken: float = 0.01) -> dict:
    """The configuration with other tasks, without sample predictions."""
    m3d = {**values["data"]["m3d"], "broken": broken}
    return {**values, "sample_every": 0, "data": {"m3d": {**m3d, "tasks": list(tasks)} if tasks else m3d}}


def noted(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "broken.jsonl").read_text().splitlines()]


SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


@pytest.mark.parametrize("stage", ["finetune", "pretrain_clip"])
def test_a_broken_sample_costs_a_batch_nothing_but_itself(tmp_path, data, llm, encoder, stage, monkeypatch):
    """The step is that of a batch without it."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)

    def trained(name: str, root: Path, batch: int, rate: float = 1.0) -> dict:
        settings = {**SGD, "per_device_train_batch_size": batch, "max_steps": 1, "learning_rate": rate}
        if stage == "finetune":
            values = only(toy.finetune_configuration(tmp_path / name, root, llm, dropout=0.0, **settings), "caption")
            return weights(run(finetune, values))
        return weights(run(pretrain_clip, only(toy.clip_configuration(tmp_path / name, root, encoder, **settings))))

    torn, fewer = (shutil.copytree(data, tmp_path / name) for name in ("torn", "fewer"))
    (torn / "M3D_Cap_npy/ct_case/000003/Axial.npy").write_bytes(b"")
    index = fewer / "M3D_Cap_npy" / "M3D_Cap.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({**listed, "train": listed["train"][:3]}))
    without, found = trained("without", fewer, 3), trained("broken", torn, 4)
    still = trained("still", fewer, 3, rate=0.0)
    assert max((value - still[key]).abs().max().item() for key, value in without.items()) > 1e-3
    for key, value in without.items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4, msg=key)
    (note,) = noted(tmp_path / "broken")
    assert note["index"] == 3 and note["paths"][0].endswith("000003/Axial.npy")


@pytest.mark.parametrize("stage", ["finetune", "pretrain_clip"])
def test_a_stage_stops_on_too_many_broken_samples(tmp_path, data, llm, encoder, stage):
    torn = shutil.copytree(data, tmp_path / "torn")
    (torn / "M3D_Cap_npy/ct_case/000001/Axial.npy").write_bytes(b"")
    module, values = {
        "finetune": (finetune, only(toy.finetune_configuration(tmp_path / "run", torn, llm), "caption", broken=0.0)),
        "pretrain_clip": (pretrain_clip, only(toy.clip_configuration(tmp_path / "run", torn, encoder), broken=0.0)),
    }[stage]
    with pytest.raises(TooManyBroken, match="000001/Axial.npy"):
        run(module, values)
    assert not (tmp_path / "run" / "final").exists()


def test_questions_without_room_for_an_answer_are_recorded_and_batches_of_nothing_else_teach_nothing(
    tmp_path, data, llm
):
    long = shutil.copytree(data, tmp_path / "long")
    table = long / "M3D-VQA" / "M3D_VQA_yn_train.csv"
    table.write_text(table.read_text().replace("a mass?", "a mass" + " or another" * 30 + "?"))

    def trained(name: str, rate: float) -> dict:
        settings = {**SGD, "max_steps": 2, "learning_rate": rate}
        values = toy.finetune_configuration(tmp_path / name, long, llm, **settings)
        return weights(run(finetune, only(values, "vqa_yes_no", broken=0.5)))

    still = trained("still", 0.0)
    assert all(torch.equal(value, still[key]) for key, value in trained("run", 0.1).items())
    notes = noted(tmp_path / "run")
    assert sorted(note["index"] for note in notes) == [0, 1, 2, 3]
    assert all("leaves no room for its answer: Is there a mass or another" in note["cause"] for note in notes)
    with pytest.raises(TooManyBroken, match="no room"):
        run(finetune, only(toy.finetune_configuration(tmp_path / "strict", long, llm), "vqa_yes_no", broken=0.0))


def test_every_epoch_has_every_sample_in_an_order_and_a_form_of_its_own(tmp_path, data, encoder, monkeypatch):
    """Four pairs in batches of two."""
    seen, read = [], selection.M3DSamples.__getitem__

    def watched(self, place):
        seen.append((*place, read(self, place).image))
        return read(self, place)

    monkeypatch.setattr(selection.M3DSamples, "__getitem__", watched)
    run(pretrain_clip, only(toy.clip_configuration(tmp_path / "run", data, encoder, max_steps=6)))
    epochs = [seen[k : k + 4] for k in (0, 4, 8)]
    assert [{epoch for epoch, _, _ in part} for part in epochs] == [{0}, {1}, {2}]
    orders = [[index for _, index, _ in part] for part in epochs]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len(set(map(tuple, orders))) > 1
    images = [{index: image for _, index, image in part} for part in epochs]
    assert not torch.equal(*(torch.from_numpy(part[0]) for part in images[:2]))


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = trainer.EpochSampler(50, seed)
        sampler.epoch = epoch
        return list(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert all(order(*place) == found for place, found in orders.items())
    assert all(sorted(found) == [(epoch, k) for k in range(50)] for (_, epoch), found in orders.items())
    assert len({tuple(k for _, k in found) for found in orders.values()}) == 4


# --- several processes -----------------------------------------------------------------------------------------------
# The seg projector has dropout of its own, which every process would draw for itself.
_WITHOUT_DROPOUT = """
import os, runpy, sys
import torch
torch.nn.Dropout.forward = lambda self, x: x
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_NO_THREADS = """
names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
sys.exit(f"threads outlive the stage: {names}" if any("gloo" in name for name in names) else 0)
"""


_FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}


# accelerate leaves FSDP out where it finds CPUs alone.
AS_ON_GPUS = """
from accelerate import state
begin = state.AcceleratorState.__init__
def as_on_gpus(self, *args, **kwargs):
    state.PartialState._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)
state.AcceleratorState.__init__ = as_on_gpus
from training import trainer
whole_step = trainer.StageTrainer.training_step
def in_pieces(self, *args, **kwargs):
    assert self.is_fsdp_enabled and {type(p).__name__ for p in self.model.parameters()} == {"DTensor"}
    return whole_step(self, *args, **kwargs)
trainer.StageTrainer.training_step = in_pieces
"""


@pytest.mark.parametrize("stage, spread", [("finetune", {}), ("finetune", _FSDP2), ("pretrain_clip", {})])
def test_two_processes_train_what_one_does_on_the_joined_batch(
    tmp_path, data, llm, encoder, stage, spread, monkeypatch
):
    """SGD: weights move by the gradient itself, which Adam would hide where it is small.

    No thread of the process group is left at the end: one that is aborts the process now and then."""
    module = {"finetune": finetune, "pretrain_clip": pretrain_clip}[stage]

    def values(name: str, batch: int, rate: float = 0.1, **spread) -> dict:
        settings = {
            "per_device_train_batch_size": batch,
            "max_steps": 2,
            "optim": "sgd",
            "learning_rate": rate,
            "max_grad_norm": 0.0,
            **spread,
        }
        if stage == "finetune":
            return toy.finetune_configuration(tmp_path / name, data, llm, dropout=0.0, **settings)
        return toy.clip_configuration(tmp_path / name, data, encoder, **settings)

    script = tmp_path / "without_dropout.py"
    # FSDP's mesh holds its group, a thread of which may abort an interpreter that ends.
    script.write_text(AS_ON_GPUS + _WITHOUT_DROPOUT + "os._exit(0)" if spread else _WITHOUT_DROPOUT + _NO_THREADS)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(ROOT / "training" / f"{stage}.py"),
            str(toy.written(values("two", 2, **spread), tmp_path / "two.json")),
        ],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    before = weights(run(module, values("still", 4, rate=0.0)))
    one, two = weights(run(module, values("one", 4))), weights(tmp_path / "two" / "final")
    assert one.keys() == two.keys()
    assert max((value - before[key]).abs().max().item() for key, value in one.items()) > 1e-3
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=2e-5, rtol=1e-4, msg=key)


def _gathered(rank: int, address: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    image, text, scale = _features()
    rows = slice(3 * rank, 3 * rank + 3)
    own = [part[rows].detach().requires_grad_() for part in (image, text)] + [scale.detach().requires_grad_()]
    kept = torch.tensor([True, True, True, False, True, True])[rows]
    loss = contrastive_loss(F.normalize(own[0], dim=1), F.normalize(own[1], dim=1), own[2], kept)
    loss.backward()
    torch.save([loss.detach(), *(part.grad for part in own)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator), torch.tensor(2.6)


def test_the_gathered_loss_and_its_gradient_equal_those_of_the_joined_batch(tmp_path):
    """Row 3 is broken and counts as not there. Gradients of the two processes are averaged, as DDP does."""
    torch.multiprocessing.spawn(_gathered, (f"file://{tmp_path}/group", str(tmp_path)), nprocs=2)
    image, text, scale = (part.requires_grad_() for part in _features())
    kept = [0, 1, 2, 4, 5]
    a, b = F.normalize(image[kept], dim=1), F.normalize(text[kept], dim=1)
    logits, target = scale * a @ b.T, torch.arange(5)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for found in parts:
        torch.testing.assert_close(found[0], loss.detach())
        torch.testing.assert_close(found[3], scale.grad)
    for k, whole in ((1, image.grad), (2, text.grad)):
        torch.testing.assert_close(torch.cat([part[k] for part in parts]) / 2, whole)


def test_a_step_is_the_same_in_one_batch_or_accumulated(tmp_path, data, llm, monkeypatch):
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)

    def trained(name: str, **settings) -> dict:
        values = toy.finetune_configuration(
            tmp_path / name,
            data,
            llm,
            dropout=0.0,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            **settings,
        )
        return weights(run(finetune, {**values, "sample_every": 0}))

    whole = trained("whole", per_device_train_batch_size=4)
    parts = trained("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, atol=1e-5, rtol=1e-4, msg=key)


# --- start -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("phi3", False), ("llama3", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_starts_from_its_weights_alone(tmp_path, family, tied, dtype, monkeypatch):
    """No random weights before them; its positions are those of transformers' own model, in float32."""
    source = toy.language_model(tmp_path / "llm", family, tie_word_embeddings=tied)
    built, made = [], lamed.causal_lm
    monkeypatch.setattr(lamed, "causal_lm", lambda config: built.append(made(config)) or built[-1])
    model = TrainedLamed(Start(source, toy.PARTS, dtype=dtype), ("mm_projector",))
    llm = model.lamed.llm
    assert built == [llm]
    files = load_file(Path(source) / "model.safetensors")
    for name, value in llm.named_parameters():
        if name in files:
            assert torch.equal(value[: len(files[name])], files[name].to(getattr(torch, dtype))) or "embed" in name
            assert value.dtype == getattr(torch, dtype)
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tied
    theirs = AutoModelForCausalLM.from_pretrained(source).model.rotary_emb.inv_freq
    assert llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(llm.model.rotary_emb.inv_freq, theirs)


def test_no_memory_is_taken_for_weights_that_are_replaced(tmp_path, llm, monkeypatch):
    devices, made = [], lamed.causal_lm

    def watched(config):
        model = made(config)
        devices.extend({parameter.device.type for parameter in model.parameters()})
        return model

    monkeypatch.setattr(lamed, "causal_lm", watched)
    TrainedLamed(Start(llm, toy.PARTS), ("mm_projector",))
    assert devices == ["meta"]


# --- types -----------------------------------------------------------------------------------------------------------
def stage_and_batches(stage: str, folder: Path, data: Path, llm: str, encoder: str):
    """(model, batches) of a stage: of finetune a batch with masks and one without."""
    if stage == "pretrain_clip":
        settings = build(pretrain_clip.Settings, toy.clip_configuration(folder, data, encoder))
        model = pretrain_clip.build(settings)
        pairs = selection.open_pairs(settings, settings.vision.image_size)
        return model, [model.collate([pairs[0, 0], pairs[0, 1]])]
    values = toy.finetune_configuration(folder, data, llm)
    values["data"]["m3d"]["tasks"] = ["caption", "segmentation"] if stage == "finetune" else ["caption"]
    settings = build(finetune.Settings, values)
    if stage == "finetune":
        model, packer = finetune.build(settings)
    else:
        model = TrainedLamed(settings.start, ("mm_projector", "embeddings"), segmentation=False)
        seg, size = model.config_json["seg_token_id"], model.lamed.config.vision.image_size
        packer = Packer(model.prompt, size, seg, settings.max_length)
    questions = selection.open_questions(settings, model.lamed.config.vision.image_size)
    groups = [questions[0, k] for k in range(len(questions))]
    masked = [group for group in groups if group[0].mask is not None]
    return model, [packer(part[:2]) for part in (masked, groups) if part]


@pytest.mark.parametrize("stage", ["finetune", "align_projector", "pretrain_clip"])
def test_a_stage_runs_with_all_weights_in_bf16_and_its_losses_are_float32(tmp_path, data, llm, encoder, stage):
    """As under DeepSpeed, which casts the weights, leaves buffers, and gives no autocast."""
    torch.manual_seed(0)
    model, batches = stage_and_batches(stage, tmp_path / "run", data, llm, encoder)
    assert len(batches) == (2 if stage == "finetune" else 1)
    for batch in batches:  # as the trainer has it: nothing is divided by 0
        batch["totals"] = trainer.Exact({name: total.clamp(min=1) for name, total in batch["totals"].items()})
    expected = [model(**batch)["parts"] for batch in batches]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    for batch, wanted in zip(batches, expected):
        # Trainer casts the batch, too, but for the totals.
        inputs = {
            key: value.bfloat16() if key != "totals" and value.is_floating_point() else value
            for key, value in batch.items()
        }
        model.zero_grad()
        found = model(**inputs)
        assert found["loss"].dtype == torch.float32 and all(v.dtype == torch.float32 for v in found["parts"].values())
        found["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, grad in gradients.items() if grad is None or not torch.isfinite(grad).all()] == []
        for name, value in wanted.items():
            torch.testing.assert_close(found["parts"][name], value, atol=0.05, rtol=0.05)


class _Halves(torch.nn.Module):
    """What crosses a stage model's boundary, and nothing else."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, images: torch.Tensor, totals: dict) -> dict:
        self.seen = totals["answers"]
        loss = self.layer(images).float().sum() / totals["answers"]
        return {"loss": loss, "parts": trainer.Exact(answers=totals["answers"] + 0.125)}


def _sharded(rank: int, address: str, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = _Halves()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    fully_shard(model, mp_policy=policy)
    total = torch.tensor(1543.125)
    found = model(images=torch.ones(2, 4), totals=trainer.Exact(answers=total))
    found["loss"].backward()
    gradient = model.layer.weight.grad.full_tensor()
    torch.save([model.seen, found["parts"]["answers"], gradient], f"{folder}/{rank}.pt")
    # The mesh holds its group, a thread of which may abort an interpreter that ends.
    os._exit(0)


def test_totals_and_losses_cross_fsdp_without_being_rounded(tmp_path):
    torch.multiprocessing.spawn(_sharded, (f"file://{tmp_path}/group", str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        seen, part, gradient = torch.load(tmp_path / f"{rank}.pt")
        assert (seen.item(), part.item()) == (1543.125, 1543.25)  # bf16 would have 1544
        torch.testing.assert_close(gradient, torch.full((1, 4), 2 / 1543.125), atol=0, rtol=2**-8)


# --- what is written -------------------------------------------------------------------------------------------------
def test_the_merged_checkpoint_loads_in_the_engine_strictly_and_answers_as_in_training(tmp_path, tuned, data, llm):
    folder = merge_lora.merge(merge_lora.Settings(trained=tuned, out=tmp_path / "merged", dtype="float32"))
    keys = set(load_file(folder / "model.safetensors"))
    assert {
        "model.vision_tower.vision_tower.cls_token",
        "model.mm_projector.projector.0.weight",
        "lm_head.weight",
        "model.seg_module.prompt_encoder.no_mask_embed.weight",
        "model.seg_projector.0.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
    } <= keys
    assert not [key for key in keys if "lora" in key or "base_layer" in key]
    assert_answers_as_in_training(folder, tuned, toy.finetune_configuration(tmp_path / "run", data, llm))


def assert_answers_as_in_training(merged: Path, trained: Path, values: dict) -> None:
    lamed, tokenizer = checkpoint.load_lamed(merged)
    model, _ = finetune.build(build(finetune.Settings, values))
    model.restore(trained)
    model.eval()
    image = torch.rand(1, 1, *m3d_data.SIZE)
    prompt = lamed.config.prompt(tokenizer)
    ids, start = torch.tensor([prompt.input_ids(" Where?")]), len(prompt.head)
    with torch.no_grad():
        tokens = lamed.encode_images(image)
        torch.testing.assert_close(model.lamed.encode_images(image), tokens)
        embeds = lamed.prompt_embeddings(ids, tokens, start)
        torch.testing.assert_close(model.lamed.prompt_embeddings(ids, tokens, start), embeds)
        torch.testing.assert_close(
            model.lamed.llm(inputs_embeds=embeds).logits, lamed.llm(inputs_embeds=embeds).logits, atol=1e-5, rtol=1e-4
        )


def test_lora_reaches_every_linear_layer_and_the_parts_named_by_train_move(tmp_path, tuned, data, llm):
    adapter = load_file(tuned / base.ADAPTER_WEIGHTS)
    first = base.LORA_PREFIX + "model.layers.0."
    assert {key.split(".lora_")[0].removeprefix(first) for key in adapter if key.startswith(first)} == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert all(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    torch.manual_seed(1)
    model, _ = finetune.build(build(finetune.Settings, toy.finetune_configuration(tmp_path / "run", data, llm)))
    (tmp_path / "start").mkdir()
    model.write(tmp_path / "start", model.state_dict())
    start, end = load_file(tmp_path / "start" / "model.safetensors"), load_file(tuned / "model.safetensors")
    parts = {
        "vision_tower",
        "mm_projector",
        "embed_tokens",
        "lm_head",
        "seg_projector",
        "image_encoder",
        "mask_decoder",
    }
    assert {part for key in end for part in parts if part in key and not torch.equal(start[key], end[key])} == parts


def test_a_merged_checkpoint_starts_the_next_training_with_nothing_lost(tmp_path, tuned, data):
    merged = merge_lora.merge(merge_lora.Settings(trained=tuned, out=tmp_path / "merged", dtype="float32"))
    values = toy.finetune_configuration(tmp_path / "run", data, str(merged))
    values["start"] = {"language_model": str(merged)}
    model, _ = finetune.build(build(finetune.Settings, values))
    model.write(tmp_path, model.state_dict())
    whole, now = load_file(merged / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert now and all(torch.equal(value, whole[key]) for key, value in now.items())


@pytest.mark.parametrize(
    "family, targets",
    [
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        ("llama3", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("llama3-chat", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("qwen2-chat", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_other_families_are_trained_and_merged_and_answer_in_the_engine_as_in_training(tmp_path, data, family, targets):
    source = toy.language_model(tmp_path / f"tiny-{family}", family)
    values = toy.finetune_configuration(tmp_path / "run", data, source, max_steps=2)
    values |= {"sample_every": 2, "max_length": 320}
    if family == "llama3-chat":  # else a LLaMA is trained without a chat template
        values["start"]["model"] = {**toy.PARTS, "model_type": "lamed_llama3"}
    trained = run(finetune, values)
    adapter = load_file(trained / base.ADAPTER_WEIGHTS)
    assert json.loads((trained / base.ADAPTER_CONFIG).read_text())["target_modules"] == targets
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in adapter} == set(targets)
    assert all(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    merged = merge_lora.merge(merge_lora.Settings(trained=trained, out=tmp_path / "merged", dtype="float32"))
    config, _, _ = checkpoint.open_lamed(merged)
    for key, value in json.loads((Path(source) / "config.json").read_text()).items():
        if key in ("rope_parameters", "sliding_window", "num_key_value_heads", "eos_token_id"):
            assert config.llm.get(key) == value
    published = {"phi3": "lamed_phi3", "llama3-chat": "lamed_llama3", "qwen2-chat": "lamed_qwen2"}
    assert config.family == published.get(family, "lamed_llama")
    assert checkpoint.read_config(merged)["architectures"] == [FAMILIES[config.family].architecture]
    assert_answers_as_in_training(merged, trained, values)


def test_pretrained_clip_loads_in_the_engine_and_starts_the_vision_tower(tmp_path, pretrained_clip, data, llm):
    clip, folder = checkpoint.load_clip(pretrained_clip)
    assert checkpoint.has_tokenizer(folder)
    values = toy.finetune_configuration(tmp_path / "run", data, llm)
    values["start"]["vision_tower"] = str(pretrained_clip)
    model, _ = finetune.build(build(finetune.Settings, values))
    for key, value in clip.vision_encoder.state_dict().items():
        assert torch.equal(model.lamed.vision_tower.vision_tower.state_dict()[key], value)


def test_alignment_on_captions_trains_projector_and_embeddings_only(tmp_path, data, llm):
    values = toy.finetune_configuration(tmp_path / "run", data, llm, max_steps=2)
    values = {key: value for key, value in values.items() if key != "lora"} | {
        "objective": "captions",
        "train": ["mm_projector", "embeddings"],
        "sample_every": 0,
        "data": {"m3d": {"root": str(data), "tasks": ["caption"]}},
    }
    settings = build(align_projector.Settings, values)
    torch.manual_seed(1)
    model = align_projector.TrainedLamed(settings.start, settings.train, segmentation=False)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    final = run(align_projector, values)
    model.restore(final)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert moved and {key.split(".")[1] for key in moved} == {"mm_projector", "llm"}
    assert [key for key in moved if "llm" in key] == ["lamed.llm.model.embed_tokens.weight"]
    tuning = toy.finetune_configuration(tmp_path / "tuning", data, llm)
    tuning["start"]["mm_projector"] = str(final)
    next_model, _ = finetune.build(build(finetune.Settings, tuning))
    assert torch.equal(next_model.lamed.llm.model.embed_tokens.weight, model.lamed.llm.model.embed_tokens.weight)


def test_a_run_s_folder_says_how_it_was_made_and_shows_losses_and_answers(tuned):
    record = json.loads((tuned.parent / "run.json").read_text())
    assert record["stage"] == "finetune" and record["settings"]["lora"] == {"r": 4, "alpha": 8, "dropout": 0.05}
    session = record["sessions"][0]
    assert session["seconds"] >= 0 and session["peak_memory_mb"] > 100
    assert session["packages"]["torch"] == torch.__version__ and set(session["code"]) == {"commit", "dirty"}
    assert any(len(value) == 64 for value in record["data"].values())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tuned.parent / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/loss_language", "train/loss_mask"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss_language")) == 4
    assert b"answers:" in events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0]


# --- refusals --------------------------------------------------------------------------------------------------------
def _spoiled(tuned: Path, folder: Path, file: str, change) -> Path:
    shutil.copytree(tuned, folder)
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    return folder


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("model.safetensors", lambda t: t.pop("model.mm_projector.projector.0.weight"), "missing.*projector.0.weight"),
        (
            "model.safetensors",
            lambda t: t.update({"model.mm_projector.projector.0.weight": torch.zeros(0)}),
            "hold nothing.*ZeRO-3",
        ),
        ("model.safetensors", lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}), r"lm_head.weight \[3, 3\]"),
        (
            "model.safetensors",
            lambda t: t["model.seg_projector.0.weight"].fill_(float("nan")),
            "not finite.*seg_projector",
        ),
        (base.ADAPTER_WEIGHTS, lambda t: t.pop(next(key for key in t if "lora_B" in key)), "incomplete"),
        (
            base.ADAPTER_WEIGHTS,
            lambda t: t.update({next(key for key in t if "lora_B" in key): torch.zeros(0)}),
            "empty",
        ),
        (
            base.ADAPTER_WEIGHTS,
            lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key],
            "incomplete: it has nothing for model.layers.1.* more",
        ),
        (
            base.ADAPTER_WEIGHTS,
            lambda t: t.update({key: value[:1] for key, value in t.items() if "lora_A" in key}),
            "has r 1 at .*do not belong together",
        ),
    ],
)
def test_the_merge_refuses_what_is_incomplete(tmp_path, tuned, file, change, named):
    folder = _spoiled(tuned, tmp_path / "spoiled", file, change)
    with pytest.raises(CheckpointError, match=named):
        merge_lora.merge(merge_lora.Settings(trained=folder, out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "files, named",
    [
        ([base.ADAPTER_WEIGHTS], "adapter_model.safetensors is not there"),
        ([base.ADAPTER_CONFIG], "adapter_config.json cannot be read"),
        (layout.TOKENIZER_FILES, "has no tokenizer"),
    ],
)
def test_the_merge_refuses_a_folder_that_lacks_a_file(tmp_path, tuned, files, named):
    folder = shutil.copytree(tuned, tmp_path / "lacking")
    for name in files:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=named):
        merge_lora.merge(merge_lora.Settings(trained=folder, out=tmp_path / "merged"))


def test_the_base_is_left_out_only_where_a_package_carries_it(tmp_path, tuned):
    with pytest.raises(InvalidInput, match="keep_base needs a base model that a package carries"):
        merge_lora.merge(merge_lora.Settings(trained=tuned, out=tmp_path / "merged", keep_base=True))
    assert not list(tmp_path.iterdir())


def test_lora_of_another_base_model_is_refused_by_name_and_by_shape(tmp_path, tuned):
    other = toy.language_model(tmp_path / "another", hidden_size=48, head_dim=12)
    with pytest.raises(CheckpointError, match="tiny-llama, not on .*another"):
        merge_lora.merge(merge_lora.Settings(trained=tuned, out=tmp_path / "merged", base=other))
    renamed = toy.language_model(tmp_path / "elsewhere" / "tiny-llama", hidden_size=48, head_dim=12)
    with pytest.raises(CheckpointError, match="another .*tiny-llama than .*elsewhere/tiny-llama"):
        merge_lora.merge(merge_lora.Settings(trained=tuned, out=tmp_path / "merged", base=renamed))
    # What was trained before there was a digest is told by its shapes.
    old = shutil.copytree(tuned, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["base_model_digest"]
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit the base model"):
        merge_lora.merge(merge_lora.Settings(trained=old, out=tmp_path / "merged", base=renamed))


def test_a_folder_that_was_not_merged_is_no_checkpoint_and_says_what_to_do(tuned):
    with pytest.raises(CheckpointError, match="merge_lora.py"):
        checkpoint.load_lamed(tuned)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"lora": {"r": 0, "alpha": 8, "dropout": 0}}, "lora.r must be 1 or more"),
        ({"lora": {"r": 4, "alpha": 8, "dropout": 1.5}}, "lora.dropout in 0 to 1"),
        ({"sede": 1}, "sede is unknown; known are out, seed"),
        ({"seed": None}, "seed must be a valid integer, not None"),
        ({"seed": "1"}, "seed must be a valid integer, not '1'"),
        ({"seed": -1}, "seed must not be negative"),
        ({"lora": {"r": 8}}, "lora.alpha is missing"),
        ({"lora": {"r": 8, "alpha": 8, "dropout": 0, "beta": 1}}, "lora.beta is unknown; known are r, alpha, dropout"),
        ({"train": "lm_head"}, "train must be a valid array, not 'lm_head'"),
        ({"out": 3}, "out must be a valid string, not 3"),
        ({"out": ""}, "out must be a path"),
        ({"start": {"language_model": {"package": "x"}}}, "start.language_model.PackagedModel.file is missing"),
        ({"trainer": {"lerning_rate": 1}}, "unknown setting trainer.lerning_rate"),
        ({"trainer": {"learning_rate": "fast"}}, "trainer.learning_rate must be float"),
        ({"trainer": {"max_steps": 1.5}}, "trainer.max_steps must be int"),
        ({"trainer": {"bf16": 1}}, "trainer.bf16 must be bool"),
        ({"trainer": {"fsdp": 1}}, "trainer.fsdp must be str or null or bool"),
        ({"trainer": {"eval_strategy": "steps"}}, "trainer.eval_strategy needs data.m3d.validation"),
        ({"trainer": {"do_eval": True}}, "use `trainer.eval_strategy`"),
        ({"trainer": {"report_to": ["neptune"]}}, "trainer.report_to: neptune is not installed"),
        ({"trainer": {"deepspeed": "nowhere.json"}}, "trainer.deepspeed: nowhere.json cannot be read"),
        (
            {"trainer": {"fsdp": True, "fsdp_config": "nowhere.json"}},
            "trainer.fsdp_config: nowhere.json cannot be read",
        ),
        ({"trainer": {"full_determinism": True}}, "trainer.full_determinism: on CUDA, .*AvgPool3d.*trilinear"),
        ({"trainer": {"seed": 1}}, "use `seed`"),
        ({"trainer": {"save_only_model": True}}, "trainer.save_only_model is set by the stage itself"),
        ({"trainer": {"save_on_each_node": True}}, "trainer.save_on_each_node is set by the stage itself"),
        ({"trainer": {"ignore_data_skip": True}}, "trainer.ignore_data_skip is set by the stage itself"),
        ({"trainer": {"auto_find_batch_size": True}}, "trainer.auto_find_batch_size is set by the stage itself"),
        ({"data": {}}, "data must have either"),
        ({"data": {"m3d": {"root": "x"}}}, "data.m3d.tasks is missing"),
        ({"mask_grid": "patches"}, "mask_grid"),
        ({"answer_weights": "equal"}, "answer_weights"),
        ({"train": ["tower"]}, "train names tower"),
        ({"train": ["added_tokens"]}, "tied embeddings"),
        ({"train": ["added_tokens"], "trainer": {"fsdp": True}}, "train: added_tokens works .* the whole model"),
        ({"max_length": 3}, "max_length 3 leaves no room"),
        ({"max_length": 4096}, "more than the language model's context"),
    ],
)
def test_a_configuration_with_a_wrong_setting_is_refused_by_name(
    tmp_path, data, llm, change, named, monkeypatch, capsys
):
    values = {**toy.finetune_configuration(tmp_path / "run", data, llm), **change}
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(toy.written(values, tmp_path / "c.json"))])
    with pytest.raises(SystemExit) as stopped:
        trainer.main("", finetune.Settings, finetune.train)
    assert stopped.value.code == 2 and re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoint-1").exists()


@pytest.mark.parametrize("given", [True, None, "full_shard auto_wrap"])
def test_fsdp_is_switched_on_as_transformers_wants_it(given):
    check_trainer({"fsdp": given, "fsdp_config": {"version": 2, "reshard_after_forward": True}})


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 2}])
def test_data_that_fill_no_batch_are_refused_before_training(tmp_path, data, encoder, length):
    """Four pairs: incomplete batches are dropped, and all of them would be."""
    values = toy.clip_configuration(tmp_path / "run", data, encoder, per_device_train_batch_size=5, **length)
    with pytest.raises(InvalidInput, match=r"4 samples, fewer than a batch of all processes \(5 x 1\)"):
        run(pretrain_clip, values)
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "run.json").exists()


def test_training_that_stops_early_leaves_no_final(tmp_path, data, encoder, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

    monkeypatch.setattr(trainer._Clock, "on_step_end", stop)
    with pytest.raises(InvalidInput, match="stopped at step 2 of 4"):
        run(pretrain_clip, toy.clip_configuration(tmp_path / "run", data, encoder))
    assert not (tmp_path / "run" / "final").exists() and (tmp_path / "run" / "checkpoint-2").is_dir()


def test_a_finished_stage_is_left_as_it_is(tmp_path, tuned, data, llm, monkeypatch, capsys):
    values = toy.finetune_configuration(tuned.parent, data, llm)
    before = {file: file.stat().st_mtime_ns for file in tuned.parent.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(toy.written(values, tmp_path / "c.json"))])
    trainer.main("", finetune.Settings, finetune.train)
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in tuned.parent.rglob("*")} == before


def called(monkeypatch, capsys, module, values: dict, file: Path) -> str:
    """What a stage's command says."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", str(toy.written(values, file))])
    try:
        module.main() if module is merge_lora else trainer.main("", module.Settings, module.train)
    except SystemExit:
        return capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def chained(tmp_path_factory, data, llm, pretrained_clip) -> tuple[Path, dict]:
    """A finished run that started from a copy of another one's `final`: (that copy, settings)."""
    folder = tmp_path_factory.mktemp("chained")
    tower = shutil.copytree(pretrained_clip, folder / "clip")
    values = {**toy.finetune_configuration(folder / "run", data, llm, max_steps=1), "sample_every": 0}
    values["start"] = {**values["start"], "vision_tower": str(tower)}
    run(finetune, values)
    return tower, values


def change(file: Path) -> None:
    tensors = load_file(file)
    key = sorted(tensors)[0]
    save_file({**tensors, key: tensors[key] + 1}, file)


def test_a_finished_stage_of_other_settings_or_another_start_is_named_and_left(tmp_path, chained, monkeypatch, capsys):
    """And a start that is gone, or another place for the curves, is no other start."""
    tower, values = chained
    final = Path(values["out"]) / "final"
    before = weights(final)
    other = {**values, "max_length": 128}
    assert "max_length: 256 -> 128" in called(monkeypatch, capsys, finetune, other, tmp_path / "c.json")
    sampled = {**values, "sample_every": 7}
    assert "nothing to do" in called(monkeypatch, capsys, finetune, sampled, tmp_path / "c.json")
    kept = shutil.copytree(tower, tmp_path / "kept")
    change(tower / "model.safetensors")
    said = called(monkeypatch, capsys, finetune, values, tmp_path / "c.json")
    assert re.search(r"error: .*\(start.vision_tower/model.safetensors: '\w{64}' -> '\w{64}'\)", said)
    shutil.rmtree(tower)
    assert "nothing to do" in called(monkeypatch, capsys, finetune, values, tmp_path / "c.json")
    shutil.move(kept, tower)
    assert "nothing to do" in called(monkeypatch, capsys, finetune, values, tmp_path / "c.json")
    assert all(torch.equal(value, before[key]) for key, value in weights(final).items())


def test_a_run_does_not_go_on_from_another_start(tmp_path, data, tuned, llm):
    model = Path(shutil.copytree(llm, tmp_path / "tiny-llama"))
    shutil.copytree(tuned.parent, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    values = toy.finetune_configuration(tmp_path / "run", data, str(model))
    file = tmp_path / "run" / "run.json"
    file.write_text(file.read_text().replace(llm, str(model)))
    change(model / "model.safetensors")
    with pytest.raises(InvalidInput, match="start.language_model/model.safetensors"):
        run(finetune, values)


def test_the_record_of_an_older_version_is_compared_by_what_it_holds(tmp_path, chained, monkeypatch, capsys):
    tower, values = chained
    values = {**values, "out": str(shutil.copytree(values["out"], tmp_path / "run"))}
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    assert any(key.startswith("start.vision_tower/") for key in record.pop("started_from"))
    file.write_text(json.dumps(record))
    assert "nothing to do" in called(monkeypatch, capsys, finetune, values, tmp_path / "c.json")
    said = called(monkeypatch, capsys, finetune, {**values, "seed": 9}, tmp_path / "c.json")
    assert "seed: 1 -> 9" in said


def test_a_start_from_the_hub_is_recorded_by_its_commit(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    (refs / "v2").write_text("def")
    settings = {
        "start": {"language_model": "owner/model", "vision_tower": "owner/other", "seg_module": "owner/model/sub@v2"},
        "teacher": None,
    }
    assert started_from(settings) == {"start.language_model/commit": "abc", "start.seg_module/commit": "def"}


def test_a_merged_checkpoint_is_left_as_it_is_until_what_it_was_made_from_changes(tmp_path, tuned, monkeypatch, capsys):
    trained = shutil.copytree(tuned, tmp_path / "final")
    values = {"trained": str(trained), "out": str(tmp_path / "merged"), "dtype": "float32"}
    assert "wrote" in called(monkeypatch, capsys, merge_lora, values, tmp_path / "c.json")
    before = weights(tmp_path / "merged")
    assert "nothing to do" in called(monkeypatch, capsys, merge_lora, values, tmp_path / "c.json")
    other = {**values, "dtype": "float16"}
    assert "dtype: 'float32' -> 'float16'" in called(monkeypatch, capsys, merge_lora, other, tmp_path / "c.json")
    change(trained / base.ADAPTER_WEIGHTS)
    assert "error: " in (said := called(monkeypatch, capsys, merge_lora, values, tmp_path / "c.json"))
    assert "trained/adapter_model.safetensors" in said
    (tmp_path / "merged" / "run.json").unlink()
    assert "does not say what it was made from: nothing to do" in called(
        monkeypatch, capsys, merge_lora, values, tmp_path / "c.json"
    )
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path / "merged").items())


@pytest.mark.parametrize(
    "file",
    sorted(
        {*(ROOT / "training" / "configs").rglob("*.json")} - {*(ROOT / "training" / "configs" / "spread").iterdir()},
        key=str,
    ),
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_every_configuration_in_the_repository_is_whole(file):
    from training import evaluate, pretrain_segvol

    modules = {
        "align_projector": align_projector,
        "finetune": finetune,
        "pretrain_clip": pretrain_clip,
        "merge_lora": merge_lora,
        "pretrain_segvol": pretrain_segvol,
        "refine_segvol": pretrain_segvol,
        "learn_boxes": finetune,
        "evaluate": evaluate,
    }
    settings = read(modules[file.stem.lstrip("12345678_")].Settings, file)
    if hasattr(settings, "trainer"):
        check_trainer(settings.trainer)
