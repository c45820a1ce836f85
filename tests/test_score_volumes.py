"""common/score_volumes.py: small NIfTI volumes against numbers worked by hand, and every refusal."""
import csv
import math
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT

from common import evaluation, metrics, score_volumes
from common.cli import as_command
from common.files import RunError
from data import DataError

SHAPE = (12, 13, 4)                 # (X, Y, Z); SSIM needs 11 pixels on a side
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def truth_volume(seed=0):
    """Values from 0 to 1 in three slices; the first axial slice is empty."""
    array = np.random.default_rng(seed).uniform(0.1, 0.9, SHAPE)
    array[0, 0, 1] = 0.0
    array[0, 0, 2] = 1.0
    array[:, :, 0] = 0
    return array


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), affine), path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Two subjects, of which the prediction is 0.1 and 0.2 too low where there is anything."""
    truth = tmp_path / "truth"
    predicted = tmp_path / "predicted"
    for name, gap in (("s1", 0.1), ("s2", 0.2)):
        array = truth_volume(int(name[1]))
        save(truth / name / f"{name}_t1.nii.gz", array)
        save(predicted / name / f"{name}_t1_synthetic.nii.gz", np.where(array > 0, array - gap, 0))
    return truth, predicted


def command(capsys, *words):
    """What `python -m common.evaluation` would print: (exit status, output, errors)."""
    status = 0
    try:
        as_command(lambda: evaluation.main([str(word) for word in words]))
    except SystemExit as end:
        status = end.code
    seen = capsys.readouterr()
    return status, seen.out, seen.err


# ---- numbers -------------------------------------------------------------------------------------


def test_a_constant_error_gives_the_numbers_that_one_works_out_by_hand():
    truth = np.full((2, 11, 11), 50.0)
    truth[:, 0, 0] = 150.0
    numbers = score_volumes.score_volume(truth, truth + 20, (0, 200))
    assert numbers["psnr"] == pytest.approx(20.0)               # 20 log10(200 / 20)
    assert numbers["mae"] == pytest.approx(0.1)                 # 20 / 200
    energy = (120 * 0.25 ** 2 + 0.75 ** 2) / 121                # the mean of the squared truth
    assert numbers["nmse"] == pytest.approx(0.01 / energy)


def test_the_psnr_is_of_the_volume_and_not_the_mean_of_its_slices():
    truth = np.random.default_rng(0).uniform(0, 1, (2, 11, 11))
    predicted = truth.copy()
    predicted[0] += 0.1
    numbers = score_volumes.score_volume(truth, predicted)
    assert numbers["psnr"] == pytest.approx(10 * math.log10(1 / 0.005))
    assert numbers["mae"] == pytest.approx(0.05)


def test_ssim_is_the_mean_of_the_slices_that_are_not_empty():
    truth = np.random.default_rng(0).uniform(0, 1, (3, 12, 12))
    truth[1] = 0.0
    predicted = np.clip(truth + np.random.default_rng(1).normal(0, 0.1, truth.shape), 0, 1)
    values = metrics.ssim(truth, predicted, 1)
    assert score_volumes.score_volume(truth, predicted)["ssim"] == pytest.approx((values[0] + values[2]) / 2)


def test_the_unit_does_not_matter_if_the_range_says_it():
    truth = np.random.default_rng(0).uniform(0, 1, (3, 12, 12))
    predicted = truth ** 1.1
    expected = score_volumes.score_volume(truth, predicted)
    found = score_volumes.score_volume(truth * 3000 - 1000, predicted * 3000 - 1000, (-1000, 2000))
    assert found == pytest.approx(expected)


def test_with_a_mask_only_its_voxels_count():
    truth = np.random.default_rng(0).uniform(0.2, 0.8, (3, 13, 13))
    predicted = truth + 0.5
    mask = np.zeros(truth.shape, bool)
    mask[1, 5:8, 5:8] = True
    predicted[mask] = truth[mask] - 0.1
    numbers = score_volumes.score_volume(truth, predicted, mask=mask)
    assert numbers["psnr"] == pytest.approx(20.0) and numbers["mae"] == pytest.approx(0.1)
    assert numbers["nmse"] == pytest.approx(0.01 / (truth[mask] ** 2).mean())
    assert numbers["ssim"] == pytest.approx(float(metrics.ssim(truth[1], predicted[1], 1, mask=mask[1])))


def test_identical_and_empty_volumes_give_inf_and_nan():
    blank = np.zeros((2, 11, 11))
    numbers = score_volumes.score_volume(blank, blank)
    assert numbers["psnr"] == math.inf and numbers["mae"] == 0
    assert math.isnan(numbers["ssim"]) and math.isnan(numbers["nmse"])


@pytest.mark.parametrize("shape, mask, message", [
    ((2, 11, 12), None, r"the truth is \(2, 11, 11\), the prediction \(2, 11, 12\)"),
    ((2, 11, 11), np.zeros((2, 11, 11)), "the mask is empty"),
    ((2, 11, 11), np.ones((2, 11, 12)), r"or is \(2, 11, 12\) and not \(2, 11, 11\)"),
])
def test_arrays_that_do_not_fit_are_refused(shape, mask, message):
    truth = np.random.default_rng(0).uniform(0, 1, (2, 11, 11))
    with pytest.raises(ValueError, match=message):
        score_volumes.score_volume(truth, np.ones(shape), mask=mask)


# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, subjects", [
    (["oslo/07/t1.nii", "oslo/08/t1.nii", "rome/07/t1.nii"], ["oslo/07", "oslo/08", "rome/07"]),
    (["k1/ses-1/t1.nii", "k1/ses-2/t1.nii", "k2/ses-1/t1.nii"], ["k1", "k1", "k2"]),
    (["k1/anat/t1.nii", "k1/pet/pet.nii", "k2/anat/t1.nii", "k2/pet/pet.nii"], ["k1", "k1", "k2", "k2"]),
    (["k1/t1.nii", "k1_V2/t1.nii", "x.nii"], ["k1", "k1_V2", "x"]),
], ids=["sites", "visits", "kinds", "flat"])
def test_the_subjects_of_nested_folders(tmp_path, names, subjects):
    for name in names:
        for folder in ("a", "b"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"")
    pairs, _, _ = score_volumes.find_pairs(tmp_path / "a", tmp_path / "b")
    assert [pair.subject for pair in pairs] == subjects


def paired(tmp_path, truths, predictions):
    """find_pairs on empty files of these names -> ({truth: prediction}, lonely truths, lonely ones)."""
    for folder, names in (("a", truths), ("b", predictions)):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    pairs, lonely, alone = score_volumes.find_pairs(tmp_path / "a", tmp_path / "b")
    names = {pair.truth.relative_to(tmp_path / "a").as_posix():
             pair.predicted.relative_to(tmp_path / "b").as_posix() for pair in pairs}
    return names, [path.name for path in lonely], [path.name for path in alone]


@pytest.mark.parametrize("truth, prediction", [
    ("x.nii", "x.nii"), ("x.nii.gz", "x.nii"), ("X_T1.nii.gz", "x_t1-pred.nii.gz"),
    ("s1/t1.nii.gz", "s1/t1_synthetic.nii.gz"), ("s1/anat/t1.nii.gz", "s1/t1.nii.gz"),
    ("s1/t1.nii.gz", "synthetic/s1/t1_synthetic.nii.gz"), ("s1_t1.nii.gz", "s1/s1_t1_synthetic.nii.gz"),
    ("x_synthetic.nii", "x_synthetic.nii"),
])
def test_files_pair_by_name_and_folder(tmp_path, truth, prediction):
    assert paired(tmp_path, [truth], [prediction]) == ({truth: prediction}, [], [])


def test_equal_names_in_folders_of_different_subjects_do_not_pair(tmp_path):
    found, lonely, alone = paired(tmp_path, ["s1/anat/t1.nii", "s2/anat/t1.nii"], ["s2/anat/t1.nii", "s3/anat/t1.nii"])
    assert found == {"s2/anat/t1.nii": "s2/anat/t1.nii"} and lonely == ["t1.nii"] and alone == ["t1.nii"]
    with pytest.raises(RunError, match="no file in .* has the name of a file in .*rename them alike"):
        paired(tmp_path / "other", ["s1/anat/t1.nii"], ["s2/anat/t1.nii"])


def test_doubtful_pairs_are_refused(tmp_path):
    with pytest.raises(RunError, match="t1.nii and .*t1_pred.nii both belong to .*move one of them away"):
        paired(tmp_path / "1", ["s1/t1.nii"], ["s1/t1.nii", "s1/t1_pred.nii"])
    with pytest.raises(RunError, match="could belong to .*s1.t1.nii or to .*s2.t1.nii; put it"):
        paired(tmp_path / "2", ["s1/t1.nii", "s2/t1.nii"], ["t1.nii"])


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_every_volume_and_the_mean_and_writes_the_csv(folders, tmp_path, capsys):
    truth, predicted = folders
    save(truth / "s3" / "s3_t1.nii.gz", truth_volume())
    save(predicted / "s4" / "s4_t1_synthetic.nii.gz", truth_volume())
    status, out, err = command(capsys, "--truth", truth, "--predicted", predicted, "--csv", tmp_path / "scores.csv")
    assert status == 0 and err == ""
    assert f"not scored, 1 truth without a partner: {truth / 's3' / 's3_t1.nii.gz'}" in out
    assert f"not scored, 1 prediction without a partner: {predicted / 's4' / 's4_t1_synthetic.nii.gz'}" in out
    assert "2 volumes of 2 subjects; all voxels; range 0 to 1 (all truths lie in [0,1])" in out
    rows = list(csv.DictReader((tmp_path / "scores.csv").open(encoding="utf-8")))
    assert [row["subject"] for row in rows] == ["s1", "s2"] and rows[0]["volume"] == "s1/s1_t1"
    share = 3 / 4 - 1 / np.prod(SHAPE)              # of four slices one is empty, and one more voxel is 0
    for row, gap in zip(rows, (0.1, 0.2)):
        assert float(row["mae"]) == pytest.approx(gap * share, rel=1e-5)
        assert float(row["psnr"]) == pytest.approx(-10 * math.log10(gap ** 2 * share), rel=1e-5)
        assert (row["range_low"], row["range_high"], row["mask"]) == ("0", "1", "")
    psnr = [float(row["psnr"]) for row in rows]
    assert f"| s1/s1_t1 | {psnr[0]:.2f} | " in out
    assert f"| **mean ± std over subjects (n = 2)** | {np.mean(psnr):.2f} ± {np.std(psnr):.2f} | " in out
    assert "nan" not in out and "None" not in out


def test_a_csv_that_exists_is_not_overwritten(folders, tmp_path, capsys):
    (tmp_path / "scores.csv").write_text("mine")
    status, out, err = command(capsys, "--truth", folders[0], "--predicted", folders[1], "--csv", tmp_path / "scores.csv")
    assert status == 1 and "scores.csv exists already" in err and out == ""
    assert (tmp_path / "scores.csv").read_text() == "mine"
    status, _, err = command(capsys, "--truth", folders[0], "--predicted", folders[1], "--csv", tmp_path / "no" / "x.csv")
    assert status == 1 and "there is no folder" in err


def test_the_range_must_be_given_for_other_units(folders, capsys):
    truth, predicted = folders
    array = truth_volume() * 3000 - 1000
    save(truth / "s1" / "s1_t1.nii.gz", array)
    save(predicted / "s1" / "s1_t1_synthetic.nii.gz", array)
    words = ["--truth", truth, "--predicted", predicted]
    status, _, err = command(capsys, *words)
    assert status == 2 and "--range LOW,HIGH is missing" in err and "from -1000 to 2000" in err and err.count("\n") == 1
    status, out, _ = command(capsys, *words, "--range", "-1000,2000")
    assert status == 0 and "range -1000 to 2000; " in out and "| s1/s1_t1 | inf | 1.0000 | 0.0000 |" in out
    assert "in no mean: 1 of PSNR" in out


@pytest.mark.parametrize("typed", ["1", "1,0", "0,nan", "0,1,2"])
def test_a_range_is_two_numbers(folders, capsys, typed):
    status, _, err = command(capsys, "--truth", folders[0], "--predicted", folders[1], "--range", typed)
    assert status == 2 and "--range needs two numbers, the smaller one first" in err


def test_masks_pair_by_name_and_limit_the_score(folders, tmp_path, capsys):
    mask = np.zeros(SHAPE)
    mask[5:8, 5:8, 2] = 4                           # a label, not 1
    for name in ("s1", "s2"):
        save(tmp_path / "mask" / name / f"{name}_t1_mask.nii.gz", mask)
    words = ["--truth", folders[0], "--predicted", folders[1], "--mask", tmp_path / "mask"]
    status, out, _ = command(capsys, *words)
    assert status == 0 and "inside the mask" in out and "| s1/s1_t1 | 20.00 | " in out
    assert "| s2/s2_t1 | 13.98 | " in out           # 20 log10(1 / 0.2)
    (tmp_path / "mask" / "s2" / "s2_t1_mask.nii.gz").unlink()
    status, _, err = command(capsys, *words)
    assert status == 1 and "holds no mask for" in err and "s2_t1.nii.gz" in err
    save(tmp_path / "mask" / "s2" / "s2_t1_mask.nii.gz", np.zeros(SHAPE))
    status, _, err = command(capsys, *words)
    assert status == 1 and "the mask is empty" in err and err.count("\n") == 1


def test_another_grid_is_an_error_in_one_line(folders, capsys):
    path = folders[1] / "s2" / "s2_t1_synthetic.nii.gz"
    words = ["--truth", folders[0], "--predicted", folders[1]]
    save(path, np.ones((12, 13, 5)))
    status, _, err = command(capsys, *words)
    assert status == 1 and f"error: {path} has the shape (12, 13, 5) where" in err and err.count("\n") == 1
    moved = AFFINE.copy()
    moved[0, 3] = 1.5
    save(path, truth_volume(2), moved)
    status, _, err = command(capsys, *words)
    assert status == 1 and "has another affine than" in err and "by up to 1.5 mm" in err and err.count("\n") == 1


def test_the_same_volume_stored_in_another_orientation_is_the_same_volume(tmp_path):
    array = truth_volume()
    truth = save(tmp_path / "a.nii", array)
    turned = AFFINE @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    other = save(tmp_path / "b.nii", array[::-1] , turned)
    assert score_volumes.score_volumes([truth], [other])[0]["psnr"] == math.inf


def test_what_is_odd_is_said_but_counts_as_it_is(tmp_path):
    array = truth_volume()
    truth = save(tmp_path / "a.nii", array * 1000)
    other = save(tmp_path / "b.nii", array)
    lines = []
    score_volumes.score_volumes([truth], [other], value_range=(0, 1000), say=lines.append)
    assert len(lines) == 1 and "see if both have the same unit" in lines[0]
    lines.clear()
    score_volumes.score_volumes([truth], [truth], value_range=(0, 500), say=lines.append)
    assert len(lines) == 2 and "of the voxels of the truth lie outside the range 0 to 500" in lines[0]
    with pytest.raises(ValueError, match="1 truths, 2 predictions, 1 masks"):
        score_volumes.score_volumes([truth], [truth, other])


def test_folders_and_files_that_cannot_be_used_are_refused(folders, tmp_path, capsys):
    truth, predicted = folders
    status, _, err = command(capsys, "--truth", truth, "--predicted", tmp_path / "none")
    assert status == 1 and "none is not a folder" in err
    (tmp_path / "empty").mkdir()
    status, _, err = command(capsys, "--truth", truth, "--predicted", tmp_path / "empty")
    assert status == 1 and "holds no .nii or .nii.gz file" in err
    status, _, err = command(capsys, "--truth", truth, "--predicted", truth)
    assert status == 2 and "are the same folder" in err
    (predicted / "s1" / "s1_t1_synthetic.nii.gz").write_bytes(b"<html>")
    with pytest.raises(DataError, match="looks like HTML"):
        evaluation.main(["--truth", str(truth), "--predicted", str(predicted)])
    status, _, err = command(capsys, "--truth", truth)
    assert status == 2 and "--predicted" in err


def test_slices_too_small_for_ssim_are_refused(tmp_path):
    path = save(tmp_path / "a.nii", np.random.default_rng(0).uniform(0, 1, (8, 8, 3)))
    with pytest.raises(RunError, match="a.nii: ssim: the images are .*smaller than the 11x11 window"):
        score_volumes.score_files(path, path)


@pytest.mark.slow
def test_the_module_is_a_command(folders):
    words = [sys.executable, "-m", "common.evaluation", "--truth", folders[0], "--predicted", folders[1]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "n = 2" in done.stdout
    done = subprocess.run([*words, "--mask", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: nowhere is not a folder") and done.stderr.count("\n") == 1
