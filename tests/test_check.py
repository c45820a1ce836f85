"""check reports what is wrong."""

import json

import numpy as np
import pytest

from data import DataError, check
from scans import PET_AFFINE, SHAPE, body_pet, head, make_breasts, make_pet_ct, make_set, opened, save


def test_check_reports_every_problem(tmp_path):
    folder = make_set(tmp_path / "set")
    lines = []
    assert check(folder, say=lines.append)
    assert "4 complete subjects of 4 persons (2 needed), 0 errors: usable" in lines[-1]
    row = next(line for line in lines if line.startswith("BraTS2021_00000") and " t1 " in line)
    values = f"0..{head(seed=1).max():.4g}"
    assert row.split()[:6] == ["BraTS2021_00000", "t1", "14x18x9", "2.88x3.00x4.00", "RAS", values]
    assert float(row.split()[-1]) == pytest.approx((head() > 0).mean(), abs=1e-3)
    one, two = (folder / f"BraTS2021_0000{s}" / f"BraTS2021_0000{s}_t1.nii.gz" for s in (1, 2))
    one.write_bytes(one.read_bytes()[:-500])
    save(two, np.zeros(SHAPE, np.float32))
    lopsided = head() * (np.arange(14) < 9)[:, None, None]
    save(folder / "BraTS2021_00003" / "BraTS2021_00003_flair.nii.gz", lopsided)
    save(folder / "BraTS2021_00003" / "BraTS2021_00003_t1.nii.gz", lopsided[::-1])
    lines.clear()
    assert not check(folder, say=lines.append)
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 2 and str(one) in errors[0] and "end early" in errors[0]
    assert "BraTS2021_00002, t1" in errors[1] and "is constant" in errors[1]
    assert any("BraTS2021_00003_t1.nii.gz: fits flair better when mirrored" in line for line in lines)
    lines.clear()
    assert not check(tmp_path / "nothing", say=lines.append) and "does not exist" in lines[0]


def test_check_of_pairs(tmp_path):
    folder = make_pet_ct(tmp_path / "petct")
    lines = []
    assert check(folder, say=lines.append)
    rows = [line.split()[:5] for line in lines if line.startswith("p0 ")]
    assert rows == [["p0", "pet", "12x12x6", "6.00x6.00x5.00", "RAS"], ["p0", "ct", "48x48x10", "1.50x1.50x3.00", "RAS"]]
    assert "note: p0 CT.nii.gz and 2 more: is on another grid than pet; resampled by the affines" in lines
    save(folder / "p1" / "PET.nii.gz", body_pet(1) / 2e-4, PET_AFFINE)
    lines.clear()
    assert not check(folder, say=lines.append)
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1 and "subject p1, pet (" in errors[0] and "cannot be in SUV" in errors[0]
    (folder / "suv.csv").write_text("subject,factor\np1,2e-4\n")
    lines.clear()
    assert check(folder, say=lines.append)
    row = next(line for line in lines if line.startswith("p1 ") and " pet " in line)
    assert float(row.split()[5].split("..")[1]) == pytest.approx(30, rel=1e-3)  # the range is in SUV
    (folder / "suv.csv").write_text("subject,factor\np1,none of your business\n")
    lines.clear()
    assert not check(folder, say=lines.append) and "suv.csv, line 2" in lines[0]


def test_check_of_post_without_pre(tmp_path):
    folder = make_breasts(tmp_path / "breast")
    lines = []
    assert check(folder, say=lines.append) and not any(line.startswith(("note", "error")) for line in lines)
    assert not check(folder, contrasts=("post",), say=lines.append)
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 3 and "p0, post (" in errors[0] and "add pre" in errors[0]


def checked(folder, **options):
    """(what check returns, its errors, all lines) for a small image size."""
    lines = []
    usable = check(folder, say=lines.append, size=20, **options)
    return usable, [line for line in lines if line.startswith("error")], lines


def start_error(folder, **options):
    """What open_dataset says of a folder that it refuses."""
    with pytest.raises(DataError) as refused:
        opened(folder, **options)
    return f"error: {refused.value}"


def test_check_refuses_what_the_start_refuses(tmp_path):
    """The same sentence: no common slice, one image in two parts, one person in two parts, a split of others."""
    nowhere = make_set(tmp_path / "nowhere", contrasts=("flair", "t1", "t2"))
    name = "BraTS2021_00002"
    z = np.arange(9)                                        # each two share slices, but not all three
    for contrast, shown in (("flair", z < 6), ("t1", z > 2), ("t2", (z < 3) | (z > 5))):
        save(nowhere / name / f"{name}_{contrast}.nii.gz", head() * shown)
    usable, errors, lines = checked(nowhere)
    assert not usable and errors == [start_error(nowhere)] and f"{name}: no slice has foreground in all" in errors[0]
    assert lines[-1] == "3 complete subjects of 3 persons (2 needed), 1 errors: not usable"

    twins = make_set(tmp_path / "twins")
    split = {"train": ["BraTS2021_00000", "BraTS2021_00001"], "test": ["BraTS2021_00002", "BraTS2021_00003"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert checked(twins, split_file=tmp_path / "split.json")[0]
    for contrast in ("flair", "t1"):
        save(twins / name / f"{name}_{contrast}.nii.gz", head(seed=contrast == "t1"))
    usable, errors, _ = checked(twins, split_file=tmp_path / "split.json")
    assert not usable and "identical" in errors[0] and errors == [start_error(twins, split_file=tmp_path / "split.json")]
    split["test"].append("BraTS2021_00009")
    (tmp_path / "split.json").write_text(json.dumps(split))
    usable, errors, lines = checked(twins, split_file=tmp_path / "split.json")
    assert not usable and "BraTS2021_00009" in errors[0] and any(line.startswith(f"{name} ") for line in lines)    # the table is there


def test_check_asks_before_it_opens_a_file_and_passes_wrong_usage_on(tmp_path):
    folder = make_set(tmp_path / "set")
    seen = []

    def agree(ds):
        seen.append((ds.contrasts, len(ds.complete), len(ds.rows("train")), sum(map(len, ds.split.values()))))
        raise ZeroDivisionError
    lines = []
    with pytest.raises(ZeroDivisionError):
        check(folder, say=lines.append, agree=agree)
    assert seen == [(("flair", "t1"), 4, 0, 4)] and not any("RAS" in line for line in lines)
    with pytest.raises(ZeroDivisionError):
        opened(folder, agree=agree)
    assert seen[1] == seen[0] and not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="no contrast xyz") as refused:
        check(folder, ("t1", "xyz"), say=lines.append)
    assert refused.value.status == 2
