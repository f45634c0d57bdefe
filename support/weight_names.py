"""What public files of Stable Diffusion v1 call their tensors, and what their config.json files say.

Sources: the headers and configs of the published files, CompVis' stable-diffusion, diffusers, transformers.
"""

import dataclasses
import re
from collections.abc import Callable

import clip_text
import diffusion
import unet
import vae

SD_V1 = {"unet": unet.SD_V1, "vae": vae.SD_V1, "text_encoder": clip_text.SD_V1}


def compvis_unet() -> dict[str, str]:
    """Parts of our names in the U-Net -> CompVis', where the modules of all levels are numbered through."""
    table = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2", "norm1": "in_layers.0", "conv1": "in_layers.2",
             "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
             "conv_shortcut": "skip_connection"}
    table |= {f"transformer_blocks.0.norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2)}  # as they are
    for level in range(4):
        for i in range(3):
            for j, kind in enumerate(("resnets", "attentions")):
                table[f"down_blocks.{level}.{kind}.{i}"] = f"input_blocks.{3 * level + i + 1}.{j}"
                table[f"up_blocks.{level}.{kind}.{i}"] = f"output_blocks.{3 * level + i}.{j}"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
        table[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{3 * level + 2}.{2 if level else 1}"
    return table


def compvis_vae() -> dict[str, str]:
    """Parts of our names in the VAE -> CompVis', where the decoder's levels are counted from the finest."""
    table = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
             "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "conv_shortcut": "nin_shortcut",
             "conv_norm_out": "norm_out"}
    for level in range(4):
        table |= {f"down_blocks.{level}.resnets": f"down.{level}.block",
                  f"down_blocks.{level}.downsamplers.0": f"down.{level}.downsample",
                  f"up_blocks.{level}.resnets": f"up.{3 - level}.block",
                  f"up_blocks.{level}.upsamplers.0": f"up.{3 - level}.upsample"}
    return table


def naming(prefix: str, table: dict[str, str] = {}) -> Callable[[str], str]:
    """A function: our name -> the prefix, and the name with whole dotted parts replaced as the table says."""
    longest_first = "|".join(re.escape(part) for part in sorted(table, key=len, reverse=True))
    pattern = re.compile(rf"(?<![^.])({longest_first or '(?!)'})(?=\.)")
    return lambda name: prefix + pattern.sub(lambda match: table[match[1]], name)


UNET = naming("", compvis_unet())
CONVOLUTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # CompVis' VAE
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers < 0.17
NAMINGS = {  # of the parts, the preferred first; those with long prefixes are of single files
    "unet": [naming(""), lambda name: "model.diffusion_model." + UNET(name),
             lambda name: "model_ema.diffusion_model" + UNET(name).replace(".", "")],  # the moving average
    "vae": [naming(""), naming("", OLD), *(naming("first_stage_model.", compvis_vae() | attention)
                                           for attention in (CONVOLUTIONS, {}, OLD))],
    "text_encoder": [naming(prefix) for prefix in (
        "text_model.", "",  # transformers 4 and 5, then CompVis and NovelAI
        "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")]}


CONSTANTS = {  # entries that our code implements with one value only
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": unet.RESNET_EPS,
        "downsample_padding": 1, "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
        "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
        "use_linear_projection": False, "num_attention_heads": None, "only_cross_attention": False,
        "dual_cross_attention": False, "transformer_layers_per_block": 1, "class_embed_type": None,
        "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
        "addition_embed_type": None, "encoder_hid_dim": None},
    "vae": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True,
        "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None, "latents_mean": None,
        "latents_std": None},
    "text_encoder": {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {
        "beta_start": diffusion.BETA_START, "beta_end": diffusion.BETA_END, "beta_schedule": "scaled_linear",
        "num_train_timesteps": diffusion.NUM_TIMESTEPS, "trained_betas": None, "rescale_betas_zero_snr": False}}
RENAMED = {  # fields of our configs -> published, where they differ
    "attention_heads": "attention_head_dim", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "intermediate": "intermediate_size",
    "max_length": "max_position_embeddings"}


def check(public: dict, expected: dict) -> None:
    """ValueError where a published config says something else than expected."""
    for key, value in expected.items():
        if public.get(key, value) != value:
            raise ValueError(f"{key} is {public[key]!r}, in Stable Diffusion v1 it is {value!r}")


def read_config(part: str, public: dict):
    """A published config.json -> the config of our network; what is absent or null is as in SD v1.

    ValueError, TypeError where it describes another network.
    """
    public = {key: value for key, value in public.items() if value is not None}
    fields = {}
    for name, default in vars(SD_V1[part]).items():
        value = public.get(RENAMED.get(name, name), default)
        fields[name] = tuple(value) if isinstance(value, list) else value
        if isinstance(default, float) and not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r}, not a number")
    if part == "unet" and "down_block_types" in public:
        fields["cross_attention"] = tuple(kind == "CrossAttnDownBlock2D"
                                          for kind in public["down_block_types"])
    config = dataclasses.replace(SD_V1[part], **fields)
    check(public, write_config(part, config))
    return config


def write_config(part: str, config) -> dict:
    """The config of one of our networks -> its config.json in the published layout."""
    public = CONSTANTS[part] | {RENAMED.get(name, name): list(value) if isinstance(value, tuple) else value
                                for name, value in vars(config).items() if name != "cross_attention"}
    if part == "unet":
        down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in config.cross_attention]
        up = [kind.replace("Down", "Up") for kind in reversed(down)]
        return public | {"in_channels": config.out_channels, "down_block_types": down, "up_block_types": up}
    if part == "vae":
        n = len(config.block_out_channels)
        return public | {"out_channels": config.in_channels, "down_block_types": ["DownEncoderBlock2D"] * n,
                         "up_block_types": ["UpDecoderBlock2D"] * n}
    return public


def read_prediction(public: dict) -> str:
    """A published scheduler_config.json -> the prediction type; ValueError where the noise is not SD v1's."""
    check(public, CONSTANTS["scheduler"])
    return public.get("prediction_type", "epsilon")
