"""common/report_scores.py against stored numbers of pycocoevalcap, nltk and sacrebleu, and counts by hand."""
import math

import pytest

from common import report_scores as S

REFERENCES = ["the heart is normal in size . the lungs are clear . no pleural effusion .",
              "there is a small left pleural effusion . mild cardiomegaly .",
              "no acute cardiopulmonary abnormality ."]
HYPOTHESES = ["the heart size is normal . the lungs are clear . no pneumothorax .",
              "there is a small right pleural effusion . the heart is enlarged .",
              "no acute disease ."]


# ---- BLEU ------------------------------------------------------------------------------------------------------------


def test_bleu_equals_pycocoevalcap():
    assert S.bleu(REFERENCES, HYPOTHESES) == pytest.approx([0.74961807, 0.60242124, 0.48266634, 0.39661553], abs=1e-8)
    turned = S.bleu(REFERENCES[::-1], HYPOTHESES[::-1])
    assert turned == pytest.approx(S.bleu(REFERENCES, HYPOTHESES))


def test_bleu_by_hand():
    # 1-grams: a twice and b once of 4; 2-grams: "a a" and "a b" of 3; 3-grams: "a a b" of 2; no 4-gram
    scores = S.bleu(["a a b"], ["a a b a"])
    assert scores[:3] == pytest.approx([3 / 4, math.sqrt(3 / 4 * 2 / 3), (3 / 4 * 2 / 3 / 2) ** (1 / 3)])
    assert scores[3] == pytest.approx((0.25 * 1e-15) ** 0.25)
    assert S.bleu(["a b c d"], ["a a a a"])[0] == pytest.approx(1 / 4)      # a match counts as often as it is in the reference


def test_brevity_is_that_of_the_whole_set():
    assert S.bleu(["a b c d e f"], ["a b c d"])[:2] == pytest.approx([math.exp(-0.5)] * 2)
    assert S.bleu(["a b c d"], ["a b c d e f"])[0] == pytest.approx(4 / 6)  # a long report has no penalty of its own
    assert S.bleu(["a b c d", "e f"], ["a b c", "e f g"])[0] == pytest.approx(5 / 6)        # 6 words against 6


def test_an_order_without_ngrams_follows_pycocoevalcap():
    assert S.bleu(["a b c"], ["a b c"]) == pytest.approx([1, 1, 1, 0.0316228], abs=1e-7)
    assert S.bleu(["a b c d"], ["a b c d"]) == pytest.approx([1, 1, 1, 1])
    assert S.bleu(["a b c d", "e f g h"], ["a b c d", ""])[0] == pytest.approx(math.exp(-1))
    assert S.bleu(["a b c"], [""]) == [0, 0, 0, 0] and S.bleu([""], ["a"])[0] < 1e-14


# ---- ROUGE-L ---------------------------------------------------------------------------------------------------------


def test_rouge_l_equals_pycocoevalcap():
    mean, each = S.rouge_l(REFERENCES, HYPOTHESES)
    assert each == pytest.approx([0.79049676, 0.67683773, 0.65357143], abs=1e-8)
    assert mean == pytest.approx(0.7069686380706742, rel=1e-12)


def test_rouge_l_by_hand():
    # "a c e" is common: P = 3/4, R = 3/5
    mean, each = S.rouge_l(["a b c d e"], ["a c x e"])
    assert each == [mean] == [pytest.approx(2.44 * 3 / 4 * 3 / 5 / (3 / 5 + 1.44 * 3 / 4))]
    assert S.rouge_l(["a c x e"], ["a b c d e"])[0] == pytest.approx(2.44 * 3 / 5 * 3 / 4 / (3 / 4 + 1.44 * 3 / 5))
    assert S.rouge_l(["a b c"], ["c b a"])[0] == pytest.approx(1 / 3)       # the order counts
    assert S.rouge_l(["a b"], ["b"])[0] == pytest.approx(2.44 / 2 / (1 / 2 + 1.44))
    assert S.rouge_l(["a b", "c", "c"], ["a b", "", "d"]) == (pytest.approx(1 / 3), [1, 0, 0])


def test_the_longest_common_subsequence():
    assert S._longest_common("g a c".split(), "a g c a t".split()) == 2
    assert S._longest_common(list("xmjyauz"), list("mzjawxu")) == 4         # m j a u
    assert S._longest_common(list("aab"), list("azab")) == 3 and S._longest_common([], ["a"]) == 0


# ---- references and refusals -----------------------------------------------------------------------------------------


def test_references_as_r2gen_has_them():
    known = ["the", "heart", "is", "."]
    found = S.r2gen_references(["the heart is enlarged .", "no heart", ""], known, 4)
    assert found == ["the heart is <unk>", "<unk> heart", ""]
    assert S.r2gen_references(REFERENCES, " ".join(REFERENCES).split(), 16) == REFERENCES
    assert S.r2gen_references(["a b"], {"a", "b"}, 1) == ["a"]


@pytest.mark.parametrize("score", [S.bleu, S.rouge_l])
def test_lists_that_do_not_fit_are_refused(score):
    for references, hypotheses in ((["a"], ["a", "b"]), ([], []), ("a", "b"), (["a"], "b")):
        with pytest.raises(ValueError, match="two lists of reports of one length"):
            score(references, hypotheses)
