"""Contrastive learning: which vectors belong together, how alike they are, and what finds what.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

The loss is InfoNCE (van den Oord et al., 2018) in both directions, as in CLIP (Radford et al.,
2021).

    logits = scale * cosines(images, texts)             # (B, B), scale: the inverse temperature
    loss = contrastive_loss(logits, groups_of(captions))
    retrieval(images, texts)                            # the share of images that find their text

Letters in shape comments: B batch, n and m rows, D width.
"""
import torch
from torch.nn import functional as F


def cosines(a, b):
    """All cosines between rows of a (n, D) and rows of b (m, D).  Returns (n, m).

    They are computed in float32, also inside of an autocast.
    """
    with torch.autocast(a.device.type, enabled=False):
        a = F.normalize(a.float(), dim=-1)                              # (n, D)
        b = F.normalize(b.float(), dim=-1)                              # (m, D)
        return a @ b.T                                                  # (n, m)


def contrastive_loss(logits, groups):
    """Symmetric InfoNCE in which all members of a group are positives of each other.

    logits: (B, B).  groups: (B,) integers.  Returns ().

    Samples with the same caption belong to one group.  Otherwise the loss would push them apart.
    Each member of a group gets an equal share of the target.  If all groups differ, this is CLIP's
    loss.  Its minimum is loss_floor(groups).
    """
    same = (groups[:, None] == groups[None]).to(logits.dtype)           # (B, B)
    target = same / same.sum(1, keepdim=True)                           # (B, B)  symmetric
    rows = (target * logits.log_softmax(1)).sum(1).mean()               # ()
    columns = (target * logits.log_softmax(0)).sum(0).mean()            # ()
    return -(rows + columns) / 2                                        # ()


def loss_floor(groups):
    """The smallest value that contrastive_loss can have.  groups: (B,).  Returns ().

    It is the entropy of the targets, and 0 if all groups differ.
    """
    return (groups[:, None] == groups[None]).sum(1).float().log().mean()    # ()


def groups_of(texts):
    """Integers (B,) that are equal where the texts (list of str) are equal."""
    names = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([names[text] for text in texts])                # (B,)


def instance_loss(a, b, scale, slices):
    """Two contrasts of one slice must find each other among the slices of the batch.  Returns ().

    a, b: (B, D), pooled features of the same slices in two contrasts.  scale: inverse temperature.
    slices: (B,) integers, which slice it is.

    Captions name the contrast and say little about the anatomy.  Without this term the image tower
    may throw the anatomy away.
    """
    return contrastive_loss(scale * cosines(a, b), slices)              # ()


def nearest(a, b):
    """For each row of a (n, D) the row of b (m, D) with the highest cosine.  Returns (n,)."""
    chunks = [cosines(rows, b).argmax(1) for rows in a.split(1024)]     # n times m may be large
    return torch.cat(chunks)                                            # (n,)


def retrieval(a, b):
    """The share of rows i of a (n, D) whose nearest row of b (n, D) is row i.  Chance is 1/n."""
    own = torch.arange(len(a), device=a.device)                         # (n,)
    return (nearest(a, b) == own).float().mean().item()
