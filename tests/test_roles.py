"""Which file is taken: words of file names, several files for one contrast, files that are no scans, and sheets."""

import json

import nibabel as nib
import numpy as np
import pytest

from data import check, load_subject, read_volume, write_volume
from data.files import DataError
from data.intensities import foreground
from data.layouts import canonical_contrast, find_layout
from data.layouts.records import age_of, sex_of
from data.layouts.words import further_words, kind_of, role_of
from scans import AFFINE, SHAPE, body_ct, head, opened, save

OTHER_GRID = AFFINE + np.array([[0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def make(folder, files, subjects=2):
    """Folders p0, p1, ...; each file is a name, or (name, affine). % stands for the subject's name."""
    for s in range(subjects):
        for i, file in enumerate(files):
            name, affine = file if isinstance(file, tuple) else (file, AFFINE)
            save(folder / f"p{s}" / name.replace("%", f"p{s}"), head(seed=10 * s + i), affine)
    return folder


def used(folder, contrast, **options):
    """The names of the files that are used for a contrast, and the notes."""
    layout = find_layout(folder, **options)
    files = [s.segmentation if contrast == "seg" else s.files.get(contrast) for s in layout.subjects]
    return [path and path.name for path in files], layout.notes


# ---- Words -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "role"), [
    # An agent, and none.
    ("T1-Gd.nii", "t1ce"), ("T1_CE.nii", "t1ce"), ("T1+C.nii", "t1ce"), ("T1C+.nii.gz", "t1ce"), ("T1KM.nii", "t1ce"),
    ("cT1.nii", "t1ce"), ("CT1.nii", None), ("T1 with contrast.nii", "t1ce"), ("T1_without_contrast.nii", "t1"),
    ("T1wPreGd.nii", "t1"), ("T1_noGd.nii", "t1"), ("T1Post.nii", "t1ce"), ("Post-contrast T1.nii", "t1ce"),
    ("T1_post_op.nii", "t1"), ("multi-contrast_T1.nii", "t1"), ("PreContrast.nii", "pre"), ("T1_C_spine.nii", "t1"),
    # FLAIR in two words.
    ("T2-FLAIR.nii", "flair"), ("FLAIR T2.nii", "flair"), ("t2_tirm_tra_dark-fluid.nii", "flair"),
    ("t2_space_dark-fluid_sag.nii", "flair"), ("DarkFluid.nii", "flair"), ("T1_FLAIR.nii", None),
    # Sequences, and words without a separator.
    ("MP2RAGE_UNI.nii", "t1"), ("MP2RAGE_INV1.nii", None), ("VIBE.nii", "t1"), ("VIBE_pre.nii", "pre"),
    ("T2_TFE.nii", "t2"), ("AxialT2.nii", "t2"), ("3DT1.nii", "t1"), ("3DFLAIR.nii", "flair"), ("T1MPRAGE.nii", "t1"),
    ("contrast1.nii", None), ("pCT.nii", None), ("rsfMRI.nii", None), ("Dixon.nii", None), ("ProtonDensity.nii", "pd"),
    # Other kinds of images.
    ("mr.nii", "mr"), ("T1_MR.nii", "t1"), ("cbct.nii", "cbct"), ("Cone-beam CT.nii", "cbct"), ("NCCT.nii", "ct"),
    ("CT_angiography.nii", "cta"), ("DWI_ADC.nii", "adc"), ("18F-AV-45.nii", "av45"), ("CT_soft_tissue.nii", "ct"),
    # What was moved to another scan.
    ("T2_to_T1.nii", "t2"), ("FLAIRtoT1.nii", "flair"), ("T2_in_T1.nii", "t2"), ("rT2.nii", "t2"),
    ("T2_space-T1w.nii", "t2"), ("T2_to_T1InverseWarped.nii", None), ("T1_to_T1ce.nii", "t1"),
    # What is computed from a scan.
    ("T1_seg_FLAIR.nii", "seg"), ("T1_brain_mask.nii", None), ("c1T1.nii", None), ("C1_T1.nii", "t1"),
    ("T1_bias_field.nii", None), ("T1_bias_field_corrected.nii", "t1"), ("T1_1Warp.nii", None), ("T1_map.nii", None),
    ("CT_MIP.nii", None), ("T1_localizer.nii", None), ("y_T1.nii", None), ("iy_T1.nii", None), ("T1_ph.nii", None),
    ("T1_aseg.nii", None), ("T1_mask2.nii", None), ("T1_cropmask.nii", None), ("T1_ROI1.nii", None), ("T1_masked.nii", "t1"),
    ("FLAIR_lesion1.nii", None), ("FLAIR_seg2.nii", "seg"), ("Y_T1_brain.nii", None),
    # Endings.
    ("sub.01.t1.NII.GZ", "t1"), ("t1.nii.gz.nii.gz", "t1"), ("t1.nii(1).gz", "t1"), ("Schädel_T1.nii", "t1"),
])
def test_words(name, role):
    assert role_of(name, "p") == role


@pytest.mark.parametrize(("name", "subject", "role"), [
    ("sub-7_ses-post_T1w.nii", "sub-7", "t1"), ("a_post_T1w.nii", "post", "t1"), ("a_post_T1w.nii", "a_post", "t1"),
    ("a_post_T1w.nii", "a", "t1ce"), ("T1_Gd.nii", "post", "t1ce"), ("post.nii", "post", "post"),
])
def test_post_in_the_name_of_a_session_is_no_agent(name, subject, role):
    assert role_of(name, subject) == role


def test_names_of_contrasts_and_further_words():
    assert [canonical_contrast(name) for name in ("T2-FLAIR", "T1+C", "MRI", "seg")] == ["flair", "t1ce", "mr", "seg"]
    assert [kind_of(name) for name in ("cbct", "mr", "adc")] == ["CT", "MRI", "MRI"]
    assert further_words("a_T1_Gd (2).nii.gz", "a", "t1ce") == ("2",)
    assert further_words("T2_space-T1.nii", "a", "t2") == ("registered",)
    assert further_words("Mu\u0308ller_T1.nii", "M\u00fcller", "t1") == ()  # two forms of one letter
    assert further_words("CTres.nii.gz", "a", "ct") == ("ctres",) and further_words("seg.nii", "a", "seg") == ()


# ---- One of several --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("files", "chosen"), [
    (["FLAIR.nii", "FLAIR_stripped.nii"], "FLAIR.nii"),
    (["%_FLAIR_old.nii", "%_FLAIR.nii"], "%_FLAIR.nii"),
    (["FLAIR_reg.nii", "FLAIR_original.nii"], "FLAIR_reg.nii"),
    ([("FLAIR.nii", OTHER_GRID), "FLAIR_to_T1.nii"], "FLAIR_to_T1.nii"),
    ([("FLAIR.nii", OTHER_GRID), ("FLAIR_reg.nii", OTHER_GRID)], "FLAIR.nii"),
    ([("FLAIR.nii", 2 * OTHER_GRID), ("FLAIR_reg.nii", OTHER_GRID), ("seg.nii", OTHER_GRID)], "FLAIR.nii"),
], ids=["plain", "old", "registered", "grid", "no grid", "grid of a mask"])
def test_one_of_several(tmp_path, files, chosen):
    make(tmp_path, ["T1.nii", *files])
    names, notes = used(tmp_path, "flair")
    assert names == [chosen.replace("%", "p0"), chosen.replace("%", "p1")]
    note, = notes
    assert f"{chosen.replace('%', '*')} is used as flair, not " in note
    assert ", in 2 subjects: p0, p1; to use another one, remove this one or write a manifest.csv" in note


def test_preferred_words(tmp_path):
    make(tmp_path, ["PET.nii", "PET_SUV.nii", "CT.nii"])
    names, notes = used(tmp_path, "pet")
    assert names == ["PET_SUV.nii"] * 2 and notes[0].startswith("PET_SUV.nii is used as pet, not PET.nii, in 2 subjects: p0, p1")


def test_several_names_of_one_contrast(tmp_path):
    make(tmp_path, ["mprage.nii", "t1.nii"])
    assert used(tmp_path, "t1")[0] == ["t1.nii"] * 2


def test_the_choice_is_one_for_all_subjects(tmp_path):
    make(tmp_path, ["T2.nii", "T1_n4.nii"], 3)
    save(tmp_path / "p1" / "T1.nii", head())
    names, notes = used(tmp_path, "t1")
    assert names == ["T1_n4.nii"] * 3
    assert "T1_n4.nii is used as t1, not T1.nii, in 1 subjects: p1" in notes[0]


def test_grids_are_compared_over_all_subjects(tmp_path):
    make(tmp_path, ["T1.nii", "T2.nii", "T2_reg.nii"], 1)
    make(tmp_path / "more", ["T1.nii", ("T2.nii", OTHER_GRID), "T2_reg.nii"], 3)
    assert set(used(tmp_path, "t2")[0]) == {"T2_reg.nii"}


def test_many_choices_are_told_in_two_sentences(tmp_path):
    for s in range(5):
        for series in (301, 302):
            save(tmp_path / f"p{s}" / f"{series + 10 * s}_T1.nii", head(seed=s))
    names, notes = used(tmp_path, "t1")
    assert names == [f"{301 + 10 * s}_T1.nii" for s in range(5)] and len(notes) == 2
    assert notes[1] == "4 more subjects have several files for t1, and one is used: p1, p2, p3, p4"


def test_several_variants_of_all_contrasts_are_one_subject(tmp_path):
    make(tmp_path, [f"{contrast}{end}.nii" for contrast in ("T1", "T2") for end in ("", "_n4", "_bet")])
    assert used(tmp_path, "t2")[0] == ["T2.nii"] * 2


def test_several_masks(tmp_path):
    make(tmp_path, ["T1.nii", "T1_seg.nii", "auto_seg.nii", "seg.nii"])
    names, notes = used(tmp_path, "seg")
    assert names == ["seg.nii"] * 2 and "seg.nii is used as seg, not " in notes[0]


# ---- No scans --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["T2_synth.nii.gz", "T2_synthsr.nii.gz", "fake_T2.nii.gz", "T2_pred.nii.gz", "%_T2_recon.nii.gz", "sCT.nii.gz"])
def test_synthetic_by_name(tmp_path, name):
    make(tmp_path, ["T1.nii.gz", name])
    layout = find_layout(tmp_path)
    assert layout.contrasts == ("t1",) and layout.notes == [
        "2 files are synthetic, as their names or headers say, and are not used: "
        f"{name.replace('%', 'p0')}, {name.replace('%', 'p1')}"]


def test_synthetic_by_header(tmp_path):
    """What we wrote is known, whatever it is called. A phantom stands for a scan, and the subject's name is no word."""
    make(tmp_path, ["T1.nii.gz"], 1)
    save(tmp_path / "fake" / "fake_T1.nii.gz", head(seed=5))
    source = read_volume(tmp_path / "p0" / "T1.nii.gz")
    write_volume(tmp_path / "p0" / "T2.nii.gz", source.array, source, "any method")
    image = nib.Nifti1Image(head(seed=6), AFFINE)
    image.header["descrip"] = b"digital phantom (synthetic)"
    nib.save(image, tmp_path / "p0" / "FLAIR.nii.gz")
    layout = find_layout(tmp_path)
    assert [(s.name, list(s.files)) for s in layout.subjects] == [("fake", ["t1"]), ("p0", ["flair", "t1"])]
    assert "1 files are synthetic, as their names or headers say, and are not used: T2.nii.gz" in layout.notes


def test_copies(tmp_path):
    """A copy is no other scan, in any layout. A file that only looks like a copy is one."""
    make(tmp_path / "a", ["T1.nii.gz", "T1 (1).nii.gz", "T1 - Copy (2).nii.gz", "T2_copy.nii.gz"], 1)
    layout = find_layout(tmp_path / "a")
    assert {c: path.name for c, path in layout.subjects[0].files.items()} == {"t1": "T1.nii.gz", "t2": "T2_copy.nii.gz"}
    assert layout.notes == ["2 files are copies of others, as their names say, and are not used: "
                            "T1 (1).nii.gz, T1 - Copy (2).nii.gz"]
    for contrast, end in (("T1", ""), ("T1", " (1)"), ("T2", ""), ("T2", "_brain")):
        save(tmp_path / "b" / f"IXI-{contrast}" / f"IXI012-HH-1211-{contrast}{end}.nii.gz", head())
    layout = find_layout(tmp_path / "b")
    assert layout.name == "IXI" and [path.name for path in layout.ignored] == ["IXI012-HH-1211-T2_brain.nii.gz"]


def test_copies_in_other_languages_and_hidden_files(tmp_path):
    copies = ["Copy of T1.nii.gz", "T1 - Kopie.nii.gz", "T1_copie (2).nii.gz", "T1~.nii.gz"]
    make(tmp_path, ["T1.nii.gz", *copies, ".T1.nii.gz"], 1)
    names, notes = used(tmp_path, "t1")
    assert names == ["T1.nii.gz"] and notes == [
        "1 system files (._*, .DS_Store, Thumbs.db) ignored",
        f"4 files are copies of others, as their names say, and are not used: {', '.join(copies)}"]


def test_only_synthetic(tmp_path):
    make(tmp_path, ["T1_fake.nii.gz"])
    with pytest.raises(DataError, match=r"holds no real scan.*T1_fake\.nii\.gz; to use them, list them in a manifest"):
        find_layout(tmp_path)
    (tmp_path / "manifest.csv").write_text("subject,modality,path\np0,T1,p0/T1_fake.nii.gz\n")
    assert used(tmp_path, "t1")[0] == ["T1_fake.nii.gz"]


def test_series_of_directions_are_no_contrast(tmp_path):
    make(tmp_path, ["T2.nii", "ADC.nii"])
    for s in (0, 1):
        save(tmp_path / f"p{s}" / "dwi.nii", np.ones((*SHAPE, 3), np.float32))
    layout = find_layout(tmp_path)
    assert layout.contrasts == ("t2", "adc") and [path.name for path in layout.ignored] == ["dwi.nii"] * 2
    save(tmp_path / "p0" / "dwi.nii", head())
    assert "dwi" in find_layout(tmp_path, ("t2", "dwi")).subjects[0].files


def test_cone_beam_ct_is_in_hu(tmp_path):
    for name in ("p0", "p1"):
        for file in ("CBCT", "CT"):
            save(tmp_path / name / f"{file}.nii.gz", body_ct())
    subject = find_layout(tmp_path).subjects[0]
    assert list(subject.files) == ["cbct", "ct"]
    slices = load_subject(subject, ("cbct", "ct"), 20)
    np.testing.assert_array_equal(slices.images[:, 0], slices.images[:, 1])
    assert slices.scales["cbct"] == slices.scales["ct"]
    array = body_ct()
    array[0, 0, 0] = 100  # a table is no body
    assert foreground(array, contrast="cbct").any() and not foreground(array, contrast="cbct")[0, 0, 0]


# ---- nnU-Net and the Decathlon ---------------------------------------------------------------------------------------

def make_nnunet(folder, description, numbers=(0, 1), labels=True):
    for case in ("kidney_7", "kidney_8"):
        for number in numbers:
            save(folder / "imagesTr" / f"{case}_{number:04d}.nii.gz", head(seed=number))
        if labels:
            save(folder / "labelsTr" / f"{case}.nii.gz", (head() > 0).astype(np.uint8))
    (folder / "dataset.json").write_text(description if isinstance(description, str) else json.dumps(description))
    return folder


@pytest.mark.parametrize("description", [
    {"channel_names": {"0": "T2w", "1": "T1 post"}}, {"modality": {"1": "T1c", "0": "T2"}},
], ids=["names", "modality"])
def test_nnunet(tmp_path, description):
    layout = find_layout(make_nnunet(tmp_path, description))
    assert layout.name == "nnU-Net" and layout.contrasts == ("t1ce", "t2") and layout.ignored == []
    assert [s.name for s in layout.subjects] == ["kidney_7", "kidney_8"]
    assert layout.subjects[1].files["t1ce"].name == "kidney_8_0001.nii.gz"
    assert layout.subjects[1].segmentation == tmp_path / "labelsTr" / "kidney_8.nii.gz"
    save(tmp_path / "labelsTr" / "kidney_9.nii.gz", head())
    save(tmp_path / "imagesTs" / "kidney_5_0000.nii.gz", head(seed=9))
    layout = find_layout(tmp_path)
    assert [s.name for s in layout.subjects] == ["kidney_5", "kidney_7", "kidney_8"]
    assert [path.name for path in layout.ignored] == ["kidney_9.nii.gz"]


def test_studies_of_nnunet_keep_their_person(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1"}}))
    for case in ("fdg_0b57b247b6_05-02-2002-NA-PET-CT GK mit KM-42966", "fdg_0b57b247b6_08-11-2003-NA-PET-CT-12345", "K7_v1", "K7_v2"):
        save(tmp_path / "imagesTr" / f"{case}_0000.nii.gz", head())
    layout = find_layout(tmp_path)
    assert [s.person for s in layout.subjects] == ["K7", "K7", "fdg_0b57b247b6", "fdg_0b57b247b6"]
    assert any(note.startswith("4 scans of 2 persons") for note in layout.notes)


@pytest.mark.parametrize(("description", "numbers", "sentence"), [
    ({"channel_names": {"0": "zscore", "1": "T1"}}, (0, 1), r"dataset\.json: calls channel 0 'zscore', which is no contrast"),
    ({"channel_names": {"0": "T1"}}, (0, 1), r"_0001\.nii\.gz: is channel 1, which .*dataset\.json does not name"),
    ("[1", (0,), r"dataset\.json: is missing or does not say what the channels _0000"),
    ({"labels": {}}, (0,), r"dataset\.json: is missing or does not say"),
], ids=["no contrast", "no number", "no json", "no channels"])
def test_bad_nnunet(tmp_path, description, numbers, sentence):
    make_nnunet(tmp_path, description, numbers)
    with pytest.raises(DataError, match=sentence) as caught:
        find_layout(tmp_path)
    assert "\n" not in str(caught.value)


def test_nnunet_without_dataset_json_and_twice(tmp_path):
    make_nnunet(tmp_path / "a", {"channel_names": {"0": "CT", "1": "CT"}})
    layout = find_layout(tmp_path / "a")
    assert layout.contrasts == ("ct",) and "dataset.json: channel 1 is ct again and is not used" in layout.notes
    make_nnunet(tmp_path / "b", {"modality": {"0": "CT"}}, (0,))
    with pytest.raises(DataError, match="holds 2 data sets of nnU-Net, .*a, .*b; give one"):
        find_layout(tmp_path)
    (tmp_path / "b" / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"b/dataset\.json: is missing"):
        find_layout(tmp_path / "b")


def make_decathlon(folder, volumes=2, modality=("T2", "ADC")):
    for case in range(2):
        both = np.stack([head(seed=10 * case + k) for k in range(volumes)], -1)
        save(folder / "imagesTr" / f"prostate_{case:02d}.nii.gz", both)
    (folder / "dataset.json").write_text(json.dumps({"modality": dict(enumerate(modality))}))
    return folder


def test_decathlon(tmp_path):
    folder = make_decathlon(tmp_path / "Task05")
    layout = find_layout(folder)
    assert layout.contrasts == ("t2", "adc") and layout.subjects[1].channels == {"t2": 0, "adc": 1}
    for contrast, seed in (("t2", 10), ("adc", 11)):
        volume = read_volume(layout.subjects[1].files[contrast], channel=layout.subjects[1].channels[contrast])
        np.testing.assert_array_equal(volume.array, head(seed=seed))
        write_volume(tmp_path / f"{contrast}.nii", volume.array, volume, "test")
        assert nib.load(tmp_path / f"{contrast}.nii").shape == SHAPE
    slices = load_subject(layout.subjects[1], ("t2", "adc"), 20)
    assert not np.array_equal(slices.images[:, 0], slices.images[:, 1])
    lines = []
    assert check(folder, say=lines.append), lines
    first = opened(folder)[0].fingerprint
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "ADC", "1": "T2"}}))
    assert opened(folder)[0].fingerprint != first  # the same files, but the channels are exchanged
    make_decathlon(folder, volumes=3)
    with pytest.raises(DataError, match=r"holds 3 volumes, and dataset\.json names 2 channels"):
        find_layout(folder)


# ---- ADNI ------------------------------------------------------------------------------------------------------------

def make_visit(folder, person, series, day, image):
    save(folder / person / series / f"{day}_10_00_00.0" / image / "any.nii", head())


def test_adni_with_pet(tmp_path):
    for person, pet_day in (("005_S_0001", "2015-03-20"), ("005_S_0002", "2015-11-01")):
        make_visit(tmp_path, person, "Accelerated_SAG_IR-SPGR", "2015-03-02", "I1")
        make_visit(tmp_path, person, "Axial_T2-FLAIR", "2015-03-02", "I2")
        make_visit(tmp_path, person, "Coreg,_Avg,_Std_Img_and_Vox_Siz,_Uniform_Resolution", pet_day, "I3")
        make_visit(tmp_path, person, "Axial_rsfMRI__Eyes_Open_", "2015-03-02", "I4")
    make_visit(tmp_path, "005_S_0001", "MPRAGE", "2015-09-30", "I5")
    layout = find_layout(tmp_path, ("t1", "flair", "fdg"))
    assert {s.name: list(s.files) for s in layout.subjects} == {
        "005_S_0001_2015-03-02": ["t1", "flair", "fdg"], "005_S_0001_2015-09-30": ["t1"],
        "005_S_0002_2015-03-02": ["t1", "flair"], "005_S_0002_2015-11-01": ["fdg"]}
    assert ("1 PET were taken up to 18 days before or after the MR and belong to its visit: "
            "005_S_0001_2015-03-20") in layout.notes
    assert len(layout.ignored) == 2
    asked = find_layout(tmp_path, ("t1", "pet"))
    assert list(asked.subjects[0].files) == ["t1", "pet"]
    assert "pet: fdg is used, the only PET there is; as pet it must be in SUV, and as fdg it may have any unit" in asked.notes
    assert "pet" not in find_layout(tmp_path, ("pet", "fdg")).subjects[0].files
    make_visit(tmp_path, "005_S_0001", "AV45_Coreg,_Avg,_Standardized_Image_and_Voxel_Size", "2015-03-02", "I6")
    assert list(find_layout(tmp_path, ("t1", "av45")).subjects[0].files) == ["t1", "av45"]
    assert "pet" not in find_layout(tmp_path, ("t1", "pet")).subjects[0].files  # of two tracers, which one?


# ---- Sheets ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "age"), [
    ("045Y", 45), ("45 years", 45), ("45 y/o", 45), ("45,5", 45.5), ("018M", 1.5), ("26 weeks old", 0.5), (">89", 89),
    ("89+", 89), ("999", None), ("-1", None), ("121", None), ("120", 120), ("forty", None), ("missing", None), ("4 5", None),
])
def test_ages(text, age):
    assert age_of(text) == age


@pytest.mark.parametrize(("text", "sex"), [
    ("M", "M"), ("male", "M"), ("W", "F"), ("FEMALE", "F"), ("f.", "F"), ("other", "O"), ("1", None), ("mixed", None),
])
def test_sexes(text, sex):
    assert sex_of(text) == sex


@pytest.mark.parametrize(("text", "facts", "note"), [
    ("patient,Age (years),Gender\np0,045Y,w\np1,30,Male\n", [{"age": 45, "sex": "F"}, {"age": 30, "sex": "M"}], None),
    ('patient,"sex (0=f, 1=m)"\np0,0\np1,1\n', [{"sex": "F"}, {"sex": "M"}], None),
    ("patient,sex\np0,2\np1,F\n", [{}, {"sex": "F"}],
     "meta.csv: 1 cells of sex are not understood and count as unknown: '2'"),
    ("patient,age\np0,999\np1,0\n", [{}, {}], "meta.csv: 2 cells of age are not understood and count as unknown: '999', '0'"),
    ("patient,age,sex\np0,45,5,M\np1,50,F\n", [{}, {"age": 50, "sex": "F"}],
     "meta.csv: 1 rows have a comma or a quote too many and are not read: 'p0'"),
    ('patient,age,scanner\np0,60,"GE\np1,50,"GE"\n', [{}, {}],
     "meta.csv: 1 rows have a comma or a quote too many and are not read: 'p0'"),
    ("patient,age,remark\np0,45," + "x" * 140_000 + "\np1,50,y\n", [{"age": 45}, {"age": 50}], None),
    ('patient,age,remark\np0,45,"two\nlines, ""quoted"""\np1,50,"y"', [{"age": 45}, {"age": 50}], None),
], ids=["words", "codebook", "no codebook", "no age", "comma", "quote", "long", "two lines"])
def test_patients(tmp_path, text, facts, note):
    make(tmp_path, ["T1.nii"])
    (tmp_path / "meta.csv").write_text(text)
    layout = find_layout(tmp_path)
    assert [s.meta for s in layout.subjects] == facts
    assert note in [None, *layout.notes] and (note or layout.notes == [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "cp1252"])
def test_encodings_of_sheets(tmp_path, encoding):
    make(tmp_path, ["T1.nii"])
    (tmp_path / "meta.csv").write_text("patient;age;scanner\np0;45;Größe\np1;50;A\n", encoding=encoding)
    assert [s.meta for s in find_layout(tmp_path).subjects] == [{"age": 45, "scanner": "Größe"}, {"age": 50, "scanner": "A"}]


def test_open_quote(tmp_path):
    make(tmp_path, ["T1.nii"])
    (tmp_path / "meta.csv").write_text('patient,age\np0,45\np1,"50\np2,60\n')
    layout = find_layout(tmp_path)
    assert [s.meta for s in layout.subjects] == [{}, {}]
    assert "meta.csv, line 3: a quote is opened and never closed" in layout.notes[0]
    (tmp_path / "labels.csv").write_text('subject,label\np0,1\n"p1,0\n')
    with pytest.raises(DataError, match=r"labels\.csv, line 3: a quote is opened and never closed"):
        find_layout(tmp_path)
