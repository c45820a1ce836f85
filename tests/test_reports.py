"""Reports of radiologists: cleaning, R2Gen's packaging, tables, and data sets with a channel "text"."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import data
from data import check, clean_report
from data.files import DataError
from data.layouts import Subject, find_layout
from data.layouts.words import kind_of
from data.reports import prepare_reports
from data.split import use_split
from scans import head, make_set, make_slices, opened, save

# ---- Cleaning --------------------------------------------------------------------------------------------------------

# The first three were computed with R2Gen's own function.
@pytest.mark.parametrize(("text", "cleaned"), [
    ("The heart is normal in size. T11. The lungs are clear.. No effusion.",
     "the heart is normal in size . t1the lungs are clear . no effusion ."),
    ("1. Mild cardiomegaly. 2. No acute disease (XXXX).  Chest x-ray, AP/lateral!",
     "mild cardiomegaly . no acute disease xxxx . chest x-ray aplateral ."),
    ("Low lung volumes; 3.5 cm mass. ", "low lung volumes 35 cm mass ."),
    ("One 3. two. 4. three 5. four", "one . two . three . four ."),
    ("\"A's\\b\" [c] {d} <e> f=g @h %i ^j &k _l +m (n) o:p q?r *s", "asb c d e fg h i j k l m n op qr s ."),
    ("a - b #5", "a - b #5 ."),
], ids=["T11", "list", "decimal", "numbers", "marks", "kept"])
def test_cleaning(text, cleaned):
    assert clean_report(text) == cleaned
    assert clean_report(text, mimic=True) == cleaned


def test_cleaning_of_mimic():
    text = "FINDINGS: Compared to ____ ,\n lungs are\nclear.\nNo   effusion."
    assert clean_report(text, mimic=True) == "findings compared to lungs are clear . no effusion ."
    assert " . " not in clean_report(text)[:-2]             # ".\n" is no end of a sentence there


def with_reports(texts):
    return [Subject(str(i), str(i), {"text": "file", "xray": "file"}, report=text) for i, text in enumerate(texts)]


def test_what_is_no_report():  # row 50
    subjects = with_reports(["Clear.", "", None, " ___ \n_ ", "...", "x " * 5001, "na\ufffdve"])
    notes = []
    prepare_reports(subjects, notes)
    assert ["text" in subject.files for subject in subjects] == [True, False, False, False, False, True, True]
    assert [subject.report is None for subject in subjects] == [False, True, True, True, True, False, False]
    assert subjects[5].report.split() == ["x"] * 5000 and subjects[0].report == "Clear."
    assert [note[:8] for note in notes] == ["4 of 7 s", "1 report", "1 report"]
    assert "more than 5000 words" in notes[1] and "not UTF-8" in notes[2]
    notes.clear()
    prepare_reports(with_reports(["a", "b " * 5000]), notes)
    assert notes == []


# ---- R2Gen's packaging -----------------------------------------------------------------------------------------------

def picture(path, seed=0, shape=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)).save(path)
    return path


def entry(name, images, report="The lungs are clear.", **more):
    return {"id": name, "report": report, "image_path": images, **more}


def annotate(folder, **lists):
    (folder / "annotation.json").write_text(json.dumps(lists), encoding="utf-8")
    return folder


def make_iu(folder, counts=(("train", 10), ("val", 2), ("test", 3))):
    """Two views of each study."""
    lists = {}
    seed = 0
    for part, count in counts:
        lists[part] = []
        for _ in range(count):
            name = f"CXR{seed}_IM-0001"
            images = [f"{name}/0.png", f"{name}/1.png"]
            for view, image in enumerate(images):
                picture(folder / "images" / image, 2 * seed + view)
            lists[part].append(entry(name, images, f"No effusion. Study {seed}.", split=part))
            seed += 1
    return annotate(folder, **lists)


def make_phantoms(folder, train=4):
    """X-ray and report, CT and report, CT and T2, and all four in the test part."""
    lists = {"train": [], "val": [], "test": []}
    sets = (("x", ("xray",), "Clear."), ("c", ("ct",), "Clear."), ("m", ("ct", "t2"), ""), ("a", ("xray", "ct", "t2"), "Clear."))
    for part, count in (("train", train), ("test", 2)):
        for letter, contrasts, report in sets:
            if letter == "a" and part == "train":
                continue
            for i in range(count):
                name = f"cxr{letter}{part[1]}{i}"
                seed = 100 * i + sum(map(ord, name))
                images = []
                for contrast in contrasts:
                    ending = "png" if contrast == "xray" else "nii.gz"
                    images.append(f"{contrast}/{name}.{ending}")
                    path = folder / "images" / images[-1]
                    if contrast == "xray":
                        picture(path, seed, (20, 20))
                        continue
                    plane = head((20, 20, 3), seed + len(images))[:, :, 1:2]
                    save(path, 10 * plane - 1000 if contrast == "ct" else plane)
                lists[part].append(entry(name, images, report))
    return annotate(folder, **lists)


def test_iu_xray(tmp_path):
    folder = make_iu(tmp_path / "iu")
    layout = find_layout(folder, texts=True)
    assert layout.name == "R2Gen packaging" and layout.contrasts == ("text", "xray")
    assert {part: len(names) for part, names in layout.split.items()} == {"train": 10, "val": 2, "test": 3}
    subject = next(s for s in layout.subjects if s.name == "CXR3_IM-0001")
    views = tuple(folder / "images" / "CXR3_IM-0001" / f"{view}.png" for view in (0, 1))
    assert subject.files == {"text": folder / "annotation.json", "xray": views} and subject.person == subject.name
    assert subject.report == "No effusion. Study 3." and subject.paths == list(views)
    assert layout.split["val"] == ["CXR10_IM-0001", "CXR11_IM-0001"]
    dataset, said = opened(folder, texts=True)
    assert dataset.images.shape == (30, 2, 20, 20) and dataset.present.all()
    assert [name for name, number in dataset.keys([0, 1, 2])] == ["CXR0_IM-0001", "CXR0_IM-0001", "CXR10_IM-0001"]
    assert dataset.reports([0, 1, 2]) == ["no effusion . study 0 ."] * 2 + ["no effusion . study 10 ."]
    assert dataset.split == layout.split and "30 of 30 slices kept" in said and "warning" not in said
    # Both views of a study are there, in order, and upright.
    for row, seed in ((0, 0), (1, 1), (2, 20)):
        source = np.random.default_rng(seed).integers(0, 255, (24, 20), dtype=np.uint8)[2:22] / 255
        np.testing.assert_allclose(dataset.images[row, 1], source, atol=1e-3)


def test_reports_are_seen_only_if_asked_for(tmp_path):
    folder = make_iu(tmp_path / "iu")
    layout = find_layout(folder)
    assert layout.contrasts == ("xray",) and all(list(s.files) == ["xray"] for s in layout.subjects)
    assert layout.notes == []
    with pytest.raises(DataError, match="no contrast text"):
        find_layout(folder, ("text", "xray"))
    assert find_layout(folder, ("xray", "text"), texts=True).contrasts == ("xray", "text")
    assert find_layout(folder, ("cxr",), texts=True).contrasts == ("xray",)
    dataset, _ = opened(folder)
    assert dataset.images.shape[1] == 1 and dataset.reports([0]) == [None]


def test_two_reports_are_enough_and_one_is_not(tmp_path):
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.png", i)
    entries = [entry(str(i), [f"{i}.png"], "" if i > 1 else "Clear.") for i in range(6)]
    annotate(tmp_path, train=entries)
    assert find_layout(tmp_path, texts=True).contrasts == ("text", "xray")
    assert not any("report" in note for note in find_layout(tmp_path).notes)
    annotate(tmp_path, train=[entries[0], *entries[2:4]])
    layout = find_layout(tmp_path, texts=True)
    assert layout.contrasts == ("xray",)
    assert "2 of 3 subjects have no report: it is missing, empty, or has underscores only" in layout.notes
    assert any(note.startswith("text: in 1 of 3 subjects only") for note in layout.notes)
    assert find_layout(tmp_path, ("text", "xray"), texts=True).contrasts == ("text", "xray")
    brats = find_layout(make_set(tmp_path / "brats"), ("text", "t1"), texts=True)
    assert "text: no subject has it; there are flair, t1" in brats.notes
    slices = find_layout(make_slices(tmp_path / "npy"), ("text", "t1"), texts=True)
    assert slices.contrasts == ("text", "t1")


def test_mimic(tmp_path):
    one = "p10/p10000032/s50414267/02aa804e-4e384014.jpg"
    two = "p10/p10000032/s53189527/2a2277a9-b0ded155.jpg"
    for seed, image in enumerate((one, two)):
        picture(tmp_path / "images" / image, seed)
    annotate(tmp_path, train=[entry("02aa804e", [one]), entry("2a2277a9", [two])], test=[])
    assert {s.name: s.person for s in find_layout(tmp_path).subjects} == {"02aa804e": "p10000032", "2a2277a9": "p10000032"}


def test_paths_name_contrasts(tmp_path):
    images = ["ct/a.nii.gz", "t2/a.nii.gz", "a_flair.nii.gz", "xray/a.png", "other/b.png", "ct_fig/c_pd.png", "d.dcm", "mask.nii.gz"]
    for image in images:
        path = tmp_path / "images" / image
        picture(path) if image.endswith("png") else save(path, head()) if "nii" in image else path.write_bytes(b"x")
    annotate(tmp_path, train=[entry("a", images), entry("b", "none.png", None), entry("c", ["other\\b.png"], 5)])
    layout = find_layout(tmp_path, every=True, contrasts=("xray", "ct", "t2", "flair", "pd"))
    a, c = layout.subjects
    home = tmp_path / "images"
    assert a.files == {"xray": (home / "xray/a.png", home / "other/b.png"), "ct": home / "ct/a.nii.gz", "t2": home / "t2/a.nii.gz",
                       "flair": home / "a_flair.nii.gz", "pd": home / "ct_fig/c_pd.png"}
    assert c.files == {"xray": home / "other/b.png"} and c.report is None
    assert layout.skipped == [("b", "has none of xray, ct, t2, flair, pd")]
    assert "1 images of annotation.json do not exist and are left out, e.g. none.png" in layout.notes
    assert any(note.startswith("2 images of annotation.json are neither") and "d.dcm" in note for note in layout.notes)


@pytest.mark.parametrize(("text", "sentence"), [
    ('{"train": [\n{"id": "a"\n"report": 1}]}', r"annotation\.json, line 3: is no JSON"),
    ("[1]", "is no dict of train, val, test"),
    ('{"train": {"a": 1}}', "train is no list"),
    ('{"val": []}', "has no entries"),
    ('{"train": [{"report": "x", "image_path": []}]}', "entry 0 of train: has no id"),
    ('{"train": [5]}', "entry 0 of train: has no id"),
    ('{"val": [{"id": 7}]}', r"entry 0 of val \(7\): has no list image_path"),
    ('{"train": [{"id": "a", "image_path": []}], "test": [{"id": "a", "image_path": []}]}',
     "entry 0 of test: the id a is there twice"),
    ('{"train": [{"id": "a", "image_path": ["ct/a.nii.gz", "ct/b.nii.gz"]}]}', "has 2 files of ct, and not all are pictures"),
], ids=["comma", "list", "dict", "empty", "no id", "number", "no images", "twice", "two volumes"])
def test_bad_annotations(tmp_path, text, sentence):
    for name in ("a", "b"):
        save(tmp_path / "images" / "ct" / f"{name}.nii.gz", head())
    (tmp_path / "annotation.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        find_layout(tmp_path)


def test_three_paired_sets_and_all(tmp_path):
    folder = make_phantoms(tmp_path / "cxr")
    dataset, said = opened(folder, texts=True, gaps=True)
    assert dataset.contrasts == ("text", "t2", "ct", "xray") and len(dataset.images) == 20
    have = {}
    for row, name in enumerate(dataset.subject):
        have[name[3]] = dataset.present[row].tolist()
    assert have == {"x": [True, False, False, True], "c": [True, False, True, False], "m": [False, True, True, False],
                    "a": [True, True, True, True]}
    assert "scans: text 14, t2 8, ct 14, xray 8" in said and "6 of 20 subjects have no report" in said
    assert [len(dataset.split[part]) for part in ("train", "val", "test")] == [11, 1, 8]
    assert not dataset.images[:, 0].any() and "warning" not in said
    for row in range(20):               # a missing contrast is 0, all others are images
        assert (dataset.images[row, 1:].max((1, 2)) > 0.3).tolist() == dataset.present[row, 1:].tolist()
    names = dataset.subject.tolist()
    assert dataset.reports([names.index("cxrme0"), names.index("cxrae0")]) == [None, "clear ."]
    np.testing.assert_array_equal(dataset.having(np.arange(20), ["text", "ct"]),
                                  [i for i, name in enumerate(names) if name[3] in "ca"])
    channel = 3                         # the X-ray is what it was in the PNG, beside volumes as well
    name = "cxrae1"
    values = np.asarray(Image.open(folder / "images" / "xray" / f"{name}.png")) / 255
    np.testing.assert_allclose(dataset.images[names.index(name), channel], values, atol=1e-3)


# ---- What a data set is ----------------------------------------------------------------------------------------------

def files_of_cache(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder.parent / "cache" / "subjects").glob("*")}


def test_one_changed_word_is_another_data_set(tmp_path):
    folder = make_iu(tmp_path / "iu")
    first, _ = opened(folder, texts=True)
    plain, _ = opened(folder)
    before = files_of_cache(folder)
    text = (folder / "annotation.json").read_text()
    (folder / "annotation.json").write_text(text.replace("Study 4.", "Study IV."))
    second, said = opened(folder, texts=True)
    assert second.fingerprint != first.fingerprint and "decoding 1 subjects" in said
    assert len(files_of_cache(folder)) == len(before) + 1
    names = second.subject.tolist()
    assert second.reports([names.index("CXR4_IM-0001"), names.index("CXR5_IM-0001")]) == ["no effusion . study iv .",
                                                                                       "no effusion . study 5 ."]
    assert opened(folder)[0].fingerprint == plain.fingerprint           # nobody reads the reports there
    (folder / "annotation.json").write_text(json.dumps(json.loads(text), indent=1))
    assert opened(folder, texts=True)[0].fingerprint == first.fingerprint       # another form of the same words
    shutil.copytree(folder, tmp_path / "copy")
    assert opened(tmp_path / "copy", texts=True)[0].fingerprint == first.fingerprint


def test_one_changed_pixel_is_another_data_set(tmp_path):
    folder = make_iu(tmp_path / "iu")
    first, _ = opened(folder)
    picture(folder / "images" / "CXR4_IM-0001" / "1.png", 99)
    second, said = opened(folder)
    assert second.fingerprint != first.fingerprint and "decoding 1 subjects" in said


def test_equal_xrays_in_two_parts_are_a_leak(tmp_path):
    folder = make_iu(tmp_path / "iu")
    for view in (0, 1):
        shutil.copy(folder / "images" / "CXR0_IM-0001" / f"{view}.png", folder / "images" / "CXR13_IM-0001" / f"{view}.png")
    with pytest.raises(DataError, match="identical xray images, a leak"):
        opened(folder, texts=True)


# ---- The split of a data set -----------------------------------------------------------------------------------------

def test_the_split_of_a_data_set():
    subjects = [Subject(f"s{i}", f"p{i // 2}", {}) for i in range(40)]
    names = [subject.name for subject in subjects]
    lines = []
    given = {"train": names[:32] + ["unknown"], "val": [], "test": names[32:]}
    split = use_split(given, subjects, 0, lines.append)
    assert split["test"] == names[32:] and sorted(split["train"] + split["val"]) == sorted(names[:32])
    assert len(split["val"]) == 4 and "2 persons" in lines[0]           # a tenth of 16 persons, with both of their images
    assert len({name for name in split["val"]} | {f"s{int(name[1:]) ^ 1}" for name in split["val"]}) == 4
    assert split == use_split(given, subjects[::-1], 0, print) != use_split(given, subjects, 1, print)
    few = {"train": names[:14], "val": [], "test": names[14:]}
    assert use_split(few, subjects, 0, lines.append) == few and len(lines) == 1             # 7 persons
    own = {"train": names[:31], "val": names[32:34], "test": names[34:]}
    assert use_split(own, subjects, 0, lines.append) == own and len(lines) == 1
    leak = {"train": names[:31], "val": [names[32]], "test": [*names[34:], names[31]]}
    use_split(leak, subjects, 0, lines.append)
    assert "warning: images of p15 are in train and test" in lines[1]
    with pytest.raises(DataError, match="own test part is complete; give a split of your own"):
        use_split({"train": names, "val": [], "test": ["unknown"]}, subjects, 0, print)


# ---- Tables ----------------------------------------------------------------------------------------------------------

def make_table(folder, text, pictures=("a.png", "b.png")):
    for seed, name in enumerate(pictures):
        picture(folder / name, seed)
    (folder / "reports.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("title", ["patient", "patient_id", "PatientID", "Subject_ID", None])
def test_patients_of_a_table(tmp_path, title):
    """Other names of the column are understood, and without it names of files tell. A split that is empty is none."""
    names = [f"k{number}_{view}.png" for number in range(4) for view in (1, 2)]
    rows = [f"file,notes,split{f',{title}' if title else ''}"]
    rows += [f"{name},Clear.,{f',{name[:2]}' if title else ''}" for name in names]
    layout = find_layout(make_table(tmp_path, "\n".join(rows), names), texts=True)
    assert [subject.person for subject in layout.subjects] == [name[:2] for name in names]
    assert layout.split is None


def test_table_of_reports(tmp_path):
    text = ("file,patient,view,finding,notes,split\n"
            'a.png,p1,PA,COVID-19,"Clear.\nNo effusion, none.",Train\n'
            "sub/b.JPG,p1,L,,n/a,valid\n"
            "c.png,,,,Large heart.,\n"
            "gone.png,p4,,,x,test\n")
    folder = make_table(tmp_path, text, ("images/a.png", "sub/b.JPG", "images/c.png"))
    layout = find_layout(folder, texts=True)
    a, c, b = layout.subjects
    assert layout.name == "reports.csv" and (a.name, b.name, c.name) == ("a", "sub_b", "c")
    assert (a.person, b.person, c.person) == ("p1", "p1", "c")
    assert a.files == {"text": folder / "reports.csv", "xray": folder / "images" / "a.png"}
    assert b.files == {"xray": folder / "sub" / "b.JPG"} and a.meta == {"view": "PA"} and c.meta == {}
    assert clean_report(a.report, mimic=True) == "clear . no effusion none ." and c.report == "Large heart."
    assert layout.split == {"train": ["a"], "val": ["sub_b"], "test": []}
    assert "1 files of reports.csv do not exist and are left out, e.g. gone.png" in layout.notes
    assert any("1 of 3 subjects have no report" in note for note in layout.notes)


def test_other_forms_of_the_table(tmp_path):
    text = "Image;Subject;Text;Report\na.png;p1;wrong;Na\xefve lungs.\nb.png;p2;wrong;Clear.\n".encode("latin-1")
    layout = find_layout(make_table(tmp_path, text), texts=True)
    assert [s.report for s in layout.subjects] == ["Na\xefve lungs.", "Clear."] and layout.split is None
    assert [s.person for s in layout.subjects] == ["p1", "p2"]
    assert not any("hold the character" in note for note in layout.notes)
    text = "file,patient,report\na.png,p1,Na\ufffdve lungs.\nb.png,p2,Clear.\n"            # damaged before
    layout = find_layout(make_table(tmp_path / "damaged", text), texts=True)
    assert any("1 reports hold the character" in note for note in layout.notes)


def test_patients_stay_together(tmp_path):
    names = [f"{i}.png" for i in range(30)]
    text = "file,patient,report\n" + "".join(f'{name},p{i // 3},"Study {i}.\nWrapped."\n' for i, name in enumerate(names))
    dataset, _ = opened(make_table(tmp_path / "set", text, names), texts=True)
    part_of = {name: part for part, names in dataset.split.items() for name in names}
    assert len(part_of) == 30 and len(set(part_of.values())) == 3
    assert dataset.reports([0]) == ["study 0 . wrapped ."]
    for i in range(30):
        assert part_of[str(i)] == part_of[str(3 * (i // 3))]


@pytest.mark.parametrize(("text", "sentence"), [
    ("patient,report\np1,x\n", "has no column file"), ("file,patient\na.png,p\n", "has no column report"),
    ("file,report\na.dcm,x\n", r"reports\.csv, line 2: a\.dcm is no \.png"),
    ("file,report\n,x\n", "line 2: an empty cell is no"),
    ("file,report\na.png,x\n\na.png,y\n", "line 4: a.png is in an earlier line"),
    ("file,report,split\na.png,x,later\n", "line 2: the split is 'later'; write train, val or test"),
    ("file,report\nz.png,x\n", "names no picture that exists"),
    ('file,report\na.png,"' + "x" * 140000, r"reports\.csv, line 2: a quote is opened and never closed"),
], ids=["file", "report", "dicom", "empty", "twice", "split", "missing", "quote"])
def test_bad_tables(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence):
        find_layout(make_table(tmp_path, text))


def test_manifest_with_pictures_and_reports(tmp_path):
    for seed, name in enumerate(("a0.png", "a1.jpg", "b.png")):
        picture(tmp_path / name, seed)
    save(tmp_path / "b.nii.gz", head())
    (tmp_path / "manifest.csv").write_text(
        "subject,modality,path,age,report\n"
        "a,xray,a0.png,61,Clear.\na,CXR,a1.jpg,,\n"
        "b,xray,b.png,50,\nb,T1w,b.nii.gz,,Large heart.\n")
    layout = find_layout(tmp_path, every=True, texts=True)
    a, b = layout.subjects
    sheet = tmp_path / "manifest.csv"
    assert layout.contrasts == ("text", "xray")
    assert a.files == {"text": sheet, "xray": (tmp_path / "a0.png", tmp_path / "a1.jpg")}
    assert b.files == {"text": sheet, "xray": tmp_path / "b.png"}
    assert (a.report, b.report) == ("Clear.", "Large heart.") and a.records["xray"]["age"] == 61
    assert data.scan_prompt("xray", data.record_of(a, "xray")) == "Modality: X-ray; Age: 61 y; Sex: None; Scanner: None None"
    assert b.records["t1"]["voxel"] == (2.88, 3, 4) and "voxel" not in b.records["xray"]


@pytest.mark.parametrize(("rows", "sentence"), [
    ("a,t1,a.png,\n", r"line 2: a\.png is no \.nii"),
    ("a,xray,a.png,Clear.\na,xray,b.png,Large heart.\n", "line 3: a has another report in an earlier line"),
    ("a,xray,a.png,\na,xray,b.nii.gz,\n", r"line 3: a has another xray in an earlier line, a\.png"),
    ("a,xray,b.nii.gz,\na,xray,a.png,\n", r"line 3: a has another xray in an earlier line, b\.nii\.gz"),
], ids=["t1", "reports", "picture first", "volume first"])
def test_bad_manifests(tmp_path, rows, sentence):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    save(tmp_path / "b.nii.gz", head())
    (tmp_path / "manifest.csv").write_text("subject,modality,path,report\n" + rows)
    with pytest.raises(DataError, match=sentence):
        find_layout(tmp_path)


def test_pictures_without_a_table(tmp_path):
    picture(tmp_path / "p" / "a.png")
    with pytest.raises(DataError, match=r"holds pictures, and nothing says what they show; add a table reports\.csv"):
        find_layout(tmp_path)


def test_kinds():
    assert [kind_of(contrast) for contrast in ("xray", "cine", "ct", "t2")] == ["X-ray", "MRI", "CT", "MRI"]
    assert data.canonical_contrast("Radiograph") == "xray" and data.canonical_contrast("text") == "text"
    assert data.caption("xray", 0.5, 1).startswith("Modality: X-ray; ")


def test_a_published_set_as_a_data_set(tmp_path):
    """ChestX-ray14 through the whole package. Its official split has no validation part, and patients have several pictures."""
    folder = tmp_path / "nih"
    names = [f"{i // 2:08d}_{i % 2:03d}.png" for i in range(30)]
    rows = ["Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position"]
    for seed, name in enumerate(names):
        picture(folder / "images" / name, seed)
        rows.append(f"{name},Effusion|Mass,{seed // 2},58,M,PA")
    (folder / "Data_Entry_2017.csv").write_text("\n".join(rows))
    (folder / "train_val_list.txt").write_text("\n".join(names[:24]))
    (folder / "test_list.txt").write_text("\n".join(names[24:]))
    dataset, said = opened(folder, texts=True, gaps=True)
    assert dataset.layout == "ChestX-ray14" and dataset.contrasts == ("text", "xray") and dataset.present.all()
    assert [len(dataset.split[part]) for part in ("train", "val", "test")] == [22, 2, 6]
    assert len({name[:8] for name in dataset.split["val"]}) == 1 and "1 persons of the training part validate" in said
    assert dataset.reports([0]) == ["a frontal chest x-ray pa view 58 year old man . findings effusion mass ."]


# ---- Check -----------------------------------------------------------------------------------------------------------

def test_check_of_reports_and_pictures(tmp_path):
    folder = make_iu(tmp_path / "iu", (("train", 2), ("test", 2)))
    entries = json.loads((folder / "annotation.json").read_text())
    entries["train"][0]["report"] = "Clear."
    entries["test"][1]["report"] = ""
    annotate(folder, **entries)
    lines = []
    assert check(folder, texts=True, gaps=True, say=lines.append)
    rows = [line.split() for line in lines if line.startswith("CXR1_IM-0001")]
    values = np.random.default_rng(2).integers(0, 255, (24, 20), dtype=np.uint8) / 255
    assert rows[0] == ["CXR1_IM-0001", "xray", "20x24", "-", "-", f"{values.min():.4g}..{values.max():.4g}", "-", "-"]
    assert len(rows) == 2
    # "clear .", "no effusion . study 1 ." and "no effusion . study 2 ." have 7 different words.
    assert "reports: 3; words in the shortest, the median and the longest: 2, 6, 6; different words: 7" in lines
    assert [line for line in lines if line.startswith("report:")] == [
        "report: clear .", "report: no effusion . study 1 .", "report: no effusion . study 2 ."]
    assert lines[-1].startswith("3 complete subjects of 3 persons (2 needed), 0 errors: usable")
    (folder / "images" / "CXR2_IM-0001" / "0.png").write_bytes(b"<html>")
    lines.clear()
    assert not check(folder, texts=True, gaps=True, say=lines.append)
    assert sum(line.startswith("error") and "is no PNG or JPEG" in line for line in lines) == 1
    lines.clear()
    check(folder, say=lines.append)
    assert not any(line.startswith("report") for line in lines)
