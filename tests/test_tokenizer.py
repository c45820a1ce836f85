"""common/tokenizer.py against hand-worked tokens, the textbook's example, and a plain recount of all pairs."""
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common import tokenizer as T

TEXTS = [f"Modality: {c}; Plane: axial; TE: 90 ms; Slice: 0.42; Lesion: left, 412 mm2" for c in ("flair", "t1", "t1ce", "t2")]


@pytest.fixture(scope="module")
def tokenizer():
    return T.Tokenizer.train(TEXTS, vocab=1024, context=96)


@pytest.mark.parametrize("text, kinds, read_back", [
    ("3T", "number word", "3 t"),
    ("120kVp 0.8mm", "number word number word", "120 kvp 0.8 mm"),
    ("T1w", "word", "t1w"),
    ("18F-FDG", "word mark word", "18f - fdg"),
    ("3D-OSEM", "word mark word", "3d - osem"),
    ("H31s 412 mm2", "word number word", "h31s 412 mm2"),
    ("-5 to 10", "number word number", "-5 to 10"),
    ("(-1000,-5) 3-5", "mark number mark number mark number mark number", "( -1000 , -5 ) 3 - 5"),
    ("TI=\u22120.5", "word mark number", "ti = -0.5"),
    ("t1-t2", "word mark word", "t1 - t2"),
    ("0.8 x 0.8 x 5 mm", "number word number word number word", "0.8 x 0.8 x 5 mm"),
    ("90.0 1000000 0.0001", "number number number", "90 1000000 0.0001"),
    ("TE: [MASK] ms", "word mark mask word", "te : [mask] ms"),
    ("Voxel: None x None x 5; TI: None", "word mark none word none word number mark word mark none",
     "voxel : none x none x 5 ; ti : none"),
    ("none of the nonex 5", "word word word word number", "none of the nonex 5"),
    ("caf\u00e9 \uff13\uff34", "word number word", "caf[unk]3 t"),
])
def test_pieces_and_reading_back(tokenizer, text, kinds, read_back):
    assert [kind for kind, _ in T.split(text)] == kinds.split()
    ids, vals = tokenizer.encode(text)
    assert tokenizer.decode(ids, vals) == read_back
    assert ids[0] == T.CLS and ids[-1] == T.SEP


def test_ids_and_values_of_a_caption(tokenizer):
    ids, vals = tokenizer.encode("t1 -0.5 none")
    assert ids[2:] == [T.NUM, T.NONE, T.SEP] and ids[1] > T.UNK
    assert vals == [0, 0, -0.5, 0, 0]
    assert len(tokenizer.encode(TEXTS[0])[0]) == 25       # every word and mark of a training caption is one token
    assert len(tokenizer.encode("cardiomegaly")[0]) > 3   # an unseen word is several, still readable


def test_merges_apply_in_the_order_in_which_they_were_learned():
    tokenizer = T.Tokenizer([("a", "b"), ("b", "c "), ("n", "o"), ("no", "n"), ("non", "e")], context=96)
    ids, vals = tokenizer.encode("abc nonex")
    assert [tokenizer.symbols[i] for i in ids[1:-1]] == ["ab", "c ", "none", "x "]     # not the special token
    assert T.NONE not in ids and tokenizer.decode(ids, vals) == "abc nonex"


def test_merges_are_those_of_the_textbook_example():
    counts = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    assert T.learn_merges(counts, 4) == [("s", "t "), ("e", "st "), ("l", "o"), ("w", "est ")]


def test_indexed_merges_equal_a_recount_after_every_merge():
    g = np.random.default_rng(0)
    counts = Counter({"".join(g.choice(list("abc"), g.integers(1, 9))): int(g.integers(1, 30)) for _ in range(60)})
    words, expected = {w: [*w[:-1], w[-1] + " "] for w in counts}, []
    for _ in range(40):
        pairs = Counter()
        for word, symbols in words.items():
            for i in range(len(symbols) - 1):
                pairs[symbols[i], symbols[i + 1]] += counts[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        expected.append(best)
        for symbols in words.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i:i + 2] = ["".join(best)]
                i += 1
    assert T.learn_merges(counts, 40) == expected


def test_vocabulary_is_capped_and_words_reach_their_learned_symbols():
    words = [f"{a}{b}word{a}" for a in "abcdefgh" for b in "pqrstu"]
    tokenizer = T.Tokenizer.train(words, vocab=150)
    assert 140 <= len(tokenizer) <= 150 and len(tokenizer.symbols) == len(set(tokenizer.symbols))
    full = T.Tokenizer.train(words)
    assert all(len(full.encode(word)[0]) == 3 for word in words)
    assert len({full.encode(word)[0][1] for word in words}) == len(words)


def test_batch_is_padded_to_its_own_longest_text_and_overflow_raises(tokenizer):
    tokens = tokenizer(["t1", "t1; t2; flair"])
    assert tokens.ids.shape == (2, 7) and (tokens.ids[0, 3:] == T.PAD).all()
    assert tokens.mask.sum(1).tolist() == [3, 7] and tokens.mask[0].tolist() == [True] * 3 + [False] * 4
    assert len(tokenizer.encode("; " * 94)[0]) == 96
    with pytest.raises(ValueError, match="97 tokens.*takes 96"):
        tokenizer(["t1", "; " * 95])


def test_arrays_hold_what_torch_needs(tokenizer):
    tokens = tokenizer(["TE: 0.1 ms", "t1"])
    assert [part.dtype for part in tokens] == [np.int64, np.float32, bool]
    assert tokens.vals[0, 3] == np.float32(0.1) and np.count_nonzero(tokens.vals) == 1


def test_saved_and_read_back(tokenizer):
    again = T.Tokenizer.from_state(tokenizer.state())
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0]) and again.context == 96
    with pytest.raises(ValueError, match="vocabulary.*restore the file"):
        T.Tokenizer.from_state({**tokenizer.state(), "context": 97})


def test_a_long_row_of_digits_stays_finite_and_no_text_is_refused(tokenizer):
    """Serial numbers in reports would otherwise become inf, and every weight NaN."""
    vals = tokenizer([f"No {60 * '9'}; -{400 * '9'}; 38"]).vals[0]
    largest = np.finfo(np.float32).max
    assert np.isfinite(vals).all() and largest in vals and -largest in vals and 38 in vals
    with pytest.raises(ValueError, match="list of texts is empty"):
        tokenizer([])


def test_needs_no_torch():
    program = "import sys, common.tokenizer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
