"""How alike are the feature maps of two networks?

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
import numpy as np
import torch

from common import pictures


def linear_cka(first, second):
    """Linear centred kernel alignment (Kornblith et al., 2019, Eq. 4), a float in [0,1].

    first, second: (B, C, H, W) and (B, C', H, W), maps of the same images.  A position of an image
    is one sample, and its channels are the features.  1 means that the features are the same up to
    a rotation and a scale.
    """
    a = first.transpose(0, 1).flatten(1).double()                       # (C, B*H*W)
    b = second.transpose(0, 1).flatten(1).double()                      # (C', B*H*W)
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    return float((a @ b.T).square().sum() / ((a @ a.T).norm() * (b @ b.T).norm()))


@torch.no_grad()
def compare(run, name, maps, networks, shape, times):
    """Compare the maps of two networks at several times.  Writes NAME.png, and says the means.

    maps: function (network, time, eps) -> {(stage, level): (B, C, H, W)}.  networks: two names.
    shape: of eps, N(0,1) noise that is the same for both networks.
    """
    g = run.generator(name)
    series = {}
    for time in times:
        eps = torch.randn(shape, generator=g, device=run.device)        # (B, c, H, W)
        first, second = (maps(network, time, eps) for network in networks)
        for stage, level in first:
            xs, ys = series.setdefault(f"{stage} {level + 1}", ([], []))
            xs.append(time)
            ys.append(linear_cka(first[stage, level], second[stage, level]))
    for which, (_, values) in series.items():
        run.say(f"likeness (CKA) of the maps {which}: {np.mean(values):.3f}, from "
                f"{min(values):.3f} to {max(values):.3f}")
    pictures.curves(run.out / f"{name}.png", series, "t", f"CKA of {' and '.join(networks)}",
                    "maps on the way down (encoder) and up (decoder), by level")
    run.say(f"written: {run.out / name}.png")
