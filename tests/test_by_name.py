"""Folders in which the names of files tell the subjects."""
import numpy as np
import pytest

from data import find_layout
from data.files import DataError
from scans import AFFINE, SHAPE, head, opened, save


def put(folder, names, seed=0):
    for number, name in enumerate(names):
        save(folder / name, head(seed=seed + number))
    return folder


def seen(folder, **options):
    layout = find_layout(folder, **options)
    return layout, {subject.name: sorted((contrast, path.relative_to(folder).as_posix()) for contrast, path in subject.files.items())
                    for subject in layout.subjects}


@pytest.mark.parametrize("pattern", ["{p}_{c}.nii.gz", "{p}-{c}.nii.gz", "{c}_{p}.nii.gz", "scan {p} {c} brain.nii.gz", "sub-{p}_{c}.nii.gz"])
def test_all_in_one_folder(tmp_path, pattern):
    names = [pattern.format(p=p, c=c) for p in ("p01", "p02", "Anna", "p10") for c in ("T1", "FLAIR", "t2w")]
    layout, files = seen(put(tmp_path / "set", names))
    assert layout.name == "files named by subject" and layout.contrasts == ("flair", "t1", "t2") and len(files) == 4
    for (name, own), person in zip(sorted(files.items()), ("Anna", "p01", "p02", "p10")):
        assert person.lower() in name.lower() and all(person in path for _, path in own) and [c for c, _ in own] == ["flair", "t1", "t2"]


@pytest.mark.parametrize("pattern", ["{c}/{p}.nii.gz", "{c}/{p}_{c}.nii.gz"])
@pytest.mark.parametrize("contrasts", [("T1", "T2"), ("mr", "ct"), ("CT", "PET")])
def test_a_folder_for_each_contrast(tmp_path, pattern, contrasts):
    names = [pattern.format(p=f"case{p}", c=c) for p in (1, 2) for c in contrasts]
    layout, files = seen(put(tmp_path / "set", names))
    assert sorted(files) == ["case1", "case2"] and set(layout.contrasts) == {c.lower() for c in contrasts}
    assert all(f"/{name}" in path for name, own in files.items() for _, path in own)


def test_masks_gaps_persons_and_voxels(tmp_path):
    """A mask belongs to its subject, one scan is missing, two visits are one person, and each file goes where its name says."""
    names = [f"p{p}_{c}.nii.gz" for p in (1, 2, 3) for c in ("t1", "t2")] + ["p4_ses-01_t1.nii.gz", "p4_ses-01_t2.nii.gz", "p4_ses-02_t1.nii.gz"]
    folder = put(tmp_path / "set", names)
    save(folder / "p2_seg.nii.gz", (head() > 150).astype(np.uint8))
    (folder / "notes.txt").write_text("x")
    save(folder / "template.nii.gz", head(seed=77))
    layout = find_layout(folder)
    by_name = {subject.name: subject for subject in layout.subjects}
    assert by_name["p2"].segmentation.name == "p2_seg.nii.gz" and by_name["p1"].segmentation is None
    visits = [subject for name, subject in by_name.items() if name.startswith("p4")]
    assert len(visits) == 1 or len({subject.person for subject in visits}) == 1
    assert [path.name for path in layout.ignored] == ["template.nii.gz"]
    ds, said = opened(folder, size=20, train_fraction=0.5, test_subjects=1)
    rows = np.flatnonzero(ds.subject == "p3")
    place = names.index("p3_t2.nii.gz")
    own = head(seed=place)[:, :, ds.slice_number[rows[0]]]
    shown = ds.images[rows[0], ds.contrasts.index("t2")]
    assert (shown > 0).sum() == (own > 0).sum() and "the names of the files tell the subjects" in said


def test_what_is_left_as_it_was(tmp_path):
    """Two versions of one subject's files are no two subjects; a file twice, or without a name, is refused with a sentence."""
    one = put(tmp_path / "one" / "P1", ["T1.nii.gz", "T2.nii.gz", "T1_bet.nii.gz", "T2_bet.nii.gz"])
    put(tmp_path / "one" / "P2", ["T1.nii.gz", "T2.nii.gz"])
    assert [subject.name for subject in find_layout(one.parent).subjects] == ["P1", "P2"]
    twice = put(tmp_path / "twice", [f"p{p}_{c}.nii.gz" for p in (1, 2, 3) for c in ("T1", "T1w", "T2")])
    with pytest.raises(DataError, match="holds 3 files of each contrast|put every subject into a folder"):
        find_layout(twice)
    alone = tmp_path / "alone"
    save(alone / "T1.nii.gz", np.ones(SHAPE, np.float32), AFFINE)
    save(alone / "T2.nii.gz", head())
    assert [subject.name for subject in find_layout(alone).subjects] == ["alone"]


def test_masks_and_versions_are_no_subjects(tmp_path):
    """A mask in the folder of a contrast is no scan; a second version of a file is no second patient."""
    names = [f"{c}/p{p}.nii.gz" for p in (1, 2) for c in ("T1", "T2")]
    folder = put(tmp_path / "masks", [*names, "T1/p1_mask.nii.gz", "T1/p2_mask.nii.gz", "T2/p1_mask.nii.gz", "T2/p2_mask.nii.gz"])
    layout, files = seen(folder)
    assert sorted(files) == ["p1", "p2"] and all(path.endswith(f"{name}.nii.gz") for name, own in files.items() for _, path in own)
    one = put(tmp_path / "one", [f"sub01_{c}{v}.nii.gz" for c in ("T1", "T2") for v in ("", "_bet", "_n4")])
    for folder in (put(tmp_path / "versions", [f"p{p}_{v}{c}.nii.gz" for p in (1, 2, 3) for c in ("T1", "T2") for v in ("", "bet_")]), one):
        try:
            found = [subject.name for subject in find_layout(folder).subjects]
        except DataError as error:
            assert "files of each contrast" in str(error)
        else:
            assert len(found) == 1 and folder == one


def test_a_contrast_before_the_number(tmp_path):
    layout, files = seen(put(tmp_path / "set", [f"brats_{c}_00{p}.nii.gz" for p in (1, 2, 3) for c in ("t1", "t2")]))
    assert sorted(files) == ["brats_001", "brats_002", "brats_003"]
    assert all(path.endswith(f"{name[-3:]}.nii.gz") for name, own in files.items() for _, path in own)
