"""Data-parallel workers on one machine: one thread each, gradients averaged, every random number from the seed.

On a CPU, processes of one thread are faster than one process of several threads: nothing spins at barriers.
"""
from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from training.recipe import Stage


def run(processes: int, function: Callable, *args) -> None:
    """function(*args) in each of `processes` new processes, which belong to one gloo group."""
    # Before the children import torch: idle OpenMP threads must sleep, not spin.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (processes, f"file://{folder}/group", function, args), nprocs=processes)


def _worker(rank: int, processes: int, address: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    try:
        function(*args)
    finally:
        if processes > 1:
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def random_source(seed: int, stage: int, step: int) -> np.random.Generator:
    """The generator of one step in this process; torch's own (dropout) is seeded with it."""
    rng = np.random.default_rng([seed, stage, step, rank()])
    torch.manual_seed(int(rng.integers(2 ** 62)))
    return rng


class Optimizer:
    """AdamW with warm-up, cosine decay and clipping to norm 1, on gradients averaged over all processes."""

    def __init__(self, stage: Stage, parameters: Iterable[nn.Parameter]):
        self.stage = stage
        self.parameters = [p for p in parameters if p.requires_grad]
        # Vectors (norms, biases, single embeddings) do not decay.
        groups = [{"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": stage.weight_decay},
                  {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98))

    def learning_rate(self, step: int) -> float:
        warm = max(1, round(self.stage.warmup * self.stage.steps))
        if step < warm:
            return self.stage.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.stage.steps - warm)
        return self.stage.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def step(self, step: int) -> None:
        """One update from the gradients that lie on the parameters; clears them."""
        if dist.is_initialized():
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for p, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
                p.grad = grad.view_as(p)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(step)
        self.adam.step()
        self.adam.zero_grad()


def save_state(path: Path, **state) -> None:
    """Write a resumable state atomically, once (by the first process)."""
    if rank() == 0:
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)
