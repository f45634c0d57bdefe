"""The image tower and the shared space equal transformers' CLIPModel; bad files are one sentence."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from support import clip_image

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model of the reference, and the same as we read it, and its folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    both = {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 24}
    text = both | {"vocab_size": 100, "hidden_size": 32, "max_position_embeddings": 16, "eos_token_id": 99}
    vision = both | {"hidden_size": 48, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():       # norms and biases away from their trivial starts
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, clip_image.load(folder, None), folder


@torch.no_grad()
def test_image_and_text_embeddings_equal_transformers(pair):
    model, clip, _ = pair
    images = torch.rand(3, 3, 32, 32)
    ids = torch.full((2, 16), 99)
    ids[0, :4], ids[1, :6] = torch.tensor([98, 5, 7, 2]), torch.tensor([98, 1, 2, 3, 4, 5])
    output = model(input_ids=ids, pixel_values=clip.pixels(images))
    assert (clip.image_embedding(images) - output.image_embeds).abs().max() < 1e-5
    assert (clip.text_embedding(ids) - output.text_embeds).abs().max() < 1e-5


def test_pixels_equal_the_public_preprocessor(pair):
    """Pillow resizes in 8 bits and ours in float: equal within two of 255 levels."""
    clip = pair[1]
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for height, width in ((80, 51), (45, 97), (32, 32), (20, 24)):
        image = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), (height, width), mode="bilinear")[0]
        image = image.mul(255).round().byte()
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = processor(picture, return_tensors="pt").pixel_values
        difference = (clip.pixels(image[None] / 255) - expected).abs().max()
        assert difference < 2 / 255 / min(clip_image.STD), (height, width)


def test_a_saved_clip_uses_the_text_tower_passed_in(pair, tmp_path):
    clip, images, ids = pair[1], torch.rand(2, 3, 32, 32), torch.tensor([[98, 1, 2, 99]])
    clip_image.save(clip, tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config, encoding="utf-8-sig")     # as Notepad saves it
    again = clip_image.load(tmp_path, clip.text_model)
    for a, b in ((again.image_embedding(images), clip.image_embedding(images)),
                 (again.text_embedding(ids), clip.text_embedding(ids))):
        assert (a - b).abs().max() < 1e-2       # a float16 file


@pytest.mark.parametrize("config, change", [
    ("{}", {}), ('{"hidden_act": "gelu"}', {}), ('{"layer_norm_eps": 1e-6}', {}), ('{"patch_size": "8"}', {}),
    ('{"num_attention_heads": 5}', {}), (None, {"another.weight": torch.ones(1)}),
    (None, {"visual_projection.weight": torch.ones(5, 48)})])
def test_other_configs_and_tensors_are_one_sentence(pair, tmp_path, config, change):
    _, clip, folder = pair
    public = json.loads((folder / "config.json").read_text())
    public["vision_config"] |= json.loads(config or "{}")
    (tmp_path / "config.json").write_text("{}" if config == "{}" else json.dumps(public))
    save_file(load_file(folder / "model.safetensors") | change, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        clip_image.load(tmp_path, clip.text_model)
    assert "\n" not in str(error.value)
