"""What several modalities say of one patient: readers of findings, and numbers by hand for models whose answers are known."""
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_rounds import begin, dataset

from common import multimodal
from common.multimodal import Reader
from common.realism import diversity, ms_ssim, niqe, niqe_statistics

STREAMS = ("text", "xray", "ct")
LEFT = "a mass is in the left lung . there is a right pleural effusion . the heart is enlarged ."
RIGHT = "a mass is in the right lung . there is a left pleural effusion . the heart is normal ."
NONE = "the lungs are clear ."
CFG = SimpleNamespace(test_slices=2, sample_batch=3)


def planted(lesion, effusion, heart, seed=0):
    """(32, 32): noise, and bright where a finding is: lesions above, effusions below, a large heart in the middle."""
    image = 0.3 + 0.05 * np.random.default_rng(seed).standard_normal((32, 32))
    side = {"left": slice(20, 28), "right": slice(4, 12)}                   # as radiologists look at a patient
    if lesion:
        image[4:12, side[lesion]] += 0.4
    if effusion:
        image[24:30, side[effusion]] += 0.4
    if heart == "enlarged":
        image[12:22, 12:20] += 0.4
    return image.clip(0, 1)


def traits(i):
    """(lesion, effusion, heart) of subject i: all combinations in turn, some without a lesion or an effusion."""
    return ("left", "right", "")[i % 3], ("left", "", "right", "")[i // 3 % 4], ("normal", "enlarged")[i // 2 % 2]


def phantoms(folder, n=120, train=100, sheet=True, phantom=True, reports=None):
    """A Dataset of planted images with findings.csv.  Every fifth subject lacks the CT."""
    present = np.ones((n, 3), bool)
    present[::5, 2] = False
    images = np.zeros((n, 3, 32, 32), np.float16)
    rows = []
    for i in range(n):
        images[i, 1] = planted(*traits(i), seed=i)
        images[i, 2] = 0.9 - 0.5 * planted(*traits(i), seed=1000 + i) if present[i, 2] else 0      # dark where X-rays are bright
        rows.append({"id": f"s{i}", "lesion_side": traits(i)[0], "effusion": traits(i)[1], "heart": traits(i)[2], "split": "-"})
    folder.mkdir(exist_ok=True)
    if sheet:
        with open(folder / "findings.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    names = [f"s{i}" for i in range(n)]
    split = {"train": names[:train], "val": [], "test": names[train:]}
    return dataset(present, STREAMS, images, reports or [NONE] * n, split, folder, phantom)


def values_of(rows, **wanted):
    """{subject: value} of the only row with these entries."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]["values"]


# ---- Findings ------------------------------------------------------------------------------------


def test_findings_of_the_sheet(tmp_path):
    known = multimodal.findings_of(phantoms(tmp_path / "a"))
    assert len(known) == 120
    assert known["s0"] == {"lesion": "left", "effusion": "left", "heart": "normal"}
    assert known["s5"] == {"lesion": "", "effusion": "", "heart": "normal"}
    assert known["s7"] == {"lesion": "right", "effusion": "right", "heart": "enlarged"}
    assert multimodal.findings_of(phantoms(tmp_path / "b", sheet=False)) is None
    assert multimodal.findings_of(phantoms(tmp_path / "c", phantom=False)) is None


def test_findings_in_reports():
    assert multimodal.findings_in(LEFT) == {"lesion": "left", "effusion": "right", "heart": "enlarged"}
    assert multimodal.findings_in(RIGHT) == {"lesion": "right", "effusion": "left", "heart": "normal"}
    assert multimodal.findings_in(NONE) == {"lesion": "", "effusion": "", "heart": ""}
    assert multimodal.findings_in("a mass on the left or right .")["lesion"] == "unknown"


def test_features_are_coarse_pixels_without_their_mean():
    image = np.zeros((2, 32, 64))
    image[1, 2:4, 8:12] = 1                                                 # block (1, 2) of 2 x 4 pixels
    image[1, 30, 60] = 8                                                    # an eighth of block (15, 15)
    x = Reader.features(image)
    assert x.shape == (2, 257) and not x[0, :256].any() and (x[:, 256] == 1).all()
    expected = np.full((16, 16), -2 / 256)
    expected[1, 2] += 1
    expected[15, 15] += 1
    assert x[1, :256] == pytest.approx(expected.ravel())
    brighter = Reader.features(image + 0.25)
    assert brighter == pytest.approx(x)


def test_ridge_regression_by_hand():
    """Weights of x and y that minimise squared error plus strength times squared weights, as least squares with added rows."""
    g = np.random.default_rng(0)
    x, y = g.standard_normal((9, 4)), g.standard_normal(9)
    expected = np.linalg.lstsq(np.vstack([x, np.sqrt(0.7) * np.eye(4)]), np.concatenate([y, np.zeros(4)]), rcond=None)[0]
    assert multimodal.solve(x, y, 0.7) == pytest.approx(expected)


def test_reader_finds_a_planted_side():
    images = np.stack([planted(("left", "right")[i % 2], "", "normal", seed=i) for i in range(60)])
    left = np.arange(60) % 2 == 0
    reader = Reader(images[:40], left[:40])
    assert (reader(images[40:]) == left[40:]).all()
    assert (reader(images[40:, :, ::-1]) != left[40:]).all()                # the mirror image is the other side
    turned = Reader(images[:40], ~left[:40])
    assert (turned(images[40:]) != left[40:]).all()


def test_a_fifth_of_the_images_chooses_the_strength(monkeypatch):
    asked = []

    def solve(x, y, strength):
        asked.append((len(x), strength))
        sign = 1 if strength in (1.0, 3.0) else -1                          # only with these two all is right
        return sign * np.eye(257)[0]
    monkeypatch.setattr(multimodal, "solve", solve)
    images = np.zeros((10, 16, 16))
    images[::2, 0, 0] = 1
    reader = Reader(images, np.arange(10) % 2 == 0)
    assert asked == [(8, strength) for strength in multimodal.STRENGTHS] + [(10, 1.0)]     # of equals the weakest
    assert reader(images).tolist() == [True, False] * 5


def test_readers_learn_from_clear_training_images_of_a_stream(tmp_path):
    ds = phantoms(tmp_path)
    known = multimodal.findings_of(ds)
    for stream in ("xray", "ct"):
        readers = multimodal.readers_of(ds, stream, known)
        assert list(readers) == ["lesion", "effusion", "heart"]
        rows = ds.having(ds.rows("test"), [stream])
        images = ds.images[rows][:, STREAMS.index(stream)].astype(np.float32)
        for place, (finding, first) in enumerate((("lesion", "left"), ("effusion", "left"), ("heart", "enlarged"))):
            told = np.array([traits(r)[place] for r in rows])
            clear = told != ""
            assert (readers[finding](images[clear]) == (told[clear] == first)).mean() >= 0.9, (stream, finding)


def test_too_few_clear_images_give_no_reader(tmp_path):
    """Of 36 training subjects 24 have a lesion on one side and 18 an effusion."""
    ds = phantoms(tmp_path, train=36)
    assert list(multimodal.readers_of(ds, "xray", multimodal.findings_of(ds))) == ["lesion", "heart"]


# ---- Images that show findings -------------------------------------------------------------------


def answer(images):
    """A stand-in for a Reader: True for images whose first pixel is bright."""
    return images[:, 0, 0] > 0.5


def test_finding_rows_by_hand(tmp_path, monkeypatch):
    ds = phantoms(tmp_path)
    run = begin(tmp_path / "run")
    asked = []

    def readers_of(ds, stream, known):
        asked.append(stream)
        return {"lesion": answer, "heart": answer}
    monkeypatch.setattr(multimodal, "readers_of", readers_of)
    #    lesion                left   right  none  left  right
    subjects = np.array(["s0", "s1", "s2", "s0", "s4"])
    # heart                 normal normal enlarged normal normal
    made = np.array([1.0, 1, 0, 0, 0])[:, None, None] * np.ones((5, 16, 16))
    truth = np.array([1.0, 0, 1, 1, 0])[:, None, None] * np.ones((5, 16, 16))
    task = SimpleNamespace(name="text->ct", target="ct", truth=truth, results={"MedM2G": made}, subjects=subjects)
    rows = multimodal.finding_rows(run, ds, [task])
    assert asked == ["ct"] and {row["metric"] for row in rows} == {"lesion", "heart"} and len(rows) == 4
    # made: left s0 hit and miss, right s1 miss (seen as left), s4 hit
    assert values_of(rows, method="MedM2G", metric="lesion", task="text->ct") == {"s0": 0.5, "s1": 0, "s4": 1}
    assert values_of(rows, method="truth", metric="lesion") == {"s0": 1, "s1": 1, "s4": 1}
    assert values_of(rows, method="MedM2G", metric="heart") == {"s0": 0.5, "s1": 0, "s2": 0, "s4": 1}
    assert values_of(rows, method="truth", metric="heart") == {"s0": 0, "s1": 1, "s2": 1, "s4": 1}
    task.results, task.truth, task.subjects = {}, truth[2:3], subjects[2:3]         # s2 alone has no lesion to be asked about
    assert [row["metric"] for row in multimodal.finding_rows(run, ds, [task])] == ["heart"]
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "| text->ct | MedM2G | 0.50 (4) | - | 0.40 (5) |" in said and "| text->ct | truth | 1.00 (4) | - | 0.60 (5) |" in said


def test_finding_rows_of_planted_images(tmp_path):
    """True images are read right, mirrored ones wrong."""
    ds = phantoms(tmp_path)
    rows = ds.having(ds.rows("test"), ["xray"])
    truth = ds.images[rows][:, 1].astype(np.float32)
    task = SimpleNamespace(name="text->xray", target="xray", truth=truth, results={"mirror": truth[:, :, ::-1]},
                           subjects=ds.subject[rows])
    found = multimodal.finding_rows(begin(tmp_path / "run"), ds, [task])
    mean = {(row["method"], row["metric"]): row["mean"] for row in found}
    for finding in ("lesion", "effusion"):
        assert mean["truth", finding] >= 0.9 and mean["mirror", finding] <= 0.1
    assert mean["truth", "heart"] >= 0.9


def test_realism_rows_by_hand(tmp_path):
    """Images that are brighter by .1 everywhere differ in 64 means alone: the distance is 64 * .1 ** 2."""
    ds = phantoms(tmp_path)
    truth = ds.images[100:120, 1].astype(np.float32)
    tasks = [SimpleNamespace(name="text->xray", target="xray", sources={"text": None}, truth=truth, subjects=ds.subject[100:],
                             results={"same": truth, "bright": truth + 0.1, "one": truth[:1]}),
             SimpleNamespace(name="ct->xray", target="xray", sources={"ct": truth}, truth=truth, results={"same": truth}),
             SimpleNamespace(name="text->ct", target="ct", sources={"text": None}, truth=truth[:1], results={"same": truth[:1]})]
    rows = multimodal.realism_rows(begin(tmp_path / "run"), ds, tasks)
    assert [(row["task"], row["method"], row["metric"]) for row in rows] == [
        ("text->xray", name, "fd") for name in ("same", "bright", "real images")]
    found = {row["method"]: row["values"]["all images"] for row in rows}
    assert found["same"] == pytest.approx(0, abs=1e-4) and found["bright"] == pytest.approx(0.64, abs=1e-3)
    first = ds.images[:20, 1].astype(np.float64).reshape(20, 8, 4, 8, 4).mean((2, 4)).reshape(20, 64)
    own = truth.astype(np.float64).reshape(20, 8, 4, 8, 4).mean((2, 4)).reshape(20, 64)
    root = np.linalg.eigvals(np.cov(first.T) @ np.cov(own.T)).astype(complex) ** 0.5
    distance = ((first.mean(0) - own.mean(0)) ** 2).sum() + np.trace(np.cov(first.T)) + np.trace(np.cov(own.T)) - 2 * root.real.sum()
    assert found["real images"] == pytest.approx(distance, abs=1e-3)
    assert multimodal.realism_rows(None, ds, tasks[1:]) == []
    assert "no NIQE of xray: the images have fewer than 64 pixels" in (tmp_path / "run" / "log.txt").read_text()


def test_niqe_tells_a_texture_of_its_own(tmp_path):
    """The rows are means over images, of distances to training images alone; blurred images are farther away."""
    rng = np.random.default_rng(0)
    images = ndimage.gaussian_filter(rng.random((60, 1, 64, 64)), (0, 0, 1, 1)).astype(np.float32)
    images = (images - images.min()) / (images.max() - images.min())
    ds = SimpleNamespace(images=images, contrasts=["xray"], rows=lambda part: np.arange(40), having=lambda rows, streams: rows)
    truth = images[40:, 0]
    smooth = ndimage.gaussian_filter(truth, (0, 1, 1))
    task = SimpleNamespace(name="text->xray", target="xray", sources={"text": None}, truth=truth, results={"same": truth, "smooth": smooth})
    rows = multimodal.realism_rows(begin(tmp_path / "run"), ds, [task])
    found = {row["method"]: row["values"]["all images"] for row in rows if row["metric"] == "niqe"}
    statistics = niqe_statistics(images[:40, 0])
    assert found["same"] == found["real images"] == pytest.approx(niqe(truth, statistics).mean())
    assert found["smooth"] == pytest.approx(niqe(smooth, statistics).mean()) and found["smooth"] > 1.5 * found["same"]


class Painter:
    """Paints for each report noise on the grey of its number; the noise is of the key."""

    def __init__(self, strength):
        self.strength, self.calls = strength, []

    def generate(self, given, make, keys):
        self.calls.append((given["text"], list(keys)))
        noise = [np.random.default_rng([int(name[1:]), number, k]).random((16, 16)) for name, number, k in keys]
        return {make[0]: torch.from_numpy(0.2 + self.strength * np.stack(noise))[:, None]}


def test_four_images_of_each_report_are_compared(tmp_path):
    """Four reports have four images each, of keys of their own.  The mean MS-SSIM is over the six pairs of one report."""
    ds = phantoms(tmp_path, reports=[f"report {i} ." for i in range(120)])
    task = SimpleNamespace(name="text->xray", target="xray", sources={"text": None}, truth=ds.images[100:, 1].astype(np.float32), subjects=ds.subject[100:])
    for strength in (0.0, 0.7):
        model = Painter(strength)
        rows = multimodal.diversity_rows(CFG, begin(tmp_path / f"run{strength}"), ds, model, [task])
        given = [text for texts, _ in model.calls for text in texts]
        keys = [key for _, part in model.calls for key in part]
        assert len(set(keys)) == 16 and [key[2] for key in keys] == [0, 1, 2, 3] * 4
        assert given == [f"report {name[1:]} ." for name, _, _ in keys] and len(set(given)) == 4
        values = values_of(rows, task="text->xray", method="MedM2G")
        for name, value in values.items():
            images = [0.2 + strength * np.random.default_rng([int(name[1:]), key[1], key[2]]).random((16, 16)) for key in keys if key[0] == name]
            wanted = np.mean([ms_ssim(images[a], images[b]) for a in range(4) for b in range(a)])
            assert value == pytest.approx(wanted, abs=1e-4) and (wanted == 1 if strength == 0 else wanted < 0.5)
    real = values_of(rows, task="text->xray", method="real images")["all images"]
    assert real == pytest.approx(diversity(task.truth[:8].astype(np.float32)), rel=1e-5)
    other = SimpleNamespace(name="ct->xray", target="xray", sources={"ct": None}, truth=task.truth)
    assert multimodal.diversity_rows(CFG, None, ds, model, [other]) == []


# ---- Streams made together -----------------------------------------------------------------------


class Inventor:
    """Makes reports and images of patients 0, 1, 2, ...: the number is in the key."""

    def __init__(self, reports, xray, ct):
        self.made = {"text": reports, "xray": xray, "ct": ct}
        self.calls = []

    def generate(self, given, make, keys):
        self.calls.append((given, list(make), list(keys)))
        numbers = [number for _, number in keys]
        found = {}
        for stream in make:
            own = [self.made[stream][i] for i in numbers]
            found[stream] = own if stream == "text" else torch.tensor(own)[:, None, None, None].expand(-1, 1, 16, 16)
        return found


def invent(tmp_path, monkeypatch, model, together):
    monkeypatch.setattr(multimodal, "TOGETHER", together)
    monkeypatch.setattr(multimodal, "readers_of", lambda ds, stream, known: {"lesion": answer})
    return multimodal.joint_rows(CFG, begin(tmp_path / "run"), phantoms(tmp_path), model)


def test_joint_rows_by_hand(tmp_path, monkeypatch):
    """Five patients; the report of the third tells no lesion, and that of the fifth one on either side.  Three count."""
    model = Inventor([LEFT, RIGHT, NONE, LEFT, "a mass on the left or right ."], [1.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0])
    rows = invent(tmp_path, monkeypatch, model, 5)
    keys = [[("invented", 0), ("invented", 1), ("invented", 2)], [("invented", 3), ("invented", 4)]]
    assert model.calls == [({}, ["text", "xray", "ct"], part) for part in keys]
    assert {row["metric"] for row in rows} == {"same lesion"} and len(rows) == 6

    def share(pair, method):
        return values_of(rows, task=pair, method=method)["all patients"]
    # left?  text 1 0 1, X-ray 1 0 0, CT 1 1 0
    assert share("text+xray", "MedM2G") == pytest.approx(2 / 3) and share("text+ct", "MedM2G") == pytest.approx(1 / 3)
    assert share("xray+ct", "MedM2G") == pytest.approx(2 / 3)
    # strangers: text 1 0 1 against X-ray 0 1 0 and 0 0 1; against CT 0 1 1 and 1 0 1; X-ray 1 0 0 against these
    assert share("text+xray", "strangers") == pytest.approx((0 + 2 / 3) / 2)
    assert share("text+ct", "strangers") == pytest.approx((1 / 3 + 1) / 2)
    assert share("xray+ct", "strangers") == pytest.approx((0 + 2 / 3) / 2)
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "| text, xray | 0.67 (0.33; 3) | - | - |" in said
    assert (tmp_path / "run" / "invented.png").exists()


def test_patients_whose_streams_agree_are_told_from_strangers(tmp_path, monkeypatch):
    sides = np.arange(12) % 3 == 0
    model = Inventor([LEFT if side else RIGHT for side in sides], sides.astype(float).tolist(), (1.0 * ~sides).tolist())
    rows = invent(tmp_path, monkeypatch, model, 12)
    assert values_of(rows, task="text+xray", method="MedM2G") == {"all patients": 1}
    assert values_of(rows, task="text+ct", method="MedM2G") == {"all patients": 0}
    # of 132 pairs of two patients 4 * 3 are both left and 8 * 7 both right
    assert values_of(rows, task="text+xray", method="strangers")["all patients"] == pytest.approx(68 / 132)


# ---- Reports -------------------------------------------------------------------------------------


class Writer:
    """Writes for each image the report that belongs to its grey value; latents are numbers of reports."""
    names = [LEFT, RIGHT, NONE]

    def __init__(self):
        self.codecs = self
        self.calls = []

    def generate(self, given, make, keys):
        self.calls.append((given, list(make), list(keys)))
        x, = given.values()
        return {"text": [self.names[int(round(2 * value))] for value in x[:, 0, 0, 0].tolist()]}

    def encode(self, stream, texts):
        assert stream == "text"
        return torch.tensor([[float(self.names.index(text))] for text in texts])

    def decode(self, stream, z):
        assert stream == "text"
        return [self.names[int(value)] for value in z[:, 0]]


def written(folder, **changes):
    """Eight subjects; the last four are scored.  The CT of s5 is missing.  Grey values of the CT say what Writer writes."""
    reports = [NONE, RIGHT, RIGHT, LEFT, LEFT, NONE, RIGHT, LEFT]
    ds = phantoms(folder, n=8, train=4, reports=reports, **changes)
    ds.images[:, 2] = np.array([0, 0, 0, 0, 0.0, 0, 0.5, 1.0])[:, None, None]              # of s4 left, s6 right, s7 nothing
    return ds


def test_report_rows_by_hand(tmp_path):
    ds = written(tmp_path)
    model = Writer()
    rows = multimodal.report_rows(CFG, begin(tmp_path / "run"), ds, model, [("ct",)])
    (given, make, keys), = model.calls
    assert make == ["text"] and list(given) == ["ct"] and keys == [("s4", 4), ("s6", 6), ("s7", 7)]
    # truth: left, right, left; made: left, right, nothing
    rouge = values_of(rows, method="MedM2G", metric="rouge")
    assert rouge["s4"] == rouge["s6"] == 1 and rouge["s7"] < 0.5
    assert values_of(rows, method="text VAE alone", metric="rouge") == {"s4": 1, "s6": 1, "s7": 1}
    assert values_of(rows, method="text VAE alone", metric="bleu4")["all reports"] == pytest.approx(1)
    other = values_of(rows, method="of another patient", metric="rouge")
    assert other["s4"] == 1 and other["s6"] < 1 and other["s7"] < 1         # of s7, s4 and s6
    frequent = values_of(rows, method="most frequent report", metric="rouge")
    assert frequent["s6"] == 1 and frequent["s4"] < 1 and frequent["s7"] < 1    # right
    # the sheet tells the heart of s4, s6 and s7: normal, enlarged, enlarged; lesions: right, left, right
    assert values_of(rows, method="text VAE alone", metric="heart") == {"s4": 0, "s6": 0, "s7": 1}
    assert values_of(rows, method="text VAE alone", metric="lesion") == {"s4": 0, "s6": 0, "s7": 0}
    assert values_of(rows, method="most frequent report", metric="lesion") == {"s4": 1, "s6": 0, "s7": 1}
    assert values_of(rows, method="MedM2G", metric="heart") == {"s4": 0, "s6": 0, "s7": 0}
    assert {row["task"] for row in rows} == {"ct->text"} and len(rows) == 5 * (4 + 1 + 3)
    stored = json.loads((tmp_path / "run" / "reports_from_ct.json").read_text())
    assert stored == [{"subject": "s4", "truth": LEFT, "made": LEFT}, {"subject": "s6", "truth": RIGHT, "made": RIGHT},
                      {"subject": "s7", "truth": LEFT, "made": NONE}]


def test_of_equally_frequent_reports_the_first_is_taken(tmp_path):
    for first, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
        folder = tmp_path / ("left" if first == LEFT else "right")
        ds = written(folder)
        for subject, report in zip(ds.subjects, (first, other, first, other)):
            subject.report = report
        rows = multimodal.report_rows(CFG, begin(folder / "run"), ds, Writer(), [("ct",)])
        rouge = values_of(rows, method="most frequent report", metric="rouge")
        assert (rouge["s4"] == 1) == (first == LEFT) and (rouge["s6"] == 1) == (first == RIGHT)


def test_several_slices_of_a_subject_are_averaged(tmp_path):
    ds = written(tmp_path)
    ds.subject[6] = "s7"                                                    # s7 has two slices now: right and nothing are written
    ds.split["test"].remove("s6")
    rows = multimodal.report_rows(CFG, begin(tmp_path / "run"), ds, Writer(), [("ct",)])
    both = values_of(rows, method="MedM2G", metric="rouge")
    each = multimodal.rouge_l([LEFT, LEFT], [RIGHT, NONE])[1]
    assert both == pytest.approx({"s4": 1, "s7": np.mean(each)})
    assert values_of(rows, method="MedM2G", metric="lesion") == {"s4": 0, "s7": 0.5}        # the sheet says right


def test_latents_of_another_patient_are_not_those_of_the_next_slice(tmp_path):
    ds = written(tmp_path)
    ds.subject[[5, 6]] = "s7", "s4"                                         # two subjects with two slices each
    ds.split["test"] = ["s4", "s7"]
    ds.subjects[7].report = RIGHT
    rows = multimodal.report_rows(CFG, begin(tmp_path / "run"), ds, Writer(), [("ct",)])
    wrong = multimodal.rouge_l([LEFT, RIGHT], [RIGHT, LEFT])[1]
    assert values_of(rows, method="of another patient", metric="rouge") == pytest.approx(dict(zip(("s4", "s7"), wrong)))


def test_data_without_a_sheet_have_scores_of_text_alone(tmp_path):
    ds = written(tmp_path, sheet=False)
    run = begin(tmp_path / "run")
    rows = multimodal.report_rows(CFG, run, ds, Writer(), [("ct",)])
    assert {row["metric"] for row in rows} == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge"} and len(rows) == 5 * 5
    assert "lesion" not in (tmp_path / "run" / "log.txt").read_text()
    assert multimodal.finding_rows(run, ds, [None]) == [] == multimodal.joint_rows(CFG, run, ds, None)


def test_a_stream_with_fewer_than_two_reports_is_left_out(tmp_path):
    ds = written(tmp_path)
    assert multimodal.report_rows(CFG, begin(tmp_path / "run"), ds, Writer(), []) == []
    ds.split["test"] = ["s4", "s5"]
    model = Writer()
    assert multimodal.report_rows(CFG, begin(tmp_path / "other"), ds, model, [("ct",)]) == [] and model.calls == []


# ---- Pictures ------------------------------------------------------------------------------------


def test_the_picture_sets_what_is_made_beside_the_truth(tmp_path, monkeypatch):
    ds = written(tmp_path)
    drawn = []
    monkeypatch.setattr(multimodal.pictures, "grid", lambda *args, **more: drawn.append(args))

    class Painter:
        def generate(self, given, make, keys):
            assert given == {"text": [ds.reports([number])[0] for _, number in keys]} and make == ["xray", "ct"]
            return {"xray": torch.full((len(keys), 1, 32, 32), 0.25), "ct": torch.full((len(keys), 1, 32, 32), 0.75)}
    run = begin(tmp_path / "run")
    multimodal.draw_joint(CFG, run, ds, Painter(), count=2)
    (path, grid, columns, labels), = drawn
    assert path == run.out / "joint.png" and columns == ["xray, made", "ct, made", "xray, true", "ct, true"] and labels == [LEFT, RIGHT]
    for row, r in zip(grid, (4, 6)):                                        # s5 has no CT
        assert (row[0] == 0.25).all() and (row[1] == 0.75).all()
        assert np.array_equal(row[2], ds.images[r, 1]) and np.array_equal(row[3], ds.images[r, 2])
    ds.split["test"] = ["s5"]
    multimodal.draw_joint(CFG, run, ds, None)
    assert len(drawn) == 1 and "no test subject has all streams" in (tmp_path / "run" / "log.txt").read_text()
