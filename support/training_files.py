"""What a training leaves in its folder: the concept, loss.csv, a checkpoint, and previews."""

import textwrap
from pathlib import Path

import torch

import perfusion
from attention_maps import noised_map
from concept import Concept
from diffusion import decode, draw_latents
from support import files
from support.pictures import Data
from support.plots import grid_figure


def write(out: Path, concept: Concept, state: dict) -> None:
    """Write NAME.safetensors, loss.csv and checkpoint.pt, each whole; none if a number is not finite."""
    concept.save(out / f"{concept.token.strip('<>')}.safetensors")
    rows = "".join(f"{step},{loss:.6g}\n" for step, loss in enumerate(state["losses"], 1))
    files.write(out / "loss.csv", "step,loss\n" + rows)
    with files.replacing(out / "checkpoint.pt") as path:
        torch.save(state, path)


def read_checkpoint(path: Path, identity: dict[str, str]) -> dict:
    """The state in a checkpoint; ValueError if it is none, or of a training with another identity."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:      # torch raises many kinds for a file that it did not write
        raise ValueError(f"{path} is {files.what_is(path)}, no checkpoint: {type(error).__name__}") from error
    for key, value in identity.items():
        if found.get(key, value) != value:
            raise ValueError(f"{path} cannot be resumed: {key} was {found[key]}, now is {value}")
    return state


@torch.no_grad()
def write_preview(out: Path, model, concept: Concept, prompts: tuple[str, ...], steps: int, seed: int,
                  precision: torch.autocast, data: Data, losses: list[float]) -> None:
    """Write preview_0123.png, and the concept after that step as steps/NAME_0123.safetensors.

    prompts: with {} in the concept's place; steps: of DDIM; precision: the context that the U-Net runs in.
    """
    n, last = len(losses), losses[-50:]
    (out / "steps").mkdir(exist_ok=True)
    concept.save(out / "steps" / f"{concept.token.strip('<>')}_{n:04d}.safetensors")
    prompts, latents, maps = [prompt.format(concept.token) for prompt in prompts], [], []
    for prompt in prompts:
        keys, values, positions, _ = perfusion.condition(model, ["", prompt], [concept])
        with precision:
            latents.append(draw_latents(model.unet, model.schedule, keys, values, [seed],
                                        data.latents.shape[-2:], steps, model.guidance))
            # Timestep 400: outlines are decided there.
            maps.append(noised_map(model, latents[-1], 400, [k[1:] for k in keys], [v[1:] for v in values],
                                   positions[1][concept.token][0])[0].cpu())
    model.vae.to(model.device)
    images = decode(model.vae, torch.cat(latents))
    model.vae.cpu()
    cells = [[*images, data.images[0] / 2 + 0.5], [*maps, data.masks[0, 0, 0].cpu()]]
    columns = [textwrap.fill(prompt, 24) for prompt in [*prompts, "a training picture and its mask"]]
    tops = [torch.stack(maps).max()] * len(maps) + [1]
    title = f"after step {n}; mean loss of the last {len(last)}: {sum(last) / len(last):.4f}"
    figure = grid_figure(cells, ["", "attention of the word"], columns, title, tops)
    with files.replacing(out / f"preview_{n:04d}.png") as path:
        figure.savefig(path, format="png", dpi=200)
