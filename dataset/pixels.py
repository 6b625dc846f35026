"""One image: as RGB, upright, cut to size.

FORMATS   what is read, SUFFIXES how such files are called
upright   a stored image as RGB
cut       scaled to cover a size, cropped to it
reason    why one could not be read
"""

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]
SUFFIXES = [".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".apng", ".webp"]
SUFFIXES += [".bmp", ".dib", ".tif", ".tiff", ".gif"]
if "avif" in features.modules and features.check("avif"):  # not every pillow has it
    FORMATS, SUFFIXES = [*FORMATS, "AVIF"], [*SUFFIXES, ".avif"]
LARGEST = 2**29  # bytes of an image's file
# What pillow raises on damaged files (flipping bytes shows most of them), and we on captions.
BAD = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)


def upright(stored: bytes) -> Image.Image:
    """An image file as RGB, turned as its EXIF data says, what is transparent over white."""
    with Image.open(io.BytesIO(stored), formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):  # grey of 16 bits, which convert() would clip at 255
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its grey has 32 bits, whose white nobody knows")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cut(
    image: Image.Image, size: tuple[int, int], where: tuple[float, float]
) -> tuple[Tensor, tuple[int, ...]]:
    """The image scaled to cover `size`, cropped to it: (3, H, W) in [-1, 1], and its six sizes.

    where: the crop's place down and across, from 0 to below 1; .5 is the middle. Of the six sizes,
    as SDXL means them, the crop's are in pixels of the scaled image.
    """
    scale = max(size[0] / image.height, size[1] / image.width)
    spare = [int(side * scale - s + 1e-6) for side, s in zip(image.size[::-1], size, strict=True)]
    top, left = (int(u * (pixels + 1)) for u, pixels in zip(where, spare, strict=True))
    right = min(image.width, (left + size[1]) / scale)  # rounding must not lead out of the image
    bottom = min(image.height, (top + size[0]) / scale)
    box = (left / scale, top / scale, right, bottom)
    scaled = image.resize(size[::-1], Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.array(scaled)).movedim(-1, 0).float() / 127.5 - 1
    return pixels, (image.height, image.width, top, left, *size)


def reason(error: Exception) -> str:
    """What to say of a bad sample, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its own text names no file but an address
        return "no JPEG, PNG or WebP image, nor another that is read"
    if isinstance(error, UnicodeEncodeError):
        return "its name is no UTF-8 text"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
