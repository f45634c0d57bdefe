"""What public files of Stable Diffusion v1 call their tensors, and what their config.json files say.

Sources: the headers and configs of the published files, CompVis' stable-diffusion, diffusers, transformers.
"""

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


def naming(prefix: str, table: dict[str, str]) -> Callable[[str], str]:
    """A function: our name -> the prefix, and the name with whole dotted parts replaced as the table says."""
    longest_first = "|".join(re.escape(part) for part in sorted(table, key=len, reverse=True))
    pattern = re.compile(rf"(?<![^.])({longest_first or '(?!)'})(?=\.)")
    return lambda name: prefix + pattern.sub(lambda match: table[match[1]], name)


UNET = naming("", compvis_unet())
CONVOLUTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # CompVis' VAE
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers < 0.17
NAMINGS = {  # of the parts, the preferred first; those with long prefixes are of single files
    "unet": [naming("", {}), lambda name: "model.diffusion_model." + UNET(name),
             lambda name: "model_ema.diffusion_model" + UNET(name).replace(".", "")],  # the moving average
    "vae": [naming("", {}), naming("", OLD), *(naming("first_stage_model.", compvis_vae() | attention)
                                           for attention in (CONVOLUTIONS, {}, OLD))],
    "text_encoder": [naming(prefix, {}) for prefix in (
        "text_model.", "",  # transformers 4 and 5, then CompVis and NovelAI
        "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")]}


CONSTANTS = {  # entries that our code implements with one value only; what is off in SD v1 needs no row
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": unet.RESNET_EPS,
        "downsample_padding": 1, "flip_sin_to_cos": True, "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": 1,
        "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1, "conv_in_kernel": 3,
        "conv_out_kernel": 3, "time_embedding_type": "positional", "attention_type": "default"},
    "vae": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True,
        "use_quant_conv": True, "use_post_quant_conv": True},
    "text_encoder": {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {
        "beta_start": diffusion.BETA_START, "beta_end": diffusion.BETA_END, "beta_schedule": "scaled_linear",
        "num_train_timesteps": diffusion.NUM_TIMESTEPS}}
OTHER_NOISE = (  # entries of a scheduler that tell another noise, or a distilled model, where they are on
    "trained_betas", "rescale_betas_zero_snr", "shift", "sigma_data", "original_inference_steps")
WITHOUT_EFFECT = (  # entries that do not change what our networks compute:
    # of training,
    "dropout attention_dropout initializer_factor initializer_range gradient_checkpointing decay inv_gamma"
    " min_decay optimization_step power update_after_step use_ema_warmup"
    # of the precision, the caller's choice; of layers that are not there; of the size, which is the U-Net's;
    # of marks, which the tokenizer knows;
    " upcast_attention force_upcast torch_dtype dtype addition_embed_type_num_heads projection_dim"
    " sample_size bos_token_id eos_token_id pad_token_id"
    # said of every model of transformers
    " architectures transformers_version return_dict use_cache id2label label2id tie_word_embeddings"
    " num_beams num_beam_groups num_return_sequences max_length temperature top_k top_p typical_p"
    " length_penalty repetition_penalty").split()
RENAMED = {  # fields of our configs -> published, where they differ
    "attention_heads": "attention_head_dim", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "intermediate": "intermediate_size",
    "max_length": "max_position_embeddings"}


def check(public: dict, expected: dict) -> None:
    """ValueError where a published config asks for what our code does not do, known to us or not.

    An entry that is not `expected` passes where it is off (null, false, zero, empty), WITHOUT_EFFECT, or a
    note of its writer (`_name_or_path`).
    """
    for key, value in public.items():
        if key in expected and value != expected[key]:
            raise ValueError(f"{key} is {value!r}, in Stable Diffusion v1 it is {expected[key]!r}")
        if key not in expected and value and not key.startswith("_") and key not in WITHOUT_EFFECT:
            raise ValueError(f"{key} is {value!r}, which is not of Stable Diffusion v1")


def read_config(part: str, public: dict):
    """A published config.json -> the config of our network; a size that is absent or null is SD v1's.

    ValueError, TypeError where it describes another network. Sizes are positive whole numbers; channels are
    multiples of the groups of their norms and of the heads.
    """
    public = {key: value for key, value in public.items() if value is not None or key in CONSTANTS[part]}
    fields = {}
    for name, default in vars(SD_V1[part]).items():
        value = public.get(RENAMED.get(name, name), default)
        fields[name] = tuple(value) if isinstance(value, list) else value
        sizes = value if isinstance(value, list) else [value]
        per_level = isinstance(value, list) and (name, len(value)) != ("sample_size", 2)
        if value is not default and not (sizes and per_level == isinstance(default, tuple) and all(
                isinstance(n, (int, type(default))) and n > 0 for n in sizes)):
            raise ValueError(f"{name} is {value!r}, which no network of Stable Diffusion v1's kind can have")
    if part == "unet" and "down_block_types" in public:
        fields["cross_attention"] = tuple(kind == "CrossAttnDownBlock2D"
                                          for kind in public["down_block_types"])
    config = type(SD_V1[part])(**fields)
    channels = fields.get("block_out_channels") or (fields["width"],)
    divisors = [fields[name] for name in ("norm_num_groups", "attention_heads", "heads") if name in fields]
    if any(c % n for c in channels for n in divisors):
        raise ValueError(f"the channels {channels} are not multiples of the groups and heads, {divisors}")
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
    """A published scheduler_config.json -> the prediction type; ValueError where it tells another noise.

    Only what is said of the noise counts: the rest is of a sampler, and ours do not ask for it.
    """
    check({key: public.get(key) for key in OTHER_NOISE}, {})
    check({key: public[key] for key in CONSTANTS["scheduler"] if key in public}, CONSTANTS["scheduler"])
    return diffusion.Schedule.sd_v1(public.get("prediction_type") or "epsilon").prediction_type
