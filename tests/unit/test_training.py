"""What training promises: the reference's losses, questions in a pack as if alone, the same run from the same seed."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import training.lamed
from engine.errors import InvalidInput
from engine.models import base, checkpoint
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed
from training import alignment, instruction, segmentation, workers
from training.data.augment import swap_sides, view_of
from training.data.questions import Question
from training.data.scans import LabelledScan
from training.lamed import TrainedLamed, config_json, lamed_config, tokenizer_of
from training.losses import dice_loss, language_loss, mask_loss
from training.packing import pack, sequence
from training.recipe import Recipe

DEMO = Path(training.lamed.__file__).parent / "demo"
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu", "vocab_size": 259,
         "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 258}
VIT = {"hidden_size": 32, "mlp_dim": 64, "num_layers": 1, "num_heads": 2}


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                   unk_token="<unk>")


@pytest.fixture
def recipe(monkeypatch) -> Recipe:
    """The demo's recipe at the size of a toy, its language model random."""
    torch.manual_seed(0)
    state = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).state_dict()
    state.pop("lm_head.weight")
    for module in (training.lamed, base):
        monkeypatch.setattr(module, "load_base", lambda spec: {key: value.clone() for key, value in state.items()})
    monkeypatch.setattr(training.lamed, "load_base_tokenizer", lambda spec: _tokenizer())
    monkeypatch.setattr(training.lamed, "_llama_keys", lambda spec: LLAMA)
    real = Recipe.read(DEMO / "recipe.json")
    model = {"image_size": [8, 32, 32], "patch_size": [4, 16, 16], "vision_config": VIT, "seg_config": VIT,
             "proj_pooling_size": 2}
    return dataclasses.replace(
        real, model=model, processes=1, train={"phantom": 1},
        segmentation=dataclasses.replace(real.segmentation, steps=2, batch=2, per_scan=2),
        alignment=dataclasses.replace(real.alignment, steps=2, batch=2),
        instruction=dataclasses.replace(real.instruction, steps=2, batch=2, per_scan=3),
        refinement=dataclasses.replace(real.refinement, steps=2, batch=2, per_scan=2))


@pytest.fixture
def scans() -> list[LabelledScan]:
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 12, 48, 48), bool)
    masks[0, :, 8:40, 26:44], masks[1, :, 8:40, 4:22] = True, True
    image = (masks[0] * 0.7 + masks[1] * 0.4 + rng.random(masks[0].shape) * 0.1).astype(np.float32)
    facts = {"modality": "CT", "part": "chest", "view": "both lungs", "finding": "Nothing else.", "tumour": "",
             "tumour_side": ""}
    return [LabelledScan("phantom", image, masks[0] * 1 + masks[1] * np.int64(2), ("left lung", "right lung"),
                         tuple(float(m.mean()) for m in masks), facts)]


def started(recipe: Recipe, taught: segmentation.TaughtSegVol) -> TrainedLamed:
    torch.manual_seed(recipe.seed)
    model = TrainedLamed(recipe)
    model.start_from(taught)
    return model


def ignore(step: int, losses: dict) -> None:
    pass


def test_dice_is_soft_and_smooths_the_denominator_only():
    logits, target = torch.randn(3, 4, 5, 6), (torch.rand(3, 4, 5, 6) > 0.5).float()
    expected = 0.0
    for x, t in zip(logits, target):
        p = 1 / (1 + torch.exp(-x))
        expected += (1 - 2 * (p * t).sum() / (p.sum() + t.sum() + 1)) / 3
    torch.testing.assert_close(dice_loss(logits, target), expected)
    # An empty target costs everything, however small the prediction: nothing is added to the numerator.
    assert dice_loss(torch.full((1, 8), -20.0), torch.zeros(1, 8)) == 1


def test_the_mask_loss_is_dice_plus_binary_cross_entropy():
    logits, target = torch.randn(2, 30), (torch.rand(2, 30) > 0.5).float()
    p = logits.sigmoid()
    entropy = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(mask_loss(logits, target), dice_loss(logits, target) + entropy)


def test_the_language_loss_is_the_weighted_mean_over_answer_tokens():
    logits, answers, weights = torch.randn(5, 7), torch.tensor([0, 3, 6, 2, 2]), torch.rand(5)
    each = -logits.log_softmax(-1)[torch.arange(5), answers]
    torch.testing.assert_close(language_loss(logits, answers, weights), (each * weights / weights.sum()).sum())


def test_a_long_answer_outweighs_a_short_one_by_the_root_of_its_length(recipe):
    tokenizer = tokenizer_of(recipe)
    sequences = [sequence(tokenizer, q, False) for q in QUESTIONS]
    lengths = [len(s.ids) - s.answer_start for s in sequences]
    assert len(set(lengths)) == 3
    weights = pack([sequences], 3, 262, tokenizer.pad_token_id).answer_weights.split(lengths)
    torch.testing.assert_close(torch.stack([w.sum() for w in weights]), torch.tensor(lengths).sqrt())


QUESTIONS = [Question("segment", "Segment it.", "It is [SEG]."), Question("tumour", "Is there one?", "No."),
             Question("segment", "Where?", "[SEG] and [SEG]")]


def _hidden(model, tokenizer, groups, visual_tokens):
    """Final states where answers are predicted, the answers, and the rows that predict [SEG]."""
    batch = pack(groups, 1 + visual_tokens.shape[1], model.config.seg_token_id, tokenizer.pad_token_id)
    bos = model.embed(torch.full((len(groups), 1), tokenizer.bos_token_id))
    hidden = model.hidden(torch.cat([bos, visual_tokens, model.embed(batch.ids)], dim=1), batch.mask, batch.positions)
    return hidden[batch.answer_rows, batch.answer_columns], batch.answers, hidden[batch.state_rows, batch.state_columns]


def test_packed_questions_are_answered_as_if_each_stood_alone(recipe):
    model, tokenizer = TrainedLamed(recipe), tokenizer_of(recipe)
    model.adapter.float()
    for name, p in model.adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    visual_tokens = torch.randn(1, model.config.num_visual_tokens, 32)
    sequences = [sequence(tokenizer, q, space) for q, space in zip(QUESTIONS, (True, False, True))]
    with torch.no_grad():
        # Two scans, so that one group is padded.
        packed = _hidden(model, tokenizer, [sequences, sequences[:1]], visual_tokens.expand(2, -1, -1))
        alone = [_hidden(model, tokenizer, [[s]], visual_tokens) for s in (*sequences, sequences[0])]
    for together, single in zip(packed, map(torch.cat, zip(*alone))):
        torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-5)


def test_only_answers_and_their_end_are_learned(recipe):
    tokenizer = tokenizer_of(recipe)
    seg = tokenizer.convert_tokens_to_ids("[SEG]")
    batch = pack([[sequence(tokenizer, q, False) for q in QUESTIONS]], 3, seg, tokenizer.pad_token_id)
    assert tokenizer.decode(batch.answers) == " It is [SEG].</s> No.</s> [SEG] and [SEG]</s>"
    # Each is predicted one position before it stands.
    inside = batch.answer_columns - 3 + 1
    torch.testing.assert_close(batch.ids[0, inside], batch.answers)
    assert batch.ids[0, batch.state_columns - 3 + 1].tolist() == [seg] * 3


def test_prompts_begin_with_bos_and_image_tokens(recipe):
    from engine.prompt import Prompt

    tokenizer = tokenizer_of(recipe)
    letter = tokenizer.convert_tokens_to_ids("H")
    assert Prompt(tokenizer, 4, 512).input_ids("Hi")[:6] == [257, 259, 259, 259, 259, letter]
    assert tokenizer.convert_tokens_to_ids("[SEG]") == config_json(recipe)["seg_token_id"] == 262


def test_the_same_seed_trains_the_same_model_bit_by_bit(recipe, scans, tmp_path):
    def run(name: str, seed: int) -> dict:
        folder = tmp_path / name
        folder.mkdir()
        seeded = dataclasses.replace(recipe, seed=seed)
        taught = segmentation.train(seeded, lamed_config(seeded), scans, folder, ignore)
        model = started(seeded, taught)
        alignment.train(seeded, model, scans, folder, ignore)
        instruction.train(seeded, model, scans, taught, folder / "out", folder, ignore)
        return {file.name: file.read_bytes() for file in (folder / "out").iterdir()}

    first, again, other = run("a", 1), run("b", 1), run("c", 2)
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(recipe, scans, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def stop(step: int, losses: dict) -> None:
        if step == 2:
            raise Interrupted

    monkeypatch.setattr(segmentation, "_SAVE_EVERY", 1)
    config = lamed_config(recipe)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = segmentation.train(recipe, config, scans, tmp_path / "whole", ignore)
    with pytest.raises(Interrupted):
        segmentation.train(recipe, config, scans, tmp_path / "parts", stop)
    parts = segmentation.train(recipe, config, scans, tmp_path / "parts", ignore)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_frozen_parts_stay_as_they_are_and_the_others_move(recipe, scans, tmp_path):
    taught = segmentation.train(recipe, lamed_config(recipe), scans, tmp_path, ignore)
    model = started(recipe, taught)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    instruction.train(recipe, model, scans, taught, tmp_path, tmp_path, ignore)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    segvol = model.lamed.seg_module.state_dict()
    assert all(torch.equal(value, segvol[key]) for key, value in taught.seg_module.state_dict().items())
    assert "added_tokens" in moved and any("lora_B" in name for name in moved)
    assert any("seg_projector" in name for name in moved)
    assert not [name for name in moved if "vision_tower" in name or "mm_projector" in name]
    assert not [name for name in moved if "llm" in name and "lora" not in name]


def test_a_written_checkpoint_loads_strictly_and_answers_as_it_did_in_training(recipe, scans, tmp_path):
    taught = segmentation.train(recipe, lamed_config(recipe), scans, tmp_path, ignore)
    model = started(recipe, taught).eval()
    instruction.train(recipe, model, scans, taught, tmp_path / "out", tmp_path, ignore)
    loaded, tokenizer = checkpoint.load_lamed(tmp_path / "out")
    image = torch.rand(1, 1, 8, 32, 32)
    sequences = [sequence(tokenizer, QUESTIONS[0], False)]
    model.adapter.float()
    with torch.no_grad():
        tokens = model.lamed.encode_images(image)
        torch.testing.assert_close(loaded.encode_images(image), tokens, atol=2e-3, rtol=2e-3)
        trained, answers, _ = _hidden(model, tokenizer, [sequences], tokens)
        ids = torch.tensor([[tokenizer.bos_token_id, *[0] * tokens.shape[1], *sequences[0].ids]])
        out = loaded.llm(inputs_embeds=loaded.prompt_embeddings(ids, tokens), output_hidden_states=True)
        rows = slice(-len(answers) - 1, -1)
        torch.testing.assert_close(out.hidden_states[-1][0, rows], trained, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(out.logits[0, rows], model.logits(trained), atol=5e-2, rtol=5e-2)


def test_refinement_trains_the_masks_and_leaves_the_prompts(recipe, scans, tmp_path):
    taught = segmentation.train(recipe, lamed_config(recipe), scans, tmp_path, ignore)
    before = {key: value.clone() for key, value in taught.state_dict().items()}
    segmentation.refine(recipe, taught, scans, tmp_path, ignore)
    after = taught.state_dict()
    assert torch.equal(after["prompts.weight"], before["prompts.weight"])
    for part in ("image_encoder.norm.weight", "mask_decoder.mask_tokens.weight"):
        assert not torch.equal(after["seg_module." + part], before["seg_module." + part])


def test_visual_tokens_are_led_to_the_words_of_the_scan_and_of_their_own_part(recipe, scans):
    """The lens compares with every word; a token that is exactly the right mixture of words has the least loss."""
    tokenizer, table = tokenizer_of(recipe), torch.randn(262, 64)
    lens = alignment.Lens(["CT", "chest", "left lung", "right lung"], tokenizer, table)
    view = view_of(scans[0], None, (8, 32, 32), np.random.default_rng(0))
    target = alignment._words(view, lens, (1, 1, 2))
    left, right, about = lens.row(["left lung"]), lens.row(["right lung"]), lens.row(["CT", "chest"])
    # Seen from the front: the phantom's left lung lies on the higher columns.
    np.testing.assert_allclose(target, np.stack([about + right, about + left]) / 2, atol=1e-6)
    words = torch.eye(len(lens.ids)) @ lens.words_WH * lens.length + lens.mean
    ids = [torch.tensor(target[None]).argmax(-1)]
    best = lens.loss(words[ids[0]], torch.eye(len(lens.ids))[ids[0]])
    assert best < lens.loss(words[(ids[0] + 1) % len(lens.ids)], torch.eye(len(lens.ids))[ids[0]])
    assert best < lens.loss(3 * words[ids[0]], torch.eye(len(lens.ids))[ids[0]])


def test_alignment_trains_the_tower_and_the_projector_only_and_lowers_its_loss(recipe, scans, tmp_path):
    longer = dataclasses.replace(recipe, alignment=dataclasses.replace(recipe.alignment, steps=30, learning_rate=3e-3))
    model, losses = started(longer, segmentation.TaughtSegVol(lamed_config(longer), scans)), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    alignment.train(longer, model, scans, tmp_path, lambda step, values: losses.append(values["loss"]))
    moved = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"vision_tower", "mm_projector"}
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_towers_of_different_size_cannot_start_from_each_other(recipe, scans):
    other = dataclasses.replace(recipe, model={**recipe.model, "vision_config": {**VIT, "num_layers": 2}})
    taught = segmentation.TaughtSegVol(lamed_config(recipe), scans)
    with pytest.raises(InvalidInput, match="must be the same"):
        TrainedLamed(other).start_from(taught)


def test_prompts_are_taught_for_both_sides_of_every_structure(recipe, scans):
    taught = segmentation.TaughtSegVol(lamed_config(recipe), scans)
    assert all(swap_sides(name) in taught.names for name in taught.names)


def _averaged(folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = workers.Optimizer(Recipe.read(DEMO / "recipe.json").instruction, [parameter])
    parameter.grad = torch.tensor([1.0, 0.0]) * (1 if workers.rank() else -3)
    optimizer.step(0)
    draw = workers.random_source(0, 1, 0).random()
    (folder / str(workers.rank())).write_text(json.dumps([parameter.tolist(), draw]))


def test_processes_share_their_gradients_and_draw_different_numbers(tmp_path):
    workers.run(2, _averaged, tmp_path)
    (first, draw), (second, other) = (json.loads((tmp_path / name).read_text()) for name in "01")
    # The mean gradient is negative for both, though one's own is positive.
    assert first == second and first[0] > 0 and first[1] == 0
    assert draw != other


def test_the_learning_rate_warms_up_and_decays():
    stage = dataclasses.replace(Recipe.read(DEMO / "recipe.json").instruction, steps=100, warmup=0.1, learning_rate=1.0)
    optimizer = workers.Optimizer(stage, [torch.nn.Parameter(torch.zeros(1))])
    rates = [optimizer.learning_rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates) and rates[99] < 0.02
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_the_committed_demo_holds_what_its_config_promises_and_is_small():
    config = json.loads((DEMO / "config.json").read_text())
    with torch.device("meta"):
        shapes = checkpoint.lamed_shapes(Lamed(LamedConfig.from_dict(config)))
    ours = {key: shape for key, shape in shapes.items() if key.startswith(tuple(checkpoint.PARTS))}
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        held = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    added = held.pop(base.ADDED_TOKENS)
    assert held == ours and added[1] == config["hidden_size"]
    with safe_open(DEMO / "adapter_model.safetensors", "pt") as file:
        lora = list(file.keys())
        targets = {key.split(".lora_")[0].removeprefix("base_model.model.") + ".weight" for key in lora}
        assert len(lora) == 2 * len(targets) == 2 * 7 * config["num_hidden_layers"] and targets <= set(shapes)
        for key in lora:
            assert torch.isfinite(file.get_tensor(key)).all()
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 40e6
