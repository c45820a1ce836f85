"""How close a generated report is to the written one: BLEU and ROUGE-L, as papers on reports count.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    bleu(references, hypotheses)                        # BLEU-1 to BLEU-4 of the whole set
    rouge_l(references, hypotheses)                     # mean, and one value per report
    bleu(r2gen_references(references, words, 59), hypotheses)

references and hypotheses are lists of reports (str) that were cleaned before.  Each report has one
reference.  Words are what stands between blanks, so a full stop with blanks around is a word.

Both scores count common words.  "No effusion" and "effusion" are nearly alike for them.  They do
not say whether a report is right.
"""
import math
from collections import Counter

ORDERS = 4              # BLEU-1 to BLEU-4
BETA = 1.2              # ROUGE-L: how much more recall counts than precision

# pycocoevalcap, by which these papers score, adds two small numbers to avoid 0 / 0.  They matter
# only if no report has as many words as an n-gram: such a precision is 1e-6, and not undefined.
TINY = 1e-15
SMALL = 1e-9


def bleu(references, hypotheses):
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) of a set of reports, a list of four floats in [0,1].

    The n-grams of all reports are counted together, so BLEU has no value per report.  BLEU-n is the
    geometric mean of the precisions of 1-grams to n-grams.  If the hypotheses have fewer words than
    the references, it is multiplied by exp(1 - words of references / words of hypotheses).

    Raises ValueError if the lists are empty or of different lengths.
    """
    pairs = _word_pairs("bleu", references, hypotheses)
    matches = [0] * ORDERS
    totals = [0] * ORDERS
    length_r = sum(len(reference) for reference, _ in pairs)
    length_h = sum(len(hypothesis) for _, hypothesis in pairs)
    for reference, hypothesis in pairs:
        for i in range(ORDERS):
            there = _ngrams(reference, i + 1)
            found = _ngrams(hypothesis, i + 1)
            # an n-gram counts as often as it is in both
            matches[i] += (found & there).total()
            totals[i] += found.total()
    if length_h == 0:
        return [0.0] * ORDERS
    brevity = min(1.0, math.exp(1 - length_r / length_h))
    product = 1.0
    scores = []
    for i in range(ORDERS):
        product *= (matches[i] + TINY) / (totals[i] + SMALL)
        scores.append(brevity * product ** (1 / (i + 1)))
    return scores


def rouge_l(references, hypotheses):
    """ROUGE-L (Lin 2004) of a set of reports.  Returns (mean, list of one float per report).

    The longest common subsequence of words gives a precision P and a recall R.  ROUGE-L is
    (1 + beta^2) P R / (R + beta^2 P) with beta 1.2.  An empty report scores 0.

    Raises ValueError if the lists are empty or of different lengths.
    """
    scores = []
    for reference, hypothesis in _word_pairs("rouge_l", references, hypotheses):
        common = _longest_common(reference, hypothesis)
        if common == 0:
            scores.append(0.0)
            continue
        precision = common / len(hypothesis)
        recall = common / len(reference)
        scores.append((1 + BETA ** 2) * precision * recall / (recall + BETA ** 2 * precision))
    return sum(scores) / len(scores), scores


def r2gen_references(references, known, most_words):
    """The references that the code of R2Gen scores by, a list of str.

    known       the words of the vocabulary, list or set of str; another word becomes <unk>.  R2Gen
                knows the words that come at least 3 (IU X-ray) or 10 times (MIMIC-CXR) in training
    most_words  a reference is cut after so many words: 59 for IU X-ray, 99 for MIMIC-CXR

    Such references make scores higher, because the hard parts are gone.  Published scores were made
    so.  Print the scores with the full references beside them.
    """
    known = set(known)
    changed = []
    for reference in references:
        words = reference.split()[:most_words]
        changed.append(" ".join(word if word in known else "<unk>" for word in words))
    return changed


def _word_pairs(caller, references, hypotheses):
    """The words of both reports of every pair, [(list of str, list of str), ...]."""
    # one str in place of a list would be scored letter by letter
    single = isinstance(references, str) or isinstance(hypotheses, str)
    if single or not len(references) == len(hypotheses) > 0:
        raise ValueError(f"{caller}: {len(references)} references, {len(hypotheses)} hypotheses; "
                         f"give two lists of reports of one length")
    return [(reference.split(), hypothesis.split())
            for reference, hypothesis in zip(references, hypotheses)]


def _ngrams(words, n):
    """How often each run of n words comes, a Counter of tuples."""
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def _longest_common(first, second):
    """The length of the longest common subsequence of two lists of words."""
    # before[j] is the length for the words of `first` so far, and the first j words of `second`
    before = [0] * (len(second) + 1)
    for word in first:
        now = [0]
        for j, other in enumerate(second):
            now.append(before[j] + 1 if word == other else max(before[j + 1], now[j]))
        before = now
    return before[-1]
