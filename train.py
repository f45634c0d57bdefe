"""Learn a concept from a few pictures: a folder of images and a super-category in, a small concept file out.

    python train.py --images examples/teddy --super "teddy bear"
    python sample.py "a <teddy> on the beach" --concept out/teddy/teddy.safetensors

Only the concept's word embedding and one value target per cross-attention layer are trained (see
perfusion.py); the networks are frozen. The method is Training.step. The output folder receives the concept,
numbered previews, the concept at every preview (steps/), loss.csv and checkpoint.pt.
On several processors: torchrun --nproc_per_node=2 train.py ...
"""

import argparse
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import covariance
import perfusion
from concept import KEYS, Concept
from diffusion import NUM_TIMESTEPS
from support import command_line, training_files
from support.accumulation import Accumulation, join_processes
from support.base_model import open_model
from support.command_line import DTYPES, between
from support.pictures import Data, digest, list_images, prepare_data


@dataclass(frozen=True)
class Defaults:
    """What differs between the model families, and Stable Diffusion v1's; see `Model.training_steps` too."""
    lr: float = 0.03                # of the value targets (and of trained keys): paper, section 4
    lr_embedding: float = 0.006     # paper, section 4
    preview_every: int = 100        # the best step can be early: four to choose from
    preview_steps: int = 25         # DDIM steps of its pictures: a glance; sample.py takes 30, the paper 50
    prompts: tuple[str, ...] = ("a photo of a {}", "a {} on the beach", "a painting of a {}",
                                "a {} wearing a hat")


EMBEDDED = Defaults(
    lr=0.1,                     # of the four hardest concepts 0.05 shows 47 %, 0.1 56 %
    lr_embedding=3e-4,          # at 0.001 the word leaves i_star when it stands behind another concept's word
    preview_every=160, preview_steps=20,        # one preview, at the end: it takes as long as 20 steps
    prompts=("a photo of a {}", "a photo of a {} on the beach", "a photo of a {} in the snow",
             "a photo of a {} wearing a hat at night"))
INVERSION_LR = 0.005            # of the embedding with --keys none: textual inversion's, arXiv 2208.01618
DECAY, DECAY_STEPS = 0.99, 400  # paper: a = 0.99 at 400 steps, after which 2 % of i_star's start are left


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a training depends on, besides the model and the pictures.

    batch is the number of noised images per optimizer step, over all processes and `accumulate` parts.
    """
    super_category: str
    token: str
    steps: int = DECAY_STEPS
    batch: int = 16             # paper, section 4
    lr: float = EMBEDDED.lr
    lr_embedding: float = EMBEDDED.lr_embedding
    seed: int = 0
    keys: str = "locked"
    beta: float = perfusion.TRAINING_BETA
    flips: bool = True
    precision: str = "fp32"
    accumulate: int = 1


# ------------------------------------------------------------------------------------------------- the method

class Training:
    """The state of one training, and its step."""

    def __init__(self, model, data: Data, settings: Settings, C_inverse: Tensor):
        """C_inverse (d, d) float64."""
        self.model, self.data, self.settings, self.C_inverse, s = model, data, settings, C_inverse, settings
        self.losses, self.generator = [], torch.Generator().manual_seed(s.seed)

        # The training prompts: their ordinary embeddings (9, T, d), and where the concept stands in them.
        prompts = [template.format(s.token) for template in perfusion.TEMPLATES]
        ids, self.positions = model.tokenizer.encode(prompts, {s.token: s.super_category})
        self.ordinary = model.text_encoder.embed(ids)
        self.last = torch.tensor([found[s.token][0][-1] for found in self.positions])

        # Before step 0 the concept is its super-category in every respect.
        words = self.ordinary[0, self.positions[0][s.token][0]].clone()
        about = {"base": model.fingerprint, "seed": s.seed, "lr": s.lr}
        self.concept = Concept(s.token, s.super_category, words, beta=s.beta, keys=s.keys, metadata=about)
        self.i_star, targets = None, []
        self.decay = DECAY ** (DECAY_STEPS / s.steps)       # at the end as much of i_star's start is left
        if self.concept.edits:
            i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, s.super_category)
            self.concept.o_values = [o.clone() for o in model.unet.values(i_super)]
            self.concept.o_keys = [o.clone() for o in perfusion.locked_keys(model, s.super_category)]
            self.concept.layers = model.unet.layer_names()
            self.move_i_star(i_super.cpu().double())
            targets = self.concept.o_values + (self.concept.o_keys if s.keys == "trained" else [])
        self.learned = [x.requires_grad_() for x in [self.concept.embedding, *targets]]
        groups = [{"params": self.learned[:1], "lr": s.lr_embedding}, {"params": targets, "lr": s.lr}]
        self.optimizer = torch.optim.AdamW(groups if targets else groups[:1])
        self.sums = Accumulation(self.learned, s.batch, s.accumulate, s.precision, model.device)

    def step(self) -> float:
        """Section 4, one optimizer step, from noise to the running mean of i_star; returns the loss.

        loss = mean(m (target - unet(z_t, t, K, V))^2), with masks m; target is what this model predicts. The
        batch is worked on in parts (one, unless memory is short), whose gradients `sums` adds up.
        """
        unet, schedule, concept = self.model.unet, self.model.schedule, self.concept
        for picture, flip, template, t, noise in self.sums.parts(self.draw()):
            # Noise the pictures.
            z, m = self.data.latents[picture, flip], self.data.masks[picture, flip]
            noise, t = noise.to(z), t.to(z.device)
            z_t = schedule.add_noise(z, noise, t)
            # Encode the prompts with the concept's embedding, each distinct one once; row: that of a picture.
            template, row = template.unique(return_inverse=True)
            found, row = [self.positions[i] for i in template.tolist()], row.to(z.device)
            e = self.model.text_encoder(perfusion.insert(self.ordinary[template], found, [concept]))
            e_concept = e.detach()[range(len(e)), self.last[template]][row]
            # Edit keys and values.
            keys, values, _ = perfusion.keys_and_values(unet, e, None, [concept], concept.beta, concept.tau)
            # Predict.
            with self.sums.autocast:
                output = unet(z_t, t, [k[row] for k in keys], [v[row] for v in values]).float()
            loss = (m * (schedule.target(z, noise, t) - output).square()).mean()
            self.sums.backward(loss, e_concept)
        # Update what is learned; then i_star follows the encoding of the concept's word.
        loss, e_concept = self.sums.update(self.optimizer)
        if concept.edits:
            self.move_i_star(perfusion.running_mean(self.i_star, e_concept, self.decay))
        self.losses.append(loss)
        return loss

    def draw(self) -> list[Tensor]:
        """A step's random choices for the global batch: picture, flip, template, t (B,), and noise."""
        B = self.settings.batch
        counts = len(self.data.latents), 1 + self.settings.flips, len(perfusion.TEMPLATES), NUM_TIMESTEPS
        choices = [torch.randint(n, (B,), generator=self.generator) for n in counts]
        return [*choices, torch.randn(B, *self.data.latents.shape[2:], generator=self.generator)]

    def move_i_star(self, i_star: Tensor) -> None:
        """Give the concept another i_star (d,), float64, and the d_star that belongs to it."""
        self.i_star, d_star = i_star, self.C_inverse @ i_star
        self.concept.i_star, self.concept.d_star = (x.float().to(self.model.device) for x in (i_star, d_star))

    # ------------------------------------------------------------------------------------ what is kept of it

    def identity(self) -> dict[str, str]:
        """What must be the same when a training is resumed."""
        pictures = [x.cpu().numpy().tobytes() for x in (self.data.images, self.data.masks)]
        about = asdict(self.settings) | {
            "base model": self.model.fingerprint, "pictures and masks": digest(pictures),
            "prediction": self.model.schedule.prediction_type}
        return {key: str(value) for key, value in about.items() if key not in ("steps", "accumulate")}

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs for the same numbers to follow."""
        return {"identity": self.identity(), "steps": self.settings.steps, "i_star": self.i_star,
                "C_inverse": self.C_inverse, "learned": [x.detach() for x in self.learned],
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.sums.scaler.state_dict(), "generator": self.generator.get_state(),
                "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        """Continue from there: the same numbers follow as without the interruption."""
        steps = self.settings.steps
        if len(state["losses"]) > steps:
            raise ValueError(f"the checkpoint is of a later step than {steps}: nothing is left")
        if state["steps"] != steps:
            warnings.warn(f"until now the mean i_star moved as for {state['steps']} steps, so the result "
                          f"differs from that of {steps} at once")
        with torch.no_grad():
            for x, saved in zip(self.learned, state["learned"], strict=True):
                x.copy_(saved)
        self.losses, self.C_inverse = state["losses"], state.get("C_inverse", self.C_inverse)
        if state["i_star"] is not None:
            self.move_i_star(state["i_star"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])


def run(training: Training, family: Defaults, out: Path | None, preview: int, checkpoint: int) -> None:
    """Train to the last step; write previews, checkpoints and the concept into `out`, if this process shall.

    preview, checkpoint: steps from one to the next, 0 for none but, of checkpoints, the last.
    """
    steps, done, concept = training.settings.steps, len(training.losses), training.concept
    bar = tqdm(range(done + 1, steps + 1), "training", steps, unit="step", initial=done, disable=out is None)
    concept.metadata["steps"] = done
    if out and done == steps:       # its concept file may be gone
        training_files.write(out, concept, training.state_dict())
    for n in bar:
        training.step()
        bar.set_postfix(loss=f"{torch.tensor(training.losses[-50:]).mean():.4f}")
        concept.metadata["steps"] = n
        if out and (n == steps or checkpoint and n % checkpoint == 0):
            training_files.write(out, training.concept, training.state_dict())
        if out and preview and (n == steps or n % preview == 0):
            training_files.write_preview(
                out, training.model, training.concept, family.prompts, family.preview_steps,
                training.settings.seed, training.sums.autocast, training.data, training.losses)


# ------------------------------------------------------------------------------------------------- the script

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add, positive = parser.add_argument, between(1e-12, 1e6, float)
    add("--images", "--instance_data_dir", type=Path, required=True, metavar="DIR",
        help="folder of 1 to about 20 images, or one image")
    add("--super", "--initializer_token", type=command_line.ordinary_words, required=True,
        dest="super_category", metavar="WORDS", help='what it is, in ordinary words: "teddy bear"')
    add("--token", "--placeholder_token", metavar="NAME", help="its name in prompts (default: the folder's)")
    add("--out", "--output_dir", type=Path, metavar="DIR", help="output folder (default: out/NAME)")
    command_line.add_model(parser)
    add("--steps", "--max_train_steps", type=between(1, 10 ** 6), help="(default: what suits the model)")
    add("--masks", default="auto", metavar="auto|none|DIR",
        help="on the loss: the model's attention, nothing, or a folder of masks, white on black")
    add("--no-flip", action="store_true", help="for things whose left and right differ")
    add("--resume", "--resume_from_checkpoint", nargs="?", const="latest", metavar="FILE",
        help="continue from the output folder's checkpoint, or from FILE")
    add("--overwrite", action="store_true", help="replace a concept of other pictures")

    add = parser.add_argument_group("for experiments").add_argument
    add("--keys", "--lock", choices=KEYS, default=Settings.keys,
        help="the concept's keys: locked to the super-category, trained, or none: textual inversion")
    add("--beta", type=between(-100, 100, float), default=Settings.beta, help="of the gate in training")
    add("--lr", "--learning_rate", type=positive, help="of the values (default: what suits the model)")
    add("--lr-embedding", type=positive, help="of the word embedding (default: what suits the model)")
    add("--batch", type=between(1, 10 ** 6), default=Settings.batch, help="images per step, of all processes")
    add("--accumulate", type=between(1, 10 ** 6), default=1, help="parts of a batch, to save memory")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    add("--precision", choices=DTYPES, help="of the U-Net (default: fp32 on a CPU, bf16 elsewhere)")
    add("--resolution", type=between(1, 8192), help="side in pixels (default: as the model was trained)")
    add("--seed", type=between(0, 2 ** 62), default=0, help="of all random choices")
    add("--preview", type=between(0, 10 ** 6), metavar="N",
        help="steps between previews, 0: none (default: what suits the model)")
    add("--checkpoint", type=between(0, 10 ** 6), default=50, metavar="N",
        help="steps between checkpoints, 0: only the last")
    return parser.parse_args(argv)


def check_folders(images: Path, path: Path, replace: bool, pictures: str) -> None:
    """ValueError if the concept file would stand among the pictures, or replace a concept of other ones."""
    if images.is_dir() and images.resolve() == path.parent.resolve():
        raise ValueError(f"--out {path.parent} holds the pictures: the next training would learn previews")
    if path.exists() and not replace and Concept.load(path).metadata.get("pictures") != pictures:
        raise ValueError(f"{path} is of other pictures: give another --token or --out, or --overwrite it")


def main(argv: list[str] | None = None) -> None:
    """Check, load, train, write."""
    args = arguments(argv)
    name = command_line.concept_name(args.token, args.images)
    files, skipped = list_images(args.images)
    out = args.out or Path("out") / name
    path = out / f"{name}.safetensors"
    about = {"images": len(files), "folder": args.images.as_posix(), "pictures": digest(files)}
    if args.prediction:
        about["prediction"] = args.prediction       # the model's files say otherwise, or nothing
    if args.masks not in ("auto", "none") and not Path(args.masks).is_dir():
        raise ValueError(f"--masks {args.masks} is neither auto nor none nor a folder")
    checkpoint = out / "checkpoint.pt" if args.resume == "latest" else Path(args.resume or "")
    resuming = checkpoint.is_file()
    check_folders(args.images, path, args.overwrite, about["pictures"])
    if args.resume not in (None, "latest") and not resuming:
        raise ValueError(f"--resume {checkpoint}: there is no such file")
    device = join_processes(command_line.pick_device(args.device))
    if skipped:
        print(f"skipped, not images: {', '.join(skipped)}")
    out.mkdir(parents=True, exist_ok=True)      # OSError if it is a file

    model = open_model(args, [], device=device, dtype=torch.float32)
    model.unet.checkpointing = args.checkpointing
    family, side = EMBEDDED if model.small else Defaults(), args.resolution or model.size[0]
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
    C_inverse = covariance.inverse(covariance.cached(model))
    data = prepare_data(model, files, settings.super_category, args.masks, side)
    training = Training(model, data, settings, C_inverse)
    training.concept.metadata |= about
    print(f"{len(files)} images of {side} x {side} pixels, {sum(x.numel() for x in training.learned):,} "
          f"numbers to learn, with {model.schedule.prediction_type} on {model.device}: {settings}")
    if resuming:
        training.load_state_dict(training_files.read_checkpoint(checkpoint, training.identity()))
    print(f"starting after step {len(training.losses)} of {settings.steps}")
    preview = family.preview_every if args.preview is None else args.preview
    try:
        run(training, family, None if training.sums.rank else out, preview, args.checkpoint)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues from the last checkpoint, if there is one")
        raise
    if training.sums.rank == 0:
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB; draw with it:\n"
              "  " + command_line.command(args, "sample.py", f"a {settings.token} on the beach",
                                          "--concept", path))


if __name__ == "__main__":
    command_line.run(main, "--accumulate 4, --checkpointing or a smaller --resolution needs less; "
                            "--resume loses nothing")
