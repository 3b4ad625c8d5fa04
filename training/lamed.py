"""M3D-LaMed in training: LoRA on its language model, losses on text and masks, and what is written of it.

What is written is a folder that holds everything that was trained on top of a base language model (see
`engine.models.base`): config.json with `base_model`; model.safetensors with our parts under their published keys and
the trained embeddings; LoRA as peft writes it; the tokenizer. `training/merge_lora.py` makes a whole checkpoint of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.errors import CheckpointError, InvalidInput
from engine.models import base
from engine.models.answering import answer
from engine.models.checkpoint import PARTS, read_config, resolve
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed
from engine.models.language_model import FAMILIES, causal_lm, families_on
from engine.seg_states import merged
from training.data.sample import Sample
from training.files import write_json
from training.losses import language_loss, mask_loss
from training.pictures import picture
from training.starting_points import (
    ADDED_TOKENS,
    BASE_DIGEST,
    EMBEDDINGS,
    HEAD,
    LanguageModel,
    PackagedModel,
    begin_encoders,
    check_added_rows,
    check_shapes,
    digest,
    load_projector,
    load_segvol,
    load_vision_tower,
    open_language_model,
    open_part,
    prepare_tokenizer,
    read_adapter,
)
from training.trainer import Exact, Prediction, StageModel

# What may be trained beside LoRA; `added_tokens` are the rows of the added tokens alone, the rest of the table frozen.
TRAINABLE = ("vision_tower", "mm_projector", "embeddings", "lm_head", "added_tokens", "seg_module", "seg_projector")
# Parts of SegVol that a text prompt never reaches: they load and are written, but have no gradient.
UNREACHED = (
    "prompt_encoder.point_embeddings",
    "prompt_encoder.not_a_point_embed",
    "prompt_encoder.mask_downscaling",
    "mask_decoder.iou_prediction_head",
    *(f"mask_decoder.output_hypernetworks_mlps.{k}" for k in (1, 2, 3)),
)
_OWN_KEYS = {
    "image_size",
    "patch_size",
    "image_channel",
    "vision_config",
    "seg_config",
    "mm_hidden_size",
    "proj_layer_type",
    "proj_layer_num",
    "proj_pooling_type",
    "proj_pooling_size",
    "segmentation_module",
    "max_position_embeddings",
    "model_type",
}


@dataclass(frozen=True)
class Start:
    """Where the model starts from.

    language_model: a folder, Hugging Face id or package; an M3D-LaMed checkpoint brings its other parts along.
    model: config.json's keys for our parts, where the language model is no M3D-LaMed; its `model_type` chooses a
    family, and so the prompts, where the language model may have several (docs/language_models.md). vision_tower,
    mm_projector, seg_module: files or checkpoints (see `starting_points`), else what the language model brought, else
    random. lora: `final` of an earlier finetune that is gone on with: its LoRA, embeddings and everything else that it
    trained, but for the parts named above. dtype: of the frozen language model, float32 or bfloat16.
    """

    language_model: str | PackagedModel
    model: dict | None = None
    vision_tower: str | None = None
    mm_projector: str | None = None
    seg_module: str | None = None
    lora: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Lora:
    """LoRA on every linear layer of the language model (not its head)."""

    r: int
    alpha: int
    dropout: float


@dataclass(frozen=True)
class LossWeights:
    """Of Dice + BCE, and of the distance between a `[SEG]` prompt and its teacher's, beside the language loss."""

    mask: float = 1.0
    prompt: float = 0.0


class Reply(NamedTuple):
    """An answer. mask: bool [D, H, W] of its `[SEG]`, None without one."""

    text: str
    mask: np.ndarray | None = None


class GrownEmbedding(nn.Module):
    """A frozen embedding table [V, H] with trained rows for the tokens added behind it."""

    def __init__(self, table: nn.Embedding, count: int):
        super().__init__()
        self.table = table.requires_grad_(False)
        rows = table.weight.detach().float()
        self.added = nn.Parameter(rows.mean(0) + 0.5 * rows.std(0) * torch.randn(count, rows.shape[1]))

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        added = ids - self.table.num_embeddings
        own = self.added[added.clamp(min=0)]
        known = self.table(ids.clamp(max=self.table.num_embeddings - 1)).to(own.dtype)
        return torch.where((added >= 0)[..., None], own, known)


class GrownHead(nn.Module):
    """The output layer tied to a GrownEmbedding."""

    def __init__(self, embedding: GrownEmbedding):
        super().__init__()
        # A list hides the module: its parameters belong to the embedding.
        self._embedding = [embedding]

    def forward(self, hidden: Tensor) -> Tensor:
        table, added = self._embedding[0].table.weight, self._embedding[0].added
        return torch.cat([hidden @ table.T.to(hidden.dtype), hidden @ added.T.to(hidden.dtype)], dim=-1)


class TrainedLamed(StageModel):
    """M3D-LaMed with the losses of its stages.

    lora: None trains no part of the language model's layers. train: of TRAINABLE.
    """

    def __init__(
        self,
        start: Start,
        train: tuple[str, ...],
        lora: Lora | None = None,
        weights: LossWeights = LossWeights(),
        segmentation: bool = True,
    ):
        super().__init__()
        _check_train(train)
        if start.dtype not in ("float32", "bfloat16"):
            raise InvalidInput(f"start.dtype {start.dtype!r} is not known; known: float32, bfloat16")
        source = open_language_model(start.language_model)
        self.start, self.weights, self.train_parts = start, weights, train
        family = _family(source, start)
        self.tokenizer = prepare_tokenizer(source, FAMILIES[family].layout)
        self.added_ids = self.tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
        self.config_json = _config_json(source, start, family, self.tokenizer, segmentation, "added_tokens" in train)
        self.tokenizer.model_max_length = self.config_json["max_position_embeddings"]
        parts = LamedConfig.from_dict(self.config_json)
        if parts.segmentation is None and {"seg_module", "seg_projector"} & set(train):
            raise InvalidInput("train names seg_module or seg_projector, but this model has no segmentation")
        self.lamed = Lamed(parts, with_llm=False)
        self.prompt = parts.prompt(self.tokenizer)
        self._load_language_model(source, "added_tokens" in train, getattr(torch, start.dtype))
        self._load_parts(source, start)
        self.requires_grad_(False)
        self.lora = lora
        if lora:
            self._inject(lora)
        if start.lora:
            self._go_on_with(Path(start.lora), source)
        self._choose_trained(train)
        self.shown: list[Sample] = []
        self.teacher: Callable[[Tensor], Tensor] | None = None

    # --- building ---------------------------------------------------------------------------------------------------
    def _load_language_model(self, source: LanguageModel, rows_only: bool, dtype: torch.dtype) -> None:
        config, state = self.config_json, dict(source.state)
        # Without memory: random weights of 7B would cost each process minutes and 27 GB, only to be replaced.
        with torch.device("meta"):
            llm = causal_lm(self.lamed.config.llm)
        if len(set(getattr(llm.config, "layer_types", None) or ["all alike"])) > 1:
            raise CheckpointError(
                f"{source.name}: some layers look back over a window and some over everything; packed questions are "
                "trained where all layers are alike (set use_sliding_window to false in its config.json)"
            )
        rows, tied = config["vocab_size"], config.get("tie_word_embeddings", False)
        if tied:
            state.pop(HEAD, None)
        # The reference begins the added tokens' rows with the mean of the others, in the input and in the output. Some
        # base models have spare rows, of which the added tokens take the first.
        for key in (EMBEDDINGS, HEAD):
            if key in state and not source.lamed and not rows_only:
                old, ids = state[key], self.added_ids
                others = old[[k for k in range(min(len(old), max(ids) + 1)) if k not in ids]]
                mean = others.float().mean(0).to(old.dtype)
                state[key] = torch.cat([old, mean.expand(rows - len(old), -1)])
                state[key][ids] = mean
        if rows_only:
            known = len(state[EMBEDDINGS])
            with torch.device("meta"):
                llm.model.embed_tokens = nn.Embedding(known, config["hidden_size"])
        expected = {key: value for key, value in llm.state_dict().items() if not (tied and key == HEAD)}
        check_shapes("language model that its config.json describes", source.name, state, expected)
        for key in state:
            # One at a time, so that not all of them are there in two types. The embeddings may be written to.
            state[key] = state[key].to(dtype, copy=key in (EMBEDDINGS, HEAD))
            if key != EMBEDDINGS:  # what is checked of the source later
                source.state.pop(key, None)
        llm.load_state_dict(state, strict=False, assign=True)
        if tied:
            llm.lm_head.weight = llm.model.embed_tokens.weight
        # Computed, not stored, and in float32 whatever the weights are in.
        llm.model.rotary_emb = type(llm.model.rotary_emb)(llm.config)
        left = [name for name, value in (*llm.named_parameters(), *llm.named_buffers()) if value.is_meta]
        if left:
            raise CheckpointError(f"{source.name} has no value for {', '.join(left[:4])}")
        if rows_only:
            llm.model.embed_tokens = GrownEmbedding(llm.model.embed_tokens, rows - known)
            llm.lm_head = GrownHead(llm.model.embed_tokens)
        self.lamed.llm = llm

    def _load_parts(self, source: LanguageModel, start: Start) -> None:
        lamed = self.lamed
        encoders = [lamed.vision_tower.vision_tower] + ([lamed.seg_module.image_encoder] if lamed.seg_module else [])
        begin_encoders(*encoders)
        if source.lamed:
            for published, own in PARTS.items():
                module = getattr(lamed, own[:-1])
                found = {
                    key.removeprefix(published): value
                    for key, value in source.parts.items()
                    if key.startswith(published)
                }
                # A checkpoint without segmentation learns it here.
                if module is not None and (found or own != "seg_module." and own != "seg_projector."):
                    check_shapes(own[:-1], source.name, found, module.state_dict())
                    module.load_state_dict(found)
        if start.vision_tower:
            load_vision_tower(lamed.vision_tower.vision_tower, start.vision_tower)
        if start.seg_module:
            if lamed.seg_module is None:
                raise InvalidInput("start.seg_module is given, but this model has no segmentation")
            load_segvol(lamed.seg_module, start.seg_module)
        if start.mm_projector:
            embeddings = load_projector(lamed.mm_projector, start.mm_projector)
            if embeddings is not None:
                self._take_embeddings(embeddings, start.mm_projector)

    def _take_embeddings(self, rows: Tensor, source: str) -> None:
        table, config = self.lamed.llm.model.embed_tokens, self.config_json
        check_added_rows(rows, (config["vocab_size"], config["hidden_size"]), len(self.added_ids), source)
        whole = len(rows) == config["vocab_size"]
        with torch.no_grad():
            if isinstance(table, GrownEmbedding):
                table.added.copy_(rows[self.added_ids] if whole else rows)
            else:
                table.weight[slice(None) if whole else self.added_ids] = rows.to(table.weight.dtype)

    def _inject(self, lora: Lora) -> None:
        if lora.r < 1 or not 0 <= lora.dropout < 1:
            raise InvalidInput(f"lora.r must be 1 or more and lora.dropout in 0 to 1, not {lora.r} and {lora.dropout}")
        llm = self.lamed.llm
        targets = sorted(
            {name.rpartition(".")[2] for name, module in llm.model.named_modules() if isinstance(module, nn.Linear)}
        )
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            bias="none",
            target_modules=targets,
            exclude_modules=["lm_head"],
        )
        inject_adapter_in_model(config, llm)
        for name, parameter in llm.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    def _go_on_with(self, folder: Path, source: LanguageModel) -> None:
        settings, lora = read_adapter(folder, source), self.lora
        if not lora or (lora.r, lora.alpha) != (settings.get("r"), settings.get("lora_alpha")):
            raise InvalidInput(
                f"start.lora {folder} has r {settings.get('r')} and alpha {settings.get('lora_alpha')}; "
                f"it can be trained on with the same only, not with {lora}"
            )
        other = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if settings.get(key)]
        if other:
            raise InvalidInput(f"start.lora {folder} has {', '.join(other)}, which is not trained here")
        found = self._trained_in(folder)
        if broken := sorted(key for key, value in found.items() if not torch.isfinite(value).all()):
            raise CheckpointError(f"start.lora {folder}: values that are not finite in {', '.join(broken[:4])}")
        # A part may come from elsewhere, and one that this model has not may stay behind, as may one that it adds.
        given = [f"{part}." for part in ("vision_tower", "mm_projector", "seg_module") if getattr(self.start, part)]
        expected = self._written()
        both = {
            prefix
            for prefix in PARTS.values()
            if prefix not in given and all(any(key.startswith(prefix) for key in keys) for keys in (found, expected))
        }
        found, expected = (
            {key: value for key, value in keys.items() if key.startswith(("llm.", *both))} for keys in (found, expected)
        )
        check_shapes("model", str(folder), found, expected)
        self.lamed.load_state_dict(found, strict=False)

    def _choose_trained(self, train: tuple[str, ...]) -> None:
        lamed, llm = self.lamed, self.lamed.llm
        modules = {
            "vision_tower": lamed.vision_tower,
            "mm_projector": lamed.mm_projector,
            "embeddings": llm.model.embed_tokens,
            "lm_head": llm.lm_head,
            "seg_module": lamed.seg_module,
            "seg_projector": lamed.seg_projector,
        }
        for name in train:
            if name == "added_tokens":
                llm.model.embed_tokens.added.requires_grad_(True)
            else:
                modules[name].float().requires_grad_(True)
        if lamed.seg_module is not None:
            for name, parameter in lamed.seg_module.named_parameters():
                if name.startswith(UNREACHED):
                    parameter.requires_grad_(False)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.lamed.llm.gradient_checkpointing_enable(**kwargs)

    # --- losses -----------------------------------------------------------------------------------------------------
    def forward(self, images: Tensor, totals: dict[str, Tensor], **batch: Tensor) -> dict:
        """images: [B, 1, D, H, W]; the rest as `packing.Packer` collates it."""
        lamed, llm = self.lamed, self.lamed.llm
        hidden = self.hidden(
            lamed.encode_images(images), **{key: batch.get(key) for key in ("head", "ids", "positions", "mask")}
        )
        logits = llm.lm_head(hidden[batch["answer_rows"], batch["answer_columns"]])
        parts = {"language": language_loss(logits, batch["answers"], batch["answer_weights"], totals["language"])}
        loss = parts["language"]
        if not self.training:
            right = (logits.argmax(-1) == batch["answers"]) * batch["answer_weights"]
            parts["token_accuracy"] = right.float().sum() / totals["language"]
        if "masks" in batch:
            masks, prompt = self._segment(images, hidden, batch, totals)
            parts["mask"], loss = masks, loss + self.weights.mask * masks
            if self.teacher is not None:
                parts["prompt"], loss = prompt, loss + self.weights.prompt * prompt
        return {"loss": loss, "parts": Exact({name: value.detach() for name, value in parts.items()})}

    def hidden(
        self, visual_BNH: Tensor, head: Tensor, ids: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Final hidden states [B, K + N + L, H] after the last norm: `head` [B, K], visual tokens, `ids` [B, L].

        mask: [B, K + N + L, K + N + L], True where a row may attend to a column; None: causal.
        """
        llm = self.lamed.llm
        begin, rest = (llm.get_input_embeddings()(part) for part in (head, ids))
        embeddings = torch.cat([begin, visual_BNH.to(begin.dtype), rest], dim=1)
        window = getattr(llm.config, "sliding_window", None)
        if mask is not None and window is not None:  # transformers takes a mask as it is
            mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
        with disable_input_dtype_casting(llm):
            return llm.model(
                inputs_embeds=embeddings,
                attention_mask=None if mask is None else mask[:, None],
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state

    def _segment(self, images: Tensor, hidden: Tensor, batch: dict, totals: dict) -> tuple[Tensor, Tensor]:
        """Mask loss and prompt loss. Without any mask in the batch they are 0, but everything is run all the same: all
        processes must reach the same parameters."""
        lamed, owners = self.lamed, batch["state_owner"]
        none = len(batch["masks"]) == 0
        if none:
            states = hidden[:1, -1]
        else:
            # Several [SEG] in one answer: the mean of their states makes one prompt.
            found = hidden[batch["state_rows"], batch["state_columns"]].float()
            counts = torch.bincount(owners)[:, None]
            sums = found.new_zeros(len(counts), found.shape[1]).index_add(0, owners, found)
            states = (sums / counts).to(hidden.dtype)
        # In the weights' own type: DeepSpeed holds them all in bf16, without autocast.
        prompts = lamed.seg_projector(states)
        target = batch["masks"] if not none else images.new_zeros(1, *batch["masks"].shape[1:])
        rows = batch["mask_rows"] if not none else batch["mask_rows"].new_zeros(1)
        scans, which = rows.unique(return_inverse=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "seg_module" in self.train_parts):
            features = lamed.seg_module.encode(images[scans])
        whole = target.shape[1:] == images.shape[2:]
        decode = lamed.seg_module.decode if whole else lamed.seg_module.decode_low_res
        # The decoder's attention has 6 queries: the plain kernel is faster there than the fused one.
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION] if images.is_cuda else SDPBackend.MATH):
            logits = decode(features[which], prompts[: len(target)])[:, 0]
        masks = mask_loss(logits, target) * len(target) / totals["mask"]
        prompt = prompts.new_zeros((), dtype=torch.float32)
        if self.teacher is not None and not none:
            taught = batch["taught"]
            known = taught >= 0
            wanted = self.teacher(taught.clamp(min=0)).float()
            prompt = (F.mse_loss(prompts.float(), wanted, reduction="none").mean(1) * known).sum() / totals["prompt"]
        return (masks * 0, prompts.float().sum() * 0) if none else (masks, prompt)

    # --- samples, files ---------------------------------------------------------------------------------------------
    def answer(self, sample: Sample, new_tokens: int = 128) -> Reply:
        """What the model now answers, greedily."""
        lamed, llm, prompt = self.lamed, self.lamed.llm, self.prompt
        tower = next(lamed.vision_tower.parameters())
        image = torch.from_numpy(np.ascontiguousarray(sample.image))[None].to(tower.device, tower.dtype)
        ids = torch.tensor([prompt.input_ids((" " if sample.space else "") + sample.question)], device=tower.device)
        wanted = llm.get_input_embeddings()(ids[:, :1]).dtype
        embeds = lamed.prompt_embeddings(ids, lamed.encode_images(image).to(wanted), len(prompt.head))
        with disable_input_dtype_casting(llm):
            found = answer(
                llm,
                embeds,
                new_tokens,
                states=lamed.seg_module is not None,
                eos_token_id=list(prompt.stop_ids),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        text, segments = prompt.text(found.ids[0].tolist()), found.ids[0] == self.config_json["seg_token_id"]
        if lamed.seg_module is None or not segments.any():
            return Reply(text)
        logits = lamed.segment(lamed.seg_module.encode(image), merged(found.states[0][segments])[None])
        return Reply(text, (logits[0, 0] > 0).cpu().numpy())

    def predictions(self) -> list[Prediction]:
        found = []
        for sample in self.shown:
            said = self.answer(sample)
            text = f"**{sample.source}** {sample.question}\n\n- is: {sample.answer}\n- answers: {said.text}"
            found.append(Prediction(text, picture(sample, said.text, said.mask)))
        return found

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        state = {key.removeprefix("lamed."): value for key, value in state.items() if key.startswith("lamed.")}
        own = {
            published + key.removeprefix(prefix): value
            for key, value in state.items()
            for published, prefix in PARTS.items()
            if key.startswith(prefix)
        }
        for key, name in self._trained_embeddings().items():
            own[name] = state[key]
        save_file(
            {key: value.detach().contiguous() for key, value in own.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        write_json(folder / "config.json", self.config_json)
        if self.lora:
            adapter = {
                base.LORA_PREFIX + key.removeprefix("llm.").replace(".default.", "."): value.contiguous()
                for key, value in state.items()
                if ".lora_" in key
            }
            save_file(adapter, folder / base.ADAPTER_WEIGHTS, metadata={"format": "pt"})
            targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in adapter})
            write_json(
                folder / base.ADAPTER_CONFIG,
                {
                    "peft_type": "LORA",
                    "task_type": "CAUSAL_LM",
                    "base_model_name_or_path": _name(self.start),
                    "r": self.lora.r,
                    "lora_alpha": self.lora.alpha,
                    "lora_dropout": self.lora.dropout,
                    "bias": "none",
                    "fan_in_fan_out": False,
                    "use_rslora": False,
                    "target_modules": targets,
                },
            )
        self.tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        if file.is_file():
            file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")))

    def keeps(self, name: str) -> bool:
        key = name.removeprefix("lamed.")
        return not key.startswith("llm.") or ".lora_" in key or key in self._trained_embeddings()

    def restore(self, folder: Path) -> None:
        state = self._trained_in(folder)
        check_shapes("model", str(folder), state, self._written())
        self.lamed.load_state_dict(state, strict=False)

    def _trained_in(self, folder: Path) -> dict[str, Tensor]:
        """What `write` wrote, by the keys of Lamed's state; what it did not write by its own key."""
        own = open_part(str(folder / "model.safetensors"))
        state = {
            prefix + key.removeprefix(published): own.pop(key)
            for key in list(own)
            for published, prefix in PARTS.items()
            if key.startswith(published)
        }
        for key, name in self._trained_embeddings().items():
            if name in own:
                state[key] = own.pop(name)
        if self.lora:
            for key, value in open_part(str(folder / base.ADAPTER_WEIGHTS)).items():
                layer, _, which = key.removeprefix(base.LORA_PREFIX).partition(".lora_")
                state[f"llm.{layer}.lora_{which.replace('.weight', '.default.weight')}"] = value
        return {**state, **{f"llm.{key}": value for key, value in own.items()}}

    def _written(self) -> dict[str, Tensor]:
        """What `write` writes, by the keys of Lamed's state."""
        return {
            key: value
            for key, value in self.lamed.state_dict().items()
            if key.startswith(tuple(PARTS.values())) or ".lora_" in key or key in self._trained_embeddings()
        }

    def _trained_embeddings(self) -> dict[str, str]:
        """Key in Lamed's state -> name in model.safetensors, of those embeddings that the base model has not."""
        llm = self.lamed.llm
        if not self.lora and not {"embeddings", "lm_head", "added_tokens"} & set(self.train_parts):
            return {}
        if isinstance(llm.model.embed_tokens, GrownEmbedding):
            return {"llm.model.embed_tokens.added": base.ADDED_TOKENS}
        names = {"llm." + EMBEDDINGS: EMBEDDINGS}
        if not self.config_json.get("tie_word_embeddings"):
            names["llm." + HEAD] = HEAD
        return names


def image_size_of(start: Start) -> tuple[int, int, int]:
    """(D, H, W) of the model, before anything of it is loaded. Raises M3DError where nothing says it."""
    size = (start.model or {}).get("image_size")
    if size is None and isinstance(start.language_model, str):
        size = read_config(resolve(start.language_model)).get("image_size")
    if size is None:
        raise InvalidInput("start.model lacks image_size")
    if not isinstance(size, (list, tuple)) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise InvalidInput(f"start.model: image_size must be three whole numbers, D, H and W, not {size!r}")
    return size[0], size[1], size[2]


def _name(start: Start) -> str:
    source = start.language_model
    return source.package if isinstance(source, PackagedModel) else source


def _check_train(train: tuple[str, ...]) -> None:
    unknown = [name for name in train if name not in TRAINABLE]
    if unknown:
        raise InvalidInput(f"train names {', '.join(unknown)}; known: {', '.join(TRAINABLE)}")
    if "added_tokens" in train and {"embeddings", "lm_head"} & set(train):
        raise InvalidInput("train: added_tokens are rows of embeddings and lm_head; name one or the other")


def _family(source: LanguageModel, start: Start) -> str:
    """config.json's model_type of what is written."""
    own = source.config["model_type"]
    known = families_on(FAMILIES[own].model_type if source.lamed else own)
    family = (start.model or {}).get("model_type", own if source.lamed else known[0])
    if family not in known:
        raise InvalidInput(f"start.model: model_type {family!r} is not possible on {source.name}: {', '.join(known)}")
    return family


def _config_json(
    source: LanguageModel, start: Start, family: str, tokenizer, segmentation: bool, rows_only: bool
) -> dict:
    """config.json of what is written."""
    given = {**(start.model or {}), "model_type": family}
    unknown = sorted(set(given) - _OWN_KEYS)
    if unknown:
        raise InvalidInput(f"start.model: unknown {', '.join(unknown)}; known: {', '.join(sorted(_OWN_KEYS))}")
    if source.lamed:
        config = {"max_position_embeddings": 2048, **source.config, **given}
    else:
        config = {
            **source.config,
            "vision_tower": "vit3d",
            "mm_projector_type": "spp",
            "proj_layer_type": "mlp",
            "proj_layer_num": 2,
            "proj_pooling_type": "spatial",
            "proj_pooling_size": 2,
            "image_channel": 1,
            "segmentation_module": "segvol",
            "mm_hidden_size": (given.get("vision_config") or {}).get("hidden_size", 768),
            **given,
        }
    config["architectures"] = [FAMILIES[family].architecture]
    if not segmentation:
        config["segmentation_module"] = None
    missing = [key for key in ("image_size", "patch_size") if key not in config]
    if missing:
        raise InvalidInput(f"start.model lacks {', '.join(missing)}")
    spec = start.language_model
    config["base_model"] = asdict(spec) if isinstance(spec, PackagedModel) else {"path": spec}
    config[BASE_DIGEST] = digest(source)
    ids, rows = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)), len(source.state[EMBEDDINGS])
    if rows_only:
        if not config.get("tie_word_embeddings"):
            raise InvalidInput(
                f"train: added_tokens needs a language model with tied embeddings, {source.name} has "
                "not: train embeddings and lm_head"
            )
        if ids != list(range(rows, rows + len(ids))):
            raise InvalidInput(
                f"train: added_tokens needs {source.name} to have no rows for the added tokens yet, but "
                f"they are {ids} of {rows}: train embeddings"
            )
    # Base models may have spare rows.
    config["vocab_size"] = max(rows, max(ids) + 1)
    config["seg_token_id"] = ids[-1]
    return config
