"""Qwen2.5's chat: `<|im_start|>` and the role before every turn, `<|im_end|>` behind it, no BOS."""

from __future__ import annotations

from collections.abc import Sequence

from engine.prompt.layout import ChatLayout
from engine.prompt.turns import ASSISTANT, SYSTEM, Turn

# What the published template says where no system turn is given.
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Qwen2Layout(ChatLayout):
    """The template of Qwen2.5-Instruct, without tools."""

    turn_end = "<|im_end|>"
    text_end = "<|endoftext|>"
    further = ("<|im_start|>",)

    def write_turn(self, role: str, text: str) -> str:
        return f"<|im_start|>{role}\n{text}{self.turn_end}\n"

    def begin_answer(self) -> str:
        return f"<|im_start|>{ASSISTANT}\n"

    def add_default(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        return turns if turns[0].role == SYSTEM else [Turn(SYSTEM, DEFAULT_SYSTEM), *turns]
