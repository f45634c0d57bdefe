"""The pictures of a training: files as squares of numbers, their latents and their masks."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

from attention_maps import word_masks

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
APPLE_TYPES = (".heic", ".heif")
Image.MAX_IMAGE_PIXELS = 50_000_000     # Pillow warns of more, and refuses twice as many: 0.4 GB to read
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
CUT_OUT = 0.05              # share of transparent pixels; the round corners of a screenshot have less


@dataclass
class Data:
    """The training pictures of one concept.

    images (N, 3, S, S) in [-1, 1]; latents (N, 2, c, h, w), as they are and flipped; masks (N, 2, 1, h, w),
    the largest value of each 1.
    """
    images: Tensor
    latents: Tensor
    masks: Tensor


def digest(contents: list[Path | bytes]) -> str:
    """Tells these files, whatever their names, or these bytes from others."""
    contents = (x.read_bytes() if isinstance(x, Path) else x for x in contents)
    return hashlib.sha256(b"".join(hashlib.sha256(x).digest() for x in contents)).hexdigest()[:16]


@torch.no_grad()
def prepare_data(model, files: list[Path], super_category: str, masks: str, side: int) -> Data:
    """Read, encode and mask the training pictures; afterwards the VAE is off the device.

    masks: "auto" (the opacity of a cut-out, else `word_masks`), "none", or a folder with a mask per picture.
    side: pixels, a multiple of the model's step.
    """
    images, opacities = read_images(files, side)
    # Pictures of the small model's own world are not three times as large as it draws.
    if model.small and max(min(Image.open(file).size) for file in files) > 3 * model.size[0]:
        warnings.warn(f"pictures so much larger than {model.size[0]} pixels look like photographs, and this "
                      "base model knows only its cartoon world: photographs need --weights sd15")
    pairs = torch.stack([images, images.flip(-1)], dim=1).to(model.device)
    latents = torch.stack([torch.cat([model.vae.encode(x[None]) for x in pair]) for pair in pairs])
    model.vae.cpu()
    size = latents.shape[-2:]
    if masks == "none":
        said, soft = "none, the whole picture counts", latents.new_ones(len(images), 1, *size)
    elif masks == "auto":
        said, soft = f'attention to "{super_category}"', word_masks(model, latents[:, 0], super_category)
        for i, opacity in enumerate(opacities):
            if opacity is not None:
                said += f"; the opacity of {files[i].name}"
                soft[i] = F.interpolate(opacity[None], size, mode="area")[0]
    else:
        said = f"{masks}, white is the thing, or of a cut-out what is opaque"
        found = torch.stack([read_mask(Path(masks), file, side) for file in files])
        soft = F.interpolate(found.to(model.device), size, mode="area")
    print(f"masks: {said}")
    for file, mask in zip(files, soft):
        if mask.max() <= 0:
            raise ValueError(f"the mask of {file.name} is empty: it must show where the concept is")
    soft = soft / soft.amax((1, 2, 3), keepdim=True)
    return Data(images, latents, torch.stack([soft, soft.flip(-1)], dim=1))


def read_images(files: list[Path], side: int) -> tuple[Tensor, list[Tensor | None]]:
    """Images (N, 3, side, side) and opacities, as from `read_image`; prints each kind of change."""
    images, opacities, changes = zip(*[read_image(file, side) for file in files])
    for change in sorted(set().union(*changes)):
        print(f"{change}: {', '.join(file.name for file, found in zip(files, changes) if change in found)}")
    return torch.stack(images), list(opacities)


def list_images(path: Path) -> tuple[list[Path], list[str]]:
    """The image files of a folder (or one image file), sorted by name, and the names that were skipped."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    images = [file for file in files if file.suffix.lower() in (*IMAGE_TYPES, *APPLE_TYPES)
              and file.is_file() and not file.name.startswith(".")]
    for file in images:
        if file.suffix.lower() in APPLE_TYPES:
            raise ValueError(f"{file} is an HEIC photo, which cannot be read here: put a JPEG in its place "
                             "(on a Mac: Preview, File, Export)")
    if not images:
        raise ValueError(f"no image is at --images {path}: it needs at least one of {', '.join(IMAGE_TYPES)}")
    return images, [file.name for file in files if file not in images]


def open_image(path: Path) -> tuple[Image.Image, set[str]]:
    """An image file as RGBA in sRGB, turned as its EXIF says; and in words what was changed.

    ValueError if the file is damaged or too large.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):      # 16 bits: Pillow would clip them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            rgba, said = _to_srgb(image, file.info.get("icc_profile"))
            changes = {said} if said else set()
            if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                changes.add("turned as their EXIF says (masks of your own must be turned too)")
            return rgba, changes
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """An image as RGBA, its colours as sRGB; and what was changed, "" for nothing."""
    rgba = image.convert("RGBA")
    try:
        source = profile and ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip() if source else "sRGB"
        if "sRGB" in name:
            return rgba, ""
        flat = image if image.mode in ("L", "CMYK") else rgba.convert("RGB")
        rgb = ImageCms.profileToProfile(flat, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        rgb.putalpha(rgba.getchannel("A"))
        return rgb, f"colours converted from the profile {name}"
    except (ImageCms.PyCMSError, OSError) as error:
        return rgba, f"colours as they are, the profile is unreadable ({error})"


def read_image(path: Path, side: int) -> tuple[Tensor, Tensor | None, set[str]]:
    """An image file, cropped to the central square and resized to side pixels.

    Returns RGB (3, side, side) in [-1, 1], over white where it is transparent; the opacity (1, side, side) in
    [0, 1] of a cut-out, in which at least a share CUT_OUT is transparent, else None; and in words what was
    changed. ValueError as `open_image`.
    """
    image, changes = open_image(path)
    changes |= {"cropped to the central square"} if image.width != image.height else set()
    changes |= {f"enlarged to {side} x {side} pixels"} if min(image.size) < side else set()
    # Premultiplied, so that the colour hidden under transparent pixels does not bleed into the edges.
    image = ImageOps.fit(image.convert("RGBa"), (side, side), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
    rgb, alpha = pixels[:3], pixels[3:]
    opacity = alpha if (alpha < 0.5).float().mean() >= CUT_OUT else None
    return (rgb * alpha + 1 - alpha) * 2 - 1, opacity, changes


def read_mask(folder: Path, image: Path, side: int) -> Tensor:
    """The mask (1, side, side) in [0, 1] of an image, the file of the same name: white is the thing.

    If the mask is itself a cut-out, what is opaque is the thing.
    ValueError if there is none, or one of other proportions: it would show another place.
    """
    found = [file for file in sorted(folder.glob("*")) if file.stem == image.stem
             and file.suffix.lower() in IMAGE_TYPES]
    if not found:
        raise ValueError(f"--masks {folder} has no mask for {image.name}: it needs {image.stem}.png")
    (w, h), (across, down) = (open_image(path)[0].size for path in (found[0], image))
    if abs(w * down - h * across) > max(w, h, across, down):        # of one of the two, a pixel is rounded
        raise ValueError(f"the mask {found[0]} of {w} x {h} pixels does not fit {image.name}, which has "
                         f"{across} x {down} when it is turned as its EXIF says")
    rgb, alpha, _ = read_image(found[0], side)
    return rgb.mean(0, keepdim=True) / 2 + 0.5 if alpha is None else alpha
