"""check reports what is wrong."""

import numpy as np
import pytest

from data import check
from scans import PET_AFFINE, SHAPE, body_pet, head, make_breasts, make_pet_ct, make_set, save


def test_check_reports_every_problem(tmp_path):
    folder = make_set(tmp_path / "set")
    lines = []
    assert check(folder, say=lines.append)
    assert "4 complete subjects of 4 persons (2 needed), 0 errors: usable" in lines[-1]
    row = next(line for line in lines if line.startswith("BraTS2021_00000") and " t1 " in line)
    values = f"0..{head(seed=1).max():.4g}"
    assert row.split()[:6] == ["BraTS2021_00000", "t1", "14x18x9", "2.00x3.00x4.00", "RAS", values]
    assert float(row.split()[-1]) == pytest.approx((head() > 0).mean(), abs=1e-3)
    one, two = (folder / f"BraTS2021_0000{s}" / f"BraTS2021_0000{s}_t1.nii.gz" for s in (1, 2))
    one.write_bytes(one.read_bytes()[:-500])
    save(two, np.zeros(SHAPE, np.float32))
    lopsided = head() * (np.arange(14) < 6)[:, None, None]
    save(folder / "BraTS2021_00003" / "BraTS2021_00003_flair.nii.gz", lopsided)
    save(folder / "BraTS2021_00003" / "BraTS2021_00003_t1.nii.gz", lopsided[::-1])
    lines.clear()
    assert not check(folder, say=lines.append)
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 2 and str(one) in errors[0] and "end early" in errors[0]
    assert "BraTS2021_00002, t1" in errors[1] and "is constant" in errors[1]
    assert any("BraTS2021_00003 t1: fits the first contrast better when mirrored" in line for line in lines)
    lines.clear()
    assert not check(tmp_path / "nothing", say=lines.append) and "does not exist" in lines[0]


def test_check_of_pairs(tmp_path):
    folder = make_pet_ct(tmp_path / "petct")
    lines = []
    assert check(folder, say=lines.append)
    rows = [line.split()[:5] for line in lines if line.startswith("p0 ")]
    assert rows == [["p0", "pet", "12x12x6", "6.00x6.00x5.00", "RAS"], ["p0", "ct", "48x48x10", "1.50x1.50x3.00", "RAS"]]
    assert "note: p0 ct and 2 more: is on another grid than pet; will be resampled by the affines" in lines
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
