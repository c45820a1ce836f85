"""common/embeddings.py by hand: the closest prompts, files of features made elsewhere, and files that are none."""
import numpy as np
import pytest
import torch

from common import embeddings as E


class StandInRun:
    """The part of common.run.Run that a report needs."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_closest_prompts_are_named_and_warned_about():
    unit = {"a": (1, -1, 0), "b": (3, 0, -3), "c": (5, 4, 5), "d": (-2, 2.1, 0)}           # means 0 but for c
    table = {name: [None, None, torch.tensor(v, dtype=torch.float32)] for name, v in unit.items()}
    run = StandInRun()
    assert E.report_closest(run, table, ["b", "a", "b"]) == pytest.approx(0.5, abs=1e-4)
    assert len(run.said) == 1 and "0.500" in run.said[0] and "'b' and 'a'" in run.said[0] and "of 2 prompts" in run.said[0]
    assert E.report_closest(run, table, ["c", "b", "a"]) == pytest.approx(0.75 ** 0.5, abs=1e-4)   # c less its mean: (1, -2, 1) / 3
    table["e"] = [None, None, torch.tensor([2.0, -2.1, 0])]
    assert E.report_closest(run, table, list(unit) + ["e"]) > 0.99
    assert len(run.said) == 4 and "'a' and 'e'" in run.said[2] and run.said[3].startswith("warning")
    assert E.report_closest(run, table, ["a", "a"]) is None and "single" in run.said[4]


def embeddings(**changes):
    arrays = {"prompts": np.array(["t1", "t2; [MASK]"]), "pooled": np.array([[1, 2, 3], [4, 0, 6]], np.float16),
              "tokens": np.arange(16.0).reshape(2, 2, 4), "mask": np.array([[True, False], [True, True]])}
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def test_embeddings_made_elsewhere(tmp_path):
    np.savez(tmp_path / "emb.npz", **embeddings())
    table, width = E.load_embeddings(tmp_path / "emb.npz")
    assert width == 3 and list(table) == ["t1", "t2; [MASK]"] and all(type(prompt) is str for prompt in table)
    found = E.look_up(table, ["t2; [MASK]", "t1", "t1"])
    assert found.pooled.tolist() == [[4, 0, 6], [1, 2, 3], [1, 2, 3]] and found.pooled.dtype == torch.float32
    assert found.tokens[:2].tolist() == np.arange(16.0).reshape(2, 2, 4)[::-1].tolist()
    assert found.mask.tolist() == [[True, True], [True, False], [True, False]]
    with pytest.raises(ValueError, match=r"2 prompts.*first: 'T1'.*every prompt"):
        E.embed(table, ["t1", "T1", "pd", "T1"])
    np.savez(tmp_path / "emb.npz", **embeddings(tokens=None, mask=None))
    features = E.embed(E.load_embeddings(tmp_path / "emb.npz")[0], ["t1"])
    assert features.tokens is None and features.mask is None
    assert features.pooled[0].tolist() == pytest.approx([-1.5 ** 0.5, 0, 1.5 ** 0.5], abs=1e-4)


@pytest.mark.parametrize("changes, why", [
    ({"pooled": None}, "missing"), ({"prompts": None}, "missing"), ({"mask": None}, "missing"), ({"tokens": None}, "missing"),
    ({"prompts": np.array([1, 2])}, "list of strings"), ({"prompts": np.array("t1")}, "list of strings"),
    ({"prompts": np.array([b"a", b"b"])}, "list of strings"), ({"prompts": np.array(["t1", "t1"])}, "twice"),
    ({"prompts": np.array(["t1", "t2"], dtype=object)}, "not readable"),
    ({"pooled": np.ones((3, 3))}, r"pooled is not.*'pooled': \(3, 3\)"), ({"pooled": np.ones(2)}, "pooled is not"),
    ({"pooled": np.ones((2, 0))}, "pooled is not"), ({"pooled": np.array([[1, 1e300], [1, 2]])}, "pooled is not"),      # float32 has no 1e300
    ({"pooled": np.array([[1, np.nan], [1, 2]])}, "pooled is not"), ({"pooled": np.array([["1"], ["2"]])}, "pooled is not"),
    ({"tokens": np.ones((2, 4))}, "tokens are not"), ({"tokens": np.ones((3, 2, 4))}, "tokens are not"),
    ({"tokens": np.full((2, 2, 4), np.inf)}, "tokens are not"), ({"mask": np.ones((2, 3), bool)}, "mask is not"),
    ({"mask": np.ones((2, 2))}, "mask is not"), ({"mask": np.array([[True, True], [False, False]])}, "mask is not"),
])
def test_unfit_embeddings_are_refused_in_one_line(tmp_path, changes, why):
    np.savez(tmp_path / "emb.npz", **embeddings(**changes))
    with pytest.raises(ValueError, match=why) as caught:
        E.load_embeddings(tmp_path / "emb.npz")
    assert "emb.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"prompts", b"PK\x03\x04 cut off", "npy"])
def test_files_that_are_no_npz_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "emb.npz"
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.ones(6))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="not readable") as caught:
        E.load_embeddings(path)
    assert "\n" not in str(caught.value)
