"""Views of medical images: what changes, by how much, and that no side is swapped.  Measured on discs, bars and grey images."""
import math

import pytest
import torch

from common.augment import augment, shuffled

KINDS = ("xray", "ct", "mri")
MANY = 600
each_kind = pytest.mark.parametrize("modality", KINDS)


def views(image, modality, seed=0, count=MANY):
    """(count, H, W): views of one image (H, W)."""
    x = image.expand(count, 1, *image.shape)
    return augment(x, modality, torch.Generator().manual_seed(seed))[:, 0]


def axes(size=64):
    """Row and column of each pixel, from -1 to 1."""
    place = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.meshgrid(place, place, indexing="ij")


def centres(masks):
    """The middle of each mask (n, H, W): (n, 2), row and column."""
    y, x = axes(masks.shape[1])
    total = masks.sum((1, 2))
    return torch.stack([(masks * y).sum((1, 2)) / total, (masks * x).sum((1, 2)) / total], dim=1)


@each_kind
def test_a_generator_fixes_the_views(modality):
    x = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(0)
    first = augment(x, modality, g)
    second = augment(x, modality, g)
    assert first.shape == x.shape and not torch.allclose(first, second)
    assert torch.equal(first, augment(x, modality, torch.Generator().manual_seed(0)))
    repeated = views(x[0, 0], modality, count=2)
    assert not torch.allclose(repeated[0], repeated[1])                     # each image of a batch has its own change


@each_kind
def test_values_stay_in_range_and_the_input_as_it_is(modality):
    x = (torch.rand(50, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    kept = x.clone()
    found = augment(x, modality, torch.Generator().manual_seed(0))
    assert torch.equal(x, kept) and found.isfinite().all()
    assert found.min() == 0 and found.max() == 1


@each_kind
def test_nothing_is_flipped_or_turned_around(modality):
    y, x = axes()
    left = views((x < 0).float(), modality)
    assert (left[:, :, :16].mean((1, 2)) > left[:, :, 48:].mean((1, 2)) + 0.4).all()
    upper = views((y < 0).float(), modality)
    assert (upper[:, :16].mean((1, 2)) > upper[:, 48:].mean((1, 2)) + 0.4).all()


@each_kind
def test_crop_holds_eight_tenths_to_all_of_the_area(modality):
    """A disc looks larger by 1 / area.  The area is drawn evenly, so the mean of 1 / area is ln(1 / .8) / .2."""
    y, x = axes()
    disc = (y ** 2 + x ** 2 < 0.25).float()
    found = views(disc, modality) > 0.45
    grown = found.sum((1, 2)) / disc.sum()
    assert grown.min() > 0.98 and grown.max() < 1.28
    assert grown.mean().item() == pytest.approx(math.log(1 / 0.8) / 0.2, abs=0.02)


def test_shift_is_that_of_the_crop_and_a_twentieth_of_the_width():
    """In the crop's own units the middle moves by (1 - zoom) and .1 at most along each axis (2 is the width)."""
    y, x = axes()
    disc = (y ** 2 + x ** 2 < 0.16).float()
    found = (views(disc, "ct") > 0.5).float()
    zoom = (disc.sum() / found.sum((1, 2))).sqrt()
    moved = centres(found) * zoom[:, None]
    room = 1 - torch.linspace(0.8, 1, 10_001).sqrt()
    assert (moved.norm(dim=1) < math.sqrt(2) * (room.max() + 0.1) + 0.01).all()
    variance = (room.square().mean() + 0.01) / 3
    assert moved.square().mean(0).tolist() == pytest.approx([variance.item()] * 2, rel=0.15)
    assert moved.mean(0).abs().max() < 0.01
    assert abs((moved[:, 0] * moved[:, 1]).mean()) < 0.1 * variance         # the axes are drawn one by one


def test_rotation_is_ten_degrees_at_most_to_both_sides():
    y, x = axes()
    bar = ((x.abs() < 0.6) & (y.abs() < 0.15)).float()
    found = (views(bar, "ct") > 0.5).float()
    middle = centres(found)
    dy = y - middle[:, 0, None, None]
    dx = x - middle[:, 1, None, None]
    tilt = torch.atan2(2 * (found * dx * dy).sum((1, 2)), (found * (dx ** 2 - dy ** 2)).sum((1, 2))) / 2
    degrees = tilt * 180 / math.pi
    assert degrees.abs().max() < 10.3 and degrees.min() < -8.5 and degrees.max() > 8.5
    assert degrees.std().item() == pytest.approx(10 / math.sqrt(3), rel=0.1)


@each_kind
def test_edges_go_on_where_the_crop_leaves_the_image(modality):
    found = views(torch.full((32, 32), 0.8), modality)
    assert found.mean(0).min() > 0.7 and found.mean(0).max() < 0.9          # no black corners


def test_brightness_of_ct():
    """Grey g becomes .4 + (.9 .. 1.1)(g - .4) + (-.008 .. .008); 20 HU are .008 of the window of 2500."""
    for grey, reach in ((0.4, 0.008), (0.8, 0.048), (0.2, 0.028)):
        means = views(torch.full((64, 64), grey), "ct").mean((1, 2))
        assert (means - grey).abs().max().item() == pytest.approx(reach, rel=0.12, abs=0.002)
        assert abs(means.mean() - grey) < 0.004
    spread = views(torch.full((64, 64), 0.8), "ct").mean((1, 2)).std().item()
    assert spread == pytest.approx(math.sqrt((0.04 ** 2 + 0.008 ** 2) / 3), rel=0.1)


def test_brightness_of_x_rays():
    """Black and white show brightness and contrast alone; grey .5 shows gamma and brightness."""
    white = views(torch.full((64, 64), 0.8), "xray").mean((1, 2))
    ends = [0.5 + 1.1 * (0.8 ** 0.8 - 0.5) + 0.1, 0.5 + 0.9 * (0.8 ** 1.25 - 0.5) - 0.1]
    assert ends[1] < white.min() < ends[1] + 0.06 and ends[0] - 0.06 < white.max() < ends[0]
    grey = views(torch.full((64, 64), 0.5), "xray").mean((1, 2))
    gamma = 0.5 ** torch.linspace(0.8, 1.25, 10_001)
    assert grey.mean().item() == pytest.approx(gamma.mean().item(), abs=0.01)
    assert grey.var().item() == pytest.approx(gamma.var().item() * (1 + 0.01 / 3) + 0.01 / 3, rel=0.12)


def test_brightness_of_mr():
    """Gamma .7 to 1.4 everywhere, times a field that is 1 in the middle and changes smoothly by .3 at most in a corner."""
    found = views(torch.full((64, 64), 0.5), "mri")
    gamma = 0.5 ** torch.linspace(0.7, 1.4, 10_001)
    middle = found[:, 28:36, 28:36].mean((1, 2))
    assert middle.mean().item() == pytest.approx(gamma.mean().item(), abs=0.01)
    assert middle.std().item() == pytest.approx(gamma.std().item(), rel=0.1)
    assert middle.min() > 0.5 ** 1.4 - 0.02 and middle.max() < 0.5 ** 0.7 + 0.02
    edges = {"right": found[:, 28:36, 60:], "lower": found[:, 60:, 28:36], "corner": found[:, 60:, 60:]}
    expected = {"right": 0.1, "lower": 0.1, "corner": 0.1 * math.sqrt(3)}
    for name, part in edges.items():
        bias = part.mean((1, 2)) / middle - 1
        assert bias.abs().max() < 0.33 and abs(bias.mean()) < 0.02
        assert bias.std().item() == pytest.approx(0.95 * expected[name] / math.sqrt(3), rel=0.15), name


@each_kind
def test_noise_is_at_most_three_hundredths(modality):
    """Of a grey image, neighbours differ by noise alone.  Its deviation is drawn evenly from 0 to .03."""
    found = views(torch.full((64, 64), 0.5), modality)
    deviation = (found[:, :, 1:] - found[:, :, :-1]).std((1, 2)) / math.sqrt(2)
    assert deviation.max() < 0.032 and deviation.min() < 0.003
    assert deviation.mean().item() == pytest.approx(0.015, abs=0.0015)


def test_shuffled_reports_have_the_same_sentences_in_all_orders():
    report = "the heart is normal . no effusion is seen . the bones are intact ."
    g = torch.Generator().manual_seed(0)
    found = {shuffled(report, g) for _ in range(200)}
    assert len(found) == 6 and report in found
    for text in found:
        assert sorted(text.removesuffix(" .").split(" . ")) == ["no effusion is seen", "the bones are intact", "the heart is normal"]
        assert text.endswith(" .") and ". ." not in text
    assert shuffled("the lungs are clear .", g) == "the lungs are clear ."
