"""The prompts of the published M3D-LaMed checkpoints, on LLaMA and on Phi-3: BOS, image tokens, question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import CheckpointError, InvalidInput, shortened
from engine.prompt.layout import Layout
from engine.prompt.tokens import IMAGE_TOKEN
from engine.prompt.turns import Turn


class PlainLayout(Layout):
    """As the reference tokenises them: the tokenizer puts BOS before the text, and there is no chat template.

    The question follows the image tokens as it is. In training, VQA, box and segmentation questions were put behind a
    space and captions were not, so a caller who wants to match that sends the space.
    Source: the reference's data sets (LaMed/src/dataset/multi_dataset.py), which train on one question each.
    """

    multi_turn = False

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        bos, image = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if bos is None or tokenizer(IMAGE_TOKEN)["input_ids"][:2] != [bos, image]:
            raise CheckpointError(
                f"the tokenizer does not put BOS before {IMAGE_TOKEN}, as prompts without a chat template need it: is "
                "it the one that was saved with the checkpoint?"
            )

    @classmethod
    def prepare(cls, tokenizer: Any) -> None:
        """Put BOS before every text. Raises CheckpointError for a tokenizer without BOS."""
        bos = tokenizer.bos_token_id
        if bos is None:
            raise CheckpointError(
                "the tokenizer has no BOS token, which stands before the visual tokens where there is no chat template"
            )
        if tokenizer(IMAGE_TOKEN)["input_ids"][:1] != [bos]:
            from tokenizers.processors import TemplateProcessing

            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
            )

    def encode(self, images: str, turns: Sequence[Turn]) -> list[int]:
        return self._encode(images + turns[-1].text)

    def encode_start(self, question: str, text: str) -> list[int]:
        asked, whole = self._encode(IMAGE_TOKEN + question), self._encode(self._answered(IMAGE_TOKEN, question, text))
        if whole[: len(asked)] != asked:
            raise InvalidInput(
                f"the answer {shortened(text)} and the question's end share a token, so that it has no likelihood of "
                "its own: end the question with a word or a question mark"
            )
        return whole[len(asked) :]

    def encode_answered(self, images: str, question: str, answer: str) -> tuple[list[int], int]:
        whole = self._encode(self._answered(images, question, answer))
        return [*whole, self.tokenizer.eos_token_id], len(self._encode(images + question))

    def stop_ids(self, configured: Sequence[int] | None) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        return tuple(configured if configured is not None else [] if eos is None else [eos])

    def _answered(self, images: str, question: str, answer: str) -> str:
        """In one piece, joined by a space, as the reference does."""
        return f"{images}{question} {answer}"

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text)["input_ids"]
        # LLaMA-2's tokenizer may append nothing, but a few fast tokenizers end with EOS: the answer would be empty.
        if ids[-1] == self.tokenizer.eos_token_id and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids
