"""What public files of Stable Diffusion v1 call their tensors, and how to tell them from other files.

Sources: the headers of the published files, CompVis' stable-diffusion, diffusers and transformers.
"""

import re

from weight_files import LoadError

# Renames: whole dotted parts of names -> ours, "" to drop one. Names without an entry are ours already.
FOLDER_RENAMES = {
    "unet": {},
    "vae": {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},  # diffusers < 0.17
    "text_encoder": {"text_model": ""},  # transformers 5 and NovelAI's files do without
}
SINGLE_FILE_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
                        "text_encoder": "cond_stage_model.transformer."}
SINGLE_FILE_RENAMES = {  # the numbered blocks are added by single_file_renames
    "unet": {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1", "in_layers.0": "norm1", "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut"},
    "vae": {
        "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
        "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.q": "mid_block.attentions.0.to_q",
        "mid.attn_1.k": "mid_block.attentions.0.to_k", "mid.attn_1.v": "mid_block.attentions.0.to_v",
        "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", "nin_shortcut": "conv_shortcut",
        "norm_out": "conv_norm_out"},
    "text_encoder": {"text_model": ""},
}
IGNORED = {  # whole names of tensors that no network takes -> the reason
    r"(.+\.)?position_ids": "the positions are always 0, 1, 2, ...",
    r"betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|(sqrt|log)_one_minus_alphas_cumprod":
        "the noise schedule, which diffusion.py computes",
    r"sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)":
        "the noise schedule, which diffusion.py computes",
    r"model_ema\.(decay|num_updates)": "book-keeping of the moving average",
    r"logvar|scale_factor": "constants of the training code",
    r"loss\..+": "the discriminator that trained the autoencoder",
}
EMA_MINIMUM = 100  # more names model_ema.* than this are a moving average (686), fewer its book-keeping (2)

# What is not Stable Diffusion v1
FAMILIES = {  # part of a name -> what a file with such a name is
    "lora": "a LoRA", "string_to_param": "a textual inversion", "emb_params": "a textual inversion",
    "control_model.": "a ControlNet", "controlnet_cond_embedding.": "a ControlNet",
    "conditioner.embedders.": "Stable Diffusion XL", "add_embedding.": "Stable Diffusion XL",
    "cond_stage_model.model.": "Stable Diffusion 2", "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
}
INPUT_CHANNELS = {9: "an inpainting model", 8: "an instruct-pix2pix model"}
TEXT_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
LONE_PARTS = {  # end of a name in a single file without a U-Net under the usual prefix -> what the file is
    "token_embedding.weight": "a text encoder alone", "decoder.conv_in.weight": "a VAE alone",
    "time_embedding.linear_1.weight": "a U-Net alone: give the folder that holds unet, vae and text_encoder",
    "": "something else: no tensor is named model.diffusion_model.*",
}


def single_file_renames(part, config):
    """The renames of a part from a single file, with the numbered blocks that the config asks for."""
    table = dict(SINGLE_FILE_RENAMES[part])
    if part == "vae":
        last = len(config.block_out_channels) - 1
        for i in range(last + 1):  # CompVis counts the decoder's levels from the finest
            table |= {f"down.{i}.block": f"down_blocks.{i}.resnets",
                      f"down.{i}.downsample": f"down_blocks.{i}.downsamplers.0",
                      f"up.{i}.block": f"up_blocks.{last - i}.resnets",
                      f"up.{i}.upsample": f"up_blocks.{last - i}.upsamplers.0"}
    if part == "unet":
        levels, n = len(config.block_out_channels), config.layers_per_block + 1
        for i in range(1, levels * n):  # a level is its resnets and then its downsampler; number 0 is conv_in
            block, r = divmod(i - 1, n)
            if r == n - 1:
                table[f"input_blocks.{i}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
            else:
                table[f"input_blocks.{i}.0"] = f"down_blocks.{block}.resnets.{r}"
                table[f"input_blocks.{i}.1"] = f"down_blocks.{block}.attentions.{r}"
        for i in range(levels * n):
            block, r = divmod(i, n)
            attends = config.cross_attention[levels - 1 - block]
            table[f"output_blocks.{i}.0"] = f"up_blocks.{block}.resnets.{r}"
            if attends:
                table[f"output_blocks.{i}.1"] = f"up_blocks.{block}.attentions.{r}"
            if r == n - 1:  # the upsampler comes after the attention, if there is one
                table[f"output_blocks.{i}.{2 if attends else 1}"] = f"up_blocks.{block}.upsamplers.0"
    return table


def renamed(file, keys, table, prefix=""):
    """{parameter: key} for all keys of a part that are not ignored."""
    longest_first = "|".join(re.escape(part) for part in sorted(table, key=len, reverse=True))
    pattern = re.compile(rf"(?<![^.])({longest_first or '(?!)'})\.")  # whole parts only: no q inside to_q
    names = {}
    for key in keys:
        name = key.removeprefix(prefix)
        if not ignored(name):
            name = pattern.sub(lambda match: f"{table[match[1]]}." if table[match[1]] else "", name)
            if name in names:
                raise LoadError(f"{file.path}: {names[name]} and {key} are two tensors for one parameter")
            names[name] = key
    return names


def ignored(key):
    """The reason why no network needs a tensor of this name, or None."""
    return next((reason for pattern, reason in IGNORED.items() if re.fullmatch(pattern, key)), None)


def refuse_other_families(file, single=False):
    """LoadError that says what a file is, if not a Stable Diffusion v1 (single: all of it in one file)."""
    found = [kind for part, kind in FAMILIES.items() if any(part in key for key in file.entries)]
    last = ("conv_out.weight", "model.diffusion_model.out.2.weight")
    outputs = [file.entries[key].shape[:1] for key in last if key in file.entries]
    for key, entry in file.entries.items():
        if key in ("conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight") \
                and entry.shape[1:2] not in outputs:  # as many channels in as out: no picture beside them
            found.append(INPUT_CHANNELS.get(entry.shape[1]) if entry.shape[1:] else None)
        if key.endswith("attn2.to_k.weight") and entry.shape[1:]:
            found.append(TEXT_WIDTHS.get(entry.shape[1]))
    if single and not any(key.startswith(SINGLE_FILE_PREFIXES["unet"]) for key in file.entries):
        found += [kind for end, kind in LONE_PARTS.items() if any(key.endswith(end) for key in file.entries)]
    kind = next(filter(None, found), None)
    if kind:
        raise LoadError(f"{file.path}: not Stable Diffusion v1 but {kind}")
