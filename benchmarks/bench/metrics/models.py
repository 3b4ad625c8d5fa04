"""Metrics that want a model: from a local folder, or a server with OpenAI's protocol. None is downloaded.

Each is made by its `load_*` with where its model lies, and scores many samples at once.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.errors import InvalidInput, Unavailable, one_line

Scorer = Callable[[Sequence[str], Sequence[str]], "list[float]"]  # (predictions, answers) -> scores
_BATCH = 32
BERTSCORE_LAYER = 17  # what bert-score reads of roberta-large, which the reference takes
_JUDGE = (
    "You compare a prediction with a ground truth, both about one medical scan. List the aspects that the ground truth "
    "mentions, and tell which share of them the prediction states correctly or in part, from 0 to 100. "
    "The last line of your reply is `Score: N`.\n\nGround truth:\n{answer}\n\nPrediction:\n{prediction}"
)
_SCORE = re.compile(r"Score:\s*(\d+(?:\.\d+)?)")


def load_bertscore(folder: Path, layer: int = BERTSCORE_LAYER) -> Scorer:
    """F1 of BERTScore, without idf and without rescaling, as the reference computes it.

    Every token of one text is matched with the most similar one of the other, by the cosine of hidden states; first
    and last token ([CLS] and [SEP]) may be matched, but their own matches do not count.

    Args:
        folder: a transformers model with its tokenizer; the reference's is roberta-large.
        layer: whose hidden states are compared, from 1.

    Source: Zhang et al., BERTScore, arXiv 1904.09675. The package bert-score 0.3.13 gives the same figures, but has not
    been kept since 2023.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    _checked(folder)
    # bert-score puts a space before the first word for RoBERTa's tokenizers; others know no such option.
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, add_prefix_space=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    if not 1 <= layer <= model.config.num_hidden_layers:
        raise InvalidInput(f"{folder} has {model.config.num_hidden_layers} layers: there is no layer {layer}")

    @torch.inference_mode()
    def states(texts: Sequence[str]) -> list[torch.Tensor]:
        """[tokens, width] of each text, of length 1 each."""
        found = []
        for start in range(0, len(texts), _BATCH):
            batch = [text.strip() for text in texts[start : start + _BATCH]]
            batch = tokenizer(batch, padding=True, truncation=True, max_length=512, return_tensors="pt")
            hidden = model(**batch, output_hidden_states=True).hidden_states[layer]
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
            found += [row[mask.bool()] for row, mask in zip(hidden, batch["attention_mask"])]
        return found

    def score(predictions: Sequence[str], answers: Sequence[str]) -> list[float]:
        scores = []
        for a, b in zip(states(predictions), states(answers)):
            likeness = a @ b.T
            matched = likeness.max(dim=1).values[1:-1], likeness.max(dim=0).values[1:-1]
            if not all(map(len, matched)):  # an empty text
                scores.append(0.0)
                continue
            precision, recall = (values.mean() for values in matched)
            scores.append(float(2 * precision * recall / (precision + recall)))
        return scores

    return score


def load_radgraph(folder: Path) -> Scorer:
    """RadGraph-F1 (partial) by the package radgraph. folder: its cache, with `radgraph-xl` and the tokenizer."""
    _checked(folder / "radgraph-xl")  # else the package downloads it
    scorer = _imported("radgraph", "RadGraph-F1").F1RadGraph(
        reward_level="partial",
        model_type="radgraph-xl",
        model_cache_dir=str(folder),
        tokenizer_cache_dir=str(folder),
    )
    return lambda predictions, answers: list(scorer(hyps=list(predictions), refs=list(answers))[1])


def load_ratescore(folder: Path) -> Scorer:
    """RaTEScore by the package ratescore. folder: holds `ner` (RaTE-NER-Deberta) and `synonyms` (BioLORD-2023-C)."""
    import torch

    ner, synonyms = (_checked(folder / name) for name in ("ner", "synonyms"))
    scorer = _imported("RaTEScore", "RaTEScore").RaTEScore(
        bert_model=str(ner), eval_model=str(synonyms), use_gpu=torch.cuda.is_available()
    )
    return lambda predictions, answers: list(scorer.compute_score(list(predictions), list(answers)))


def load_green(folder: Path) -> Scorer:
    """GREEN by the package green_score. folder: its language model."""
    import torch

    _checked(folder)
    scorer = _imported("green_score", "GREEN").GREEN(str(folder), cpu=not torch.cuda.is_available())
    return lambda predictions, answers: list(scorer(refs=list(answers), hyps=list(predictions))[2])


def load_judge(url: str, model: str) -> Scorer:
    """A language model's opinion, 0 to 1: the share of the ground truth's aspects that the prediction has.

    url: of a server with OpenAI's protocol, such as http://localhost:8000/v1. Its key is $OPENAI_API_KEY, if it wants
    one. A reply without a score raises Unavailable: it is no 0.
    """
    openai = _imported("openai", "The judge")
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def one(prediction: str, answer: str) -> float:
        asked = _JUDGE.format(prediction=prediction, answer=answer)
        try:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": asked}], temperature=0
            )
        except openai.OpenAIError as error:
            raise Unavailable(f"the judge at {url} does not answer: {one_line(error)}") from None
        text = reply.choices[0].message.content or ""
        found = _SCORE.findall(text)
        if not found or float(found[-1]) > 100:
            raise Unavailable(f"the judge at {url} gave no `Score: N` of 0 to 100: {text[-80:]!r}")
        return float(found[-1]) / 100

    return lambda predictions, answers: [one(p, a) for p, a in zip(predictions, answers)]


def checked_scores(scores: Sequence[float], count: int, name: str) -> list[float]:
    """`scores`, if there is a finite one for each sample. Raises Unavailable."""
    if len(scores) != count or not np.isfinite(scores).all():
        raise Unavailable(f"{name} gave {len(scores)} scores for {count} samples, or some that are not finite")
    return [float(score) for score in scores]


def _checked(folder: Path) -> Path:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not a folder with a model's files")
    return folder


def _imported(package: str, name: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{name} needs the package {package}: {one_line(error)}") from None
