"""Learn a concept from a few pictures: a folder of images and a super-category in, a small concept file out.

    python train.py --images examples/teddy --super "teddy bear"
    python sample.py "a <teddy> on the beach" --concept out/teddy/teddy.safetensors

Only the concept's word embedding and one value target per cross-attention layer are trained (see
perfusion.py); the networks are frozen. The method is Training.step. The output folder receives the concept,
numbered previews, the concept at every preview (steps/), loss.csv and checkpoint.pt.
On several processors: torchrun --nproc_per_node=2 train.py ...
"""

import argparse
import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import covariance
import perfusion
from concept import KEYS, Concept
from diffusion import NUM_TIMESTEPS
from export import read_embedding
from perfusion import TEMPLATES
from support import command_line, training_files
from support.accumulation import Accumulation
from support.base_model import open_model
from support.command_line import DTYPES, between, concept_name, ordinary_words, pick_device
from support.pictures import Data, digest, largest_side, list_images, prepare_data
from support.processes import Processes


@dataclass(frozen=True)
class Defaults:
    """What differs between the model families, besides `Model.training_steps` and `Model.guidance`."""
    lr: float                   # of the value targets (and of trained keys)
    lr_embedding: float
    preview_every: int
    preview_steps: int          # DDIM steps of a preview's pictures
    prompts: tuple[str, ...]    # of a preview


SD_V1 = Defaults(
    lr=0.03, lr_embedding=0.006,                # paper, section 4
    preview_every=100,          # the best step can be early: four to choose from
    preview_steps=25,           # the preview is a glance; sample.py takes 30, the paper 50
    prompts=("a photo of a {}", "a {} on the beach", "a painting of a {}", "a {} wearing a hat"))
EMBEDDED = Defaults(
    lr=0.1,                     # of the four hardest concepts 0.05 shows 47 %, 0.1 56 %
    lr_embedding=3e-4,          # at 0.001 the word leaves i_star when it stands behind another concept's word
    preview_every=160, preview_steps=20,        # one preview, at the end: it takes as long as 20 steps
    prompts=("a photo of a {}", "a photo of a {} on the beach", "a photo of a {} in the snow",
             "a photo of a {} wearing a hat at night"))
INVERSION_LR = 0.005            # of the embedding with --keys none: textual inversion's, arXiv 2208.01618
BATCH = 16                      # paper, section 4
DECAY, DECAY_STEPS = 0.99, 400  # paper: a = 0.99 at 400 steps, after which 2 % of i_star's start are left
WEIGHT_DECAY = 0.01             # AdamW's default
PHOTOGRAPH = 3                  # times the small model's side: pictures of its own world are not so large
CHECKPOINT_EVERY = 50           # a kill loses an eighth of the paper's 400 steps at most


def defaults(model) -> Defaults:
    """The defaults of a base model's family."""
    return EMBEDDED if model.small else SD_V1


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a training depends on, besides the model and the pictures.

    batch is the number of noised images per optimizer step, over all processes and `accumulate` parts.
    """
    super_category: str
    token: str
    steps: int = DECAY_STEPS
    batch: int = BATCH
    lr: float = EMBEDDED.lr
    lr_embedding: float = EMBEDDED.lr_embedding
    seed: int = 0
    keys: str = "locked"
    beta: float = perfusion.TRAINING_BETA
    tau: float = perfusion.TRAINING_TAU
    flips: bool = True
    precision: str = "fp32"
    accumulate: int = 1

    @property
    def decay(self) -> float:
        """Of i_star, for this number of steps: as much of the start is left at the end as in the paper."""
        return DECAY ** (DECAY_STEPS / self.steps)


# ------------------------------------------------------------------------------------------------- the method

class Training:
    """The state of one training, and its step."""

    def __init__(self, model, data: Data, settings: Settings, C_inverse: Tensor,
                 embedding: Tensor | None = None, processes: Processes | None = None):
        """C_inverse (d, d) float64. embedding (k, d): a start other than the super-category's."""
        self.model, self.data, self.settings, self.C_inverse, s = model, data, settings, C_inverse, settings
        self.losses, self.generator = [], torch.Generator().manual_seed(s.seed)

        # The training prompts: their ordinary embeddings (9, T, d), and where the concept stands in them.
        prompts = [template.format(s.token) for template in TEMPLATES]
        ids, self.positions = model.tokenizer.encode(prompts, {s.token: s.super_category})
        places = [found[s.token] for found in self.positions]
        self.ordinary = model.text_encoder.embed(ids)
        self.last = torch.tensor([place[0][-1] for place in places])

        # Before step 0 the concept is its super-category in every respect.
        words = self.ordinary[0, places[0][0]]
        if embedding is not None and embedding.shape != words.shape:
            raise ValueError(f"the initial embedding is {tuple(embedding.shape)}; the {len(words)} tokens "
                             f'of "{s.super_category}" need {tuple(words.shape)}')
        words = words if embedding is None else embedding.to(words)
        self.concept = Concept(s.token, s.super_category, words.clone(), beta=s.beta, tau=s.tau, keys=s.keys)
        self.i_star, targets = None, []
        if self.concept.edits:
            i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, s.super_category)
            self.concept.o_values = [o.clone() for o in model.unet.values(i_super)]
            self.concept.o_keys = [o.clone() for o in perfusion.locked_keys(model, s.super_category)]
            self.concept.layers = model.unet.layer_names()
            self.move_i_star(i_super.cpu().double())
            targets = self.concept.o_values + (self.concept.o_keys if s.keys == "trained" else [])
        self.learned = [x.requires_grad_() for x in [self.concept.embedding, *targets]]
        groups = [{"params": self.learned[:1], "lr": s.lr_embedding}, {"params": targets, "lr": s.lr}]
        self.optimizer = torch.optim.AdamW(groups if targets else groups[:1], weight_decay=WEIGHT_DECAY)
        self.sums = Accumulation(self.learned, s.batch, s.accumulate, s.precision, model.device, processes)

    def step(self) -> float:
        """Section 4, one optimizer step, from noise to the running mean of i_star; returns the loss.

        loss = mean(m (target - unet(z_t, t, K, V))^2), with masks m; target is what this model predicts. The
        batch is worked on in parts (one, unless memory is short), whose gradients `sums` adds up.
        """
        unet, schedule, s = self.model.unet, self.model.schedule, self.settings
        for picture, flip, template, t, noise in self.sums.parts(self.draw()):
            # Noise the pictures.
            z, m = self.data.latents[picture, flip], self.data.masks[picture, flip]
            noise, t = noise.to(z), t.to(z.device)
            z_t = schedule.add_noise(z, noise, t)
            # Encode the prompts with the concept's embedding, each distinct one once; row: that of a picture.
            template, row = template.unique(return_inverse=True)
            found, row = [self.positions[i] for i in template.tolist()], row.to(z.device)
            e = self.model.text_encoder(perfusion.insert(self.ordinary[template], found, [self.concept]))
            e_concept = e.detach()[range(len(e)), self.last[template]][row]
            # Edit keys and values.
            keys, values, _ = perfusion.keys_and_values(unet, e, None, [self.concept], s.beta, s.tau)
            # Predict.
            with self.sums.autocast():
                output = unet(z_t, t, [k[row] for k in keys], [v[row] for v in values]).float()
            loss = (m * (schedule.target(z, noise, t) - output).square()).mean()
            self.sums.backward(loss, e_concept)
        # Update what is learned; then i_star follows the encoding of the concept's word.
        loss, e_concept = self.sums.update(self.optimizer)
        if self.concept.edits:
            self.move_i_star(perfusion.running_mean(self.i_star, e_concept, s.decay))
        self.losses.append(loss)
        return loss

    def draw(self) -> list[Tensor]:
        """A step's random choices for the global batch: picture, flip, template, t (B,), and noise."""
        B = self.settings.batch
        counts = len(self.data.latents), 2 if self.settings.flips else 1, len(TEMPLATES), NUM_TIMESTEPS
        choices = [torch.randint(n, (B,), generator=self.generator) for n in counts]
        return [*choices, torch.randn(B, *self.data.latents.shape[2:], generator=self.generator)]

    def move_i_star(self, i_star: Tensor) -> None:
        """Give the concept another i_star (d,), float64, and the d_star that belongs to it."""
        self.i_star, d_star = i_star, self.C_inverse @ i_star
        self.concept.i_star, self.concept.d_star = (x.float().to(self.model.device) for x in (i_star, d_star))

    # ------------------------------------------------------------------------------------ what is kept of it

    def result(self) -> Concept:
        """The concept as it is now, cut off from the training."""
        def cut(x):
            return x.detach().clone() if isinstance(x, Tensor) else x and [cut(o) for o in x]
        about = {"base": self.model.fingerprint, "steps": len(self.losses), "seed": self.settings.seed,
                 "lr": self.settings.lr, **self.data.origin}
        parts = {name: cut(getattr(self.concept, name)) for name in ("embedding", "o_values", "o_keys")}
        return dataclasses.replace(self.concept, metadata=about, **parts)

    def identity(self) -> dict[str, str]:
        """What must be the same when a training is resumed."""
        about = dataclasses.asdict(self.settings) | {
            "base model": self.model.fingerprint, "pictures and masks": self.data.digest,
            "prediction": self.model.schedule.prediction_type}
        return {key: str(value) for key, value in about.items() if key not in ("steps", "accumulate")}

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs for the same numbers to follow."""
        return {"identity": self.identity(), "steps": self.settings.steps, "i_star": self.i_star,
                "metric": self.C_inverse.trace().item(),
                "learned": [x.detach() for x in self.learned], "optimizer": self.optimizer.state_dict(),
                "scaler": self.sums.scaler.state_dict(), "generator": self.generator.get_state(),
                "losses": self.losses}

    def load_state_dict(self, state: dict) -> str:
        """Continue from there: the same numbers follow as without the interruption. Returns a note."""
        metric = self.C_inverse.trace().item()
        if abs(state.get("metric", metric) / metric - 1) > 1e-3:        # another machine rounds otherwise
            raise ValueError("the covariance has changed since: train anew, or bring the old one back")
        with torch.no_grad():
            for x, saved in zip(self.learned, state["learned"], strict=True):
                x.copy_(saved)
        self.losses = state["losses"]
        if state["i_star"] is not None:
            self.move_i_star(state["i_star"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        steps = self.settings.steps
        return f"resumed after step {len(self.losses)} of {steps}" + (
            f"; the running mean of i_star was set for {state['steps']}, so the result differs from that of "
            f"{steps} at once" if steps != state["steps"] else "")


def run(training: Training, out: Path | None = None, preview_every: int = 0,
        checkpoint_every: int = CHECKPOINT_EVERY) -> Concept:
    """Train to the last step; with `out`, write previews, checkpoints and the concept, which is returned."""
    steps, done, family = training.settings.steps, len(training.losses), defaults(training.model)
    with tqdm(total=steps, initial=done, unit="step", desc="training", disable=out is None) as bar:
        for n in range(done + 1, steps + 1):
            training.step()
            bar.update()
            bar.set_postfix(loss=f"{torch.tensor(training.losses[-50:]).mean():.4f}")
            if out and (n == steps or checkpoint_every and n % checkpoint_every == 0):
                training_files.write(out, training.result(), training.losses, training.state_dict())
            if out and preview_every and (n == steps or n % preview_every == 0):
                training_files.write_preview(
                    out, training.model, training.result(), family.prompts, family.preview_steps,
                    training.settings.seed, training.sums.autocast(), training.data, training.losses)
    return training.result()


# ------------------------------------------------------------------------------------------------- the script

def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add, positive = parser.add_argument, between(1e-12, 1e6, float)
    add("--images", "--instance_data_dir", type=Path, required=True, metavar="DIR",
        help="folder of 1 to about 20 images, or one image")
    add("--super", "--initializer_token", type=ordinary_words, required=True, dest="super_category",
        metavar="WORDS", help='what it is, in ordinary words: "teddy bear"')
    add("--token", "--placeholder_token", metavar="NAME", help="its name in prompts (default: the folder's)")
    add("--out", "--output_dir", type=Path, metavar="DIR", help="output folder (default: out/NAME)")
    command_line.add_model(parser)
    add("--steps", "--max_train_steps", type=between(1, 10 ** 6),
        help="(default: what suits the model)")
    add("--masks", default="auto", metavar="auto|none|DIR",
        help="on the loss: the model's attention, nothing, or a folder of masks, white on black")
    add("--no-flip", action="store_true", help="for things whose left and right differ")
    add("--resume", "--resume_from_checkpoint", nargs="?", const="latest", metavar="FILE",
        help="continue from the output folder's checkpoint, or from FILE")
    add("--overwrite", action="store_true", help="replace a concept of other pictures")

    add = parser.add_argument_group("for experiments").add_argument
    add("--keys", "--lock", choices=KEYS, default="locked",
        help="the concept's keys: locked to the super-category, trained, or none: textual inversion")
    add("--beta", type=between(-100, 100, float), default=perfusion.TRAINING_BETA,
        help="threshold of the gate in training")
    add("--lr", "--learning_rate", type=positive,
        help=f"of the values (default: {EMBEDDED.lr} for tiny, {SD_V1.lr} for SD v1)")
    add("--lr-embedding", type=positive, help="of the word embedding (default: "
        f"{EMBEDDED.lr_embedding} for tiny, {SD_V1.lr_embedding} for SD v1, {INVERSION_LR} with --keys none)")
    add("--batch", type=between(1, 10 ** 6), default=BATCH, help="images per step, over processes and parts")
    add("--accumulate", type=between(1, 10 ** 6), default=1, help="parts of a batch, to save memory")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    add("--precision", choices=DTYPES, help="of the U-Net (default: fp32 on a CPU, bf16 elsewhere)")
    add("--resolution", type=between(1, 8192), help="side in pixels (default: as the model was trained)")
    add("--seed", type=between(0, 2 ** 62), default=0, help="of all random choices")
    add("--preview", type=between(0, 10 ** 6), metavar="N", help="steps between previews, 0: none (default: "
        f"{EMBEDDED.preview_every} for tiny, {SD_V1.preview_every} for SD v1)")
    add("--checkpoint", type=between(0, 10 ** 6), default=CHECKPOINT_EVERY, metavar="N",
        help="steps between checkpoints, 0: only the last")
    add("--init-embedding", type=Path, metavar="FILE", help="start from a textual inversion")
    return parser.parse_args(argv)


def check_folders(images: Path, path: Path, replace: bool, pictures: str) -> None:
    """ValueError if the concept file would stand among the pictures, or replace a concept of other ones."""
    out = path.parent
    if images.is_dir() and images.resolve() == out.resolve():
        raise ValueError(f"--out {out} is the pictures' folder: the next training would learn its previews")
    if path.exists() and not replace:
        with contextlib.suppress(ValueError):
            if Concept.load(path).metadata.get("pictures") == pictures:
                return
        raise ValueError(f"{path} is of other pictures: give another --token or --out, or --overwrite it")


def main(argv: Sequence[str] | None = None) -> None:
    """Check, load, train, write."""
    args = arguments(argv)
    name = concept_name(args.token, args.images)
    files, skipped = list_images(args.images)
    out = args.out or Path("out") / name
    path = out / f"{name}.safetensors"
    origin = {"images": len(files), "folder": args.images.as_posix(), "pictures": digest(files)}
    if args.prediction:
        origin["prediction"] = args.prediction      # the model's files say otherwise, or nothing
    checkpoint = out / "checkpoint.pt" if args.resume == "latest" else args.resume and Path(args.resume)
    resuming = bool(checkpoint) and checkpoint.is_file()
    check_folders(args.images, path, args.overwrite or resuming, origin["pictures"])
    if args.resume not in (None, "latest") and not resuming:
        raise ValueError(f"--resume {checkpoint}: there is no such file")
    if args.masks not in ("auto", "none") and not Path(args.masks).is_dir():
        raise ValueError(f"--masks {args.masks} is neither auto nor none nor a folder")
    embedding = read_embedding(args.init_embedding) if args.init_embedding else None
    processes = Processes(pick_device(args.device))
    report = print if processes.rank == 0 else lambda line: None
    if processes.rank:
        warnings.simplefilter("ignore")     # the first process says it
    if skipped:
        report(f"skipped, not images: {', '.join(skipped)}")
    out.mkdir(parents=True, exist_ok=True)      # OSError if it is a file

    model = open_model(args, device=processes.device, dtype=torch.float32, report=report)
    if model.small and largest_side(files) > PHOTOGRAPH * model.size[0]:
        warnings.warn(f"pictures so much larger than {model.size[0]} pixels look like photographs, and this "
                      "base model knows only its cartoon world: photographs need --weights sd15")
    model.unet.checkpointing = args.checkpointing
    family, side = defaults(model), args.resolution or model.size[0]
    lr_embedding = INVERSION_LR if args.keys == "none" else family.lr_embedding
    if side % model.size_step:
        raise ValueError(f"--resolution {side} must be a multiple of {model.size_step}")
    settings = Settings(
        super_category=args.super_category, token=f"<{name}>", steps=args.steps or model.training_steps,
        batch=args.batch, lr=args.lr or family.lr, lr_embedding=args.lr_embedding or lr_embedding,
        seed=args.seed, keys=args.keys, beta=args.beta, flips=not args.no_flip,
        precision=args.precision or ("fp32" if model.device.type == "cpu" else "bf16"),
        accumulate=args.accumulate)
    perfusion.super_encoding(model.text_encoder, model.tokenizer, args.super_category)  # refused if too long
    C_inverse = covariance.inverse(covariance.cached(model, report))
    data = prepare_data(model, files, settings.super_category, args.masks, side, report)
    data.origin = origin
    training = Training(model, data, settings, C_inverse, embedding, processes)
    report(summary(training))
    if resuming:
        report(training.load_state_dict(training_files.read_checkpoint(checkpoint, training.identity())))
    elif checkpoint:
        report(f"there is no {checkpoint} yet: starting from step 0")
    try:
        run(training, out if processes.rank == 0 else None,
            family.preview_every if args.preview is None else args.preview, args.checkpoint)
    except FloatingPointError as error:
        raise ValueError(f"{error} in step {len(training.losses)}; what was written before is good: try a "
                         "lower --lr, or --precision fp32") from error
    except KeyboardInterrupt:
        report("stopped; " + ("the same command with --resume continues from the last checkpoint"
                              if (out / "checkpoint.pt").exists() else "there is no checkpoint yet"))
        raise
    if processes.rank == 0:
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB; draw with it:\n"
              "  " + command_line.command(args, "sample.py", f"a {settings.token} on the beach",
                                          "--concept", path))


def summary(training: Training) -> str:
    """What is trained, on what, and how big it is."""
    model, s, (n, _, side, _) = training.model, training.settings, training.data.images.shape
    frozen = sum(p.numel() for network in (model.unet, model.text_encoder) for p in network.parameters())
    keys = {"locked": f'keys locked to "{s.super_category}"', "trained": "keys too", "none": "no edit"}
    (k, d), numbers = training.learned[0].shape, sum(x.numel() for x in training.learned)
    return (f"{s.token}: a word embedding of {k} x {d} and {len(training.learned) - 1} targets, {numbers:,} "
            f"numbers in all, {keys[s.keys]}; {frozen:,} frozen ({model.schedule.prediction_type})\n"
            f"{n} images of {side} x {side} pixels, {s.steps} steps of {s.batch}, lr {s.lr} (embedding "
            f"{s.lr_embedding}), {s.precision} on {model.device}")


if __name__ == "__main__":
    with command_line.plain_errors("--accumulate 4, --checkpointing or a smaller --resolution needs less; "
                            "--resume loses nothing"):
        main()
