"""Questions and conversations about a scan as token ids, within the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.errors import CheckpointError, InvalidInput
from engine.prompt.layout import Layout
from engine.prompt.tokens import IMAGE_TOKEN
from engine.prompt.turns import USER, Turn, checked_turns

Asked = str | Sequence[Turn] | Sequence[tuple[str, str]]
"""A question, or the turns of a conversation that ends with one."""


class Around(NamedTuple):
    """Token ids of a prompt before and behind its visual tokens."""

    head: list[int]
    tail: list[int]


class Prompt:
    """Turns questions into token ids exactly as the model's family was trained on them.

    head: token ids before the visual tokens, the same for all prompts but those with a system turn of their own.
    image_token_id: the token that stands for a visual token. stop_ids: the tokens that end an answer.

    Args:
        layout: of the model's family.
        num_visual_tokens: image tokens in a prompt, N.
        context_length: tokens that prompt and answer share.
        configured: token ids that end an answer, as the checkpoint's settings have them; None where they say nothing.

    Raises:
        CheckpointError: the tokenizer does not fit, or the context has no room for a question.
    """

    def __init__(
        self, layout: Layout, num_visual_tokens: int, context_length: int, configured: Sequence[int] | None = None
    ):
        self.layout = layout
        self.num_visual_tokens = num_visual_tokens
        self.context_length = context_length
        self.stop_ids = layout.stop_ids(configured)
        self.image_token_id = layout.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._images = IMAGE_TOKEN * num_visual_tokens
        ids = layout.encode(self._images, [Turn(USER, "")])
        count = ids.count(self.image_token_id)
        self.head = ids[: ids.index(self.image_token_id)] if count else []
        if count != num_visual_tokens or not self._holds_images(ids, len(self.head)):
            raise CheckpointError(
                f"the tokenizer does not turn {IMAGE_TOKEN} x {num_visual_tokens} into as many image tokens in a row: "
                "is it the one that was saved with the checkpoint?"
            )
        if len(ids) + 2 > context_length:
            raise CheckpointError(
                f"the context of {context_length} tokens has no room for a question: a prompt has {len(ids)} without"
            )

    @property
    def tokenizer(self) -> Any:
        return self.layout.tokenizer

    @property
    def multi_turn(self) -> bool:
        """Whether earlier turns are read. Where they are not, the last question is asked alone."""
        return self.layout.multi_turn

    @property
    def padding_id(self) -> int:
        """The first token of a prompt: it is in all of them, and no answer has it."""
        return (self.head or [self.image_token_id])[0]

    def input_ids(self, asked: Asked) -> list[int]:
        """The whole prompt, visual tokens as image tokens: what the reference gives to `generate`.

        Args:
            asked: a question; or turns (role, text), user and assistant in turn, the last one the user's, before them a
                system turn or none. The scan belongs to the first turn of the user. A family that was trained on single
                questions gets the last one.

        Raises:
            InvalidInput: a text is empty, holds what separates turns, or leaves no room for an answer; turns are out of
                order.
        """
        head, tail = self.around(asked)
        return [*head, *[self.image_token_id] * self.num_visual_tokens, *tail]

    def around(self, asked: Asked) -> Around:
        """The prompt's token ids before and behind the visual tokens. Arguments and errors as for `input_ids`."""
        turns = self._checked(asked)
        what = "question" if len(turns) == 1 else "conversation"
        # No token is longer than a few dozen characters: this bounds the work on hostile input before tokenising it.
        characters = sum(len(turn.text) for turn in turns)
        if characters > 64 * self.context_length:
            raise InvalidInput(
                f"the {what} has {characters} characters; it must fit a context of "
                f"{self.context_length} tokens beside {self.num_visual_tokens} visual tokens"
            )
        ids = self.layout.encode(self._images, turns)
        start = ids.index(self.image_token_id)
        head, tail = ids[:start], ids[start + self.num_visual_tokens :]
        if len(ids) >= self.context_length:
            raise InvalidInput(
                f"the {what} has {len(tail)} tokens; with {len(head)} + {self.num_visual_tokens} tokens before it, it "
                f"may have at most {self.context_length - start - self.num_visual_tokens - 1} to leave room for an "
                f"answer (context length {self.context_length}): shorten it"
            )
        return Around(head, tail)

    def choice_ids(self, asked: Asked, choice: str) -> list[int]:
        """Token ids of a text with which the answer may begin, as they stand behind the prompt in training.

        Args:
            asked: see `input_ids`.
            choice: without spaces around it.

        Raises:
            InvalidInput: the choice holds what separates turns or ends answers, or cannot be told from the question's
                end.
        """
        if held := [token for token in self.layout.reserved if token in choice]:
            raise InvalidInput(f"a choice holds {held[0]}, which separates turns: leave it out")
        ids = self.layout.encode_start(asked if isinstance(asked, str) else asked[-1][1], choice)
        if ends := [token for token in ids if token in self.stop_ids]:
            raise InvalidInput(f"a choice holds {self.tokenizer.decode(ends[:1])}, which ends answers: leave it out")
        return ids

    def answered(self, question: str, answer: str) -> tuple[list[int], int]:
        """What training reads behind the visual tokens: (token ids of question, answer and its end, index of the
        answer's first token). Nothing is checked."""
        ids, start = self.layout.encode_answered(IMAGE_TOKEN, question, answer)
        before = len(self.head) + 1
        return ids[before:], start - before

    def text(self, answer_ids: Sequence[int]) -> str:
        """An answer up to the token that ended it, special tokens included: what training and evaluation compare."""
        ids = list(answer_ids)
        end = next((number for number, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False).strip()

    def _holds_images(self, ids: list[int], start: int) -> bool:
        return ids[start : start + self.num_visual_tokens] == [self.image_token_id] * self.num_visual_tokens

    def _checked(self, asked: Asked) -> list[Turn]:
        turns = [Turn(USER, asked)] if isinstance(asked, str) else checked_turns(asked)
        if not self.multi_turn:
            turns = turns[-1:]
        for turn in turns:
            if not turn.text.strip():
                raise InvalidInput(
                    "the question is empty: ask something about the scan"
                    if turn is turns[-1]
                    else f"a turn of the {turn.role} is empty: leave it out, with its answer"
                )
            if held := [token for token in self.layout.reserved if token in turn.text]:
                raise InvalidInput(f"a turn of the {turn.role} holds {held[0]}, which separates turns: leave it out")
        return turns
