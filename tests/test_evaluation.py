"""common/evaluation.py: a trained model from Python, the tasks of an evaluation, and the numbers of every subject."""
import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import evaluation, metrics, table_pages
from common.files import RunError
from common.tasks import all_directions, chosen_direction, missing_patterns
from common.trained import Trained
from data import Subject
from scans import head, save

CONTRASTS = ("flair", "t1", "t2")
SIZE = 4


class FakeModel:
    """Fills every missing contrast with the mean of the known ones, plus a hundredth of the slice number."""

    contrasts = list(CONTRASTS)
    run = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self):
        self.calls = []                 # (u, known, keys) of each call

    def fill(self, u, known, keys, watch=None):
        self.calls.append((u, known, list(keys)))
        mask = known[:, :, None, None]
        mean = u.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        number = torch.tensor([float(z) for _, z in keys])[:, None, None, None]
        made = (mean + 0.01 * number).expand_as(u)
        return torch.where(mask, u, made), {"prior": mean.expand_as(u)}


@pytest.fixture
def trained():
    return Trained(FakeModel(), SimpleNamespace(size=SIZE, sample_batch=2))


def slices(B=3, seed=0):
    """(B, C, H, W) in [0,1] with t2 missing: NaN stands there."""
    images = np.random.default_rng(seed).uniform(0, 0.9, (B, 3, SIZE, SIZE)).astype(np.float32)
    images[:, 2] = np.nan
    return images


def expected(images):
    """What FakeModel makes of t2 with the default keys."""
    number = np.arange(len(images))[:, None, None]
    return images[:, :2].mean(1) + 0.01 * number


# ---- Trained -------------------------------------------------------------------------------------


def test_numpy_in_gives_numpy_out_and_the_known_contrasts_as_they_were(trained):
    images = slices()
    filled = trained.fill(images, ("flair", "t1"))
    assert isinstance(filled, np.ndarray) and filled.dtype == np.float32 and np.isfinite(filled).all()
    assert np.array_equal(filled[:, :2], images[:, :2])
    assert filled[:, 2] == pytest.approx(expected(images), abs=1e-6)
    assert np.isnan(images[:, 2]).all()                         # what was given is not changed
    assert (trained.contrasts, trained.size) == (CONTRASTS, SIZE)


def test_torch_in_gives_torch_out_without_a_graph(trained):
    images = torch.from_numpy(slices()).requires_grad_()
    filled = trained.fill(images, ("flair", "t1"))
    assert torch.is_tensor(filled) and filled.device == images.device and not filled.requires_grad
    assert filled[:, 2].numpy() == pytest.approx(expected(slices()), abs=1e-6)


def test_float64_becomes_float32(trained):
    for images in (slices().astype(np.float64), torch.from_numpy(slices()).double()):
        filled = trained.fill(images, ("flair", "t1"))
        assert filled.dtype in (np.float32, torch.float32)
        assert np.asarray(filled[:, 2]) == pytest.approx(expected(slices()), abs=1e-6)


@pytest.mark.parametrize("known", [
    np.array([True, True, False]), torch.tensor([True, True, False]), [True, True, False],
    np.tile([True, True, False], (3, 1)), torch.tensor([[True, True, False]] * 3), ("flair", "t1"), ["t1", "flair"],
    np.array(["flair", "t1"]),
])
def test_known_may_be_given_in_every_form(trained, known):
    assert np.array_equal(trained.fill(slices(), known), trained.fill(slices(), ("flair", "t1")))


def test_one_name_and_other_patterns_for_each_slice(trained):
    images = np.nan_to_num(slices(), nan=0.5)
    assert trained.fill(images, "t1")[0, 0] == pytest.approx(images[0, 1])
    known = np.array([[True, False, False], [False, True, True], [True, True, False]])
    filled = trained.fill(images, known)
    assert filled[0, 2] == pytest.approx(images[0, 0]) and np.array_equal(filled[1, 1:], images[1, 1:])
    assert filled[1, 0] == pytest.approx(images[1, 1:].mean(0) + 0.01, abs=1e-6)


def test_slices_go_to_the_model_in_batches_with_zeros_where_nothing_is_known(trained):
    trained.fill(slices(5), ("flair", "t1"))
    assert [len(u) for u, _, _ in trained.model.calls] == [2, 2, 1]
    for u, known, _ in trained.model.calls:
        assert not u[:, 2].any() and known.dtype == torch.bool and known.tolist() == [[True, True, False]] * len(u)
    keys = [key for _, _, some in trained.model.calls for key in some]
    assert len(set(keys)) == 5 and [z for _, z in keys] == [0, 1, 2, 3, 4]        # each slice has noise of its own


def test_a_slice_with_the_same_key_comes_out_the_same_in_another_batch(trained):
    keys = [("s1", 7), ("s1", 8), ("s2", 3)]
    whole = trained.fill(slices(), ("flair", "t1"), keys)
    assert np.array_equal(trained.fill(slices()[2:], ("flair", "t1"), keys[2:])[0], whole[2])
    assert [some for _, _, some in trained.model.calls[:2]] == [keys[:2], keys[2:]]


def test_extras_come_beside_the_result_and_in_its_kind(trained):
    images = slices()
    filled, extras = trained.fill(images, ("flair", "t1"), extras=True)
    assert list(extras) == ["prior"] and isinstance(extras["prior"], np.ndarray) and extras["prior"].shape == images.shape
    assert extras["prior"][:, 0] == pytest.approx(images[:, :2].mean(1), abs=1e-6)
    assert np.array_equal(filled, trained.fill(images, ("flair", "t1")))
    assert torch.is_tensor(trained.fill(torch.from_numpy(images), ("flair", "t1"), extras=True)[1]["prior"])


def test_rounding_outside_of_the_range_is_allowed(trained):
    images = slices()
    images[0, 0, 0, 0] = 1.0005
    images[0, 1, 0, 0] = -0.0005
    assert np.isfinite(trained.fill(images, ("flair", "t1"))).all()


def changed(where, value):
    images = slices()
    images[where] = value
    return images


@pytest.mark.parametrize("images, known, keys, message", [
    (np.zeros((3, SIZE, SIZE)), ("t1",), None, r"images are \(3, 4, 4\); this model needs \(B, 3, 4, 4\)"),
    (np.zeros((2, 3, 8, 8)), ("t1",), None, r"images are \(2, 3, 8, 8\).*flair, t1, t2.*brings files to this size"),
    (np.zeros((2, 2, SIZE, SIZE)), ("t1",), None, r"images are \(2, 2, 4, 4\)"),
    (np.zeros((0, 3, SIZE, SIZE)), ("t1",), None, r"images are \(0, 3, 4, 4\)"),
    (slices() * 255, ("flair", "t1"), None, "the known contrast flair has values from .* outside .0,1.; divide a 0 to 255"),
    (changed((0, 1), -0.5), ("flair", "t1"), None, "the known contrast t1 has values from -0.5 to"),
    (changed((1, 0, 2, 2), np.nan), ("flair", "t1"), None, "the known contrast flair has values that are not finite"),
    (changed((1, 1, 2, 2), np.inf), ("flair", "t1"), None, "the known contrast t1 has values that are not finite"),
    (slices(), ("flair", None), None, "known holds 'none'; choose among flair, t1, t2"),
    (slices(), ("flair", "pd"), None, "known holds 'pd'; choose among flair, t1, t2"),
    (slices(), CONTRASTS, None, "slice 0 has all contrasts known"),
    (slices(), np.array([[True, False, False], [False] * 3, [True, False, False]]), None, "slice 1 has no contrasts known"),
    (slices(), np.zeros(3, bool), None, "slice 0 has no contrasts known"),
    (slices(), np.array([1.0, 1.0, 0.0]), None, r"known is \(3,\) of torch.float64; give bool of shape"),
    (slices(), np.array([True, False]), None, r"known is \(2,\) of torch.bool; give bool of shape \(B, C\) = \(3, 3\)"),
    (slices(), ("flair", "t1"), [("s", 0)], "1 keys for 3 slices"),
    (slices(), ("flair", "t1"), [], "0 keys for 3 slices"),
])
def test_what_does_not_fit_is_refused_in_one_line_before_the_model_is_called(trained, images, known, keys, message):
    with pytest.raises(ValueError, match=f"^fill: .*{message}") as caught:
        trained.fill(images, known, keys)
    assert "\n" not in str(caught.value) and trained.model.calls == []


# ---- tasks ---------------------------------------------------------------------------------------


def test_each_contrast_may_be_missing_or_every_subset_or_those_that_are_named():
    assert missing_patterns(("each",), ["a", "b"]) == [(("b",), ("a",)), (("a",), ("b",))]
    assert missing_patterns(("all",), ["a", "b", "c"]) == [
        (("b", "c"), ("a",)), (("a", "c"), ("b",)), (("a", "b"), ("c",)),
        (("c",), ("a", "b")), (("b",), ("a", "c")), (("a",), ("b", "c"))]
    assert missing_patterns(("c", "a"), ["a", "b", "c"]) == [(("b",), ("a", "c"))]        # in the order of the channels


@pytest.mark.parametrize("missing, contrasts", [
    (("d",), "abc"), (("a", "d"), "abc"), (("a", "b", "c"), "abc"), ((), "abc"), (("each",), "a")])
def test_tasks_that_leave_nothing_to_do_are_refused(missing, contrasts):
    with pytest.raises(RunError, match="name some, but not all, of a, b, c|the data give one contrast, a") as caught:
        missing_patterns(missing, list(contrasts))
    assert caught.value.status == 2


def test_directions_are_pairs_of_different_contrasts():
    contrasts = ["t1", "t2", "pd"]
    assert all_directions(("t1", "t2"), ("t2", "pd"), contrasts) == [(0, 1), (0, 2), (1, 2)]
    assert all_directions(("T1w",), ("t1", "PD"), contrasts) == [(0, 2)]                  # other words for a contrast
    pairs = [(0, 1), (1, 2)]
    assert chosen_direction(pairs, (), contrasts) == pairs
    assert chosen_direction(pairs, ("T2", "pd"), contrasts) == [(1, 2)]
    with pytest.raises(RunError, match="--only pd,t2: this model knows t1,t2, t2,pd") as caught:
        chosen_direction(pairs, ("pd", "t2"), contrasts)
    assert caught.value.status == 2


# ---- the numbers of every subject ----------------------------------------------------------------


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_a_line_of_the_csv_is_one_subject_task_and_method():
    rows = [metrics.row("a->b", "M", "psnr", {"s1": 20.5, "s2": np.inf}), metrics.row("a->b", "M", "ssim", {"s1": 0.5, "s2": 1}),
            metrics.row("a->b", "M", "dice", {"s2": 0.75}), metrics.row("a->b", "M", "dice 1", {"s2": 0.25}),
            metrics.row("b->a", "copy", "psnr", {"s1": 15.0})]
    assert read(table_pages.scores_csv(rows)) == [
        {"subject": "s1", "task": "a->b", "method": "M", "psnr": "20.5", "ssim": "0.5", "dice": ""},
        {"subject": "s2", "task": "a->b", "method": "M", "psnr": "", "ssim": "1.0", "dice": "0.75"},
        {"subject": "s1", "task": "b->a", "method": "copy", "psnr": "15.0", "ssim": "", "dice": ""}]
    rows = [metrics.row("x->text", "M", name, {"all reports": 0.25}, unit="set") for name in ("bleu1", "bleu2", "bleu3", "bleu4", "fd", "map")]
    rows += [metrics.row("x->text", "M", name, {"s1": 0.5}) for name in ("rouge", "niqe", "msssim")]
    assert read(table_pages.scores_csv(rows)) == [
        {"subject": "all reports", "task": "x->text", "method": "M", "rouge": "", "bleu1": "0.25", "bleu2": "0.25", "bleu3": "0.25",
         "bleu4": "0.25", "fd": "0.25", "niqe": "", "msssim": "", "map": "0.25"},
        {"subject": "s1", "task": "x->text", "method": "M", "rouge": "0.5", "bleu1": "", "bleu2": "", "bleu3": "",
         "bleu4": "", "fd": "", "niqe": "0.5", "msssim": "0.5", "map": ""}]


def test_a_report_leaves_the_same_numbers_in_json_and_csv(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (4, 2, 16, 16)).astype(np.float32)
    made = np.clip(images[:, 1] + 0.1, 0, 1)
    task = evaluation.Task({"t1": images[:, 0]}, "t2", images[:, 1], {"M": made}, np.array(["s1", "s1", "s2", "s2"]))
    said = []

    def keep(rows, images, protocol):
        (tmp_path / "results.json").write_text(json.dumps({"rows": rows, "protocol": protocol}))
    run = SimpleNamespace(out=tmp_path, say=said.append, results=keep)
    (tmp_path / "scores.csv").write_text("of an earlier evaluation")
    simple = [metrics.baselines({"t1": images[:, 0], "t2": images[:, 1]}, task.sources, task.target)]
    evaluation.report(run, [task], simple, "words")
    lines = {(line["subject"], line["method"]): line for line in read((tmp_path / "scores.csv").read_text(encoding="utf-8"))}
    assert len(lines) == 2 * 4                          # two subjects; the method and three baselines
    for row in json.loads((tmp_path / "results.json").read_text())["rows"]:
        for subject, value in row["values"].items():
            line = lines[subject, row["method"]]
            assert line["task"] == "t1->t2" and float(line[row["metric"]]) == value
    by_hand = metrics.psnr(images[:2, 1], made[:2], 1).mean()
    assert float(lines["s1", "M"]["psnr"]) == pytest.approx(by_hand)
    assert (tmp_path / "samples.png").exists() and any("scores.csv" in line for line in said)


class FakeData:
    """Three test subjects of two slices and two training subjects, with what evaluate asks of a data.Dataset."""

    contrasts = list(CONTRASTS)
    subject = np.repeat(["s1", "s2", "s3", "a", "b"], 2)
    split = {"train": ["a", "b"], "val": [], "test": ["s1", "s2", "s3"]}
    images = np.random.default_rng(0).uniform(0, 0.9, (10, 3, 16, 16)).astype(np.float32)
    labels = None

    def spread(self, part, per_subject):
        return np.arange(6)[::2 if per_subject == 1 else 1]

    def rows(self, part, most=None):
        return np.arange(6, 10)

    def keys(self, rows):
        return [(str(self.subject[r]), int(r) % 2) for r in rows]

    present = np.ones((10, 3), bool)

    def having(self, rows, contrasts):
        return rows


def test_evaluate_scores_every_test_subject_for_every_pattern_by_what_fill_gives(tmp_path, monkeypatch):
    kept = {}

    def keep(rows, images, protocol):
        kept.update(rows=rows, images=images, protocol=protocol)
    run = SimpleNamespace(
        out=tmp_path, rank=0, world=1, device=torch.device("cpu"), say=lambda text: None, results=keep, gather=lambda done: done,
        batches=lambda name, todo, size: [todo[i:i + size] for i in range(0, len(todo), size)],
        fetch=lambda images, rows: torch.from_numpy(images[rows]))
    patterns = [(("t1", "t2"), ("flair",)), (("flair",), ("t1", "t2"))]

    def disturb(cfg, run, u, keys):
        return u * 0.5
    method = SimpleNamespace(name="M", patterns=lambda cfg, contrasts: patterns, segmenters=None, disturb=disturb, beside=None, judge=None, overall=None,
                             regions=())
    monkeypatch.setattr(evaluation, "draw_steps", lambda *what: None)       # FakeModel takes no steps
    ds = FakeData()
    evaluation.evaluate(method, SimpleNamespace(test_slices=2, sample_batch=4), run, ds, FakeModel())
    found = {(row["task"], row["method"], row["metric"]): row["values"] for row in kept["rows"]}
    assert list(dict.fromkeys(task for task, _, _ in found)) == ["t1+t2->flair", "flair->t1", "flair->t2"]
    assert {name for _, name, _ in found} == {"M", "prior", "copy-source", "mean-of-train", "intensity-lookup"}
    number = 0.01 * (np.arange(6) % 2)[:, None, None]
    made = 0.5 * ds.images[:6, 1:].mean(1) + number                         # the disturbed sources
    by_hand = metrics.psnr(ds.images[:6, 0], made, 1).reshape(3, 2).mean(1)
    assert list(found["t1+t2->flair", "M", "psnr"].values()) == pytest.approx(by_hand.tolist(), rel=1e-5)
    copied = metrics.psnr(ds.images[:6, 2], 0.5 * ds.images[:6, 0], 1).reshape(3, 2).mean(1)
    assert list(found["flair->t2", "copy-source", "psnr"].values()) == pytest.approx(copied.tolist(), rel=1e-5)
    assert np.array_equal(kept["images"]["flair->t1|truth"], ds.images[3, 1].astype(np.float16))
    assert "slices per subject: 2" in kept["protocol"] and (tmp_path / "scores.csv").exists()


class Whole(FakeModel):
    """Needs the neighbours of a slice: its images depend on all slices that it is given."""
    volumes = True

    def fill(self, u, known, keys, watch=None):
        made, extras = super().fill(u, known, keys)
        return torch.where(known[:, :, None, None], u, made * 0 + 0.1 * len(u)), extras


class Choosing(FakeModel):
    """Is told what to make."""
    selective = True

    def fill(self, u, known, keys, watch=None, wanted=None):
        self.calls += zip(known.tolist(), wanted.tolist(), keys)
        return torch.where(known[:, :, None, None], u, 0.5), {}


def evaluated(tmp_path, monkeypatch, model, patterns, test_slices):
    """{task: images} of an evaluation of FakeData."""
    kept = {}

    def keep(rows, images, protocol):
        kept.update(rows=rows)
    made = {}
    score_table = metrics.score_table

    def score(task, methods, truth, subjects, *rest, **more):
        made[task] = np.array(methods["M"])
        return score_table(task, methods, truth, subjects, *rest, **more)
    monkeypatch.setattr(metrics, "score_table", score)
    run = SimpleNamespace(
        out=tmp_path, rank=0, world=1, device=torch.device("cpu"), say=lambda text: None, results=keep, gather=lambda done: done,
        batches=lambda name, todo, size: [todo[i:i + size] for i in range(0, len(todo), size)],
        fetch=lambda images, rows: torch.from_numpy(images[rows]))
    method = SimpleNamespace(name="M", patterns=lambda cfg, contrasts: patterns, segmenters=None, disturb=None, beside=None, judge=None, overall=None,
                             regions=())
    monkeypatch.setattr(evaluation, "draw_steps", lambda *what: None)
    evaluation.evaluate(method, SimpleNamespace(test_slices=test_slices, sample_batch=4), run, FakeData(), model)
    return made


def test_a_model_of_volumes_gets_all_slices_of_a_subject_although_few_are_scored(tmp_path, monkeypatch):
    model = Whole()
    made = evaluated(tmp_path, monkeypatch, model, [(("t1", "t2"), ("flair",))], 1)
    assert [len(u) for u, _, _ in model.calls] == [2, 2, 2] and [keys for _, _, keys in model.calls][0][1][1] == 1
    assert made["t1+t2->flair"].shape[0] == 3 and np.allclose(made["t1+t2->flair"], 0.2)


def test_a_selective_model_makes_each_task_by_itself(tmp_path, monkeypatch):
    """What is made together influences each other, so a score must not depend on what else is scored."""
    model = Choosing()
    evaluated(tmp_path, monkeypatch, model, [(("t1",), ("flair",)), (("t1",), ("t2",))], 2)
    keys = FakeData().keys(range(6))
    assert sorted(model.calls) == sorted(([False, True, False], wanted, key) for wanted in ([True, False, False], [False, False, True])
                                         for key in keys)


# ---- synthesis -------------------------------------------------------------------------------------------------------


class Author:
    """Makes CT and X-ray of one grey value, and reports that tell of what they are made."""

    contrasts = ["text", "xray", "ct"]

    def __init__(self):
        self.filled = []                # (known, keys) of each call

    def fill(self, u, known, keys, watch=None):
        self.filled.append((known[0].tolist(), keys))
        return torch.where(known[:, :, None, None], u, 0.6), {}

    def generate(self, given, make, keys):
        (subject, z), = keys
        level = {c: round(float(images.max()), 2) for c, images in given.items()}
        assert make == ["text"] and all(images.shape == (1, 1, 20, 20) for images in given.values())
        return {"text": [f"{subject} slice {z} of {level} – clear ."]}


def synthesised(tmp_path, subjects, asked=(), directions=None):
    """Call synthesize -> (model, lines said, {name of a file: path})."""
    model = Author()
    lines = []
    run = SimpleNamespace(
        out=tmp_path, rank=0, world=1, device=torch.device("cpu"), say=lines.append, about={},
        batches=lambda name, todo, size: [todo[i:i + size] for i in range(0, len(todo), size)],
        fetch=lambda images, rows: torch.from_numpy(np.ascontiguousarray(images[rows])))
    cfg = SimpleNamespace(size=20, sample_batch=4)
    method = SimpleNamespace(name="M", choice="--only source,target" if directions else "", patterns=lambda cfg, contrasts: directions)
    evaluation.synthesize(method, cfg, run, model, subjects, asked)
    return model, lines, {path.name: path for path in (tmp_path / "synthetic").rglob("*") if path.is_file()}


def grey(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((20, 20), level, np.uint8)
    pixels[0, 0] = 0                    # constant pictures are refused
    Image.fromarray(pixels).save(path)
    return path


def test_images_of_a_subject_with_a_report_only(tmp_path, monkeypatch):
    drawn = []
    grid = evaluation.pictures.grid
    monkeypatch.setattr(evaluation.pictures, "grid", lambda *args: drawn.append(args[1:]) or grid(*args))
    subject = Subject("a", "a", {"text": tmp_path / "reports.csv"}, report="clear")
    model, lines, files = synthesised(tmp_path, [subject])
    assert model.filled == [([True, False, False], [("a", 0)])]
    assert set(files) == {"a_xray_synthetic.png", "a_ct_synthetic.png", "panel.png"}
    with Image.open(files["a_ct_synthetic.png"]) as image:
        assert image.getextrema() == (153, 153)                             # 0.6 of 255
    assert lines[-1] == f"a: wrote xray, ct from text to {tmp_path / 'synthetic' / 'a'}"
    (rows, titles, labels), = drawn                                         # the report is no column, and its one slice one row
    assert len(rows) == 1 and titles == ["xray (synthetic)", "ct (synthetic)"] and labels == ["slice 0"]


def test_a_method_with_directions_writes_only_their_ends(tmp_path):
    """A contrast that the chosen direction does not make would be written as an empty image."""
    subjects = [Subject("a", "a", {"xray": grey(tmp_path / "a.png", 51)}), Subject("b", "b", {"text": tmp_path / "reports.csv"}, report="clear")]
    model, lines, files = synthesised(tmp_path, subjects, directions=[(("xray",), ("ct",))])
    assert set(files) == {"a_ct_synthetic.png", "panel.png"} and [keys for _, keys in model.filled] == [[("a", 0)]]
    assert "b: nothing can be made from text" in lines


def test_a_report_of_xrays(tmp_path):
    """Of two views the first one is read. No image is made if none is missing."""
    views = (grey(tmp_path / "0.png", 51), grey(tmp_path / "1.png", 102))
    ct = grey(tmp_path / "ct.png", 204)
    model, lines, files = synthesised(tmp_path, [Subject("b", "b", {"xray": views, "ct": ct})])
    assert model.filled == [] and set(files) == {"b_text_synthetic.txt", "panel.png"}
    text = files["b_text_synthetic.txt"].read_text(encoding="utf-8")
    assert text == "b slice 0 of {'xray': 0.2, 'ct': 0.8} – clear .\n"
    assert lines[-1].startswith("b: wrote text from xray, ct to ")


def test_a_report_of_a_volume_is_that_of_its_middle_slice(tmp_path):
    body = head()
    body[:, :, :2] = 0                                                      # two slices that show nothing
    subject = Subject("c", "c", {"ct": save(tmp_path / "ct.nii.gz", np.where(body > 0, body, -1000))})
    model, _, files = synthesised(tmp_path, [subject])
    shown = [z for z in range(9) if body[:, :, z].any()]
    assert shown == [2, 3, 4, 5, 6, 7, 8]
    assert [z for _, keys in model.filled for _, z in keys] == shown
    level = round((float(body[:, :, 5].max()) + 1000) / 2500, 2)
    assert files["c_text_synthetic.txt"].read_text(encoding="utf-8").startswith(f"c slice 5 of {{'ct': {level}}}")
    assert set(files) == {"c_text_synthetic.txt", "c_xray_synthetic.png", "panel.png"}
    with Image.open(files["c_xray_synthetic.png"]) as image:
        assert image.getextrema() == (153, 153)                             # 0.6 of 255; an empty slice would be black


def test_what_is_asked_for_is_made_although_it_is_there(tmp_path):
    subject = Subject("d", "d", {"text": tmp_path / "r", "xray": grey(tmp_path / "0.png", 51),
                                 "ct": save(tmp_path / "ct.nii.gz", 10 * head() - 1000)}, report="old")
    model, _, files = synthesised(tmp_path, [subject], ("text", "ct"))
    assert set(files) == {"d_text_synthetic.txt", "d_ct_synthetic.png", "panel.png"}
    assert files["d_text_synthetic.txt"].read_text(encoding="utf-8").startswith("d slice 0 of {'xray': 0.2}")
    files["d_ct_synthetic.png"].unlink()
    kept = files["d_text_synthetic.txt"].stat()
    _, lines, files = synthesised(tmp_path, [subject], ("text", "ct"))      # only what is not there is made
    assert "d_ct_synthetic.png" in files and files["d_text_synthetic.txt"].stat() == kept
    assert lines[-1].startswith("d: wrote ct from xray to ")
