"""What a user would do today: the same weights in eager PyTorch, one request at a time, everything from the start.

As the published script does: `encode_images`, transformers' `generate` on `inputs_embeds`, then SegVol; M3D-CLIP for a
ranking. Nothing is kept between questions. Scans are read and masks are put back by the engine's own functions, so that
the sides differ in serving only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from benchmarks import machine
from benchmarks.scans import BenchmarkScan
from benchmarks.timings import Timing
from engine.models.answering import answer
from engine.models.checkpoint import load_clip, load_lamed
from engine.scan import pack_scan, read_scan
from engine.volume import prepare


class Baseline:
    """One loaded model in eager PyTorch, with M3D-CLIP if asked. precision: of all parts, a key of machine.DTYPES."""

    def __init__(self, checkpoint: str, precision: str, clip_checkpoint: str | None = None):
        self.precision = precision
        self.dtype = machine.DTYPES[precision]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, tokenizer = load_lamed(checkpoint, self.dtype)
        self.model.to(self.device)
        config = self.model.config
        self.prompt = config.prompt(tokenizer)
        self.clip = None
        if clip_checkpoint:
            self.clip, folder = load_clip(clip_checkpoint, self.dtype)
            self.clip.to(self.device)
            self.clip_tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def ask(self, scan: BenchmarkScan, question: str, tokens: int) -> Timing:
        clock = _Clock()
        image, _ = self._image(scan)
        clock.note("prepare")
        ids = self._ids(question)
        embeds = self.model.prompt_embeddings(ids, self.model.encode_images(image), len(self.prompt.head))
        clock.note("encode")
        stops = list(self.prompt.stop_ids)
        said = answer(self.model.llm, embeds, tokens, states=False, eos_token_id=stops, streamer=clock).ids
        return clock.sample(said.shape[1], embeds.shape[1])

    @torch.inference_mode()
    def segment(self, scan: BenchmarkScan, question: str, tokens: int) -> tuple[Timing, np.ndarray | None]:
        """Also the mask in the scan's own space, None if the answer has no `[SEG]`."""
        clock = _Clock()
        image, geometry = self._image(scan)
        clock.note("prepare")
        ids = self._ids(question)
        said, _, logits = self.model.generate(
            image, ids, len(self.prompt.head), max_new_tokens=tokens, eos_token_id=list(self.prompt.stop_ids)
        )
        mask = None
        if logits is not None:
            mask = geometry.mask_to_scan(torch.sigmoid(logits[0, 0].float()).cpu().numpy())
        return clock.sample(len(said), ids.shape[1]), mask

    @torch.inference_mode()
    def rank(self, scan: BenchmarkScan, texts: Sequence[str]) -> tuple[Timing, list[float]]:
        """Also the scores, one for each text."""
        started = time.perf_counter()
        image, _ = self._image(scan)
        tokens = self.clip_tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.clip.config.text_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        (scores,) = self.clip.logits_per_image(image, tokens["input_ids"], tokens["attention_mask"]).tolist()
        return Timing(time.perf_counter() - started), scores

    def _image(self, scan: BenchmarkScan):
        data, affine = pack_scan(scan.array, scan.affine)
        prepared = prepare(read_scan(data, affine=affine), self.model.config.vision.image_size)
        return torch.from_numpy(prepared.image)[None].to(self.device, self.dtype), prepared.geometry

    def _ids(self, question: str) -> torch.Tensor:
        return torch.tensor([self.prompt.input_ids(question)], device=self.device)


class _Clock(BaseStreamer):
    """Notes when the first token comes. `generate` puts the prompt first, then each token."""

    def __init__(self):
        self.started = self.last = time.perf_counter()
        self.parts: dict[str, float] = {}
        self.puts = 0
        self.first_s: float | None = None

    def note(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part], self.last = now - self.last, now

    def put(self, value) -> None:
        self.puts += 1
        if self.puts == 2:
            self.first_s = time.perf_counter() - self.started

    def end(self) -> None:
        pass

    def sample(self, tokens: int, prompt_tokens: int) -> Timing:
        return Timing(time.perf_counter() - self.started, self.first_s, tokens, prompt_tokens, self.parts)
