"""The set neuro: the BIDS tree, the true image of any record, and what the scanners add to it."""

import csv
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data.files import DataError
from data.phantom import make, neuro, neuro_subject, neuro_tissues, neuro_true, neuro_truth, usual_numbers
from data.phantom.__main__ import main
from data.phantom.geometry import rng_for, smooth_field
from data.phantom.head import head_grid
from data.phantom.neuro import FILES, SITES, draw_record, draw_scans, neuro_images
from data.phantom.physics import TISSUES, Tissue, inversion_recovery, spin_echo
from scans import contents, one_voxel, pure

ENDS = {"t1": "anat/{}_T1w", "t2": "anat/{}_T2w", "flair": "anat/{}_FLAIR", "pd": "anat/{}_PDw", "ct": "ct/{}_ct",
        "fdg": "pet/{}_trc-FDG_pet", "av45": "pet/{}_trc-AV45_pet"}
MR = ("t1", "t2", "flair", "pd")
SPEC = {"csf": (1.00, 4000.0, 2000.0), "gm": (0.86, 1400.0, 100.0), "wm": (0.77, 900.0, 70.0)}  # PD, T1 and T2 in ms
ALL = {"t1": {"TR": 600, "TE": 12}, "t2": {"TR": 4500, "TE": 95}, "flair": {"TR": 9000, "TE": 120}, "pd": {"TR": 3000, "TE": 15},
       "ct": {}, "fdg": {"dose": 300}, "av45": {"dose": 300}}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Nine subjects of the default grid: folder, names, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "neuro"
    make("neuro", folder, subjects=9)
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    return folder, list(truth), truth


@pytest.fixture(scope="module")
def brain():
    """The first subject of neuro and its records; it has all contrasts."""
    return neuro_subject(0, 0, head_grid(64, 16))


@pytest.fixture(scope="module")
def crowd():
    """The subjects of the default set, in one slice of few pixels."""
    return [neuro_subject(0, subject, head_grid(16, 1)) for subject in range(40)]


def load(folder, name, contrast):
    return nib.load(folder / name / f"{ENDS[contrast].format(name)}.nii.gz")


def told(folder, name, contrast):
    """The sidecar beside an image, read by hand."""
    return json.loads((folder / name / f"{ENDS[contrast].format(name)}.json").read_text(encoding="utf-8"))


def site_of(name):
    return ("Siemens", "GE", "UIH")[(int(name[4:]) - 1) % 3]


# ---- The set on disk -------------------------------------------------------------------------------------------------

def test_tree_is_bids(tree):
    folder, names, truth = tree
    assert names == [f"sub-0{k}" for k in range(1, 10)]
    expected = {"README", "dataset_description.json", "participants.tsv", "phantom.json", "ct.json", "trc-FDG_pet.json",
                "trc-AV45_pet.json"}
    for name in names:
        for contrast in truth[name]["records"]:
            expected |= {f"{name}/{ENDS[contrast].format(name)}{end}" for end in (".nii.gz", ".json")}
    assert set(contents(folder)) == expected
    about = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))
    assert about["BIDSVersion"].startswith("1.") and about["DatasetType"] == "raw" and "synthetic" in about["Name"]
    assert "synthetic" in (folder / "README").read_text(encoding="utf-8")
    for contrast in FILES:
        name = next(name for name in names if contrast in truth[name]["records"])
        image = load(folder, name, contrast)
        assert image.shape == (64, 64, 16) and nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.get_data_dtype() == (np.float32 if contrast in ("fdg", "av45") else np.int16)
        np.testing.assert_allclose(image.header.get_zooms(), (3, 3, 75 / 16))
        np.testing.assert_array_equal(image.affine, head_grid(64, 16).affine())


def test_participants(tree):
    folder, names, truth = tree
    text = (folder / "participants.tsv").read_bytes().decode("utf-8")
    assert text.startswith("participant_id\tage\tsex\nsub-01\t")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    assert [row["participant_id"] for row in rows] == names
    assert [row["participant_id"] for row in rows if row["age"] == "n/a"] == ["sub-06"]
    for row in rows:
        of = truth[row["participant_id"]]
        assert row["sex"] == of["sex"] and of["tumour"] is None
        assert {(record["age"], record["sex"]) for record in of["records"].values()} == {(round(of["age"]), row["sex"])}
        assert row["age"] in ("n/a", str(round(of["age"])))


def test_sidecars_are_in_the_units_of_bids(tree):
    """Each value by hand: seconds, lists of frames, a dose with its unit; and nothing that a site hides."""
    folder, names, truth = tree
    for name in names:
        site = site_of(name)
        for contrast, record in truth[name]["records"].items():
            side = told(folder, name, contrast)
            assert side.pop("Manufacturer") == record["vendor"] == site
            assert side.pop("ManufacturersModelName") == record["model"]
            if contrast in MR:
                assert side.pop("MagneticFieldStrength") == record["field"] == (1.5 if site == "GE" else 3.0)
                assert side.pop("RepetitionTime") == pytest.approx(record["TR"] / 1000, rel=1e-9)
                assert side.pop("EchoTime") == pytest.approx(record["TE"] / 1000, rel=1e-9)
                assert ("InversionTime" in side) == ("TI" in record) == (contrast == "flair")
                assert contrast != "flair" or side.pop("InversionTime") == pytest.approx(record["TI"] / 1000, rel=1e-9)
                assert record["FA"] == 90 and side.pop("FlipAngle", None) == (None if site == "UIH" else 90)
            elif contrast == "ct":
                assert side.pop("ConvolutionKernel") == record["kernel"]
                assert side.pop("XRayTubeCurrent", None) == (None if site == "UIH" else record["ma"])
                assert record["kvp"] == (100 if site == "UIH" else 120)
                assert side.pop("KVP", None) == (100 if site == "UIH" else None)  # the others inherit it
            else:
                assert side.pop("FrameTimesStart") == [record["start"]] and side.pop("FrameDuration") == [record["duration"]]
                assert side.pop("ReconMethodName", None) == (None if site == "GE" else record["recon"]) and record["recon"]
                unit = side.pop("InjectedRadioactivityUnits")
                assert unit == ("Bq" if site == "GE" else "MBq")
                assert side.pop("InjectedRadioactivity") == record["dose"] * (10 ** 6 if unit == "Bq" else 1)
                assert record["tracer"] == contrast.upper()
            assert side == {}, (name, contrast)
    root = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    assert root["ct.json"] == {"KVP": 120}
    assert root["trc-FDG_pet.json"]["TracerName"] == "FDG" and root["trc-AV45_pet.json"]["TracerName"] == "AV45"


def test_same_arguments_same_bytes(tree, tmp_path):
    make("neuro", tmp_path / "few", subjects=2)
    make("neuro", tmp_path / "other", subjects=2, seed=1)
    few, other, nine = contents(tmp_path / "few"), contents(tmp_path / "other"), contents(tree[0])
    for name, data in few.items():
        assert name in ("participants.tsv", "phantom.json") or data == nine[name], name
        assert not name.endswith("nii.gz") or other.get(name) != data, name
    assert nine["participants.tsv"].startswith(few["participants.tsv"])


def test_usual_numbers(tmp_path, monkeypatch, capsys):
    assert usual_numbers("neuro") == (40, 16) and usual_numbers("brats") == usual_numbers("cta-external") == (24, 12)
    asked = []
    monkeypatch.setattr("data.phantom.SETS", {name: lambda *_, name=name: asked.append((name, *_[1:])) or {} for name in ("neuro", "ixi")})
    make("neuro", tmp_path / "a")
    make("ixi", tmp_path / "b")
    make("neuro", tmp_path / "c", subjects=3, size=32, slices=5, seed=7)
    assert asked == [("neuro", 40, 64, 16, 0), ("ixi", 24, 64, 12, 0), ("neuro", 3, 32, 5, 7)]
    for words, expected in ((["neuro", "d"], 40), (["ixi", "e"], 24), (["neuro", "f", "--subjects", "2"], 2)):
        monkeypatch.setattr("sys.argv", ["phantom", words[0], str(tmp_path / words[1]), *words[2:]])
        assert main() == 0
        assert f": {expected} synthetic subjects ({words[0]})" in capsys.readouterr().out
    with pytest.raises(DataError, match="slices 0"):
        make("neuro", tmp_path / "g", slices=0)
    assert json.loads((tmp_path / "a" / "phantom.json").read_text(encoding="utf-8"))["slices"] == 16


# ---- Draws -----------------------------------------------------------------------------------------------------------

def test_shares_of_missing_scans():
    drawn = [draw_scans(rng_for(3, subject, "which scans")) for subject in range(2000)]
    for contrast, share in {"t1": 1.0, "t2": 0.8, "flair": 0.8, "pd": 0.8, "ct": 0.8, "fdg": 0.6, "av45": 0.6}.items():
        assert np.mean([contrast in scans for scans in drawn]) == pytest.approx(share, abs=0.03), contrast
    tracers = [("fdg" in scans) + ("av45" in scans) for scans in drawn]
    np.testing.assert_allclose([tracers.count(k) / 2000 for k in (0, 1, 2)], (0.05, 0.70, 0.25), atol=0.03)
    pairs = np.array([["t2" in scans, "ct" in scans, "flair" in scans] for scans in drawn], float)
    assert np.abs(np.corrcoef(pairs.T) - np.eye(3)).max() < 0.08  # which are missing is independent
    usual = [draw_scans(rng_for(0, subject, "which scans")) for subject in range(40)]
    for contrast in ("t2", "flair", "pd", "ct"):
        assert 29 <= sum(contrast in scans for scans in usual) <= 35  # of the default set


def test_records_fill_their_ranges():
    ranges = {"t1": {"TR": (400, 800), "TE": (8, 20)}, "t2": {"TR": (3000, 6000), "TE": (60, 140)},
              "pd": {"TR": (2500, 4000), "TE": (10, 25)}, "flair": {"TR": (8000, 10000), "TE": (90, 140), "TI": (2250, 2750)},
              "ct": {"ma": (150, 300)}, "fdg": {"dose": (150, 400)}, "av45": {"dose": (200, 400)}}
    for contrast, fields in ranges.items():
        records = [draw_record(rng_for(0, subject, f"{contrast} record"), contrast, SITES[0], {"age": 50.4, "sex": "F"})
                   for subject in range(400)]
        for field, (low, high) in fields.items():
            values = np.array([record[field] for record in records])
            assert low <= values.min() < low + 0.08 * (high - low) and high - 0.08 * (high - low) < values.max() <= high, field
            assert values.mean() == pytest.approx((low + high) / 2, abs=0.06 * (high - low))
            assert all(isinstance(record[field], int) for record in records)


def test_protocols_differ_between_subjects_and_between_the_scans_of_one(crowd):
    place = {}  # of TR in its range, from 0 to 1
    for contrast in MR:
        low, high, _ = neuro.DRAWN[contrast]["TR"]
        place[contrast] = np.array([(records[contrast]["TR"] - low) / (high - low) if contrast in records else np.nan
                                    for _, records in crowd])
        there = place[contrast][~np.isnan(place[contrast])]
        assert len(there) >= 29 and len(set(there)) > 15 and there.std() > 0.2
    for a, b in (("t1", "t2"), ("t1", "pd"), ("t1", "flair"), ("t2", "pd"), ("t2", "flair"), ("pd", "flair")):
        both = ~np.isnan(place[a] + place[b])
        assert abs(np.corrcoef(place[a][both], place[b][both])[0, 1]) < 0.5, (a, b)
    assert [records["t1"]["vendor"] for _, records in crowd[:4]] == ["Siemens", "GE", "UIH", "Siemens"]


# ---- The true image --------------------------------------------------------------------------------------------------

T2_RATIO = {60: 0.725, 80: 0.600, 100: 0.496, 120: 0.410, 140: 0.339}
FLAIR_RATIO = {2000: 0.93, 2200: 0.40, 2350: 0.05, 2500: 0.27, 2700: 0.66}


def test_signal_equations_with_the_constants_of_the_specification():
    for te, ratio in T2_RATIO.items():
        assert spin_echo(*SPEC["gm"], 4000, te) / spin_echo(*SPEC["csf"], 4000, te) == pytest.approx(ratio, abs=6e-4)
    for ti, ratio in FLAIR_RATIO.items():
        csf, wm = (abs(inversion_recovery(*SPEC[name], 9000, 120, ti)) for name in ("csf", "wm"))
        assert csf / wm == pytest.approx(ratio, abs=6e-3)


def test_true_image_with_the_constants_of_the_specification(monkeypatch):
    for name, (pd, t1, t2) in SPEC.items():
        monkeypatch.setitem(TISSUES, name, Tissue(pd, (t1, t1), (t2, t2), 0))
    voxel = {name: one_voxel({name: 1.0}) for name in SPEC}

    def ratio(a, b, contrast, **record):
        return neuro_true(voxel[a], contrast, record).item() / neuro_true(voxel[b], contrast, record).item()

    for te, expected in T2_RATIO.items():
        assert ratio("gm", "csf", "t2", TR=4000, TE=te, field=3.0) == pytest.approx(expected, abs=6e-4)
    for ti, expected in FLAIR_RATIO.items():
        assert ratio("csf", "wm", "flair", TR=9000, TE=120, TI=ti, field=3.0) == pytest.approx(expected, abs=6e-3)
    short = 0.77 * (1 - np.exp(-500 / 900)) * np.exp(-10 / 70)
    assert neuro_true(voxel["wm"], "t1", {"TR": 500, "TE": 10, "field": 3.0}).item() == pytest.approx(short, rel=1e-6)
    assert neuro_true(voxel["wm"], "pd", {"TR": 500, "TE": 10, "field": 3.0}).item() == pytest.approx(short, rel=1e-6)


def test_flair_is_darkest_in_the_middle_of_the_range_of_ti():
    """At a TR of 9000 ms, and well inside of the range at the ends of the range of TR."""
    csf, wm = one_voxel({"csf": 1.0}), one_voxel({"wm": 1.0})
    tis = np.arange(2250, 2751, 10)
    for tr, best in ((8000, 2368), (9000, 2491), (10000, 2591)):
        records = [{"TR": tr, "TE": 115, "TI": int(ti), "field": 3.0} for ti in tis]
        ratio = [neuro_true(csf, "flair", record).item() / neuro_true(wm, "flair", record).item() for record in records]
        assert tis[np.argmin(ratio)] == pytest.approx(best, abs=6) and min(ratio) < 0.02
        assert min(ratio[0], ratio[-1]) > 0.15


def test_te_tr_ti_and_field_act_as_the_equations_say(brain):
    """In every voxel of pure white matter, with the relaxation times that this subject has there."""
    anatomy = brain[0]
    here = pure(anatomy, "wm")
    t1 = {tesla: base * anatomy.factors["wm"][1] * anatomy.variation[1][here] for tesla, base in ((1.5, 646), (3.0, 838))}
    t2 = 69 * anatomy.factors["wm"][2] * anatomy.variation[2][here]

    def level(contrast, **record):
        return neuro_true(anatomy, contrast, {"field": 3.0, **record})[here]

    close = {"rtol": 1e-3}
    np.testing.assert_allclose(level("t2", TR=4000, TE=120) / level("t2", TR=4000, TE=80), np.exp(-40 / t2), **close)
    np.testing.assert_allclose(level("pd", TR=4000, TE=24) / level("pd", TR=4000, TE=12), np.exp(-12 / t2), **close)
    np.testing.assert_allclose(level("t1", TR=800, TE=12) / level("t1", TR=400, TE=12), 1 + np.exp(-400 / t1[3.0]), **close)
    for tesla in (1.5, 3.0):
        recovered = [1 - 2 * np.exp(-ti / t1[tesla]) + np.exp(-9000 / t1[tesla]) for ti in (2300, 2700)]
        seen = [level("flair", TR=9000, TE=120, TI=ti, field=tesla) for ti in (2300, 2700)]
        np.testing.assert_allclose(seen[1] / seen[0], recovered[1] / recovered[0], **close)
    ratio = level("t1", TR=600, TE=12, field=1.5) / level("t1", TR=600, TE=12)
    t2_low = t2 * 72 / 69
    expected = (1 - np.exp(-600 / t1[1.5])) * np.exp(-12 / t2_low) / ((1 - np.exp(-600 / t1[3.0])) * np.exp(-12 / t2))
    np.testing.assert_allclose(ratio, expected, **close)


def test_stated_defaults(brain):
    anatomy = brain[0]
    full = {"t1": {"TR": 600, "TE": 14, "field": 3.0}, "t2": {"TR": 4500, "TE": 100, "field": 3.0},
            "pd": {"TR": 3250, "TE": 17.5, "field": 3.0}, "flair": {"TR": 9000, "TE": 115, "TI": 4330 * np.log(2 / (1 + np.exp(-9000 / 4330))), "field": 3.0},
            "ct": {"kvp": 80, "ma": 999}, "fdg": {"dose": 250, "recon": "FBP"}, "av45": {"dose": 250, "duration": 1}}
    for contrast, record in full.items():
        usual = neuro_true(anatomy, contrast, {})
        np.testing.assert_allclose(neuro_true(anatomy, contrast, record), usual, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(neuro_true(anatomy, contrast, dict.fromkeys(record)), usual)  # None is as absent
        assert usual.dtype == np.float32 and usual.shape == (64, 64, 16)
    csf = pure(anatomy, "csf")
    nulled = neuro_true(anatomy, "flair", {"TR": 8000})
    assert nulled[csf].max() < 1e-4 < neuro_true(anatomy, "flair", {"TR": 8000, "TI": 2490})[csf].min()
    with pytest.raises(ValueError, match="swi"):
        neuro_true(anatomy, "swi", {})


def test_contrast_is_that_of_a_radiologist(brain):
    anatomy = brain[0]
    masks = {name: pure(anatomy, name) for name in ("csf", "gm", "wm", "deep", "gliosis")}
    level = {contrast: {name: neuro_true(anatomy, contrast, record)[mask].mean() for name, mask in masks.items()}
             for contrast, record in ALL.items()}
    t1, t2, flair, pd, ct = (level[contrast] for contrast in ("t1", "t2", "flair", "pd", "ct"))
    assert t1["wm"] > 1.15 * t1["gm"] > 1.4 * t1["csf"]
    assert t2["csf"] > 1.5 * t2["gm"] > 1.8 * t2["wm"]
    assert flair["gliosis"] > flair["gm"] > 1.1 * flair["wm"] > 5 * flair["csf"]
    assert pd["gm"] > 1.05 * pd["wm"] and pd["wm"] > 0.7 * pd["csf"]
    np.testing.assert_allclose([ct[name] for name in ("csf", "gm", "wm", "deep")], (8, 38, 28, 36), atol=0.01)
    assert level["fdg"]["deep"] > 1.3 * level["fdg"]["wm"] > 1.3 * level["fdg"]["csf"]
    assert level["fdg"]["gm"] > 1.3 * level["fdg"]["wm"]
    assert level["av45"]["wm"] > 1.5 * level["av45"]["gm"] > 1.2 * level["av45"]["csf"]


def test_uptake_and_blur_of_pet():
    """Single voxels show the uptake itself. In a brain, the tracer is blurred by 8 mm and cut off at its edge."""
    for contrast, values in {"fdg": {"gm": 1.0, "deep": 1.05, "wm": 0.35, "csf": 0.05},
                             "av45": {"gm": 0.45, "deep": 0.55, "wm": 0.9, "csf": 0.1}}.items():
        for name, uptake in values.items():
            voxel = replace(one_voxel({name: 1.0}), traits={"uptake": {contrast: 1.2}})
            assert neuro_true(voxel, contrast, {"dose": 300}).item() == pytest.approx(0.1 * 300 * 1.2 * uptake, rel=1e-5)
    anatomy, _ = neuro_subject(0, 0, head_grid(64, 16))
    sharp = sum(neuro.UPTAKE["fdg"].get(name, 0) * fraction for name, fraction in anatomy.maps.items()) * anatomy.variation[1]
    sigma = 8 / 2.35482
    blurred = gaussian_filter(sharp.astype(np.float64), (sigma / 3, sigma / 3, sigma / (75 / 16)), truncate=4) * anatomy.mask
    expected = 0.1 * 300 * anatomy.traits["uptake"]["fdg"] * blurred
    np.testing.assert_allclose(neuro_true(anatomy, "fdg", {"dose": 300}), expected, rtol=1e-3, atol=1e-3)


def test_uptake_differs_between_subjects(crowd):
    drawn = [anatomy.traits["uptake"] for anatomy, _ in crowd]
    for contrast in ("fdg", "av45"):
        assert np.std([np.log(of[contrast]) for of in drawn]) == pytest.approx(0.15, abs=0.05)
    assert abs(np.corrcoef([[of["fdg"], of["av45"]] for of in drawn], rowvar=False)[0, 1]) < 0.4


def test_tissues(brain):
    masks = neuro_tissues(brain[0])
    assert list(masks) == ["csf", "gm", "wm"]
    for name, mask in masks.items():
        assert mask.dtype == bool and mask.shape == (64, 64, 16) and mask.sum() > 300
        np.testing.assert_array_equal(mask, brain[0].maps[name] > 0.9)


# ---- What a scanner adds ---------------------------------------------------------------------------------------------

def fitted(stored, true):
    """(the scale by which `true` fits best, what then remains of `stored` relative to the mean of the true image)."""
    scale = (stored * true).sum() / (true ** 2).sum()
    return scale, (stored / scale - true) / true.mean()


def test_stored_image_is_the_true_image_with_noise(tree):
    """Through neuro_truth and the file; the coil's shading is known, and taken out."""
    folder, names, _ = tree
    seen = set()
    for name in names[:4]:
        anatomy, records = neuro_truth(folder, name)
        coil = smooth_field(rng_for(0, int(name[4:]) - 1, "coil"), 90, anatomy.grid.axes())[anatomy.mask]
        for contrast, record in records.items():
            stored = np.asarray(load(folder, name, contrast).dataobj).astype(np.float64)
            assert np.all(stored[~anatomy.mask] == 0)
            stored, true = stored[anatomy.mask], neuro_true(anatomy, contrast, record)[anatomy.mask].astype(np.float64)
            seen.add(contrast)
            if contrast == "ct":
                assert (stored - true).std() == pytest.approx(2, rel=0.05) and abs((stored - true).mean()) < 0.05
            elif contrast in MR:
                assert stored.min() >= 1
                _, rest = fitted(stored, true * np.exp(0.02 * coil))
                bright = true > 0.2 * true.mean()  # where there is no signal, Rician noise is smaller, and not of mean 0
                assert rest[bright].std() == pytest.approx(0.015, rel=0.05), (name, contrast)
                slope = np.polyfit(coil[bright], np.log(np.maximum(stored, 1)[bright] / true[bright]), 1)[0]
                assert slope == pytest.approx(0.02, abs=0.004)
            else:
                assert np.corrcoef(stored, true)[0, 1] > 0.97
                assert stored.mean() == pytest.approx(true.mean(), rel=0.01)
                # The variance is in proportion to the uptake, which is true / (0.1 dose).
                noise = (stored - true) / np.sqrt(0.1 * record["dose"] * true)
                assert noise.std() == pytest.approx(0.03 * np.sqrt(250 / record["dose"]), rel=0.06)
    assert seen == set(FILES)


def test_four_times_the_dose_halves_the_noise(brain):
    anatomy, records = brain
    for contrast in ("fdg", "av45"):
        rest = []
        for dose in (100, 400):
            record = {**records[contrast], "dose": dose}
            image = neuro_images(0, 0, anatomy, {contrast: record})[contrast]
            true = neuro_true(anatomy, contrast, record)
            rest.append(((image - true) / true.mean())[anatomy.mask].std())
        assert rest[0] / rest[1] == pytest.approx(2, rel=0.01)
        np.testing.assert_allclose(neuro_true(anatomy, contrast, {"dose": 400}), 4 * neuro_true(anatomy, contrast, {"dose": 100}), rtol=1e-5)


def test_noise_is_new_in_every_scan(brain):
    anatomy, records = brain
    images = neuro_images(0, 0, anatomy, {"t1": records["t1"], "t2": records["t1"], "fdg": records["fdg"], "av45": records["fdg"]})
    rest = {}
    for contrast, image in images.items():
        true = neuro_true(anatomy, "t1" if contrast in MR else contrast, records["t1" if contrast in MR else "fdg"])[anatomy.mask]
        rest[contrast] = fitted(image[anatomy.mask].astype(float), true)[1]
    rest["other t1"] = fitted(neuro_images(0, 1, anatomy, {"t1": records["t1"]})["t1"][anatomy.mask].astype(float),
                              neuro_true(anatomy, "t1", records["t1"])[anatomy.mask])[1]
    assert abs(np.corrcoef(rest["fdg"], rest["av45"])[0, 1]) < 0.1
    assert abs(np.corrcoef(rest["t1"], rest["other t1"])[0, 1]) < 0.6  # the shading of the coils may correlate by chance


def test_scanners_have_arbitrary_scales(tree):
    folder, names, truth = tree
    means = []
    for name in names:
        for contrast in MR:
            if contrast in truth[name]["records"]:
                image = np.asarray(load(folder, name, contrast).dataobj)
                means.append(image[image > 0].mean())
    assert max(means) / min(means) > 3 and min(means) > 150 and max(means) < 1600


def test_all_contrasts_share_one_grid_and_no_side_is_swapped(tree):
    """Turned to RAS+, each voxel lies where its anatomy was made; a mirror image does not fit."""
    folder, names, truth = tree
    grid = head_grid(64, 16)
    for k in (0, 3):
        anatomy, records = neuro_subject(0, k, grid)
        x = grid.axes()[0]
        assert x[0] > 0 > x[-1]  # the first voxel is on the patient's right
        for contrast, record in records.items():
            turned = nib.as_closest_canonical(load(folder, names[k], contrast))
            np.testing.assert_allclose(turned.affine[:3, 3], [x[-1], grid.axes()[1][-1], grid.axes()[2][0]])
            stored = np.asarray(turned.dataobj).astype(float)
            true = neuro_true(anatomy, contrast, record)[::-1, ::-1]
            right = np.corrcoef(stored.ravel(), true.ravel())[0, 1]
            assert right > 0.98
            for mirrored in (true[::-1], true[:, ::-1], true[:, :, ::-1]):
                assert np.corrcoef(stored.ravel(), mirrored.ravel())[0, 1] < right - 0.02


# ---- The way back ----------------------------------------------------------------------------------------------------

def test_truth_of_a_folder(tree, tmp_path):
    folder, names, truth = tree
    for name in (names[0], names[6]):
        anatomy, records = neuro_truth(str(folder), name)
        expected, drawn = neuro_subject(0, int(name[4:]) - 1, head_grid(64, 16))
        assert records == drawn == truth[name]["records"] and {**anatomy.traits, "records": records} == truth[name]
        for tissue in ("gm", "wm", "csf"):
            np.testing.assert_array_equal(anatomy.maps[tissue], expected.maps[tissue])
        assert all(field in records["t1"] for field in ("TR", "TE", "FA", "field", "vendor", "model", "age", "sex"))
    make("neuro", tmp_path / "small", subjects=1, size=32, slices=5, seed=6)
    anatomy, _ = neuro_truth(tmp_path / "small", "sub-01")
    assert anatomy.grid == head_grid(32, 5)
    np.testing.assert_array_equal(anatomy.mask, np.asarray(load(tmp_path / "small", "sub-01", "t1").dataobj) > 0)


def test_truth_of_other_folders_is_refused(tree, tmp_path):
    with pytest.raises(DataError, match="sub-10"):
        neuro_truth(tree[0], "sub-10")
    with pytest.raises(DataError, match="no phantom"):
        neuro_truth(tmp_path, "sub-01")
    make("brats", tmp_path / "brats", subjects=1, size=16, slices=1)
    with pytest.raises(DataError, match="not of the phantom neuro"):
        neuro_truth(tmp_path / "brats", "BraTS2021_00000")
    for text in ("[1]", "{", "{}"):
        (tmp_path / "phantom.json").write_text(text)
        with pytest.raises(DataError) as caught:
            neuro_truth(tmp_path, "sub-01")
        assert "\n" not in str(caught.value)
    note = json.loads((tree[0] / "phantom.json").read_text(encoding="utf-8"))
    note["truth"]["sub-02"]["records"]["t1"]["TE"] += 1
    (tmp_path / "phantom.json").write_text(json.dumps(note))
    neuro_truth(tmp_path, "sub-01")
    with pytest.raises(DataError, match="another version"):
        neuro_truth(tmp_path, "sub-02")
