"""Vision encoder, SegVol's encoder and head, and M3D-CLIP at the published size: time against the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from benchmarks import cpu_roofline
from benchmarks.cpu_roofline import ITEMSIZE, Rates, Stage
from deploy.checks import order, roofline
from deploy.checks.context import Context
from deploy.checks.geometry import clip_config, lamed_config, made, volumes
from deploy.checks.timing import DTYPES, exact_fp32, forget, peak_memory, replayed, seconds
from engine.models.clip import M3DClip
from engine.models.config import ViTConfig
from engine.models.lamed import Lamed

BATCHES = (1, 8)
# A CPU makes products of fp16 one value at a time.
PRECISIONS = {"cuda": ("bf16", "fp16", "fp32"), "cpu": ("bf16", "fp32")}
# Other sums for another batch: the largest difference allowed, as a share of the largest value.
BATCH_BOUNDS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}


@dataclass(frozen=True)
class Part:
    """A part of a model: what it computes from a batch of each of its inputs, and how many weights it reads."""

    name: str
    run: Callable[..., Tensor]
    inputs: Callable[[int], tuple[Tensor, ...]]
    weights: int

    def stage(self, batch: int, precision: str) -> Stage:
        """Its work, counted on the device meta."""
        given = self.inputs(batch)
        with torch.inference_mode():
            work = cpu_roofline.flops(lambda: self.run(*given))
        read = self.weights * ITEMSIZE[precision] + sum(x.nbytes for x in given)
        return Stage(self.name, work, read, precision)


@torch.inference_mode()
def measure(context: Context) -> Iterator[dict]:
    """Rows of times for batches of 1 and 8 in each precision, and rows that say whether volumes were mixed up."""
    exact_fp32()
    rates = roofline.rates(context)
    for precision in PRECISIONS[context.device]:
        dtype = DTYPES[precision]
        stages = {part.name: part for part in _parts(context.tiny, "meta", dtype)}
        for part in _parts(context.tiny, context.device, dtype):
            for batch in BATCHES:
                yield _timed(part, stages[part.name].stage(batch, precision), batch, context.device, rates)
            if part.name in ("vision encoder", "mask encoder"):
                yield from _not_mixed_up(part, precision, context, rates, stages[part.name])
            forget(context.device)


def _parts(tiny: bool, device: str, dtype: torch.dtype) -> Iterator[Part]:
    """The parts in turn; a model is made when its first part is asked for."""
    config = lamed_config(tiny)
    lamed = made(lambda: Lamed(config, with_llm=False), device, dtype)
    seg = cast(ViTConfig, config.segmentation)

    def image(batch: int) -> tuple[Tensor]:
        if device == "meta":
            return (torch.empty(batch, 1, *config.vision.image_size, device="meta", dtype=dtype),)
        return (volumes(batch, config.vision.image_size).to(device, dtype),)

    def features(batch: int) -> tuple[Tensor, Tensor]:
        sizes = (batch, seg.hidden_size, *seg.grid), (batch, config.llm_width)
        one, other = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
        return one, other

    whole, encoder = lamed.seg_module, lamed.seg_module.image_encoder
    yield Part(
        "vision encoder", lamed.encode_images, image, cpu_roofline.weights(lamed.vision_tower, lamed.mm_projector)
    )
    yield Part("mask encoder", whole.encode, image, cpu_roofline.weights(encoder))
    head = cpu_roofline.weights(whole, lamed.seg_projector) - cpu_roofline.weights(encoder)
    yield Part("mask head", lamed.segment, features, head)
    clip = made(lambda: M3DClip(clip_config(tiny)), device, dtype)

    def text(batch: int) -> tuple[Tensor, Tensor]:
        ids = torch.ones(batch, clip.config.text_length, device=device, dtype=torch.long)
        return ids, torch.ones(batch, 1, 1, clip.config.text_length, device=device, dtype=torch.bool)

    yield Part("CLIP, scans", clip.encode_image, image, cpu_roofline.weights(clip.vision_encoder, clip.mm_vision_proj))
    yield Part(
        "CLIP, texts", clip.encode_text, text, cpu_roofline.weights(clip.language_encoder, clip.mm_language_proj)
    )


def _timed(part: Part, stage: Stage, batch: int, device: str, rates: Rates) -> dict:
    given = part.inputs(batch)
    with peak_memory(device) as peak:
        took = seconds(lambda: part.run(*given), device)
        return row(part.name, stage, took, rates, batch=batch, peak=peak())


def row(what: str, stage: Stage, took: float, rates: Rates, *, batch: int, peak: float | str = "") -> dict:
    """A measured time beside the least one."""
    least = stage.seconds(rates)
    return {
        "what": what,
        "precision": stage.precision,
        "batch": batch,
        "ms": 1e3 * took,
        "least ms": 1e3 * least,
        "of the roofline": f"{least / took:.0%}",
        "bound by": stage.bound(rates),
        "peak GiB": peak,
    }


def _not_mixed_up(part: Part, precision: str, context: Context, rates: Rates, counted: Part) -> Iterator[dict]:
    """Eight different volumes: alone, as a batch, and one after the other through one CUDA graph."""
    (images,) = part.inputs(max(BATCHES))
    own = [_numpy(part.run(image[None]))[0] for image in images]
    limit = BATCH_BOUNDS[precision]
    named = {"precision": precision}
    batch = order.as_a_batch(_numpy(part.run(images)), own, limit)
    yield {**batch, **named, "what": f"{part.name}, {batch['what']}"}
    # The graph reads its input and writes its result where they were when it was captured.
    given, result = images[:1].clone(), part.run(images[:1])

    def run() -> None:
        result.copy_(part.run(given))

    try:
        replay = replayed(run, context.device)
    except RuntimeError as error:
        yield {"what": f"{part.name}, CUDA graph", **named, "not captured": str(error)}
        return
    stage = counted.stage(1, precision)
    yield row(f"{part.name}, CUDA graph", stage, seconds(replay, context.device), rates, batch=1)

    def through_the_graph(number: int) -> np.ndarray:
        given.copy_(images[number : number + 1])
        replay()
        return _numpy(result)[0]

    found = order.in_a_row(through_the_graph, own, limit)
    yield {**found, **named, "what": f"{part.name}, CUDA graph, {found['what']}"}


def _numpy(tensor: Tensor) -> np.ndarray:
    """A copy, which stays as it is when the tensor is written to."""
    return np.array(tensor.float().cpu())
