"""BIDS and manifests: which file is which scan, and what is known of it."""

import numpy as np
import pytest

import data
from data import check, find_layout, load_subject, prompt, read_volume, record_of, scan_fields, scan_prompt
from data.files import DataError
from data.layouts import role_of
from data.layouts.records import tracer_of
from scans import AFFINE, SHAPE, head, make_bids, make_patients, opened, save, shifted

T1 = "sub-01/anat/sub-01_T1w"
PET = "sub-01/pet/sub-01_pet"


def the_record(folder, contrast="t1", subject=0):
    return find_layout(folder).subjects[subject].records[contrast]


def only_record(tmp_path, sidecar, name=T1, texts=None):
    """The record of a single scan with this sidecar, without the voxel."""
    subject = find_layout(make_bids(tmp_path, {name: sidecar}, texts)).subjects[0]
    (record,) = subject.records.values()
    assert record.pop("voxel") == (2.88, 3, 4)
    return record


# ---- Inheritance -----------------------------------------------------------------------------------------------------

def test_sidecars_are_inherited(tmp_path):
    folder = make_bids(tmp_path, {
        "sub-01/ses-1/anat/sub-01_ses-1_T1w": {"EchoTime": 0.003, "RepetitionTime": None},
        "sub-01/ses-1/anat/sub-01_ses-1_T2w": None,
        "sub-02/anat/sub-02_T1w": None,
        "sub-02/anat/sub-02_acq-fast_T2w": None,
    }, {"T1w.json": {"EchoTime": 0.001, "RepetitionTime": 2, "FlipAngle": 9},
        "sub-01/sub-01_T1w.json": {"EchoTime": 0.002, "InversionTime": 0.9},
        "sub-01/ses-1/sub-01_ses-1_T1w.json": {"MagneticFieldStrength": 3, "InversionTime": 1},
        "sub-01/ses-1/sub-01_ses-2_T1w.json": {"FlipAngle": 99},
        "acq-fast_T2w.json": {"EchoTime": 0.1},
        "sub-03/sub-03_T1w.json": {"FlipAngle": 99}})
    assert the_record(folder) == {"TE": 3, "TR": 2000, "FA": 9, "TI": 1000, "field": 3, "voxel": (2.88, 3, 4)}
    assert the_record(folder, subject=1) == {"TE": 1, "TR": 2000, "FA": 9, "voxel": (2.88, 3, 4)}
    assert the_record(folder, "t2") == {"voxel": (2.88, 3, 4)}  # an acq- sidecar is not for a file without acq
    assert the_record(folder, "t2", 1) == {"TE": 100, "voxel": (2.88, 3, 4)}
    assert not any("BIDS allows" in note for note in find_layout(folder).notes)


def test_two_sidecars_in_one_folder(tmp_path):
    folder = make_bids(tmp_path, {"sub-01/anat/sub-01_run-1_T1w": {"EchoTime": 0.003}},
                       {"sub-01/anat/sub-01_T1w.json": {"EchoTime": 0.004, "FlipAngle": 9}})
    assert the_record(folder) == {"TE": 3, "voxel": (2.88, 3, 4)}
    assert ("BIDS allows one JSON file per folder to hold for a scan, here are two for 1 scans: "
            "e.g. sub-01_run-1_T1w.json is used, not sub-01_T1w.json") in find_layout(folder).notes


@pytest.mark.parametrize("text", ["{", "[1, 2]", "7"])
def test_damaged_sidecars(tmp_path, text):
    folder = make_bids(tmp_path, {T1: None}, {T1 + ".json": text, "T1w.json": {"FlipAngle": 9}})
    assert the_record(folder)["FA"] == 9
    assert "1 JSON files cannot be read and are not used: sub-01_T1w.json" in find_layout(folder).notes


# ---- Values ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("sidecar", "record"), [
    ({"RepetitionTime": 2.3, "EchoTime": 0.00298, "InversionTime": 0.9}, {"TR": 2300, "TE": 2.98, "TI": 900}),
    ({"EchoTime": [0.004, 0.008], "FlipAngle": [5, 7]}, {"TE": 4, "FA": 5}),
    ({"RepetitionTimePreparation": 2.3, "RepetitionTimeExcitation": 0.007}, {"TR": 2300}),
    ({"RepetitionTime": "n/a", "RepetitionTimeExcitation": 0.007}, {"TR": 7}),
    ({"RepetitionTime": 60, "EchoTime": 2, "InversionTime": 20}, {"TR": 60000, "TE": 2000, "TI": 20000}),
    ({"RepetitionTime": 0, "EchoTime": -1, "FlipAngle": "nan", "InversionTime": True}, {}),
    ({"MagneticFieldStrength": 15000}, {"field": 1.5}), ({"MagneticFieldStrength": "3.0"}, {"field": 3}),
    ({"Manufacturer": "GE MEDICAL SYSTEMS", "ManufacturersModelName": "Signa HDxt"}, {"vendor": "GE", "model": "Signa HDxt"}),
    ({"Manufacturer": "SIEMENS HEALTHINEERS"}, {"vendor": "Siemens"}), ({"Manufacturer": "General Electric"}, {"vendor": "GE"}),
    ({"Manufacturer": "Philips Medical Systems"}, {"vendor": "Philips"}), ({"Manufacturer": "United Imaging"}, {"vendor": "UIH"}),
    ({"Manufacturer": "UIH", "ManufacturersModelName": "-"}, {"vendor": "UIH"}), ({"Manufacturer": "n/a"}, {}),
    ({"PatientAge": "061Y", "PatientSex": "F"}, {"age": 61, "sex": "F"}), ({"PatientAge": "018M"}, {"age": 1.5}),
    ({"KVP": 120, "XRayTubeCurrent": 200, "XRayExposure": 50, "ConvolutionKernel": ["H31s", "3"]},
     {"kvp": 120, "ma": 200, "mas": 50, "kernel": "H31s"}),
    ({"XRayTubeVoltage": 100, "ContrastBolusIngredient": "IODINE"}, {"kvp": 100, "agent": "IODINE"}),
    ({"InjectedRadioactivity": 5, "InjectedRadioactivityUnits": "mCi"}, {"dose": 185}),
    ({"InjectedRadioactivity": 370000, "InjectedRadioactivityUnits": "kBq"}, {"dose": 370}),
    ({"InjectedRadioactivity": 0.2, "InjectedRadioactivityUnits": "GBq"}, {"dose": 200}),
    ({"InjectedRadioactivity": 5000, "InjectedRadioactivityUnits": "uCi"}, {"dose": 185}),
    ({"InjectedRadioactivity": 185, "InjectedRadioactivityUnits": "n/a"}, {"dose": 185}),
    ({"InjectedRadioactivity": 1.85e8}, {"dose": 185}), ({"InjectedRadioactivity": 5000}, {"dose": 0.005}),
    ({"InjectedRadioactivity": 3, "InjectedRadioactivityUnits": "MBq/kg"}, {}),
    ({"FrameTimesStart": [0, 300], "FrameDuration": [300, 600], "ReconMethodName": "OSEM"},
     {"start": 0, "duration": 900, "recon": "OSEM"}),
    ({"FrameTimesStart": 1800, "FrameDuration": 600}, {"start": 1800, "duration": 600}),
    ({"FrameDuration": [300, "n/a"]}, {}),
])
def test_values(tmp_path, sidecar, record):
    assert only_record(tmp_path, sidecar) == record


def test_times_that_are_in_ms_already(tmp_path):
    sidecar = {"RepetitionTime": 2300, "EchoTime": 2.98, "InversionTime": 900}
    assert only_record(tmp_path, sidecar) == {"TR": 2300, "TE": 2.98, "TI": 900}
    notes = find_layout(tmp_path).notes
    for field, limit in (("TR", 60), ("TE", 2), ("TI", 20)):
        assert f"{field} is above {limit}, so it is taken as ms and not as s, in 1 scans: sub-01_T1w.nii.gz" in notes


def test_voxel_is_that_of_the_header(tmp_path):
    folder = make_bids(tmp_path, {})
    save(folder / f"{T1}.nii.gz", head(), AFFINE @ np.diag([0.3333, 1, -1, 1]))
    (folder / "sub-01/anat/sub-01_T2w.nii.gz").write_bytes(b"broken")
    assert the_record(folder)["voxel"] == (0.96, 3, 4)
    assert the_record(folder, "t2") == {}  # the file is found damaged when it is read


@pytest.mark.parametrize(("table", "facts"), [
    ("participant_id\tsex\tage\nsub-01\tM\t61\n", {"age": 61, "sex": "M"}),
    ("participant_id\tage\tgender\n01\t89+\tfemale\n", {"age": 89, "sex": "F"}),
    ("participant_id\tage\tsex\nsub-01\tn/a\tunknown\n", {}), ("participant_id\tage\tsex\nsub-01\t-\tOther\n", {"sex": "O"}),
    ("participant_id\tage\tsex\nsub-02\t61\tM\n", {}), ("participant_id\tage\nsub-01\n", {}), ("id\tage\nsub-01\t5\n", {}),
])
def test_participants(tmp_path, table, facts):
    assert only_record(tmp_path, None, texts={"participants.tsv": table}) == facts
    assert {key: find_layout(tmp_path).subjects[0].meta.get(key) for key in facts} == facts


def test_missing_participants(tmp_path):
    assert only_record(tmp_path, {"PatientAge": "050Y"}) == {"age": 50}
    assert any("there is no participants.tsv" in note for note in find_layout(tmp_path).notes)
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t61\n")
    assert the_record(tmp_path)["age"] == 61  # the table is right, the sidecar may be a converter's guess
    assert not any("there is no participants.tsv" in note for note in find_layout(tmp_path).notes)


def test_sessions(tmp_path):
    folder = make_bids(tmp_path, {f"sub-0{s}/{ses}/anat/sub-0{s}_{ses}_{suffix}": None for s in (1, 2)
                                  for ses in ("ses-pre", "ses-post") for suffix in ("T1w", "T2w")},
                       {"participants.tsv": "participant_id\tage\tsex\nsub-01\t60\tF\nsub-02\t70\tM\n",
                        "sub-01/sub-01_sessions.tsv": "session_id\tage\nses-pre\tn/a\npost\t64\n"})
    layout = find_layout(folder)
    assert layout.name == "BIDS" and layout.contrasts == ("t1", "t2")
    assert [(s.name, s.person, s.meta["age"], s.records["t2"]["age"], s.meta["sex"]) for s in layout.subjects] == [
        ("sub-01_ses-post", "sub-01", 64, 64, "F"), ("sub-01_ses-pre", "sub-01", 60, 60, "F"),
        ("sub-02_ses-post", "sub-02", 70, 70, "M"), ("sub-02_ses-pre", "sub-02", 70, 70, "M")]
    assert layout.subjects[0].files["t1"] == folder / "sub-01/ses-post/anat/sub-01_ses-post_T1w.nii.gz"


# ---- Contrasts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("place", "contrast"), [
    ("anat/sub-01_T1w", "t1"), ("anat/sub-01_T2w", "t2"), ("anat/sub-01_FLAIR", "flair"), ("anat/sub-01_PDw", "pd"),
    ("anat/sub-01_PD", "pd"), ("anat/sub-01_T2starw", "t2star"), ("anat/sub-01_T2star", "t2star"),
    ("anat/sub-01_ce-gadolinium_T1w", "t1ce"), ("anat/sub-01_ce-gd_FLAIR", "flair"), ("swi/sub-01_swi", "swi"),
    ("anat/sub-01_part-mag_swi", "swi"), ("ct/sub-01_ct", "ct"), ("anat/sub-01_ct", "ct"), ("pet/sub-01_trc-FDG_pet", "fdg"),
    ("anat/sub-01_echo-1_T2starw", "t2star"), ("pet/sub-01_pet", "pet"), ("pet/sub-01_acq-av45_pet", "av45"),
    ("pet/sub-01_acq-static_pet", "pet"),
])
def test_contrasts(tmp_path, place, contrast):
    subject = find_layout(make_bids(tmp_path, {f"sub-01/{place}": None})).subjects[0]
    assert subject.files == {contrast: tmp_path / f"sub-01/{place}.nii.gz"} and subject.name == "sub-01"
    assert subject.records[contrast].get("agent") == ({"t1ce": "gadolinium", "flair": "gd"} if "_ce-" in place else {}).get(contrast)


@pytest.mark.parametrize("place", [
    "anat/sub-01_part-phase_T2starw", "anat/sub-01_echo-2_T2starw", "anat/sub-01_inv-1_T1w", "anat/sub-01_flip-1_T1w",
    "anat/sub-01_T2starmap", "anat/sub-01_UNIT1", "anat/sub-01_mod-T1w_defacemask", "anat/sub-01_T1w_seg-manual",
    "anat/sub-01_angio", "anat/sub-01_inplaneT1", "func/sub-01_task-rest_bold", "anat/sub-01_space-T1w_desc-brain_mask",
])
def test_other_images_are_ignored(tmp_path, place):
    layout = find_layout(make_bids(tmp_path, {T1: None, f"sub-01/{place}": None}))
    assert layout.ignored == [tmp_path / f"sub-01/{place}.nii.gz"] and list(layout.subjects[0].files) == ["t1"]


@pytest.mark.parametrize(("text", "tracer"), [
    ("FDG", ("FDG", "fdg")), ("18FFDG", ("FDG", "fdg")), ("[18F]FDG", ("FDG", "fdg")), ("F-18 Fluorodeoxyglucose", ("FDG", "fdg")),
    ("FDG -- fluorodeoxyglucose", ("FDG", "fdg")), ("AV-45", ("AV45", "av45")), ("[18F]AV45", ("AV45", "av45")),
    ("Florbetapir", ("AV45", "av45")), ("PiB", ("PIB", "pib")), ("[11C]PIB", ("PIB", "pib")), ("AV-1451", ("AV1451", "tau")),
    ("flortaucipir", ("AV1451", "tau")), ("T807", ("AV1451", "tau")), ("18FFBB", ("FBB", "fbb")),
    ("florbetaben", ("FBB", "fbb")), ("RO154513", ("RO154513", "pet")), ("n/a", (None, "pet")), (None, (None, "pet")),
])
def test_tracers(text, tracer):
    assert tracer_of(text) == tracer


def test_where_a_tracer_is_told(tmp_path):
    makes = {"sub-01/pet/sub-01_trc-AV45_pet": {"TracerName": "FDG", "Radiopharmaceutical": "PIB"},
             "sub-02/pet/sub-02_trc-AV45_pet": {"TracerName": "F18", "Radiopharmaceutical": "PIB"},
             "sub-03/pet/sub-03_pet": {"Radiopharmaceutical": "PIB"}, "sub-04/pet/sub-04_trc-RO15_pet": None}
    layout = find_layout(make_bids(tmp_path, makes), ("fdg", "av45", "pib", "pet"))
    found = [(*s.files, *(record["tracer"] for record in s.records.values())) for s in layout.subjects]
    assert found == [("fdg", "FDG"), ("av45", "AV45"), ("pib", "PIB"), ("pet", "RO15")]
    assert "the tracer is RO15, so the PET is read in SUV, in 1 scans: sub-04_trc-RO15_pet.nii.gz" in layout.notes


@pytest.mark.parametrize(("name", "role"), [
    ("PET_FDG.nii.gz", "fdg"), ("FDG_PET.nii", "fdg"), ("fdg.nii", "fdg"), ("AV-45.nii", "av45"), ("florbetapir_pet.nii", "av45"),
    ("AV1451.nii", "tau"), ("av-1451_pet.nii", "tau"), ("tau.nii", "tau"), ("flortaucipir.nii", "tau"), ("PIB.nii", "pib"),
    ("pet_fbb.nii", "fbb"), ("SWI.nii", "swi"), ("PET.nii", "pet"), ("fdg_ct.nii", None), ("fdg_av45.nii", None),
])
def test_words_of_plain_folders(name, role):
    assert role_of(name, "p1") == role


def test_brain_pet_of_plain_folders_is_scaled_like_mr(tmp_path):
    for s in range(2):
        save(tmp_path / f"p{s}" / "FDG_PET.nii.gz", 200 * head(seed=s))  # far above what SUV can be
        save(tmp_path / f"p{s}" / "T1.nii.gz", head(seed=5 + s))
    layout = find_layout(tmp_path, ("t1", "florbetapir", "fdg"))
    assert layout.contrasts == ("t1", "av45", "fdg") and find_layout(tmp_path).contrasts == ("t1", "fdg")
    slices = load_subject(layout.subjects[0], ("t1", "fdg"), 20)
    assert slices.images[:, 1].max() == 1 and slices.scales["fdg"].background == 0
    assert 200 * 190 < slices.scales["fdg"].high < 200 * 200


# ---- Which scan is used ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("names", "best"), [
    (("acq-b_run-2", "acq-c_run-10", "acq-a_run-3"), 0),  # numbers, not letters
    (("acq-z", "acq-a_run-1"), 0),
    (("acq-flat", "acq-z"), 1), (("acq-large", "acq-z"), 1),
    (("acq-flat_run-1", "acq-z_run-2"), 0), (("acq-flat", "acq-large"), 1), (("acq-b", "acq-a"), 1),
])
def test_choice_of_a_scan(tmp_path, names, best):
    for seed, name in enumerate(names):
        path = f"sub-01/anat/sub-01_{name}_T1w"
        make_bids(tmp_path, {path: {"MRAcquisitionType": "2D" if "flat" in name else "3D"}})
        save(tmp_path / f"{path}.nii.gz", head(seed=seed), AFFINE * (2 if "large" in name else 1))
    layout = find_layout(tmp_path)
    assert layout.subjects[0].files["t1"].name == f"sub-01_{names[best]}_T1w.nii.gz"
    assert any(f"{len(names) - 1} scans repeat a contrast of their session and are not used: e.g. sub-01_{names[best]}_T1w.nii.gz "
               "is used, not sub-01_" in note for note in layout.notes)


# ---- PET of several frames -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("seconds", "weights", "why"), [
    ([60, 180], (0.25, 0.75), "their mean is used, weighted by duration"),
    ([60, 180, 60], (0.5, 0.5), "their plain mean is used, because there are 3 durations"),
    (None, (0.5, 0.5), "their plain mean is used, because no durations are known"),
    ([60, 0], (0.5, 0.5), "their plain mean is used, because no durations are known"),
])
def test_frames_are_averaged(tmp_path, seconds, weights, why):
    sidecar = {"TracerName": "FDG"} if seconds is None else {"TracerName": "FDG", "FrameDuration": seconds}
    first, second = head(seed=1), head(seed=2)
    for s in (1, 2):
        folder = make_bids(tmp_path / "set", {f"sub-0{s}/pet/sub-0{s}_pet": sidecar})
        save(folder / f"sub-0{s}/pet/sub-0{s}_pet.nii.gz", s * np.stack([first, second], -1))
    subject = find_layout(folder).subjects[0]
    assert subject.frames == {"fdg": tuple(seconds) if seconds and 0 not in seconds else ()}
    volume = data.subject.read_scan(subject, "fdg")
    np.testing.assert_allclose(volume.array, weights[0] * first + weights[1] * second, rtol=1e-6)
    assert volume.notes == [f"has 2 frames; {why}"]
    data.write_volume(tmp_path / "out.nii.gz", volume.array, volume, "mean")
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii.gz").array, volume.array)
    assert subject.records["fdg"].get("duration") == (sum(seconds) if subject.frames["fdg"] else None)
    with pytest.raises(DataError, match=r"is 4-D with shape \(14, 18, 9, 2\)"):
        read_volume(subject.files["fdg"])
    assert read_volume(subject.files["fdg"], head().size, frames=()).array.shape == SHAPE  # the limit is for one frame
    with pytest.raises(DataError, match="has 2268 voxels"):
        read_volume(subject.files["fdg"], head().size - 1, frames=())


def test_durations_belong_to_a_data_set(tmp_path):
    for s in (1, 2):
        folder = make_bids(tmp_path / "set", {f"sub-0{s}/pet/sub-0{s}_trc-FDG_pet": None})
        save(folder / f"sub-0{s}/pet/sub-0{s}_trc-FDG_pet.nii.gz", s * np.stack([head(seed=s), head(seed=2 + s)], -1))
    plain = opened(folder)[0]
    (folder / "pet.json").write_text('{"FrameDuration": [60, 180]}')
    weighted = opened(folder)[0]
    assert plain.fingerprint != weighted.fingerprint == opened(folder)[0].fingerprint
    assert np.abs(plain.images[:] - weighted.images[:]).max() > 0.05


def test_frames_of_another_pet_serve_as_grid(tmp_path):
    """The place in space of a PET of several frames is known without its voxels."""
    path = save(tmp_path / "pet.nii.gz", np.stack([head(), head()], -1))
    assert data.picture_of(path).pixels == SHAPE[:2]
    assert data.volumes.read_geometry(path, series=True).header.get_data_shape() == SHAPE


# ---- Derivatives and roots -------------------------------------------------------------------------------------------

RAW = {T1: {"EchoTime": 0.003, "FlipAngle": 9}, "sub-01/anat/sub-01_T2w": {"EchoTime": 0.1}}
TABLE = {"participants.tsv": "participant_id\tage\nsub-01\t61\nsub-02\t62\n", "T1w.json": {"RepetitionTime": 2}}
DERIVED = "derivatives/reg/sub-01/anat/sub-01_"


def test_derivative(tmp_path):
    folder = make_bids(tmp_path, {**RAW, f"{DERIVED}space-T1w_desc-brain_T1w": {"FlipAngle": 8, "SkullStripped": True},
                                  f"{DERIVED}space-T1w_desc-preproc_T1w": None, f"{DERIVED}space-T1w_T2w": None,
                                  f"{DERIVED}space-MNI_desc-brain_T1w": None, f"{DERIVED}desc-brain_mask": None},
                       {**TABLE, "derivatives/reg/dataset_description.json": {"DatasetType": "derivative"}})
    raw = find_layout(folder)
    assert raw.name == "BIDS" and raw.ignored == [] and len(raw.subjects) == 1
    assert raw.subjects[0].files == {"t1": folder / f"{T1}.nii.gz", "t2": folder / "sub-01/anat/sub-01_T2w.nii.gz"}
    assert (f"derivatives are not read together with raw scans (reg); to use one, give {folder}/derivatives/NAME as the "
            "data folder") in raw.notes
    layout = find_layout(folder / "derivatives" / "reg")
    assert layout.name == "BIDS derivative" and [path.name for path in layout.ignored] == ["sub-01_desc-brain_mask.nii.gz"]
    assert {c: path.name for c, path in layout.subjects[0].files.items()} == {
        "t1": "sub-01_space-T1w_desc-brain_T1w.nii.gz", "t2": "sub-01_space-T1w_T2w.nii.gz"}
    assert layout.subjects[0].records["t1"] == {"TE": 3, "TR": 2000, "FA": 8, "age": 61, "voxel": (2.88, 3, 4)}
    assert layout.subjects[0].records["t2"]["TE"] == 100
    assert "scans in the space of T1w are used, and those of MNI are not" in layout.notes
    assert find_layout(folder / "derivatives").subjects[0].records == layout.subjects[0].records  # the only one there


def test_space_of_most_scans(tmp_path):
    names = ("T1w", "space-MNI_T1w", "space-MNI_T2w", "space-MNI_desc-brain_T2w")
    folder = make_bids(tmp_path, {f"sub-01/anat/sub-01_{name}": None for name in names} | {"sub-02/anat/sub-02_T1w": None,
                       "sub-03/anat/sub-03_space-MNI_T1w": None})
    layout = find_layout(folder)
    assert [s.name for s in layout.subjects] == ["sub-01", "sub-03"]
    assert {c: path.name for c, path in layout.subjects[0].files.items()} == {
        "t1": "sub-01_space-MNI_T1w.nii.gz", "t2": "sub-01_space-MNI_desc-brain_T2w.nii.gz"}


def test_scans_without_space_are_in_that_of_t1(tmp_path):
    """fMRIPrep writes T1w without the entity space, and other contrasts with space-T1w."""
    names = ("desc-preproc_T1w", "space-T1w_T2w", "space-MNI_T1w")
    layout = find_layout(make_bids(tmp_path, {f"sub-01/anat/sub-01_{name}": None for name in names}))
    assert [path.name for path in layout.subjects[0].files.values()] == ["sub-01_desc-preproc_T1w.nii.gz", "sub-01_space-T1w_T2w.nii.gz"]


def test_root_of_the_data_set(tmp_path):
    make_bids(tmp_path / "a", {T1: None, "copies/sub-09/anat/sub-09_T1w": None, "sourcedata/x/sub-08/anat/sub-08_T1w": None})
    layout = find_layout(tmp_path / "a")
    assert [s.name for s in layout.subjects] == ["sub-01"]
    assert layout.ignored == [tmp_path / "a/copies/sub-09/anat/sub-09_T1w.nii.gz"]
    make_bids(tmp_path / "one" / "deep", RAW, TABLE)
    assert find_layout(tmp_path / "one").subjects[0].records["t1"]["age"] == 61
    make_bids(tmp_path / "two" / "x", RAW)
    make_bids(tmp_path / "two" / "y", RAW)
    assert [(s.name, s.person) for s in find_layout(tmp_path / "two").subjects] == [
        ("x/sub-01", "x/sub-01"), ("y/sub-01", "y/sub-01")]
    make_bids(tmp_path / "again" / "raw", RAW)
    make_bids(tmp_path / "again" / "processed", RAW)
    assert [s.person for s in find_layout(tmp_path / "again").subjects] == ["sub-01"] * 2
    make_bids(tmp_path / "raw" / "derivatives" / "x", RAW)
    make_bids(tmp_path / "raw" / "derivatives" / "y", RAW)
    with pytest.raises(DataError, match="derivatives: holds 2 BIDS derivatives, x, y; give one of them"):
        find_layout(tmp_path / "raw" / "derivatives")


def test_sub_folders_without_anat_are_plain(tmp_path):
    for name in ("sub-01", "sub-02"):
        save(tmp_path / name / f"{name}_T1w.nii.gz", head())
    (tmp_path / "dataset_description.json").write_text("{}")
    assert find_layout(tmp_path).name == "one folder per subject"


# ---- Grids -----------------------------------------------------------------------------------------------------------

def test_scans_are_resampled_to_the_grid_of_t1(tmp_path):
    """A bright box stays at its place in the world although T2 has other voxels and FLAIR comes first in the list."""
    folder = make_bids(tmp_path, {"sub-01/anat/sub-01_FLAIR": None})
    base = np.where(head() > 0, 100, 0).astype(np.float32)
    t1, t2 = base.copy(), base.repeat(2, 2)
    t1[5:8, 8:11, 4] = t2[5:8, 8:11, 8:10] = 300
    fine = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, -0.25], [0, 0, 0, 1]])
    save(folder / f"{T1}.nii.gz", t1)
    save(folder / "sub-01/anat/sub-01_T2w.nii.gz", t2, fine)
    save(folder / "sub-01/anat/sub-01_FLAIR.nii.gz", t2, fine)
    layout = find_layout(folder)
    assert layout.contrasts == ("flair", "t1", "t2")
    slices = load_subject(layout.subjects[0], layout.contrasts, 20)
    assert slices.reference.array.shape == SHAPE
    for channel in range(3):
        np.testing.assert_array_equal(slices.images[:, channel] > 0.6, slices.images[:, 1] > 0.6)
    assert (slices.images[4, 1] > 0.6).sum() == 9
    save(folder / f"{T1}.nii.gz", t1, shifted(AFFINE, (30, 0, 0)))
    with pytest.raises(DataError, match=r"FLAIR\.nii\.gz: lies outside the box of .*T1w\.nii\.gz; register the two"):
        load_subject(layout.subjects[0], layout.contrasts, 20)


def test_pairs_without_t1_keep_their_grid(tmp_path):
    makes = {"sub-01/ct/sub-01_ct": None, PET: None}
    assert find_layout(make_bids(tmp_path, makes)).subjects[0].grid == ("pet",)
    make_bids(tmp_path, {T1: None})
    assert find_layout(tmp_path, ("ct", "pet")).subjects[0].grid == ("pet",)
    assert find_layout(tmp_path, ("ct", "pet", "t1")).subjects[0].grid == ("t1",)


# ---- Prompts ---------------------------------------------------------------------------------------------------------

MR_RECORD = {"age": 61.0, "sex": "F", "field": 3.0, "vendor": "Siemens", "model": "Prisma", "voxel": (1.0, 0.98, 4.0),
             "TR": 2300.0, "TE": 2.98, "TI": 900.0, "FA": 9.0}
PET_RECORD = {"tracer": "FDG", "age": 61, "sex": "M", "vendor": "GE", "model": "Discovery MI", "voxel": (2, 2, 3), "dose": 185.5,
              "start": 0.0, "duration": 1e6, "recon": "OSEM"}
CT_RECORD = {"age": 0.5, "sex": "O", "vendor": "UIH", "model": "uCT 760", "voxel": (0.5, 0.5, 5), "kvp": 120.0, "ma": 1e-5,
             "kernel": "H31s", "agent": "IODINE"}


@pytest.mark.parametrize(("contrast", "record", "text"), [
    ("t1", MR_RECORD, "Modality: T1w; Age: 61 y; Sex: F; Scanner: 3 T Siemens Prisma; Voxel: 1 x 0.98 x 4 mm; TR: 2300 ms; "
                      "TE: 2.98 ms; TI: 900 ms; FA: 9 deg"),
    ("t1ce", {"TE": 1234567.0, "vendor": "GE"}, "Modality: T1CE; Age: None; Sex: None; Scanner: None GE None; Voxel: None; "
                                                "TR: None; TE: 1234570 ms; TI: None; FA: None"),
    ("swi", {}, "Modality: SWI; Age: None; Sex: None; Scanner: None None None; Voxel: None; TR: None; TE: None; TI: None; FA: None"),
    ("ct", CT_RECORD, "Modality: CT; Age: 0.5 y; Sex: O; Scanner: UIH uCT 760; Voxel: 0.5 x 0.5 x 5 mm; Tube: 120 kVp; "
                      "Current: 0.00001 mA; Kernel: H31s; Contrast: IODINE"),
    ("ct", {}, "Modality: CT; Age: None; Sex: None; Scanner: None None; Voxel: None; Tube: None; Current: None; Kernel: None; "
               "Contrast: None"),
    ("fdg", PET_RECORD, "Modality: PET; Tracer: FDG; Age: 61 y; Sex: M; Scanner: GE Discovery MI; Voxel: 2 x 2 x 3 mm; "
                        "Dose: 185.5 MBq; Start: 0 s; Duration: 1000000 s; Recon: OSEM"),
    ("tau", {}, "Modality: PET; Tracer: AV1451; Age: None; Sex: None; Scanner: None None; Voxel: None; Dose: None; Start: None; "
                "Duration: None; Recon: None"),
    ("pet", {}, "Modality: PET; Tracer: None; Age: None; Sex: None; Scanner: None None; Voxel: None; Dose: None; Start: None; "
                "Duration: None; Recon: None"),
])
def test_scan_prompt(contrast, record, text):
    assert scan_prompt(contrast, record) == text


def test_scan_prompt_without_fields():
    assert scan_prompt("t1", MR_RECORD, ("TE", "TI", "age", "field", "dose")) == (
        "Modality: T1w; Age: None; Sex: F; Scanner: None Siemens Prisma; Voxel: 1 x 0.98 x 4 mm; TR: 2300 ms; TE: None; TI: None; "
        "FA: 9 deg")
    assert "Tracer: None; Age: 61 y" in scan_prompt("fdg", PET_RECORD, ("tracer",)) and MR_RECORD["TE"] == 2.98
    assert scan_fields("flair") == ("age", "sex", "field", "vendor", "model", "voxel", "TR", "TE", "TI", "FA")
    assert scan_fields("av45")[:2] == ("tracer", "age") and "kvp" in scan_fields("cta")
    for contrast in data.layouts.CONTRASTS:
        everything = scan_prompt(contrast, {}, scan_fields(contrast))
        assert everything.startswith("Modality: ") and everything.count("None") == len(scan_fields(contrast))
    with pytest.raises(DataError, match="there is no field modality; there are age, sex, field, vendor"):
        scan_prompt("t1", MR_RECORD, ("modality", "TR"))


def test_prompts_of_metadb(tmp_path):
    three = {"Manufacturer": "Siemens", "MagneticFieldStrength": 3, "RepetitionTime": 2.3, "EchoTime": 0.003,
             "BodyPartExamined": "BRAIN"}
    folder = make_bids(tmp_path, {
        "sub-01/anat/sub-01_T1w": three, "sub-01/ct/sub-01_ct": {"Manufacturer": "Siemens", "BodyPartExamined": "HEAD"},
        "sub-02/anat/sub-02_T1w": three, "sub-02/ct/sub-02_ct": {"Manufacturer": "GE"},
        "sub-03/anat/sub-03_T1w": {**three, "BodyPartExamined": "CSPINE"},
        "sub-03/anat/sub-03_T2w": {**three, "MagneticFieldStrength": 1.5, "BodyPartExamined": "CSPINE", "EchoTime": None}},
        {"participants.tsv": "participant_id\tage\tsex\nsub-01\t61\tF\n"})
    one, two, spine = (subject.meta for subject in find_layout(folder, ("t1", "t2", "ct")).subjects)
    assert one == {"age": 61, "sex": "F", "body": "brain", "scanner": "Siemens", "field": 3, "times": {"t1": (2300, 3)}}
    assert prompt("t1", one) == ("Age: 61; Gender: F; Scanner: Siemens 3T; Description: T1-weighted MRI of the brain, "
                                 "TR 2300 ms, TE 3 ms")
    assert prompt("ct", one, ("scanner",)) == "Scanner: Siemens"  # a CT has no field
    assert two == {"body": "brain", "scanner_t1": "Siemens", "scanner_ct": "GE", "field": 3, "times": {"t1": (2300, 3)}}
    assert spine == {"body": "spine", "scanner": "Siemens", "times": {"t1": (2300, 3)}}


def test_records(tmp_path):
    sheet = "patient,age,sex,scanner,scanner_ct\np1,61,F,Philips,GE\n"
    (plain,) = find_layout(make_patients(tmp_path / "plain", ("p1",), "meta.csv", sheet)).subjects
    plain.meta.update(field=1.5, times={"t2": (3000, 90)})
    assert record_of(plain, "t2") == {"age": 61, "sex": "F", "vendor": "Philips", "field": 1.5, "TR": 3000, "TE": 90}
    assert record_of(plain, "ct") == {"age": 61, "sex": "F", "vendor": "GE"}
    folder = make_bids(tmp_path / "bids", {T1: {"Manufacturer": "GE", "EchoTime": 0.003}}, TABLE)
    (subject,) = find_layout(folder).subjects
    record = record_of(subject, "t1")
    assert record == {"vendor": "GE", "TR": 2000, "TE": 3, "age": 61, "voxel": (2.88, 3, 4)}
    record["TE"] = 5
    assert record_of(subject, "t1")["TE"] == 3  # a copy
    assert record_of(subject, "t2") == {"age": 61}  # of a scan that is not there, only the person is known


# ---- Manifests -------------------------------------------------------------------------------------------------------

def manifest(folder, text):
    for s in range(3):
        save(folder / "scans" / f"{s}.nii.gz", head(seed=s))
    save(folder / "mask.nii.gz", (head() > 0).astype(np.uint8))
    (folder / "manifest.csv").write_text(text, encoding="utf-8")
    return folder


def test_manifest(tmp_path):
    folder = manifest(tmp_path, "subject,Session,modality,path,mask,age,sex,vendor,tracer,TR,te,voxel,dose,colour\n"
                                "anna,1,T1w,scans/0.nii.gz,mask.nii.gz,61,female,SIEMENS,,2300,2.98,,,red\n"
                                "anna,1,PET,scans\\1.nii.gz,,61,F,GE,[18F]FDG,,n/a,1 x 1 x 4,185,\n"
                                "\n"
                                "bob,,florbetapir,scans/2.nii.gz,,,,,,,,,,\n")
    layout = find_layout(folder, every=True)
    assert layout.name == "manifest.csv" and layout.contrasts == ("t1", "fdg", "av45")
    anna, bob = layout.subjects
    assert (anna.name, anna.person, bob.name, bob.person) == ("anna_1", "anna", "bob", "bob")
    assert anna.files == {"t1": folder / "scans/0.nii.gz", "fdg": folder / "scans/1.nii.gz"}
    assert anna.segmentation == folder / "mask.nii.gz" and bob.segmentation is None and anna.grid == ("t1",)
    assert anna.records == {
        "t1": {"age": 61, "sex": "F", "vendor": "Siemens", "TR": 2300, "TE": 2.98, "voxel": (2.88, 3, 4)},
        "fdg": {"age": 61, "sex": "F", "vendor": "GE", "tracer": "FDG", "dose": 185, "voxel": (1, 1, 4)}}
    assert bob.records == {"av45": {"tracer": "AV45", "voxel": (2.88, 3, 4)}}
    assert anna.meta == {"age": 61, "sex": "F", "scanner_t1": "Siemens", "scanner_fdg": "GE", "times": {"t1": (2300, 2.98)}}
    assert "manifest.csv: the columns colour are not known and not read" in layout.notes and layout.ignored == []


def test_manifest_of_frames(tmp_path):
    folder = manifest(tmp_path, "subject,modality,path\nanna,FDG,scans/0.nii.gz\n")
    save(folder / "scans" / "0.nii.gz", np.stack([head(), 3 * head()], -1))
    (subject,) = find_layout(folder).subjects
    assert subject.frames == {"fdg": ()}
    np.testing.assert_allclose(data.subject.read_scan(subject, "fdg").array, 2 * head())


@pytest.mark.parametrize(("text", "sentence"), [
    ("subject,path\na,scans/0.nii.gz\n", r"manifest\.csv: has no column modality; its first line must be"),
    ("subject,modality,path\n", r"manifest\.csv: has no rows; write one for each scan"),
    ("subject,modality,path\n,T1w,scans/0.nii.gz\n", "line 2: names no subject; fill the column subject"),
    ("subject,modality,path\na,T9,scans/0.nii.gz\n", "line 2: T9 is no modality; write one of flair, t1"),
    ("subject,modality,path\na,,scans/0.nii.gz\n", "line 2: nothing is no modality"),
    ("subject,modality,path\na,T1w,scans/9.nii.gz\n", r"line 2: scans/9\.nii\.gz does not exist in .*; correct the path"),
    ("subject,modality,path\na,T1w,manifest.csv\n", r"line 2: manifest\.csv is no \.nii or \.nii\.gz file"),
    ("subject,modality,path\na,T1w,\n", "line 2: an empty path is no .nii"),
    ("subject,modality,path\na,T1w,scans/0.nii.gz\na,t1,scans/1.nii.gz\n", r"line 3: a has another t1 in an earlier line, 0\.nii"),
    ("subject,modality,path,TE\na,T1w,scans/0.nii.gz,short\n", "line 2: the TE is 'short'; write a number, or leave"),
    ("subject,modality,path,voxel\na,T1w,scans/0.nii.gz,1 x 2\n", "line 2: the voxel is '1 x 2'; write three numbers"),
    ("subject,modality,path,sex\na,T1w,scans/0.nii.gz,x\n", "line 2: the sex is 'x'; write M, F or O"),
    ("subject,modality,path,mask\na,T1w,scans/0.nii.gz,no.nii\n", r"line 2: no\.nii does not exist"),
    ("subject,modality,path,mask\na,T1w,scans/0.nii.gz,mask.nii.gz\na,T2w,scans/1.nii.gz,scans/2.nii.gz\n",
     r"line 3: a has another mask in an earlier line, mask\.nii\.gz"),
])
def test_errors_in_a_manifest(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence) as error:
        find_layout(manifest(tmp_path, text))
    assert "\n" not in str(error.value) and str(tmp_path / "manifest.csv") in str(error.value)


# ---- Which contrasts are used, and --check ---------------------------------------------------------------------------

def study(folder):
    scans = {}
    for s in range(1, 6):
        scans[f"sub-0{s}/anat/sub-0{s}_T1w"] = {"EchoTime": 0.003}
    for s in (1, 2):
        scans[f"sub-0{s}/anat/sub-0{s}_T2w"] = {"EchoTime": 0.1} if s == 1 else None
    for s in (1, 3):
        scans[f"sub-0{s}/pet/sub-0{s}_trc-FDG_pet"] = None
    return make_bids(folder, {**scans, "sub-01/swi/sub-01_swi": None}, TABLE)


def test_every_contrast_of_two_subjects(tmp_path):
    folder = study(tmp_path)
    assert find_layout(folder).contrasts == ("t1",)
    layout = find_layout(folder, every=True)
    assert layout.contrasts == ("t1", "t2", "fdg") and len(layout.subjects) == 5
    assert "swi: in 1 of 5 subjects only, not used unless asked for" in layout.notes
    assert find_layout(folder, ("t1", "swi"), every=True).contrasts == ("t1", "swi")


def test_check_tells_what_is_known(tmp_path):
    folder = study(tmp_path)
    lines = []
    assert check(folder, say=lines.append, gaps=True)
    table = lines.index("scans, and the share of them of which a field is known, in %:")
    rows = [line.split() for line in lines[table + 1:table + 6]]
    assert rows[0] == ["MRI", "scans", *scan_fields("t1")]
    assert rows[1] == ["t1", "5", "40", "0", "0", "0", "0", "100", "100", "100", "0", "0"]
    assert rows[2] == ["t2", "2", "100", "0", "0", "0", "0", "100", "0", "50", "0", "0"]
    assert rows[3] == ["PET", "scans", *scan_fields("fdg")]
    assert rows[4] == ["fdg", "2", "100", "50", "0", "0", "0", "100", "0", "0", "0", "0"]
    prompts = [line for line in lines if line.startswith("prompt: ")]
    assert [text.split(";")[0] for text in prompts] == ["prompt: Modality: T1w", "prompt: Modality: PET", "prompt: Modality: T2w"]
    assert "Age: 61 y" in prompts[0] and "Age: 61 y" in prompts[1] and "TE: 100 ms" in prompts[2]
    assert lines[-1] == "3 complete subjects of 3 persons (2 needed), 0 errors: usable"
    lines.clear()
    assert check(folder, say=lines.append) and lines[-1].startswith("5 complete subjects")
    lines.clear()
    sheet = "patient,age\np1,61\np2,62\n"
    assert check(make_patients(tmp_path / "plain", ("p1", "p2"), "meta.csv", sheet), say=lines.append)
    assert not any("share of them" in line or "prompt:" in line for line in lines)
