"""Prompts: how a scan, questions and earlier turns are laid out for a language model, and the boxes in its answers."""

from engine.prompt.boxes import format_box, parse_boxes
from engine.prompt.layout import Layout
from engine.prompt.prompt import Prompt
from engine.prompt.tokens import BOX_END, BOX_START, IMAGE_TOKEN, SEG_TOKEN, SPECIAL_TOKENS
from engine.prompt.turns import Turn

__all__ = [
    "BOX_END",
    "BOX_START",
    "IMAGE_TOKEN",
    "SEG_TOKEN",
    "SPECIAL_TOKENS",
    "Layout",
    "Prompt",
    "Turn",
    "format_box",
    "parse_boxes",
]
