"""check reports what is wrong."""

import numpy as np
import pytest

from data import check
from scans import SHAPE, head, make_set, save


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
