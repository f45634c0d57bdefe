"""Pictures and masks from files: what people's folders hold becomes what they see on their screens."""

import struct
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import weights_loader
from models import ROOT, noise, tiny_model
from support.pictures import CUT_OUT, list_images, prepare_data, read_image, read_images, read_mask

# CIE XYZ of red, green and blue as published, adapted to D50
DISPLAY_P3 = (.5151, .2412, -.0011), (.2920, .6922, .0419), (.1571, .0666, .7841)
# colours in that space -> in sRGB: linear light, XYZ, sRGB's light, sRGB's curve
AS_SRGB = {(182, 53, 46): (198, 35.8, 36.4), (90, 130, 100): (77.4, 131.4, 97.3), (128,) * 3: (128,) * 3}


def profile(primaries):
    """A colour profile with these primaries and sRGB's curve."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries):
        offset, = struct.unpack_from(">I", data, data.index(name) + 4)      # the first is in the tags' table
        struct.pack_into(">3i", data, offset + 8, *(round(x * 65536) for x in xyz))
    return bytes(data).replace("sRGB".encode("utf-16-be"), "Wide".encode("utf-16-be"))


def test_images_are_listed_in_order_and_everything_else_is_named(tmp_path):
    for name in ("2.webp", "0.jpg", "1.PNG", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    files, skipped = list_images(tmp_path)
    assert [file.name for file in files] == ["0.jpg", "1.PNG", "2.webp"]
    assert sorted(skipped) == [".hidden.png", "notes.txt"]
    assert list_images(tmp_path / "0.jpg") == ([tmp_path / "0.jpg"], [])    # a picture alone is that picture


def test_a_photo_is_turned_as_its_exif_says_and_its_mask_must_be_like_it(tmp_path):
    image = np.zeros((40, 120, 3), np.uint8)
    image[20:, 40:80] = 255                     # the lower half of the central square is white
    exif = Image.Exif()
    exif[0x0112] = 6                            # lying on its side
    Image.fromarray(np.rot90(image).copy()).save(tmp_path / "x.jpg", exif=exif, quality=100)
    rgb, alpha, changes = read_image(tmp_path / "x.jpg", 8)
    assert alpha is None and rgb[:, :3].max() < -0.8 and rgb[:, 5:].min() > 0.8 and changes == {
        "cropped to the central square", "turned as their EXIF says (masks of your own must be turned too)"}
    (tmp_path / "masks").mkdir()
    for size, fits in (((120, 40), True), ((61, 20), True), ((40, 120), False), ((40, 40), False)):
        Image.new("L", size, 255).save(tmp_path / "masks" / "x.png")
        with nullcontext() if fits else pytest.raises(ValueError, match="not fit x.jpg, which has 120 x 40"):
            read_mask(tmp_path / "masks", tmp_path / "x.jpg", 8)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1", "I;16"])
def test_every_colour_mode_is_read(tmp_path, mode):
    sixteen = Image.fromarray(np.full((10, 10), 65535, np.uint16))
    image = sixteen if mode == "I;16" else Image.new("RGB", (10, 10), "white").convert(mode)
    image.save(tmp_path / "x.png", "TIFF")      # a form that has all modes
    assert read_image(tmp_path / "x.png", 8)[0].min() > 0.95


@pytest.mark.parametrize("mode, form", [
    ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("RGB", "JPEG")])
def test_the_colours_of_a_profile_become_those_of_srgb(tmp_path, mode, form):
    for colour, expected in AS_SRGB.items():
        image = Image.new("RGB", (16, 16), colour)
        image = image.quantize() if mode == "P" else image.convert(mode)
        image.save(tmp_path / "x.png", form, icc_profile=profile(DISPLAY_P3), quality=100)
        rgb, _, changes = read_image(tmp_path / "x.png", 8)
        found = (rgb[:, 4, 4].numpy() + 1) * 127.5
        assert np.abs(found - expected).max() < 3     # of 255: JPEG and the profile round
        assert any("colours converted from the profile" in change for change in changes)


@pytest.mark.parametrize("given", [
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"x" * 200])
def test_a_profile_of_srgb_or_a_damaged_one_changes_no_colour(tmp_path, given):
    noise(16, 16).save(tmp_path / "x.png")
    noise(16, 16).save(tmp_path / "y.png", icc_profile=given)
    plain, profiled = read_image(tmp_path / "x.png", 16), read_image(tmp_path / "y.png", 16)
    assert torch.equal(plain[0], profiled[0]) and bool(profiled[2]) == (given[0] == ord("x"))


def test_transparent_pixels_become_white_and_the_opacity_of_a_cut_out_its_mask(tmp_path):
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, :8] = (255, 0, 0, 255)             # the right half is transparent black
    Image.fromarray(image).save(tmp_path / "x.png")
    rgb, alpha, _ = read_image(tmp_path / "x.png", 16)
    assert torch.equal(rgb[:, :, 12], torch.ones(3, 16)) and torch.equal(alpha[0, :, 12], torch.zeros(16))
    assert rgb[0, 0, 2] == 1 and rgb[1, 0, 2] == -1 and alpha[0, 0, 2] == 1
    image[:, 1:] = 255                          # a few transparent pixels make no cut-out
    image[:3, 0, 3] = 0
    Image.fromarray(image).save(tmp_path / "x.png")
    assert 0 < 3 / 256 < CUT_OUT and read_image(tmp_path / "x.png", 16)[1] is None


def test_a_mask_is_white_on_black_or_a_cut_out(tmp_path):
    inside, photo, masks = np.zeros((16, 16), np.uint8), tmp_path / "x.jpg", tmp_path / "masks"
    inside[4:12, 4:12] = 255
    masks.mkdir()
    noise(160, 160).save(photo)
    white, cut_out = Image.fromarray(inside), noise(16, 16)
    cut_out.putalpha(white)                     # the thing cut out of its photo
    white_cut_out = Image.merge("LA", (white, white))
    for image in (white, cut_out, white_cut_out):
        image.save(masks / "x.png")
        assert torch.equal(read_mask(masks, photo, 16)[0], torch.from_numpy(inside).float() / 255)


def test_a_picture_that_is_enlarged_is_named_once(tmp_path, capsys):
    for name, side in (("a", 16), ("b", 15), ("c", 8)):
        noise(side, side).save(tmp_path / f"{name}.png")
    read_images(list_images(tmp_path)[0], 16)
    assert capsys.readouterr().out == "enlarged to 16 x 16 pixels: b.png, c.png\n"


def test_masks_come_from_the_model_from_cut_outs_from_a_folder_or_not_at_all(tmp_path, capsys):
    model, folder = tiny_model(), tmp_path / "masks"
    folder.mkdir()
    image, grey = noise(16, 16), Image.new("L", (16, 16))
    image.save(tmp_path / "a.png")
    grey.paste(128, (8, 0, 16, 16))             # the right half
    image.putalpha(grey.point(lambda value: 2 * value - 1 if value else 0))
    image.save(tmp_path / "b.png")
    for name in "ab":
        grey.save(folder / f"{name}.bmp")

    def masks(which):
        return prepare_data(model, [tmp_path / "a.png", tmp_path / "b.png"], "teddy bear", which, 16).masks
    right = torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8)
    auto = masks("auto")
    assert auto.shape == (2, 2, 1, 8, 8) and auto[0, 0].max() == 1 and auto[0, 0].min() == 0
    assert torch.equal(auto[1, 0, 0], right)
    torch.testing.assert_close(auto[:, 1], auto[:, 0].flip(-1))
    assert masks("none").eq(1).all() and torch.equal(masks(str(folder))[0, 0, 0], right)
    assert capsys.readouterr().out.splitlines() == [
        'masks: attention to "teddy bear"; the opacity of b.png', "masks: none, the whole picture counts",
        f"masks: {folder}, white is the thing, or of a cut-out what is opaque"]


def test_the_embedded_models_own_masks_cover_the_thing_in_the_examples():
    model, files = weights_loader.load("tiny"), list_images(ROOT / "examples" / "mug")[0][:2]
    found, true = (prepare_data(model, files, "mug", masks, 128).masks[:, 0, 0] > 0.5
                   for masks in ("auto", str(ROOT / "examples" / "masks" / "mug")))
    overlap = (found & true).sum((1, 2)) / (found | true).sum((1, 2))
    assert overlap.mean() > 0.6         # intersection over union; all of the picture would have 0.3
