"""The encoder of a script, which is a CLIP trained on its own subjects, and embeddings of prompts.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

This command

    python -m common.encoder --data data/ixi --contrasts t1,t2 --to prompts.txt

writes all prompts of a data set, one a line, for an encoder of your own (common/embeddings.py).

Letters in shape comments: B slices, L tokens, W width of a token, D width of an embedding.
"""
import argparse
import itertools
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import data
from common import clip, contrastive
from common.embeddings import Features, embed, load_embeddings, report_closest
from common.files import RunError
from data import PROMPT_FIELDS, canonical_contrast, prompt


def train_encoder(run, ds, captions, size_name, image_size, steps, batch, lr, **terms):
    """Train a fresh CLIP on the training subjects and freeze it: stage "encoder" of a script.

    ds: data.Dataset.  captions: a function that returns, for each of some rows of ds, one sentence
    per contrast, None for a missing one.  terms: further arguments of clip.train_clip.

    Returns the CLIP.  What it can do on validation slices is said to the user.

    Raises ValueError if the sizes do not agree, see clip.train_clip.
    """
    rows = ds.rows("train")
    texts = captions(rows)
    vocabulary = [text for text in itertools.chain.from_iterable(texts) if text is not None]
    encoder = clip.build(size_name, vocabulary, image_size, seed=run.seed).to(run.device)
    encoder.subjects = sorted(ds.split["train"])
    run.about["encoder"] = {k: v for k, v in encoder.state().items() if k != "weights"}
    slices = ds.part("train")
    batch = min(batch, len(rows))
    clip.train_clip(run, encoder, slices, texts, ds.subject[rows], steps, batch, lr, **terms)
    encoder.freeze()
    unseen = ds.rows("val", 64)
    if len(unseen):
        scores = measure(encoder, ds.images[unseen], captions(unseen))
        words = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in scores.items()]
        run.say(f"encoder on validation slices: {', '.join(words)}")
    return encoder


def encode_all(encoder, images, batch=32):
    """Encode images, any array (n, C, H, W) in [0,1].  Returns pooled (n, C, D) on the CPU."""
    pooled = []
    for start in range(0, len(images), batch):
        u = torch.from_numpy(np.asarray(images[start:start + batch], dtype=np.float32))
        pooled.append(encode(encoder, u.to(encoder.logit_scale.device)).cpu())      # (B, C, D)
    return torch.cat(pooled)                                            # (n, C, D)


@torch.no_grad()
def measure(encoder, images, captions):
    """Measure what the encoder can do on slices, which should come from validation subjects.

    images: (n, C, H, W) in [0,1].  captions: n lists of C str, None for a missing contrast.
    Returns {name: float}:
        image_to_text     the share of the images whose nearest distinct caption is their own
        slice_to_slice    the share of the n slices that are found again in another contrast, as the
                          mean over ordered pairs of contrasts; only if C > 1 and none is missing
        image_to_text_chance, slice_to_slice_chance    what guessing scores
    """
    z = encode_all(encoder, images)                                        # (n, C, D)
    every = list(itertools.chain.from_iterable(captions))
    there = torch.tensor([text is not None for text in every])          # (n*C,)
    own = [text for text in every if text is not None]
    texts = list(dict.fromkeys(own))
    e = []
    for start in range(0, len(texts), 256):
        tokens = encoder.tokenizer(texts[start:start + 256])
        e.append(encoder.encode_tokens(tokens).pooled.float().cpu())    # (256, D)
    found = contrastive.nearest(z.flatten(0, 1)[there], torch.cat(e))   # (k,)
    hits = found == contrastive.groups_of(own)                          # (k,)
    result = {"image_to_text": hits.float().mean().item(), "image_to_text_chance": 1 / len(texts)}
    pairs = list(itertools.permutations(range(z.shape[1]), 2))
    if pairs and there.all():
        shares = [contrastive.retrieval(z[:, i], z[:, j]) for i, j in pairs]
        result["slice_to_slice"] = sum(shares) / len(pairs)
        result["slice_to_slice_chance"] = 1 / len(z)
    return result


def encoder_at_work(cfg):
    """For Outline.before: a function that encodes one slice."""
    size = clip.SIZES[cfg.encoder]
    tower = clip.ImageEncoder(2, 1, cfg.size, embed=size["embed"], **size["image"])
    image = torch.zeros(1, 1, cfg.size, cfg.size)
    return {"encoder_batch": (True, lambda: tower(image))}


def load_encoder(run):
    """Return the frozen CLIP of a run's checkpoint, on the run's device."""
    weights = run.stages["encoder"]["parts"]["clip"]
    run.used.add(("encoder", "clip"))
    encoder = clip.CLIP.from_state({**run.about["encoder"], "weights": weights})
    return encoder.freeze().to(run.device)


@torch.no_grad()
def encode(encoder, u):
    """Return one feature per contrast, from the frozen image tower.

    u: (B, C, H, W) in [0,1].  Returns (B, C, D).
    """
    B, C = u.shape[:2]
    one_by_one = u.flatten(0, 1).unsqueeze(1)                           # (B*C, 1, H, W)
    pooled = encoder.encode_image(one_by_one).pooled                    # (B*C, D)
    return pooled.float().unflatten(0, (B, C))                          # (B, C, D)


def encode_slices(run, encoder, slices):
    """Encode all slices (n, C, H, W) of a memory-mapped array.

    Returns (n, C, D), on the run's device.
    """
    features = []
    for part in np.array_split(np.arange(len(slices)), math.ceil(len(slices) / 32)):
        features.append(encode(encoder, run.fetch(slices, part)))
    return torch.cat(features)                                          # (n, C, D)


# A Text is what a network is told about a batch.  It holds three embeddings (B, D): of the source's
# prompt, of the target's prompt, and of the target's prompt with the modality masked.  If words are
# needed, it also holds the tokens of source and target side by side, (B, 2L, W).  Some of them are
# padding; is_word (B, 2L) is False there.
Text = namedtuple("Text", "e_src e_tgt e_mask words is_word")


class Prompts:
    """The embeddings of the prompts of subjects.

    Each is computed once, because the text encoder is frozen.

    encoder    a frozen clip.CLIP, or None with a file
    subjects   list of layouts.Subject; for others only the contrast is known
    contrasts  names, in the order of the channels
    fields     what a prompt says (data/prompts.py)
    file       .npz with embeddings of your own, see load_embeddings
    device     where the embeddings shall lie
    words      True if the tokens are needed too

    Raises RunError if the file cannot be used, if it lacks one of the subjects' prompts, or if it
    holds no tokens although they are needed.
    """

    def __init__(self, encoder, subjects, contrasts, fields=PROMPT_FIELDS, file="", device="cpu",
                 words=False):
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
            sentences = self.every()                        # there are none without subjects
            # This tells now what the file lacks.
            found = self.features(sentences) if sentences else None
            if words and found and found.tokens is None:
                raise RunError(f"--text-file {file}: holds no tokens, which --conditioning xattn "
                               "needs; add them")

    def sentences(self, names, channels, masked=()):
        """Return the prompts of slices.

        names: names of subjects.  channels: channel numbers.  There is one of each per slice.
        masked: the fields that a prompt hides.
        """
        texts = []
        for name, c in zip(names, channels):
            known = self.meta.get(str(name), {})
            texts.append(prompt(self.contrasts[int(c)], known, self.fields, masked))
        return texts

    def every(self):
        """Return every distinct prompt of these subjects.

        The whole ones come first, then those with the modality masked.
        """
        texts = []
        for masked in ((), ("modality",)):
            for name in self.meta:
                channels = range(len(self.contrasts))
                texts += self.sentences([name] * len(channels), channels, masked)
        return list(dict.fromkeys(texts))

    def features(self, sentences):
        """Return the Features of sentences on the device, see embed.

        Their tokens, if there are any, are padded.  Raises RunError if the file lacks a sentence.
        """
        table = self.table
        if table is None:
            table = self.encoder.remember(sentences)
        try:
            found = embed(table, sentences)
        except ValueError as error:
            raise RunError(f"--text-file {self.file}: {error}") from error
        return Features(*(None if part is None else part.to(self.device) for part in found))

    def __call__(self, names, src, tgt):
        """Return the Text of slices.

        names: names of subjects.  src, tgt: channel numbers.  There is one of each per slice.
        Raises RunError if the file lacks a prompt.
        """
        source = self.features(self.sentences(names, src))
        target = self.features(self.sentences(names, tgt))
        masked = self.features(self.sentences(names, tgt, ("modality",)))
        words = None
        is_word = None
        if self.words:
            words, is_word = join_words(source, target)                 # (B, 2L, W), (B, 2L)
        return Text(source.pooled, target.pooled, masked.pooled, words, is_word)

    def report(self, run, name):
        """Say whether the prompts of one subject can be told apart, see report_closest."""
        sentences = self.sentences([name] * len(self.contrasts), range(len(self.contrasts)))
        table = self.table if self.table is not None else self.encoder.remember(sentences)
        report_closest(run, table, sentences)


def join_words(first, second):
    """Put the tokens of two Features side by side, each padded to the longer of both.

    Returns the tokens (B, 2L, W) and their mask (B, 2L).
    """
    L = max(first.mask.shape[1], second.mask.shape[1])
    tokens = []
    masks = []
    for part in (first, second):
        missing = L - part.mask.shape[1]
        tokens.append(F.pad(part.tokens, (0, 0, 0, missing)))           # (B, L, W)
        masks.append(F.pad(part.mask, (0, missing)))                    # (B, L)
    return torch.cat(tokens, dim=1), torch.cat(masks, dim=1)


def main(argv=None):
    """Write every prompt of a data set to a text file, one a line, for an encoder of your own."""
    parser = argparse.ArgumentParser(prog="python -m common.encoder", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--contrasts", required=True, help="contrasts, separated by commas")
    parser.add_argument("--fields", default=",".join(PROMPT_FIELDS),
                        help="what a prompt says [all]")
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
