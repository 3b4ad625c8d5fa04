"""The token embeddings of the exported language model, read from its folder without loading the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from engine.errors import RepositoryError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class EmbeddingTable:
    """Rows of `model.embed_tokens.weight` [V, H], memory-mapped, so that they are no second copy in memory.

    folder: of an exported language model, its safetensors sharded or not.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.rows = self._tensor(EMBEDDINGS)

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def embed(self, token_ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """[len(token_ids), H]. The ids are in 0..V-1."""
        return self.rows[torch.tensor(token_ids, dtype=torch.long)].to(dtype)

    def head(self) -> torch.Tensor:
        """The output projection [V, H]: the embeddings themselves if the model ties them."""
        return self._tensor(HEAD) if HEAD in self._shards() else self.rows

    def _tensor(self, key: str) -> torch.Tensor:
        try:
            with safe_open(self.folder / self._shards()[key], framework="pt") as weights:
                return weights.get_tensor(key)
        except (KeyError, OSError) as error:
            raise RepositoryError(f"{self.folder} has no {key} ({error}): export the repository again") from None

    def _shards(self) -> dict[str, str]:
        """{key: file} of the folder."""
        index = self.folder / _INDEX
        if index.exists():
            return json.loads(index.read_text())["weight_map"]
        with safe_open(self.folder / _WEIGHTS, framework="pt") as weights:
            return dict.fromkeys(weights.keys(), _WEIGHTS)
