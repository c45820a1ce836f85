"""Texts become token ids.  Words are split into learned pieces; a number is one token with a value.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    tokenizer = Tokenizer.train(captions)               # captions: the training texts (str)
    tokens = tokenizer(["T1, TE: 90 ms", "TE: None"])   # Tokens, padded to the longer text
    ids, vals = tokenizer.encode("TE: 90 ms")           # lists of one text
    tokenizer.decode(ids, vals)                         # "te : 90 ms"

The pieces of words come from byte-pair encoding (Sennrich et al., 2016).  A number is one token,
[num], with the number as its value.  If every digit were a token, 2500.0 would have six tokens, and
nothing would say that it is close to 2499.9.  The arrays are NumPy's; torch.as_tensor takes them.

Letters in shape comments: B texts, L tokens of the longest text.
"""
import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict, namedtuple

import numpy as np

Tokens = namedtuple("Tokens", "ids vals mask")
# ids: (B, L) int64.  vals: (B, L) float32, the value of a [num] token, else 0.  mask: (B, L) bool,
# True at a token of the text and False at padding.

SPECIALS = ("[pad]", "[cls]", "[sep]", "[mask]", "[none]", "[num]", "[unk]")
PAD, CLS, SEP, MASK, NONE, NUM, UNK = range(7)
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
LARGEST = float(np.finfo(np.float32).max)       # of a value; a longer row of digits would be inf
MOST_WORDS = 50_000         # merges are learned on so many words, the most frequent ones

# A number may be glued to one of these units.  Any other mixture of digits and letters is a word:
# 18f, t1w, 3d.
UNITS = "ms|s|min|h|t|mm|cm|deg|mbq|kbq|bq|mci|kvp|kv|ma|mas|hu|y|yr|kg"
# "none" is a special token where it is the value of a field, and a word in running text.
# A minus is a sign only at the start of the text or after a blank or one of ( , : =
PIECE = re.compile(rf"""
    (?P<mask> \[mask\] )
  | (?P<none> none (?![^\W_]) (?= \s* (?: $ | [;,.)] | x\s | none\b ) ) )
  | (?P<number> (?: (?<![^\s(,:=]) - )? [0-9]+ (?:\.[0-9]+)?
        (?= (?:{UNITS})? (?![^\W_]) ) )
  | (?P<word> [^\W_]+ )
  | (?P<mark> \S )""", re.VERBOSE)


# ---- Words and merges ----------------------------------------------------------------------------

def split(text):
    """The pieces of a text in lower case, [(kind, string), ...].

    A kind is "mask", "none", "number", "word" or "mark".
    """
    text = unicodedata.normalize("NFKC", text)
    text = text.replace("\u2212", "-").lower()              # the minus sign becomes a hyphen
    return [(found.lastgroup, found.group()) for found in PIECE.finditer(text)]


def plain(value):
    """The shortest decimal (str) that reads back as the same float32.  It never has an exponent."""
    return np.format_float_positional(np.float32(value), unique=True, trim="-")


def spell(word):
    """A word as a list of symbols, one per character.

    The last symbol ends in a blank, so that the word "in" differs from the start of "index".
    """
    return [*word[:-1], word[-1] + " "]


def merge(symbols, pair):
    """The symbols (list of str) after each occurrence of the pair became one symbol.

    We go from left to right, so that "aaa" with the pair (a, a) gives "aa", "a".
    """
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def learn_merges(counts, room):
    """Byte-pair encoding (Sennrich et al., 2016): join the most frequent neighbours, repeatedly.

    counts: a Counter of words.  room: the largest number of merges.  Returns the merges, a list of
    pairs of symbols, in the order in which they were learned.

    We remember which words hold a pair.  A merge then visits only these words and not all of them.
    """
    words = {word: spell(word) for word, _ in counts.most_common(MOST_WORDS)}
    pairs = Counter()
    where = defaultdict(set)
    for word, symbols in words.items():
        for pair in itertools.pairwise(symbols):
            pairs[pair] += counts[word]
            where[pair].add(word)
    merges = []
    while len(merges) < room and pairs:
        # spelling decides between equal counts, so that every machine learns the same merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] == 0:                                # every word is one symbol by now
            break
        merges.append(best)
        for word in where.pop(best):
            old = words[word]
            new = merge(old, best)
            for pair in itertools.pairwise(old):
                pairs[pair] -= counts[word]
            for pair in itertools.pairwise(new):
                pairs[pair] += counts[word]
                where[pair].add(word)
            words[word] = new
    return merges


# ---- Tokenizer -----------------------------------------------------------------------------------

class Tokenizer:
    """Turns texts into ids and values, and back.

    merges     pairs of symbols in the order in which they were learned, as from learn_merges
    context    the largest number of tokens of a text; [cls] and [sep] count as well
    """

    def __init__(self, merges, context):
        self.context = context
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: r for r, pair in enumerate(self.merges)}
        alphabet = [*LETTERS, *(c + " " for c in LETTERS + MARKS)]
        joined = [a + b for a, b in self.merges]
        self.symbols = list(dict.fromkeys([*SPECIALS, *alphabet, *joined]))
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.known = {}                                     # word -> ids, filled by word_ids

    @classmethod
    def train(cls, texts, vocab=4096, context=128):
        """A Tokenizer whose merges are learned on texts (list of str).

        Learning ends when there are `vocab` symbols, or earlier when every word is one symbol.
        """
        counts = Counter()
        for text, times in Counter(texts).items():
            for kind, piece in split(text):
                if kind == "word" and piece.isascii():
                    counts[piece] += times
        without_merges = len(cls([], context))
        return cls(learn_merges(counts, vocab - without_merges), context)

    def __len__(self):
        """The size of the vocabulary."""
        return len(self.symbols)

    def word_ids(self, word):
        """The ids (list) of one word or mark.  Merges apply in the order of their learning."""
        if word not in self.known:
            symbols = spell(word)
            while True:
                learned = [pair for pair in itertools.pairwise(symbols) if pair in self.rank]
                if not learned:
                    break
                symbols = merge(symbols, min(learned, key=self.rank.get))
            self.known[word] = [self.ids.get(symbol, UNK) for symbol in symbols]
        return self.known[word]

    def encode(self, text):
        """The ids and values of one text, two lists of one length.  [cls] is first, [sep] is last.

        Raises ValueError if the text has more tokens than the context.
        """
        ids = [CLS]
        vals = [0.0]
        for kind, piece in split(text):
            if kind == "number":
                ids.append(NUM)
                vals.append(max(-LARGEST, min(float(piece), LARGEST)))
                continue
            if kind == "mask":
                pieces = [MASK]
            elif kind == "none":
                pieces = [NONE]
            else:
                pieces = self.word_ids(piece)
            ids += pieces
            vals += [0.0] * len(pieces)
        ids.append(SEP)
        vals.append(0.0)
        if len(ids) > self.context:
            raise ValueError(f"text of {len(ids)} tokens, the encoder takes {self.context}: "
                             f"{text[:60]!r}...; shorten it, or build the encoder with a larger "
                             f"context")
        return ids, vals

    def __call__(self, texts):
        """Tokens of texts (list of str), padded to the longest of them.

        Raises ValueError if there is no text, or if a text has more tokens than the context.
        """
        if len(texts) == 0:
            raise ValueError("tokenizer: the list of texts is empty; give one text or more")
        encoded = [self.encode(text) for text in texts]
        longest = max(len(ids) for ids, _ in encoded)
        shape = (len(encoded), longest)
        ids = np.full(shape, PAD, np.int64)                 # (B, L)
        vals = np.zeros(shape, np.float32)                  # (B, L)
        mask = np.zeros(shape, bool)                        # (B, L)
        for row, (own_ids, own_vals) in enumerate(encoded):
            ids[row, :len(own_ids)] = own_ids
            vals[row, :len(own_ids)] = own_vals
            mask[row, :len(own_ids)] = True
        return Tokens(ids, vals, mask)

    def decode(self, ids, vals):
        """The text of a row of ids and values, in lower case, with one blank between its pieces."""
        spelled = {PAD: "", CLS: "", SEP: "", MASK: "[mask] ", NONE: "none "}
        text = ""
        for i, value in zip(ids, vals):
            if i == NUM:
                text += plain(value) + " "
            else:
                text += spelled.get(i, self.symbols[i])
        return text.strip()

    def checksum(self):
        """A SHA-256 (str) of all that decides which id a text gets."""
        return hashlib.sha256(json.dumps([self.context, self.merges]).encode()).hexdigest()

    def state(self):
        """All that from_state needs, in plain types."""
        return {"context": self.context, "merges": [list(pair) for pair in self.merges],
                "checksum": self.checksum()}

    @classmethod
    def from_state(cls, state):
        """The Tokenizer whose state() this is.

        Raises ValueError if the checksum does not belong to this vocabulary.
        """
        tokenizer = cls(state["merges"], state["context"])
        if tokenizer.checksum() != state["checksum"]:
            raise ValueError("text encoder's vocabulary does not match its checksum: it was "
                             "edited, and the word vectors belong to other words; restore the "
                             "file, or train the encoder again")
        return tokenizer
