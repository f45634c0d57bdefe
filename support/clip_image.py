"""CLIP's image tower and the shared embedding space (Radford et al. 2021, arXiv 2103.00020), for the metrics.

    clip = load(folder, text_encoder)            # openai/clip-vit-large-patch14, -base-patch32, the tiny one
    similarity = clip.image_embedding(images) @ clip.text_embedding(ids).T          # cosines

Parameter names are those of the public files (`vision_model.*`, `visual_projection.weight`), the misspelt
`pre_layrnorm` included. The text tower is whatever the caller passes in: with public weights it is filled
from the same file; the embedded model's CLIP was fitted to the frozen text encoder of its diffusion model.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_text import Layer, TextConfig, TextEncoder
from support import weight_names
from support.files import read_json, read_tensors, write, write_json

# The public preprocessor's mean and standard deviation of RGB in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VISION = ("width", "layers", "heads", "intermediate", "image_size", "patch_size")  # as in vision_config


@dataclass(frozen=True)
class ImageConfig:
    """The defaults are openai/clip-vit-large-patch14; text_width is the text tower's."""
    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    intermediate: int = 4096
    projection: int = 768
    text_width: int = 768


class Embeddings(nn.Module):
    """Pixels -> patch tokens behind one class token, with learned positions."""

    def __init__(self, config: ImageConfig):
        super().__init__()
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width ** -0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(tokens, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)      # (B, N, width)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


def vision_transformer(config: ImageConfig) -> nn.Sequential:
    """Normalised pixels (B, 3, S, S) -> tokens (B, N, width) after the last norm, the class token first."""
    sizes = config.width, config.heads, config.intermediate
    return nn.Sequential(OrderedDict(
        embeddings=Embeddings(config), pre_layrnorm=nn.LayerNorm(config.width),
        encoder=nn.Sequential(OrderedDict(
            layers=nn.Sequential(*[Layer(*sizes, causal=False) for _ in range(config.layers)]))),
        post_layernorm=nn.LayerNorm(config.width)))


class CLIP(nn.Module):
    """Images and texts as unit vectors of one space."""

    def __init__(self, config: ImageConfig, text_encoder: TextEncoder):
        super().__init__()
        self.config = config
        self.vision_model = vision_transformer(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.projection, bias=False)
        self.text_model = text_encoder

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as the public preprocessor leaves them."""
        S, (H, W) = self.config.image_size, images.shape[-2:]
        if (H, W) != (S, S):
            height, width = (S, W * S // H) if H < W else (H * S // W, S)
            images = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (height - S) // 2, (width - S) // 2
            images = images[..., top:top + S, left:left + S]
        return (images - images.new_tensor(MEAN).view(3, 1, 1)) / images.new_tensor(STD).view(3, 1, 1)

    def image_embedding(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> unit vectors (B, projection)."""
        token = self.vision_model(self.pixels(images))[:, 0]
        return F.normalize(self.visual_projection(token), dim=-1)

    def text_embedding(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> unit vectors (B, projection), read at the end mark.

        The end mark has the highest id of CLIP's vocabularies and also pads: its first occurrence counts.
        """
        e = self.text_model(self.text_model.embed(ids))
        return F.normalize(self.text_projection(e[torch.arange(len(ids)), ids.argmax(dim=-1)]), dim=-1)


def read_config(public: dict) -> tuple[ImageConfig, TextConfig | None]:
    """The content of a config.json -> the sizes of both towers, None for a text tower that is not there."""
    vision, text = public["vision_config"], public["text_config"]
    if (vision.get("hidden_act", "quick_gelu"), vision.get("layer_norm_eps", 1e-5)) != ("quick_gelu", 1e-5):
        raise ValueError("a CLIP of OpenAI's has the activation quick_gelu and a layer_norm_eps of 1e-05")
    config = ImageConfig(projection=public["projection_dim"], text_width=text["hidden_size"],
                         **{name: vision[weight_names.RENAMED.get(name, name)] for name in VISION})
    if not all(isinstance(size, int) and size > 0 for size in vars(config).values()) \
            or config.width % config.heads:
        raise ValueError(f"the sizes of a CLIP are positive whole numbers, unlike in {config}")
    return config, weight_names.read_config("text_encoder", text) if "vocab_size" in text else None


def load(folder: Path, text_encoder: TextEncoder) -> CLIP:
    """A folder with config.json and model.safetensors (or pytorch_model.bin) -> CLIP, frozen.

    text_encoder is its text tower if the file has none. Strict: every other tensor must be there with its
    shape. Raises ValueError with one sentence that names the file.
    """
    config, text_config = read_json(folder / "config.json", read_config)
    path = folder / "model.safetensors"
    path = path if path.exists() else folder / "pytorch_model.bin"
    # position_ids are 0, 1, 2, ... ; the temperature only matters in training.
    state = {name: value.float() for name, value in read_tensors(path).items()
             if not name.endswith("position_ids") and name != "logit_scale"}
    if text_config:
        text_encoder = TextEncoder(text_config)
    else:
        state |= {f"text_model.{name}": value for name, value in text_encoder.state_dict().items()}
    clip = CLIP(config, text_encoder)
    try:
        clip.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit its config.json: {reason}") from None
    return clip.eval().requires_grad_(False)


def save(clip: CLIP, folder: Path) -> None:
    """Write a CLIP as the public folders have it, in float16 and without the text tower."""
    config = clip.config
    folder.mkdir(parents=True, exist_ok=True)
    data = {"model_type": "clip", "projection_dim": config.projection,
            "text_config": {"hidden_size": config.text_width},
            "vision_config": {weight_names.RENAMED.get(name, name): getattr(config, name) for name in VISION}}
    state = {name: value.half().contiguous() for name, value in clip.state_dict().items()
             if not name.startswith("text_model.")}
    write_json(folder / "config.json", data)
    write(folder / "model.safetensors", safetensors.torch.save(state, {"format": "pt"}))
