"""What training promises: the reference's losses, questions in a pack as if alone, the demo's stages on a phantom."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import training
from engine.errors import CheckpointError, InvalidInput
from engine.models import base, checkpoint
from engine.models.config import LamedConfig, ViTConfig
from engine.models.lamed import Lamed
from engine.prompt import Prompt
from engine.prompt.plain import PlainLayout
from tests import toy_models as toy
from training import align_projector, finetune, merge_lora, pretrain_clip, pretrain_segvol, starting_points
from training.config import build
from training.data import views
from training.data.augment import view_of
from training.data.jitter import swap_sides
from training.data.sample import Sample
from training.data.scans import LabelledScan
from training.evaluate import KINDS
from training.lamed import GrownEmbedding, GrownHead, Lora, Start, TrainedLamed
from training.losses import dice_loss, language_loss, mask_loss
from training.packing import Packer, pack, sequence

pytestmark = pytest.mark.integration

DEMO = Path(training.__file__).parent / "demo"
CONFIGS = Path(training.__file__).parent / "configs" / "demo"
PACKAGE = {"package": "toy-llm", "version": "1", "file": "toy/toy.gguf"}
SIZE = (8, 32, 32)


@pytest.fixture
def packaged(monkeypatch) -> starting_points.PackagedModel:
    """A random language model with tied embeddings, as if a package carried it."""
    torch.manual_seed(0)
    config = LlamaConfig(**toy.LLAMA, tie_word_embeddings=True)
    state = LlamaForCausalLM(config).state_dict()
    state.pop("lm_head.weight")
    monkeypatch.setattr(base, "load_base", lambda spec: {key: value.clone() for key, value in state.items()})
    monkeypatch.setattr(
        starting_points,
        "_packaged",
        lambda source: starting_points.LanguageModel(
            source.package,
            starting_points.known_settings(config),
            {key: value.clone() for key, value in state.items()},
            toy.byte_tokenizer(),
        ),
    )
    return starting_points.PackagedModel(**PACKAGE)


@pytest.fixture
def scans(monkeypatch) -> list[LabelledScan]:
    """A phantom with two lungs, which takes the place of the real scans."""
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 12, 48, 48), bool)
    masks[0, :, 8:40, 26:44], masks[1, :, 8:40, 4:22] = True, True
    image = (masks[0] * 0.7 + masks[1] * 0.4 + rng.random(masks[0].shape) * 0.1).astype(np.float32)
    facts = {
        "modality": "CT",
        "part": "chest",
        "view": "both lungs",
        "finding": "Nothing else.",
        "tumour": "",
        "tumour_side": "",
    }
    phantom = [
        LabelledScan(
            "chest-ct-1",
            image,
            masks[0] * 1 + masks[1] * np.int64(2),
            ("left lung", "right lung"),
            tuple(float(m.mean()) for m in masks),
            facts,
        )
    ]
    monkeypatch.setattr(views, "load_scans", lambda names, size: phantom)
    return phantom


def demo(name: str, folder: Path, **changes) -> dict:
    """A configuration of the demo at the size of a toy: 2 steps of 2 views of the phantom."""
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    values["out"] = str(folder / name)
    values["data"]["scans"] |= {"train": {"chest-ct-1": 1}, "views": 12}
    values["trainer"] |= {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "disable_tqdm": True}
    if "vision" in values:
        values["vision"] = {"image_size": list(SIZE), "patch_size": [4, 16, 16], **toy.VIT}
    if "start" in values and isinstance(values["start"], dict):
        model = {**toy.PARTS, "max_position_embeddings": 512}
        if "seg_config" not in values["start"]["model"]:
            model |= {"segmentation_module": None}
        values["start"] |= {"language_model": PACKAGE, "model": model}
    text = json.dumps({**values, **changes}).replace("out/training/demo/", f"{folder}/")
    return json.loads(text)


def run(module, values: dict) -> Path:
    settings = build(module.Settings, values)
    torch.manual_seed(settings.seed)
    return module.train(settings)


def small(packaged, lora: Lora = Lora(4, 8, 0.0), start_lora: str | None = None, **changes) -> TrainedLamed:
    """The demo's way of training, on the toy: rows for the added tokens, frozen language model."""
    start = Start(packaged, {**toy.PARTS, "max_position_embeddings": 512}, lora=start_lora, **changes)
    torch.manual_seed(3)
    return TrainedLamed(start, ("added_tokens", "vision_tower", "mm_projector", "seg_projector"), lora)


def asked(task: str, question: str, answer: str, space: bool = False) -> Sample:
    return Sample(np.zeros((1, *SIZE), np.float32), question, answer, None, space, task, "toy")


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


QUESTIONS = [
    asked("segment", "Segment it.", "It is [SEG].", True),
    asked("tumour", "Is there one?", "No."),
    asked("segment", "Where?", "[SEG] and [SEG]", True),
]


def _prompt(packaged) -> Prompt:
    tokenizer = starting_points.prepare_tokenizer(starting_points.open_language_model(packaged), PlainLayout)
    return Prompt(PlainLayout(tokenizer), 4, 512)


@pytest.mark.parametrize("weighting, power", [("tokens", 1.0), ("root", 0.5)])
def test_answers_weigh_by_their_tokens_or_by_the_root_of_them(packaged, weighting, power):
    prompt = _prompt(packaged)
    sequences = [sequence(prompt, q) for q in QUESTIONS]
    lengths = [len(s.ids) - s.answer_start for s in sequences]
    assert len(set(lengths)) == 3
    weights = pack([sequences], 3, 262, prompt.tokenizer.pad_token_id, weighting).answer_weights.split(lengths)
    torch.testing.assert_close(torch.stack([w.sum() for w in weights]), torch.tensor(lengths) ** power)


def test_question_and_answer_are_tokenised_in_one_piece_behind_the_image_tokens(packaged):
    prompt = _prompt(packaged)
    tokenizer, found = prompt.tokenizer, sequence(prompt, QUESTIONS[0])
    whole = tokenizer("<im_patch>" * 2 + " Segment it. It is [SEG].")["input_ids"]
    assert found.ids == [*whole[3:], tokenizer.eos_token_id]
    assert tokenizer.decode(found.ids[: found.answer_start]) == " Segment it."
    assert sequence(prompt, QUESTIONS[0], room=15).ids == found.ids[:15]


def _hidden(model, groups, visual_tokens):
    """Final states where answers are predicted, the answers, and the states that predict [SEG]."""
    head = torch.tensor([model.prompt.head] * len(groups))
    prefix, seg = head.shape[1] + visual_tokens.shape[1], model.config_json["seg_token_id"]
    batch = pack(groups, prefix, seg, model.tokenizer.pad_token_id)
    hidden = model.hidden(visual_tokens, head, batch.ids, batch.positions, batch.mask)
    return hidden[batch.answer_rows, batch.answer_columns], batch.answers, hidden[batch.state_rows, batch.state_columns]


def test_packed_questions_are_answered_as_if_each_stood_alone(packaged):
    model = small(packaged)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    assert_packed_equals_alone(model)


def test_they_look_back_no_further_than_phi3_s_window(tmp_path):
    phi3 = toy.language_model(tmp_path / "phi3", "phi3", sliding_window=6)
    model = TrainedLamed(Start(phi3, toy.PARTS), ("mm_projector",)).eval()
    with_window = assert_packed_equals_alone(model)
    model.lamed.llm.config.sliding_window = None
    assert (assert_packed_equals_alone(model) - with_window).abs().max() > 1e-3


def assert_packed_equals_alone(model) -> torch.Tensor:
    """Returns the states where answers are predicted."""
    torch.manual_seed(0)
    visual_tokens = torch.randn(1, model.prompt.num_visual_tokens, 32)
    sequences = [sequence(model.prompt, q) for q in QUESTIONS]
    with torch.no_grad():
        # Two scans, so that one group is padded.
        packed = _hidden(model, [sequences, sequences[:1]], visual_tokens.expand(2, -1, -1))
        alone = [_hidden(model, [[s]], visual_tokens) for s in (*sequences, sequences[0])]
    for together, single in zip(packed, map(torch.cat, zip(*alone))):
        torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-5)
    return packed[0]


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("at_decoder_grid", [False, True])
def test_losses_of_many_questions_in_a_batch_are_those_of_each_alone(packaged, at_decoder_grid, limit):
    """Two scans with questions that have a mask and a taught structure, a mask alone, two [SEG], or none of these."""
    model, rng = small(packaged).eval(), np.random.default_rng(0)
    torch.manual_seed(5)
    names = ("left lung", "heart", "right lung")
    model.teacher = torch.nn.Embedding(3, 32)
    packer = Packer(
        model.prompt,
        SIZE,
        model.config_json["seg_token_id"],
        256,
        grid=model.lamed.config.segmentation.grid,
        at_decoder_grid=at_decoder_grid,
        mask_limit=limit,
        taught=names,
    )

    def group(*asked) -> list:
        image = rng.random((1, *SIZE), np.float32)
        return [
            Sample(
                image,
                question,
                answer,
                rng.random((1, *SIZE)) < rng.random() if mask else None,
                True,
                "segment",
                "toy",
                structure,
            )
            for question, answer, mask, structure in asked
        ]

    groups = [
        group(("Is it?", "No.", False, None), ("Segment it.", "It is [SEG].", True, "right lung")),
        group(
            ("Where?", "[SEG] and [SEG]", True, None),
            ("Say [SEG].", "[SEG]", False, "heart"),
            ("And this?", "[SEG]", True, "left lung"),
            ("Why?", "So.", False, None),
        ),
    ]
    with torch.no_grad():
        batch = packer(groups)
        together = model(**batch)["parts"]
        alone = [(sample, packer([[sample]])) for part in groups for sample in part]
        found = [(sample, single, model(**{**single, "totals": batch["totals"]})["parts"]) for sample, single in alone]
    segmenting = [(sample, single, losses) for sample, single, losses in found if sample.mask is not None]
    expected = {
        "language": sum(losses["language"] for _, _, losses in found),
        "mask": sum(losses["mask"] for _, _, losses in segmenting[:limit]),
        "prompt": sum(losses["prompt"] for _, _, losses in segmenting),
    }
    for part, value in expected.items():
        torch.testing.assert_close(together[part], value, atol=1e-5, rtol=1e-5, msg=part)
        assert value > 0
    for part, total in {
        "language": sum(single["totals"]["language"] for _, single in alone),
        "mask": limit or 3,
        "prompt": 2,
    }.items():
        assert batch["totals"][part] == total
    assert batch["taught"].tolist() == [2, -1, 0] and batch["mask_rows"].tolist() == [0, 1, 1][:limit]
    for (sample, _, _), target in zip(segmenting[:limit], batch["masks"], strict=True):
        mask = sample.mask[0].astype(np.float32)
        if at_decoder_grid:  # 8 x 8 x 8 cells
            mask = np.array(
                [
                    [[mask[z, y : y + 4, x : x + 4].mean() for x in range(0, 32, 4)] for y in range(0, 32, 4)]
                    for z in range(8)
                ]
            )
        np.testing.assert_allclose(target.numpy(), mask, atol=1e-6)


def test_only_answers_and_their_end_are_learned(packaged):
    prompt = _prompt(packaged)
    tokenizer, seg = prompt.tokenizer, prompt.tokenizer.convert_tokens_to_ids("[SEG]")
    batch = pack([[sequence(prompt, q) for q in QUESTIONS]], 3, seg, tokenizer.pad_token_id)
    assert tokenizer.decode(batch.answers) == " It is [SEG].</s> No.</s> [SEG] and [SEG]</s>"
    # Each is predicted one position before it stands.
    inside = batch.answer_columns - 3 + 1
    torch.testing.assert_close(batch.ids[0, inside], batch.answers)
    assert batch.ids[0, batch.state_columns - 3 + 1].tolist() == [seg] * 3 and batch.state_owners.tolist() == [0, 2, 2]


def test_prompts_begin_with_bos_and_image_tokens(packaged):
    prompt = _prompt(packaged)
    tokenizer, letter = prompt.tokenizer, prompt.tokenizer.convert_tokens_to_ids("H")
    assert prompt.input_ids("Hi")[:6] == [257, 259, 259, 259, 259, letter]
    assert tokenizer.convert_tokens_to_ids("[SEG]") == small(packaged).config_json["seg_token_id"] == 262


def test_rows_for_the_added_tokens_extend_the_frozen_table_at_both_ends():
    table = torch.nn.Embedding(5, 3)
    grown = GrownEmbedding(table, 2)
    whole = torch.cat([table.weight, grown.added])
    torch.testing.assert_close(grown(torch.arange(7)), whole)
    hidden = torch.randn(4, 3)
    torch.testing.assert_close(GrownHead(grown)(hidden), hidden @ whole.T)
    assert [name for name, p in grown.named_parameters() if p.requires_grad] == ["added"]


def test_the_demo_s_stages_run_in_order_and_end_in_a_checkpoint_that_the_engine_composes(packaged, scans, tmp_path):
    """Each stage starts from what the ones before it wrote; what is frozen stays, the rest moves."""
    for name, module in (
        ("1_pretrain_segvol", pretrain_segvol),
        ("2_refine_segvol", pretrain_segvol),
        ("3_align_projector", align_projector),
        ("4_learn_boxes", finetune),
        ("5_finetune", finetune),
    ):
        run(module, demo(name, tmp_path))
    first, refined, aligned, boxes, tuned = (
        load_file(tmp_path / name / "final" / "model.safetensors")
        for name in ("1_pretrain_segvol", "2_refine_segvol", "3_align_projector", "4_learn_boxes", "5_finetune")
    )
    assert torch.equal(first["prompts.weight"], refined["prompts.weight"])
    moved = [key for key in refined if not torch.equal(first[key], refined[key])]
    assert "model.mask_decoder.mask_tokens.weight" in moved and "model.image_encoder.norm.weight" in moved
    for key in refined:
        if key.startswith("model."):
            assert torch.equal(tuned[key.replace("model.", "model.seg_module.", 1)], refined[key]), key
    projector = "model.mm_projector.projector.0.weight"
    assert torch.equal(tuned[projector], boxes[projector]) and torch.equal(boxes[projector], aligned[projector])
    assert not any("seg_" in key for key in boxes)
    merge = build(
        merge_lora.Settings,
        json.loads((CONFIGS / "6_merge_lora.json").read_text().replace("out/training/demo/", f"{tmp_path}/")),
    )
    lamed, tokenizer = checkpoint.load_lamed(merge_lora.merge(merge))
    trained = small(packaged, lora=Lora(8, 16, 0.0))
    trained.restore(tmp_path / "5_finetune" / "final")
    trained.eval()
    image, s = torch.rand(1, 1, *SIZE), sequence(trained.prompt, QUESTIONS[0])
    with torch.no_grad():
        tokens = trained.lamed.encode_images(image)
        # The merged copy holds half precision.
        torch.testing.assert_close(lamed.encode_images(image), tokens, atol=2e-3, rtol=2e-3)
        hidden, answers, _ = _hidden(trained, [[s]], tokens)
        ids = torch.tensor([[tokenizer.bos_token_id, *[0] * tokens.shape[1], *s.ids]])
        out = lamed.llm(inputs_embeds=lamed.prompt_embeddings(ids, tokens, 1)).logits
        torch.testing.assert_close(
            out[0, -len(answers) - 1 : -1], trained.lamed.llm.lm_head(hidden), atol=2e-2, rtol=2e-2
        )


def test_finetune_goes_on_with_the_lora_and_the_added_tokens_of_an_earlier_one(packaged, scans, tmp_path):
    values = demo("4_learn_boxes", tmp_path)
    values["start"] |= {"vision_tower": None, "mm_projector": None}
    final = run(finetune, values)
    values["start"]["lora"] = str(final)
    model, _ = finetune.build(build(finetune.Settings, values))
    model.write(_folder(tmp_path / "again"), model.state_dict())
    for file in ("adapter_model.safetensors", "model.safetensors"):
        before, after = load_file(final / file), load_file(tmp_path / "again" / file)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    # A part that the settings name comes from there; segmentation, which the earlier one had not, begins anew.
    other = small(packaged)
    other.write(_folder(tmp_path / "other"), other.state_dict())
    values["start"] |= {"vision_tower": str(tmp_path / "other"), "model": {**toy.PARTS, "max_position_embeddings": 512}}
    mixed, _ = finetune.build(build(finetune.Settings, values))
    for key, value in mixed.lamed.vision_tower.state_dict().items():
        assert torch.equal(value, other.lamed.vision_tower.state_dict()[key])
    assert torch.equal(mixed.lamed.llm.model.embed_tokens.added, model.lamed.llm.model.embed_tokens.added)
    moved = load_file(final / "adapter_model.safetensors")
    assert all(value.any() for key, value in moved.items() if "lora_B" in key)
    values["lora"] |= {"r": 4}
    with pytest.raises(InvalidInput, match="start.lora .* has r 8 and alpha 16; .*r=4"):
        finetune.build(build(finetune.Settings, values))


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("adapter_config.json", lambda c: c.update(use_rslora=True), "has use_rslora, which is not trained here"),
        ("adapter_config.json", lambda c: c.update(base_model_name_or_path="else"), "trained on else, not on"),
        ("adapter_config.json", lambda c: c.pop("peft_type"), "describes no LoRA"),
        ("adapter_model.safetensors", lambda t: t.pop(sorted(t)[0]), "does not fit the model: 1 missing"),
        ("adapter_model.safetensors", lambda t: t.update(x=torch.zeros(1)), "1 unexpected"),
        ("adapter_model.safetensors", lambda t: t[sorted(t)[0]].fill_(float("nan")), "not finite"),
        ("model.safetensors", lambda t: t.pop(base.ADDED_TOKENS), "does not fit the model: 1 missing"),
    ],
)
def test_an_earlier_lora_that_cannot_be_gone_on_with_is_refused(packaged, tmp_path, file, change, named):
    model, folder = small(packaged), _folder(tmp_path / "earlier")
    model.write(folder, model.state_dict())
    json_file = file.endswith(".json")
    content = json.loads((folder / file).read_text()) if json_file else load_file(folder / file)
    change(content)
    (folder / file).write_text(json.dumps(content)) if json_file else save_file(content, folder / file)
    with pytest.raises((CheckpointError, InvalidInput), match=named):
        small(packaged, start_lora=str(folder))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_demo_s_clip_runs(scans, tmp_path):
    encoder = toy.text_encoder(tmp_path / "bert")
    values = demo("7_pretrain_clip", tmp_path, text_encoder=encoder, vision_tower=None, max_text_len=32)
    checkpoint.load_clip(run(pretrain_clip, values))


def test_texts_longer_than_the_text_encoder_reads_are_refused(tmp_path):
    encoder = toy.text_encoder(tmp_path / "bert")
    values = demo("7_pretrain_clip", tmp_path, text_encoder=encoder, vision_tower=None)
    del values["max_text_len"]  # 512 then, as the reference trains
    for changes, length in (({}, 512), ({"max_text_len": 65}, 65)):
        with pytest.raises(InvalidInput, match=f"max_text_len {length} is more than the text encoder's 64 positions"):
            pretrain_clip.build(build(pretrain_clip.Settings, values | changes))
    pretrain_clip.build(build(pretrain_clip.Settings, values | {"max_text_len": 64}))


def test_a_packaged_text_encoder_that_was_not_trained_is_named_and_left_out(scans, tmp_path, monkeypatch):
    encoder = Path(toy.text_encoder(tmp_path / "bert"))
    monkeypatch.setattr("m3d_demo.packages.fetch", lambda package, version, files: {f: encoder / f for f in files})
    packaged = {"package": "bert", "version": "1", "files": ["config.json", "model.safetensors", "tokenizer.json"]}
    values = demo("7_pretrain_clip", tmp_path, text_encoder=packaged, max_text_len=32)
    final = run(pretrain_clip, values)
    assert {file.name for file in final.iterdir()} == {"config.json", "model.safetensors"}
    assert not any(key.startswith("language_encoder.") for key in load_file(final / "model.safetensors"))
    clip, tokenizer_folder = checkpoint.load_clip(final)
    assert tokenizer_folder == encoder
    for key, value in load_file(encoder / "model.safetensors").items():
        assert torch.equal(clip.language_encoder.state_dict()[key], value)
    model = pretrain_clip.build(build(pretrain_clip.Settings, values))
    model.restore(final)
    # Kept as it is, it has no dropout while the others are trained.
    assert model.train().clip.mm_vision_proj.training and not model.clip.language_encoder.training
    assert all(torch.equal(value, clip.state_dict()[key]) for key, value in model.clip.state_dict().items())


def test_views_depend_on_seed_epoch_and_index_alone(scans):
    settings = build(views.ScanSettings, demo("5_finetune", Path("x"))["data"]["scans"])
    data = views.ViewQuestions(views.Views(settings, 5, SIZE))
    again = views.ViewQuestions(views.Views(settings, 5, SIZE))
    again[0, 1]
    a, b, other = data[2, 3], again[2, 3], data[3, 3]
    assert [(s.question, s.answer) for s in a] == [(s.question, s.answer) for s in b] and len(a) == 6
    assert np.array_equal(a[0].image, b[0].image) and not np.array_equal(a[0].image, other[0].image)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"train": {"chest-ct-9": 1}}, "data.scans.train names chest-ct-9; known scans: chest-ct-1"),
        ({"train": {"chest-ct-1": 0}}, "data.scans.train draws no scan"),
        ({"tasks": {"boxes": 1}}, "data.scans.tasks names boxes; known tasks: .*name_box"),
        ({"tasks": {"box": 0}}, "data.scans.tasks draws no task"),
        ({"per_view": 0}, "per_view .* must be positive, not 0"),
        ({"fine_grid": [0, 48, 48]}, "fine_grid must be positive"),
        ({"tasks": {"side": 1}}, "data.scans.tasks has no question about chest-ct-1"),
    ],
)
def test_scans_and_tasks_that_are_unknown_or_never_drawn_are_refused(scans, change, named):
    settings = {**demo("4_learn_boxes", Path("x"))["data"]["scans"], **change}
    with pytest.raises(InvalidInput, match=named):
        views.ViewQuestions(views.Views(build(views.ScanSettings, settings), 5, SIZE))


def test_visual_tokens_are_led_to_the_words_of_the_scan_and_of_their_own_part(packaged, scans):
    """The lens compares with every word; a token that is exactly the right mixture of words has the least loss."""
    table = torch.randn(262, 64)
    lens = align_projector.Lens(["CT", "chest", "left lung", "right lung"], _prompt(packaged).tokenizer, table)
    view = view_of(scans[0], None, SIZE, np.random.default_rng(0))
    target = align_projector.words_of(view, lens, (1, 1, 2))
    left, right, about = lens.row(["left lung"]), lens.row(["right lung"]), lens.row(["CT", "chest"])
    # Seen from the front: the phantom's left lung lies on the higher columns.
    np.testing.assert_allclose(target, np.stack([about + right, about + left]) / 2, atol=1e-6)
    words = torch.eye(len(lens.ids)) @ lens.words_WH * lens.length + lens.mean
    ids, one_hot = torch.tensor(target[None]).argmax(-1), torch.eye(len(lens.ids))
    best = sum(lens.losses(words[ids], one_hot[ids]))
    assert best < sum(lens.losses(words[(ids + 1) % len(lens.ids)], one_hot[ids]))
    assert best < sum(lens.losses(3 * words[ids], one_hot[ids]))


def test_prompts_are_taught_for_both_sides_of_every_structure():
    vision = ViTConfig(image_size=SIZE, patch_size=(4, 16, 16), **toy.VIT)
    taught = pretrain_segvol.TaughtSegVol(vision, {"left lung", "body"})
    assert taught.names == ("body", "left lung", "right lung")
    assert all(swap_sides(name) in taught.names for name in taught.names)


# --- starting points -------------------------------------------------------------------------------------------------
def test_published_parts_load_as_the_reference_loads_them(packaged, tmp_path):
    source, model = small(packaged), small(packaged)
    for p in model.parameters():
        p.data.add_(1)
    vit = source.lamed.vision_tower.vision_tower.state_dict()
    torch.save(vit, tmp_path / "pretrained_ViT.bin")
    segvol = {f"model.{key}": value for key, value in source.lamed.seg_module.state_dict().items()}
    torch.save(
        {**segvol, "model.text_encoder.weight": torch.zeros(3), "text_encoder.x": torch.zeros(2)},
        tmp_path / "pytorch_model.bin",
    )
    projector = {f"model.mm_projector.{key}": value for key, value in source.lamed.mm_projector.state_dict().items()}
    rows = torch.randn(4, 32)
    torch.save({**projector, "model.embed_tokens.weight": rows}, tmp_path / "mm_projector.bin")
    starting_points.load_vision_tower(model.lamed.vision_tower.vision_tower, str(tmp_path / "pretrained_ViT.bin"))
    starting_points.load_segvol(model.lamed.seg_module, str(tmp_path / "pytorch_model.bin"))
    found = starting_points.load_projector(model.lamed.mm_projector, str(tmp_path / "mm_projector.bin"))
    for part in ("vision_tower", "seg_module", "mm_projector"):
        theirs = getattr(source.lamed, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(model.lamed, part).state_dict().items())
    assert torch.equal(found, rows)
    started = small(packaged, mm_projector=str(tmp_path / "mm_projector.bin"))
    assert torch.equal(started.lamed.llm.model.embed_tokens.added, rows)


def test_rows_of_added_tokens_go_where_the_tokens_are_though_the_table_has_spare_rows(tmp_path):
    """As Phi-3's has. They begin with the mean of the known tokens; nothing else in the table changes."""
    source = toy.language_model(tmp_path / "phi3", "phi3", vocab_size=270)
    model = TrainedLamed(Start(source, toy.PARTS), ("embeddings", "lm_head"))
    assert model.added_ids == [259, 260, 261, 262]
    theirs = load_file(Path(source) / "model.safetensors")
    for key, now in (("model.embed_tokens", model.lamed.llm.model.embed_tokens), ("lm_head", model.lamed.llm.lm_head)):
        old = theirs[f"{key}.weight"]
        expected = torch.cat([old[:259], old[:259].mean(0).expand(4, -1), old[263:]])
        torch.testing.assert_close(now.weight.detach(), expected, atol=0, rtol=0)
    projector = {f"model.mm_projector.{key}": value for key, value in model.lamed.mm_projector.state_dict().items()}
    rows, table = torch.randn(4, 32), torch.randn(270, 32)
    for found, wanted in (
        (rows, {**dict(enumerate(model.lamed.llm.model.embed_tokens.weight.detach())), **dict(enumerate(rows, 259))}),
        (table, dict(enumerate(table))),
    ):
        torch.save({**projector, "model.embed_tokens.weight": found}, tmp_path / "mm_projector.bin")
        start = Start(source, toy.PARTS, mm_projector=str(tmp_path / "mm_projector.bin"))
        weight = TrainedLamed(start, ("embeddings",)).lamed.llm.model.embed_tokens.weight.detach()
        assert len(weight) == 270 and all(torch.equal(weight[k], row) for k, row in wanted.items())


def test_added_rows_are_taken_from_a_whole_table(packaged, tmp_path):
    projector = {
        f"model.mm_projector.{key}": value for key, value in small(packaged).lamed.mm_projector.state_dict().items()
    }
    table = torch.randn(263, 32)
    torch.save({**projector, "model.embed_tokens.weight": table}, tmp_path / "mm_projector.bin")
    started = small(packaged, mm_projector=str(tmp_path / "mm_projector.bin"))
    assert torch.equal(started.lamed.llm.model.embed_tokens.added, table[259:])
    torch.save({**projector, "model.embed_tokens.weight": table[:259]}, tmp_path / "mm_projector.bin")
    with pytest.raises(InvalidInput, match=r"\[259, 32\]; wanted are all \[263, 32\] or the rows of the 4"):
        small(packaged, mm_projector=str(tmp_path / "mm_projector.bin"))


def test_a_file_of_another_model_or_with_code_in_it_is_refused(packaged, tmp_path):
    model = small(packaged)
    segvol = {f"model.{key}": value for key, value in model.lamed.seg_module.state_dict().items()}
    segvol.pop("model.image_encoder.norm.weight")
    torch.save(segvol, tmp_path / "cut.bin")
    with pytest.raises(CheckpointError, match="1 missing.*image_encoder.norm.weight"):
        starting_points.load_segvol(model.lamed.seg_module, str(tmp_path / "cut.bin"))
    with pytest.raises(CheckpointError, match="segmentation module|vision tower"):
        starting_points.load_vision_tower(model.lamed.vision_tower.vision_tower, str(tmp_path / "cut.bin"))
    torch.save({"cls_token": Path("x")}, tmp_path / "code.bin")
    with pytest.raises(CheckpointError, match="weights_only"):
        starting_points.load_vision_tower(model.lamed.vision_tower.vision_tower, str(tmp_path / "code.bin"))
    with pytest.raises(CheckpointError, match="is not there"):
        starting_points.load_segvol(model.lamed.seg_module, str(tmp_path / "absent.bin"))
    wide = {f"model.mm_projector.{key}": torch.zeros(7, 7) for key in model.lamed.mm_projector.state_dict()}
    torch.save(wide, tmp_path / "wide.bin")
    with pytest.raises(CheckpointError, match=r"of another shape.*\[7, 7\]"):
        starting_points.load_projector(model.lamed.mm_projector, str(tmp_path / "wide.bin"))


def test_a_tokenizer_whose_added_tokens_have_no_rows_is_refused(dev_small, tmp_path):
    import shutil

    folder = shutil.copytree(dev_small.folder, tmp_path / "checkpoint")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    rows = dev_small.spec["config"]["vocab_size"]
    tokenizer["model"]["vocab"]["[SEG]"] = rows + 3
    for token in tokenizer["added_tokens"]:
        if token["content"] == "[SEG]":
            token["id"] = rows + 3
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=rf"no room for \[SEG\] \({rows + 3}\).*{rows} rows"):
        TrainedLamed(Start(str(folder)), ("mm_projector",))


def test_a_published_checkpoint_is_a_starting_point(dev_small):
    model = TrainedLamed(Start(str(dev_small.folder)), ("mm_projector", "seg_module"), Lora(2, 4, 0.0))
    image = dev_small.volume[:1]
    lamed, _ = checkpoint.load_lamed(dev_small.folder)
    with torch.no_grad():
        torch.testing.assert_close(model.lamed.eval().encode_images(image), lamed.encode_images(image))


def test_a_language_model_of_an_unknown_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(CheckpointError, match="'mistral'.*llama, phi3, qwen2.*'lamed_llama' .LLaMA"):
        starting_points.open_language_model(str(tmp_path))


@pytest.mark.parametrize("model_type", ["lamed_phi3", "lamed_nothing"])
def test_a_family_that_the_language_model_cannot_have_is_refused_with_those_that_it_can(tmp_path, model_type):
    source = toy.language_model(tmp_path / "llama")
    with pytest.raises(InvalidInput, match=f"model_type '{model_type}'.*lamed_llama, lamed_llama3"):
        TrainedLamed(Start(source, {**toy.PARTS, "model_type": model_type}), ("mm_projector",))
    with pytest.raises(CheckpointError, match=r"does not know <\|eot_id\|>"):
        TrainedLamed(Start(source, {**toy.PARTS, "model_type": "lamed_llama3"}), ("mm_projector",))


def test_a_language_model_whose_layers_look_back_differently_is_refused(tmp_path):
    changes = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    source = toy.language_model(tmp_path / "qwen", "qwen2-chat", **changes)
    with pytest.raises(CheckpointError, match="some layers look back over a window"):
        TrainedLamed(Start(source, toy.PARTS), ("mm_projector",))


def test_the_committed_demo_holds_what_its_config_promises_and_is_small():
    config = json.loads((DEMO / "config.json").read_text())
    with torch.device("meta"):
        shapes = checkpoint.lamed_shapes(Lamed(LamedConfig.from_dict(config)))
    ours = {key: shape for key, shape in shapes.items() if key.startswith(tuple(checkpoint.PARTS))}
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        # safe_open is not iterable
        held = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    added = held.pop(base.ADDED_TOKENS)
    assert held == ours and added[1] == config["hidden_size"]
    with safe_open(DEMO / "adapter_model.safetensors", "pt") as file:
        lora = list(file.keys())
        targets = {key.split(".lora_")[0].removeprefix("base_model.model.") + ".weight" for key in lora}
        assert len(lora) == 2 * len(targets) == 2 * 7 * config["num_hidden_layers"] and targets <= set(shapes)
        for key in lora:
            assert torch.isfinite(file.get_tensor(key)).all()
    with safe_open(DEMO / "clip" / "model.safetensors", "pt") as file:
        assert not any(key.startswith(checkpoint.TEXT_ENCODER) for key in file.keys())  # noqa: SIM118
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 40e6


def test_the_demo_was_measured_above_its_bars_and_in_every_task_above_chance():
    measured = json.loads((DEMO / "metrics.json").read_text())["held_out_augmentations"]
    assert set(measured["tasks"]) == set(KINDS)
    for name, figure in measured["tasks"].items():
        assert figure["interval"][0] > figure["chance"], name
    assert measured["closed_questions"]["mean"] >= 0.85 and measured["segmentation"]["mean_dice_large"] >= 0.7
