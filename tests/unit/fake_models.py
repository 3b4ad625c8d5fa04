"""Stand-ins for the compute models: what they answer is simple, and they count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from engine.manifest import Manifest

SIZE = (4, 8, 8)
WIDTH = 6


def manifest(**changes) -> Manifest:
    return Manifest(
        **{
            **dict(
                checkpoint="tiny",
                checkpoint_sha256="0",
                target="cpu",
                precision="fp32",
                image_size=SIZE,
                patch_size=(2, 4, 4),
                family="lamed_llama",
                num_visual_tokens=8,
                llm_width=WIDTH,
                vocab_size=10,
                context_length=64,
                image_token_id=3,
                seg_token_id=4,
                eos_token_ids=(2,),
                models=("study", "m3d_segment", "m3d_retrieve"),
                graphs={},
                versions={},
                clip_text_length=5,
                clip_image_size=SIZE,
            ),
            **changes,
        }
    )


class FakeModels:
    """`infer` for the runtime. calls: how often each model ran; batches: the inputs of every call."""

    def __init__(self):
        self.calls = Counter()
        self.batches = []
        self.tokens = lambda image: np.full((8, WIDTH), image.mean(), np.float32)

    def __call__(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls[model] += 1
        self.batches.append((model, inputs))
        return getattr(self, model)(**{str(name): batch for name, batch in inputs.items()})

    def vision_encoder(self, IMAGE):
        return {"VISUAL_TOKENS": np.stack([self.tokens(image) for image in IMAGE])}

    def segmentation_encoder(self, IMAGE):
        return {"FEATURES": IMAGE}

    def segmentation_head(self, FEATURES, SEG_STATE):
        """Positive where the image is brighter than the state's first number."""
        return {"MASK_LOGITS": 1000 * (FEATURES - SEG_STATE[:, 0, None, None, None, None])}

    def clip_image_encoder(self, IMAGE):
        return {"IMAGE_EMBEDDING": np.eye(WIDTH, dtype=np.float32)[: len(IMAGE)]}

    def clip_text_encoder(self, INPUT_IDS, ATTENTION_MASK):
        """The first unit vector for texts of one token besides the two special ones, else the second."""
        return {"TEXT_EMBEDDING": np.eye(WIDTH, dtype=np.float32)[np.minimum(ATTENTION_MASK.sum(1) - 3, 1)]}
