"""PNG and JPEG files: X-rays and other pictures, read, made square, and written.

A picture is upright already: what is left in the file stays left. For an X-ray of the chest this is
the radiological order of all slices here, with the patient's right on the left. Whether bone is
bright or dark (MONOCHROME2 or MONOCHROME1 in DICOM) is not known of a PNG, so nothing is inverted.
"""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from data.files import DataError, is_picture, write_atomically
from data.opening import in_plain_words

MAX_PIXELS = 2**26          # 67 million; the largest X-rays have about 18 million
BRIGHT_RIM = 0.9            # in the pictures of all scanners, air is dark
ORIENTATION = 0x0112        # the number of this field in EXIF


@dataclass
class StoredPicture:
    """One file. The values are in [0, 1] by the number of bits, and not stretched."""

    array: np.ndarray               # (H, W) float32 in [0, 1]; row 0 is the top
    path: Path
    notes: list = field(default_factory=list)       # one sentence for every repair and oddity


def read_picture(path):
    """Read a PNG or JPEG file with 1, 8 or 16 bits, grey or in colour -> StoredPicture.

    The values of 8 bits are divided by 255. Pictures of 16 bits often hold 12 bits: if no value is
    above 4095, all are divided by 4095, and otherwise by 65535. Three equal channels are one grey
    channel. Of other colours, the luminance is used. Transparency is ignored.
    DataError if the file is missing, damaged, ends early, is no PNG or JPEG, is larger than
    MAX_PIXELS, or holds a single value.
    """
    path = Path(path)
    if not is_picture(path):
        raise DataError(f"{path}: only .png, .jpg and .jpeg are read as pictures; "
                        "convert the file to PNG")
    notes = []
    with in_plain_words(path):
        image = _decoded(path, path.read_bytes(), notes)
        array = _grey(image, notes)
    if array.min() == array.max():
        raise DataError(f"{path}: is constant (every pixel is {array.min():g}); "
                        "remove or replace it")
    rim = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
    if np.median(rim) > BRIGHT_RIM and np.median(array) < np.median(rim) / 2:
        notes.append("is bright around the body, so it may be inverted (MONOCHROME1); "
                     "it is used as it is")
    return StoredPicture(array, path, notes)


def _decoded(path, content, notes):
    """Decode the bytes of a file, and turn the picture as its EXIF data say -> a Pillow image."""
    try:
        image = Image.open(BytesIO(content), formats=("PNG", "JPEG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(path) from None
    except UnidentifiedImageError:
        what = "is empty" if not content else "is no PNG or JPEG picture"
        raise DataError(f"{path}: {what}; download it again, or convert it to PNG") from None
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    image.load()
    if image.getexif().get(ORIENTATION, 1) not in (0, 1):
        image = ImageOps.exif_transpose(image)
        notes.append("is turned as its EXIF data say")
    return image


def _too_large(path):
    return DataError(f"{path}: has more than {MAX_PIXELS / 1e6:.0f} million pixels, which no X-ray "
                     "has; make it smaller or remove it")


def _grey(image, notes):
    """The values of a Pillow image of any mode -> (H, W) float32 in [0, 1]."""
    if image.mode.startswith("I"):                  # 16 bits; older versions of Pillow say 32
        array = np.asarray(image).astype(np.float32)
        if array.max() > 4095:
            return array / 65535
        notes.append("has 16 bits of which 12 are used; 0 to 4095 become 0 to 1")
        return array / 4095
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in ("RGBA", "LA"):
        if image.getchannel("A").getextrema() != (255, 255):
            notes.append("has transparent parts; their own values are used")
        image = image.convert(image.mode[:-1])
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"), np.float32) / 255
    image = image.convert("RGB")                    # from CMYK or YCbCr
    colours = np.asarray(image)                     # (H, W, 3)
    if (colours == colours[:, :, :1]).all():
        return colours[:, :, 0].astype(np.float32) / 255
    notes.append("is in colour; its luminance is used")
    return np.asarray(image.convert("L"), np.float32) / 255


def fit_picture(array, size):
    """Make a picture square: (H, W) -> (size, size) float32.

    The shorter side becomes `size`, and the middle of the longer side is used. The packagings on
    which reports are generated do so: nothing is stretched, and no border has to be learned. What
    lies at the ends of the longer side is lost.
    The filter is a triangle as wide as the reduction, as in volumes.fit_slices.
    """
    height, width = array.shape
    side = min(height, width)
    left = (width - side) / 2
    top = (height - side) / 2
    image = Image.fromarray(np.ascontiguousarray(array, np.float32))
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


def write_picture(path, array, description, overwrite=False):
    """Write (H, W) in [0, 1] as a grey PNG of 8 bits; 0 to 1 become 0 to 255.

    description: How it was made, for the text field Description. It always says synthetic.
    DataError if the file exists and `overwrite` is False, or if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; move it away or choose another folder")
    text = description if "synthetic" in description else f"synthetic; {description}"
    about = PngInfo()
    about.add_text("Description", text)
    levels = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    try:
        with write_atomically(path) as file:
            Image.fromarray(levels).save(file, "PNG", pnginfo=about)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
