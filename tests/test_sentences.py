"""Records and what users say of them: typical values, targets, sweeps, hidden fields."""
from types import SimpleNamespace

import numpy as np
import pytest

from common.sentences import Records, file_tags, hidden_field, parse_sweep, parse_target, typical_records


def subject(name, **records):
    return SimpleNamespace(name=name, files=dict.fromkeys(records), records=records, meta={})


PEOPLE = [subject("a", t1={"TR": 500, "vendor": "GE", "age": 60, "voxel": (1, 1, 3)}, t2={"TE": 80, "TR": 4000, "age": 60}),
          subject("b", t1={"TR": 700, "vendor": "UIH", "age": 70, "voxel": (1, 1, 4)}, t2={"TE": 100, "TR": 5000}),
          subject("c", t1={"TR": 520, "vendor": "UIH", "age": 30, "voxel": (1, 1, 4)}, t2={"TE": 120})]


def test_typical_records_by_hand():
    """Medians, most common words; what fewer than half of the scans know is left out."""
    typical = typical_records(PEOPLE, ["t1", "t2", "ct"])
    assert typical["t1"] == {"TR": 520, "vendor": "UIH", "age": 60, "voxel": [1, 1, 4]}
    assert typical["t2"] == {"TE": 100, "TR": 4500} and typical["ct"] == {}


def test_a_scan_that_does_not_exist_is_typical_but_of_this_person():
    records = Records(PEOPLE, {"flair": {"TE": 120, "age": 50, "voxel": (9, 9, 9)}})
    assert records.of("a", "t2") == {"TE": 80, "TR": 4000, "age": 60}
    assert records.of("b", "flair") == {"TE": 120, "age": 70, "voxel": (1, 1, 4)}
    assert records.of("nobody", "flair") == {"TE": 120, "age": 50, "voxel": (9, 9, 9)}
    assert records.of("nobody", "t1") == {}


def test_parse_target():
    assert parse_target("") == (None, {})
    assert parse_target("modality=T2w TE=90 vendor=GE") == ("t2", {"TE": 90.0, "vendor": "GE"})
    assert parse_target("tracer=FDG modality=PET dose=200") == ("fdg", {"tracer": "FDG", "dose": 200.0})
    for wrong in ("TE=90", "modality", "modality= TE=90", "modality=T2w dose=3", "modality=T2w TE=90 TE=95", "modality=T2w TE=nan",
                  "modality=T2w TE=1e400"):
        with pytest.raises(ValueError, match="--target"):
            parse_target(wrong)


def test_file_tags():
    assert file_tags("modality=T2w TE=90 TR=4000.5 vendor=GE/UIH") == {"t2": "_TE-90_TR-4000.5_vendor-GE-UIH"}


def test_parse_sweep():
    field, values = parse_sweep("TE=60:140:9")
    assert field == "TE" and np.allclose(values, np.arange(60, 141, 10))
    assert len(parse_sweep("TE=1:2:1000")[1]) == 1000
    for wrong in ("TE", "TE=60:140", "TE=a:b:3", "TE=60:140:1", "TE=60:140:1001", "=60:140:9", "TE=nan:140:9", "TE=60:1e400:9"):
        with pytest.raises(ValueError, match="--sweep"):
            parse_sweep(wrong)


def test_hidden_field_is_one_that_the_sentence_tells():
    record = {"TE": 90, "TR": 4000, "age": 60, "nothing": 1, "dose": 3}         # a T2w sentence has no dose
    g = np.random.default_rng(0)
    found = [hidden_field("t2", record, 0.5, g) for _ in range(400)]
    assert {field for field in found if field} == {("TE",), ("TR",), ("age",)}
    assert 150 < sum(map(bool, found)) < 250
    assert hidden_field("t2", {}, 1.0, g) == () and hidden_field("t2", record, 0.0, g) == ()
