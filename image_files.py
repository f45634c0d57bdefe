"""Pictures from files: which files of a folder are pictures, and how one becomes a square of numbers."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
APPLE_TYPES = (".heic", ".heif")


def list_images(path: Path) -> tuple[list[Path], list[str]]:
    """The image files of a folder (or one image file), sorted by name, and the names that were skipped."""
    if not path.exists():
        raise ValueError(f"--images {path}: there is no such folder")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    visible = [file for file in files if file.is_file() and not file.name.startswith(".")]
    for file in visible:
        if file.suffix.lower() in APPLE_TYPES:
            raise ValueError(f"{file} is an HEIC photo, which cannot be read here: put a JPEG in its place "
                             "(on a Mac: Preview, File, Export)")
    images = [file for file in visible if file.suffix.lower() in IMAGE_TYPES]
    if not images:
        raise ValueError(f"--images {path} holds no image: it needs at least one of {', '.join(IMAGE_TYPES)}")
    return images, [file.name for file in files if file not in images]


def open_image(path: Path) -> Image.Image:
    """An image file as RGBA, turned as its EXIF says. ValueError if the file is damaged."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):      # 16 bits: Pillow would clip them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def read_image(path: Path, side: int) -> tuple[Tensor, Tensor | None]:
    """An image file, turned as its EXIF says, cropped to the central square, resized to side pixels.

    Returns RGB (3, side, side) in [-1, 1], over white where it is transparent, and the opacity
    (1, side, side) in [0, 1], None if it is opaque everywhere. ValueError if the file is damaged.
    """
    # Premultiplied, so that the colour hidden under transparent pixels does not bleed into the edges.
    image = ImageOps.fit(open_image(path).convert("RGBa"), (side, side), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
    rgb, alpha = pixels[:3], pixels[3:]
    return (rgb * alpha + 1 - alpha) * 2 - 1, None if alpha.min() == 1 else alpha


def read_mask(folder: Path, image: Path, side: int) -> Tensor:
    """The mask (1, side, side) in [0, 1] of an image: the file of the same name; white is concept."""
    found = [file for file in sorted(folder.glob("*")) if file.stem == image.stem
             and file.suffix.lower() in IMAGE_TYPES]
    if not found:
        raise ValueError(f"--masks {folder} has no mask for {image.name}: it needs {image.stem}.png")
    rgb, alpha = read_image(found[0], side)
    return alpha if alpha is not None and rgb.std() == 0 else rgb.mean(0, keepdim=True) / 2 + 0.5
