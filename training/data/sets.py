"""The sets of M3D-Data, read in their published layout under one data root (see README.md in this folder).

Each is a map-style data set of `Sample`s that depend on (seed, epoch, index) only, so that a resumed run, or one with
other workers, sees the same. What is wrong with a whole set is found when it is opened; what is wrong with one sample
raises BrokenSample when that one is read.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.utils.data import Dataset

from engine.errors import InvalidInput
from engine.prompt import SEG_TOKEN, format_box
from training.data.grouping import Groups
from training.data.jitter import Change, draw_change, swap_sides
from training.data.reading import (
    ABSENT,
    first_there,
    mask_id,
    read_image,
    read_json,
    read_mask,
    read_split,
    read_table,
    read_text,
    stored_shape,
)
from training.data.sample import BrokenSample, Sample
from training.data.wording import (
    OWN_TERMS,
    TEMPLATES,
    choose,
    class_names,
    descriptions,
    read_descriptions,
    read_templates,
    templates,
)

CAP, VQA, SEG, REFSEG = "M3D_Cap_npy", "M3D-VQA", "M3D_Seg_npy", "M3D_RefSeg_npy"
SPLITS = ("train", "validation", "test")
# The table that M3D-VQA's published accuracies were measured on, a part of its test split.
TEST_5K = "test5k"
TERMS = "term_dictionary.json"
_PROBED = 8
_SEG_SPLITS = {"validation": "test"}
# Training reads .npy alone; M3D-Bench asks about NIfTI files, too.
_MASK = re.compile(r"mask_(\d+)\.(?:npy|nii|nii\.gz)")

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Files:
    """What a sample is read from. label: the value in the mask that is meant; None: all that is not 0."""

    image: Path
    mask: Path | None = None
    label: int | None = None


class TrainingSet(Dataset):
    """What all sets have in common.

    root: the data root. split: train, validation or test; M3D-Cap has the splits that its JSON has, M3D-VQA test5k too.
    image_size: (D, H, W) of the model; None: the files are of any size, and no sample is read (M3D-Bench takes files
    and words from here, and asks about the files). seed: of everything that is drawn. jitter: whether the recipe's
    random changes are made. wording: `train` or `held_out` questions. words: a file of questions and answers that
    takes the place of templates.json.
    Raises InvalidInput if the root lacks the set, or its index, images or masks are not as the model needs them.
    """

    task: str
    space = True
    _scan_column = "image"

    def __init__(
        self,
        root: Path | str,
        split: str,
        image_size: Size | None = (32, 256, 256),
        *,
        seed: int = 0,
        jitter: bool = False,
        wording: str = "train",
        words: Path | None = None,
    ):
        self.words, self._templates = words, read_templates(words) if words else templates()
        self.root, self.split = Path(root), split
        self.image_size = None if image_size is None else tuple(image_size)
        self.seed, self.jitter, self.wording = seed, jitter, wording
        # In shared memory: DataLoader workers that outlive an epoch hear of the next one.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        if not self.root.is_dir():
            raise InvalidInput(f"the data root {self.root} is not a folder")
        self.rows = self._open()
        if not len(self):
            raise InvalidInput(f"{self.index} has no entries for {self.task} in split {split!r}")
        if self.image_size is not None:
            self._probe()

    @property
    def index(self) -> Path:
        """The file that lists the samples."""
        raise NotImplementedError

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files that decide which samples there are and what they say, but for images, masks and texts."""
        return (self.index, self.words or TEMPLATES)

    def _open(self) -> Sequence:
        raise NotImplementedError

    def files(self, index: int) -> Files:
        """Where sample `index` is read from."""
        raise NotImplementedError

    def scans(self) -> Iterator[str]:
        """What the scan of each sample is called in the index."""
        return (row[self._scan_column] for row in self.rows)

    def name(self, index: int) -> str | None:
        """Of the structure that sample `index` is about."""
        return None

    def worded(self, index: int, mask: np.ndarray | None, rng: np.random.Generator) -> tuple[str, str]:
        """(question, answer) of a sample, not swapped for a mirror image. Raises BrokenSample.

        mask: bool [1, D, H, W], as it lies in the sample; None without one. rng: draws the wording.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """From now on samples are drawn as in this epoch; the Trainer calls it."""
        self._epoch[0] = epoch

    def __getitem__(self, index: int) -> Sample:
        return self.at(int(self._epoch), index)

    def at(
        self,
        epoch: int,
        index: int,
        read_image: Callable[[Path, Size], np.ndarray] = read_image,
        changed: Callable[[Change], Change] = lambda own: own,
    ) -> Sample:
        """Sample `index` of any epoch. Raises BrokenSample.

        read_image: may remember images that many samples share. changed: the change that is made, from the sample's
        own; samples that share an image must share its change.
        """
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(self.task.encode()), index])
        files = self.files(index)
        change = changed(draw_change(rng, self.image_size) if self.jitter else Change())
        image = read_image(files.image, self.image_size)
        mask = None
        if files.mask is not None:
            mask = read_mask(files.mask, files.image, image.shape, files.label)
            mask = np.ascontiguousarray(change.place(mask))
        question, answer = self.worded(index, mask, rng)
        if change.mirrored:
            question, answer = swap_sides(question), swap_sides(answer)
        return Sample(
            image=np.ascontiguousarray(change.tone(change.place(image))) if self.jitter else image,
            question=question,
            answer=answer,
            mask=mask if SEG_TOKEN in answer else None,
            space=self.space,
            task=self.task,
            source=str(files.image),
            structure=self.name(index),
        )

    def _found(self, *parts: str) -> Path:
        """A file of the set under the root. Raises InvalidInput naming what was looked for, and where."""
        path = self.root.joinpath(*parts)
        if not path.is_file():
            folder = next(parent for parent in path.parents if parent.is_dir())
            there = sorted(child.name for child in folder.iterdir())
            raise InvalidInput(
                f"the data root lacks what {self.task} is read from: {path} was looked for; {folder} "
                f"holds {', '.join(there[:12]) or 'nothing'}{', ...' * (len(there) > 12)}"
            )
        return path

    def _probe(self) -> None:
        """Looks at the headers of a few images and masks: a wrong root or size shows before training, not as broken
        samples.
        """
        # Over the whole set, in unequal steps: an even one might meet the same class of each case.
        probed = []
        for index in np.unique(np.linspace(0, len(self) - 1, _PROBED, dtype=int)).tolist():
            with suppress(BrokenSample):
                probed.append(self.files(index))
        self._probe_shapes("images", [files.image for files in probed])
        if masks := [files.mask for files in probed if files.mask]:
            self._probe_shapes("masks", masks, ABSENT if probed[0].label is None else None)

    def _probe_shapes(self, what: str, paths: Sequence[Path], either: tuple[int, ...] | None = None) -> None:
        """either: a shape that is right as well, but says nothing of the others."""
        shapes = {path: stored_shape(path) for path in paths}
        if not any(shapes.values()):
            example = f", for example {paths[0]}" if paths else ""
            raise InvalidInput(
                f"none of {len(shapes)} {what} that {self.index} names can be read{example}; "
                f"paths in it count from {self._base}"
            )
        wanted = (1, *self.image_size)
        found = {shape: path for path, shape in shapes.items() if shape not in (None, either)}
        if found and wanted not in found:
            shape, path = next(iter(found.items()))
            raise InvalidInput(
                f"the {what} of {self.task} have shape {' x '.join(map(str, shape))} ({path}), "
                f"the model takes {' x '.join(map(str, wanted))}: prepare them at that size"
            )

    @property
    def _base(self) -> Path:
        """What the paths in the index are relative to."""
        return self.root


class Captions(TrainingSet):
    """M3D-Cap: an image and its report. ask: whether a question comes before it; pairs for M3D-CLIP have none."""

    task, space = "caption", False

    def __init__(self, *args, ask: bool = True, **settings):
        self.ask = ask
        super().__init__(*args, **settings)

    @property
    def index(self) -> Path:
        return self._found(CAP, "M3D_Cap.json")

    def _open(self) -> Sequence:
        return read_split(self.index, self.split, ("image", "text"))

    def files(self, index: int) -> Files:
        return Files(self.root / self.rows[index]["image"])

    def worded(self, index, mask, rng):
        answer = " ".join(read_text(self.root / self.rows[index]["text"]).split())
        return (choose(rng, self._templates["caption"][self.wording]) if self.ask else ""), answer


class Vqa(TrainingSet):
    """M3D-VQA: a question and its answer; open ones by default."""

    task = "vqa_open"
    columns: tuple[str, ...] = ("Image Path", "Question", "Answer")
    needed: tuple[str, ...] = columns  # of these, a row may leave none blank
    _stem, _scan_column = "M3D_VQA", "Image Path"
    _splits = {"validation": "val", TEST_5K: TEST_5K}

    @property
    def index(self) -> Path:
        return self._found(VQA, f"{self._stem}_{_split(self._splits, self.split)}.csv")

    def _open(self) -> Sequence:
        return read_table(self.index, self.columns, also=("Question Type",))

    def files(self, index: int) -> Files:
        return Files(self.root / self.rows[index]["Image Path"])

    def worded(self, index, mask, rng):
        row = {column: text.strip() for column, text in self.rows[index].items()}
        if empty := [column for column in self.needed if not row[column]]:
            raise BrokenSample(self.index, f"row {index + 1} has no {' and no '.join(empty)}")
        return self._asked(row, index)

    def _asked(self, row: dict[str, str], index: int) -> tuple[str, str]:
        return row["Question"], row["Answer"]


class ClosedVqa(Vqa):
    """M3D-VQA with choices: they stand behind the question, and the answer begins with the letter of the right one."""

    task = "vqa_closed"
    columns = (*Vqa.columns, *(f"Choice {letter}" for letter in "ABCD"), "Answer Choice")
    needed = (*Vqa.columns, "Answer Choice")

    def choices(self, index: int) -> dict[str, str]:
        """Letter -> text of what a question offers. A blank choice is none; the reference offers it as the word nan."""
        row = self.rows[index]
        return {letter: text for letter in "ABCD" if (text := row[f"Choice {letter}"].strip())}

    def _asked(self, row, index):
        if row["Answer Choice"] not in ("A", "B", "C", "D"):
            raise BrokenSample(self.index, f"row {index + 1} has Answer Choice {row['Answer Choice']!r}, not A to D")
        offered = self.choices(index)
        if row["Answer Choice"] not in offered or len(offered) < 2:
            raise BrokenSample(
                self.index,
                f"row {index + 1} offers {', '.join(offered) or 'nothing'}, and {row['Answer Choice']} is right",
            )
        choices = " ".join(f"{letter}. {text}" for letter, text in offered.items())
        return f"{row['Question']} Choices: {choices}", f"{row['Answer Choice']}. {row['Answer']}"


class YesNoVqa(Vqa):
    """M3D-VQA's questions for yes or no; published for training only."""

    task, _stem, _splits = "vqa_yes_no", "M3D_VQA_yn", {"validation": "val"}


class Structures(TrainingSet):
    """M3D-Seg: the structures of one data set, each asked for twice: by its name and by a description.

    code: of the data set, NNNN. kind: segmentation, rec (answer with a box) or reg (name what a box holds).
    An empty mask, as published a single 0, is a structure that is not in the scan; it is asked for, and the answer
    says so. Descriptions are those of `term_dictionary.json` beside the data sets or in the root, else our own.
    """

    KINDS = ("segmentation", "rec", "reg")

    def __init__(self, root, split, image_size: Size | None = (32, 256, 256), *, code: str, kind: str, **settings):
        self.code, self.task = code, kind
        super().__init__(root, split, image_size, **settings)

    @property
    def index(self) -> Path:
        return self._found(SEG, self.code, f"{self.code}.json")

    @property
    def _base(self) -> Path:
        return self.root / SEG

    @property
    def sources(self) -> tuple[Path, ...]:
        return (*super().sources, OWN_TERMS, *((self.terms,) if self.terms else ()))

    def _open(self) -> Sequence:
        self.names = names_of(self.index, self.code)
        self.terms = next((path for path in (self._base / TERMS, self.root / TERMS) if path.is_file()), None)
        self.told = descriptions() | (read_descriptions(self.terms) if self.terms else {})
        rows = read_split(self.index, _split(_SEG_SPLITS, self.split), ("image", "label"))
        for number, row in enumerate(rows):
            found = _MASK.fullmatch(Path(row["label"]).name)
            if not found:
                raise InvalidInput(
                    f"{self.index}: the label {row['label']!r} of entry {number} is not called mask_<class id>.npy"
                )
            if int(found[1]) >= len(self.names):
                raise InvalidInput(
                    f"{self.index}: the label {row['label']!r} of entry {number} is of class "
                    f"{int(found[1])}, but data set {self.code} has {len(self.names)} classes, from 0"
                )
        return rows

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def scans(self) -> Iterator[str]:
        return (scan for scan in super().scans() for _ in range(2))

    def files(self, index: int) -> Files:
        row = self.rows[index // 2]
        return Files(self._at(row["image"]), self._at(row["label"]))

    def _at(self, path: str) -> Path:
        """The published preparation writes where it was run: what has moved since lies below its data set as before."""
        parts = PurePosixPath(path).parts
        moved = parts[len(parts) - 1 - parts[::-1].index(self.code) :] if self.code in parts else parts
        return first_there(self._base / path, self._base.joinpath(*moved))

    def name(self, index: int) -> str:
        return self.names[int(_MASK.fullmatch(Path(self.rows[index // 2]["label"]).name)[1])]

    def style(self, index: int) -> str:
        """by_name or by_description: of each two samples the second, where a description is known."""
        return "by_description" if index % 2 and self.told.get(self.name(index)) else "by_name"

    def worded(self, index, mask, rng):
        slots, style = {"name": self.name(index)}, self.style(index)
        if style == "by_description":
            slots["description"] = choose(rng, self.told[slots["name"]])
        present = bool(mask.any())
        # What is not there has no box to ask about.
        asked = self._templates[self.task if present or self.task != "reg" else "rec"][style]
        if present and self.task != "segmentation":
            slots["box"] = format_box(box_of(mask[0]))
        answers = asked["answer" if present else "absent"]
        return choose(rng, asked[self.wording]).format(**slots), choose(rng, answers).format(**slots)


class Referring(TrainingSet):
    """M3D-RefSeg: questions that describe or reason, answered with the mask of what they mean.

    About one answer in eighty of the published ones has no `[SEG]`: it is text alone, as the reference takes it.
    """

    task, _scan_column = "refseg", "Image"

    @property
    def index(self) -> Path:
        name = _split({"train": "train", "validation": "test", "test": "test"}, self.split)
        if name == "train":
            return referring_train(self.root / REFSEG) or self._found(REFSEG, REFSEG_TABLES["train"])
        return self._found(REFSEG, REFSEG_TABLES["test"])

    @property
    def _base(self) -> Path:
        return self.root / REFSEG

    def _open(self) -> Sequence:
        return read_table(self.index, ("Image", "Mask", "Mask_ID", "Question", "Answer"))

    def files(self, index: int) -> Files:
        row = self.rows[index]
        label = mask_id(row["Mask_ID"])
        if label is None:
            raise BrokenSample(self.index, f"row {index + 1} has Mask_ID {row['Mask_ID']!r}, not a whole number from 1")
        return Files(self._at(row["Image"]), self._at(row["Mask"]), label)

    def _at(self, path: str) -> Path:
        """Published paths count from the folder of the cases and name the NIfTI files: `s0000/ct.nii.gz`."""
        case, name = PurePosixPath(path).parts[-2:] if "/" in path else ("", path)
        return first_there(self.root / path, self._base / case / f"{name.split('.nii')[0].removesuffix('.npy')}.npy")

    def worded(self, index, mask, rng):
        # The published answers were written by a language model, which now and then changed the brackets.
        question, answer = (
            self.rows[index][column].strip().replace("<SEG>", SEG_TOKEN) for column in ("Question", "Answer")
        )
        if not question or not answer:
            raise BrokenSample(self.index, f"row {index + 1} has no {'answer' if question else 'question'}")
        if SEG_TOKEN in answer and mask is not None and not mask.any():
            files = self.files(index)
            raise BrokenSample(
                [files.mask, self.index], f"no voxel of the mask is {files.label}, which row {index + 1} means"
            )
        return question, answer


REFSEG_TABLES = {"train": "M3D_RefSeg_train.csv", "test": "M3D_RefSeg_test.csv"}
_REFSEG_ROW = ("Image", "Mask_ID", "Question")


def referring_train(folder: Path) -> Path | None:
    """The table of M3D-RefSeg's training questions in a folder, None if there is none.

    The reference calls it M3D_RefSeg.csv, and so is a copy of all questions called in some downloads.

    Raises InvalidInput if such a table holds questions of the test table.
    """
    train, whole, test = (folder / name for name in (REFSEG_TABLES["train"], "M3D_RefSeg.csv", REFSEG_TABLES["test"]))
    if train.is_file() or not whole.is_file():
        return train if train.is_file() else None
    if test.is_file():
        tested = {tuple(row.values()) for row in read_table(test, _REFSEG_ROW)}
        if shared := sum(tuple(row.values()) in tested for row in read_table(whole, _REFSEG_ROW)):
            raise InvalidInput(
                f"{whole} holds {shared:,} of the {len(tested):,} questions of {test.name}: it is the table of all "
                f"questions; put the published {train.name} beside it"
            )
    return whole


class Mixture(Dataset):
    """Several sets one after the other.

    weights: how often an epoch has the samples of each set; 1 for all by default. What an epoch has of a set goes on
    where the last one stopped, and a sample that comes again is drawn anew: 0.5 takes the halves in turn, 3 never gives
    the same three times. per_scan: most questions of a set about one scan that stand together; with more than 1, an
    index is that of a group, and weights count groups.
    """

    def __init__(self, sets: Sequence[TrainingSet], weights: Sequence[float] | None = None, per_scan: int = 1):
        self.sets = tuple(sets)
        weights = [1.0] * len(self.sets) if weights is None else weights
        self._groups = [Groups(part.scans(), per_scan, part.seed) if per_scan > 1 else None for part in self.sets]
        self._counts = [len(part) if groups is None else len(groups) for part, groups in zip(self.sets, self._groups)]
        self._lengths = [round(weight * count) for weight, count in zip(weights, self._counts)]
        self._ends = tuple(accumulate(self._lengths))
        # In shared memory, as that of the sets.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def set_epoch(self, epoch: int) -> None:
        """From now on samples are drawn as in this epoch; the Trainer calls it."""
        self._epoch[0] = epoch

    def __getitem__(self, index: int) -> Sample:
        return self.at(int(self._epoch), index)

    def at(self, epoch: int, index: int) -> Sample:
        """Sample `index` of any epoch, of a group its first. Raises BrokenSample."""
        return self.readers(epoch, index)[0]()

    def readers(self, epoch: int, index: int) -> list[Callable[[], Sample]]:
        """What reads each sample of group `index` of any epoch, or raises BrokenSample.

        The samples of a group have one image, which is read once, and the change of the first.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        part, groups, length = self.sets[number], self._groups[number], self._lengths[number]
        place = epoch * length + index - (self._ends[number] - length)
        round_of_set, index = divmod(place, self._counts[number])
        if groups is None:
            return [partial(part.at, round_of_set, index)]
        shared = _Shared()
        return [
            partial(part.at, round_of_set, member, shared.image, shared.change)
            for member in groups.members(round_of_set, index)
        ]

    def firsts(self) -> list[int]:
        """The first index of each task."""
        found: dict[str, int] = {}
        for part, length, end in zip(self.sets, self._lengths, self._ends):
            if length:
                found.setdefault(part.task, end - length)
        return list(found.values())


class _Shared:
    """One image and one change for all samples of a group."""

    def __init__(self) -> None:
        self._image: np.ndarray | None = None
        self._change: Change | None = None

    def image(self, path: Path, size: Size) -> np.ndarray:
        if self._image is None:
            self._image = read_image(path, size)
        return self._image

    def change(self, own: Change) -> Change:
        self._change = self._change or own
        return self._change


def open_sets(
    tasks: Iterable[str] | Mapping[str, float],
    root: Path | str,
    split: str,
    image_size: Size = (32, 256, 256),
    per_scan: int = 1,
    **settings,
) -> Mixture:
    """The sets of some tasks under a data root, as one.

    Args:
        tasks: of TASKS; with a weight each where an epoch shall not have each sample once (see Mixture). M3D-Seg's
            tasks take all its data sets that are under the root; TASK/NNNN weighs one of them.
        root: the data root.
        split: see TrainingSet.
        image_size: (D, H, W) of the model.
        per_scan: see Mixture.
        settings: seed, jitter and wording of each set.

    Raises:
        InvalidInput: for an unknown task or data set, a weight that leaves nothing, or a root that lacks a set.
    """
    weights = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, 1.0)
    special = {name: weights.pop(name) for name in list(weights) if "/" in name}
    sets: list[TrainingSet] = []
    of_sets: list[float] = []
    for task, weight in weights.items():
        if task not in TASKS:
            raise InvalidInput(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
        sets += (opened := TASKS[task](root, split, image_size, **settings))
        of_sets += [weight] * len(opened)
    keys = [f"{part.task}/{part.code}" if isinstance(part, Structures) else "" for part in sets]
    if unknown := sorted(set(special) - set(keys)):
        raise InvalidInput(
            f"there is no {', '.join(unknown)}: TASK/NNNN weighs a data set of a task that is named, too; there are "
            f"{', '.join(filter(None, keys)) or 'none'}"
        )
    mixture = Mixture(sets, [special.get(key, weight) for key, weight in zip(keys, of_sets)], per_scan)
    if not len(mixture):
        raise InvalidInput(f"the weights of {', '.join(weights)} leave no sample")
    return mixture


def _structures(kind: str) -> Callable[..., list[TrainingSet]]:
    def opened(root, split, image_size, **settings):
        # Some published data sets have no test cases.
        return [
            Structures(root, split, image_size, code=code, kind=kind, **settings)
            for code in codes_of(root)
            if read_json(Path(root) / SEG / code / f"{code}.json").get(_SEG_SPLITS.get(split, split)) != []
        ]

    return opened


TASKS: dict[str, Callable[..., list[TrainingSet]]] = {
    "pair": lambda *args, **settings: [Captions(*args, ask=False, **settings)],
    "caption": lambda *args, **settings: [Captions(*args, **settings)],
    "vqa_closed": lambda *args, **settings: [ClosedVqa(*args, **settings)],
    "vqa_open": lambda *args, **settings: [Vqa(*args, **settings)],
    "vqa_yes_no": lambda *args, **settings: [YesNoVqa(*args, **settings)],
    **{kind: _structures(kind) for kind in Structures.KINDS},
    "refseg": lambda *args, **settings: [Referring(*args, **settings)],
}


def splits_of(task: str, root: Path) -> tuple[str, ...]:
    """The splits of a task: those that it was published with, and others that are there."""
    if task in ("refseg", *Structures.KINDS):
        return ("train", "test")  # validation is read from the same files as test
    if task in ("vqa_closed", "vqa_open"):
        return (*SPLITS, *((TEST_5K,) if (root / VQA / "M3D_VQA_test5k.csv").is_file() else ()))
    if task == "vqa_yes_no":
        own = {"validation": "M3D_VQA_yn_val.csv", "test": "M3D_VQA_yn_test.csv"}
        return ("train", *(split for split, name in own.items() if (root / VQA / name).is_file()))
    return SPLITS


def codes_of(root: Path | str) -> list[str]:
    """The codes of the data sets of M3D-Seg under a data root. Raises InvalidInput if there is none."""
    folder = Path(root) / SEG
    codes = sorted(path.parent.name for path in folder.glob("*/*.json") if path.stem == path.parent.name)
    if not codes:
        raise InvalidInput(f"the data root lacks M3D-Seg: {folder}/NNNN/NNNN.json was looked for and there is none")
    return codes


def names_of(index: Path, code: str) -> tuple[str, ...]:
    """The class names of a data set of M3D-Seg: as published, or for one's own what its JSON says under `labels`."""
    if code in class_names():
        return class_names()[code]
    labels = read_json(index).get("labels")
    try:
        return tuple(labels[str(number)] for number in range(1, len(labels)))
    except (KeyError, TypeError):
        raise InvalidInput(
            f"{index} must name its classes, as {code} is none of M3D-Seg's data sets: "
            f'"labels": {{"0": "background", "1": "name of mask_0", ...}}'
        ) from None


def box_of(mask: np.ndarray) -> np.ndarray:
    """[6] first and last voxel of a mask [D, H, W] along each axis, divided by its length: what format_box takes."""
    spans = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([[span[0] for span in spans], [span[-1] for span in spans]]).ravel() / np.tile(mask.shape, 2)


def _split(names: dict[str, str], split: str) -> str:
    """What a set's files call a split. names: of those called otherwise, or that this set has beside SPLITS."""
    if split not in (*SPLITS, *names):
        raise InvalidInput(f"there is no split {split!r}: choose one of {', '.join(dict.fromkeys((*SPLITS, *names)))}")
    return names.get(split, split)
