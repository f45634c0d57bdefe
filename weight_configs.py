"""The config.json files of public Stable Diffusion v1 folders, read into the networks' configs and written.

READ[part](public) takes a published config.json (a dict) and returns the config of that network, or raises
ValueError where it describes another model; WRITE[part](config) is the way back.
"""

import clip_text
import unet
import vae

# Entries that our networks implement with one value only
UNET_REQUIRED = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": unet.RESNET_EPS,
    "downsample_padding": 1, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "use_linear_projection": False, "num_attention_heads": None,
    "only_cross_attention": False, "dual_cross_attention": False, "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "class_embed_type": None,
    "addition_embed_type": None, "encoder_hid_dim": None,
}
VAE_REQUIRED = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "shift_factor": None, "latents_mean": None, "latents_std": None,
}
VAE_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
TEXT_REQUIRED = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
TEXT_NAMES = {  # ours -> published
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "intermediate": "intermediate_size",
    "max_length": "max_position_embeddings"}


def read_unet(public):
    """unet/config.json -> UNetConfig; an entry that is absent has SD v1's value."""
    public = write_unet(unet.SD_V1) | public
    cross = tuple(kind == "CrossAttnDownBlock2D" for kind in public["down_block_types"])
    for key, value in (UNET_REQUIRED | unet_blocks(cross)).items():
        if public[key] != value:
            raise ValueError(f"not a Stable Diffusion v1 U-Net: its config has {key} = {public[key]!r}, "
                             f"not {value!r}")
    sizes = {name: public[name] for name in unet.UNetConfig.__dataclass_fields__ if name in public}
    return unet.UNetConfig(**sizes | {"block_out_channels": tuple(public["block_out_channels"]),
                                      "attention_heads": public["attention_head_dim"],
                                      "cross_attention": cross})


def write_unet(config):
    """UNetConfig -> unet/config.json."""
    return UNET_REQUIRED | unet_blocks(config.cross_attention) | {
        "in_channels": config.in_channels, "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels), "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.cross_attention_dim, "attention_head_dim": config.attention_heads,
        "norm_num_groups": config.norm_num_groups}


def unet_blocks(cross_attention):
    """The kinds of the blocks, down and up, for one entry of cross_attention per level."""
    down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in cross_attention]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    return {"down_block_types": down, "up_block_types": up}


def read_vae(public):
    """vae/config.json -> VAEConfig; an entry that is absent has SD v1's value."""
    for key, value in VAE_REQUIRED.items():
        if public.get(key, value) != value:
            raise ValueError(f"not a Stable Diffusion v1 VAE: its config has {key} = {public[key]!r}, "
                             f"not {value!r}")
    for key, kind in VAE_BLOCKS.items():
        if set(public.get(key) or [kind]) != {kind}:
            raise ValueError(f"not a Stable Diffusion v1 VAE: its config has {key} = {public[key]!r}")
    sizes = {name: public[name] for name in vae.VAEConfig.__dataclass_fields__ if name in public}
    sizes["block_out_channels"] = tuple(public.get("block_out_channels", vae.SD_V1.block_out_channels))
    return vae.VAEConfig(**sizes)


def write_vae(config):
    """VAEConfig -> vae/config.json."""
    levels = len(config.block_out_channels)
    return {"_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": config.in_channels,
            "out_channels": config.in_channels, "latent_channels": config.latent_channels,
            "block_out_channels": list(config.block_out_channels),
            "layers_per_block": config.layers_per_block, "norm_num_groups": config.norm_num_groups,
            "scaling_factor": config.scaling_factor,
            **{key: [kind] * levels for key, kind in VAE_BLOCKS.items()}}


def read_text_encoder(public):
    """text_encoder/config.json -> TextConfig; an entry that is absent has SD v1's value."""
    for key, value in TEXT_REQUIRED.items():
        if public.get(key, value) != value:
            raise ValueError(f"not the text encoder of Stable Diffusion v1: its config has {key} = "
                             f"{public[key]!r}, not {value!r}")
    return clip_text.TextConfig(**{name: public.get(theirs, getattr(clip_text.SD_V1, name))
                                   for name, theirs in TEXT_NAMES.items()})


def write_text_encoder(config):
    """TextConfig -> text_encoder/config.json."""
    special = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1,
               "pad_token_id": config.vocab_size - 1}
    return {"architectures": ["CLIPTextModel"]} | TEXT_REQUIRED | special | {
        theirs: getattr(config, name) for name, theirs in TEXT_NAMES.items()}


READ = {"unet": read_unet, "vae": read_vae, "text_encoder": read_text_encoder}
WRITE = {"unet": write_unet, "vae": write_vae, "text_encoder": write_text_encoder}
