"""The latents of a data set in which every slice gives several images to the autoencoder.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
from common.vqae import cached_latents


class Latents:
    """The latents of all images of n slices, computed once and kept on disk.

    run       common.run.Run
    ae        a frozen common.vqae.VQAE
    picture   function: numbers -> images (B, 1, H, W) in [-1,1].  Image kinds * i + k is the k-th
              image of slice i
    kinds     images per slice
    count     n
    name      stands for the slices and their order

    shape     (z, h, w) of a latent
    """

    def __init__(self, run, ae, picture, kinds, count, name):
        self.run = run
        self.kinds = kinds
        self.count = count
        # A benchmark leaves nothing behind.
        folder = run.args.cache if run.seconds is None else run.out
        self.stored = cached_latents(run, ae, picture, kinds * count, name, folder)
        self.shape = self.stored.shape[1:]

    def __call__(self, rows):
        """The latents of slices, a list of `kinds` tensors (B, z, h, w).  rows: (B,) numbers."""
        return [self.run.fetch(self.stored, self.kinds * rows + k) for k in range(self.kinds)]
