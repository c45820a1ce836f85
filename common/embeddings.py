"""Embeddings of sentences as a table {text: [tokens (L, W), mask (L,), pooled (D,)]}: from an encoder or from your own file.

    python -m common.embeddings --data data/ixi --contrasts t1,t2 --to prompts.txt      # the prompts that need an embedding

Letters in shape comments: B batch, L text tokens, W tower width, D shared width.
"""
import argparse
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
from common.files import RunError
from data.layouts import PROMPT_FIELDS, canonical_contrast, prompt

# tokens (B, N, W); mask (B, N) bool, True for a real token, or None; pooled (B, D), not normalised
Features = namedtuple("Features", "tokens mask pooled")


class Prompts:
    """The embeddings of the prompts of subjects, each computed once: the text encoder is frozen.

    encoder    a frozen clip.CLIP, or None with a file
    subjects   layouts.Subject; meta: {name: what is known of it}.  A prompt of an unknown subject says None everywhere
    contrasts  names, in the order of the channels;  fields: what a prompt says (data/layouts.py, prompt)
    file       .npz with embeddings of your own, see load_embeddings.  RunError if it lacks one of the subjects' prompts
    words      True: the tokens are needed too.  RunError if the file holds none
    """

    def __init__(self, encoder, subjects, contrasts, fields=PROMPT_FIELDS, file="", device="cpu", words=False):
        self.encoder = encoder
        self.meta = {subject.name: subject.meta for subject in subjects}
        self.contrasts = contrasts
        self.fields = fields
        self.file = file
        self.device = device
        self.words = words
        self.table = None
        if file:
            try:
                self.table, _ = load_embeddings(file)
            except ValueError as error:
                raise RunError(str(error)) from error
            found = self.features(self.every())             # tells now what the file lacks
            if words and found.tokens is None:
                raise RunError(f"--text-file {file}: holds no tokens, which --conditioning xattn needs; add them")

    def sentences(self, names, channels, masked=()):
        """The prompts of slices: names of subjects and channel numbers, one of each per slice."""
        texts = []
        for name, c in zip(names, channels):
            texts.append(prompt(self.contrasts[int(c)], self.meta.get(str(name), {}), self.fields, masked))
        return texts

    def every(self):
        """Every distinct prompt of these subjects, whole ones first, then with the modality masked."""
        texts = []
        for masked in ((), ("modality",)):
            for name in self.meta:
                channels = range(len(self.contrasts))
                texts += self.sentences([name] * len(channels), channels, masked)
        return list(dict.fromkeys(texts))

    def features(self, sentences):
        """Features of sentences on the device, their tokens (if there are any) padded; see embed."""
        table = self.table
        if table is None:
            table = self.encoder.remember(sentences)
        try:
            found = embed(table, sentences)
        except ValueError as error:
            raise RunError(f"--text-file {self.file}: {error}") from error
        return Features(*(None if part is None else part.to(self.device) for part in found))

    def report(self, run, name):
        """Say whether the prompts of one subject can be told apart; see report_closest."""
        sentences = self.sentences([name] * len(self.contrasts), range(len(self.contrasts)))
        table = self.table if self.table is not None else self.encoder.remember(sentences)
        report_closest(run, table, sentences)


def join_words(first, second):
    """The tokens of two Features side by side, each padded to the longer of both: (B, 2L, W) and mask (B, 2L)."""
    L = max(first.mask.shape[1], second.mask.shape[1])
    tokens = []
    masks = []
    for part in (first, second):
        missing = L - part.mask.shape[1]
        tokens.append(F.pad(part.tokens, (0, 0, 0, missing)))                       # (B, L, W)
        masks.append(F.pad(part.mask, (0, missing)))                                # (B, L)
    return torch.cat(tokens, dim=1), torch.cat(masks, dim=1)


def cosines(a, b):
    """All cosines between rows of a (n, D) and rows of b (m, D): (n, m), in float32 whatever the autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def look_up(table, prompts):
    """Features (on the CPU) of prompts from a table {prompt: [tokens, mask, pooled]}; ValueError if one is not in it.

    Its tokens and mask are None where the table has none.
    """
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in table]
    if missing:
        raise ValueError(f"{len(missing)} prompts have no embedding (first: {missing[0]!r}); add them to the file, "
                         f"which needs every prompt as it is written, also those with [MASK] or None")
    tokens, masks, pooled = zip(*(table[prompt] for prompt in prompts))
    if tokens[0] is None:
        return Features(None, None, torch.stack(pooled))                            # pooled (B, D)
    tokens = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)              # (B, L, W)
    masks = nn.utils.rnn.pad_sequence(list(masks), batch_first=True)                # (B, L)   padded with False
    return Features(tokens, masks, torch.stack(pooled))                             # pooled (B, D)


def embed(table, prompts):
    """What a network is conditioned on: Features as by look_up, pooled (n, D) after LayerNorm (mean 0, variance 1).

    Encoders differ in scale, and entries of a unit vector are tiny (512 of them: 0.04), so that maps would ignore them.
    """
    features = look_up(table, prompts)
    return features._replace(pooled=F.layer_norm(features.pooled, features.pooled.shape[1:]))      # (n, D)


def report_closest(run, table, prompts):
    """Say how alike the two most alike of the distinct prompts are, and warn above 0.99.  Returns that cosine of embed.

    Prompts that differ in a number alone (35 and 36 years) should be alike: give those that must be told apart.
    """
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) < 2:
        run.say("text features: a single prompt, there is nothing to tell apart")
        return None
    e = embed(table, prompts).pooled                                                # (n, D)
    alike = cosines(e, e).fill_diagonal_(-2)                                        # (n, n)
    i, j = divmod(alike.argmax().item(), len(prompts))
    cosine = alike[i, j].item()
    run.say(f"text features of {len(prompts)} prompts: cosine at most {cosine:.3f}, "
            f"of {prompts[i]!r} and {prompts[j]!r}")
    if cosine > 0.99:
        run.say("warning: these two can hardly be told apart, and what depends on them cannot differ; usual causes: "
                "the encoder trained too briefly, or no training caption held these words")
    return cosine


def load_embeddings(path):
    """A table as CLIP.remember's of text features made elsewhere (BiomedCLIP, say), and their width D.

    path: .npz with prompts (n strings), pooled (n, D) and, for cross-attention, tokens (n, L, W) with mask (n, L), True
    where a token is no padding.  ValueError if the file cannot be read or is not like that.
    """
    try:
        with open(path, "rb") as file:
            found = dict(np.load(file))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"embeddings {path}: not readable as .npz ({error}); write the file with "
                         f"numpy.savez(path, prompts=numpy.array(list_of_str), pooled=array)") from error
    fault, shapes = fault_of(found), {name: part.shape for name, part in found.items()}
    if fault:
        raise ValueError(f"embeddings {path}: {fault}; it holds {shapes} and needs prompts (n strings), pooled "
                         f"(n, D), and both or neither of tokens (n, L, W) and mask (n, L)")
    n = len(found["prompts"])
    pooled = torch.from_numpy(found["pooled"].astype(np.float32))                   # (n, D)
    tokens = masks = [None] * n
    if "tokens" in found:
        tokens = torch.from_numpy(found["tokens"].astype(np.float32))               # (n, L, W)
        masks = torch.from_numpy(found["mask"])                                     # (n, L)
    table = {str(prompt): list(row) for prompt, *row in zip(found["prompts"], tokens, masks, pooled)}
    return table, pooled.shape[1]


def fault_of(found):
    """Why the arrays {name: array} of a file are no embeddings, or None."""
    if "prompts" not in found or "pooled" not in found or ("tokens" in found) != ("mask" in found):
        return "an array is missing"
    prompts, pooled = found["prompts"], found["pooled"]
    if prompts.ndim != 1 or prompts.dtype.kind != "U" or not len(prompts):
        return "prompts are not a list of strings"
    if len(set(prompts.tolist())) < len(prompts):
        return "a prompt is there twice"
    if pooled.ndim != 2 or len(pooled) != len(prompts) or not finite(pooled):
        return "pooled is not one row of finite numbers per prompt"
    if "tokens" in found:
        tokens, mask = found["tokens"], found["mask"]
        if tokens.ndim != 3 or len(tokens) != len(prompts) or not finite(tokens):
            return "tokens are not one matrix of finite numbers per prompt"
        if mask.shape != tokens.shape[:2] or mask.dtype != bool or not mask.any(axis=1).all():
            return "mask is not one bool per token, at least one of each prompt true"   # else attention gives NaN
    return None


def finite(array):
    return array.dtype.kind in "fiu" and bool(np.isfinite(array).all())


def main(argv=None):
    """Write every prompt of a data set to a text file, one a line, for an encoder of your own."""
    parser = argparse.ArgumentParser(prog="python -m common.embeddings", description=main.__doc__)
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--contrasts", required=True, help="contrasts, separated by commas")
    parser.add_argument("--fields", default=",".join(PROMPT_FIELDS), help="what a prompt says [all]")
    parser.add_argument("--to", required=True, help="text file; it must not exist")
    args = parser.parse_args(argv)
    contrasts = tuple(canonical_contrast(name) for name in args.contrasts.split(","))
    data.make_phantom(args.data, print)
    subjects = data.find_layout(args.data, contrasts).subjects
    lines = Prompts(None, subjects, contrasts, tuple(args.fields.split(","))).every()
    if Path(args.to).exists():
        raise RunError(f"{args.to} exists; name another file with --to")
    Path(args.to).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.to}: {len(lines)} prompts, one a line")


if __name__ == "__main__":
    try:
        main()
    except (RunError, data.DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
