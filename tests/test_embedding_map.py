"""common/embedding_map.py and the maps of common/pictures.py: stored numbers of scikit-learn, finite differences, by hand."""
import numpy as np
import pytest
from PIL import Image

from common import embedding_map as E
from common import pictures as P

K = np.arange(60)
LABELS = K % 3
Z = np.stack([np.sin(K) + 3 * (LABELS == 0), np.cos(2 * K) + 3 * (LABELS == 1), 0.5 * np.sin(3 * K)], axis=1)


def divergence(p, y):
    """KL(p || q) by its definition."""
    weights = 1 / (1 + ((y[:, None] - y) ** 2).sum(-1))
    np.fill_diagonal(weights, 0)
    q = weights / weights.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


# ---- maps ------------------------------------------------------------------------------------------------------------


def test_pca_finds_the_directions_of_the_largest_variance():
    t = np.linspace(-1, 1, 21)
    wide, narrow = np.array([-0.8, 0, 0.6]), np.array([0.6, 0, 0.8])        # the largest entry of the first is negative
    x = 5 + 4 * t[:, None] * wide + (t ** 2 - np.mean(t ** 2))[:, None] * narrow
    found = E.pca(x, 2)
    assert found[:, 0] == pytest.approx(-4 * t) and found[:, 1] == pytest.approx(t ** 2 - np.mean(t ** 2))
    values = np.linalg.eigvalsh(np.cov(Z.T))[::-1]
    assert E.pca(Z, 3).var(0, ddof=1) == pytest.approx(values) and E.pca(Z, 1).shape == (60, 1)
    assert E.pca(Z, 3) @ E.pca(Z, 3).T == pytest.approx((Z - Z.mean(0)) @ (Z - Z.mean(0)).T)        # a rotation


def test_every_row_has_the_perplexity():
    p = E.joint_probabilities(Z, 10)
    assert p.sum() == pytest.approx(1) and np.array_equal(p, p.T) and (np.diag(p) == 0).all()
    # a regular ring: all rows are alike, so that p is the conditional probability divided by n
    angles = 2 * np.pi * np.arange(40) / 40
    ring = 100 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    row = 40 * E.joint_probabilities(ring, 7)[0]
    assert np.exp(-(row[1:] * np.log(row[1:])).sum()) == pytest.approx(7, rel=2e-5)
    squares = ((ring - ring[0]) ** 2).sum(1)
    precision = np.log(row[1] / row[2]) / (squares[2] - squares[1])         # a Gaussian of the distance
    assert row[1:] == pytest.approx(row[1] * np.exp(-precision * (squares[1:] - squares[1])))
    assert E.joint_probabilities(1e-3 * ring + 7, 7) == pytest.approx(E.joint_probabilities(ring, 7), abs=1e-7)


def test_far_points_and_equal_points_have_probabilities():
    x = np.concatenate([np.zeros((12, 2)), np.eye(2), [[1e4, 0]]])
    p = E.joint_probabilities(x, 5)
    assert np.isfinite(p).all() and p.sum() == pytest.approx(1) and p[14].sum() >= 1 / (2 * 15) * (1 - 1e-9)
    assert np.isfinite(E.tsne(x, 5, 300)).all()


def test_the_gradient_is_that_of_the_divergence():
    p = E.joint_probabilities(Z[:9], 3)
    y = np.random.default_rng(0).normal(size=(9, 2))
    found = E._gradient(p, y)
    for i, j in np.ndindex(9, 2):
        moved = y.copy()
        moved[i, j] += 1e-5
        other = y.copy()
        other[i, j] -= 1e-5
        assert found[i, j] == pytest.approx((divergence(p, moved) - divergence(p, other)) / 2e-5, abs=1e-8)


def test_tsne_equals_scikit_learn_about():
    p = E.joint_probabilities(Z, 10)
    start, found = E.tsne(Z, 10, 0), E.tsne(Z, 10)
    assert start[:, 0].std() == pytest.approx(1e-4) and start == pytest.approx(E.pca(Z, 2) * start[0, 0] / E.pca(Z, 2)[0, 0])
    assert divergence(p, found) <= 0.12 < divergence(p, start)              # scikit-learn: 0.0855
    assert E.neighbour_purity(found, LABELS) >= 0.9 * E.neighbour_purity(Z, LABELS)
    assert np.array_equal(found, E.tsne(Z, 10))


def test_the_steps_of_tsne(monkeypatch):
    """With a constant gradient all numbers are known: gains 1.2, 1.4, ... and momentum .5, then .8."""
    seen = []
    monkeypatch.setattr(E, "_gradient", lambda p, y: seen.append(p.sum()) or np.full_like(y, -1.0))
    start = E.tsne(Z, 10, 0)
    place, velocity = 0.0, 0.0
    for step in range(253):
        # in the first step there is no velocity yet, which counts as a change of direction
        gain = 0.8 + 0.2 * step
        velocity = (0.5 if step < 250 else 0.8) * velocity + 50 * gain
        place += velocity
    assert (E.tsne(Z, 10, 253) - start) / place == pytest.approx(np.ones((60, 2)))
    assert seen == pytest.approx([12] * 250 + [1] * 3)
    # a gradient that swings: gains fall to .01
    signs = []
    monkeypatch.setattr(E, "_gradient", lambda p, y: signs.append(-1) or np.full_like(y, (-1.0) ** len(signs)))
    swing = E.tsne(Z, 10, 100) - E.tsne(Z, 10, 99)
    assert np.abs(swing).max() < 1.5 * 50 * 0.01


@pytest.mark.parametrize("n, rate", [(600, 50), (3000, 62.5)])
def test_the_rate_grows_with_the_number_of_points(monkeypatch, n, rate):
    monkeypatch.setattr(E, "joint_probabilities", lambda x, perplexity: 0.0)
    monkeypatch.setattr(E, "_gradient", lambda p, y: np.full_like(y, -1.0))
    x = np.random.default_rng(0).normal(size=(n, 2))
    assert (E.tsne(x, 10, 1) - E.tsne(x, 10, 0)) == pytest.approx(np.full((n, 2), 0.8 * rate))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_silhouette_equals_scikit_learn():
    assert E.silhouette(Z, LABELS) == pytest.approx(0.5210493180541433, rel=1e-12)
    assert E.silhouette(Z, np.array(["CT", "MRI", "X-ray"])[LABELS]) == pytest.approx(0.5210493180541433, rel=1e-12)


@pytest.mark.filterwarnings("error")
def test_silhouette_by_hand():
    # a and b of the points 0, 1, 5, 7 of two labels: (1, 6), (1, 5), (2, 4.5), (2, 6.5)
    expected = np.mean([5 / 6, 4 / 5, 2.5 / 4.5, 4.5 / 6.5])
    assert E.silhouette([[0], [1], [5], [7]], list("aabb")) == pytest.approx(expected)
    assert E.silhouette([[0], [1], [5]], [0, 0, 1]) == pytest.approx((4 / 5 + 3 / 4 + 0) / 3)       # alone counts 0
    assert E.silhouette([[0], [0], [0], [0]], [0, 0, 1, 1]) == 0
    assert E.silhouette([[0], [4], [1], [5]], [0, 0, 1, 1]) < 0             # mixed


def test_neighbour_purity_by_hand():
    x = [[0], [1], [2.1], [3.3], [9]]
    labels = ["a", "a", "b", "b", "b"]
    # the nearest: 1 (a), 0 (a), 1 (a), 2 (b), 3 (b)
    assert E.neighbour_purity(x, labels, 1) == pytest.approx(4 / 5)
    # the two nearest: 1 2, 0 2, 1 3, 2 1, 3 2
    assert E.neighbour_purity(x, labels, 2) == pytest.approx((1 + 1 + 1 + 1 + 2) / 10)
    assert E.neighbour_purity(x, labels, 4) == pytest.approx((1 + 1 + 2 + 2 + 2) / 20)
    assert E.neighbour_purity(np.zeros((4, 2)), [0, 0, 0, 1], 3) == pytest.approx((2 + 2 + 2) / 12)
    assert E.neighbour_purity(Z[:11], LABELS[:11]) == pytest.approx((4 * 3 + 4 * 3 + 3 * 2) / 110)  # k = 10


# ---- picture ---------------------------------------------------------------------------------------------------------


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def centre(page, colour):
    """Row and column of the middle of the map's pixels of this colour; the legend lies right of column 420."""
    rows, columns = np.nonzero(np.abs(page[:, :420] - np.array(colour)).sum(-1) < 60)
    return rows.mean(), columns.mean()


def test_a_map_shows_every_point_at_its_place(tmp_path):
    P.scatter(tmp_path / "new" / "map.png", [[0, 0], [4, 0], [0, 2]], ["b", "a", "c"], "title", "a note")
    page = read(tmp_path / "new" / "map.png")
    row_b, column_b = centre(page, P.COLOURS[1])                            # colours follow the alphabet
    row_a, column_a = centre(page, P.COLOURS[0])
    row_c, column_c = centre(page, P.COLOURS[2])
    assert row_a == pytest.approx(row_b, abs=0.6) and column_a - column_b == pytest.approx(400, abs=1)
    assert column_c == pytest.approx(column_b, abs=0.6) and row_b - row_c == pytest.approx(200, abs=1)      # y points upwards
    assert (row_b + row_c) / 2 == pytest.approx(2 * P.LINE + 200, abs=1)                                    # in the middle
    legend = page[2 * P.LINE:5 * P.LINE, 420:]
    for i in range(3):
        line = legend[i * P.LINE:(i + 1) * P.LINE]
        assert (np.abs(line - np.array(P.COLOURS[i])).sum(-1) < 60).sum() > 20 and (line.sum(-1) < 200).any()
    dark = (page < 100).all(-1)
    assert dark[:P.LINE + P.GAP].any() and dark[-P.LINE - P.GAP:].any()     # title and note


def test_a_map_of_one_point_and_of_many_labels(tmp_path):
    P.scatter(tmp_path / "one.png", [[3, 3]], [7], "title")
    page = read(tmp_path / "one.png")
    assert centre(page, P.COLOURS[0]) == pytest.approx((2 * P.LINE + 200, 4 * P.GAP + 200), abs=1)
    many = [f"label {i}" for i in range(40)]
    P.scatter(tmp_path / "many.png", np.arange(80).reshape(40, 2), many, "title " * 40)
    tall, wide = read(tmp_path / "many.png").shape[:2]
    assert tall == (40 + 4) * P.LINE and wide > P._font().getlength("title " * 40)
    P.scatter(tmp_path / "many.png", np.arange(80).reshape(40, 2), many, "title", "word " * 200)
    assert read(tmp_path / "many.png").shape[0] > tall + 4 * P.LINE         # all lines of the note


def test_a_map_says_what_does_not_fit(tmp_path):
    for xy in ([[0, 0, 0]], [[0, 0], [1, 1]], [[0, np.nan]], np.zeros((0, 2))):
        with pytest.raises(ValueError, match="scatter .*one label per point"):
            P.scatter(tmp_path / "map.png", xy, ["a"], "title")


def test_no_label_covers_the_others(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(P, "scatter", lambda *args: seen.append(args))
    xy = np.stack([K, -K], axis=1).astype(float)
    E.draw_map(tmp_path / "map.png", xy, np.sort(LABELS), "title", "note")
    path, drawn, labels, title, note = seen[0]
    assert (path, title, note) == (tmp_path / "map.png", "title", "note")
    order = drawn[:, 0].astype(int)
    assert sorted(order) == list(K) and labels.tolist() == np.sort(LABELS)[order].astype(str).tolist() and (drawn[:, 1] == -order).all()
    assert all(set(labels[part]) == {"0", "1", "2"} for part in (slice(20), slice(40, 60)))
    monkeypatch.undo()
    E.draw_map(tmp_path / "map.png", xy, LABELS)
    assert read(tmp_path / "map.png").shape[2] == 3


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_points_that_do_not_fit_are_refused():
    damaged = Z.copy()
    damaged[2, 1] = np.nan
    calls = {"pca": lambda x: E.pca(x, 2), "tsne": lambda x: E.tsne(x, 5), "silhouette": lambda x: E.silhouette(x, LABELS),
             "neighbour_purity": lambda x: E.neighbour_purity(x, LABELS), "draw_map": lambda x: E.draw_map("map.png", x, LABELS)}
    for name, call in calls.items():
        for bad in (damaged, Z[0], Z[:0]):
            with pytest.raises(ValueError, match=rf"{name}: the points are .*finite numbers"):
                call(bad)


def test_choices_that_do_not_fit_are_refused():
    for dims in (0, 4):
        with pytest.raises(ValueError, match="choose 1 to 3"):
            E.pca(Z, dims)
    for perplexity in (0.5, 60):
        with pytest.raises(ValueError, match="not between 1 and 59 for 60 points"):
            E.tsne(Z, perplexity)
    with pytest.raises(ValueError, match="all points are the same"):
        E.tsne(np.ones((40, 3)))
    with pytest.raises(ValueError, match="one label per point"):
        E.silhouette(Z, LABELS[1:])
    with pytest.raises(ValueError, match="all points have the label 1"):
        E.silhouette(Z, 0 * K + 1)
    for k in (0, 60):
        with pytest.raises(ValueError, match=f"no {k} neighbours each; choose k from 1 to 59"):
            E.neighbour_purity(Z, LABELS, k)
