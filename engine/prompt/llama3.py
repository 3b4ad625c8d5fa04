"""Llama-3's chat: a header with the role before every turn, `<|eot_id|>` behind it."""

from __future__ import annotations

from engine.prompt.layout import ChatLayout
from engine.prompt.turns import ASSISTANT


class Llama3Layout(ChatLayout):
    """The template of Meta-Llama-3-8B-Instruct: texts are stripped, and there is no system turn unless one is given."""

    opening = "<|begin_of_text|>"
    turn_end = "<|eot_id|>"
    text_end = "<|end_of_text|>"
    further = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")

    def write_turn(self, role: str, text: str) -> str:
        return f"{self._header(role)}{text.strip()}{self.turn_end}"

    def begin_answer(self) -> str:
        return self._header(ASSISTANT)

    def _header(self, role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
