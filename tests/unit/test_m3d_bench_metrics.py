"""Every metric of M3D-Bench against a case that was computed by hand."""

import math
import sys
import types

import numpy as np
import pytest

from benchmarks.bench.metrics import boxes, choices, masks, models, retrieval, text
from engine.errors import InvalidInput, Unavailable

REPORT = "The liver is enlarged. No focal lesion is seen."


# --- texts -----------------------------------------------------------------------------------------------------------
class Nothing:
    """A WordNet without synonyms."""

    def synsets(self, word):
        return []


def test_bleu_1_is_the_share_of_right_words_times_a_penalty_for_a_short_answer():
    # 3 of 4 words are right; the answer has 6: e^(1 - 6/4).
    assert text.bleu_1("the liver is small", "the liver is large and round") == pytest.approx(0.75 * math.exp(-0.5))
    assert text.bleu_1("the the the the", "the liver") == pytest.approx(0.25)  # a word counts as often as it is there
    assert text.bleu_1(" a b ", "a b") == pytest.approx(1)


def test_an_empty_answer_has_bleu_0_where_the_reference_divides_by_zero():
    assert text.bleu_1("", REPORT) == 0.0


def test_corpus_bleu_adds_up_matches_before_it_divides():
    statistics = np.array(
        [text.bleu_statistics("a b c d e", "a b c d e"), text.bleu_statistics("a b c d x", "a b c d e")], float
    )
    # 1- to 4-grams: 9 of 10, 7 of 8, 5 of 6, 3 of 4; equal lengths.
    wanted = (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert text.corpus_bleu(statistics.sum(axis=0)) == pytest.approx(wanted)
    assert text.corpus_bleu(np.stack([statistics[0], statistics[1]])) == pytest.approx(
        [1.0, (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25]
    )


def test_corpus_bleu_is_sacrebleus():
    import sacrebleu

    predictions = ["the liver is large and round today", "no focal lesion is seen here"]
    answers = ["the liver is large and round", "a focal lesion is seen here"]
    sums = np.sum([text.bleu_statistics(p, a) for p, a in zip(predictions, answers)], axis=0)
    wanted = sacrebleu.corpus_bleu(predictions, [answers], smooth_method="none").score / 100
    assert text.corpus_bleu(sums) == pytest.approx(wanted)


def test_rouge_1_counts_words_and_rouge_l_the_longest_common_order():
    # 4 of 4 predicted words are among 5: F1 = 2 * 1 * 0.8 / 1.8. In order only "the left lung": 3 of 4 and 3 of 5.
    prediction, answer = "clear the left lung", "the left lung is clear"
    assert text.rouge("rouge1", prediction, answer) == pytest.approx(2 * 1 * 0.8 / 1.8)
    assert text.rouge("rougeL", prediction, answer) == pytest.approx(2 * 0.75 * 0.6 / 1.35)


def test_meteor_weighs_recall_and_punishes_pieces():
    meteor = text.Meteor(str.split, Nothing())
    # 3 of 4 words match 3 of 3 ("lungs" by its stem) in 2 pieces: P 0.75, R 1, F = PR / (0.9 P + 0.1 R),
    # penalty 0.5 * (2/3)^3.
    wanted = (0.75 / (0.9 * 0.75 + 0.1)) * (1 - 0.5 * (2 / 3) ** 3)
    assert meteor("clear left big lungs", "clear left lung") == pytest.approx(wanted)
    assert meteor("", "left") == 0.0


@pytest.mark.integration
def test_meteor_finds_synonyms_in_wordnet_which_pip_downloads():
    meteor = text.load_meteor()
    assert meteor("the tumor grows", "the tumour grows") > meteor("the spleen grows", "the tumour grows")


def test_cider_weighs_words_by_how_few_answers_have_them():
    # Two answers of one word each: idf log 2, only 1-grams: a quarter of the four orders, times 10.
    assert text.cider(["liver", "liver"], ["liver", "spleen"]) == pytest.approx([2.5, 0.0])
    # "the" stands in both answers and weighs nothing: [liver] against [liver], 2-grams "the liver" are equal, too.
    assert text.cider(["the liver", "x"], ["the liver", "the spleen"])[0] == pytest.approx(5.0)
    assert text.cider(["the kidney", "x"], ["the liver", "the spleen"])[0] == 0
    # Twice as long as the answer: the same words, punished by e^(-1 / (2 * 36)), repeated words are clipped.
    assert text.cider(["liver liver", "x"], ["liver", "spleen"])[0] == pytest.approx(
        10 / 4 * math.exp(-1 / 72) * (1 * 1) / (2 * 1)
    )


def test_cider_of_answers_that_are_all_the_same_is_no_number():
    assert np.isnan(text.cider(["liver", "spleen"], ["liver", "Liver."])).all()


# --- boxes -----------------------------------------------------------------------------------------------------------
def test_the_references_iou_divides_by_the_enclosing_box():
    a, b = [0.0, 0.0, 0.0, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]
    assert boxes.hull_iou(a, b) == pytest.approx(0.25**3 / (0.75**3 + 1e-6))  # a true IoU would be 0.0667
    assert boxes.hull_iou(a, a) == pytest.approx(0.125 / (0.125 + 1e-6))
    assert boxes.hull_iou(None, b) == boxes.hull_iou(a, None) == -1


def test_the_reference_reads_the_first_box_with_a_comma_and_one_space_between_numbers():
    assert boxes.reference_box("It is [0.1, 0.2, 0, 1, -0.5, .25] and [1, 1, 1, 1, 1, 1]") == [
        0.1,
        0.2,
        0,
        1,
        -0.5,
        0.25,
    ]
    assert boxes.reference_box("[0.1,0.2,0.3,0.4,0.5,0.6]") is None


def test_iou_is_intersection_over_union_of_voxels():
    size = (4, 8, 8)
    # Voxels 0-1 and 1-2 of each axis: 8 voxels each, 1 in common.
    a, b = (np.array([*[n / s for n, s in zip(first, size)], *[n / s for n, s in zip(last, size)]])
            for first, last in (((0, 0, 0), (1, 1, 1)), ((1, 1, 1), (2, 2, 2))))  # fmt: skip
    assert boxes.iou(a, b, size) == pytest.approx(1 / 15)
    assert boxes.iou(a, a, size) == 1


def test_a_structure_of_one_slice_has_a_box_of_one_slice():
    flat = np.array([0.5, 0, 0, 0.5, 0.5, 0.5])
    assert boxes.iou(flat, flat, (4, 8, 8)) == 1


# --- masks -----------------------------------------------------------------------------------------------------------
def cube(start, size=10, edge=4):
    mask = np.zeros((size,) * 3, bool)
    mask[start[0] : start[0] + edge, start[1] : start[1] + edge, start[2] : start[2] + edge] = True
    return mask


def test_soft_dice_adds_1_to_the_denominator_only():
    truth = np.zeros((1, 2, 2), bool)
    truth[0, 0] = True
    logits = np.zeros((1, 2, 2), np.float32)  # all voxels 0.5
    assert masks.soft_dice(logits, truth) == pytest.approx(2 * 1 / (2 + 2 + 1))
    certain = np.where(truth, 100, -100).astype(np.float32)
    assert masks.soft_dice(certain, truth) == pytest.approx(4 / 5)  # a perfect mask of 2 voxels has 0.8
    assert masks.soft_dice(None, truth) == 0


def test_dice_is_of_the_mask_itself():
    # 4^3 voxels, moved by one along one axis: 48 of 64 in common.
    assert masks.dice(cube((2, 2, 2)), cube((3, 2, 2))) == pytest.approx(48 / 64)
    assert masks.dice(np.zeros_like(cube((2, 2, 2))), cube((2, 2, 2))) == 0


def test_hd95_is_in_millimetres_along_each_axis():
    a, b = cube((2, 2, 2)), cube((4, 2, 2))
    assert masks.hd95(a, b, (5.0, 1.0, 1.0)) == pytest.approx(10)  # the far faces are 2 slices of 5 mm apart
    assert masks.hd95(a, b, (1.0, 1.0, 1.0)) == pytest.approx(2)
    assert masks.hd95(a, a, (5.0, 1.0, 1.0)) == 0


def test_hd95_of_no_mask_is_the_volumes_diagonal():
    truth = cube((2, 2, 2))
    assert masks.hd95(np.zeros_like(truth), truth, (1.0, 2.0, 2.0)) == pytest.approx(30)  # 10 x 20 x 20 mm


def test_nsd_is_the_share_of_surfaces_within_the_tolerance():
    a = np.zeros((12, 12, 12), bool)
    b = a.copy()
    a[4, 2:8, 2:8], b[7, 2:8, 2:8] = True, True  # two plates, 3 voxels apart
    assert masks.nsd(a, b, (1.0, 1.0, 1.0), 2.0) == 0
    assert masks.nsd(a, b, (0.5, 1.0, 1.0), 2.0) == 1
    b[4, 2:8, 2:8] = True  # half of b's surface is a's
    assert masks.nsd(a, b, (1.0, 1.0, 1.0), 2.0) == pytest.approx((36 + 36) / (36 + 72))
    assert masks.nsd(np.zeros_like(a), a, (1.0, 1.0, 1.0)) == 0


# --- closed questions ------------------------------------------------------------------------------------------------
CHOICES = {"A": "Axial", "B": "Coronal", "C": "Sagittal", "D": "None of them"}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A. Axial", "A"),
        ("B", "B"),
        ("(C)", "C"),
        ("C) Sagittal", "C"),
        ("The answer is D", "D"),
        ("Answer: B", "B"),
        ("sagittal.", "C"),
        ("B. Axial", "B"),  # the letter counts
        ("A mass in the liver", None),  # an article
        ("A. Axial B. Coronal", None),
        ("A. B. C. D.", None),
        ("I cannot say", None),
        ("", None),
        ("E. Other", None),
        ("Vitamin B. complex", None),  # the letter of a word
        ("Vitamin D", None),
        ("The answer is a cyst", None),
        ("Answer: a large mass", None),
        ("The answer is A large mass", None),
        ("The answer is B because of the ribs", "B"),
        ("The answer is A.", "A"),
        ("**Answer:** B", "B"),
        ("It is B.", "B"),
        ("Answer: B or C", None),
        ("A or B", None),
        ("A. Axial or B. Coronal", None),
        ("The answer is A. Axial", "A"),
    ],
)
def test_a_choice_is_named_by_its_letter_or_its_whole_text(said, letter):
    assert choices.chosen(said, CHOICES) == letter


WITH_LETTERS = {"A": "Stanford type B", "B": "Stanford type A", "C": "Hepatitis C", "D": "None of them"}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("Stanford type B", "A"),
        ("stanford type b.", "A"),
        ("Hepatitis C", "C"),
        ("A. Stanford type B", "A"),
        ("B. Stanford type A", "B"),
        ("A. Stanford type A", "A"),  # the letter counts
        ("The answer is B: Stanford type A.", "B"),
        ("It looks like Stanford type B.", None),
        ("Stanford type B or Stanford type A", None),
        ("Hepatitis B.", None),
    ],
)
def test_a_letter_in_the_text_of_a_choice_names_no_other_choice(said, letter):
    assert choices.chosen(said, WITH_LETTERS) == letter


def test_a_letter_that_is_no_choice_is_none():
    assert choices.chosen("D. Other", {"A": "Yes", "B": "No"}) is None


def test_the_references_substring_takes_every_letter_at_once_for_right():
    assert choices.substring_right("A. B. C. D.", "C")
    assert not choices.substring_right("C) Sagittal", "C")


def test_the_likeliest_choice_has_the_greatest_log_probability():
    assert choices.likeliest({"A": -2.0, "B": -0.1, "C": -9.0}) == ("B", False)
    assert choices.likeliest({"A": None, "B": -50.0}) == ("B", False)
    assert choices.likeliest({"B": -1.0, "A": -1.0, "C": -2.0}) == ("A", True)
    assert choices.likeliest({"A": None, "B": None}) == ("A", True)
    with pytest.raises(ValueError, match="choice B is not a number"):
        choices.likeliest({"A": -1.0, "B": math.nan})


# --- retrieval -------------------------------------------------------------------------------------------------------
SCORES = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]], np.float32)


def test_the_references_recall_asks_for_the_diagonal():
    assert retrieval.reference_hits(SCORES, 1).tolist() == [True, False, False]
    assert retrieval.reference_hits(SCORES, 2).tolist() == [True, True, False]
    assert retrieval.reference_hits(SCORES, 5).tolist() == [True, True, True]


def test_the_same_report_of_another_scan_is_right():
    texts = ["clear", "clear", "mass"]
    # Scan 1 finds report 0, which has the same text. Scan 2's own comes behind the one other report, "clear".
    assert retrieval.hits(SCORES, texts, 1, of_texts=True).tolist() == [True, True, False]
    assert retrieval.hits(SCORES, texts, 2, of_texts=True).tolist() == [True, True, True]
    # Report 2 finds scan 0 first, then scans 1 and 2 with equal scores: the wrong one comes first.
    assert retrieval.hits(SCORES.T, texts, 2, of_texts=False).tolist() == [True, True, False]


def test_embeddings_that_are_all_alike_find_nothing():
    alike = np.ones((4, 4), np.float32)
    assert not retrieval.hits(alike, list("abcd"), 1, of_texts=True).any()


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(InvalidInput, match="embeddings of texts hold values that are not finite"):
        retrieval.similarity(np.ones((2, 3)), np.array([[1, 1, np.nan], [1, 1, 1]]))


def test_a_pool_of_2000_pairs_is_ranked_whole():
    rng = np.random.default_rng(0)
    scans = rng.normal(size=(2000, 64)).astype(np.float32)
    scores = retrieval.similarity(scans, scans + rng.normal(size=scans.shape).astype(np.float32))
    texts = [str(n) for n in range(2000)]
    for k in retrieval.RANKS:
        assert (retrieval.hits(scores, texts, k, of_texts=True) == retrieval.reference_hits(scores, k)).all()


# --- metrics that want a model ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "load", [models.load_bertscore, models.load_radgraph, models.load_ratescore, models.load_green]
)
def test_a_folder_without_a_model_is_refused(load, tmp_path):
    with pytest.raises(InvalidInput, match="is not a folder with a model's files"):
        load(tmp_path)


@pytest.mark.parametrize(("load", "folders", "package"), [
    (models.load_radgraph, ["radgraph-xl"], "radgraph"),
    (models.load_ratescore, ["ner", "synonyms"], "RaTEScore"),
    (models.load_green, ["."], "green_score"),
])  # fmt: skip
def test_a_metric_without_its_package_says_which_it_is(load, folders, package, tmp_path, monkeypatch):
    for name in folders:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model.bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=f"needs the package {package}"):
        load(tmp_path)


def test_packages_get_predictions_and_answers_in_their_places(tmp_path, monkeypatch):
    """With stand-ins that have the packages' signatures: each scores 1 where the answer is `right`."""

    class RadGraph:
        def __init__(self, reward_level, model_type=None, model_cache_dir=None, tokenizer_cache_dir=None):
            assert (reward_level, model_cache_dir) == ("partial", str(tmp_path))

        def __call__(self, refs, hyps):
            return 0.0, [float((r, h) == ("right", "said")) for r, h in zip(refs, hyps)], [], []

    class Rate:
        def __init__(self, bert_model, eval_model, use_gpu):
            assert bert_model.endswith("ner") and eval_model.endswith("synonyms")

        def compute_score(self, candidate_list, reference_list):
            return [float((r, c) == ("right", "said")) for r, c in zip(reference_list, candidate_list)]

    class Green:
        def __init__(self, model_name, cpu):
            assert model_name == str(tmp_path)

        def __call__(self, refs, hyps):
            return 0.0, 0.0, [float((r, h) == ("right", "said")) for r, h in zip(refs, hyps)], "", None

    for name in ("radgraph-xl", "ner", "synonyms"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(b"x")
    for package, name, stand_in in (
        ("radgraph", "F1RadGraph", RadGraph),
        ("RaTEScore", "RaTEScore", Rate),
        ("green_score", "GREEN", Green),
    ):
        monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(**{name: stand_in}))
    for load in (models.load_radgraph, models.load_ratescore, models.load_green):
        assert load(tmp_path)(["said", "right"], ["right", "said"]) == [1.0, 0.0]


def test_scores_that_are_missing_or_not_finite_are_no_scores():
    assert models.checked_scores([0.5, 1], 2, "GREEN") == [0.5, 1.0]
    for scores in ([0.5], [0.5, math.nan]):
        with pytest.raises(Unavailable, match="GREEN gave"):
            models.checked_scores(scores, 2, "GREEN")


def test_bertscore_matches_tokens_by_their_most_similar_one(tmp_path):
    """A model of one layer whose states are worked out here."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "liver", "spleen"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=len(words))
    model = BertModel(BertConfig(**size)).eval()
    model.save_pretrained(tmp_path)

    def states(text):
        with torch.no_grad():
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
        return [row / row.norm() for row in found]

    a, b = states("the liver"), states("spleen the")
    precision = np.mean([max(float(x @ y) for y in b) for x in a[1:-1]])  # [CLS] and [SEP] may be matched
    recall = np.mean([max(float(x @ y) for y in a) for x in b[1:-1]])
    score = models.load_bertscore(tmp_path, layer=1)
    same, other, empty = score(["the liver", " the liver ", ""], ["the liver", "spleen the", "the"])
    assert same == pytest.approx(1, abs=1e-6)
    assert other == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert empty == 0
    with pytest.raises(InvalidInput, match="has 2 layers: there is no layer 17"):
        models.load_bertscore(tmp_path)
