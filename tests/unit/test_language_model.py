"""M3D-LaMed on Phi-3: read strictly, it answers as transformers' own Phi-3, and as the LLaMA whose weights it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from engine.errors import CheckpointError
from engine.models.checkpoint import PARTS, load_lamed, open_lamed
from engine.models.config import LamedConfig
from export.llm import write_llm
from tests import tiny

# As the published checkpoints have them beside the sizes.
PHI3 = {
    "sliding_window": 11,
    "rope_scaling": None,
    "original_max_position_embeddings": 512,
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling.LamedPhi3ForCausalLM"},
}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3")
    return tiny.as_phi3(tiny.write_tiny_lamed(folder / "llama"), folder / "lamed", **PHI3)


def answer(model, tokenizer, length=40):
    ids = tokenizer("<im_patch>" * tiny.NUM_VISUAL_TOKENS + tiny.QUESTION, return_tensors="pt")["input_ids"]
    image = torch.from_numpy(tiny.volume())[None]
    return ids, image, model.generate(image, ids, 1, max_new_tokens=length)


def test_phi3_computes_what_the_reference_recorded_for_the_llama_with_its_weights(dev_small, tmp_path):
    model, _ = load_lamed(tiny.as_phi3(dev_small.folder, tmp_path / "lamed"))
    assert isinstance(model.llm, Phi3ForCausalLM)
    ids, states, _ = model.generate(
        dev_small.volume,
        torch.tensor([dev_small.spec["input_ids"]]),
        1,
        max_new_tokens=dev_small.spec["generate"]["max_new_tokens"],
    )
    assert ids.tolist() == dev_small.expected["output_ids"].tolist()
    np.testing.assert_allclose(states, dev_small.expected["step_hidden"], atol=2e-5, rtol=0)


def test_phi3_answers_token_by_token_like_transformers_own(phi3):
    """The window is shorter than the prompt: without it the answer is another."""
    lamed, tokenizer = load_lamed(phi3)
    ids, image, (said, states, logits) = answer(lamed, tokenizer)
    told = {key: value for key, value in tiny.LAMED.items() if key in Phi3Config.__dataclass_fields__}
    tensors = {
        key: value for key, value in load_file(phi3 / "model.safetensors").items() if not key.startswith(tuple(PARTS))
    }
    wanted = {}
    for window in (PHI3["sliding_window"], None):
        alone = Phi3ForCausalLM(Phi3Config(**{**told, "sliding_window": window})).eval()
        alone.load_state_dict(tensors)
        rows = lamed.prompt_embeddings(ids, lamed.encode_images(image), 1).detach()
        for _ in range(len(said)):  # without a cache, the obvious way
            with torch.inference_mode():
                last = alone.model(inputs_embeds=rows, use_cache=False).last_hidden_state
                token = alone.lm_head(last[:, -1]).argmax(-1)
                rows = torch.cat([rows, alone.get_input_embeddings()(token)[:, None]], dim=1)
            wanted.setdefault(window, []).append((token.item(), last[0, -1]))
    tokens, rows = zip(*wanted[PHI3["sliding_window"]])
    assert said.tolist() == list(tokens) != [token for token, _ in wanted[None]]
    torch.testing.assert_close(states, torch.stack(rows), atol=1e-5, rtol=0)
    seg = said == lamed.config.seg_token_id
    assert seg.any() and logits is not None


def test_phi3_is_exported_as_vllm_loads_it(phi3, tmp_path):
    config, weights, source = open_lamed(phi3)
    write_llm(config, weights, source, tmp_path / "llm", "fp32", lambda text: None)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    assert type(found) is Phi3ForCausalLM and found.config.architectures == ["Phi3ForCausalLM"]
    assert found.config.sliding_window == PHI3["sliding_window"]
    lamed, _ = load_lamed(phi3)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, lamed.llm(ids).logits)


def test_phi3_is_read_strictly(phi3, tmp_path):
    tensors = load_file(phi3 / "model.safetensors")
    folder = tiny.as_phi3(phi3, tmp_path / "lamed")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128, 128)
    tensors["model.layers.1.self_attn.qkv_proj.weight"] = torch.zeros(128, 128)
    del tensors["model.layers.1.mlp.gate_up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_lamed(folder)
    for words in (
        "1 missing (model.layers.1.mlp.gate_up_proj.weight)",
        "1 unexpected (model.layers.0.self_attn.q_proj.weight)",
        "model.layers.1.self_attn.qkv_proj.weight: [128, 128], expected [256, 128]",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "values, length",
    [
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_the_context_ends_where_long_rope_begins(values, length):
    config = LamedConfig.from_dict({**tiny.LAMED, "model_type": "lamed_phi3", **values})
    assert config.context_length == length
