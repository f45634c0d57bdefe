"""Learn a concept from a few pictures: a folder of images and a super-category in, a small concept file out.

    python train.py --images examples/teddy --super "teddy bear"
    python sample.py "a <teddy> on the beach" --concept out/teddy/teddy.safetensors

Only the concept's word embedding and one value target per cross-attention layer are trained (see
perfusion.py); the networks are frozen. The output folder receives the concept, numbered previews, loss.csv
and checkpoint.pt.
On several processors: torchrun --nproc_per_node=2 train.py ...
"""

import argparse
import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import covariance
import perfusion
from attention_maps import noised_map
from diffusion import TRAIN_STEPS
from drawing import decode, draw_latents, pick_device
from perfusion import TEMPLATES, Concept
from pictures import Data, list_images, prepare_data
from weights_loader import load


@dataclass(frozen=True)
class Defaults:
    """What differs between the model families."""
    steps: int
    batch: int
    lr: float                   # of the value targets (and of trained keys)
    lr_embedding: float
    preview_every: int
    sampling_steps: int         # of a preview
    guidance: float             # of a preview
    prompts: tuple              # of a preview


SD_V1 = Defaults(steps=400, batch=16, lr=0.03, lr_embedding=0.006, preview_every=100, sampling_steps=25,
                 guidance=6.0,  # paper
                 prompts=("a photo of a {}", "a {} on the beach", "a painting of a {}", "a {} wearing a hat"))
TINY = Defaults(steps=160, batch=16, lr=0.2, lr_embedding=0.003, preview_every=80, sampling_steps=20,
                guidance=4.0,
                prompts=("a photo of a {}", "a photo of a {} on the beach", "a photo of a {} in the snow",
                         "a photo of a {} wearing a hat at night"))

WEIGHT_DECAY = 0.01                         # AdamW's default
CHECKPOINT_EVERY = 50
PREVIEW_BETA, PREVIEW_TAU = 0.7, 0.15       # the paper, for drawing with the local lock
PREVIEW_TIMESTEP = 400                      # of the attention in a preview
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def defaults(model) -> Defaults:
    """The family of a base model, told by the width of its text encodings."""
    return SD_V1 if model.unet.config.cross_attention_dim == 768 else TINY


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a training depends on, besides the model and the pictures.

    batch is the number of noised images per optimizer step, over all processes and `accumulate` parts.
    one_token is for experiments: a single learned token, started from the mean of the super-category's.
    """
    super_category: str
    token: str
    batch: int = TINY.batch
    lr: float = TINY.lr
    lr_embedding: float = TINY.lr_embedding
    seed: int = 0
    lock: str = "locked"
    beta: float = perfusion.TRAINING_BETA
    tau: float = perfusion.TRAINING_TAU
    flips: bool = True
    precision: str = "fp32"
    accumulate: int = 1
    one_token: bool = False


# --------------------------------------------------------------------------------------------------- training

class Training:
    """The state of one training, and its step; all of it goes into a checkpoint."""

    def __init__(self, model, data: Data, settings: Settings, C_inverse: Tensor,
                 embedding: Tensor | None = None):
        """C_inverse (d, d) float64. embedding (k, d): a start other than the super-category's."""
        if settings.lock not in perfusion.LOCKS:
            raise ValueError(f"the lock is one of {', '.join(perfusion.LOCKS)}, not {settings.lock}")
        self.model, self.data, self.settings, self.C_inverse = model, data, settings, C_inverse
        self.device = next(model.unet.parameters()).device
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []
        self.concept = self._start(embedding)
        self.i_star = None if self.concept.i_star is None else self.concept.i_star.cpu().double()
        self._encode_templates()
        targets = self.concept.values + (self.concept.keys if settings.lock == "trained" else [])
        self.learned = [x.requires_grad_() for x in [self.concept.embedding, *targets]]
        self.optimizer = torch.optim.AdamW([{"params": [self.concept.embedding], "lr": settings.lr_embedding},
                                            {"params": targets, "lr": settings.lr}][:1 + bool(targets)],
                                           weight_decay=WEIGHT_DECAY)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) \
            if distributed.is_initialized() else (0, 1)
        if settings.batch % (self.world * settings.accumulate):
            raise ValueError(f"a batch of {settings.batch} cannot be shared by {self.world} processes in "
                             f"{settings.accumulate} parts each: choose a multiple of both")

    def _start(self, embedding: Tensor | None) -> Concept:
        """The concept before step 0: in every respect its super-category."""
        model, s = self.model, self.settings
        ids, positions = model.tokenizer.encode([s.token], {s.token: s.super_category})
        if not positions[0][s.token]:
            raise ValueError(f'--super "{s.super_category}" has too many tokens for the text encoder')
        place = positions[0][s.token][0]
        words = model.text_encoder.embed(ids.to(self.device))[0, place].float()
        if s.one_token:
            words = words.mean(0, keepdim=True)
        if embedding is not None and embedding.shape != words.shape:
            raise ValueError(f"the initial embedding is {tuple(embedding.shape)}; the {len(words)} tokens "
                             f'of "{s.super_category}" need {tuple(words.shape)}')
        start = words.clone() if embedding is None else embedding.to(words)
        concept = Concept(s.token, s.super_category, start, beta=s.beta, tau=s.tau, lock=s.lock,
                          layers=model.unet.layer_names())
        if s.lock == "none":
            return concept
        i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, s.super_category)
        values = [o.clone() for o in model.unet.values(i_super)]
        keys = [o.clone() for o in perfusion.locked_keys(model, s.super_category)]
        return dataclasses.replace(concept, i_star=i_super, values=values, keys=keys)

    def _encode_templates(self) -> None:
        """Everything about the training prompts that does not change: ordinary embeddings and the places."""
        prompts = [template.format(self.settings.token) for template in TEMPLATES]
        ids, self.positions = self.model.tokenizer.encode(prompts, {self.settings.token: self.concept.words})
        places = [found[self.settings.token] for found in self.positions]
        if not all(places) or any(len(place[0]) != len(self.concept.embedding) for place in places):
            raise ValueError(f'"{self.concept.words}" does not fit into the training prompts with '
                             f"{len(self.concept.embedding)} tokens")
        self.ordinary = self.model.text_encoder.embed(ids.to(self.device))
        self.last = torch.tensor([place[0][-1] for place in places], device=self.device)

    def draw(self) -> tuple[Tensor, ...]:
        """The random choices of one step for the global batch B: picture, flip, template, t (B,), noise."""
        B, N = self.settings.batch, len(self.data.latents)
        choices = (N, 2 if self.settings.flips else 1, len(TEMPLATES), TRAIN_STEPS)
        picture, flip, template, t = (torch.randint(n, (B,), generator=self.generator) for n in choices)
        noise = torch.randn(B, *self.data.latents.shape[2:], generator=self.generator)
        return picture, flip, template, t, noise

    def project(self, template: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Section 4 up to the U-Net, once per step and for distinct prompts only.

        template (B,) -> keys and values, per layer (U, T, width) of the U distinct prompts, and row (B,):
        which of them each picture has. Moves i_star on.
        """
        distinct, row = template.unique(return_inverse=True)
        found = [self.positions[i] for i in distinct]
        distinct, row = distinct.to(self.device), row.to(self.device)
        e = self.model.text_encoder(perfusion.insert(self.ordinary[distinct], found, [self.concept]))
        if self.i_star is not None:
            e_concept = e.detach()[torch.arange(len(e)), self.last[distinct]][row]
            self.i_star = perfusion.running_mean(self.i_star, e_concept.cpu(), 0.99)
            d_star = self.C_inverse @ self.i_star
            self.concept = dataclasses.replace(self.concept, i_star=self.i_star.float().to(self.device),
                                               d_star=d_star.float().to(self.device))
        s = self.settings
        return *perfusion.keys_and_values(self.model.unet, e, None, [self.concept], [s.beta], [s.tau]), row

    def step(self) -> float:
        """One optimizer step; returns the loss. FloatingPointError when that is not a number."""
        picture, flip, template, t, noise = self.draw()
        keys, values, row = self.project(template)
        # The text side is differentiated once, from the sums of its gradients over the parts of the batch.
        leaves = [x.detach().requires_grad_() for x in keys + values]
        B = self.settings.batch
        mine = torch.arange(B).chunk(self.world)[self.rank]
        total = 0.0
        for part in mine.chunk(self.settings.accumulate):
            loss = self.loss(picture[part], flip[part], t[part], noise[part],
                             [x.index_select(0, row[part]) for x in leaves]) * (len(part) / B)
            self.scaler.scale(loss).backward()
            total += loss.item()
        torch.autograd.backward(keys + values, [x.grad for x in leaves])
        if self.world > 1:
            total = self._sum_over_processes(total)
        if not np.isfinite(total):
            raise FloatingPointError(f"the loss of step {len(self.losses)} is not a number")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.losses.append(total)
        return total

    def loss(self, picture: Tensor, flip: Tensor, t: Tensor, noise: Tensor,
             keys_values: list[Tensor]) -> Tensor:
        """mean(m * (target - unet(z_t, t, K, V))^2); target: what this model predicts, noise or velocity."""
        n = len(keys_values) // 2
        z, m = self.data.latents[picture, flip], self.data.masks[picture, flip]
        noise, t = noise.to(z), t.to(self.device)
        z_t = self.model.schedule.add_noise(z, noise, t)
        with self.autocast():
            output = self.model.unet(z_t, t, keys_values[:n], keys_values[n:])
        return (m * (self.model.schedule.target(z, noise, t) - output.float()).square()).mean()

    def autocast(self):
        """Mixed precision for the U-Net; the text side and the metric stay in float32."""
        precision = self.settings.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")

    def _sum_over_processes(self, total: float) -> float:
        """Add up the gradients, in place, and the losses of all processes."""
        gradients = [x.grad.flatten() for x in self.learned]
        packed = torch.cat([*gradients, torch.tensor([total], device=self.device)])
        distributed.all_reduce(packed)
        for x, grad in zip(self.learned, packed[:-1].split([x.numel() for x in self.learned])):
            x.grad.copy_(grad.view_as(x))
        return packed[-1].item()

    # ------------------------------------------------------------------------------------------------- files

    def identity(self) -> dict[str, str]:
        """What must be the same when a training is resumed."""
        fields = dataclasses.asdict(self.settings)
        return {key: str(value) for key, value in fields.items()} | {
            "base model": self.model.fingerprint, "pictures and masks": self.data.digest}

    def save(self, out: Path) -> None:
        """Write the concept, loss.csv and checkpoint.pt, each atomically; none if a number is not finite."""
        s = self.settings
        metadata = {"base": self.model.fingerprint, "steps": len(self.losses), "seed": s.seed, "lr": s.lr,
                    "images": len(self.data.images), **self.data.origin}
        self.result(metadata).save(out / f"{s.token.strip('<>')}.safetensors")
        rows = "".join(f"{step},{loss:.6g}\n" for step, loss in enumerate(self.losses, 1))
        replace_file(out / "loss.csv", lambda path: path.write_text("step,loss\n" + rows, encoding="utf-8"))
        state = {"identity": self.identity(), "learned": [x.detach() for x in self.learned],
                 "i_star": self.i_star, "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(), "generator": self.generator.get_state(),
                 "losses": self.losses}
        replace_file(out / "checkpoint.pt", lambda path: torch.save(state, path))

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint: the same numbers follow as without the interruption."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:      # torch raises many kinds for a file that it did not write
            raise ValueError(f"{path} is not a checkpoint of train.py: {type(error).__name__}") from error
        for key, value in self.identity().items():
            if identity.get(key) != value:
                raise ValueError(f"{path} cannot be resumed: {key} was {identity.get(key)}, now is {value}")
        with torch.no_grad():
            for x, saved in zip(self.learned, state["learned"], strict=True):
                x.copy_(saved)
        self.i_star, self.losses = state["i_star"], state["losses"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])

    def result(self, metadata: dict | None = None) -> Concept:
        """The concept as it is now, cut off from the training."""
        def cut(tensors):
            return tensors and [x.detach().clone() for x in tensors]
        concept = dataclasses.replace(self.concept, embedding=self.concept.embedding.detach().clone(),
                                      values=cut(self.concept.values), keys=cut(self.concept.keys),
                                      metadata=metadata or {"base": self.model.fingerprint})
        if self.i_star is None:
            return concept
        return dataclasses.replace(concept, i_star=self.i_star.float().to(self.device),
                                   d_star=(self.C_inverse @ self.i_star).float().to(self.device))


def replace_file(path: Path, write) -> None:
    """Write a file whole or not at all: write(partial), then rename."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def run(training: Training, steps: int, out: Path | None = None, preview_every: int = 0,
        checkpoint_every: int = CHECKPOINT_EVERY) -> Concept:
    """Train up to `steps` steps in all; with `out`, write previews and checkpoints. Returns the concept."""
    out = out if training.rank == 0 else None
    done = len(training.losses)
    if out and preview_every and done == 0:
        preview(training, out)
    with tqdm(total=steps, initial=done, unit="step", desc="training", disable=out is None) as bar:
        for n in range(done + 1, steps + 1):
            training.step()
            bar.update()
            bar.set_postfix(loss=f"{np.mean(training.losses[-50:]):.4f}")
            if out and (n == steps or checkpoint_every and n % checkpoint_every == 0):
                training.save(out)
            if out and preview_every and (n == steps or n % preview_every == 0):
                preview(training, out)
    return training.result()


# ---------------------------------------------------------------------------------------------------- preview

@torch.no_grad()
def preview(training: Training, out: Path) -> None:
    """Write preview_0123.png, after step 123: pictures, the word's attention, a mask, the loss so far."""
    model, concept, family = training.model, training.result(), defaults(training.model)
    prompts = [prompt.format(concept.token) for prompt in family.prompts]
    e, _, positions = perfusion.encode(model.text_encoder, model.tokenizer, ["", *prompts], [concept])
    keys, values = perfusion.keys_and_values(model.unet, e, None, [concept], [PREVIEW_BETA], [PREVIEW_TAU])
    size = training.data.latents.shape[-2:]
    latents, maps = [], []
    with training.autocast():
        for i, found in enumerate(positions[1:], 1):
            K, V = ([x[[0, i]] for x in layers] for layers in (keys, values))
            z = draw_latents(model.unet, model.schedule, K, V, [training.settings.seed], size,
                             family.sampling_steps, family.guidance)
            maps.append(noised_map(model, z, PREVIEW_TIMESTEP, [k[1:] for k in K], [v[1:] for v in V],
                                   found[concept.token][0])[0].cpu())
            latents.append(z)
    model.vae.to(training.device)
    images = decode(model.vae, torch.cat(latents))
    model.vae.cpu()
    step = len(training.losses)
    figure = draw_preview(images, torch.stack(maps), prompts, training.data, training.losses)
    replace_file(out / f"preview_{step:04d}.png", lambda path: figure.savefig(path, format="png", dpi=100))


def draw_preview(images: Tensor, maps: Tensor, titles: list[str], data: Data, losses: list[float]) -> Figure:
    """n >= 3 images (n, 3, H, W) in [0, 1], maps (n, h, w) on one scale, a training picture, the loss."""
    n = len(images)
    figure = Figure(figsize=(2.6 * n, 7.8), layout="constrained")
    grid = figure.add_gridspec(3, n)
    for i in range(n):
        panel = figure.add_subplot(grid[0, i])
        panel.imshow(images[i].permute(1, 2, 0))
        panel.set_title(titles[i], fontsize=8)
        below = figure.add_subplot(grid[1, i])
        below.imshow(maps[i], cmap="magma", vmin=0, vmax=float(maps.max()))
        below.set_title("attention of the word" if i == 0 else "", fontsize=8)
        panel.axis("off"), below.axis("off")
    first, mask, curve = (figure.add_subplot(grid[2, place]) for place in (0, 1, slice(2, None)))
    first.imshow((data.images[0] / 2 + 0.5).permute(1, 2, 0))
    first.set_title("training picture", fontsize=8)
    mask.imshow(data.masks[0, 0, 0].cpu(), cmap="magma", vmin=0, vmax=1)
    mask.set_title("its mask on the loss", fontsize=8)
    first.axis("off"), mask.axis("off")
    window = 20
    curve.plot(losses, color="0.8", linewidth=0.8)
    if len(losses) >= window:
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        curve.plot(range(window - 1, len(losses)), smooth, color="black")
    curve.set_title(f"loss, mean of {window} steps", fontsize=8)
    curve.set_xlabel("step", fontsize=8)
    curve.tick_params(labelsize=7)
    return figure


# ------------------------------------------------------------------------------------------------- the script

def read_embedding(path: Path) -> Tensor:
    """The word embedding (k, d) in a textual-inversion file {"<token>": (k, d) or (d,)}."""
    try:
        content = load_file(path) if path.suffix == ".safetensors" else \
            torch.load(path, map_location="cpu", weights_only=True)
        (_, embedding), = content.items()
        embedding = embedding.float()
    except FileNotFoundError:
        raise ValueError(f"--init-embedding {path}: there is no such file") from None
    except Exception as error:      # whatever is wrong with a foreign file
        raise ValueError(f"--init-embedding {path} is not a word embedding as diffusers writes it: one "
                         "tensor, under the token's name") from error
    return embedding[None] if embedding.ndim == 1 else embedding


def concept_name(text: str | None, images: Path) -> str:
    """The bare name of the token: given, or else made from the name of the images' folder."""
    if text is None:
        name = re.sub(r"[^a-z0-9]+", "-", images.resolve().stem.lower()).strip("-")
        if not name:
            raise ValueError(f"no name can be made from {images}: give one with --token")
        return name
    name = text[1:-1] if text.startswith("<") and text.endswith(">") else text
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}", name):
        raise ValueError(f'--token "{text}" must consist of up to 41 letters, digits, - and _')
    return name


def arguments(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--images", "--instance_data_dir", type=Path, required=True, metavar="DIR",
        help="folder of 1 to about 20 images")
    add("--super", "--initializer_token", required=True, dest="super_category", metavar="WORDS",
        help='what it is, in ordinary words: "teddy bear"')
    add("--token", "--placeholder_token", metavar="NAME",
        help="its name in prompts (default: the folder's name)")
    add("--out", "--output_dir", type=Path, metavar="DIR", help="output folder (default: out/NAME)")
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id (default: tiny)")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt, for a single file")
    add("--steps", "--max_train_steps", type=int,
        help=f"(default: {TINY.steps} for tiny, {SD_V1.steps} for SD v1)")
    add("--batch", type=int, help=f"images per step, over all processes and parts (default: {SD_V1.batch})")
    add("--accumulate", type=int, default=1, help="parts that a batch is worked through in, to save memory")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    add("--precision", choices=DTYPES, help="of the U-Net (default: fp32 on a CPU, bf16 elsewhere)")
    add("--lr", "--learning_rate", type=float,
        help=f"of the values (default: {TINY.lr} for tiny, {SD_V1.lr} for SD v1)")
    add("--lr-embedding", type=float, 
        help=f"of the word embedding (default: {TINY.lr_embedding} for tiny, {SD_V1.lr_embedding} for SD v1)")
    add("--lock", choices=perfusion.LOCKS, default="locked",
        help="keys: locked to the super-category, trained, or none: textual inversion (default: locked)")
    add("--beta", type=float, default=perfusion.TRAINING_BETA,
        help="threshold of the gate in training (default: %(default)s)")
    add("--masks", default="auto", metavar="auto|none|DIR",
        help="on the loss (default: auto, the model's attention)")
    add("--no-flip", action="store_true", help="for things whose left and right differ")
    add("--resolution", type=int, help="side of the training images, pixels (default: the model's own)")
    add("--seed", type=int, default=0)
    add("--preview", type=int, metavar="N",
        help=f"steps between previews, 0: none (default: {TINY.preview_every}; SD v1: {SD_V1.preview_every})")
    add("--checkpoint", type=int, default=CHECKPOINT_EVERY, metavar="N",
        help="steps between checkpoints, 0: only the last (default: %(default)s)")
    add("--resume", "--resume_from_checkpoint", nargs="?", const="latest", metavar="FILE",
        help="continue from the output folder's checkpoint, or from FILE")
    add("--init-embedding", type=Path, metavar="FILE", help="start from a learned_embeds.safetensors")
    add("--export-embedding", action="store_true",
        help="also write the embedding as learned_embeds.safetensors")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default: the best one present)")
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("resolution", 1), ("preview", 0),
                        ("checkpoint", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2 ** 63:
            parser.error(f"--{name} must be at least {least}, not {value}")
    for name in ("lr", "lr_embedding"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be a positive number, not {value}")
    if not abs(args.beta) < float("inf"):
        parser.error(f"--beta must be a finite number, not {args.beta}")
    if not args.super_category.strip() or re.search(r"[<>{}|]", args.super_category):
        parser.error(f'--super "{args.super_category}" must be ordinary words, like "teddy bear"')
    return args


def start_processes(device: str) -> str:
    """Join the processes that torchrun started, if it did; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def summary(training: Training, steps: int) -> str:
    """What is trained and how big it is."""
    model, s = training.model, training.settings
    frozen = sum(p.numel() for network in (model.unet, model.text_encoder) for p in network.parameters())
    targets = len(training.learned) - 1
    keys = {"locked": f'keys locked to "{s.super_category}"', "trained": "keys too", "none": "no edit"}
    shape, numbers = training.concept.embedding.shape, sum(x.numel() for x in training.learned)
    return (f"{s.token}: a word embedding of {shape[0]} x {shape[1]} and {targets} targets, {numbers:,} "
            f"numbers in all, {keys[s.lock]}; {frozen:,} parameters frozen\n"
            f"{len(training.data.images)} images, {steps} steps of {s.batch}, lr {s.lr} "
            f"(embedding {s.lr_embedding}), {s.precision} on {training.device}")


def execute(args) -> None:
    """Check, load, train, write."""
    name = concept_name(args.token, args.images)
    files, skipped = list_images(args.images)
    out = args.out or Path("out") / name
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: it must be a folder")
    if args.masks not in ("auto", "none") and not Path(args.masks).is_dir():
        raise ValueError(f"--masks {args.masks} is neither auto nor none nor a folder")
    embedding = read_embedding(args.init_embedding) if args.init_embedding else None
    checkpoint = out / "checkpoint.pt" if args.resume == "latest" else args.resume and Path(args.resume)
    if args.resume not in (None, "latest") and not checkpoint.is_file():
        raise ValueError(f"--resume {checkpoint}: there is no such file")
    device = start_processes(pick_device(args.device))
    main_process = not distributed.is_initialized() or distributed.get_rank() == 0
    report = print if main_process else lambda line: None
    if skipped:
        report(f"skipped, not images: {', '.join(skipped)}")
    out.mkdir(parents=True, exist_ok=True)

    model = load(args.weights, device=device, tokenizer=args.tokenizer)
    model.unet.checkpointing = args.checkpointing
    family = defaults(model)
    if args.resolution and args.resolution % model.size_step:
        raise ValueError(f"--resolution {args.resolution} must be a multiple of {model.size_step}")
    precision = args.precision or ("fp32" if device == "cpu" else "bf16")
    settings = Settings(args.super_category.strip(), f"<{name}>", args.batch or family.batch,
                        args.lr or family.lr, args.lr_embedding or family.lr_embedding, args.seed, args.lock,
                        args.beta, flips=not args.no_flip, precision=precision, accumulate=args.accumulate)
    steps = args.steps or family.steps
    preview_every = family.preview_every if args.preview is None else args.preview
    C_inverse = covariance.inverse(covariance.cached(model, report))
    data = prepare_data(model, files, settings.super_category, args.masks, args.resolution or 0, report)
    data.origin = {"folder": args.images.as_posix()}
    training = Training(model, data, settings, C_inverse, embedding)
    report(summary(training, steps))
    if checkpoint and checkpoint.is_file():
        training.resume(checkpoint)
        report(f"resumed after step {len(training.losses)} of {steps}")
    elif checkpoint:
        report(f"there is no {checkpoint} yet: starting from step 0")
    path = out / f"{name}.safetensors"
    try:
        concept = run(training, steps, out, preview_every, args.checkpoint)
    except FloatingPointError as error:
        kept = f"{path} and the checkpoint are the last good ones" if path.exists() else "nothing was written"
        raise ValueError(f"{error}: {kept}; try a lower --lr, or --precision fp32") from error
    if main_process and args.export_embedding:
        content = {settings.token: concept.embedding.cpu().contiguous()}
        replace_file(out / "learned_embeds.safetensors", lambda file: save_file(content, file))
    report(f"{path}: {path.stat().st_size / 1000:.0f} KB; draw with it:\n"
           f'  python sample.py "a {settings.token} on the beach" --concept {path}' if main_process else "")


def main(argv=None) -> int:
    """Run the script; returns 0, 2 for an error that the user can mend, 130 when stopped by hand."""
    args = arguments(argv)
    try:
        execute(args)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
