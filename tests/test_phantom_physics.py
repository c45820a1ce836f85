"""Signal equations by hand, contrast of tissues, scanners."""

from dataclasses import replace

import numpy as np
import pytest

from data.phantom.head import head_anatomy
from data.phantom.physics import (
    CODE,
    TISSUES,
    Protocol,
    acquire,
    acquire_ct,
    at_field,
    inversion_recovery,
    null_time,
    render,
    render_ct,
    signal,
    spin_echo,
    spoiled_gradient_echo,
    with_gadolinium,
)
from data.phantom.sets import brats_subject
from scans import GRID, one_voxel, pure, textbook

T1_SE = Protocol("se", tr=550, te=12)
T1_GRE = Protocol("gre", tr=10, te=4, flip=22)
T2 = Protocol("se", tr=4500, te=95)


@pytest.fixture(scope="module")
def subject():
    """A tumour bearer of 70 years."""
    return head_anatomy(3, 0, GRID, age=70, tumour=True)


def test_signal_equations_by_hand():
    # 0.8 (1 - e^-0.5) e^-0.2 = 0.8 * 0.39346934 * 0.81873075
    assert spin_echo(0.8, 1000.0, 100.0, 500.0, 20.0) == pytest.approx(0.25771636, rel=1e-7)
    # 0.9 (1 - 2 e^-2 + e^-5) e^-1 = 0.9 * (1 - 0.27067057 + 0.00673795) * 0.36787944
    assert inversion_recovery(0.9, 1000.0, 100.0, 5000.0, 100.0, 2000.0) == pytest.approx(0.24370565, rel=1e-7)
    assert inversion_recovery(1.0, 1000.0, 100.0, 5000.0, 0.0, 100.0) == pytest.approx(1 - 1.80967484 + 0.00673795)
    # E1 = e^-0.01 = 0.99004983: 0.5 * 0.00995017 / (1 - 0.85740831) * e^-0.1
    assert spoiled_gradient_echo(1.0, 1000.0, 50.0, 10.0, 5.0, 30.0) == pytest.approx(0.03157016, rel=1e-6)
    # 1/T1' = 0.001 + 4 * 0.5 / 1000 = 0.003
    assert with_gadolinium(1000.0, 0.5, 4.0) == pytest.approx(1000 / 3)


def test_spoiled_gradient_echo_is_brightest_at_the_ernst_angle():
    angles = np.linspace(1, 60, 5901)
    best = angles[np.argmax(spoiled_gradient_echo(1.0, 900.0, 50.0, 10.0, 4.0, angles))]
    assert best == pytest.approx(np.rad2deg(np.arccos(np.exp(-10 / 900))), abs=0.011)


def test_null_time():
    assert null_time(4330.0, 1e9) == pytest.approx(4330 * np.log(2))
    null = null_time(4330.0, 9000.0)
    assert inversion_recovery(1.0, 4330.0, 2000.0, 9000.0, 100.0, null) == pytest.approx(0, abs=1e-12)
    assert inversion_recovery(1.0, 4330.0, 2000.0, 9000.0, 100.0, 2000.0) < 0


def test_field_strength():
    assert at_field((600, 900), 1.5) == pytest.approx(600)
    assert at_field((600, 900), 3.0) == pytest.approx(900)
    assert at_field((600, 900), 6.0) == pytest.approx(1350)


def test_signal_dispatches():
    assert signal(0.8, 1000.0, 100.0, 0.5, Protocol("se", 500, 20)) == pytest.approx(0.25771636)  # no dose, no effect
    assert signal(0.8, 1000.0, 100.0, 0.5, Protocol("se", 500, 20, dose=2)) == pytest.approx(
        0.8 * (1 - np.exp(-500 * (0.001 + 0.003))) * np.exp(-0.2))  # r1 = 3 at 3 T, C = 1 mM
    assert signal(0.9, 1000.0, 100.0, 0.0, Protocol("ir", 5000, 100, ti=2000)) == pytest.approx(0.24370565)
    # 1/T2* = 1/100 + 1.4 * 1.5 / 1000 = 0.0121 per ms; the rest as in the case by hand
    assert signal(1.0, 1000.0, 100.0, 0.0, Protocol("gre", 10, 5, flip=30, field=1.5)) == pytest.approx(
        0.03157016 * np.exp(0.1 - 5 * 0.0121), rel=1e-6)
    with pytest.raises(ValueError, match="epi"):
        signal(1.0, 1000.0, 100.0, 0.0, Protocol("epi", 10, 5))


def test_partial_volume_adds_before_the_magnitude():
    # At TI = 1000, TR = 9000, TE = 0: csf is still inverted, white matter (T1 838 at 3 T) has recovered.
    protocol = Protocol("ir", tr=9000, te=0, ti=1000)
    csf = 1 - 2 * np.exp(-1000 / 4330) + np.exp(-9000 / 4330)
    wm = 0.77 * (1 - 2 * np.exp(-1000 / 838) + np.exp(-9000 / 838))
    assert csf < 0 < wm
    assert render(one_voxel({"csf": 1.0}), protocol).item() == pytest.approx(-csf)
    assert render(one_voxel({"csf": 0.25, "wm": 0.75}), protocol).item() == pytest.approx(0.25 * csf + 0.75 * wm)


@pytest.mark.parametrize("field", [1.5, 3.0])
def test_contrast_of_tissues(subject, field):
    def level(protocol, name):
        return render(subject, replace(protocol, field=field))[pure(subject, name)].mean()

    flair = Protocol("ir", tr=9000, te=110, ti=null_time(4330, 9000))
    for t1 in (T1_SE, T1_GRE):
        assert level(t1, "wm") > 1.1 * level(t1, "gm") > 1.3 * level(t1, "csf")
        assert level(t1, "enhancing") < level(t1, "wm")
        assert level(replace(t1, dose=1), "enhancing") > 1.25 * level(replace(t1, dose=1), "wm")
    assert level(T2, "csf") > 1.3 * level(T2, "gm") > 1.5 * level(T2, "wm")
    assert level(flair, "gm") > level(flair, "wm") > 5 * level(flair, "csf")
    assert level(flair, "oedema") > 1.25 * level(flair, "gm")


def test_flair_nulls_csf_at_its_null_time_only(subject):
    plain = textbook(subject)
    csf, wm = pure(plain, "csf"), pure(plain, "wm")
    null = null_time(4330, 9000)
    image = render(plain, Protocol("ir", tr=9000, te=110, ti=null))
    assert image[csf].max() < 1e-6 < 0.05 < image[wm].min()
    for ti in (0.8 * null, 1.2 * null):
        image = render(plain, Protocol("ir", tr=9000, te=110, ti=ti))
        assert image[csf].min() > 0.5 * image[wm].max()


def test_protocols_of_the_set_give_their_contrast():
    for subject in range(6):
        anatomy, protocols, images = brats_subject(0, subject, GRID)
        clean = {contrast: render(anatomy, protocol) for contrast, protocol in protocols.items()}
        csf, gm, wm = (pure(anatomy, name) for name in ("csf", "gm", "wm"))
        for which in (clean, images):
            assert which["flair"][csf].mean() < 0.25 * which["flair"][wm].mean()
            assert which["t1"][wm].mean() > which["t1"][gm].mean() > 1.1 * which["t1"][csf].mean()
            assert which["t2"][csf].mean() > 1.3 * which["t2"][gm].mean() > 1.3 * which["t2"][wm].mean()
        assert protocols["t1"].dose == 0 < protocols["t1ce"].dose
        assert len({protocol.field for protocol in protocols.values()}) == 1  # one scanner, one magnet


def test_longer_te_follows_the_closed_form(subject):
    """ln(S1/S2) = (TE2 - TE1) / T2 in every pure voxel, with the T2 that this subject has there."""
    early, late = render(subject, T2), render(subject, replace(T2, te=135))
    for name, t2 in (("wm", 69), ("gm", 99), ("csf", 2000)):
        here = pure(subject, name)
        own = t2 * subject.factors[name][2] * (1 if name == "csf" else subject.variation[2][here])
        np.testing.assert_allclose(np.log(early[here] / late[here]), 40 / own, rtol=1e-3)


def test_longer_tr_follows_the_closed_form(subject):
    short, long = render(subject, T1_SE), render(subject, replace(T1_SE, tr=1100))
    here = pure(subject, "wm")
    own = 838 * subject.factors["wm"][1] * subject.variation[1][here]
    np.testing.assert_allclose(long[here] / short[here], 1 + np.exp(-550 / own), rtol=1e-5)  # (1 - e^-2x) / (1 - e^-x)


def test_lesion_texture_scales_relaxation_and_uptake():
    plain = one_voxel({"enhancing": 1.0})
    rough = replace(plain, texture=np.full((1, 1, 1), 1.2))
    rate = 1 / (1600 * 1.2) + 3.0 * 0.35 * 1.2 / 1000
    expected = 0.9 * (1 - np.exp(-550 * rate)) * np.exp(-12 / (120 * 1.2))
    assert render(rough, replace(T1_SE, dose=1)).item() == pytest.approx(expected, rel=1e-6)


def test_contrast_agent_changes_only_what_takes_it_up(subject):
    gain = render(subject, replace(T1_SE, dose=1)) - render(subject, T1_SE)
    inside = subject.mask
    bright = sum(subject.maps[name] for name in ("enhancing", "vein"))
    assert np.all(gain[pure(subject, "csf")] == 0) and np.all(gain[pure(subject, "oedema")] == 0)
    assert gain[pure(subject, "enhancing")].min() > 0.1
    assert gain[inside & (bright == 0)].max() < 0.04


def test_render_is_the_subject_not_the_scan(subject):
    np.testing.assert_array_equal(render(subject, T2), render(subject, T2))
    assert np.all(render(subject, T2)[~subject.mask] == 0)


def test_acquire_shading_noise_and_scale():
    rng = np.random.default_rng(0)
    image = np.zeros((60, 60, 60), np.float32)
    image[30:] = 2.0  # mean 1, so sigma is `noise`
    mask = np.ones(image.shape, bool)
    mask[:, :, 0] = False
    shading = np.where(np.arange(60) < 30, 1.5, 1.0)[None, :, None]
    seen = acquire(rng, image, mask, shading, 0.2, 700.0)
    assert seen[mask].mean() == pytest.approx(700, rel=1e-4)
    noise, bright, plain = seen[:30, :, 1:], seen[30:, :30, 1:], seen[30:, 30:, 1:]
    assert noise.std() / noise.mean() == pytest.approx(np.sqrt(4 / np.pi - 1), rel=0.02)  # Rayleigh where no signal
    assert plain.mean() / noise.mean() == pytest.approx((2 + 0.04 / 4) / (0.2 * np.sqrt(np.pi / 2)), rel=0.01)  # Rice
    assert plain.std() / plain.mean() == pytest.approx(0.1, rel=0.02)
    assert bright.mean() / plain.mean() == pytest.approx(1.5, rel=0.005)
    assert seen[:30, :, 0].mean() == pytest.approx(noise.mean(), rel=0.03)  # the mask sets the scale, it hides nothing


def test_ct_by_hand():
    # fat 1 - 0.1 = 0.9, bone 1 + 1.3 * 0.8 = 2.04: a quarter of bone makes 0.675 + 0.51 = 1.185
    mixed = one_voxel({"fat": 0.75, "bone": 0.25})
    assert render_ct(mixed, 0.8).item() == pytest.approx(185, abs=0.01)
    marrow = replace(one_voxel({"marrow": 1.0}), texture=np.full((1, 1, 1), 1.5))
    assert render_ct(marrow, 0.8).item() == pytest.approx(220 * 0.8 * 1.5, abs=0.01)
    dense = replace(one_voxel({"muscle": 1.0}), variation=np.array([1.02, 5, 7]).reshape(3, 1, 1, 1))
    assert render_ct(dense, 0.8).item() == pytest.approx(1.055 * 1.02 * 1000 - 1000, abs=0.01)
    empty = one_voxel({"muscle": 0.0})
    assert render_ct(empty, 1.0).item() == -1000


def test_ct_noise_and_limits():
    levels = np.repeat(np.array([-1000.0, 0.0, 3070.0]), 20000)
    air, water, metal = acquire_ct(np.random.default_rng(0), levels, 20.0).reshape(3, -1)
    assert water.dtype == np.int16 and water.mean() == pytest.approx(0, abs=0.5)
    assert water.std() == pytest.approx(20, rel=0.02)
    assert air.min() == -1024 and metal.max() == 3071
    assert (air == -1024).mean() == pytest.approx(0.12, abs=0.01)  # the normal tail below -23.5 / 20


def test_codes_are_the_order_of_the_table():
    assert CODE["csf"] == 1 and list(CODE) == list(TISSUES) and 0 not in CODE.values()
