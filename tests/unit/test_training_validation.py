"""What evaluation while training promises: figures of the validation split by task, pictures of predictions, and a
run that ends as it would have without them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.errors import InvalidInput
from engine.prompt import format_box
from tests import m3d_data
from tests import toy_models as toy
from tests.m3d_data import LIVER, RIGHT_KIDNEY, SIZE
from training import finetune, pretrain_clip, pretrain_segvol, trainer, validation
from training.config import build, check_trainer
from training.data.sample import Sample
from training.data.selection import open_held_out, open_questions
from training.data.sets import box_of
from training.lamed import Reply
from training.pictures import picture
from training.validation import score

pytestmark = pytest.mark.integration
TASKS = ["caption", "vqa_closed", "vqa_yes_no", "segmentation", "rec", "reg", "refseg"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return m3d_data.write_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return toy.language_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def configuration(out: Path, data: Path, llm: str, evaluate: bool = True, tasks=TASKS, **changes) -> dict:
    settings = {"eval_strategy": "steps", "eval_steps": 2} if evaluate else {}
    values = toy.finetune_configuration(out, data, llm, **settings)
    m3d = {**values["data"]["m3d"], "tasks": tasks}
    if evaluate:
        m3d["validation"] = {"samples": 3, "answers": 2, **changes}
    return {**values, "data": {"m3d": m3d}}


def run(module, values: dict) -> Path:
    settings = build(module.Settings, values)
    torch.manual_seed(settings.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return module.train(settings)
    finally:
        torch.set_num_threads(threads)


def curves(out: Path) -> EventAccumulator:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def measured(tmp_path_factory, data, llm) -> Path:
    return run(finetune, configuration(tmp_path_factory.mktemp("runs") / "measured", data, llm))


# --- scores ----------------------------------------------------------------------------------------------------------
def asked(task: str, answer: str, question: str = "?", mask=None, structure: str | None = None) -> Sample:
    return Sample(np.zeros((1, *SIZE), np.float32), question, answer, mask, True, task, "toy", structure)


LEFT, BOTH = m3d_data.mask(LIVER), m3d_data.mask(LIVER, RIGHT_KIDNEY)
BOX = format_box(box_of(LEFT[0]))


@pytest.mark.parametrize(
    "sample, said, mask, expected",
    [
        (asked("segmentation", "It is [SEG].", mask=LEFT), "[SEG]", LEFT[0], {"dice": 1.0}),
        (
            asked("refseg", "It is [SEG].", mask=LEFT),
            "[SEG]",
            BOTH[0],
            {"dice": 2 * LEFT.sum() / (LEFT.sum() + BOTH.sum())},
        ),
        (asked("segmentation", "It is [SEG].", mask=LEFT), "It is not there.", None, {"dice": 0.0}),
        (asked("segmentation", "There is no liver."), "[SEG]", LEFT[0], {"denied": 0.0}),
        (asked("segmentation", "There is no liver."), "I see none.", None, {"denied": 1.0}),
        (asked("refseg", "Nothing is wrong."), "[SEG]", LEFT[0], {}),
        (asked("rec", f"It is at {BOX}."), f"Here: {BOX}.", None, {"iou": 1.0}),
        (asked("rec", f"It is at {BOX}."), "Here.", None, {"iou": 0.0}),
        (asked("rec", "There is no liver."), f"{BOX}", None, {"denied": 0.0}),
        (asked("reg", "It is the liver.", f"What is {BOX}?", structure="liver"), "The Liver.", None, {"named": 1.0}),
        (asked("reg", "It is the liver.", f"What is {BOX}?", structure="liver"), "The heart.", None, {"named": 0.0}),
        (asked("reg", "There is no liver.", "Where is the liver?", structure="liver"), "The liver", None, {}),
        (asked("vqa_closed", "A. Axial"), " A. Axial", None, {"right": 1.0}),
        (asked("vqa_closed", "A. Axial"), "B. Axial", None, {"right": 0.0}),
        (asked("vqa_yes_no", "No"), "no.", None, {"right": 1.0}),
        (asked("vqa_open", "Left lung"), "Lung", None, {"right": 0.0}),
        (asked("caption", "A report."), "A report.", None, {}),
    ],
)
def test_an_answer_is_scored_as_its_task_asks(sample, said, mask, expected):
    assert score(sample, Reply(said, mask)) == pytest.approx(expected)


# --- samples ---------------------------------------------------------------------------------------------------------
def held_out(tmp_path, data, llm, tasks=TASKS, **changes):
    return open_held_out(
        build(finetune.Settings, configuration(tmp_path / "run", data, llm, tasks=tasks, **changes)), SIZE
    )


def test_the_samples_are_of_every_task_and_data_set_and_never_of_training(tmp_path, data, llm):
    found = held_out(tmp_path, data, llm, samples=3)
    # Questions for yes or no were published for training only.
    assert list(found.tasks) == [task for task in TASKS if task != "vqa_yes_no"]
    assert [len(found.chosen[task]) for task in found.tasks] == [1, 1, 3, 3, 3, 2]
    sources = [found.read(task, k).source for task in found.tasks for k in range(len(found.chosen[task]))]
    assert {Path(source).parent.parent.name for source in sources} >= {"0000", "0010"}
    values = configuration(tmp_path / "run", data, llm, tasks=list(found.tasks))
    questions = open_questions(build(finetune.Settings, values), SIZE)
    assert not set(sources) & {sample.source for k in range(len(questions)) for sample in questions[0, k]}


def test_those_that_are_answered_are_spread_over_all(tmp_path, data, llm):
    found = held_out(tmp_path, data, llm, ["rec"], samples=6, answers=2)
    assert found.chosen["rec"] == [0, 5, 1, 2, 3, 4]


def test_they_are_the_same_and_unchanged_whenever_they_are_read(tmp_path, data, llm):
    one, other = (held_out(tmp_path, data, llm).read("segmentation", 1) for _ in range(2))
    assert one.question == other.question and np.array_equal(one.image, np.load(one.source))


def test_a_broken_one_is_left_out(tmp_path, llm, caplog):
    root = m3d_data.write_root(tmp_path / "root")
    (root / "M3D_Seg_npy/0010/b/masks/mask_1.npy").write_bytes(b"")
    found = held_out(tmp_path, root, llm, ["rec"], samples=6, answers=2)
    assert [found.read("rec", k) is None for k in range(6)] == [False, True, False, False, False, True]
    assert len(found.shown()) == 1 and "0010/b/masks/mask_1.npy" in caplog.text


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_sample_is_measured_by_one_process_and_all_have_as_many_batches(tmp_path, data, llm, processes):
    found, seen = held_out(tmp_path, data, llm, samples=6), []
    for rank in range(processes):
        arguments = SimpleNamespace(per_device_eval_batch_size=2, world_size=processes, process_index=rank)
        batches = validation._Batches(found, list, SimpleNamespace(args=arguments))
        seen.append([batches.places[k] for k in range(len(batches))])
    assert len({tuple(task for task, _ in places) for places in seen}) == 1
    everything = sorted((task, number) for places in seen for task, numbers in places for number in numbers)
    assert everything == sorted((task, k) for task, chosen in found.chosen.items() for k in range(len(chosen)))


# --- runs ------------------------------------------------------------------------------------------------------------
def test_figures_of_every_task_stand_beside_the_curves_of_training(measured):
    events = curves(measured.parent)
    losses = {f"eval/{task}_loss_language" for task in TASKS if task != "vqa_yes_no"}
    scores = {"eval/segmentation_dice", "eval/refseg_dice", "eval/rec_iou", "eval/reg_named", "eval/vqa_closed_right"}
    names = {*losses, *scores, "eval/loss", "eval/caption_token_accuracy", "eval/segmentation_loss_mask"}
    assert names <= set(events.Tags()["scalars"])
    assert "eval/caption_loss_mask" not in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("eval/rec_iou")] == [2, 4]
    assert len(events.Scalars("train/loss")) == 4


def test_a_loss_is_the_mean_over_the_answer_tokens_of_its_task(measured, data, llm):
    settings = build(finetune.Settings, configuration(measured.parent, data, llm))
    model, packer = finetune.build(settings)
    model.restore(measured)
    model.eval()
    found = open_held_out(settings, SIZE)
    batch = packer([[found.read("segmentation", k)] for k in range(3)])
    with torch.no_grad():
        parts = model(**batch)["parts"]
    events = curves(measured.parent)
    for name, value in (("loss_language", parts["language"]), ("loss_mask", parts["mask"])):
        assert events.Scalars(f"eval/segmentation_{name}")[-1].value == pytest.approx(float(value), rel=1e-4)
    right = events.Scalars("eval/segmentation_token_accuracy")[-1].value
    assert right == pytest.approx(float(parts["token_accuracy"]), abs=1e-6)


def test_a_run_ends_with_the_same_bits_measured_or_not(tmp_path, data, llm, measured):
    plain = run(finetune, configuration(tmp_path / "plain", data, llm, evaluate=False))
    for file in ("model.safetensors", "adapter_model.safetensors"):
        ours, theirs = load_file(measured / file), load_file(plain / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_run_that_is_measured_otherwise_goes_on(tmp_path, data, llm, measured, monkeypatch, capsys):
    values = {**configuration(measured.parent, data, llm, samples=2), "sample_every": 3}
    values["trainer"]["eval_steps"] = 1
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(toy.written(values, tmp_path / "c.json"))])
    trainer.main("", finetune.Settings, finetune.train)
    assert "nothing to do" in capsys.readouterr().out


def test_predictions_of_the_validation_split_are_drawn(measured):
    events = curves(measured.parent)
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("answers:") == 6 and "000004/Axial.npy" in text
    # caption and closed question have nothing to draw.
    assert set(events.Tags()["images"]) == {f"samples/{k}" for k in (2, 3, 4, 5)}


def test_m3d_clip_is_measured_by_what_it_finds(tmp_path, data, monkeypatch):
    encoder = toy.text_encoder(tmp_path / "tiny-bert")
    values = toy.clip_configuration(tmp_path / "run", data, encoder, eval_strategy="steps", eval_steps=4)
    values["data"]["m3d"]["validation"] = {"split": "train", "samples": 4}
    run(pretrain_clip, values)
    events = curves(tmp_path / "run")
    for name in ("eval/text_retrieval", "eval/scan_retrieval"):
        (found,) = events.Scalars(name)
        assert found.step == 4 and found.value in (0, 0.25, 0.5, 0.75, 1)


# --- boards ----------------------------------------------------------------------------------------------------------
def test_pictures_go_to_weights_and_biases_where_curves_do(tmp_path, data, llm, monkeypatch):
    logged, wandb = [], ModuleType("wandb")
    wandb.Image = lambda picture, caption: (picture.shape, caption)
    wandb.Table = lambda columns, data: data
    wandb.log = logged.append
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    board = trainer._Board(None, ["wandb"], 1)
    board._show([trainer.Prediction("one"), trainer.Prediction("two", np.zeros((4, 5, 3), np.uint8))], 7)
    assert logged == [{"samples": [((4, 5, 3), "two")], "answers": [["one"], ["two"]], "train/global_step": 7}]


def test_no_board_is_written_where_none_is_asked_for(tmp_path, data, llm):
    values = configuration(tmp_path / "run", data, llm, evaluate=False)
    values["trainer"] |= {"report_to": "none", "max_steps": 1}
    run(finetune, values)
    assert not (tmp_path / "run" / "tensorboard").exists() and not (tmp_path / "run" / "runs").exists()


# --- pictures --------------------------------------------------------------------------------------------------------
def coloured(drawn: np.ndarray, colour: str) -> np.ndarray:
    """[N, 2] the rows and columns of a colour, as shares of the picture."""
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
    near = (np.abs(drawn.astype(int) - wanted).sum(2) < 120).nonzero()
    return np.stack(near, axis=1) / drawn.shape[:2]


def test_outlines_and_boxes_lie_where_masks_and_boxes_are():
    from training.pictures import PREDICTED, TRUE

    volume = m3d_data.image(0)
    truth, said = m3d_data.mask(LIVER), m3d_data.mask(RIGHT_KIDNEY)
    sample = Sample(volume, "Segment it.", "[SEG]", truth, True, "segmentation", "toy")
    with_masks = picture(sample, "[SEG]", said[0])
    boxes = [format_box(box_of(found[0])) for found in (truth, said)]
    with_boxes = picture(Sample(volume, "Where?", boxes[0], None, True, "rec", "toy"), boxes[1], None)
    for drawn, margin in ((with_masks, 0.03), (with_boxes, 0.03)):
        for colour, place in ((TRUE, LIVER), (PREDICTED, RIGHT_KIDNEY)):
            found = coloured(drawn, colour)
            assert len(found) > 10
            for axis, span in ((0, place[1]), (1, place[2])):
                assert abs(found[:, axis].min() - span.start / 32) < margin
                assert abs(found[:, axis].max() - span.stop / 32) < margin
    assert picture(Sample(volume, "Which plane?", "Axial", None, True, "vqa_open", "toy"), "Coronal", None) is None


# --- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change, named",
    [
        ({"eval_strategy": "no"}, "data.m3d.validation needs trainer.eval_strategy"),
        ({"split": "test9"}, "has no split 'test9'"),
        ({"tasks": ["vqa_yes_no"]}, "none of the tasks was published with anything but a training split"),
        ({"root": "nowhere"}, "the data root nowhere is not a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_loads(tmp_path, data, llm, change, named, monkeypatch):
    def load(*arguments):
        raise AssertionError("the model was loaded")

    values = configuration(tmp_path / "run", data, llm)
    if "eval_strategy" in change:
        values["trainer"].pop("eval_strategy")
    m3d = values["data"]["m3d"]
    m3d["validation"]["split"] = change.get("split", "validation")
    m3d |= {key: change[key] for key in ("tasks", "root") if key in change}
    monkeypatch.setattr(finetune, "build", load)
    with pytest.raises(InvalidInput, match=named):
        finetune.train(build(finetune.Settings, values))


def test_views_of_packaged_scans_have_nothing_to_be_measured_on(tmp_path):
    from tests.conftest import ROOT
    from training.config import read

    settings = read(pretrain_segvol.Settings, ROOT / "training/configs/demo/1_pretrain_segvol.json")
    settings.trainer["eval_strategy"] = "steps"
    check_trainer(settings.trainer)
    with pytest.raises(InvalidInput, match="data.scans have no validation split"):
        open_held_out(settings, SIZE)
