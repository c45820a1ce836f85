"""Prompt encoders of several modalities, with one shared space (MedM2G, Sec. 3.2).

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

The towers are those of common/clip.py.  The losses that train them stand in the script.

Letters in shape comments: B samples, n rows, L text tokens, D width of the shared space.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from common.clip import SIZES, ImageEncoder, TextEncoder
from common.rounds import there
from common.tokenizer import Tokenizer, Tokens


class PromptEncoders(nn.Module):
    """C_M of Sec. 3.2: one tower per modality, all into one space of width D (common/clip.py)."""

    def __init__(self, size_name, modalities, tokenizer, image_size, rounds):
        super().__init__()
        size = SIZES[size_name]
        self.dim = size["embed"]
        self.tokenizer = tokenizer
        self.towers = nn.ModuleDict()
        for modality in modalities:
            if modality == "text":
                self.context = size["text"]["context"]
                text = {**size["text"], "vocab": len(tokenizer)}
                tower = TextEncoder(**text, embed=self.dim)
                # With CLIP's .02, a small tower needs several times as many steps to begin.
                nn.init.normal_(tower.embedding.weight, std=text["width"] ** -0.5)
                self.towers[modality] = tower
            else:
                self.towers[modality] = ImageEncoder(2, 1, image_size, **size["image"],
                                                     embed=self.dim)
            self.register_buffer(f"mean_{modality}", torch.zeros(self.dim))
        start = math.log(1 / 0.07)                                          # that of CLIP
        self.log_scale = nn.ParameterList(torch.tensor(start) for _ in range(rounds))

    def forward(self, modality, x):
        """x: images (B, 1, H, W) in [0,1], or a list of str.  Returns (B, D), not normalised."""
        if modality == "text":
            device = self.log_scale[0].device
            parts = (torch.as_tensor(part, device=device) for part in self.tokenizer(x))
            x = Tokens(*(part[:, :self.context] for part in parts))         # (B, L) each, cut
        return self.towers[modality](x).pooled.float()                      # (B, D)

    def prompt(self, modality, x):
        """What the diffusers are told: C(x) without the mean of its modality, (B, D) of length 1.

        In a contrastive space, all vectors of one modality share an offset.  Without it, a diffuser
        that learned from CT prompts also understands text prompts [D6].
        """
        e = F.normalize(self(modality, x), dim=1)                           # (B, D)
        return F.normalize(e - getattr(self, f"mean_{modality}"), dim=1)    # (B, D)

    @torch.no_grad()
    def centre(self, samples):
        """Measure the mean vector of each modality over the training samples [D6]."""
        self.eval()
        for modality in self.towers:
            # encoded calls self(modality, x) for all samples of a stream.
            found = [samples.encoded(self, c) for c in samples.of_modality(modality)]
            mean = F.normalize(torch.cat(found), dim=1).mean(0)             # (D,)
            getattr(self, f"mean_{modality}").copy_(mean)


def make_projector(dim, width):
    """The head on which Eq. (4) is computed.  It has BatchNorm and is thrown away afterwards."""
    return nn.Sequential(nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU(),
                         nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
                         nn.Linear(width, width))


def build_encoders(cfg, run, streams, texts):
    """Fresh prompt encoders.  texts: those on which the pieces of words are learned, or None."""
    if texts is not None:
        # Long reports are cut by the encoder, so the tokenizer takes any length.
        tokenizer = Tokenizer.train(texts, SIZES[cfg.encoder]["text"]["vocab"], context=10 ** 6)
        run.about["tokenizer"] = tokenizer.state()
    tokenizer = Tokenizer.from_state(run.about["tokenizer"])
    return PromptEncoders(cfg.encoder, there(streams), tokenizer, cfg.size, len(cfg.rounds))
