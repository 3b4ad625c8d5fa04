"""Pretrain M3D-CLIP on pairs of a scan and its report: the start of the vision tower, and the model of retrieval.

    python training/pretrain_clip.py training/configs/paper/pretrain_clip.json
    torchrun --nproc-per-node 8 training/pretrain_clip.py training/configs/paper/pretrain_clip.json

`final` is a checkpoint in the published layout, which `engine.models.checkpoint.load_clip` reads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import InvalidInput
from engine.models.checkpoint import TEXT_ENCODER
from engine.models.clip import M3DClip
from engine.models.config import BERT_POSITIONS, ClipConfig, ViTConfig
from training import trainer
from training.config import StageSettings, as_json
from training.data.reports import ShortReports
from training.data.sample import Sample
from training.data.selection import images_of, open_held_out, open_pairs, shown
from training.files import write_json
from training.losses import contrastive_loss
from training.starting_points import PackageFiles, begin_encoders, check_shapes, load_vision_tower, open_text_encoder
from training.validation import RetrievalValidation

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """text_encoder: a BERT, as folder, Hugging Face id or files of a package. train_text_encoder: else it stays as it
    is, and that of a package is left out of the checkpoint, which names it. vision_tower: a ViT to start from.
    max_text_len: most tokens of a text to read, at most the text encoder's positions; 512 as the reference trains. Of a
    longer text, sentences are drawn (see `training.data.reports`).
    """

    text_encoder: str | PackageFiles
    train_text_encoder: bool = True
    vision: ViTConfig = ViTConfig(image_size=(32, 256, 256), patch_size=(4, 16, 16))
    vision_tower: str | None = None
    max_text_len: int = BERT_POSITIONS


class ContrastiveClip(trainer.StageModel):
    """M3D-CLIP with the gathered contrastive loss."""

    def __init__(self, clip: M3DClip, config: dict, tokenizer):
        super().__init__()
        self.clip, self.published_config, self.tokenizer = clip, config, tokenizer
        # Only CLS of the last layer is compared, which the pooler comes after.
        clip.language_encoder.pooler.requires_grad_(False)
        self.shown: list[Sample] = []

    def train(self, mode: bool = True) -> ContrastiveClip:
        """A text encoder that is not trained has no dropout either."""
        super().train(mode)
        if not any(p.requires_grad for p in self.clip.language_encoder.parameters()):
            self.clip.language_encoder.eval()
        return self

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, kept: Tensor, totals: dict[str, Tensor]
    ) -> dict:
        image = self.clip.encode_image(images)[:, 0].float()
        text = self.clip.encode_text(input_ids, attention_mask)[:, 0].float()
        with torch.autocast(images.device.type, enabled=False):
            pairs = contrastive_loss(image, text, self.clip.logit_scale, kept)
        # `totals` counts the pairs of the whole step, over this process' share of it.
        loss = pairs * kept.sum() / totals["pairs"]
        return {"loss": loss, "parts": trainer.Exact(contrastive=loss.detach())}

    def collate(self, samples: list[Sample | None]) -> dict:
        # Every process must bring as many rows: a broken sample keeps its place, and counts as not there.
        kept = torch.tensor([s is not None for s in samples])
        shape = next((s.image.shape for s in samples if s), (1, *self.clip.config.vision.image_size))
        gap = Sample(np.zeros(shape, np.float32), "", "", None, False, "caption", "")
        samples = [s or gap for s in samples]
        texts = self.tokenizer(
            [s.answer for s in samples],
            padding=True,
            truncation=True,
            return_tensors="pt",
            max_length=self.published_config["max_text_len"],
        )
        return {
            "images": images_of(samples),
            "input_ids": texts["input_ids"],
            "kept": kept,
            "attention_mask": texts["attention_mask"],
            "totals": {"pairs": kept.sum().float()},
        }

    def count_tokens(self, text: str) -> int:
        """Of a text, those at its beginning and end included."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        clip = {key: value.contiguous() for key, value in self._own(state, "clip.").items()}
        save_file(clip, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", self.published_config)
        if "text_encoder" not in self.published_config:
            self.tokenizer.save_pretrained(folder)

    def restore(self, folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        check_shapes("M3D-CLIP of this configuration", str(folder), found, self._own(self.clip.state_dict()))
        self.clip.load_state_dict(found, strict=False)

    def _own(self, state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """What a checkpoint holds, without `prefix`: everything but a package's text encoder."""
        own = {key.removeprefix(prefix): value for key, value in state.items()}
        packaged = "text_encoder" in self.published_config
        return {key: value for key, value in own.items() if not (packaged and key.startswith(TEXT_ENCODER))}

    def predictions(self) -> list[trainer.Prediction]:
        batch = self.collate(self.shown)
        device = self.clip.logit_scale.device
        inputs = (batch[key].to(device) for key in ("images", "input_ids", "attention_mask"))
        logits = self.clip.logits_per_image(*inputs)
        found = []
        for sample, row in zip(self.shown, logits):
            best = self.shown[int(row.argmax())].answer
            text = f"**{sample.source}** {'right' if best == sample.answer else 'wrong'}: {best}"
            found.append(trainer.Prediction(text))
        return found


def build(settings: Settings) -> ContrastiveClip:
    """The model before its first step."""
    tokenizer, bert = open_text_encoder(settings.text_encoder)
    positions = bert.config.max_position_embeddings
    if settings.max_text_len > positions:
        raise InvalidInput(
            f"max_text_len {settings.max_text_len} is more than the text encoder's {positions} positions"
        )
    vision = settings.vision
    config = {
        "architectures": ["M3DCLIP"],
        "model_type": "m3d_clip",
        "img_size": list(vision.image_size),
        "patch_size": list(vision.patch_size),
        "in_channels": vision.in_channels,
        "pos_embed": "perceptron",
        "hidden_size": vision.hidden_size,
        "mlp_dim": vision.mlp_dim,
        "num_layers": vision.num_layers,
        "num_heads": vision.num_heads,
        "max_text_len": settings.max_text_len,
        "vocab_size": bert.config.vocab_size,
        "bert_config": {
            key: value
            for key, value in bert.config.to_diff_dict().items()
            if key not in ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype")
        },
    }
    clip = M3DClip(ClipConfig.from_dict(config))
    clip.language_encoder.load_state_dict(bert.state_dict())
    if not settings.train_text_encoder:
        clip.language_encoder.requires_grad_(False)
        if isinstance(settings.text_encoder, PackageFiles):
            config["text_encoder"] = as_json(settings.text_encoder)
    begin_encoders(clip.vision_encoder)
    if settings.vision_tower:
        load_vision_tower(clip.vision_encoder, settings.vision_tower)
    return ContrastiveClip(clip, config, tokenizer)


def train(settings: Settings) -> Path:
    size = settings.vision.image_size
    whole, held_out = open_pairs(settings, size), open_held_out(settings, size)
    trainer.check_amount(len(whole), settings)
    model = build(settings)
    pairs = ShortReports(whole, settings.max_text_len, model.count_tokens, settings.seed)
    model.shown = shown(pairs, _SHOWN) if settings.sample_every else []
    return trainer.fit(model, settings, pairs, model.collate, held_out and RetrievalValidation(held_out))


if __name__ == "__main__":
    trainer.main(__doc__.splitlines()[0], Settings, train)
