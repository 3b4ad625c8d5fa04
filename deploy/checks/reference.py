"""The PyTorch modules against the numbers that were recorded from the reference implementation, in each precision.

tests/fixtures/README.md describes the recordings. An error is the largest difference as a share of the largest value.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploy.checks.context import Context
from deploy.checks.fixtures import Case
from deploy.checks.timing import DTYPES, exact_fp32, use_tf32
from engine.models.checkpoint import load_clip, load_lamed
from engine.seg_states import merged

# fp32: the absolute tolerances of tests/fixtures/README.md. The subtlest mistake that it names costs three times as
# much.
FEATURES, STEP_LOGITS, CLIP = 2e-5, 5e-5, 1e-6
VOXELS = 3
IMAGE_START = 1  # of the image tokens in the recorded prompts, behind BOS
# Others: largest error as a share of the largest value, of an encoder or projector, and behind the language model or
# the mask decoder. Seen on a CPU: bf16 0.015 and 0.036, fp16 0.0023 and 0.0054. TF32 has fp16's fraction.
BOUNDS = {"bf16": (0.04, 0.1), "fp16": (0.005, 0.015), "tf32": (0.005, 0.015)}
BEHIND = ("step_", "seg_low_res", "seg_logits")


def compare(context: Context) -> Iterator[dict]:
    """Rows {"precision", "what", "error", "bound", "ok"}: a row for each output of each part, in each precision."""
    exact_fp32()
    # A CPU has no TF32, and makes products of fp16 one value at a time.
    precisions = ("fp32", "tf32", "bf16", "fp16") if context.device == "cuda" else ("fp32", "bf16")
    with tempfile.TemporaryDirectory() as folder:
        lamed, clip = (Case.write(name, Path(folder)) for name in ("dev_small", "dev_clip"))
        for precision in precisions:
            use_tf32(precision == "tf32")
            dtype = DTYPES.get(precision, torch.float32)
            model, _ = load_lamed(lamed.folder, dtype)
            model.to(context.device)
            for value in lamed_values(lamed, model, context.device, dtype):
                yield _row(precision, value)
            yield from _answer(precision, lamed, model, context.device, dtype)
            clip_model, _ = load_clip(clip.folder, dtype)
            clip_model.to(context.device)
            for value in clip_values(clip, clip_model, context.device, dtype):
                yield _row(precision, value)


def bound(precision: str, value: Value) -> float:
    """The largest error allowed, as a share of the largest value."""
    if precision == "fp32":
        return value.tolerance / value.largest
    return BOUNDS[precision][value.what.startswith(BEHIND)]


def _row(precision: str, value: Value) -> dict:
    most = bound(precision, value)
    return {
        "precision": precision,
        "what": value.what,
        "error": value.error,
        "bound": most,
        "ok": bool(value.error <= most),
    }


def _answer(precision: str, case: Case, model, device: str, dtype: torch.dtype) -> Iterator[dict]:
    """The greedy answer and its mask. Beyond fp32 they inform: two tokens may be closer than the rounding."""
    asked = torch.tensor([case.spec["input_ids"]], device=device)
    ids, _, logits = model.generate(
        case.volume.to(device, dtype), asked, IMAGE_START, max_new_tokens=case.spec["generate"]["max_new_tokens"]
    )
    said, wanted = ids.tolist(), case.spec["output_ids"]
    same = next((n for n, (a, b) in enumerate(zip(said, wanted)) if a != b), min(len(said), len(wanted)))
    yield {
        "precision": precision,
        "what": "tokens of the answer",
        "found": f"{same} of {len(wanted)} before the first other one",
        **({"ok": said == wanted} if precision == "fp32" else {}),
    }
    positive, recorded = 0 if logits is None else int((logits > 0).sum()), int(case.expected["seg_positive"])
    yield {
        "precision": precision,
        "what": "voxels of the mask",
        "found": f"{positive:,}, recorded {recorded:,}",
        **({"ok": abs(positive - recorded) <= VOXELS} if precision == "fp32" else {}),
    }


@dataclass(frozen=True)
class Value:
    """A computed value beside the recorded one. tolerance: largest difference allowed in fp32."""

    what: str
    found: np.ndarray
    expected: np.ndarray
    tolerance: float

    @property
    def largest(self) -> float:
        return float(np.abs(self.expected).max())

    @property
    def error(self) -> float:
        """The largest difference as a share of the largest value; NaN where a value is."""
        return float(np.abs(self.found.astype(np.float64) - self.expected).max()) / self.largest


@torch.inference_mode()
def lamed_values(case: Case, model, device: str, dtype: torch.dtype) -> Iterator[Value]:
    """Every part of M3D-LaMed on the recorded scan, question and answer, each step of the answer included."""
    volume, expected = case.volume.to(device, dtype), case.expected
    visual = model.encode_images(volume)
    for name, tokens in (
        ("vision", model.vision_tower(volume)),
        ("proj", visual),
        ("seg_image", model.seg_module.image_encoder(volume)),
    ):
        x = _numpy(tokens[0])
        n, c = x.shape
        yield Value(f"{name}_first", x[:4, :16], expected[f"{name}_first"], FEATURES)
        yield Value(f"{name}_grid", x[:: max(1, n // 16), :: max(1, c // 16)], expected[f"{name}_grid"], FEATURES)
    asked, said = (torch.tensor([case.spec[key]], device=device) for key in ("input_ids", "output_ids"))
    answered = model.llm.get_input_embeddings()(said[:, :-1])
    rows = torch.cat([model.prompt_embeddings(asked, visual, IMAGE_START), answered], dim=1)
    states = model.llm.model(inputs_embeds=rows).last_hidden_state[0, asked.shape[1] - 1 :]
    yield Value("step_hidden", _numpy(states), expected["step_hidden"], FEATURES)
    yield Value("step_logits", _numpy(model.llm.lm_head(states)), expected["step_logits"], STEP_LOGITS)
    state = merged(states[case.spec["seg_positions"]])[None]
    prompt, features = model.seg_projector(state), model.seg_module.encode(volume)
    yield Value("seg_prompt", _numpy(prompt), expected["seg_prompt"], FEATURES)
    low_res = _numpy(model.seg_module.decode_low_res(features, prompt)[0, 0])
    yield Value("seg_low_res", low_res[::2, ::4, ::4], expected["seg_low_res"], FEATURES)
    logits = _numpy(model.segment(features, state)[0, 0])
    yield Value("seg_logits", logits[::4, ::16, ::16], expected["seg_logits"], FEATURES)
    yield Value("seg_logits_mid", logits[len(logits) // 2, ::2, ::2], expected["seg_logits_mid"], FEATURES)


@torch.inference_mode()
def clip_values(case: Case, model, device: str, dtype: torch.dtype) -> Iterator[Value]:
    """Every output of M3D-CLIP on the recorded scans and texts."""
    volume, expected = case.volume.to(device, dtype), case.expected
    ids, mask = (torch.tensor(case.spec[key], device=device) for key in ("input_ids", "attention_mask"))
    image, text = model.encode_image(volume), model.encode_text(ids, mask)
    n, width = image.shape[1:]
    for name, value in (
        ("image_cls", image[:, 0, :32]),
        ("image_grid", image[:, :: max(1, n // 16), :: max(1, width // 16)]),
        ("text_all", text[:, :, :: text.shape[2] // 32]),
        ("logits_per_image", model.logits_per_image(volume, ids, mask)),
    ):
        yield Value(f"clip {name}", _numpy(value), expected[name], CLIP)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
