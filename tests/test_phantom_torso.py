"""Torsos in three views with reports: geometry against brute force, sides, reports read back, files."""

import csv
import json
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from data.files import DataError
from data.phantom import (
    cxr_findings_in,
    make,
    reports,
    torso,
    torso_grid,
    torso_report,
    torso_subject,
    torso_views,
    usual_numbers,
)
from data.phantom.geometry import Grid
from data.phantom.physics import CODE, TISSUES, render, render_ct
from data.phantom.reports import UNKNOWN
from data.phantom.torso import Part, attenuation_sum, ball, column, cxr_members
from scans import contents, psnr, pure

SUBJECTS = 12
MU = {name: 0.0193 * (1 + TISSUES[name].hu / 1000) for name in torso.TORSO}


@pytest.fixture(scope="module")
def many():
    """The traits of 3000 subjects, and their reports."""
    numbers = range(3000)
    return [torso_subject(0, n) for n in numbers], [torso_report(0, n) for n in numbers]


@pytest.fixture(scope="module")
def cxr(tmp_path_factory):
    """A small set: folder, {split: entries}, rows of findings.csv as dicts, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "cxr"
    make("cxr", folder, subjects=SUBJECTS)
    entries = json.loads((folder / "annotation.json").read_text(encoding="utf-8"))
    with open(folder / "findings.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    return folder, entries, rows, truth


def words_of(lesion):
    return lesion and {key: lesion[key] for key in ("side", "zone", "size")}


def pictures(number, **changes):
    """The views of a subject, upright and from 0 to 1: (xray, ct, t2)."""
    views = torso_views(0, number, 64, traits={**torso_subject(0, number), **changes})
    t2 = views["t2"][..., 0].T
    ct = np.clip((views["ct"][..., 0].T + 1000.0) / 2500, 0, 1)
    return views["xray"] / 4095, ct, np.clip(t2 / np.percentile(t2, 99.5), 0, 1)


# ---- Spans ---------------------------------------------------------------------------------------------------------------

def test_ball_by_hand():
    x, z = np.array([1.0, 7.0, 1.0, 1.0 + 6.0]), np.array([5.0, 5.0, 5.0 + 10.01, 5.0])
    start, end = ball(x, z, (1, 2, 5), (6, 3, 10))
    np.testing.assert_allclose(start, [-1, 2, 2, 2], atol=1e-6)
    np.testing.assert_allclose(end, [5, 2, 2, 2], atol=1e-6)
    start, end = ball(np.array([4.0]), np.array([5.0]), (1, 2, 5), (6, 3, 10))
    assert end[0] - start[0] == pytest.approx(2 * 3 * np.sqrt(0.75))
    start, end = ball(np.array([4.0]), np.array([5.0]), (1, 2, 5), (6, 3, 10), power=4)
    assert end[0] - start[0] == pytest.approx(2 * 3 * (1 - 1 / 16) ** 0.25)


def test_ball_is_tilted_from_x_to_z():
    """At 30 degrees the long axis goes through (cos 30, sin 30)."""
    x = 9 * np.array([np.cos(np.pi / 6), np.cos(np.pi / 6)])
    z = 9 * np.array([np.sin(np.pi / 6), -np.sin(np.pi / 6)])
    start, end = ball(x, z, (0, 0, 0), (10, 2, 3), tilt=30)
    assert end[0] - start[0] == pytest.approx(2 * 2 * np.sqrt(1 - 0.81)) and end[1] == start[1]


def test_chords_of_a_ball_add_up_to_its_volume():
    axis = np.linspace(-20, 20, 401)
    x, z = (p.ravel() for p in np.meshgrid(axis, axis))
    start, end = ball(x, z, (3, -5, 2), (9, 7, 12), tilt=20)
    assert (end - start).sum() * 0.1 ** 2 == pytest.approx(4 / 3 * np.pi * 9 * 7 * 12, rel=1e-3)


def test_column_by_hand():
    start, end = column(np.array([0.0, 5.0, 11.0]), np.zeros(3), (2, 1), 6, 4)
    np.testing.assert_allclose(end - start, [8 * np.sqrt(1 - 1 / 9), 8 * np.sqrt(0.75), 0])
    np.testing.assert_allclose(start + end, 2)


def test_ribs_fall_to_the_side_and_further_to_the_front():
    heights = np.linspace(-13.5, 13.5, 2701)
    centres = []
    for x in (0, 60, 120 * np.sin(np.pi / 3)):
        back, front = torso.rib_shares(np.full_like(heights, x), heights, np.full_like(heights, 120))
        turns = [(share * np.exp(2j * np.pi * heights / 27)).sum() for share in (back, front)]
        centres.append([27 * np.angle(turn) / (2 * np.pi) for turn in turns] + [front.max()])
        assert (back > 0.5).mean() == pytest.approx(13 / 27, abs=0.01)
        assert back.max() == pytest.approx(0.55)
    back, front, most = zip(*centres)
    # Behind, 45 mm times 2/pi asin(1/2) = 15 mm below 0, then 30 mm. In front, another 60 * 2/3 = 40 mm below the 45 mm
    # of the side, then 20 mm. Ribs come every 27 mm: -15 = 12, -30 = -3, -85 = -4, -65 = -11.
    np.testing.assert_allclose(back, [0, 12, -3], atol=0.05)
    np.testing.assert_allclose(front[1:], [-4, -11], atol=0.05)
    assert most[0] == 0 and most[1] > 0.5


# ---- The X-ray against brute force ---------------------------------------------------------------------------------------

def test_attenuation_of_three_parts_by_hand():
    """Fat from 0 to 10, lung from 2 to 6 in it, bone from 5 to 12 over both, a quarter of which is muscle."""
    rays = np.zeros((4, 1), np.float32) + np.array([1, 1, 1, 0], np.float32)    # the last ray meets nothing
    parts = [Part("fat", 0 * rays[0], 10 * rays[0]), Part("lung", 2 * rays[0], [6, 6, 2, 0] * rays[0]),
             Part("bone", 5 * rays[0], [12, 5, 5, 0] * rays[0], np.array([0.75, 1, 1, 1]), "muscle")]
    total = attenuation_sum(parts, {"fat": 2.0, "lung": 10.0, "bone": 100.0, "muscle": 20.0})
    np.testing.assert_allclose(total, [2 * 2 + 3 * 10 + 7 * 80, 2 * 2 + 4 * 10 + 4 * 2, 10 * 2, 0], rtol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 8])
def test_closed_form_is_the_line_integral(number):
    """Points every 0.1 mm along each ray, painted in the order of the parts."""
    traits = torso_subject(0, number)
    parts = torso.xray_parts(0, number, traits, 20)
    y = np.arange(-200, 200, 0.1) + 0.05
    found = np.zeros((400, len(y)))
    for part in parts:
        value = part.share * MU[part.tissue] + (1 - part.share) * MU[part.rest]
        inside = (y > part.start[:, None]) & (y < part.end[:, None])
        found = np.where(inside, np.broadcast_to(value, 400)[:, None], found)
    total = attenuation_sum(parts, MU)
    assert total.max() > 3 and total.min() == 0
    np.testing.assert_allclose(total, found.sum(axis=1) * 0.1, atol=0.012)


@pytest.mark.parametrize("number", [1, 4])
def test_slice_and_xray_show_the_same_body(number):
    """The tissues of a fine slice, added along y, are the row of the X-ray at that height."""
    traits = torso_subject(0, number)
    z = np.array([traits["shift"][2] + traits["height"] * (-3.4 * torso.VERTEBRA)])     # inside of a vertebra
    x, y = np.arange(150, -151, -2.0), np.arange(-200, 200, 0.2)
    labels = torso.torso_labels(0, number, traits, (x, y, z))[..., 0]
    table = np.zeros(max(CODE.values()) + 1)
    for name, value in MU.items():
        table[CODE[name]] = value
    parts = torso.world_parts(0, number, traits, x, z)
    for part in parts:
        part.share = np.round(part.share)
    np.testing.assert_allclose(attenuation_sum(parts, MU), table[labels].sum(axis=1) * 0.2, atol=0.04)


def test_bright_where_much_is_in_the_way():
    """4095 (ln(N0 / N) - 0.7) / 4.3 with little noise: a known sum gives a known number of the file."""
    traits = torso_subject(0, 3)
    parts = torso.xray_parts(0, 3, traits, 64)
    picture = torso.render_xray(0, 3, traits, 64, parts)
    assert picture.dtype == np.uint16 and 3500 < picture.max() <= 4095
    total = torso.as_picture(attenuation_sum(parts, torso.attenuations(traits)), 64)
    inside = (total > 1.2) & (total < 4)
    seen = 0.7 + picture[inside] / 4095 * 4.3
    slope, offset = np.polyfit(total[inside], seen, 1)
    assert slope == pytest.approx(1, abs=0.03) and abs(offset) < 0.5
    assert np.std(seen - slope * total[inside] - offset) < 0.12


def test_more_bone_more_attenuation():
    traits = torso_subject(0, 3)
    weak, strong = (torso.attenuations({**traits, "density": density}) for density in (1.0, 1.5))
    assert strong["bone"] - weak["bone"] == pytest.approx(0.0193 * 0.65) and strong["liver"] == weak["liver"]
    assert weak["csf"] == pytest.approx(0.0193 * 1.008)


# ---- What the views show -------------------------------------------------------------------------------------------------

def test_ordering_of_tissues():
    """CT: air < lung < fat < fluid < soft tissue < bone. T2: fluid > fat > tumour > muscle > lung."""
    traits = next(t for t in (torso_subject(0, n) for n in range(50)) if t["effusion"] and t["lesion"])
    grid = torso_grid(traits, 128)
    anatomy = torso.torso_anatomy(0, 7, traits, grid)
    ct, t2 = render_ct(anatomy, traits["density"]), render(anatomy, torso.PROTOCOL)
    names = [name for name in anatomy.maps if pure(anatomy, name).sum() > 20]
    hu = {name: ct[pure(anatomy, name)].mean() for name in names}
    bright = {name: t2[pure(anatomy, name)].mean() for name in names}
    assert ct[~anatomy.mask].max() == -1000
    assert -1000 < hu["lung"] < -750 < -150 < hu["fat"] < -50 < hu["csf"] < hu["tumour"] < hu["bone"] - 500
    assert hu["muscle"] == pytest.approx(55, abs=20)
    assert bright["csf"] > bright["fat"] > bright["tumour"] > bright["muscle"] > 3 * bright["lung"]
    assert bright["muscle"] > 5 * bright["bone"]
    assert ct[pure(anatomy, "lung")].std() > 15  # texture


def test_right_is_left_in_every_picture():
    """Where a large lesion or an effusion is added, all three pictures change on that side."""
    def views(number, **changes):
        traits = {**torso_subject(0, number), "shift": [0, 0, 0], "ratio": 0.45, **changes}
        anatomy = torso.torso_anatomy(0, number, traits, torso_grid(traits, 64))
        xray = torso.render_xray(0, number, traits, 64, torso.xray_parts(0, number, traits, 64)) / 4095
        return xray, render_ct(anatomy, 1.0)[..., 0].T / 2500, render(anatomy, torso.PROTOCOL)[..., 0].T

    for number in range(6):
        for side, columns in (("right", slice(0, 32)), ("left", slice(32, 64))):
            x = 70.0 if side == "right" else -70.0
            lesion = {"side": side, "zone": "lower", "size": "large", "x": x, "y": -10.0, "z": -66.0, "radius": 22.0}
            plain = views(number, effusion=None, lesion=None)
            for changed in (views(number, effusion=None, lesion=lesion), views(number, effusion=side, lesion=None)):
                for before, after in zip(plain, changed):
                    change = np.abs(gaussian_filter(after - before, 1)) > 0.04
                    assert change.sum() > 20 and change[:, columns].sum() > 0.95 * change.sum()


def test_upright():
    """X-ray: shoulders above, liver below. Slice: sternum in the first rows, spine in the last. The heart is on the left."""
    xray, ct, _ = np.mean([pictures(n, lesion=None, effusion=None) for n in range(6)], axis=0)
    lungs = slice(12, 26)
    assert xray[28:40, 10:22].mean() < xray[55:, 10:22].mean() - 0.3
    assert (xray[2] > 0.2).sum() < (xray[9] > 0.2).sum() - 10           # neck and shoulders
    assert xray[36:42, 34:44].mean() > xray[36:42, 20:30].mean() + 0.05
    rows = np.flatnonzero(ct[:, 32] > 0.3)
    assert ct[rows[-1] - 12:rows[-1], 32].max() > 0.55
    assert ct[20:40, 36:46].mean() > ct[20:40, 18:28].mean() + 0.05
    assert ct[28:40, lungs].mean() < 0.2


def test_lesions_are_as_wide_as_they_should_be():
    """About 4 pixels for a small one and 8 for a large one, in the X-ray and in the slice. Their centre is as said."""
    widths = {"small": [], "large": []}
    for number in range(40):
        traits = torso_subject(0, number)
        lesion = traits["lesion"]
        if not lesion:
            assert not torso.lesion_mask(traits, 64, []).any()
            continue
        mask = torso_views(0, number, 64, ("mask",))["mask"] == 255
        rows, columns = np.nonzero(mask)
        grid = torso_grid(traits, 64)
        tumour = torso.torso_anatomy(0, number, traits, grid).maps["tumour"][..., 0]
        widths[lesion["size"]] += [np.ptp(columns) + 1, np.ptp(rows) + 1, tumour.sum(axis=0).max()]
        place = [traits["shift"][k] + scale * lesion["xyz"[k]]
                 for k, scale in enumerate((traits["width"], traits["depth"], traits["height"]))]
        middle = ((31.5 - columns.mean()) * 5.625, -40 + (31.5 - rows.mean()) * 5.625)
        assert np.hypot(middle[0] - place[0], middle[1] - place[2]) < 14, number    # the warp, and half a pixel
        x, y, _ = grid.axes()
        assert abs((tumour.sum(axis=1) * x).sum() / tumour.sum() - place[0]) < 12
        assert abs((tumour.sum(axis=0) * y).sum() / tumour.sum() - place[1]) < 12
        assert np.sign(place[0]) == (1 if lesion["side"] == "right" else -1)
        assert grid.first[2] == pytest.approx(place[2])
    assert np.mean(widths["small"]) == pytest.approx(4.2, abs=0.6)
    assert np.mean(widths["large"]) == pytest.approx(7.8, abs=0.8)


def test_lesions_show_in_every_view():
    """Against the same subject without it. The X-ray sees a sum, so it shows the least."""
    small = [n for n in range(60) if (torso_subject(0, n)["lesion"] or {}).get("size") == "small"][:12]
    gains = []
    for number in small:
        traits = torso_subject(0, number)
        mask = torso_views(0, number, 64, ("mask",))["mask"] == 255
        without = {**traits, "lesion": None}
        parts = torso.xray_parts(0, number, without, 64)
        gain = pictures(number)[0] - torso.render_xray(0, number, without, 64, parts) / 4095
        gains.append(gain[mask].mean())
        assert gains[-1] > 0.03 and np.abs(gain[~mask].mean()) < 0.01, number
        grid = torso_grid(traits, 64)
        anatomy = torso.torso_anatomy(0, number, traits, grid)
        plain = torso.torso_anatomy(0, number, without, grid)
        core = anatomy.maps["tumour"] > 0.9
        assert (render_ct(anatomy, 1.0) - render_ct(plain, 1.0))[core].mean() > 250
        assert np.abs(render(anatomy, torso.PROTOCOL) - render(plain, torso.PROTOCOL))[core].mean() > 0.04
    assert len(gains) == 12 and np.mean(gains) > 0.065


def test_fluid_collects_behind_and_below():
    """The patient lies on the back in CT, so fluid fills the lowest part of the lung there. It is deepest at the base."""
    traits = {**torso_subject(0, 0), "effusion": "right", "lesion": None}
    depths = []
    for z in (20.0, -60.0, -105.0):
        grid = Grid((180, 180, 1), (-2, -2, 5), (179, 171, z))
        labels = torso.torso_labels(0, 0, traits, grid.axes())[:90, :, 0]
        fluid, lung = (np.argwhere(labels == CODE[name]) for name in ("csf", "lung"))
        assert fluid[:, 1].mean() > lung[:, 1].mean() + 15      # the index runs from front to back
        depths.append((labels == CODE["csf"]).sum(axis=1).max() * 2)
    assert 10 < depths[0] < depths[1] < depths[2] - 20


def test_enlarged_hearts_are_wider():
    """Half of the chest or more on the X-ray, as radiologists measure it."""
    for number in range(5):
        widths = []
        for ratio in (0.45, 0.62):
            traits = {**torso_subject(0, number), "ratio": ratio}
            parts = torso.xray_parts(0, number, traits, 128)
            heart = [part for part in parts if part.tissue == "myocardium"][0]
            shadow = torso.as_picture(heart.end > heart.start, 128)
            widths.append(np.ptp(np.flatnonzero(shadow.any(axis=0))) * 360 / 128)
        inside = 2 * 126 * traits["width"]
        assert widths[0] / inside == pytest.approx(0.45, abs=0.05)
        assert widths[1] / inside == pytest.approx(0.62, abs=0.06)


def test_how_often_there_is_what(many):
    traits, _ = many
    assert np.mean([t["lesion"] is not None for t in traits]) == pytest.approx(1 / 2, abs=0.03)
    assert np.mean([t["effusion"] is not None for t in traits]) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean([t["heart"] == "enlarged" for t in traits]) == pytest.approx(1 / 3, abs=0.03)
    lesions = [t["lesion"] for t in traits if t["lesion"]]
    assert min(Counter(tuple(words_of(lesion).values()) for lesion in lesions).values()) > len(lesions) / 8 * 0.8
    for t in traits:
        assert (t["ratio"] > 0.5) == (t["heart"] == "enlarged")
        if t["lesion"]:
            assert (t["lesion"]["x"] > 0) == (t["lesion"]["side"] == "right")
            assert (t["lesion"]["z"] > -20) == (t["lesion"]["zone"] == "upper")
            assert (t["lesion"]["radius"] > 17) == (t["lesion"]["size"] == "large")


def test_same_torso_at_another_resolution():
    traits = torso_subject(0, 4)
    coarse, fine = (torso.torso_anatomy(0, 4, traits, torso_grid(traits, size)) for size in (48, 192))
    for name in ("muscle", "lung", "fat", "csf"):
        blocks = fine.maps[name].reshape(48, 4, 48, 4, 1).mean(axis=(1, 3))
        assert np.corrcoef(blocks.ravel(), coarse.maps[name].ravel())[0, 1] > 0.9


@pytest.mark.slow
def test_there_is_room_to_learn_on_cxr():
    views = [np.stack(pictures(n)) for n in range(60)]
    images = np.stack(views).transpose(1, 0, 2, 3)                      # (view, subject, 64, 64)
    for view, (low, high) in zip(images, ((17, 21), (16, 20), (13, 17))):
        train, test = view[:45, None], view[45:, None]
        mean = psnr(np.broadcast_to(train.mean(axis=0), test.shape), test)
        assert low < mean < high
        assert 9 < psnr(np.full_like(test, train.mean()), test) < mean - 2


@pytest.mark.slow
def test_a_linear_classifier_finds_the_side_in_ct():
    """Ridge regression on the blurred slice minus its mirror image."""
    def features(numbers):
        rows, sides = [], []
        for number in numbers:
            lesion = torso_subject(0, number)["lesion"]
            if lesion:
                ct = torso_views(0, number, 64, ("ct",))["ct"][..., 0].T
                ct = gaussian_filter(np.clip((ct + 1000.0) / 2500, 0, 1), 1)
                rows.append((ct - ct[:, ::-1])[:, :32].ravel())
                sides.append(1 if lesion["side"] == "left" else -1)
        return np.stack(rows), np.array(sides)

    train, sides = features(range(500))
    test, truth = features(range(1000, 1200))
    weights = train.T @ np.linalg.solve(train @ train.T + 10 * np.eye(len(train)), sides)
    assert np.mean(np.sign(test @ weights) == truth) >= 0.90


# ---- Reports -------------------------------------------------------------------------------------------------------------

def test_reports_say_what_is_true(many):
    for traits, report in zip(*many):
        found = cxr_findings_in(report)
        assert found["lesion"] == words_of(traits["lesion"]), report
        assert found["effusion"] == traits["effusion"], report
        assert found["heart"] == traits["heart"] or (found["heart"] is None and traits["heart"] == "normal"), report
    told = np.mean([cxr_findings_in(report)["heart"] is not None for report in many[1]])
    assert told == pytest.approx(1 - 0.2 * 2 / 3, abs=0.02)


def test_words_and_lengths_of_reports(many):
    texts = many[1]
    tokens = [text.split() for text in texts]
    assert all(text == text.lower() and text.endswith(" .") for text in texts)
    assert all(word == "." or word.isalpha() for report in tokens for word in report)
    lengths = [len(report) for report in tokens]
    assert 8 <= min(lengths) and max(lengths) <= 40 and 18 < np.mean(lengths) < 25
    assert np.percentile(lengths, 95) <= 34
    counts = Counter(word for report in tokens for word in report)
    assert 150 <= len(counts) <= 300 and min(counts.values()) > 30
    assert len(set(texts)) > 0.97 * len(texts)


def test_every_phrase_of_a_statement_is_used(many):
    traits, texts = many
    for key, value, phrases in (("lesion", None, reports.NO_LESION), ("heart", "enlarged", reports.HEART["enlarged"]),
                                ("effusion", "left", [form.format(side="left") for form in reports.EFFUSION])):
        sentences = Counter()
        first = 0
        for of, text in zip(traits, texts):
            if of[key] == value:
                said = text.removesuffix(" .").split(" . ")
                sentences.update(said)
                first += said[0] in phrases
        assert len(phrases) == 6 and all(sentences[phrase] > 40 for phrase in phrases)
        total = sum(sentences[phrase] for phrase in phrases)
        assert 0.15 < first / total < 0.35      # the order is drawn, among 4 or 5 sentences


@pytest.mark.parametrize("report, lesion, effusion, heart", [
    ("there is a small nodule in the left upper lobe . the heart is normal in size . no pleural effusion is seen .",
     ("left", "upper", "small"), None, "normal"),
    ("No mass in the left lung. Right pleural effusion. The heart is larger than normal.", None, "right", "enlarged"),
    ("the heart is not enlarged . the lungs are clear .", None, None, "normal"),
    ("there is no cardiomegaly . tiny lesion in the apical region of the right lung", ("right", "upper", "small"), None, "normal"),
    ("a large mass large mass in the the right left base . effusion effusion .", (UNKNOWN, "lower", "large"), UNKNOWN, None),
    ("opacity", (UNKNOWN, UNKNOWN, UNKNOWN), None, None),
    ("a big mass in the left lung base . a small nodule in the right upper lobe .", ("left", "lower", "large"), None, None),
    ("", None, None, None), (" . . heart . cardiac the", None, None, None), (None, None, None, None), (7, None, None, None)],
    ids=["example", "denied", "not-enlarged", "no-end", "both-sides", "bare", "two", "empty", "mush", "none", "number"])
def test_reading_of_a_text(report, lesion, effusion, heart):
    if lesion:
        lesion = dict(zip(("side", "zone", "size"), lesion))
    assert cxr_findings_in(report) == {"lesion": lesion, "effusion": effusion, "heart": heart}


def test_any_words_can_be_read(many):
    """Words of real reports in random order, as a bad network writes them."""
    rng = np.random.default_rng(0)
    words = sorted({word for report in many[1] for word in report.split()})
    for _ in range(500):
        found = cxr_findings_in(" ".join(rng.choice(words, rng.integers(40))))
        assert set(found) == {"lesion", "effusion", "heart"}
        assert found["effusion"] in (None, "left", "right", UNKNOWN) and found["heart"] in (None, "normal", "enlarged")


# ---- Files ---------------------------------------------------------------------------------------------------------------

def test_who_is_in_the_usual_set():
    assert usual_numbers("cxr") == (400, 1)
    members = cxr_members(400)
    counts = Counter((split, group) for _, split, group in members)
    assert counts == {**{("train", group): 400 for group in ("xray", "ct", "mr")},
                      **{("val", group): 40 for group in ("xray", "ct", "mr")},
                      **{("test", group): 20 for group in ("xray", "ct", "mr", "all")}}
    assert len({number for number, _, _ in members}) == len(members)
    fewer = {number: group for number, _, group in cxr_members(30)}
    more = {number: group for number, _, group in members}
    assert all(more[number] == group for number, group in fewer.items())


def test_layout_of_cxr(cxr):
    folder, entries, rows, truth = cxr
    groups = {row["id"]: row["set"] for row in rows}
    assert [len(entries[split]) for split in ("train", "val", "test")] == [36, 3, 4]
    files = {"annotation.json", "findings.csv", "phantom.json"}
    shown = {"xray": ["xray"], "ct": ["ct"], "mr": ["ct", "t2"], "all": ["xray", "ct", "t2"]}
    for split, members in entries.items():
        for entry in members:
            assert set(entry) == {"id", "report", "image_path", "split"} and entry["split"] == split
            name, views = entry["id"], shown[groups[entry["id"]]]
            ends = {"xray": "png", "ct": "nii.gz", "t2": "nii.gz"}
            assert entry["image_path"] == [f"{view}/{name}.{ends[view]}" for view in views]
            assert (entry["report"] == "") == (groups[name] == "mr")
            files |= {f"images/{path}" for path in entry["image_path"]}
            files |= {f"images/masks/{name}.png"} if "xray" in views else set()
    assert set(contents(folder)) == files
    assert set(truth) == set(groups) and entries["train"][0]["id"] == "cxr0001"
    assert {entry["id"] for entry in entries["test"] if groups[entry["id"]] == "all"} == {"cxr0004"}


def test_pictures_of_cxr(cxr):
    folder, entries, _, truth = cxr
    for entry in entries["test"]:
        for path in entry["image_path"]:
            if path.endswith("png"):
                picture = np.asarray(Image.open(folder / "images" / path))
                assert picture.shape == (64, 64) and picture.dtype == np.uint16 and picture.max() <= 4095
                number = int(entry["id"][3:]) - 1
                np.testing.assert_array_equal(picture, torso_views(0, number, 64, ("xray",))["xray"])
            else:
                image = nib.load(folder / "images" / path)
                assert image.shape == (64, 64, 1) and nib.aff2axcodes(image.affine) == ("L", "P", "S")
                np.testing.assert_allclose(image.affine, torso_grid(truth[entry["id"]], 64).affine(), atol=1e-4)
                low, high = (-1024, -900) if path.startswith("ct") else (0, 0)
                assert low <= np.asarray(image.dataobj).min() <= high + 5


def test_sheet_of_findings(cxr):
    folder, entries, rows, truth = cxr
    texts = {entry["id"]: entry["report"] for split in entries.values() for entry in split}
    boxes = 0
    for row in rows:
        traits = truth[row["id"]]
        lesion = words_of(traits["lesion"]) or {"side": "", "zone": "", "size": ""}
        assert [row[f"lesion_{key}"] for key in ("side", "zone", "size")] == list(lesion.values())
        assert row["effusion"] == (traits["effusion"] or "") and row["heart"] == traits["heart"]
        if row["set"] != "mr":
            assert cxr_findings_in(texts[row["id"]])["lesion"] == words_of(traits["lesion"])
        box = [row[key] for key in ("x0", "y0", "x1", "y1")]
        if row["set"] not in ("xray", "all"):
            assert box == [""] * 4
            continue
        mask = np.asarray(Image.open(folder / "images" / "masks" / f"{row['id']}.png"))
        assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255} and mask.any() == (lesion["side"] != "")
        if mask.any():
            x0, y0, x1, y1 = map(int, box)
            outside = mask.copy()
            outside[y0:y1, x0:x1] = 0
            inside = mask[y0:y1, x0:x1]
            assert not outside.any() and inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
            boxes += 1
        else:
            assert box == [""] * 4
    assert boxes > 4


def test_cxr_same_arguments_same_bytes(cxr, tmp_path):
    make("cxr", tmp_path / "few", subjects=2)
    make("cxr", tmp_path / "again", subjects=2)
    make("cxr", tmp_path / "other", subjects=2, seed=1)
    few, again, other, all_of_them = (contents(f) for f in (tmp_path / "few", tmp_path / "again", tmp_path / "other", cxr[0]))
    assert few == again
    for name in few:
        if "images" in name:
            assert few[name] == all_of_them[name]
            assert "masks" in name or other[name] != few[name]
    assert few["images/ct/cxr0002.nii.gz"] != few["images/ct/cxr0006.nii.gz"]
    assert sum(name.startswith("images/t2") for name in few) == 5       # 2 + 1 + 1 of the set mr, 1 of the set all


def test_cxr_has_one_slice(tmp_path):
    with pytest.raises(DataError, match="cannot make 2 slices.*use slices 1") as caught:
        make("cxr", tmp_path / "x", subjects=1, slices=2)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_torsos_fit_into_the_slice():
    for number in range(0, 40, 3):
        traits = torso_subject(0, number)
        wide = Grid((100, 100, 1), (-4, -4, 5), (198, 190, torso_grid(traits, 32).first[2]))
        labels = torso.torso_labels(0, number, traits, wide.axes())[..., 0] > 0
        assert labels[5:-5, 5:-5].sum() == labels.sum() and 0.25 < labels.mean() < 0.7
