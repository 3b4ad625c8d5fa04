"""The prompt of M3D-LaMed: BOS, N image tokens, question; and the boxes in its answers."""

from __future__ import annotations

import re

import numpy as np

from engine.errors import CheckpointError, InvalidInput

IMAGE_TOKEN, BOX_START, BOX_END, SEG_TOKEN = "<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"
# In the order in which training adds them; [SEG] is an ordinary token, so it stays in decoded text.
SPECIAL_TOKENS = (IMAGE_TOKEN, BOX_START, BOX_END)

_NUMBER = r"\s*([0-9]*\.?[0-9]+)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 6) + r"\]")


class Prompt:
    """Turns questions into token ids exactly as the reference tokenises them.

    tokenizer: a transformers tokenizer that adds BOS and knows `<im_patch>`.
    num_visual_tokens: image tokens in a prompt, N. context_length: tokens that prompt and answer share.
    """

    def __init__(self, tokenizer, num_visual_tokens: int, context_length: int):
        self.tokenizer = tokenizer
        self.num_visual_tokens = num_visual_tokens
        self.context_length = context_length
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._image_tokens = IMAGE_TOKEN * num_visual_tokens
        self._prefix = [tokenizer.bos_token_id] + [self.image_token_id] * num_visual_tokens
        if tokenizer(self._image_tokens)["input_ids"][: len(self._prefix)] != self._prefix:
            raise CheckpointError(
                f"the tokenizer does not turn {IMAGE_TOKEN} x {num_visual_tokens} into BOS and as "
                "many image tokens; is it the one that was saved with the checkpoint?"
            )

    def input_ids(self, question: str) -> list[int]:
        """BOS, N image tokens, question: what the reference gives to `generate`.

        The question follows the image tokens as it is; in training, VQA, box and segmentation questions were put behind
        a space and captions were not, so a caller who wants to match that sends the space.
        Raises InvalidInput for a question that is empty or leaves no room for an answer.
        """
        if not question.strip():
            raise InvalidInput("the question is empty: ask something about the scan")
        # No token is longer than a few dozen characters: this bounds the work on hostile input before tokenising it.
        if len(question) > 64 * self.context_length:
            raise InvalidInput(
                f"the question has {len(question)} characters; it must fit a context of "
                f"{self.context_length} tokens beside {self.num_visual_tokens} visual tokens"
            )
        ids = self.tokenizer(self._image_tokens + question)["input_ids"]
        # LLaMA-2's tokenizer may append nothing, but a few fast tokenizers end with EOS: the answer would be empty.
        if ids[-1] == self.tokenizer.eos_token_id and not question.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        if len(ids) >= self.context_length:
            raise InvalidInput(
                f"the question has {len(ids) - len(self._prefix)} tokens; with 1 + {self.num_visual_tokens} tokens "
                f"before it, it may have at most {self.context_length - len(self._prefix) - 1} to leave room for an "
                f"answer (context length {self.context_length}): shorten it"
            )
        return ids

    def question_ids(self, question: str) -> list[int]:
        """The ids behind BOS and the image tokens: what is embedded after the visual tokens."""
        return self.input_ids(question)[len(self._prefix) :]


def parse_boxes(text: str) -> np.ndarray:
    """The boxes written in an answer: float64 [K, 6] as (x1, y1, z1, x2, y2, z2), normalised to the D, H, W axes of the
    model volume in that order. What is not six numbers in 0..1 with lower corners first is no box.
    """
    boxes = np.array([[float(number) for number in found] for found in _BOX.findall(text)], dtype=np.float64)
    boxes = boxes.reshape(-1, 6)
    valid = (boxes <= 1).all(axis=1) & (boxes[:, :3] <= boxes[:, 3:]).all(axis=1)
    return boxes[valid]


def format_box(box) -> str:
    """A normalised box as training writes it: `<bx_start>[x1, y1, z1, x2, y2, z2]<bx_end>`, three decimals."""
    return f"{BOX_START}[{', '.join(f'{value:.3f}' for value in box)}]{BOX_END}"
