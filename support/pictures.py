"""The pictures of a training: files as squares of numbers, their latents and their masks."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

from attention_maps import word_masks

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
APPLE_TYPES = (".heic", ".heif")
MAX_PIXELS = 100_000_000    # of a picture: 0.4 GB while it is read
Image.MAX_IMAGE_PIXELS = None       # Pillow's own limit, a warning
CUT_OUT = 0.05              # share of transparent pixels; the round corners of a screenshot have less


@dataclass
class Data:
    """The training pictures of one concept.

    images (N, 3, S, S) in [-1, 1]; latents (N, 2, c, h, w), as they are and flipped; masks (N, 2, 1, h, w),
    the largest value of each 1. origin: what the concept's file will say about them.
    """
    images: Tensor
    latents: Tensor
    masks: Tensor
    origin: dict = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Tells these pictures and masks from others, as they are trained on."""
        return digest([x.cpu().numpy().tobytes() for x in (self.images, self.masks)])


def digest(contents: list[Path | bytes]) -> str:
    """Tells these files, whatever their names, or these bytes from others."""
    contents = (x.read_bytes() if isinstance(x, Path) else x for x in contents)
    return hashlib.sha256(b"".join(hashlib.sha256(x).digest() for x in contents)).hexdigest()[:16]


@torch.no_grad()
def prepare_data(model, files: list[Path], super_category: str, masks: str = "auto", side: int = 0,
                 report: Callable = print) -> Data:
    """Read, encode and mask the training pictures; afterwards the VAE is off the device.

    masks: "auto" (the opacity of a cut-out, else `word_masks`), "none", or a folder with a mask per picture.
    side: pixels, a multiple of the model's step; 0 for the side that the model was trained at.
    report: called with every line that the user should see.
    """
    side = side or model.size[0]
    images, alphas = read_images(files, side, report)
    pairs = torch.stack([images, images.flip(-1)], dim=1).to(model.device)
    latents = torch.stack([torch.cat([model.vae.encode(x[None]) for x in pair]) for pair in pairs])
    model.vae.cpu()
    size = latents.shape[-2:]
    if masks == "none":
        said, soft = "none, the whole picture counts", latents.new_ones(len(images), 1, *size)
    elif masks == "auto":
        soft = word_masks(model, latents[:, 0], super_category)
        said = f'the model\'s attention to "{super_category}"'
        cut_outs = [i for i, alpha in enumerate(alphas) if alpha is not None]
        for i in cut_outs:
            soft[i] = F.interpolate(alphas[i][None], size, mode="area")[0]
        said += f"; the opacity of {', '.join(files[i].name for i in cut_outs)}" if cut_outs else ""
    else:
        found, opaque = zip(*[read_mask(Path(masks), file, side) for file in files])
        soft = F.interpolate(torch.stack(found).to(model.device), size, mode="area")
        said = f"{masks}, white is the thing"
        said += f" (in {sum(opaque)} of {len(files)}: what is opaque)" if any(opaque) else ""
    report(f"masks: {said}")
    largest = soft.amax((1, 2, 3), keepdim=True)
    for file, value in zip(files, largest):
        if value <= 0:
            raise ValueError(f"the mask of {file.name} is empty: it must show where the concept is")
    soft = soft / largest
    return Data(images, latents, torch.stack([soft, soft.flip(-1)], dim=1))


def read_images(files: list[Path], side: int, report: Callable = print) -> tuple[Tensor, list[Tensor | None]]:
    """Images (N, 3, side, side) and opacities, as from `read_image`; a line for every kind of change."""
    images, opacities, changes = zip(*[read_image(file, side) for file in files])
    for change in sorted(set().union(*changes)):
        report(f"{change}: {', '.join(file.name for file, found in zip(files, changes) if change in found)}")
    return torch.stack(images), list(opacities)


def list_images(path: Path) -> tuple[list[Path], list[str]]:
    """The image files of a folder (or one image file), sorted by name, and the names that were skipped."""
    if not path.exists():
        raise ValueError(f"--images {path}: there is no such folder")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    images = [file for file in files if file.suffix.lower() in (*IMAGE_TYPES, *APPLE_TYPES)
              and file.is_file() and not file.name.startswith(".")]
    for file in images:
        if file.suffix.lower() in APPLE_TYPES:
            raise ValueError(f"{file} is an HEIC photo, which cannot be read here: put a JPEG in its place "
                             "(on a Mac: Preview, File, Export)")
    if not images:
        raise ValueError(f"--images {path} holds no image: it needs at least one of {', '.join(IMAGE_TYPES)}")
    return images, [file.name for file in files if file not in images]


def largest_side(files: list[Path]) -> int:
    """The shorter side of the largest of these pictures, in pixels; 0 if one cannot be read."""
    try:
        return max(min(Image.open(file).size) for file in files)
    except OSError:         # `open_image` says what is wrong
        return 0


def open_image(path: Path) -> tuple[Image.Image, set[str]]:
    """An image file as RGBA in sRGB, turned as its EXIF says; and in words what was changed.

    ValueError if the file is damaged or larger than MAX_PIXELS.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"it has {file.width * file.height / 1e6:.0f} megapixels, at most "
                                 f"{MAX_PIXELS / 1e6:.0f} are possible")
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):      # 16 bits: Pillow would clip them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            rgba, profile = _to_srgb(image, file.info.get("icc_profile"))
            changes = {f"colours converted from the profile {profile}"} if profile else set()
            if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                changes.add("turned as their EXIF says (masks of your own must be turned too)")
            return rgba, changes
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """An image as RGBA, its colours as sRGB; and the name of the profile that it had, "" for sRGB itself."""
    rgba = image.convert("RGBA")
    try:
        source = profile and ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip() if source else "sRGB"
        if "sRGB" in name:
            return rgba, ""
        flat = image if image.mode in ("L", "CMYK") else rgba.convert("RGB")
        rgb = ImageCms.profileToProfile(flat, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        rgb.putalpha(rgba.getchannel("A"))
        return rgb, name
    except (ImageCms.PyCMSError, OSError) as error:
        return rgba, f"unreadable ({error})"


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


def read_mask(folder: Path, image: Path, side: int) -> tuple[Tensor, bool]:
    """The mask (1, side, side) in [0, 1] of an image, the file of the same name: white is the thing.

    If the mask is itself a cut-out, what is opaque is the thing; the second result says whether it was.
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
    return (rgb.mean(0, keepdim=True) / 2 + 0.5, False) if alpha is None else (alpha, True)
