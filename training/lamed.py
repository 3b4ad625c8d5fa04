"""The model in training: Lamed with LoRA on a frozen language model and trained rows for the added tokens."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from engine.errors import InvalidInput
from engine.models.base import ADDED_TOKENS as ADDED_ROWS, base_file, load_base, load_base_tokenizer
from engine.models.checkpoint import PARTS
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed
from engine.prompt import SEG_TOKEN, SPECIAL_TOKENS
from training.recipe import Recipe
from training.segmentation import TaughtSegVol

# Of the base model's 8192: a scan, a question and an answer need less, and a small machine can hold it.
CONTEXT_LENGTH = 2048
ADDED_TOKENS = (*SPECIAL_TOKENS, SEG_TOKEN)


def _llama_keys(spec: dict) -> dict:
    gguf = base_file(spec)
    return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()


def config_json(recipe: Recipe) -> dict:
    """config.json of the checkpoint: the base model's LLaMA keys, ours, and where the base model comes from."""
    llama = _llama_keys(recipe.base_model)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rms_norm_eps", "rope_parameters", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id")
    vocab = llama["vocab_size"]
    return {
        "architectures": ["LamedLlamaForCausalLM"], "model_type": "lamed_llama",
        **{key: llama[key] for key in keys if llama.get(key) is not None},
        "max_position_embeddings": CONTEXT_LENGTH, "vocab_size": vocab + len(ADDED_TOKENS),
        "tie_word_embeddings": True, "attention_bias": False,
        "vision_tower": "vit3d", "mm_projector_type": "spp", "proj_layer_type": "mlp", "proj_layer_num": 2,
        "proj_pooling_type": "spatial", "segmentation_module": "segvol", "seg_token_id": vocab + len(ADDED_TOKENS) - 1,
        "mm_hidden_size": recipe.model["vision_config"]["hidden_size"], **recipe.model,
        "base_model": recipe.base_model,
    }


def lamed_config(recipe: Recipe) -> LamedConfig:
    return LamedConfig.from_dict(config_json(recipe))


def tokenizer_of(recipe: Recipe):
    """The base model's tokenizer, with our tokens added and BOS put in front as LLaMA's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_base_tokenizer(recipe.base_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.add_tokens([SEG_TOKEN])
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


class TrainedLamed(nn.Module):
    """Lamed whose language model is frozen in bf16, with LoRA and with rows of its own for the added tokens."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.config = lamed_config(recipe)
        self.lamed = Lamed(self.config)
        base = load_base(recipe.base_model)
        table = base.pop("model.embed_tokens.weight")
        llm = self.lamed.llm
        llm.load_state_dict(base, strict=False)
        llm.to(torch.bfloat16).requires_grad_(False)
        # The whole table stays frozen; the added rows live outside, tied between input and output like the others.
        llm.model.embed_tokens = nn.Embedding.from_pretrained(table.to(torch.bfloat16))
        llm.lm_head = nn.Identity()
        noise = torch.randn(len(ADDED_TOKENS), table.shape[1])
        self.added_tokens = nn.Parameter(table.mean(0) + 0.5 * table.std(0) * noise)
        self.adapter = get_peft_model(llm, LoraConfig(
            r=recipe.lora.r, lora_alpha=recipe.lora.alpha, lora_dropout=0.0, bias="none",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
        for layer in (self.lamed.vision_tower.vision_tower, self.lamed.seg_module.image_encoder):
            nn.init.trunc_normal_(layer.patch_embedding.position_embeddings, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """[..., H_llm] in fp32."""
        table = self.lamed.llm.model.embed_tokens
        added = ids - table.num_embeddings
        own = self.added_tokens[added.clamp(min=0)]
        return torch.where((added >= 0)[..., None], own, table(ids.clamp(max=table.num_embeddings - 1)).float())

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, V] from final hidden states, V with the added tokens."""
        table = self.lamed.llm.model.embed_tokens.weight
        return torch.cat([hidden_TH @ table.T, hidden_TH @ self.added_tokens.to(hidden_TH.dtype).T], dim=-1)

    def hidden(self, embeddings_BLH: Tensor, mask_BLL: Tensor, positions_BL: Tensor) -> Tensor:
        """Final hidden states [B, L, H] after the last norm. mask: True where row may attend to column."""
        with disable_input_dtype_casting(self.adapter):
            return self.lamed.llm.model(inputs_embeds=embeddings_BLH, attention_mask=mask_BLL[:, None],
                                        position_ids=positions_BL, use_cache=False).last_hidden_state

    def start_from(self, taught: TaughtSegVol) -> None:
        """Take over the segmentation stage: SegVol as it is, and its encoder as the vision tower's beginning."""
        self.lamed.seg_module.load_state_dict(taught.seg_module.state_dict())
        tower, encoder = self.lamed.vision_tower.vision_tower, taught.seg_module.image_encoder
        missing = tower.load_state_dict(encoder.state_dict(), strict=False)
        nn.init.trunc_normal_(tower.cls_token, std=0.02)
        if missing.missing_keys != ["cls_token"] or missing.unexpected_keys:
            raise InvalidInput("vision_config and seg_config must be the same: the vision tower starts from SegVol's "
                               "encoder")

    def write(self, folder: Path, recipe: Recipe) -> None:
        """Write the checkpoint that `engine.models.base` composes: our parts and LoRA in fp16, config and tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        own = {published + key.removeprefix(prefix): value for key, value in self.lamed.state_dict().items()
               for published, prefix in PARTS.items() if key.startswith(prefix)}
        own[ADDED_ROWS] = self.added_tokens
        save_file({key: value.detach().half().contiguous() for key, value in own.items()}, folder / "model.safetensors",
                  metadata={"format": "pt"})
        lora = get_peft_model_state_dict(self.adapter)
        save_file({key: value.half().contiguous() for key, value in lora.items()}, folder / "adapter_model.safetensors",
                  metadata={"format": "pt"})
        settings = self.adapter.peft_config["default"]
        adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": settings.r, "lora_alpha": settings.lora_alpha,
                   "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
                   "target_modules": sorted(settings.target_modules)}
        for name, values in (("config.json", config_json(recipe)), ("adapter_config.json", adapter)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
        tokenizer = tokenizer_of(recipe)
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")))
