"""The base model that a command line names.

    model = open_model(args, concepts)              # args as `command_line.add_model` makes them
"""

import argparse
import warnings
from collections.abc import Sequence

import torch

import weights_loader
from concept import Concept
from support import fast_cpu
from support.command_line import pick_device

CARTOON = "tiny, a cartoon model in this repository; photographs need --weights sd15 (4.3 GB, once)"


def open_model(args: argparse.Namespace, concepts: Sequence[Concept] = (), dtype: torch.dtype | None = None,
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


def prediction(given: str | None, concepts: Sequence[Concept]) -> str | None:
    """What the U-Net shall predict: as given, or as in the concepts' training; None if they do not say.

    A warning when a concept was trained otherwise than given, ValueError when two were trained differently.
    """
    trained = {str(c.metadata["prediction"]): c.token for c in concepts if c.metadata.get("prediction")}
    if not given and len(trained) > 1:
        pairs = " and ".join(f"{token} with {kind}" for kind, token in trained.items())
        raise ValueError(f"concepts that were trained differently do not go together: {pairs}")
    used = given or next(iter(trained), None)
    for concept in concepts:
        kind = concept.metadata.get("prediction") or "what its base model's files say"
        if used and kind != used:
            warnings.warn(f"{concept.token} was trained with {kind}, and is drawn with {used}", stacklevel=2)
    return used
