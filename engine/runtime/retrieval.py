"""How well texts fit a scan, by M3D-CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engine import contract
from engine.errors import InvalidInput, RepositoryError
from engine.manifest import Manifest
from engine.runtime.step import Inputs, Later, Outputs
from engine.runtime.study import Infer
from engine.runtime.study_store import StudyStore

MAX_TEXTS = 256  # of 400 short ones the last was ranked after a minute, on 2 cores with other work
MAX_CHARACTERS = 20_000
BATCH = contract.MODELS["clip_text_encoder"].max_batch_size


class Retriever:
    """tokenizer_folder: where the export put the text encoder's tokenizer. Raises RepositoryError if it is unusable."""

    def __init__(self, store: StudyStore, manifest: Manifest, tokenizer_folder: Path | str, infer: Infer):
        if manifest.clip_text_length is None:
            raise RepositoryError("this repository was exported without M3D-CLIP: export again with --clip-checkpoint")
        if manifest.clip_image_size != manifest.image_size:
            raise RepositoryError(
                f"M3D-CLIP takes volumes of {manifest.clip_image_size}, M3D-LaMed of "
                f"{manifest.image_size}: export checkpoints of the same size together"
            )
        self.store = store
        self.infer = infer
        self.text_limit = manifest.clip_text_length
        self.tokenizer = _tokenizer(Path(tokenizer_folder), self.text_limit)

    def rank(self, handle: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Score T texts.

        Returns: cosine similarities, float32 [T]; whether each text was cut to `text_limit` tokens, bool [T].
        Raises: StudyNotFound, InvalidInput.
        """
        _check(texts)
        image = self.embed(handle)
        features, cut = self.embed_texts(texts)
        return np.clip(features @ image, -1, 1), cut

    def embed(self, handle: str) -> np.ndarray:
        """The scan's embedding, float32 [E]. Raises StudyNotFound."""
        return self.store.computed(handle, "clip_image", self._image)

    def embed_texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of T texts, float32 [T, E]; whether each was cut to `text_limit` tokens, bool [T].

        Raises InvalidInput.
        """
        _check(texts)
        batches = [self._texts(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        features, cut = (np.concatenate(parts) for parts in zip(*batches))
        return features, cut

    def _image(self, image: np.ndarray) -> np.ndarray:
        return self.infer("clip_image_encoder", {contract.IMAGE: image[None]})[contract.IMAGE_EMBEDDING][0]

    def _texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features of one batch [B, E], and whether each text was cut [B]."""
        encodings = self.tokenizer.encode_batch(texts)
        features = self.infer(
            "clip_text_encoder",
            {
                contract.INPUT_IDS: np.array([encoding.ids for encoding in encodings], np.int64),
                contract.ATTENTION_MASK: np.array([encoding.attention_mask for encoding in encodings], np.int64),
            },
        )[contract.TEXT_EMBEDDING]
        return features, np.array([bool(encoding.overflowing) for encoding in encodings])


class RetrievalStep:
    """Ranks texts against a scan. Of a scan without texts, and of texts without a scan, it gives the embeddings."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever

    def __call__(self, inputs: Inputs) -> Outputs | Later:
        if inputs.array(contract.STUDY) is None and inputs.array(contract.TEXTS) is None:
            raise InvalidInput("the request has neither STUDY nor TEXTS: give a scan's handle, texts, or both")
        return lambda: self._outputs(inputs)

    def _outputs(self, inputs: Inputs) -> Outputs:
        scores, scan = np.zeros(0, np.float32), np.zeros(0, np.float32)
        embeddings, cut = np.zeros((0, 0), np.float32), np.zeros(0, np.bool_)
        if inputs.array(contract.TEXTS) is None:
            scan = self.retriever.embed(inputs.needed_text(contract.STUDY))
        elif inputs.array(contract.STUDY) is None:
            embeddings, cut = self.retriever.embed_texts(inputs.texts(contract.TEXTS))
        else:
            scores, cut = self.retriever.rank(inputs.needed_text(contract.STUDY), inputs.texts(contract.TEXTS))
        return {
            contract.SCORES: scores,
            contract.TEXT_CUT: cut,
            contract.TEXT_LIMIT: np.array([self.retriever.text_limit], np.int32),
            contract.SCAN_EMBEDDING: scan,
            contract.TEXT_EMBEDDINGS: embeddings,
        }


def _check(texts: list[str]) -> None:
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise InvalidInput(f"{len(texts)} texts given; 1 to {MAX_TEXTS} are allowed: send them in parts")
    for position, text in enumerate(texts):
        if not text.strip():
            raise InvalidInput(f"text {position} is empty")
        if len(text) > MAX_CHARACTERS:
            raise InvalidInput(f"text {position} has {len(text)} characters; at most {MAX_CHARACTERS} are allowed")


def _tokenizer(folder: Path, length: int) -> Tokenizer:
    """The fast tokenizer of a Hugging Face folder, cutting to `length` tokens as the reference does.

    It pads to the longest text of a batch. The reference pads to `length`, which the mask makes the same.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        pad = json.loads((folder / "tokenizer_config.json").read_bytes()).get("pad_token") or "[PAD]"
    except Exception as error:  # tokenizers raises plain Exception
        raise RepositoryError(
            f"the tokenizer in {folder} cannot be read ({error}): export the repository again"
        ) from None
    pad = pad if isinstance(pad, str) else pad["content"]
    if tokenizer.token_to_id(pad) is None:
        raise RepositoryError(f"the tokenizer in {folder} does not know its padding token {pad!r}")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer
