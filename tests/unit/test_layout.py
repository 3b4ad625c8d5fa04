"""What names a checkpoint, and which files of one are read, hashed and told apart."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.models import hub
from engine.models.checkpoint import sha256
from engine.models.hub import HubName
from engine.models.layout import WEIGHTS, files_read
from engine.models.weights import Weights

TENSORS = {"a": torch.ones(2)}


@pytest.mark.parametrize(
    "source, name",
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name@v1.0", HubName("owner/name", revision="v1.0")),
        ("owner/name@refs/pr/4", HubName("owner/name", revision="refs/pr/4")),
        ("owner/name/sub", HubName("owner/name", "sub")),
        ("owner/name/sub/deeper@main", HubName("owner/name", "sub/deeper")),
        ("Owner-1/M3D_x.y/sub@" + "0a" * 20, HubName("Owner-1/M3D_x.y", "sub", "0a" * 20)),
    ],
)
def test_a_place_on_the_hub_is_told_by_repository_subfolder_and_revision(source, name):
    assert hub.parse(source) == name
    assert hub.parse(str(name)) == name


@pytest.mark.parametrize(
    "source",
    [
        "name",
        "/nowhere/at/all",
        "./owner/name",
        "../name",
        "owner/..",
        "owner/name/../x",
        "owner/name@",
        "owner/name@../x",
    ]
    + [
        "owner/name/",
        "owner//name",
        "@v1",
        "owner@v1/name@v2",
        "own er/name",
        "öwner/name",
        "https://hub/owner/name",
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_with_the_forms(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a Hugging Face id .owner/name or owner/name/sub"):
        hub.parse(source)


def test_a_local_folder_comes_before_the_hub_and_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name@v1"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        hub.locate("owner/name@v1")
    (folder / "config.json").write_text("{}")
    located = hub.locate("owner/name@v1")
    assert located.folder.resolve() == folder and located.commit is None
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        hub.locate(folder / "config.json")


def test_code_and_stray_weights_are_not_read(tmp_path):
    stray = ("modeling_m3d_lamed.py", "merged_model.bin", "pretrained_ViT.bin", "training_args.bin", "optimizer.pt")
    read = ["config.json", "generation_config.json", "tokenizer.model", "vocab.txt", "model.safetensors"]
    for name in (*read, *stray, *WEIGHTS[1:], "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    names = [path.name for path in tmp_path.iterdir()]
    assert files_read(names, tmp_path.joinpath) == read


def shards(folder, suffix):
    save = save_file if suffix == ".safetensors" else torch.save
    for key in "ab":
        save({key: torch.ones(2)}, folder / f"part-{key}{suffix}")
    weight_map = {key: f"part-{key}{suffix}" for key in "ab"}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_reading_and_hashing_take_the_same_first_form_of_weights(tmp_path):
    """Forms are added from the last to the first: each takes over, whatever lies beside it."""
    (tmp_path / "config.json").write_text("{}")
    seen = set()
    for add, keys in (
        (lambda: torch.save({"m": torch.ones(1)}, tmp_path / "model.bin"), {"m"}),
        (lambda: shards(tmp_path, ".bin"), {"a", "b"}),
        (lambda: torch.save({"p": torch.ones(1)}, tmp_path / "pytorch_model.bin"), {"p"}),
        (lambda: shards(tmp_path, ".safetensors"), {"a", "b"}),
        (lambda: save_file({"s": torch.ones(1)}, tmp_path / "model.safetensors"), {"s"}),
    ):
        add()
        assert set(Weights.open(tmp_path)) == keys
        seen.add(sha256(tmp_path))
    assert len(seen) == len(WEIGHTS)


def test_the_hash_leaves_out_what_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors")
    before = sha256(tmp_path)
    for name in ("merged_model.bin", "model.bin", "modeling.py", "run.json", "notes.txt", "adapter_model.safetensors"):
        (tmp_path / name).write_text("stray")
    assert sha256(tmp_path) == before
    for name in ("generation_config.json", "tokenizer.model", "special_tokens_map.json"):
        (tmp_path / name).write_text("{}")
        assert sha256(tmp_path) != before
        before = sha256(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("read now")
    (tmp_path / "config.json").write_text('{"base_model": {}}')
    before = sha256(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("changed")
    assert sha256(tmp_path) != before


def test_the_hash_is_over_every_shard(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shards(tmp_path, ".safetensors")
    before = sha256(tmp_path)
    save_file({"b": torch.zeros(2)}, tmp_path / "part-b.safetensors")
    assert sha256(tmp_path) != before


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin"])
def test_a_lone_bin_file_is_read_as_strictly_as_any(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)
    assert torch.equal(Weights.open(tmp_path)["a"], TENSORS["a"])
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="weights_only"):
        Weights.open(tmp_path)
    torch.save([1], tmp_path / name)
    with pytest.raises(CheckpointError, match="holds a list"):
        Weights.open(tmp_path)


def test_an_index_whose_shard_is_no_name_is_damaged(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(CheckpointError, match=r"index\.json is damaged .*1 is no file name"):
        Weights.open(tmp_path)


def test_a_folder_without_weights_is_told_what_is_looked_for(tmp_path):
    (tmp_path / "merged_model.bin").write_text("")
    with pytest.raises(CheckpointError) as error:
        Weights.open(tmp_path)
    assert all(name in str(error.value) for name in WEIGHTS)
