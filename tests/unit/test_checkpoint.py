"""Checkpoints are read strictly, in every published form, and errors name what does not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models import base
from engine.models.base import merge_lora
from engine.models.checkpoint import (
    eos_token_ids,
    load_clip,
    load_lamed,
    open_lamed,
    read_config,
    resolve,
    sha256,
)
from engine.models.config import ClipConfig, LamedConfig
from engine.models.lamed import Lamed
from engine.models.weights import Weights
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_tiny_lamed(tmp_path_factory.mktemp("tiny") / "lamed")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "lamed")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values):
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **values}))


def assert_same_weights(folder, checkpoint):
    expected = load_file(checkpoint / "model.safetensors")
    _, found, _ = open_lamed(folder)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    load_lamed(folder)


def shard(tensors, count):
    keys = sorted(tensors)
    return [{key: tensors[key] for key in keys[index::count]} for index in range(count)]


def test_sharded_safetensors_read_like_one_file(folder, checkpoint):
    parts = shard(load_file(folder / "model.safetensors"), 3)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index, part in enumerate(parts):
        save_file(part, folder / f"model-{index}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{index}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(folder, checkpoint)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        open_lamed(folder)


def test_torch_bin_files_read_like_safetensors(folder, checkpoint):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same_weights(folder, checkpoint)


def test_a_bin_file_that_would_run_code_is_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model": torch.nn.Linear(1, 1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only"):
        open_lamed(folder)


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "{}",
        "[]",
        '{"weight_map": ["a.safetensors"]}',
        '{"weight_map": {"a": 1, "b": "c"}}',
        '{"weight_map": {"a": []}}',
    ],
)
def test_an_index_that_names_no_files_is_refused(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged .*weight_map"):
        open_lamed(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (list, r"pytorch_model\.bin holds a list"),
        (
            lambda tensors: {**tensors, "model.norm.weight": [1, 2]},
            r"pytorch_model\.bin .*\(model\.norm\.weight: list\)",
        ),
        (lambda tensors: {**tensors, 5: torch.zeros(1)}, r"pytorch_model\.bin .*\(5: Tensor\)"),
    ],
)
def test_a_bin_file_that_holds_other_things_than_tensors_is_refused(folder, change, words):
    torch.save(change(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=words):
        load_lamed(folder)


def test_missing_unexpected_and_misshapen_keys_are_named(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.surprise"] = torch.zeros(1)
        tensors["model.seg_projector.0.bias"] = torch.zeros(3)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        load_lamed(folder)
    for part in (
        "1 missing (model.norm.weight)",
        "1 unexpected (model.surprise)",
        "model.seg_projector.0.bias: [3], expected [128]",
    ):
        assert part in str(error.value)


def test_a_cut_off_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut off"):
        load_lamed(folder)


def test_derived_buffers_of_older_checkpoints_are_ignored(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}))
    load_lamed(folder)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "lamed_gemma"}, "architecture 'lamed_gemma'"),
        ({"model_type": "lamed_phi3"}, r"missing .*mlp.gate_up_proj.*unexpected .*mlp.gate_proj"),
        ({"rms_norm_eps": "small"}, "does not describe a language model of type 'llama'.*rms_norm_eps"),
        ({"image_size": [16, 64, 60]}, "multiple of patch_size"),
        ({"vision_tower": "resnet"}, "vision_tower 'resnet'"),
        ({"segmentation_module": "unet"}, "segmentation_module 'unet'"),
        ({"vision_select_layer": -2}, "vision_select_layer"),
        ({"vision_config": {"depth": 3}}, "unknown depth"),
    ],
)
def test_another_architecture_is_refused_by_name(folder, values, words):
    edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=words):
        load_lamed(folder)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"image_size": 16}, "image_size must be three .*not 16"),
        ({"patch_size": None}, "patch_size must be three .*not None"),
        ({"proj_pooling_size": 0}, "proj_pooling_size must be .*not 0"),
        ({"proj_pooling_size": 5}, "proj_pooling_size 5 leaves no visual token of the 4 x 4 x 4 patches"),
        ({"proj_layer_num": "two"}, "proj_layer_num must be .*not 'two'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be .*not 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be .*not 0"),
        ({"vocab_size": None}, "vocab_size must be .*not None"),
        ({"vision_config": {"num_heads": 0}}, "num_heads must be .*not 0"),
        ({"vision_config": 5}, "vision_config.* not 5"),
        ({"segmentation_module": 5}, "segmentation_module 5"),
        ({"seg_token_id": 320}, "seg_token_id 320 .*vocab_size is 320"),
        ({"seg_token_id": -1}, "seg_token_id -1 "),
        ({"seg_token_id": "[SEG]"}, "seg_token_id '.SEG.' "),
    ],
)
def test_an_impossible_value_of_config_is_refused_by_key_and_value(folder, values, words):
    edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=words):
        open_lamed(folder)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"img_size": 16}, "image_size must be three .*not 16"),
        ({"num_heads": 0}, "num_heads must be .*not 0"),
        ({"bert_config": {"max_position_embeddings": 0}}, "max_position_embeddings must be .*not 0"),
    ],
)
def test_an_impossible_value_of_clips_config_is_refused(tmp_path, values, words):
    clip = tiny.write_tiny_clip(tmp_path / "clip")
    edit_config(clip, **values)
    with pytest.raises(CheckpointError, match=words):
        load_clip(clip)


@pytest.mark.parametrize(
    "values, length",
    [({}, 512), ({"max_text_len": 128}, 512), ({"bert_config": {"max_position_embeddings": 64}}, 64)],
)
def test_clip_reads_as_many_tokens_as_bert_has_positions_whatever_max_text_len_says(values, length):
    assert ClipConfig.from_dict({"model_type": "m3d_clip", **values}).text_length == length


def test_a_clip_checkpoint_is_not_taken_for_lamed_nor_the_reverse(folder, tmp_path):
    clip = tiny.write_tiny_clip(tmp_path / "clip")
    load_clip(clip)
    with pytest.raises(CheckpointError, match="m3d_clip"):
        load_lamed(clip)
    with pytest.raises(CheckpointError, match="lamed_llama"):
        load_clip(folder)


def test_the_seg_token_is_found_in_the_tokenizer_if_config_does_not_name_it(folder):
    expected = read_config(folder)["seg_token_id"]
    edit_config(folder, seg_token_id=None)
    assert open_lamed(folder)[0].seg_token_id == expected


def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        resolve(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(tmp_path)


def test_the_hash_of_a_checkpoint_changes_with_its_content_alone(folder, checkpoint):
    assert sha256(folder) == sha256(checkpoint)
    edit_config(folder, seg_token_id=7)
    assert sha256(folder) != sha256(checkpoint)


def test_merged_lora_equals_the_adapted_model():
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    ).eval()
    tensors = {key: value.clone() for key, value in base.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    adapter = get_peft_model_state_dict(adapted)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        expected = adapted(ids).logits
    merge_lora(tensors, {"r": 4, "lora_alpha": 8}, adapter)
    plain = LlamaForCausalLM(base.config).eval()
    plain.load_state_dict(tensors)
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match="another one"):
        merge_lora({}, {"r": 4, "lora_alpha": 8}, adapter)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda path: path.unlink(), "is missing"), (lambda path: path.write_bytes(path.read_bytes()[:40]), "is damaged")],
)
def test_a_missing_or_damaged_file_of_a_small_checkpoint_is_named(tmp_path, monkeypatch, damage, words):
    monkeypatch.setattr(base, "load_base", lambda spec: {})
    path = tmp_path / "model.safetensors"
    save_file({"added_tokens.weight": torch.zeros(4, 8)}, path)
    damage(path)
    with pytest.raises(CheckpointError, match=f"model.safetensors {words}"):
        base.compose(tmp_path, {"base_model": {}})


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [3, 4, 7]}, 3, [3, 4, 7]),  # Phi-3's form: only the first stands in config.json
        ({"eos_token_id": 5}, [3, 4], [5]),
        ({"eos_token_id": None}, 3, [3]),
        ({"do_sample": True}, 3, [3]),
        (None, [3, 4], [3, 4]),
        (None, None, None),
    ],
)
def test_what_ends_an_answer_comes_from_the_generation_config_first(tmp_path, generation, config, ends):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path, {"vocab_size": 10, "eos_token_id": config}) == ends


@pytest.mark.parametrize("wrong", [10, [3, -1], "2", [], [True]])
def test_an_end_that_is_no_token_is_refused(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id"):
        eos_token_ids(tmp_path, {"vocab_size": 10, "eos_token_id": 3})


def test_keys_that_later_monai_versions_add_are_left_out_and_named(tmp_path):
    blocks = ["model.vision_tower.vision_tower.blocks.0.", "model.seg_module.image_encoder.blocks.11."]
    added = [f"{block}{key}" for block in blocks for key in ("norm_cross_attn.weight", "cross_attn.qkv.weight")]
    weights = Weights({key: torch.zeros(1) for key in [*added, f"{blocks[0]}norm1.weight"]})
    assert list(weights) == [f"{blocks[0]}norm1.weight"] and weights.never_run == added


def test_a_context_without_room_for_a_question_is_refused():
    with pytest.raises(CheckpointError, match="context of 8 tokens, and a scan alone takes 8"):
        LamedConfig.from_dict({**tiny.LAMED, "max_position_embeddings": 8})


@pytest.mark.parametrize("changes", [{"hidden_act": "foo"}, {"rope_scaling": {"type": "nonsense"}}])
def test_a_language_model_that_cannot_be_built_is_refused(changes):
    with pytest.raises(CheckpointError, match="does not describe a language model"):
        Lamed(LamedConfig.from_dict({**tiny.LAMED, **changes}))
