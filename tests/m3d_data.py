"""A small data root in the layout of M3D-Data, made of phantoms: what readers, checks and preparation are tested on.

Its trees are exactly those that the published files and the published preparation scripts give: file names, splits,
columns and what paths count from.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

SIZE = (8, 32, 32)
VQA_COLUMNS = (
    "Image Path",
    "Text",
    "Question Type",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "Answer Choice",
)
REFSEG_COLUMNS = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")
LIVER, RIGHT_KIDNEY = (slice(1, 5), slice(4, 16), slice(2, 12)), (slice(2, 4), slice(18, 26), slice(5, 10))


def image(seed: int, size: tuple[int, int, int] = SIZE) -> np.ndarray:
    """float32 [1, D, H, W]: dim noise with the liver and the right kidney brighter."""
    volume = np.random.default_rng(seed).random((1, *size), dtype=np.float32) * 0.3
    volume[0][LIVER], volume[0][RIGHT_KIDNEY] = 0.7, 0.9
    return volume


def mask(*boxes, size: tuple[int, int, int] = SIZE) -> np.ndarray:
    volume = np.zeros((1, *size), bool)
    for box in boxes:
        volume[0][box] = True
    return volume


def save(path: Path, array: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return str(path)


def write_csv(path: Path, columns, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_root(root: Path, size: tuple[int, int, int] = SIZE) -> Path:
    """All four sets: 6 image-text pairs, 4 questions of each kind, 2 data sets of M3D-Seg, 4 referring questions."""
    pairs = []
    for k in range(6):
        case = f"M3D_Cap_npy/ct_case/{k:06}"
        save(root / case / "Axial.npy", image(k, size))
        (root / case / "text.txt").write_text(f"Finding {k}.\nThe left lung is clear.")
        pairs.append({"image": f"{case}/Axial.npy", "text": f"{case}/text.txt"})
    tests = dict.fromkeys(("test", "test100", "test500", "test1k"), pairs[5:])
    index = {"train": pairs[:4], "validation": pairs[4:5], **tests}
    (root / "M3D_Cap_npy" / "M3D_Cap.json").write_text(json.dumps(index))
    for split, chosen in (("train", pairs[:4]), ("val", pairs[4:5]), ("test", pairs[5:]), ("test5k", pairs[5:])):
        closed = [
            (p["image"], "a, b", 1, "Which plane?", "Axial", "Coronal", "Sagittal", "None", "Axial", "A")
            for p in chosen
        ]
        write_csv(root / f"M3D-VQA/M3D_VQA_{split}.csv", VQA_COLUMNS, closed)
    yes_no = [(p["image"], "", 4, "Is there a mass?", "", "", "", "", "No", "") for p in pairs[:4]]
    write_csv(root / "M3D-VQA/M3D_VQA_yn_train.csv", VQA_COLUMNS, yes_no)
    seg = root / "M3D_Seg_npy"
    for code, classes in (("0010", {0: LIVER, 1: RIGHT_KIDNEY}), ("0000", {0: LIVER})):
        entries = []
        for case in ("a", "b"):
            save(seg / code / case / "image.npy", image(7, size))
            for number, box in classes.items():
                label = f"{code}/{case}/masks/mask_{number}.npy"
                save(seg / label, mask(box, size=size))
                entries.append({"image": f"{code}/{case}/image.npy", "label": label})
        half = len(entries) // 2
        (seg / code / f"{code}.json").write_text(json.dumps({"train": entries[:half], "test": entries[half:]}))
    for number in (0, 1):
        case = f"s000{number}"
        save(root / "M3D_RefSeg_npy" / case / "ct.npy", image(9, size))
        # As nibabel's get_fdata gives them.
        labels = (mask(LIVER, size=size) + 2.0 * mask(RIGHT_KIDNEY, size=size)).astype(np.float64)
        save(root / "M3D_RefSeg_npy" / case / "mask.npy", labels)
    for split, case in (("train", "s0000"), ("test", "s0001")):
        write_csv(root / "M3D_RefSeg_npy" / f"M3D_RefSeg_{split}.csv", REFSEG_COLUMNS, referring_rows(case))
    everything = referring_rows("s0000") + referring_rows("s0001")
    write_csv(root / "M3D_RefSeg_npy" / "M3D_RefSeg_all.csv", REFSEG_COLUMNS, everything)
    return root


def referring_rows(case: str) -> list[tuple]:
    """Two questions about a case, with paths as published: from the folder of the cases, to the NIfTI files."""
    return [
        (f"{case}/ct.nii.gz", f"{case}/mask.nii.gz", k, 0, f"Segment lesion {k}.", "It is [SEG] on the right.")
        for k in (1, 2)
    ]
