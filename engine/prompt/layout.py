"""What a layout decides: how image tokens, turns and answers become token ids, and which tokens end an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from engine.errors import CheckpointError
from engine.prompt.tokens import IMAGE_TOKEN
from engine.prompt.turns import USER, Turn


class Layout(ABC):
    """How a language model's prompts are laid out; one subclass a model family.

    multi_turn: whether the family was trained on earlier turns. Where it was not, `encode` gets the last question
    alone.

    Args:
        tokenizer: a fast transformers tokenizer with M3D-LaMed's tokens.

    Raises:
        CheckpointError: the tokenizer lacks a token of the layout.
    """

    multi_turn: ClassVar[bool]

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        if tokenizer.backend_tokenizer.token_to_id(IMAGE_TOKEN) is None:
            raise CheckpointError(
                f"the tokenizer does not know {IMAGE_TOKEN}, so prompts have no image tokens: is it the one that was "
                "saved with the checkpoint?"
            )

    @property
    def reserved(self) -> tuple[str, ...]:
        """Texts that a turn must not hold, as they separate turns or stand for the scan."""
        return ()

    @classmethod
    def prepare(cls, tokenizer: Any) -> None:
        """Change a language model's own tokenizer, before training, as far as the layout needs it."""
        return

    @abstractmethod
    def encode(self, images: str, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a prompt, up to where the answer begins.

        Args:
            images: the image tokens as text. They stand in the first turn of the user, before its text.
            turns: checked, see `Prompt`; the last one is the user's.
        """

    @abstractmethod
    def encode_start(self, question: str, text: str) -> list[int]:
        """Token ids of a text with which an answer begins, as they stand behind the prompt in training.

        Args:
            question: the last turn of the prompt.
            text: without spaces around it.

        Raises:
            InvalidInput: the text's first token would be one with the question's last.
        """

    @abstractmethod
    def encode_answered(self, images: str, question: str, answer: str) -> tuple[list[int], int]:
        """What training reads: (token ids of prompt, answer and the end of the answer, index of the answer's first)."""

    @abstractmethod
    def stop_ids(self, configured: Sequence[int] | None) -> tuple[int, ...]:
        """The token ids that end an answer.

        Args:
            configured: those that the checkpoint's generation_config.json or config.json names; None where neither
                does.
        """


class ChatLayout(Layout):
    """A chat template with special tokens around every turn. The prompt is written as text and tokenised once, which is
    what transformers' `apply_chat_template` does. The checkpoint's own template is not run.

    opening: before the first turn. turn_end: the token that ends a turn. text_end: the token that ends a text without
    turns, which ends an answer, too. further: other tokens of the template.
    """

    multi_turn = True
    opening: ClassVar[str] = ""
    turn_end: ClassVar[str]
    text_end: ClassVar[str]
    further: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self._ids = {token: tokenizer.backend_tokenizer.token_to_id(token) for token in self.reserved}
        if missing := [token for token, token_id in self._ids.items() if self._tokenise(token) != [token_id]]:
            raise CheckpointError(
                f"the tokenizer does not know {', '.join(missing)}, which {type(self).__name__} puts into prompts: is "
                "it the one that was saved with the checkpoint, and is config.json's model_type right?"
            )

    @property
    def reserved(self) -> tuple[str, ...]:
        return (self.turn_end, self.text_end, *self.further, IMAGE_TOKEN)

    @abstractmethod
    def write_turn(self, role: str, text: str) -> str:
        """A whole turn, with its end."""

    @abstractmethod
    def begin_answer(self) -> str:
        """What stands before an answer."""

    def add_default(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns, with what the template puts before them where there is no system turn."""
        return turns

    def encode(self, images: str, turns: Sequence[Turn]) -> list[int]:
        turns = self.add_default(turns)
        first = next(number for number, turn in enumerate(turns) if turn.role == USER)
        written = [
            self.write_turn(turn.role, images + turn.text if number == first else turn.text)
            for number, turn in enumerate(turns)
        ]
        return self._tokenise("".join([self.opening, *written, self.begin_answer()]))

    def encode_start(self, question: str, text: str) -> list[int]:
        return self._tokenise(text)

    def encode_answered(self, images: str, question: str, answer: str) -> tuple[list[int], int]:
        # The answer is tokenised alone: the prompt's ids are then exactly those that are asked with later.
        asked = self.encode(images, [Turn(USER, question)])
        return [*asked, *self.encode_start(question, answer), self._ids[self.turn_end]], len(asked)

    def stop_ids(self, configured: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(dict.fromkeys([self._ids[self.turn_end], self._ids[self.text_end], *(configured or ())]))

    def _tokenise(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
