"""The codebook of a vector-quantised autoencoder, how much of it is used, and codes that died.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A codebook is a list of K vectors, the codes.  Each site of a feature map is replaced by its nearest
code.  The idea and the loss are those of van den Oord et al., "Neural Discrete Representation
Learning" (NeurIPS 2017), Eqs. (2) and (3).

A code that is nearest to no site gets no gradient and never comes back by itself.  Such a dead code
is set to a site of the current batch now and then.  Dhariwal et al., "Jukebox" (2020), call this
random restarts.

Letters in shape comments: B batch, z channels of a latent, h w its height and width, N sites of a
batch (N = B*h*w), K codes.
"""
import torch
from torch import nn

from common.device import full_precision

BETA = 0.25             # weight of the commitment term
CHUNK = 8192            # sites whose distances to all codes are in memory at the same time
DEAD_SHARE = 0.03       # a code is dead if it is chosen less often than this part of an equal share


def sites_of(h):
    """Return the sites of a feature map as rows.  h: (B, z, h, w).  Returns (B*h*w, z), fp32."""
    return h.float().permute(0, 2, 3, 1).flatten(0, 2)                  # (N, z)


@torch.no_grad()
def nearest(sites, codes, chunk=CHUNK):
    """Return the number of the nearest code of each site; of equal ones, the first.

    sites: (N, z).  codes: (K, z).  Both are fp32.  Returns (N,), int64.

    |s - e|^2 = |s|^2 - 2 s.e + |e|^2, and the first term is the same for all codes.  The (N, K)
    table of distances is large, so it is made for `chunk` sites at a time.  It is computed in fp32,
    because bf16 would choose wrong codes.
    """
    found = []
    with full_precision(sites.device):
        squares = codes.square().sum(1)                                 # (K,)
        for part in sites.split(chunk):
            distance = squares - 2 * part @ codes.T                     # (chunk, K)
            found.append(distance.argmin(1))                            # (chunk,)
    return torch.cat(found)                                             # (N,)


class Codebook(nn.Module):
    """K codes of z numbers.  Fresh codes are placeholders; training starts from `first_codes`."""

    def __init__(self, codes, z):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, z))

    def forward(self, h):
        """Replace each site by its nearest code.

        h: (B, z, h, w).  Returns

            zq     (B, z, h, w)  the codes.  The gradient goes straight through to h, unchanged.
            loss   ()  |sg(h) - e|^2 + BETA |h - sg(e)|^2, means over all numbers; sg stops the
                   gradient.  The first term moves the codes, the second one commits the encoder.
            idx    (B, h, w)  numbers of the codes, int64
        """
        h = h.float()                                                   # (B, z, h, w)
        idx = nearest(sites_of(h), self.weight)                         # (N,)
        idx = idx.view(len(h), *h.shape[2:])                            # (B, h, w)
        e = self.weight[idx].permute(0, 3, 1, 2)                        # (B, z, h, w)
        codebook_term = (h.detach() - e).square().mean()                # ()
        commitment = (h - e.detach()).square().mean()                   # ()
        zq = h + (e - h).detach()                                       # (B, z, h, w)
        return zq, codebook_term + BETA * commitment, idx


def draw_sites(sites, count, generator):
    """Return `count` random rows of sites (N, z), as (count, z).

    No row comes twice if there are enough of them.  Otherwise rows repeat, and noise of 1 % of
    their spread makes them different.
    """
    n, z = sites.shape
    device = sites.device
    if n >= count:
        return sites[torch.randperm(n, generator=generator, device=device)[:count]]  # (count, z)
    rows = torch.randint(n, (count,), generator=generator, device=device)   # (count,)
    noise = torch.randn(count, z, generator=generator, device=device)   # (count, z)
    return sites[rows] + 0.01 * sites.std(0, unbiased=False) * noise    # (count, z)


@torch.no_grad()
def first_codes(codebooks, sites, generator):
    """Set all codes to random sites of the first batch.

    codebooks: list of Codebook that get the same codes (the trained one and its average).
    sites: (N, z).

    Codes that all start near the origin, as in VQGAN's program, would compete for the same sites.
    """
    fresh = draw_sites(sites, len(codebooks[0].weight), generator)      # (K, z)
    for codebook in codebooks:
        codebook.weight.copy_(fresh)


@torch.no_grad()
def restart(codebooks, dead, sites, optimiser, generator):
    """Set the dead codes to random sites of the current batch.  Returns the number of dead codes.

    codebooks: as for first_codes; the first is the trained one.  dead: (K,) bool.  sites: (N, z).
    optimiser: an Adam.  Its memory of the dead codes is cleared, because it belongs to the old
    place.  The averaged codes jump too; else they would lie between the old place and the new one.
    """
    count = int(dead.sum())
    fresh = draw_sites(sites, count, generator)                         # (count, z)
    for codebook in codebooks:
        codebook.weight[dead] = fresh
    memory = optimiser.state.get(codebooks[0].weight, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in memory:
            memory[name][dead] = 0
    return count


class CodeUse:
    """Counts how often each code was chosen since the last `clear`.  Its state is saved."""

    def __init__(self, codes, device):
        self.counts = torch.zeros(codes, dtype=torch.int64, device=device)  # (K,)

    def add(self, idx):
        """idx: numbers of codes, of any shape, from Codebook.forward."""
        self.counts += torch.bincount(idx.flatten(), minlength=len(self.counts))

    def clear(self):
        self.counts.zero_()

    def dead(self):
        """Return which codes were chosen less often than DEAD_SHARE of an equal share, (K,)."""
        equal_share = self.counts.sum() / len(self.counts)              # ()
        return self.counts < DEAD_SHARE * equal_share                   # (K,)

    def share(self):
        """Return the share of codes that were chosen at least once, ()."""
        return (self.counts > 0).float().mean()

    def perplexity(self):
        """Return exp(entropy) of the codes chosen, ().

        It is K if all codes are chosen equally often, and 1 if it is always the same one.
        """
        p = self.counts.float() / self.counts.sum()                     # (K,)
        return torch.special.entr(p).sum().exp()

    def state_dict(self):
        return {"counts": self.counts}

    def load_state_dict(self, state):
        self.counts.copy_(state["counts"])
