"""Embeddings come from the exported folder however its weights are stored."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import RepositoryError
from engine.runtime.decoder.embedding_table import EMBEDDINGS, HEAD, EmbeddingTable

ROWS = torch.arange(12, dtype=torch.float32).reshape(4, 3)


def write(folder, tensors, sharded):
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return
    for i, (key, value) in enumerate(tensors.items()):
        save_file({key: value}, folder / f"model-{i}.safetensors")
    shards = {key: f"model-{i}.safetensors" for i, key in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_and_head_are_read_from_any_layout(tmp_path, sharded, tied):
    write(tmp_path, {EMBEDDINGS: ROWS} | ({} if tied else {HEAD: -ROWS}), sharded)
    table = EmbeddingTable(tmp_path)
    assert torch.equal(table.embed([2, 0, 2], torch.float32), ROWS[[2, 0, 2]])
    assert torch.equal(table.head(), ROWS if tied else -ROWS)


def test_rows_are_cast_when_asked(tmp_path):
    write(tmp_path, {EMBEDDINGS: ROWS.to(torch.bfloat16)}, sharded=False)
    assert EmbeddingTable(tmp_path).embed([1], torch.float32).dtype == torch.float32
    assert EmbeddingTable(tmp_path).embed([], torch.float32).shape == (0, 3)


@pytest.mark.parametrize("tensors", [None, {"other": ROWS}])
def test_a_folder_without_embeddings_is_named(tmp_path, tensors):
    if tensors:
        write(tmp_path, tensors, sharded=False)
    with pytest.raises(RepositoryError, match=f"{tmp_path.name} has no {EMBEDDINGS}"):
        EmbeddingTable(tmp_path)
