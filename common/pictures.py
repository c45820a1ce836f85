"""Labelled image grids, error maps and simple curves, as PNG files (Pillow and numpy only)."""
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128                  # pixels: smaller images are enlarged until their shorter side is at least this
GAP = 4                     # pixels between cells
LINE = 18                   # pixels per line of text
TYPOGRAPHY = {"–": "-", "—": "-", "−": "-", "→": "->", "×": "x", "µ": "u", "μ": "u", "…": "..."}
PAPER, INK, RULE = (255, 255, 255), (20, 20, 20), (200, 200, 200)
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (0, 0, 0)]
# COLOURS: Okabe and Ito's palette, which the colour-blind can tell apart


# ---- grid ------------------------------------------------------------------------------------------------------------


def grid(path, rows, columns, labels, scale=None, note=None):
    """Write a table of images.

    rows: list of lists of images, (H, W) in [0,1] or (H, W, 3), all of one H and W; clipped, NaN painted magenta.
    columns: a title for each column; labels: a text for each row; note: a line at the bottom.
    scale: whole number, nearest neighbour; None enlarges small images.  ValueError where the counts do not agree.
    """
    if len(labels) != len(rows) or not rows or any(len(r) != len(columns) for r in rows):
        raise ValueError(f"grid {path}: {len(rows)} rows, {len(labels)} labels; {[len(r) for r in rows]} images a row, "
                         f"{len(columns)} titles; the counts must agree and not be 0")
    sizes = {np.shape(image)[:2] for images in rows for image in images}
    if len(sizes) > 1:
        raise ValueError(f"grid {path}: the images are of several sizes {sorted(sizes)}; bring them to one")
    height, width = sizes.pop()
    scale = scale or max(1, math.ceil(CELL / min(height, width)))
    height, width, font = height * scale, width * scale, _font()
    titles = [_wrap(c, width, font) for c in columns]
    column = max([width] + [_width(t, font) for t in titles])           # a word wider than the image widens the columns
    texts = [_wrap(t, max(width, CELL), font) for t in labels]
    left = max(_width(t, font) for t in texts) + 2 * GAP
    top = max(len(t) for t in titles) * LINE + 2 * GAP
    pitch = max([height] + [len(t) * LINE for t in texts]) + GAP
    right = left + len(columns) * (column + GAP)
    remarks = _wrap(note, right - 2 * GAP, font) if note else []
    right = max(right, _width(remarks, font) + 2 * GAP)

    page = Image.new("RGB", (right, top + len(rows) * pitch + len(remarks) * LINE + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for j, title in enumerate(titles):
        _write(draw, left + j * (column + GAP), top - GAP - len(title) * LINE, title, font)
    for i, images in enumerate(rows):
        _write(draw, GAP, top + i * pitch + max(0, (height - len(texts[i]) * LINE) // 2), texts[i], font)
        for j, image in enumerate(images):
            cell = _rgb(image).repeat(scale, axis=0).repeat(scale, axis=1)
            page.paste(Image.fromarray(cell), (left + j * (column + GAP), top + i * pitch))
    _write(draw, GAP, top + len(rows) * pitch, remarks, font)
    _save(page, path)


def error_map(truth, image, limit=0.3):
    """|truth - image| as black-red-yellow-white, white from `limit` on.  (H, W) -> (H, W, 3) in [0,1]

    The caller writes the limit into the label or the note; without it the map cannot be read.
    """
    share = np.abs(np.asarray(truth, np.float64) - np.asarray(image, np.float64)) / limit
    return np.clip(np.stack([3 * share, 3 * share - 1, 3 * share - 2], axis=-1), 0, 1)


def overlay(image, labels, colours):
    """An image (H, W) in [0,1] with its labels (H, W) in half-transparent colours, {label: (r, g, b) of 255}.

    Returns (H, W, 3) in [0,1]; labels without a colour stay grey.
    """
    shown = np.repeat(np.clip(np.asarray(image, np.float64), 0, 1)[..., None], 3, axis=2)
    for label, colour in colours.items():
        where = np.asarray(labels) == label
        shown[where] = (shown[where] + np.array(colour) / 255) / 2
    return shown


def _rgb(image):
    """(H, W) or (H, W, 3) in [0,1] -> (H, W, 3) uint8; NaN becomes magenta, which no image of ours contains."""
    image = np.asarray(image, np.float64)
    image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image
    image = np.where(np.isnan(image).any(-1, keepdims=True), [1.0, 0.0, 1.0], image)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


# ---- curves ----------------------------------------------------------------------------------------------------------


def curves(path, series, xlabel, ylabel, title, log_y=False):
    """Write a line plot.  series: {name: (x, y)}, numbers of one length each.

    Points that are not finite (with log_y: not positive) are left out.  ValueError if nothing is left.
    """
    lines = {name: _drawable(x, y, log_y) for name, (x, y) in series.items()}
    points = np.concatenate([np.zeros((0, 2)), *lines.values()])
    if not len(points):
        raise ValueError(f"curves {path}: there is no finite{' positive' if log_y else ''} point; nothing to draw")
    font = _font()
    names = [_plain(name) for name in lines]
    (x0, x1), (y0, y1) = _limits(points[:, 0], 0.0), _limits(points[:, 1], 0.04)
    x_ticks = [(v, f"{v:g}") for v in _ticks(x0, x1)]
    y_ticks = [(v, f"{v:g}") for v in _ticks(y0, y1)]
    if log_y:
        y_ticks = [(math.log10(v), f"{v:g}") for v in _log_ticks(y0, y1)]
    left = max(_width([text for _, text in y_ticks], font), 20) + 4 * GAP
    top, width, height = 2 * LINE + 4 * GAP, 480, 300
    right = left + width + 4 * GAP
    page_width = max(right + 30 + _width(names, font), _width([_plain(title), _plain(ylabel)], font)) + 2 * GAP
    page_height = top + height + 3 * LINE

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * width, top + height - (y - y0) / (y1 - y0) * height

    page = Image.new("RGB", (2 * page_width, 2 * page_height), PAPER)   # lines at twice the size, halved: smooth edges
    draw = ImageDraw.Draw(page)
    for y, _ in y_ticks:
        _polyline(draw, [at(x0, y), at(x1, y)], RULE, 2)
    for x, _ in x_ticks:
        _polyline(draw, [at(x, y0), (at(x, y0)[0], top + height + GAP)], INK, 2)
    _polyline(draw, [at(x0, y1), at(x0, y0), at(x1, y0)], INK, 2)
    for i, xy in enumerate(lines.values()):
        _polyline(draw, [at(x, y) for x, y in xy], COLOURS[i % len(COLOURS)], 4)
        y = top + i * LINE + LINE // 2
        _polyline(draw, [(right, y), (right + 24, y)], COLOURS[i % len(COLOURS)], 4)
    page = page.reduce(2)

    draw = ImageDraw.Draw(page)
    _write(draw, GAP, GAP, [_plain(title), _plain(ylabel)], font)
    for i, name in enumerate(names):
        _write(draw, right + 30, top + i * LINE, [name], font)
    for y, text in y_ticks:
        _write(draw, left - 2 * GAP - _width([text], font), at(x0, y)[1] - LINE // 2, [text], font)
    for x, text in x_ticks:
        _write(draw, at(x, y0)[0] - _width([text], font) / 2, top + height + GAP, [text], font)
    _write(draw, left + (width - _width([_plain(xlabel)], font)) / 2, top + height + GAP + LINE, [_plain(xlabel)], font)
    _save(page, path)


def _drawable(x, y, log_y):
    """(n, 2) points in axis units: with log_y, y is a power of ten."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
    return np.stack([x[keep], np.log10(y[keep]) if log_y else y[keep]], axis=1)


def _limits(values, margin):
    low, high = float(values.min()), float(values.max())
    pad = (high - low) * margin if high > low else 0.5 * abs(low) or 0.5
    return low - pad, high + pad


def _ticks(low, high):
    """At most seven round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low, high):
    """Round numbers from 10^low to 10^high: powers of ten if they suffice, else 1, 2, 5 of each, else any."""
    if high - low < 1:
        return _ticks(10 ** low, 10 ** high)
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = math.ceil(len(powers) / 10)
    values = [m * 10.0 ** p for p in powers if p % every == 0 for m in ((1,) if high - low > 2 else (1, 2, 5))]
    return [v for v in values if low <= math.log10(v) <= high]


def _polyline(draw, points, colour, width):
    points = [(2 * x, 2 * y) for x, y in points]
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse([x - width, y - width, x + width, y + width], fill=colour)
    draw.line(points, fill=colour, width=width, joint="curve")


# ---- text and files --------------------------------------------------------------------------------------------------


def _font():
    try:
        return ImageFont.load_default(size=14)
    except (TypeError, ImportError):                                    # an older Pillow, or one built without FreeType
        return ImageFont.load_default()


def _plain(text):
    """Pillow's own font knows ASCII and the plus-minus sign only: accents are dropped, other signs become a "?"."""
    text = unicodedata.normalize("NFKD", "".join(TYPOGRAPHY.get(c, c) for c in str(text)))
    return "".join(c if c.isascii() or c == "±" else "?" for c in text if not unicodedata.combining(c))


def _wrap(text, width, font):
    """Lines of at most `width` pixels, broken at spaces and at the text's own line ends."""
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
    return max([0] + [math.ceil(font.getlength(line)) for line in lines])


def _write(draw, x, y, lines, font):
    for i, line in enumerate(lines):
        draw.text((x, y + i * LINE), line, fill=INK, font=font)


def _save(page, path):
    """Whoever looks at the file while it is written sees the previous picture, never half of this one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        page.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
