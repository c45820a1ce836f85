"""Both codecs together: ranges, shapes, which images train, and what a checkpoint gives back."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_rounds import PRESENT, STREAMS, begin, dataset, same

from common import codecs
from common.codecs import Codecs
from common.files import RunError
from common.vqae import VQAE


class Parrot:
    """Says what it was asked."""
    z = 7

    def to_latent(self, texts):
        return ["latents of", *texts]

    def from_latent(self, z, beam):
        return [f"{z} with {beam}"]


def settings(**changes):
    return SimpleNamespace(**{**dict(
        size=16, ae_base=4, ae_mult=(1, 2), ae_blocks=1, ae_steps=2, ae_batch=2, ae_lr=1e-3, text_width=8, text_depth=1, text_heads=2,
        text_z=4, text_length=6, text_least=2, text_steps=2, text_batch=2, text_lr=1e-3, beam=3), **changes})


def images_of(present, size=16):
    """Noise images, float16."""
    return np.random.default_rng(0).random((*np.shape(present), size, size)).astype(np.float16)


def test_images_go_through_the_autoencoder_and_reports_through_the_text_vae():
    ae = VQAE(4, (1, 2), 1, 0, 16, bottleneck="kl")
    ae.sigma.fill_(2)
    both = Codecs(ae, Parrot(), 16, beam=5)
    x = torch.rand(2, 1, 16, 16)
    z = both.encode("ct", x)
    assert torch.equal(z, ae.encode(2 * x - 1) / 2)
    assert torch.equal(both.decode("t2", z), ae.from_latent(z) / 2 + 0.5)
    assert both.encode("text", ["a", "b"]) == ["latents of", "a", "b"] and both.decode("text", "z") == ["z with 5"]
    assert both.shape("text") == (7,) and both.shape("xray") == z.shape[1:] == (4, 8, 8)


def test_decoded_images_lie_between_0_and_1():
    identity = Codecs(VQAE(4, (1,), 1, 0, 2, bottleneck="none"), None, 2)
    x = torch.rand(3, 1, 2, 2)
    assert torch.allclose(identity.decode("ct", identity.encode("ct", x)), x, atol=1e-6)
    ends = identity.decode("ct", torch.tensor([-5.0, -1, 0, 1, 5]).view(5, 1, 1, 1)).flatten()
    assert ends.tolist() == [0, 0, 0.5, 1, 1]


def test_all_images_of_a_part_are_given_once(tmp_path):
    split = {"train": ["s0", "s2", "s3", "s6"], "val": ["s4"], "test": []}
    ds = dataset(PRESENT, STREAMS, split=split)
    picture, count = codecs.all_images(begin(tmp_path), ds, "train")
    pairs = [(r, c) for r in (0, 2, 3, 6) for c in (1, 2, 3, 4) if PRESENT[r, c]]
    assert count == len(pairs) == 8
    order = np.random.default_rng(0).permutation(count)
    x = picture(order)
    assert x.shape == (8, 1, 2, 2)
    assert x[:, 0, 1, 0].tolist() == [2 * (10 * pairs[k][0] + pairs[k][1]) / 128 - 1 for k in order]
    assert PRESENT[0, 0] and ds.present[0, 0]                               # what is asked does not change the data
    assert codecs.all_images(begin(tmp_path / "b"), ds, "val")[1] == 2


def test_small_autoencoders_have_no_attention():
    def attentions(base):
        with torch.device("meta"):
            ae = codecs.make_autoencoder(settings(ae_base=base))
        assert ae.bottleneck == "kl" and ae.f == 2
        return sum("attention" in type(module).__name__.lower() for module in ae.modules())
    assert attentions(32) == 0 < attentions(64)


def test_codecs_come_back_from_the_checkpoint(tmp_path):
    reports = ["the heart is large.", "the heart is small.", "", "no mass. the heart is big.", "", "", "the lung."]
    split = {"train": ["s0", "s1", "s2", "s3", "s6"], "val": ["s4"], "test": ["s5"]}
    ds = dataset(PRESENT, STREAMS, images_of(PRESENT), reports, split)
    run = begin(tmp_path)
    made = codecs.train_codecs(settings(), run, ds)
    assert run.finished(["autoencoder", "text"])
    assert run.about["words"] == [".", "heart", "is", "the"]                # twice or more in the training reports
    run.close()
    again = begin(tmp_path)
    again.load()
    found = codecs.load_codecs(settings(), again)
    assert same(found.ae.state_dict(), made.ae.state_dict()) and same(found.textvae.state_dict(), made.textvae.state_dict())
    assert (found.beam, found.size, found.textvae.words.length, found.textvae.z) == (3, 16, 6, 4)
    for network in (found.ae, found.textvae):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert same(codecs.train_codecs(settings(), again, ds).ae.state_dict(), made.ae.state_dict())       # nothing is trained twice
    with pytest.raises(RunError, match="does not fit this configuration"):
        codecs.load_codecs(settings(text_z=5), again)


@pytest.mark.parametrize("streams, reports", [(("xray", "ct"), None), (("text", "ct"), [""] * 3)], ids=["no stream", "no report"])
def test_without_reports_there_is_no_text_vae(tmp_path, streams, reports):
    present = np.ones((3, 2), bool)
    if reports:
        present[:, 0] = False
    ds = dataset(present, streams, images_of(present), reports)
    run = begin(tmp_path)
    assert codecs.train_codecs(settings(), run, ds).textvae is None
    assert run.finished(["autoencoder", "text"]) and "words" not in run.about
    assert codecs.load_codecs(settings(), run).textvae is None


def test_what_runs_before_the_diffusers_is_counted():
    """Each function runs the networks of its stage: twice the images, twice the memory; without reports no text VAE."""
    cfg = settings(rounds=("text-ct", "ct-mri"), encoder="demo", size=32, vi=True)
    with torch.device("meta"):
        ae, shape, before = codecs.at_work(cfg)
        assert shape == (ae.z, 32 // ae.f, 32 // ae.f) and set(before) == {"ae_batch", "text_batch", "align_batch"}
        (mean, logvar), logits = before["text_batch"][1]()
        assert mean.shape == logvar.shape == (1, cfg.text_z) and logits.shape == (1, cfg.text_length + 2, codecs.VOCABULARY + 4)
        towers = before["align_batch"][1]()
        assert len(towers) == 2 and towers[0].pooled.shape == (1, 128)
        assert set(codecs.at_work(settings(rounds=("ct-mri",), encoder="demo", size=32, vi=True))[2]) == {"ae_batch", "align_batch"}
        for names, vi, count in ((("mri-mri",), True, 4), (("ct-mri",), False, 2), (("text-ct", "ct-mri"), False, 1)):
            cfg = settings(rounds=names, encoder="demo", size=32, vi=vi)
            assert len(codecs.at_work(cfg)[2]["align_batch"][1]()) == count
