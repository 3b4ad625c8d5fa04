"""Prefill and decode of a 7B with a scan in its prompt, in bf16 by transformers: time and memory on the roofline.

The weights are random and made on the GPU. Decoding is measured as transformers does it, one launch after the other,
and as one CUDA graph a step, which is what vLLM does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import cpu_roofline
from benchmarks.cpu_roofline import Rates, Stage
from deploy.checks import roofline
from deploy.checks.context import Context
from deploy.checks.encoders import row
from deploy.checks.geometry import lamed_config, made, volumes
from deploy.checks.timing import forget, peak_memory, replayed, seconds
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed

BATCHES = (1, 8, 64)
QUESTION = 16  # tokens
ANSWER = 64  # tokens: more than the steps that are timed, warm-up and capture included
DECODED = 16  # steps that are timed, of each kind
PRECISION, DTYPE = "bf16", torch.bfloat16
# A token read from the cache against all of them read at once: the bound of engine/runtime/decoder/seg_state_check.py.
BOUND = 8e-2


class Answering:
    """Some questions about a scan each: prefilled, then decoded a token at a time.

    Everything that a step changes is a tensor that it changes in place, so that a CUDA graph of it can be replayed.

    Args:
        model: M3D-LaMed. prompts: [B, T, H_llm]. length: rows that prompt and answer may have.
    """

    def __init__(self, model: Lamed, prompts: Tensor, length: int):
        from transformers import StaticCache

        batch, self.asked, _ = prompts.shape
        device = prompts.device
        self.llm, self.prompts, self.length = model.llm, prompts, length
        self.cache = StaticCache(config=model.llm.config, max_cache_len=length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.logits = torch.zeros(batch, model.llm.config.vocab_size, dtype=prompts.dtype, device=device)
        self.columns = torch.arange(length, device=device)
        self.position = torch.full((1, 1), self.asked, device=device)

    def prefill(self) -> None:
        """Read the prompts; the first token of each answer is known then."""
        self._took(self._forward(self.prompts, self.columns[None, : self.asked], None))

    @property
    def cache_bytes(self) -> int:
        """What the keys and values of all rows take."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def step(self) -> None:
        """Decode one more token of each answer."""
        mask = (self.columns <= self.position)[None, None].expand(len(self.tokens), 1, 1, self.length)
        embedded = self.llm.get_input_embeddings()(self.tokens)
        self._took(self._forward(embedded, self.position.expand(len(self.tokens), 1), mask))
        self.position.add_(1)

    def _forward(self, rows: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        out = self.llm(
            inputs_embeds=rows,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _took(self, logits: Tensor) -> None:
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))


@torch.inference_mode()
def measure(context: Context) -> Iterator[dict]:
    """Rows of times for 1, 8 and 64 questions, what memory they took, and whether the cache changes the answer."""
    rates = roofline.rates(context)
    config = lamed_config(context.tiny)
    counted = cpu_roofline.stages(
        config, llm=PRECISION, graphs=PRECISION, question_tokens=QUESTION, answer_tokens=ANSWER, at_once=1
    )
    model = made(lambda: Lamed(config), context.device, DTYPE)
    yield _cache_changes_nothing(model, config, context.device)
    for batch in BATCHES:
        try:
            yield from _measured(model, config, batch, context.device, rates, counted)
        except torch.OutOfMemoryError as error:
            yield {"what": "memory", "batch": batch, "not measured": str(error).partition(". ")[0]}
        forget(context.device)


def _measured(
    model: Lamed, config: LamedConfig, batch: int, device: str, rates: Rates, counted: dict[str, Stage]
) -> Iterator[dict]:
    prompts = _prompts(model, config, batch, device)
    prefill, decode, vision = _stages(config, batch, counted)
    length = _rounded_up(prompts.shape[1] + 1 + ANSWER)
    with peak_memory(device) as peak:
        # Each one fills a cache of its own, so that it starts empty.
        prefilled = seconds(lambda: Answering(model, prompts, length).prefill(), device, repeats=3)
        yield row("prefill", prefill, prefilled, rates, batch=batch, peak=peak())
        answering = Answering(model, prompts, length)
        answering.prefill()
        took = seconds(answering.step, device, repeats=DECODED)
        yield row("decode, a token", decode, took, rates, batch=batch, peak=peak())
        try:
            replay = replayed(answering.step, device)
        except RuntimeError as error:
            yield {"what": "decode, a token, CUDA graph", "batch": batch, "not captured": str(error)}
        else:
            took = seconds(replay, device, repeats=DECODED)
            yield row("decode, a token, CUDA graph", decode, took, rates, batch=batch, peak=peak())
            yield {"what": "tokens/s, CUDA graph", "batch": batch, "per s": batch / took}
        planned = sum(p.nbytes for p in model.parameters()) + answering.cache_bytes
        yield {"what": "memory", "batch": batch, "peak GiB": peak(), "weights and cache GiB": planned / 2**30}
    if batch == 1:
        image = volumes(1, config.vision.image_size).to(device, DTYPE)
        encoded = seconds(lambda: model.encode_images(image), device)
        both = Stage("first token", vision.flops + prefill.flops, vision.bytes + prefill.bytes, PRECISION)
        yield row("first token of a new scan", both, encoded + prefilled, rates, batch=1)


def _stages(config: LamedConfig, batch: int, counted: dict[str, Stage]) -> tuple[Stage, Stage, Stage]:
    """Prefill and decode of so many questions, which read the weights once; and the vision encoder for one scan."""
    one, many = counted["prefill"], counted["decode"]
    cache = many.bytes - one.bytes  # what one answer's decoding reads beside the weights
    prefill = Stage("prefill", batch * one.flops, one.bytes, PRECISION)
    decode = Stage("decode", batch * many.flops, one.bytes + batch * cache, PRECISION)
    return prefill, decode, counted["vision_encoder"]


def _prompts(model: Lamed, config: LamedConfig, batch: int, device: str) -> Tensor:
    """BOS, the visual tokens of a scan, and a question; the scans repeat after the eighth, the questions do not."""
    images = volumes(min(batch, 8), config.vision.image_size).to(device, DTYPE)
    visual = model.encode_images(images).repeat(-(-batch // 8), 1, 1)[:batch]
    generator = torch.Generator().manual_seed(batch)
    count = 1 + config.num_visual_tokens + QUESTION
    ids = torch.randint(3, config.llm["vocab_size"] - 4, (batch, count), generator=generator).to(device)
    return model.prompt_embeddings(ids, visual, start=1)


def _cache_changes_nothing(model: Lamed, config: LamedConfig, device: str) -> dict:
    """Logits behind a decoded token, against those of prompt and token read at once."""
    prompts = _prompts(model, config, 2, device)
    answering = Answering(model, prompts, _rounded_up(prompts.shape[1] + 1 + ANSWER))
    answering.prefill()
    rows = torch.cat([prompts, model.llm.get_input_embeddings()(answering.tokens)], dim=1)
    answering.step()
    wanted = model.llm(inputs_embeds=rows, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    error = ((answering.logits.float() - wanted).abs().max() / wanted.abs().max()).item()
    return {"what": "logits with the cache against those without", "error": error, "bound": BOUND, "ok": error <= BOUND}


def _rounded_up(rows: int) -> int:
    """To whole tiles of the attention kernels."""
    return -(-rows // 64) * 64
