"""What training promises about broken samples: named, counted over workers and ranks, left out, and not too many."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

from engine.errors import InvalidInput
from tests.m3d_data import SIZE, image, save, write_root
from training.data.sample import BrokenSample, Sample
from training.data.sets import open_sets
from training.data.skip_broken import SkipBroken, TooManyBroken, present

pytestmark = pytest.mark.integration


class Numbers(Dataset):
    """Samples whose answer is their index; those in `broken` are broken."""

    def __init__(self, count: int, broken: set[int]):
        self.count, self.broken, self.epoch = count, broken, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise BrokenSample([f"{index}.npy", f"mask_{index}.npy"], "cut off")
        return Sample(np.zeros((1, 1, 1, 1), np.float32), "", str(index), None, True, "caption", f"{index}.npy")


def answers(batch) -> list[str]:
    return [sample.answer for sample in present(batch)]


@pytest.mark.parametrize("workers, start", [(0, None), (2, "fork"), (1, "spawn")])
def test_broken_samples_are_left_out_counted_and_recorded_whoever_reads(tmp_path, workers, start):
    data = SkipBroken(Numbers(64, {3, 17, 40}), tmp_path / "broken.jsonl")
    loader = DataLoader(data, batch_size=4, num_workers=workers, collate_fn=answers, multiprocessing_context=start)
    for epoch in (1, 2):
        assert sum(loader, []) == [str(k) for k in range(64) if k not in (3, 17, 40)]
        assert data.counts() == (64 * epoch, 3 * epoch)
    assert {(entry.paths, entry.cause, entry.times) for entry in data.report()} == {
        ((f"{k}.npy", f"mask_{k}.npy"), "cut off", 2) for k in (3, 17, 40)
    }


def test_a_sample_of_another_epoch_is_counted_alike(tmp_path):
    data = SkipBroken(open_sets(["caption"], write_root(tmp_path / "root"), "train", SIZE), tmp_path / "broken.jsonl")
    save(tmp_path / "root/M3D_Cap_npy/ct_case/000001/Axial.npy", image(0)[:, :4])
    assert data.at(3, 0).question == data.dataset.at(3, 0).question and data.at(3, 1) is None
    assert data.counts() == (2, 1)


def test_a_broken_sample_is_logged_with_path_and_cause(tmp_path, caplog):
    data = SkipBroken(Numbers(4, {1}), tmp_path / "broken.jsonl")
    with caplog.at_level(logging.WARNING):
        assert data[1] is None and data[2].answer == "2"
    assert "1.npy and mask_1.npy: cut off" in caplog.text


def test_other_errors_are_not_swallowed(tmp_path):
    class Defect(Numbers):
        def __getitem__(self, index):
            return {}["defect"]

    with pytest.raises(KeyError):
        SkipBroken(Defect(1, set()), tmp_path / "broken.jsonl")[0]


def test_more_than_the_allowed_share_stops_with_what_was_broken(tmp_path):
    data = SkipBroken(Numbers(1000, set(range(0, 1000, 50))), tmp_path / "broken.jsonl", limit=0.01, minimum=200)
    for index in range(100):  # 2 broken: 1 % of the minimum, though 2 % of what was read
        data[index]
    data.check()
    data[100]
    with pytest.raises(TooManyBroken, match=r"3 of 101 samples are broken, more than 1.0% .*broken.jsonl.*cut off"):
        data.check()


def test_the_share_is_of_all_that_was_read(tmp_path):
    data = SkipBroken(Numbers(1000, {5, 500, 999}), tmp_path / "broken.jsonl", limit=0.01, minimum=10)
    for index in range(100, 1000):
        data[index]
    data.check()  # 2 of 900


def test_a_share_that_is_none_is_refused(tmp_path):
    for limit in (-0.1, 1, float("nan")):
        with pytest.raises(InvalidInput, match="share of broken samples"):
            SkipBroken(Numbers(1, set()), tmp_path / "broken.jsonl", limit=limit)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    # Only the second rank meets broken samples: 4 of its 100, and of 200 in all.
    data = SkipBroken(Numbers(200, {101, 102, 103, 104}), f"{folder}/broken.jsonl", limit=0.01, minimum=1)
    for index in range(100 * rank, 100 * rank + 100):
        data[index]
    try:
        data.check()
        Path(folder, f"{rank}.txt").write_text("went on")
    except TooManyBroken as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_all_ranks_stop_together_on_what_all_have_read(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert all(text.startswith("4 of 200 samples are broken") for text in said)
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 4


class _Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return {"loss": self.weight * images.mean()}


def _trainer(data: SkipBroken, folder: Path):
    from transformers import Trainer, TrainingArguments

    from training.data.watch import BrokenSampleCheck

    def collate(batch):
        images = [sample.image for sample in present(batch)]
        return {"images": torch.tensor(np.stack(images) if images else np.zeros(1, np.float32))}

    arguments = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=3,
        num_train_epochs=2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        dataloader_pin_memory=False,
    )
    return Trainer(_Mean(), arguments, train_dataset=data, callbacks=[BrokenSampleCheck(data)], data_collator=collate)


def test_a_trainer_goes_on_past_a_broken_file_sees_new_epochs_and_sums_up(tmp_path, caplog):
    root = write_root(tmp_path / "root")
    save(root / "M3D_Cap_npy/ct_case/000001/Axial.npy", image(0)[:, :4])
    data = SkipBroken(open_sets(["caption"], root, "train", SIZE, jitter=True), tmp_path / "broken.jsonl")
    with caplog.at_level(logging.WARNING):
        _trainer(data, tmp_path).train()
    assert data.counts() == (8, 2) and int(data.dataset._epoch) == 1
    (entry,) = data.report()
    assert entry.times == 2 and entry.paths[0].endswith("000001/Axial.npy")
    assert "left out as broken: 1 sample, all" in caplog.text and "(2 times)" in caplog.text


def test_a_trainer_stops_on_too_many_broken_samples(tmp_path):
    data = SkipBroken(Numbers(30, {4, 5, 7}), tmp_path / "broken.jsonl", limit=0.05, minimum=10)
    with pytest.raises(TooManyBroken):
        _trainer(data, tmp_path).train()
