"""Printed letters in the shape of scikit-learn's digits: data that look like them and do not belong to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probgen.core import Count, check_arguments
from probgen.data import Quantised

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_TYPEFACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    "STIXGeneralBol",
    "cmb10",
)
_POINTS, _BLOCK = 32, 4  # along a side of the page, and of what becomes one pixel
_TURN, _LEAN, _SHIFT = 15.0, 0.25, 1.5  # at most: degrees, points to the side a point up, points
_WIDEST = 24  # points: digits leave the margins free


def letters(count: Count = 1000) -> Quantised:
    """Capital letters as 8 x 8 levels 0..16 (K = 17), made as the digits of scikit-learn are.

    A letter is printed in one of six typefaces that come with Matplotlib, most of them bold, slanted, turned by up to
    15 degrees, fitted into the height of 32 x 32 points of ink or none, and moved by a point or two; a level is the
    number of points with ink in a block of 4 x 4. It is print, not handwriting. I and O are left out, which are digits
    by shape; S, Z and B come close. Always the same images, of event shape (1, 8, 8); labels are 0 for A to 25 for Z.

    Args:
        count: how many; all letters are equally frequent.

    >>> data = letters(50)
    >>> len(data), data.event_shape, data.num_levels
    (50, (1, 8, 8), 17)
    """
    check_arguments(letters, locals())
    texts = [_LETTERS[i % len(_LETTERS)] for i in range(count)]
    levels = torch.stack([_blocks(page) for page in _printed(texts)])
    return Quantised(levels[:, None], _BLOCK**2 + 1, torch.tensor([ord(text) - ord("A") for text in texts]))


def _blocks(page: Tensor) -> Tensor:
    """How much ink there is in each block."""
    return page.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK)).sum((1, 3))


def _printed(texts: list[str]) -> Iterator[Tensor]:
    """Letters as points of ink (1) or none (0), each `(32, 32)`."""
    import matplotlib as mpl
    from PIL import ImageFont

    folder = Path(mpl.get_data_path(), "fonts", "ttf")
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", 2 * _POINTS) for name in _TYPEFACES]
    chances = torch.rand(len(texts), 5, generator=torch.Generator().manual_seed(0))
    for text, (face, *between) in zip(texts, chances.tolist(), strict=True):
        turn, lean, right, down = (2 * chance - 1 for chance in between)
        shape = _shape(text, fonts[int(face * len(fonts))], _TURN * turn, _LEAN * lean)
        yield _fitted(shape, round(_SHIFT * right), round(_SHIFT * down))


def _shape(text: str, font: FreeTypeFont, turn: float, lean: float) -> Image:
    """A letter printed large, slanted, turned, and cut out."""
    from PIL import Image, ImageDraw

    size = 4 * _POINTS
    page = Image.new("L", (size, size))
    ImageDraw.Draw(page).text((size / 2, size / 2), text, 255, font, anchor="mm")
    slant = (1, lean, -lean * size / 2, 0, 1, 0)
    page = page.transform(page.size, Image.Transform.AFFINE, slant, Image.Resampling.BILINEAR)
    page = page.rotate(turn, Image.Resampling.BILINEAR)
    return page.crop(page.getbbox())


def _fitted(shape: Image, right: int, down: int) -> Tensor:
    """It in the middle of the page, as high as that, then moved."""
    from PIL import Image

    height = _POINTS - 2
    width = min(round(height * shape.width / shape.height), _WIDEST)
    page = Image.new("L", (_POINTS, _POINTS))
    corner = ((_POINTS - width) // 2 + right, (_POINTS - height) // 2 + down)
    page.paste(shape.resize((width, height), Image.Resampling.BOX), corner)
    ink = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
    return (ink.reshape(_POINTS, _POINTS) > 127).long()
