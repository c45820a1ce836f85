"""How an image autoencoder is trained, scaled and used: losses, discriminator, stage, latents.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

The networks are in common/vqae.py.

    ae = train_autoencoder(run, picture, count, val, make, steps, batch, lr, disc_weight)
    latents = Latents(run, ae, picture, kinds, n, name)     # of n slices; latents(rows)
    images = ae.from_latent(L)                              # in [-1,1]

Departures from VQGAN:
  - A pyramid loss stands in place of LPIPS, whose network was trained on photographs and would have
    to be downloaded.  The pyramid loss keeps edges sharp.  It is not a perceptual metric.
  - The weight beta is on the commitment term, as the paper of van den Oord et al. has it.  VQGAN's
    first program has it on the other term.
  - The first codes are sites of the first batch, and dead codes are restarted.
  - The discriminator has GroupNorm in place of BatchNorm.  Its result then depends neither on the
    size of a batch nor on the number of processes.
  - The discriminator is itself trained for a while before its opinion counts.
  - The averaged weights (EMA) are kept, those of the lowest validation loss without the GAN terms.

Letters in shape comments: B batch, c image channels, C channels of a map, H W height and width of
an image or map, z h w channels, height and width of a latent, N = H*W positions of a map.
"""
import hashlib
import math
import os
import zlib

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from common.codebook import CodeUse, first_codes, restart, sites_of
from common.device import seed_of
from common.files import RunError
from common.loop import EMA, Best, cosine_rate
from data.files import remove_unfinished, write_atomically

STAGE = "autoencoder"
KL_WEIGHT = 1e-6            # of the KL term, which is a sum over a latent, beside mean pixel errors
LEVELS = 4                  # of the pyramid loss
MAX_ADAPTIVE = 1e4          # limit of the adaptive weight
WINDOW = 100                # steps over which the use of codes is counted
VALIDATION = 64             # most validation pictures that are looked at
ENCODE_BATCH = 8            # pictures that are encoded at once after training
CRC_LENGTH = 8              # bytes at the end of a file of latents, with the CRC-32 of the others


class PatchDiscriminator(nn.Module):
    """Is this patch of an image real?  One logit per patch (pix2pix, Isola et al., 2017).

    channels   of an image
    base       channels of the first map; a multiple of 4
    layers     with 3, a patch is 70 pixels wide, and with 2, it is 34
    """

    def __init__(self, channels=1, base=64, layers=3):
        super().__init__()
        row = [nn.Conv2d(channels, base, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = base
        for layer in range(1, layers + 1):
            wider = base * min(2 ** layer, 8)
            stride = 2 if layer < layers else 1
            row.append(nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False))
            row.append(nn.GroupNorm(8, wider))
            row.append(nn.LeakyReLU(0.2))
            width = wider
        row.append(nn.Conv2d(width, 1, 4, padding=1))
        self.row = nn.Sequential(*row)
        for layer in self.row:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            if isinstance(layer, nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x):
        """x: (B, c, H, W) in [-1,1].  Returns logits (B, 1, H', W'), 30 x 30 for 256 x 256."""
        return self.row(x)                                              # (B, 1, H', W')


# ---- Losses --------------------------------------------------------------------------------------


def blur(x):
    """Blur images with the binomial filter [1 4 6 4 1] / 16, both ways.  x: (n, 1, H, W)."""
    taps = x.new_tensor([1, 4, 6, 4, 1]) / 16                           # (5,)
    kernel = (taps[:, None] * taps)[None, None]                         # (1, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel)     # (n, 1, H, W)


def laplacian_pyramid(x):
    """Split images into LEVELS images of finer and coarser detail (Burt & Adelson, 1983).

    x: (n, 1, H, W).  Level s is (n, 1, H/2**s, W/2**s).  Each level holds what is lost when its
    image is halved and doubled again.  The last level holds what remains, with the mean grey.
    """
    levels = []
    for _ in range(LEVELS - 1):
        half = blur(x)[:, :, ::2, ::2]                                  # (n, 1, H/2, W/2)
        spread = torch.zeros_like(x)                                    # (n, 1, H, W)
        spread[:, :, ::2, ::2] = half
        # Three of four pixels are zero now, so the blurred image is multiplied by 4.
        levels.append(x - 4 * blur(spread))                             # (n, 1, H, W)
        x = half
    levels.append(x)
    return levels


def pyramid_loss(x, x_hat):
    """Return how much the details of two images differ, ().  x, x_hat: (B, c, H, W).

    P = sum_s 2**-s mean|Lap_s(x) - Lap_s(x_hat)| + 1/2 mean(|d_h| + |d_w|), s = 0 .. 3,
    where d_h and d_w are the differences of the images' vertical and horizontal derivatives.

    Raises ValueError if the images are too small for the pyramid.
    """
    if min(x.shape[2:]) < 12:
        raise ValueError(f"pyramid_loss: images are {x.shape[2]} x {x.shape[3]}; "
                         "height and width must be at least 12, so use larger images")
    # Everything here is linear, so we can work on the difference of the images.
    error = (x.float() - x_hat.float()).flatten(0, 1)[:, None]          # (B*c, 1, H, W)
    total = 0.0
    for s, level in enumerate(laplacian_pyramid(error)):
        total = total + 2.0 ** -s * level.abs().mean()                  # ()
    d_h = error.diff(dim=2).abs().mean()                                # ()
    d_w = error.diff(dim=3).abs().mean()                                # ()
    return total + (d_h + d_w) / 2                                      # ()


def discriminator_loss(real, fake):
    """The hinge loss of the discriminator (Lim & Ye, 2017).  real, fake: logits.  Returns ()."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adversarial_loss(fake):
    """The hinge loss of the generator.  fake: logits.  Returns ()."""
    return -fake.mean()


def adaptive_weight(rec_gradient, adv_gradient):
    """Return the weight of the adversarial loss, VQGAN's Eq. (7), detached, ().

    The arguments are the gradients of the reconstruction loss and of the adversarial loss with
    respect to the weights of the decoder's last layer.  With this weight both pull equally hard.
    """
    ratio = rec_gradient.norm() / (adv_gradient.norm() + 1e-4)          # ()
    return ratio.clamp(0, MAX_ADAPTIVE).detach()                        # ()


# ---- Training ------------------------------------------------------------------------------------


def train_autoencoder(run, picture, count, val, make, steps, batch, lr, disc_weight, disc_base=64,
                      disc_layers=3, decay=0.999):
    """Train a fresh autoencoder and freeze it: stage "autoencoder" of a run.

    run          common.run.Run, for order, randomness, checkpoints and progress
    picture      function: array of sample numbers -> (B, c, H, W) in [-1,1], on run.device
    count        number of training samples.  All kinds of images are among them in equal numbers;
                 one shuffled pass then shows them in equal shares.
    val          None, or (picture, count) of the validation samples
    make         function: () -> a fresh VQAE
    disc_weight  the weight of the adversarial loss, times the adaptive weight.  With 0 there is no
                 discriminator.
    disc_base, disc_layers   see PatchDiscriminator
    decay        of the averaged weights

    The adversarial loss counts from 30 % of the steps on.  The discriminator itself begins to learn
    earlier: at 20 % of the steps, but at most 2000 steps before.  If it was untrained when it
    starts to count, its first gradients would spoil the images.

    The averaged weights with the lowest L1 and pyramid loss on validation samples are kept.  If
    there is a discriminator, weights from before its start do not take part.  Without validation
    samples, the last averaged weights are kept.

    The random numbers of a step depend on the step alone, so training resumes exactly.

    Returns the VQAE.  Raises RunError if the batch cannot be shared by the processes.
    """
    torch.manual_seed(seed_of(run.seed, STAGE))
    device = run.device
    ae = make().to(device, memory_format=torch.channels_last)
    if ae.bottleneck == "none":
        run.skip(STAGE)
        return load_autoencoder(run, make)
    ema = EMA(ae, decay)
    best = Best(ae)
    optimiser = torch.optim.Adam(ae.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
    parts = {"ae": ae, "ema": ema, "best": best, "optimiser": optimiser}
    use = None
    codebooks = []
    if ae.bottleneck == "vq":
        codebooks = [ae.codebook, ema.model.codebook]
        use = CodeUse(len(ae.codebook.weight), device)
        parts["use"] = use
    start = 3 * steps // 10                     # from here on the adversarial loss counts
    lead = min(2000, steps // 10)               # so long before, D itself is trained
    D = None
    if disc_weight:
        channels = ae.decoder.head[-1].out_channels
        D = PatchDiscriminator(channels, disc_base, disc_layers)
        D = D.to(device, memory_format=torch.channels_last)
        optimiser_d = torch.optim.Adam(D.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
        parts.update(discriminator=D, optimiser_d=optimiser_d)
    warm_up = max(1, min(500, steps // 10))
    validate = validation(run, val)
    mine = run.shard(batch)                                     # this process's share of a batch
    for step in run.steps(STAGE, steps, parts, batch):
        x = picture(run.order(STAGE, count, batch, step)[mine])         # (B, c, H, W)
        if step == 0 and codebooks:
            first_codes(codebooks, all_sites(run, ae, x), run.generator(STAGE, "first codes"))
        rate = cosine_rate(optimiser, step, steps, lr * min(1, (step + 1) / warm_up))
        eps = None
        if ae.bottleneck == "kl":
            # The noise is drawn for the whole batch; each process takes its share.
            h = x.shape[2] // ae.f
            w = x.shape[3] // ae.f
            g = run.generator(STAGE, step)
            eps = torch.randn(batch, ae.z, h, w, generator=g, device=device)[mine]
        with run.autocast():
            x_hat, bottleneck, idx = ae(x, eps)                         # (B, c, H, W)
        x_hat = x_hat.float()                                           # (B, c, H, W)
        rec = reconstruction_loss(x, x_hat)                             # ()
        loss = rec + (KL_WEIGHT if ae.bottleneck == "kl" else 1) * bottleneck
        if D and step >= start:
            D.requires_grad_(False)                                     # first the autoencoder
            with run.autocast():
                adv = adversarial_loss(D(x_hat).float())                # ()
            balance = adaptive_weight_of(run, rec, adv, ae.decoder.head[-1].weight)
            loss = loss + disc_weight * balance * adv
            run.log(adv=adv, balance=balance)
        # run.update sets gradients to zero, goes backward, clips, and steps.
        run.update(loss, optimiser)
        ema.update(ae, step)
        run.log(loss=loss, rec=rec, bottleneck=bottleneck)
        if D and step >= start - lead:
            D.requires_grad_(True)                                      # then the discriminator
            for group in optimiser_d.param_groups:
                group["lr"] = rate
            with run.autocast():
                real = D(x).float()                                     # (B, 1, H', W')
                fake = D(x_hat.detach()).float()                        # (B, 1, H', W')
            loss_d = discriminator_loss(real, fake)                     # ()
            run.update(loss_d, optimiser_d)
            run.log(disc=loss_d)
        if use:
            use.add(everywhere(run, idx))
            if (step + 1) % WINDOW == 0 or step + 1 == steps:
                run.log(codes_used=use.share(), perplexity=use.perplexity())
                # Later on no code is restarted, so that the codebook settles.
                if step + 1 <= 4 * steps // 5:
                    g = run.generator(STAGE, "restart", step)
                    restart(codebooks, use.dead(), all_sites(run, ae, x), optimiser, g)
                use.clear()
        last = step + 1 == steps
        if validate and (last or (step + 1) % max(1, steps // 20) == 0):
            value = validate(ema.model)
            run.log(validation=value)
            if not D or step >= start:
                best.offer(ema.model, value)
        if last:
            chosen = best.model if math.isfinite(best.loss) else ema.model
            measure_scale(run, chosen, picture, count)
    return load_autoencoder(run, make)


def reconstruction_loss(x, x_hat):
    """Return L1 plus pyramid loss, ().  x, x_hat: (B, c, H, W) in [-1,1]."""
    return F.l1_loss(x_hat, x) + pyramid_loss(x, x_hat)


def adaptive_weight_of(run, rec, adv, weight):
    """Return the adaptive weight of the losses rec and adv, see adaptive_weight, ().

    weight: that of the decoder's last layer.  Gradients are averaged over processes.
    """
    gradients = []
    for loss in (rec, adv):
        gradient, = torch.autograd.grad(loss, weight, retain_graph=True)    # shape of weight
        if run.world > 1:
            dist.all_reduce(gradient)
            gradient = gradient / run.world
        gradients.append(gradient)
    return adaptive_weight(*gradients)


def everywhere(run, rows):
    """Join tensors (n, ...) of all processes, in the order of the whole batch."""
    if run.world == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format)
             for _ in range(run.world)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def all_sites(run, ae, x):
    """Return the sites (N, z) of the whole batch, before quantisation.  x: (B, c, H, W)."""
    return everywhere(run, sites_of(ae.encode(x)))


def validation(run, val):
    """Return a function VQAE -> L1 plus pyramid loss on at most VALIDATION fixed samples.

    val: None, or (picture, count).  Returns None if there are no samples.
    """
    if val is None or val[1] == 0:
        run.say("no validation samples: the last averaged weights of the autoencoder are kept")
        return None
    picture, count = val
    chosen = run.order("autoencoder validation", count, min(count, VALIDATION), 0)

    @torch.no_grad()
    def validate(ae):
        total = 0.0
        for start in range(0, len(chosen), ENCODE_BATCH):
            x = picture(chosen[start:start + ENCODE_BATCH])             # (B, c, H, W)
            with run.autocast():
                x_hat, _, _ = ae(x)                                     # (B, c, H, W)
            total += float(reconstruction_loss(x, x_hat.float())) * len(x)
        return total / len(chosen)
    return validate


@torch.no_grad()
def measure_scale(run, ae, picture, count):
    """Set ae.mu and ae.sigma to mean and deviation of each channel over all training samples.

    The sums are made in float64, sample by sample; each process takes its part.  A channel that is
    constant gets the deviation 1.
    """
    sums = torch.zeros(2, ae.z, dtype=torch.float64)                    # (2, z)
    sites = 0
    for numbers in run.batches("latent scale", np.arange(count)[run.rank::run.world], ENCODE_BATCH):
        h = sites_of(ae.encode(picture(numbers))).cpu().double()        # (N, z)
        sums += torch.stack([h.sum(0), h.square().sum(0)])              # (2, z)
        sites += len(h)
    sites = sum(run.gather([sites]))
    mean, square = sum(run.gather([sums])) / sites                      # (z,) each
    sigma = (square - mean.square()).clamp(min=0).sqrt()                # (z,)
    sigma[sigma < 1e-6] = 1
    ae.mu.copy_(mean.view(1, -1, 1, 1))
    ae.sigma.copy_(sigma.view(1, -1, 1, 1))


def load_autoencoder(run, make):
    """Return the frozen autoencoder of a run's checkpoint, on the run's device.

    make: function: () -> a fresh VQAE.

    Raises RunError if the checkpoint does not fit it.
    """
    ae = make()
    if ae.bottleneck == "none":
        return ae.to(run.device).eval()
    return run.trained(ae, STAGE, "best", "ema")


# ---- Latents -------------------------------------------------------------------------------------


def autoencoder_hash(ae):
    """Return 16 letters that stand for all weights of an autoencoder, with mu and sigma."""
    digest = hashlib.sha256(ae.bottleneck.encode())
    for name, tensor in sorted(ae.state_dict().items()):
        values = tensor.detach().cpu()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.numpy().tobytes())         # in C order, whatever the memory format
    return digest.hexdigest()[:16]


def cached_latents(run, ae, picture, count, name, folder):
    """Return the latents of all samples, encoded once, as a memory-mapped array.

    ae       a frozen VQAE
    picture  function: array of sample numbers -> (B, c, H, W) in [-1,1], on run.device
    count    number of samples, at least 1
    name     stands for the samples and their order, such as "train-" with a fingerprint of the data
    folder   pathlib.Path of the cache

    Returns ae.to_latent of each sample, (count, z, h, w), float16.

    The file is folder/latents/HASH-NAME.npy.  HASH belongs to the weights of the autoencoder, so
    latents of another one are never read.  The file is written whole or not at all, by the first
    process.

    Raises ValueError if there are no samples, and RunError if the file cannot be written.
    """
    if count < 1:
        raise ValueError(f"cached_latents: there are no samples for {name!r}; give at least one")
    path = folder / "latents" / f"{autoencoder_hash(ae)}-{name}.npy"
    with torch.no_grad():
        one = ae.to_latent(picture(np.arange(1)))                       # (1, z, h, w)
    shape = (count, *one.shape[1:])

    def open_or_write():
        found = open_latents(path, shape)
        if found is None:
            write_latents(run, ae, picture, shape, path)
            found = open_latents(path, shape)
        return found
    return run.first(open_or_write)


def open_latents(path, shape):
    """Return the array of a file, memory-mapped, or None if it is missing, damaged or different."""
    try:
        found = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(-CRC_LENGTH, os.SEEK_END)
            stored = file.read()
    except (OSError, ValueError, EOFError):
        return None
    same = found.shape == shape and found.dtype == np.float16
    return found if same and stored == crc_text(zlib.crc32(found)) else None


def crc_text(crc):
    """Return a CRC-32 as the bytes that end a file of latents."""
    return f"{crc:0{CRC_LENGTH}x}".encode()


@torch.no_grad()
def write_latents(run, ae, picture, shape, path):
    """Encode all samples into a file, see cached_latents.  shape: (count, z, h, w)."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    try:
        remove_unfinished(path.parent)
        crc = 0
        with write_atomically(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for numbers in run.batches("latents", np.arange(shape[0]), ENCODE_BATCH):
                L = ae.to_latent(picture(numbers)).half()               # (B, z, h, w)
                content = L.cpu().numpy().tobytes()
                file.write(content)
                crc = zlib.crc32(content, crc)
            file.write(crc_text(crc))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; make room, or choose "
                       "another folder for the cache") from error


class Latents:
    """The latents of all images of n slices, computed once and kept on disk.

    run       common.run.Run
    ae        a frozen VQAE
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
