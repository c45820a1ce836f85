"""The codecs of a method with images and reports: one autoencoder for images, one for reports.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    codecs = train_codecs(cfg, run, ds)         # stages "autoencoder" and "text"
    z = codecs.encode("ct", x)                  # (B, z, h, w) of images (B, 1, H, W) in [0,1]
    z = codecs.encode("text", reports)          # (B, Z) of a list of str
    codecs.decode("ct", z)                      # the way back

A script's Config has the fields of CodecConfig.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.autoencoder import load_autoencoder, train_autoencoder
from common.clip import SIZES, ImageEncoder
from common.rounds import fresh_of
from common.textvae import TextVAE, Words, load_textvae, train_textvae
from common.vqae import VQAE
from data import TEXT

VOCABULARY = 4000       # words of reports, about as many as MIMIC-CXR has
# The fields that matter to the stage "text".
TEXT_FIELDS = ("text_width", "text_depth", "text_heads", "text_z", "text_length", "text_least",
               "text_steps", "text_batch", "text_lr")


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of both codecs: those of Stable Diffusion's autoencoder, and of OPTIMUS."""
    size: int = 512                             # height and width of a slice in pixels
    ae_base: int = 128                          # channels of the image autoencoder
    ae_mult: tuple[int, ...] = (1, 2, 4, 4)     # channels of its levels, times ae_base
    ae_blocks: int = 2                          # its residual blocks per level
    ae_steps: int = 100_000                     # of the image autoencoder
    ae_batch: int = 12                          # images per step of it
    ae_lr: float = 4.5e-6                       # its learning rate at the start
    text_width: int = 768                       # width of the text VAE
    text_depth: int = 12                        # blocks of its encoder and of its decoder
    text_heads: int = 12                        # heads of its attention
    text_z: int = 768                           # numbers of a text latent
    text_length: int = 100                      # words of a report; the rest is cut
    text_least: int = 3                         # a word must come so often, or it is <unk>
    text_steps: int = 50_000                    # of the text VAE
    text_batch: int = 128                       # reports per step of it
    text_lr: float = 1e-4                       # its peak learning rate

    def __post_init__(self):
        if self.text_width % self.text_heads:
            raise ValueError(f"--text-width {self.text_width} must be divisible by --text-heads "
                             f"{self.text_heads}")


@dataclass
class Codecs:
    """Both codecs, trained and frozen.

    ae, textvae   networks; textvae is None without reports
    size          height and width of an image
    beam          beginnings of a report that are kept when it is decoded, see common/textvae.py
    """

    ae: nn.Module
    textvae: nn.Module | None
    size: int
    beam: int = 1

    def encode(self, stream, x):
        """The latent of a stream.  x: images (B, 1, H, W) in [0,1], or a list of str."""
        return self.textvae.to_latent(x) if stream == TEXT else self.ae.to_latent(2 * x - 1)

    def decode(self, stream, z):
        """Images (B, 1, H, W) in [0,1], or a list of str.  z: latents."""
        if stream == TEXT:
            return self.textvae.from_latent(z, self.beam)
        return (self.ae.from_latent(z) + 1) / 2

    def shape(self, stream):
        """The shape of a latent: (z, h, w), or (Z,) of text."""
        if stream == TEXT:
            return (self.textvae.z,)
        return (self.ae.z, self.size // self.ae.f, self.size // self.ae.f)


def make_autoencoder(cfg):
    """A fresh KL-autoencoder, for images of all kinds.  Small ones have no attention."""
    return VQAE(cfg.ae_base, cfg.ae_mult, cfg.ae_blocks, 0, cfg.size, middle=cfg.ae_base >= 64,
                bottleneck="kl")


def at_work(cfg):
    """For an Outline: the image autoencoder, the shape of its latents, and what `before` tells.

    The words of the reports are not known yet.  We count with as many as MIMIC-CXR has.
    """
    ae = make_autoencoder(cfg)
    image = torch.zeros(1, 1, cfg.size, cfg.size)
    side = cfg.size // ae.f
    before = {"ae_batch": (False, lambda: ae(image))}
    if any("text" in pair for pair in cfg.rounds):
        vae = make_textvae(cfg, Words([str(i) for i in range(VOCABULARY)], cfg.text_length))
        ids = torch.zeros(1, cfg.text_length + 2, dtype=torch.long)

        def through_text():
            return vae.encode(ids), vae.decode(torch.zeros(1, cfg.text_z), ids)
        before["text_batch"] = (False, through_text)
    # In a round of the alignment, only fresh towers have gradients.  Each sees its images, and with
    # the visual invariant a second view of them.
    learning = max(sum(m != "text" and m in fresh for m in pair.split("-"))
                   for pair, fresh in zip(cfg.rounds, fresh_of(cfg.rounds)))
    size = SIZES[cfg.encoder]
    tower = ImageEncoder(2, 1, cfg.size, embed=size["embed"], **size["image"])
    views = learning * (1 + cfg.vi)
    before["align_batch"] = (False, lambda: [tower(image) for _ in range(views)])
    return ae, (ae.z, side, side), before


def make_textvae(cfg, words):
    """A fresh TextVAE.  words: a textvae.Words."""
    return TextVAE(words, cfg.text_width, cfg.text_depth, cfg.text_heads, cfg.text_z)


def all_images(run, ds, part):
    """(function numbers -> images (B, 1, H, W) in [-1,1], how many): all images of a part."""
    images = ds.part(part)
    is_image = ds.present[ds.rows(part)].copy()                             # (n, C)
    is_image[:, [c for c, stream in enumerate(ds.contrasts) if stream == TEXT]] = False
    rows, channels = np.nonzero(is_image)

    def picture(numbers):
        u = run.fetch(images, rows[numbers])                                # (B, C, H, W)
        own = u[torch.arange(len(u)), torch.from_numpy(channels[numbers])]  # (B, H, W)
        return 2 * own[:, None] - 1                                         # (B, 1, H, W)
    return picture, len(rows)


def train_codecs(cfg, run, ds):
    """Stages "autoencoder" and "text", on the training subjects.  Without reports "text" is empty.

    Images of all streams come in shuffled passes.  Adversarial loss is off.
    """
    ae = train_autoencoder(run, *all_images(run, ds, "train"), all_images(run, ds, "val"),
                           lambda: make_autoencoder(cfg), cfg.ae_steps, cfg.ae_batch, cfg.ae_lr,
                           disc_weight=0)
    texts = [text for text in ds.reports(ds.rows("train")) if text]
    if TEXT not in ds.contrasts or not texts:
        run.skip("text")
        return Codecs(ae, None, cfg.size)
    words = Words.learn(texts, cfg.text_least, cfg.text_length)
    run.about["words"] = words.words
    unseen = [text for text in ds.reports(ds.rows("val")) if text]
    textvae = train_textvae(run, texts, unseen, lambda: make_textvae(cfg, words), cfg.text_steps,
                            cfg.text_batch, cfg.text_lr)
    return Codecs(ae, textvae, cfg.size)


def load_codecs(cfg, run):
    """The Codecs of a run's checkpoint."""
    ae = load_autoencoder(run, lambda: make_autoencoder(cfg))
    textvae = None
    if "words" in run.about:
        words = Words(run.about["words"], cfg.text_length)
        textvae = load_textvae(run, lambda: make_textvae(cfg, words))
    return Codecs(ae, textvae, cfg.size, cfg.beam)
