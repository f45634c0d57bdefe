"""The base model that a command line names.

    model = open_model(args, concepts)              # args as `command_line.add_model` makes them
"""

import argparse
import warnings

import torch

import weights_loader
from concept import Concept
from support import fast_cpu
from support.command_line import pick_device

CARTOON = "tiny, a cartoon model in this repository; photographs need --weights sd15 (4.3 GB, once)"


def open_model(args: argparse.Namespace, concepts: list[Concept], dtype: torch.dtype | None = None,
               device: str | None = None, variant: str | None = None) -> weights_loader.Model:
    """The Model of --weights, --tokenizer and --prediction, made fast where it is on a CPU, and named.

    concepts: what will be drawn; their training says what the U-Net predicts. device: by default --device.
    dtype: by default float32 on a CPU, float16 elsewhere. variant: as in `weights_loader.load`. ValueError.
    """
    device = device or pick_device(args.device)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    model = weights_loader.load(args.weights, device, dtype, args.tokenizer, variant,
                                prediction(args.prediction, concepts))
    fast_cpu.enable(model)
    print(f"base model: {CARTOON if model.folder == weights_loader.TINY else model.name}")
    return model


def prediction(given: str | None, concepts: list[Concept]) -> str | None:
    """What the U-Net shall predict: as given, and as in the concepts' training; None if neither says it.

    ValueError where these differ.
    """
    known = {str(kind): concept.token for concept in concepts if (kind := concept.metadata.get("prediction"))}
    known |= {given: "--prediction"} if given else {}
    if len(known) > 1:
        pairs = " and ".join(f"{kind} ({name})" for kind, name in known.items())
        raise ValueError(f"in training and drawing the U-Net predicts the same for all, not {pairs}")
    used = next(iter(known), None)
    for concept in concepts:
        if used and not concept.metadata.get("prediction"):
            warnings.warn(f"{concept.token} was trained with what its base model's files say, and is drawn "
                          f"with {used}")
    return used
