"""Labelled grids of images, error maps, line plots and maps of points: PNG files, with Pillow.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    grid("samples.png", [[source, made, truth]], ["t1", "made", "t2"], ["subject 7"])
    curves("training.png", {"loss": (steps, values)}, "step", "loss", "stage bridge", log_y=True)
    scatter("map.png", xy, labels, "embeddings")

A file is written in one move: whoever opens it sees the old picture or the new one, never a half.
"""
import math
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import replace

CELL = 128              # pixels; smaller images are enlarged until their shorter side is as long
GAP = 4                 # pixels between cells
LINE = 18               # pixels per line of text
TYPOGRAPHY = {"–": "-", "—": "-", "−": "-", "→": "->", "×": "x", "µ": "u", "μ": "u", "…": "..."}
PAPER = (255, 255, 255)
INK = (20, 20, 20)
RULE = (200, 200, 200)
# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233),
           (230, 159, 0), (0, 0, 0)]


# ---- grid ----------------------------------------------------------------------------------------


def grid(path, rows, columns, labels, scale=None, note=None, title=None):
    """Write a table of images as a PNG file.

    rows       list of lists of images, (H, W) in [0,1] or (H, W, 3) in [0,1], all of one size;
               values outside are clipped, and NaN is painted magenta
    columns    a text above each column
    labels     a text left of each row
    scale      a whole number by which images are enlarged; None enlarges only small images
    note       a text below the table
    title      a text above the table

    Raises ValueError if the counts do not agree, or if the images are of several sizes.
    """
    if len(labels) != len(rows) or not rows or any(len(images) != len(columns) for images in rows):
        raise ValueError(f"grid {path}: {len(rows)} rows, {len(labels)} labels; "
                         f"{[len(images) for images in rows]} images a row, {len(columns)} titles; "
                         f"the counts must agree and not be 0")
    sizes = set()
    for images in rows:
        sizes.update(np.shape(image)[:2] for image in images)
    if len(sizes) > 1:
        raise ValueError(f"grid {path}: the images are of several sizes {sorted(sizes)}; "
                         f"bring them to one")
    height, width = sizes.pop()
    scale = scale or max(1, math.ceil(CELL / min(height, width)))
    height *= scale
    width *= scale
    font = _font()

    # sizes in pixels; a word that is wider than the image widens the columns
    names = [_wrap(text, width, font) for text in columns]
    texts = [_wrap(text, max(width, CELL), font) for text in labels]
    column = max([width] + [_width(name, font) for name in names])
    left = max(_width(text, font) for text in texts) + 2 * GAP
    pitch = max([height] + [len(text) * LINE for text in texts]) + GAP
    right = left + len(columns) * (column + GAP)
    head = _wrap(title, right - 2 * GAP, font) if title else []
    foot = _wrap(note, right - 2 * GAP, font) if note else []
    right = max(right, _width(head + foot, font) + 2 * GAP)
    top = max(len(name) for name in names) * LINE + 2 * GAP
    if head:
        top += len(head) * LINE + GAP
    bottom = top + len(rows) * pitch

    page = Image.new("RGB", (right, bottom + len(foot) * LINE + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, GAP, GAP, head, font)
    _write(draw, GAP, bottom, foot, font)
    for j, name in enumerate(names):
        _write(draw, left + j * (column + GAP), top - GAP - len(name) * LINE, name, font)
    for i, images in enumerate(rows):
        y = top + i * pitch
        _write(draw, GAP, y + max(0, (height - len(texts[i]) * LINE) // 2), texts[i], font)
        for j, image in enumerate(images):
            cell = _rgb(image).repeat(scale, axis=0).repeat(scale, axis=1)
            page.paste(Image.fromarray(cell), (left + j * (column + GAP), y))
    _save(page, path)


def error_map(truth, image, limit=0.3):
    """|truth - image| as black, red, yellow, white.  (H, W) -> (H, W, 3) in [0,1]

    White means `limit` or more.  The caller writes the limit into a label or the note; otherwise
    nobody can read the map.
    """
    error = np.abs(np.asarray(truth, np.float64) - np.asarray(image, np.float64))
    share = error / limit
    return np.clip(np.stack([3 * share, 3 * share - 1, 3 * share - 2], axis=-1), 0, 1)


def overlay(image, labels, colours):
    """An image with half-transparent colours on its labels.  Returns (H, W, 3) in [0,1].

    image: (H, W) in [0,1].  labels: (H, W).  colours: {label: (r, g, b) of 255}; labels without a
    colour stay grey.
    """
    grey = np.clip(np.asarray(image, np.float64), 0, 1)
    shown = np.repeat(grey[..., None], 3, axis=2)
    for label, colour in colours.items():
        where = np.asarray(labels) == label
        shown[where] = (shown[where] + np.array(colour) / 255) / 2
    return shown


def _rgb(image):
    """(H, W) or (H, W, 3) in [0,1] -> (H, W, 3) uint8.  NaN becomes magenta, which is no grey."""
    image = np.asarray(image, np.float64)
    if image.ndim == 2:
        image = np.stack([image] * 3, axis=-1)
    image = np.where(np.isnan(image).any(-1, keepdims=True), [1.0, 0.0, 1.0], image)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


# ---- curves --------------------------------------------------------------------------------------


def curves(path, series, xlabel, ylabel, title, log_y=False):
    """Write a line plot as a PNG file.

    series: {name: (x, y)}, numbers of one length each; up to seven series have their own colours.
    log_y: the y axis is logarithmic.

    Points that are not finite are left out, and with log_y those that are not positive.  Raises
    ValueError if no point is left.
    """
    names = [_plain(name) for name in series]
    lines = [_drawable(x, y, log_y) for x, y in series.values()]
    points = np.concatenate([np.zeros((0, 2)), *lines])                             # (n, 2)
    if not len(points):
        raise ValueError(f"curves {path}: there is no finite{' positive' if log_y else ''} point; "
                         f"nothing to draw")
    font = _font()
    xlabel = _plain(xlabel)
    head = [_plain(title), _plain(ylabel)]

    # the ends of the axes and their ticks, {place on the axis: text}
    x0, x1 = _limits(points[:, 0], 0.0)
    y0, y1 = _limits(points[:, 1], 0.04)
    if 0 < x0 < 0.1 * x1:
        x0 = 0.0                            # the steps of a training begin near 0: show the 0
    x_ticks = {value: _number(value) for value in _ticks(x0, x1)}
    if log_y:
        y_ticks = {math.log10(value): _number(value) for value in _log_ticks(y0, y1)}
    else:
        y_ticks = {value: _number(value) for value in _ticks(y0, y1)}

    # sizes in pixels
    left = max(_width(y_ticks.values(), font), 20) + 4 * GAP
    top = 2 * LINE + 4 * GAP
    width = 480
    height = 300
    right = left + width + 4 * GAP
    page_width = max(right + 30 + _width(names, font), _width(head, font)) + 2 * GAP
    page_height = top + height + 3 * LINE

    def at(x, y):
        """The place of a point on the page."""
        return left + (x - x0) / (x1 - x0) * width, top + height - (y - y0) / (y1 - y0) * height

    # lines are drawn at twice the size and then halved, so that they have smooth edges
    page = Image.new("RGB", (2 * page_width, 2 * page_height), PAPER)
    draw = ImageDraw.Draw(page)
    for y in y_ticks:
        _polyline(draw, [at(x0, y), at(x1, y)], RULE, 2)
    for x in x_ticks:
        tick = at(x, y0)
        _polyline(draw, [tick, (tick[0], top + height + GAP)], INK, 2)
    _polyline(draw, [at(x0, y1), at(x0, y0), at(x1, y0)], INK, 2)
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        _polyline(draw, [at(x, y) for x, y in line], colour, 4)
        y = top + i * LINE + LINE // 2
        _polyline(draw, [(right, y), (right + 24, y)], colour, 4)
    page = page.reduce(2)

    draw = ImageDraw.Draw(page)
    _write(draw, GAP, GAP, head, font)
    for i, name in enumerate(names):
        _write(draw, right + 30, top + i * LINE, [name], font)
    for y, text in y_ticks.items():
        _write(draw, left - 2 * GAP - _width([text], font), at(x0, y)[1] - LINE // 2, [text], font)
    below = top + height + GAP
    for x, text in x_ticks.items():
        _write(draw, at(x, y0)[0] - _width([text], font) / 2, below, [text], font)
    middle = left + (width - _width([xlabel], font)) / 2
    _write(draw, middle, below + LINE, [xlabel], font)
    _save(page, path)


def _drawable(x, y, log_y):
    """The points (n, 2) that can be drawn, in units of the axes: with log_y, log10 of y."""
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    if log_y:
        keep &= y > 0
    x = x[keep]
    y = y[keep]
    return np.stack([x, np.log10(y) if log_y else y], axis=1)


def _limits(values, margin):
    """The ends of an axis: the range of the values and a share `margin` of it on both sides."""
    low = float(values.min())
    high = float(values.max())
    if high > low:
        pad = (high - low) * margin
    else:
        pad = 0.5 * abs(low) or 0.5
    return low - pad, high + pad


def _ticks(low, high):
    """At most seven round numbers in [low, high]; they are 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low, high):
    """Round numbers from 10^low to 10^high.

    Over more than two powers of ten they are powers; over one to two, 1, 2 and 5 times each power;
    below, they are those of _ticks.
    """
    if high - low < 1:
        return _ticks(10 ** low, 10 ** high)
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = math.ceil(len(powers) / 10)
    factors = (1,) if high - low > 2 else (1, 2, 5)
    values = []
    for power in powers:
        if power % every == 0:
            values += [factor * 10.0 ** power for factor in factors]
    return [value for value in values if low <= math.log10(value) <= high]


def _number(value):
    """The text of a tick: 0.05, 300,000, 1e-09, 5e+06."""
    return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:g}"


def _polyline(draw, points, colour, width):
    """Draw a line on the page of twice the size; a single point becomes a dot."""
    points = [(2 * x, 2 * y) for x, y in points]
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse([x - width, y - width, x + width, y + width], fill=colour)
    draw.line(points, fill=colour, width=width, joint="curve")


# ---- points --------------------------------------------------------------------------------------


def scatter(path, xy, labels, title, note=None):
    """Write a map of points as a PNG file.

    xy      (n, 2) finite numbers; y points upwards, and both axes have the same scale
    labels  (n,) texts; each has a colour of its own, up to seven
    note    a text below the map

    Points are drawn in the order in which they stand.  The axes have no numbers, because a map of
    embeddings has no units.  Raises ValueError if the shapes do not fit.
    """
    xy = np.asarray(xy, np.float64)
    if xy.shape != (len(labels), 2) or not len(xy) or not np.isfinite(xy).all():
        raise ValueError(f"scatter {path}: the points are {xy.shape}, with {len(labels)} labels; "
                         f"give finite (n, 2) and one label per point")
    names = sorted(set(map(str, labels)))
    font = _font()
    side = 400
    top = 2 * LINE
    left = 4 * GAP
    right = left + side + 4 * GAP
    texts = [_plain(name) for name in names]
    foot = _wrap(note, side, font) if note else []
    head = [_plain(title)]
    low = xy.min(0)
    span = float((xy.max(0) - low).max()) or 1.0
    places = (xy - low) / span * side                       # (n, 2)
    places = places + (side - places.max(0)) / 2            # in the middle of the map

    # points are drawn at twice the size and then halved, so that they have smooth edges
    width = max(right + 16 + _width(texts, font), _width(head + foot, font)) + 2 * GAP
    height = top + max(side, len(names) * LINE) + (2 + len(foot)) * LINE
    page = Image.new("RGB", (2 * width, 2 * height), PAPER)
    draw = ImageDraw.Draw(page)
    for label, (x, y) in zip(map(str, labels), places):
        colour = COLOURS[names.index(label) % len(COLOURS)]
        _polyline(draw, [(left + x, top + side - y)], colour, 6)
    for i in range(len(names)):
        colour = COLOURS[i % len(COLOURS)]
        _polyline(draw, [(right + 4, top + i * LINE + LINE // 2)], colour, 8)
    page = page.reduce(2)

    draw = ImageDraw.Draw(page)
    _write(draw, GAP, GAP, head, font)
    for i, text in enumerate(texts):
        _write(draw, right + 16, top + i * LINE, [text], font)
    _write(draw, GAP, height - len(foot) * LINE - GAP, foot, font)
    _save(page, path)


# ---- text and files ------------------------------------------------------------------------------


def _font():
    """Pillow's own font."""
    try:
        return ImageFont.load_default(size=14)
    except (TypeError, ImportError):        # an older Pillow, or one built without FreeType
        return ImageFont.load_default()


def _plain(text):
    """The text with the signs that Pillow's font has: ASCII and the plus-minus sign.

    Accents are dropped, and other signs become a "?".
    """
    text = "".join(TYPOGRAPHY.get(c, c) for c in str(text))
    plain = ""
    for c in unicodedata.normalize("NFKD", text):
        if c.isascii() or c == "±":
            plain += c
        elif not unicodedata.combining(c):
            plain += "?"
    return plain


def _wrap(text, width, font):
    """Lines of at most `width` pixels, broken at blanks and at the text's own line ends."""
    lines = []
    for paragraph in _plain(text).split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def _width(lines, font):
    """The width of the longest line in pixels."""
    return max([0] + [math.ceil(font.getlength(line)) for line in lines])


def _write(draw, x, y, lines, font):
    """Write lines below each other; (x, y) is the top left corner."""
    for i, line in enumerate(lines):
        draw.text((x, y + i * LINE), line, fill=INK, font=font)


def _save(page, path):
    """Save whole or not at all; the folder is made if needed.  RunError if it cannot be written."""
    replace(Path(path), lambda temporary: page.save(temporary, format="PNG"))
