"""Sentences about slices and scans."""

import numpy as np
import pytest

from data import load_subject
from data.files import DataError
from data.layouts import Subject, find_layout
from data.prompts import caption, describe_lesion, prompt
from scans import AFFINE, HEADER, IXI_NAMES, SHAPE, head, make_adni, make_ixi, make_set, save


def test_caption_text():
    assert caption("flair", 0.42, 0.314, "left, 412 mm2") == \
        "Modality: FLAIR; Plane: axial; Slice: 0.42; Brain: 0.31; Lesion: left, 412 mm2"
    assert caption("t1ce", 1, 0.2) == "Modality: T1CE; Plane: axial; Slice: 1.00; Brain: 0.20"
    assert caption("t2", 0, 0.2, "none", {"age": 54, "sex": None, "TE": 2000000.0, "TR": 4.25}) == \
        "Modality: T2w; Age: 54 y; TR: 4.25 ms; TE: 2000000 ms; Plane: axial; Slice: 0.00; Brain: 0.20; Lesion: none"


@pytest.mark.parametrize(("sign", "side"), [(-1, "left"), (1, "right")])
@pytest.mark.parametrize("codes", ["RAS", "LPS"])
def test_lesion_side_is_the_patients(tmp_path, sign, side, codes):
    """A lesion at world x < 0 is on the patient's left; 6 voxels of 2 x 3 mm are 52 mm2. The head is off the middle."""
    array = np.pad(head(), ((6, 0), (0, 0), (0, 0)))
    labels = np.zeros(array.shape, np.uint8)
    middle = 6 + SHAPE[0] // 2
    labels[middle + 3 * sign:middle + 3 * sign + 2, 7:10, 4] = 4
    affine = AFFINE.copy()
    if codes == "LPS":
        array, labels = array[::-1, ::-1], labels[::-1, ::-1]
        affine = AFFINE @ np.array([[-1, 0, 0, 19], [0, -1, 0, 17], [0, 0, 1, 0], [0, 0, 0, 1]])
    image, seg = save(tmp_path / "p" / "t1.nii", array, affine), save(tmp_path / "p" / "seg.nii", labels, affine)
    slices = load_subject(Subject("p", "p", {"t1": image}, seg), ("t1",), 32)
    assert slices.lesion[4] == f"{side}, 52 mm2" and slices.lesion[3] == "none"


def test_lesion_on_both_sides():
    labels = np.zeros((4, 10))
    labels[0, 2:8] = 1
    assert describe_lesion(labels, 4.5, 2.0) == "both sides, 12 mm2"
    assert describe_lesion(labels, 3.5, 1.0) == "both sides, 6 mm2"  # two thirds are not enough
    assert describe_lesion(labels, 2.5, 1.0) == "left, 6 mm2"
    assert describe_lesion(labels, 6.5, 1.0) == "right, 6 mm2"


def test_prompt():
    meta = {"body": "brain", "site": "Guys", "scanner": "Philips", "field": 1.5, "age": 35.8, "sex": "F",
            "times": {"t2": (8178.34, 100)}}
    assert prompt("t2", meta) == ("Age: 35; Gender: F; Scanner: Philips 1.5T; "
                                  "Description: T2-weighted MRI of the brain, TR 8178 ms, TE 100 ms")
    assert prompt("pd", meta, ("description", "age")) == "Age: 35; Description: PD-weighted MRI of the brain"
    assert prompt("flair", {"body": "brain"}) == \
        "Age: None; Gender: None; Scanner: None; Description: FLAIR MRI of the brain"
    assert prompt("t1", {"field": 3.0}, ("scanner",)) == "Scanner: None" and prompt("t1", {}, ()) == ""
    pelvis = {"scanner": "GE 3T", "scanner_ct": "Siemens", "sex": "M", "body": "pelvis"}
    assert [prompt(c, pelvis, ("scanner", "description")) for c in ("ct", "t1")] == [
        "Scanner: Siemens; Description: CT of the pelvis", "Scanner: GE 3T; Description: T1-weighted MRI of the pelvis"]
    assert prompt("t2", meta, masked=("modality",)) == (
        "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: [MASK] of the brain, TR [MASK] ms, TE [MASK] ms")
    assert prompt("ct", pelvis, ("scanner", "description"), ("modality",)) == "Scanner: [MASK]; Description: [MASK] of the pelvis"
    # What is masked must not tell which scan it is, not even by what is lacking.
    assert prompt("t1", pelvis, ("scanner",), ("modality",)) == "Scanner: [MASK]"
    both = {"scanner": "GE", "field": 3.0, "body": "head", "times": {"t1": (9.6,), "t2": (5726, 8)}}
    assert {prompt(c, both, masked=("modality",)) for c in ("ct", "t1", "t2", "flair")} == {
        "Age: None; Gender: None; Scanner: GE 3T; Description: [MASK] of the head, TR [MASK] ms, TE [MASK] ms"}
    assert prompt("t2", meta, masked=("age", "scanner", "description")) == \
        "Age: [MASK]; Gender: F; Scanner: [MASK]; Description: [MASK]"
    for options, word in (({"fields": ("sex",)}, "no sex"), ({"fields": ("modality",)}, "no modality"),
                          ({"masked": ("TE",)}, "no TE")):
        with pytest.raises(DataError, match=f"{word}; there are age, gender, scanner, description"):
            prompt("t2", meta, **options)


def test_prompts_of_the_data_sets(tmp_path):
    folder = make_ixi(tmp_path / "ixi", IXI_NAMES)
    (folder / "IXI.csv").write_text(HEADER.format(",") + "\n2,2,164,35.8\n")

    def said(contrast):
        return [prompt(contrast, s.meta) for s in find_layout(folder).subjects]
    assert said("t1") == [
        "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: T1-weighted MRI of the brain, TR 9.813 ms, TE 4.603 ms",
        "Age: None; Gender: None; Scanner: Philips 3T; Description: T1-weighted MRI of the brain, TR 9.6 ms, TE 4.6 ms",
        "Age: None; Gender: None; Scanner: GE 1.5T; Description: T1-weighted MRI of the brain"]
    assert said("pd")[1].endswith("PD-weighted MRI of the brain, TR 5726 ms, TE 8 ms")
    (folder / "phantom.json").write_text("{}")  # the protocols of phantoms are others
    assert [text.split("; ", 2)[2] for text in said("t2")] == [
        f"Scanner: {scanner}; Description: T2-weighted MRI of the brain" for scanner in ("Philips 1.5T", "Philips 3T", "GE 1.5T")]
    brats = find_layout(make_set(tmp_path / "brats", subjects=1)).subjects[0]
    assert prompt("t1", brats.meta).endswith("Scanner: None; Description: T1-weighted MRI of the brain")
    assert find_layout(make_adni(tmp_path / "adni")).subjects[0].meta == {"body": "brain"}


def test_prompts_as_the_tokenizer_reads_them():
    """None and [MASK] are tokens, and the numbers are values."""
    split = pytest.importorskip("common.tokenizer").split
    meta = {"scanner": "Philips", "field": 1.5, "body": "brain", "age": 35, "times": {"t2": (8178.34, 100)}}
    text = prompt("t2", meta, masked=("modality",))
    kinds = [piece for piece in split(text) if piece[0] not in ("word", "mark")]
    assert kinds == [("number", "35"), ("none", "none"), ("number", "1.5"), *[("mask", "[mask]")] * 3]
    assert [piece for kind, piece in split(prompt("t2", meta)) if kind == "number"] == ["35", "1.5", "8178", "100"]
