"""Prompts and their features in a table, from common/clip.py or from a file of the user's own.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A network that is conditioned on prompts looks them up in a table {prompt: [tokens, mask, pooled]}:

    table = clip.remember(prompts)                      # from the text tower of common/clip.py
    table, D = load_embeddings("emb.npz")               # or from BiomedCLIP, say
    report_closest(run, table, prompts)                 # can the prompts be told apart?
    embed(table, prompts).pooled                        # (n, D), after LayerNorm

Letters in shape comments: B or n prompts, L tokens, W width of a token, D width of a prompt.
"""
from collections import namedtuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.contrastive import cosines
from common.files import RunError, read_arrays

Features = namedtuple("Features", "tokens mask pooled")
# tokens: (B, L, W).  mask: (B, L) bool, True at a token, False at padding; None without padding.
# pooled: (B, D), one vector for the whole text or image; its length is not normalised.


def look_up(table, prompts):
    """Features of prompts (list of str) from a table {prompt: [tokens, mask, pooled]}, on the CPU.

    tokens and mask are None if the table has none.  Raises ValueError if a prompt is missing.
    """
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in table]
    if missing:
        raise ValueError(f"{len(missing)} prompts have no embedding (first: {missing[0]!r}); add "
                         f"them to the file, which needs every prompt as it is written, also "
                         f"those with [MASK] or None")
    rows = [table[prompt] for prompt in prompts]
    pooled = torch.stack([row[2] for row in rows])                                  # (B, D)
    if rows[0][0] is None:
        return Features(None, None, pooled)
    tokens = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)  # (B, L, W)
    mask = nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True)    # (B, L)
    return Features(tokens, mask, pooled)


def embed(table, prompts):
    """What a network is conditioned on: Features as from look_up, pooled (n, D) after LayerNorm.

    After LayerNorm every row has mean 0 and variance 1.  Encoders differ in scale: an entry of a
    unit vector of 512 numbers is about 0.04, and a linear map would nearly ignore it.

    Raises ValueError if a prompt is missing in the table.
    """
    features = look_up(table, prompts)
    pooled = F.layer_norm(features.pooled, features.pooled.shape[1:])               # (n, D)
    return features._replace(pooled=pooled)


def report_closest(run, table, prompts):
    """Say which two of the distinct prompts are most alike.  Warn if their cosine is above 0.99.

    run: a common.run.Run, only for run.say.  Returns the cosine of the two rows of embed, or None
    if there is only one prompt.

    Prompts that differ only in a number (35 and 36 years) should be alike.  Give only prompts that
    the network must tell apart.  Raises ValueError if a prompt is missing in the table.
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
        run.say("warning: these two can hardly be told apart, and what depends on them cannot "
                "differ; usual causes: the encoder trained too briefly, or no training caption "
                "held these words")
    return cosine


def load_embeddings(path):
    """A table {prompt: [tokens, mask, pooled]} of text features made elsewhere, and their width D.

    path: an .npz file with these arrays
        prompts    (n,) strings, each prompt as it is written
        pooled     (n, D)
        tokens     (n, L, W), only for cross-attention
        mask       (n, L) bool, True at a token and False at padding; only together with tokens

    Raises ValueError if the file cannot be read, or if its arrays are not like that.
    """
    try:
        found = read_arrays(path)
    except RunError as error:
        raise ValueError(f"embeddings {path}: not readable as .npz ({error}); write the file with "
                         f"numpy.savez(path, prompts=numpy.array(list_of_str), "
                         f"pooled=array)") from error
    fault = fault_of(found)
    if fault:
        shapes = {name: part.shape for name, part in found.items()}
        raise ValueError(f"embeddings {path}: {fault}; it holds {shapes} and needs prompts "
                         f"(n strings), pooled (n, D), and both or neither of tokens (n, L, W) and "
                         f"mask (n, L)")
    pooled = torch.from_numpy(found["pooled"].astype(np.float32))                   # (n, D)
    table = {str(prompt): [None, None, row] for prompt, row in zip(found["prompts"], pooled)}
    if "tokens" in found:
        tokens = torch.from_numpy(found["tokens"].astype(np.float32))               # (n, L, W)
        masks = torch.from_numpy(found["mask"])                                     # (n, L)
        for i, entry in enumerate(table.values()):
            entry[0] = tokens[i]                                                    # (L, W)
            entry[1] = masks[i]                                                     # (L,)
    return table, pooled.shape[1]


def fault_of(found):
    """Why the arrays {name: array} of a file are no embeddings (str), or None if they are."""
    if "prompts" not in found or "pooled" not in found or ("tokens" in found) != ("mask" in found):
        return "an array is missing"
    prompts = found["prompts"]
    pooled = found["pooled"]
    if prompts.ndim != 1 or prompts.dtype.kind != "U" or not len(prompts):
        return "prompts are not a list of strings"
    if len(set(prompts.tolist())) < len(prompts):
        return "a prompt is there twice"
    if pooled.ndim != 2 or len(pooled) != len(prompts) or not pooled.size or not finite(pooled):
        return "pooled is not one row of finite numbers per prompt"
    if "tokens" in found:
        tokens = found["tokens"]
        mask = found["mask"]
        if tokens.ndim != 3 or len(tokens) != len(prompts) or not finite(tokens):
            return "tokens are not one matrix of finite numbers per prompt"
        # attention over a prompt without any token would give NaN
        if mask.shape != tokens.shape[:2] or mask.dtype != bool or not mask.any(axis=1).all():
            return "mask is not one bool per token, at least one of each prompt true"
    return None


def finite(array):
    """True if the array holds numbers and all of them are finite, also in float32."""
    if array.dtype.kind not in "fiu":
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).all())
