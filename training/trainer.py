"""What all stages share: transformers' Trainer with exact resume, atomic checkpoints, curves a loss and run records.

A stage hands over a model (`StageModel`), a data set and a collator. One process, several GPUs, DeepSpeed and FSDP are
TrainingArguments in the configuration; several processes are started by `torchrun` or `accelerate launch`.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, save_fsdp_optimizer
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from engine.cli import console
from engine.errors import CheckpointError, InvalidInput
from training import record
from training.config import TENSORBOARD, StageSettings, as_json, boards_of, check_trainer, read, training_arguments
from training.files import place

FINAL = "final"
_STAGING = ".writing"


class StageData(Protocol):
    """A map-style data set: `data[epoch, index]` depends on nothing but the seed it was made with, epoch and index.

    It may have `callbacks`, which join the trainer's.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, place: tuple[int, int]): ...

    def fingerprint(self) -> dict[str, str]:
        """Name -> hash of everything that decides the samples, for the run's record."""


class Exact(UserDict):
    """Tensors by name that pass a model's boundary as they are: FSDP rounds those that it finds to the computing type.

    It looks into dicts, dataclasses, lists and tuples, and this is none of them.
    """


class Prediction(NamedTuple):
    """text: Markdown. picture: uint8 [rows, columns, 3], if there is something to see."""

    text: str
    picture: np.ndarray | None = None


class StageModel(nn.Module):
    """A model in training. Its forward takes a collated batch and `totals`, and returns {"loss": what is minimised,
    "parts": every part of it by name, detached}; each part is a sum over the batch divided by its total, in float32.

    A batch is a dict of tensors with, under "totals", a dict from the name of each part to how much of it the batch
    holds (float tensor []): answers, masks, pairs. The trainer adds these up over processes and accumulated batches, so
    that a loss never depends on how a batch is spread.
    """

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write everything that was trained, and what the next stage needs with it, from a whole state dict."""
        raise NotImplementedError

    def restore(self, folder: Path) -> None:
        """Read back, strictly and exactly, what `write` wrote."""
        raise NotImplementedError

    def predictions(self) -> list[Prediction]:
        """What the model now says about a few samples."""
        raise NotImplementedError

    def keeps(self, name: str) -> bool:
        """Whether `write` needs a parameter: not one that is frozen and read again from where it came from."""
        return True

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Strict about what a checkpoint keeps: DeepSpeed's has nothing of what is frozen."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in found.missing_keys if name not in frozen]
        if strict and (missing or found.unexpected_keys):
            raise CheckpointError(
                f"the state of another model: {len(missing)} parts are missing and {len(found.unexpected_keys)} are "
                f"unknown, for example {[*missing, *found.unexpected_keys][0]}"
            )
        return found


class Validation(Protocol):
    """Measures a model while it trains."""

    def __call__(self, trainer: StageTrainer) -> dict[str, float]:
        """Figures by name, over all processes; all of them call it."""


class EpochSampler(Sampler):
    """(epoch, index) of every sample, in an order that depends on seed and epoch alone."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(_seed_of(self.seed, epoch))
        return ((epoch, index) for index in torch.randperm(self.length, generator=generator).tolist())


class _Clock(TrainerCallback):
    """Tells the sampler its epoch, and seeds each step by itself: a resumed run draws what a whole one does."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.steps_summed = state.global_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.epoch = int(state.epoch)

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(_seed_of(args.seed, state.global_step, args.process_index))


class _Board(TrainerCallback):
    """TensorBoard: every scalar that is logged. A resumed run continues the curves.

    Sample predictions go there, and to Weights & Biases where curves go there."""

    def __init__(self, trainer: StageTrainer, boards: list[str], sample_every: int):
        self.trainer, self.boards, self.sample_every, self.writer = trainer, boards, sample_every, None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and TENSORBOARD in self.boards:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run logged after its last checkpoint is logged again.
            self.writer = SummaryWriter(
                str(Path(args.output_dir) / "tensorboard"),
                purge_step=state.global_step + 1 if state.global_step else None,
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.writer:
            for name, value in (logs or {}).items():
                if isinstance(value, (int, float)):
                    group, name = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
                    self.writer.add_scalar(f"{group}/{name}", value, state.global_step)
            self.writer.flush()

    def on_step_end(self, args, state, control, **kwargs):
        due = self.sample_every and (state.global_step % self.sample_every == 0 or state.global_step == state.max_steps)
        if due and self.boards and state.is_world_process_zero and not self.trainer.sharded:
            model = self.trainer.model.eval()
            with torch.no_grad(), self.trainer.accelerator.autocast():
                self._show(model.predictions(), state.global_step)

    def _show(self, predictions: list[Prediction], step: int) -> None:
        if self.writer:
            self.writer.add_text("samples", "\n\n".join(text for text, _ in predictions), step)
            for number, (_, picture) in enumerate(predictions):
                if picture is not None:
                    self.writer.add_image(f"samples/{number}", picture, step, dataformats="HWC")
            self.writer.flush()
        if "wandb" in self.boards:
            import wandb

            shown = [wandb.Image(picture, caption=text) for text, picture in predictions if picture is not None]
            texts = wandb.Table(columns=["prediction"], data=[[text] for text, _ in predictions])
            wandb.log({"samples": shown, "answers": texts, "train/global_step": step})

    def on_train_end(self, args, state, control, **kwargs):
        if self.writer:
            self.writer.close()


class StageTrainer(Trainer):
    """Trainer whose losses are exact over processes and accumulation, and whose checkpoints appear whole or not at all.

    `checkpoint-N` holds what `StageModel.write` writes, in full precision, and optimizer, schedule and random states.
    """

    def __init__(
        self,
        model: StageModel,
        settings: StageSettings,
        data: StageData,
        collate: Callable,
        arguments,
        validation: Validation | None = None,
    ):
        super().__init__(
            model=model, args=arguments, train_dataset=data, data_collator=collate, eval_dataset=validation
        )
        self.model_accepts_loss_kwargs = True
        self.sampler = EpochSampler(len(data), settings.seed)
        self._sums: dict[str, Tensor] = {}
        self.steps_summed = 0
        self._staging: Path | None = None
        for callback in (_Clock(self), *getattr(data, "callbacks", ())):
            self.add_callback(callback)
        self.add_callback(_Board(self, boards_of(settings.trainer), settings.sample_every))

    @property
    def sharded(self) -> bool:
        """Whether no process has the whole model: then none can answer by itself."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or plugin is not None and plugin.zero_stage == 3

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return self.sampler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Batches of one step, and the total of each part of the loss, divided by the number of processes (which will
        average their gradients)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        names = sorted(batches[0]["totals"])
        sums = torch.stack([sum(batch["totals"][name] for batch in batches) for name in names]).to(device)
        sums = self.accelerator.reduce(sums, reduction="sum")
        # A part that no process has anything of costs nothing, whatever it is divided by.
        sums = torch.where(sums > 0, sums, torch.ones_like(sums)) / self.accelerator.num_processes
        return batches, Exact(zip(names, sums))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "totals": num_items_in_batch} if num_items_in_batch is not None else inputs
        losses = model(**inputs)
        for name, value in losses["parts"].items():
            # Tensors: reading a number here would let the device wait between forward and backward.
            self._sums[name] = self._sums.get(name, 0) + value.float()
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """What `validation` measures. It draws nothing, so a run ends as it would have without it."""
        self.model.eval()
        with torch.no_grad():
            found = {f"{metric_key_prefix}_{name}": value for name, value in self.eval_dataset(self).items()}
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # a forward pass alone leaves its weights whole
                module.reshard()
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:
            steps = max(1, self.state.global_step - self.steps_summed)
            names = sorted(self._sums)
            means = torch.stack([self._sums[name] / steps for name in names]).to(self.args.device)
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= {f"loss_{name}": value for name, value in zip(names, means.tolist())}
            self._sums.clear()
            self.steps_summed = self.state.global_step
        super().log(logs, start_time)

    # Checkpoints are written beside their place and moved there when every process is done.
    def _get_output_dir(self, trial) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        out, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = out / _STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staging, self._staging = self._staging, None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            place(staging / name, out / name)
            staging.rmdir()
            rotate_checkpoints(output_dir=str(out), save_total_limit=self.args.save_total_limit, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).write(folder, state_dict or self.model.state_dict())

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        state = self._gathered_state()
        if self.args.should_save:
            self._save(output_dir, state)

    def _gathered_state(self) -> dict[str, Tensor]:
        """What `write` needs, whole, and what is trained in float32: DeepSpeed's model holds bf16. All processes call
        it."""
        state = {name: _whole(buffer) for name, buffer in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            if self.model.keeps(name):
                state[name] = _of_deepspeed(parameter) if self.is_deepspeed_enabled else _whole(parameter)
        return state

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of DeepSpeed and FSDP nothing that is frozen, and no second copy of what `write` writes where it can be read
        back."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        hooks = [module.register_load_state_dict_pre_hook(_spread) for module in self.model.modules()]
        self.model.restore(Path(resume_from_checkpoint))
        for hook in hooks:
            hook.remove()

    def save_final(self, unwrapped: bool = False) -> None:
        """Write what the stage is for: `final`, whole or not at all. unwrapped: the model was never put into shards."""
        out = Path(self.args.output_dir)
        staging = out / _STAGING
        if not unwrapped:
            self.save_model(str(staging), _internal_call=True)
        elif self.args.should_save:
            self._save(str(staging))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            place(staging, out / FINAL)
        self.accelerator.wait_for_everyone()


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU, of all processes' pieces under FSDP."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _spread(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest) -> None:
    """Whole tensors that a module is to load become what FSDP holds of them, each process' piece."""
    for name, parameter in module.named_parameters(prefix.rstrip("."), recurse=False):
        if name in state and isinstance(parameter, DTensor):
            whole = state[name].to(parameter.device, parameter.dtype)
            state[name] = distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def _of_deepspeed(parameter: nn.Parameter) -> Tensor:
    """A parameter on the CPU: what is trained from the optimizer, in float32."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).cpu()
    with GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


def fit(
    model: StageModel,
    settings: StageSettings,
    data: StageData,
    collate: Callable,
    validation: Validation | None = None,
) -> Path:
    """Train, or go on from the last whole checkpoint in `settings.out`; returns its `final`."""
    arguments = training_arguments(settings)
    trainer = StageTrainer(model, settings, data, collate, arguments, validation)
    out = settings.out
    if arguments.process_index == 0:
        out.mkdir(parents=True, exist_ok=True)
        record.begin(out, _stage(settings), as_json(settings), data.fingerprint(), arguments.world_size)
        # What a kill left behind.
        shutil.rmtree(out / _STAGING, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    whole = _seen_by_all(sort_checkpoints(output_dir=str(out)))
    state = TrainerState.load_from_json(Path(whole[-1]) / TRAINER_STATE_NAME) if whole else None
    # A run that was killed between its last checkpoint and `final`; the Trainer would take one step more.
    finished = state is not None and state.global_step >= state.max_steps
    if finished:
        model.restore(Path(whole[-1]))
    else:
        trainer.train(resume_from_checkpoint=whole[-1] if whole else None)
        if trainer.state.global_step < trainer.state.max_steps:
            raise InvalidInput(
                f"training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: "
                f"{out / FINAL} is not written"
            )
    trainer.save_final(unwrapped=finished)
    if arguments.process_index == 0:
        record.end(out)
    return out / FINAL


def _seen_by_all(checkpoints: list[str]) -> list[str]:
    """The first process' checkpoints: on several machines, some that resume and some that begin would wait for ever.

    Raises InvalidInput where this machine does not have the last one.
    """
    broadcast_object_list(checkpoints := [checkpoints])
    (found,) = checkpoints
    if found and not Path(found[-1]).is_dir():
        raise InvalidInput(
            f"{found[-1]}, from which the first process goes on, is not on this machine: `out` must be a folder that "
            "all machines share"
        )
    return found


def check_amount(samples: int, settings: StageSettings) -> None:
    """Raise InvalidInput where the data make no step: incomplete batches are dropped. Called before a model loads."""
    own = settings.trainer.get("per_device_train_batch_size", record.USUAL_BATCH)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if settings.trainer.get("dataloader_drop_last", True) and samples < own * processes:
        raise InvalidInput(
            f"the data have {samples:,} samples, fewer than a batch of all processes ({own} x {processes}): make "
            "trainer.per_device_train_batch_size smaller"
        )


def main(description: str, cls: type[StageSettings], train: Callable[[StageSettings], None]) -> None:
    """The command of a stage: one configuration file; a finished stage is left as it is, if it is what is asked for."""
    parser = console.ArgumentParser(description=description)
    parser.add_argument("configuration", type=Path, help="a JSON file, e.g. from training/configs")
    path = parser.parse_args().configuration
    if status := console.run(lambda: _run_stage(path, cls, train)):
        sys.exit(status)


def _run_stage(path: Path, cls, train) -> None:
    try:
        settings = read(cls, path)
        if (settings.out / FINAL).is_dir():
            record.check(settings.out, _stage(settings), as_json(settings))
            print(f"{settings.out / FINAL} is already there: nothing to do (remove {settings.out} to train again)")
            return
        check_trainer(settings.trainer)
        torch.manual_seed(settings.seed)
        train(settings)
    finally:
        if torch.distributed.is_initialized():
            # The model, which is part of cycles, holds the group, too: a thread of it that outlived this and let go of
            # its last tensor while the interpreter ends would abort a process that has done its work.
            gc.collect()
            torch.distributed.destroy_process_group()


def _stage(settings: StageSettings) -> str:
    # Not the module's name: that is __main__ for a command.
    return Path(sys.modules[type(settings).__module__].__file__).stem


def _seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
