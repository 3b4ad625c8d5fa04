"""Watches over broken samples while a Trainer runs."""

from __future__ import annotations

import logging

from transformers import TrainerCallback

from training.data.skip_broken import SkipBroken

_log = logging.getLogger(__name__)
_SHOWN = 20


class BrokenSampleCheck(TrainerCallback):
    """Stops a Trainer on too many broken samples, on all ranks at the same step, and sums up at the end."""

    def __init__(self, dataset: SkipBroken):
        self.dataset = dataset

    def on_step_begin(self, args, state, control, **kwargs):
        self.dataset.check()

    on_epoch_end = on_step_begin

    def on_train_end(self, args, state, control, **kwargs):
        entries = self.dataset.report()
        if entries and state.is_world_process_zero:
            _log.warning(
                "left out as broken: %s, all of them in %s, the first:\n%s",
                f"{len(entries):,} sample{'s' * (len(entries) > 1)}",
                self.dataset.record,
                "\n".join(f"  {' and '.join(e.paths)}: {e.cause} ({e.times} times)" for e in entries[:_SHOWN]),
            )
