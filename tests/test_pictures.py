"""common/pictures.py pixel by pixel: what is where, how large, in which colour, and that no text is cut off."""
import numpy as np
import pytest
from PIL import Image, ImageFont

from common import pictures as P
from common.files import RunError


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def box(page, colour):
    """(top, bottom, left, right) of the pixels of exactly this colour, which must fill that box."""
    rows, columns = np.nonzero((page == colour).all(-1))
    assert len(rows), f"no pixel is {colour}"
    found = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    assert len(rows) == (found[1] - found[0]) * (found[3] - found[2])
    return found


def flat(red, green, blue, height=20, width=30):
    return np.broadcast_to(np.array([red, green, blue]) / 255, (height, width, 3))


# ---- grid ------------------------------------------------------------------------------------------------------------


def test_grid_puts_rows_below_and_columns_beside_each_other(tmp_path):
    colours = [[(200, 0, 10), (0, 200, 20), (0, 0, 200)], [(90, 90, 0), (0, 90, 90), (90, 0, 90)]]
    P.grid(tmp_path / "a.png", [[flat(*c) for c in row] for row in colours], ["A", "B", "C"], ["one", "two"], scale=2)
    page = read(tmp_path / "a.png")
    boxes = [[box(page, c) for c in row] for row in colours]
    for row in boxes:
        for top, bottom, left, right in row:
            assert (bottom - top, right - left) == (40, 60)
        assert row[0][0] == row[1][0] == row[2][0]                              # same height on the page
        assert row[1][2] - row[0][3] == row[2][2] - row[1][3] == P.GAP
    assert boxes[1][0][0] - boxes[0][0][1] == P.GAP
    assert [b[2] for b in boxes[0]] == [b[2] for b in boxes[1]]
    assert (page[:boxes[0][0][0], :, :] < 100).any()                            # titles above,
    assert (page[boxes[0][0][0]:boxes[0][0][1], :boxes[0][0][2]] < 100).any()   # a label left of each row
    assert (page[boxes[1][0][0]:boxes[1][0][1], :boxes[1][0][2]] < 100).any()


def test_grid_enlarges_by_whole_pixels(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(1, 255, (5, 7))
    corner = image.copy()
    corner[0, 0], corner[4, 6] = 0, 255
    P.grid(tmp_path / "a.png", [[corner / 255, flat(255, 0, 0, 5, 7)]], ["", ""], [""], scale=3)
    page = read(tmp_path / "a.png")
    top, bottom, left, right = box(page, (255, 0, 0))
    cell = page[top:bottom, left - P.GAP - 21:left - P.GAP]
    assert (bottom - top, right - left) == (15, 21)
    assert np.array_equal(cell, np.kron(corner, np.ones((3, 3), int))[:, :, None].repeat(3, axis=2))


@pytest.mark.parametrize("height, width, factor", [(64, 64, 2), (50, 200, 3), (128, 128, 1), (240, 240, 1), (7, 9, 19)])
def test_grid_enlarges_small_images_to_a_readable_size(tmp_path, height, width, factor):
    P.grid(tmp_path / "a.png", [[flat(255, 0, 0, height, width)]], ["t1"], ["x"])
    top, bottom, left, right = box(read(tmp_path / "a.png"), (255, 0, 0))
    assert (bottom - top, right - left) == (factor * height, factor * width)


def test_grid_shows_grey_clips_and_marks_nan(tmp_path):
    image = np.array([[0.0, 0.5, 1.0], [-3.0, np.nan, 7.0]])
    P.grid(tmp_path / "a.png", [[image, flat(255, 0, 0, 2, 3)]], ["", ""], [""], scale=1)
    page = read(tmp_path / "a.png")
    top, _, left, _ = box(page, (255, 0, 0))
    cell = page[top:top + 2, left - P.GAP - 3:left - P.GAP]
    assert cell.tolist() == [[[0] * 3, [128] * 3, [255] * 3], [[0] * 3, [255, 0, 255], [255] * 3]]


def ink(page):
    """Everything that is not paper."""
    return (page != 255).any(-1)


@pytest.fixture
def texts(monkeypatch):
    """The boxes (top, bottom, left, right) of all lines of text that are written."""
    boxes, write = [], P._write

    def recorded(draw, x, y, lines, font):
        for i, line in enumerate(lines):
            if line:
                boxes.append((y + i * P.LINE, y + (i + 1) * P.LINE, x, x + font.getlength(line)))
        write(draw, x, y, lines, font)

    monkeypatch.setattr(P, "_write", recorded)
    return boxes


def assert_readable(boxes, page):
    """Every box is on the page and none covers another."""
    for k, (top, bottom, left, right) in enumerate(boxes):
        assert 0 <= top and bottom <= page.shape[0] and 0 <= left and right <= page.shape[1]
        for other in boxes[:k]:
            assert bottom <= other[0] or other[1] <= top or right <= other[2] or other[3] <= left


def test_no_text_is_clipped(tmp_path, texts):
    """Long titles, labels and notes stay on the page, out of the images and out of each other."""
    word = "a-single-word-that-is-wider-than-its-image"
    columns = [word, "many words that need several lines " * 3]
    labels = [word, "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\neleven"]
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (0, 255, 255)]]
    images = [[flat(*c) for c in row] for row in colours]
    P.grid(tmp_path / "a.png", images, columns, labels, scale=2, note="a long remark " * 40 + word * 5)
    page = read(tmp_path / "a.png")
    assert len(texts) > 20
    assert_readable(texts + [box(page, c) for row in colours for c in row], page)


def test_text_is_what_was_asked_for(tmp_path):
    """Title, label, note each change the page, at its place: above, left, below."""
    image = flat(255, 0, 0, 128, 128)
    P.grid(tmp_path / "plain.png", [[image]], ["I"], ["I"], note="I")
    plain = read(tmp_path / "plain.png")
    top, bottom, left, right = box(plain, (255, 0, 0))
    for name, arguments, where in [("title", (["M"], ["I"], "I"), (slice(0, top), slice(left, right))),
                                   ("label", (["I"], ["L"], "I"), (slice(top, bottom), slice(0, left))),
                                   ("note", (["I"], ["I"], "M"), (slice(bottom, None), slice(None)))]:
        P.grid(tmp_path / f"{name}.png", [[image]], *arguments[:2], note=arguments[2])
        other = read(tmp_path / f"{name}.png")
        shift = other.shape[1] - plain.shape[1]
        changed = (other[:, shift:] != plain).any(-1)
        inside = np.zeros_like(changed)
        inside[where] = True
        assert (changed & inside).any()
        if name != "label":                                                     # a wider label moves all the rest
            assert not (changed & ~inside).any()


def test_a_title_stands_above_and_moves_the_rest_down(tmp_path, texts):
    image = flat(255, 0, 0)
    P.grid(tmp_path / "plain.png", [[image]], ["a"], ["x"], note="n")
    plain = read(tmp_path / "plain.png")
    texts.clear()
    P.grid(tmp_path / "titled.png", [[image]], ["a"], ["x"], note="n", title="a title of many words " * 3)
    titled = read(tmp_path / "titled.png")
    lines = next(k for k in range(1, 9) if titled.shape[0] == plain.shape[0] + k * P.LINE + P.GAP)
    assert lines > 1 and titled.shape[1] == plain.shape[1]
    assert np.array_equal(titled[lines * P.LINE + P.GAP + 1:], plain[1:]) and ink(titled[:lines * P.LINE]).any()
    assert_readable(texts + [box(titled, (255, 0, 0))], titled)


def test_grid_refuses_what_does_not_fit(tmp_path):
    image = flat(255, 0, 0)
    for rows, columns, labels in [([[image]], ["a", "b"], ["x"]), ([[image]], ["a"], ["x", "y"]), ([], [], []),
                                  ([[image, image], [image]], ["a", "b"], ["x", "y"])]:
        with pytest.raises(ValueError, match="counts must agree"):
            P.grid(tmp_path / "a.png", rows, columns, labels)
    with pytest.raises(ValueError, match="several sizes"):
        P.grid(tmp_path / "a.png", [[image, flat(0, 0, 0, 9, 9)]], ["a", "b"], ["x"])
    assert not list(tmp_path.iterdir())


def test_without_freetype_there_is_still_text(tmp_path, monkeypatch):
    bitmap = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()

    def load_default(size=None):
        if size is not None:
            raise ImportError("The _imagingft C module is not installed")
        return bitmap

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    P.grid(tmp_path / "a.png", [[flat(255, 0, 0)]], ["T1 → T2, Ωμ"], ["Müller\nt1"], note="20 ± 1 dB – ok")
    P.curves(tmp_path / "b.png", {"Größe": ([0, 1], [0, 1])}, "x", "y", "title")
    page = read(tmp_path / "a.png")
    assert ink(page[:, :box(page, (255, 0, 0))[2]]).any()
    assert ink(read(tmp_path / "b.png")).any()


def test_signs_outside_the_font_are_spelt(tmp_path):
    assert P._plain("T1→T2 – 3×3 ±1 Bézier µm 10²") == "T1->T2 - 3x3 ±1 Bezier um 102"
    assert P._plain("Ω") == "?"


def test_wrap_breaks_at_spaces_only():
    font = P._font()
    lines = P._wrap("one two three\n\nfour", font.getlength("one two"), font)
    assert lines == ["one two", "three", "", "four"]
    assert P._wrap("unbreakable it", 1, font) == ["unbreakable", "it"]


def test_saved_atomically_into_new_folders(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "a.png"
    P.grid(path, [[flat(255, 0, 0)]], ["a"], ["x"])
    before = path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]

    def half_written(self, file, **_):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("no space left on device")

    save, written = Image.Image.save, []
    monkeypatch.setattr(Image.Image, "save", lambda self, file, **k: (written.append(file), save(self, file, **k)))
    P.grid(path, [[flat(255, 0, 0)]], ["a"], ["x"])
    assert len(written) == 1 and written[0].parent == path.parent and written[0] != path
    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(RunError, match="cannot write .*a.png"):
        P.grid(path, [[flat(0, 0, 255)]], ["a"], ["x"])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.png"]


# ---- error map -------------------------------------------------------------------------------------------------------


def test_error_map_runs_from_black_over_red_and_yellow_to_white():
    errors = np.array([[0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.9]])
    expected = [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [1, 0.5, 0], [1, 1, 0], [1, 1, 0.5], [1, 1, 1], [1, 1, 1]]
    assert P.error_map(np.full((1, 8), 0.5), 0.5 + errors)[0] == pytest.approx(np.array(expected), abs=1e-12)
    assert P.error_map(np.full((1, 8), 0.5), 0.5 - errors)[0] == pytest.approx(np.array(expected), abs=1e-12)


def test_labels_are_painted_half_transparent_on_grey():
    image, labels = np.array([[0.4, 1.5], [0.0, 1.0]]), np.array([[0, 1], [2, 7]])
    shown = P.overlay(image, labels, {1: (255, 0, 0), 2: (0, 102, 255)})
    assert shown.shape == (2, 2, 3) and shown[0, 0].tolist() == [0.4] * 3 and shown[1, 1].tolist() == [1.0] * 3
    assert shown[0, 1].tolist() == [1.0, 0.5, 0.5] and shown[1, 0] == pytest.approx([0, 0.2, 0.5])


def test_error_map_gets_brighter_and_obeys_its_limit():
    errors = np.linspace(0, 0.12, 200)[None]
    brightness = P.error_map(np.zeros((1, 200)), errors, limit=0.1) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness[0][errors[0] <= 0.1]) > 0).all()
    assert (brightness[0][errors[0] >= 0.1] == pytest.approx(1))
    assert P.error_map(np.zeros((4, 6)), np.zeros((4, 6))).shape == (4, 6, 3)


# ---- curves ----------------------------------------------------------------------------------------------------------


def plot(tmp_path, series, **options):
    P.curves(tmp_path / "curve.png", series, "step", "loss", "title", **options)
    return read(tmp_path / "curve.png")


def frame(page):
    """(left, right, top, bottom) of the plot, from its two axes."""
    dark = (page < 120).all(-1)
    left = int(dark[:, :page.shape[1] // 2].sum(0).argmax())
    bottom = int(dark.sum(1).argmax())
    columns, rows = np.flatnonzero(dark[bottom]), np.flatnonzero(dark[:, left])
    return left, columns.max(), rows[rows > 2 * P.LINE].min(), bottom


def height_at(page, share, colour):
    """Where the line of this colour crosses the column at a share of the x axis: 0 bottom, 1 top."""
    left, right, top, bottom = frame(page)
    column = page[:, round(left + share * (right - left))]
    rows = np.flatnonzero(np.abs(column - np.array(colour)).sum(-1) < 60)
    return (bottom - rows.mean()) / (bottom - top)


def test_a_straight_line_is_straight_and_rises(tmp_path):
    page = plot(tmp_path, {"up": ([5, 15], [0, 1])})
    heights = [height_at(page, x, P.COLOURS[0]) for x in (0.25, 0.5, 0.75)]
    assert heights == pytest.approx([(0.04 + x) / 1.08 for x in (0.25, 0.5, 0.75)], abs=0.01)
    left, right, top, bottom = frame(page)
    assert (right - left, bottom - top) == (pytest.approx(480, abs=2), pytest.approx(300, abs=2))


def rules(page):
    """Heights of the horizontal rules at the axis' ticks, 0 bottom, 1 top."""
    left, right, top, bottom = frame(page)
    grey = (np.abs(page[top:bottom - 3, left + 5:right - 5] - np.array(P.RULE)).sum(-1) < 90).mean(1) > 0.9
    rows = np.flatnonzero(grey)
    rows = [g.mean() for g in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)]
    return [(bottom - top - r) / (bottom - top) for r in reversed(rows)]


def test_ticks_stand_where_their_numbers_are(tmp_path):
    page = plot(tmp_path, {"a": ([0, 1], [0, 1])})
    assert rules(page) == pytest.approx([(0.04 + k / 5) / 1.08 for k in range(6)], abs=0.01)
    page = plot(tmp_path, {"a": ([0, 1], [1, 100])}, log_y=True)
    assert rules(page) == pytest.approx([(0.08 + k) / 2.16 for k in range(3)], abs=0.01)


def test_the_axis_of_steps_begins_at_0_if_that_is_near(tmp_path):
    for first, expected in ((5, 0.25), (20, (25 - 20) / 80)):
        page = plot(tmp_path, {"up": ([first, 25, 100], [0, 0, 1])})
        assert height_at(page, expected + 0.02, P.COLOURS[0]) > height_at(page, expected - 0.02, P.COLOURS[0]) + 0.01


@pytest.mark.parametrize("value, text", [(0.05, "0.05"), (0.1 + 0.2, "0.3"), (-1500, "-1,500"), (300000, "300,000"),
                                         (5e6, "5e+06"), (1e-9, "1e-09"), (0, "0")])
def test_numbers_of_ticks_can_be_read(value, text):
    assert P._number(value) == text


def test_a_logarithmic_axis_makes_an_exponential_straight(tmp_path):
    x = np.linspace(0, 10, 200)
    page = plot(tmp_path, {"decay": (x, 10.0 ** -x)}, log_y=True)
    heights = [height_at(page, s, P.COLOURS[0]) for s in (0.25, 0.5, 0.75)]
    assert heights == pytest.approx([(1.04 - s) / 1.08 for s in (0.25, 0.5, 0.75)], abs=0.01)
    linear = plot(tmp_path, {"decay": (x, 10.0 ** -x)})
    assert height_at(linear, 0.5, P.COLOURS[0]) < 0.06


def test_series_share_one_axis_and_have_their_own_colours(tmp_path):
    page = plot(tmp_path, {"low": ([0, 1], [0, 0]), "high": ([0, 1], [4, 4]), "half": ([0, 1], [2, 2])})
    heights = [height_at(page, 0.3, P.COLOURS[k]) for k in range(3)]
    assert heights == pytest.approx([0.04 / 1.08, 1.04 / 1.08, 0.5], abs=0.01)
    right = frame(page)[1]
    beside = page[:, right + 5:]
    legend = [np.flatnonzero((np.abs(beside - np.array(c)).sum(-1) < 60).any(1)).mean() for c in P.COLOURS[:3]]
    assert np.diff(legend) == pytest.approx(P.LINE, abs=1)                      # in the order given, top to bottom


def test_points_that_are_no_numbers_are_left_out(tmp_path):
    page = plot(tmp_path, {"loss": ([0, 1, 2, 3, 4], [1, np.nan, 10, np.inf, 100])}, log_y=True)
    assert height_at(page, 0.5, P.COLOURS[0]) == pytest.approx(0.5, abs=0.01)
    page = plot(tmp_path, {"loss": ([0, 1, 2, 3, 4], [1, 0, 10, -5, 100])}, log_y=True)
    assert height_at(page, 0.5, P.COLOURS[0]) == pytest.approx(0.5, abs=0.01)
    for values in ([np.nan, np.nan], [-1, 0]):
        with pytest.raises(ValueError, match="nothing to draw"):
            plot(tmp_path, {"loss": ([0, 1], values)}, log_y=True)


def test_a_single_point_and_a_constant_are_drawn(tmp_path):
    page = plot(tmp_path, {"point": ([3], [0.5])})
    assert (np.abs(page[:, :frame(page)[1]] - np.array(P.COLOURS[0])).sum(-1) < 60).any()
    assert height_at(plot(tmp_path, {"constant": ([0, 1], [0, 0])}), 0.3, P.COLOURS[0]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name, ylabel, title", [("a legend " * 20, "loss", "t"), ("s", "loss " * 90, "t"), ("s", "", "t " * 300)])
def test_curves_clip_no_text(tmp_path, texts, name, ylabel, title):
    P.curves(tmp_path / "a.png", {name: ([0, 5e6], [1e-9, 1e9]), "b": ([0, 1], [1, 2])}, "steps " * 8, ylabel, title, True)
    assert len(texts) > 12
    assert_readable(texts, read(tmp_path / "a.png"))


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 5000, [0, 1000, 2000, 3000, 4000, 5000]),
    (-0.04, 1.04, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0.31, 0.33, [0.31, 0.315, 0.32, 0.325, 0.33])])
def test_ticks_are_round(low, high, expected):
    assert P._ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("low, high, expected", [
    (-3.1, 0.1, [0.001, 0.01, 0.1, 1]), (-1.1, 0.4, [0.1, 0.2, 0.5, 1, 2]),
    (-24.2, 0.2, [1e-24, 1e-21, 1e-18, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1]),
    (np.log10(0.309), np.log10(0.331), [0.31, 0.315, 0.32, 0.325, 0.33])])
def test_logarithmic_ticks(low, high, expected):
    assert np.log10(P._log_ticks(low, high)) == pytest.approx(np.log10(expected))


def test_same_input_same_file(tmp_path):
    for name in ("a", "b"):
        P.grid(tmp_path / f"{name}.png", [[flat(1, 2, 3)]], ["t1"], ["x"], note="n")
        P.curves(tmp_path / f"{name}2.png", {"s": ([0, 1], [1, 2])}, "x", "y", "t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a2.png").read_bytes() == (tmp_path / "b2.png").read_bytes()
