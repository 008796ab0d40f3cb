"""Decoding images. The transform after it is the encoder's own (`Encoder.transform`)."""

import io

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Larger images are refused: Pillow's own bound against decompression bombs, made an error here."""


class DecodeError(ValueError):
    """An image that cannot be decoded; the message is the reason that the store records."""


def decode(data: bytes) -> Image.Image:
    """Return an image's pixels as RGB, upright.

    Parameters
    ----------
    data
        The file's bytes.

    Raises
    ------
    DecodeError
        If they are not a whole image of a size that can be handled.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS}")
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise DecodeError("not an image that Pillow knows") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def blank_image() -> Image.Image:
    """Return a small black image."""
    return Image.new("RGB", (8, 8))
