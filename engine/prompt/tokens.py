"""The tokens that M3D-LaMed adds to a language model's vocabulary."""

from __future__ import annotations

IMAGE_TOKEN, BOX_START, BOX_END, SEG_TOKEN = "<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"
# In the order in which training adds them; [SEG] is an ordinary token, so it stays in decoded text.
SPECIAL_TOKENS = (IMAGE_TOKEN, BOX_START, BOX_END)
