# %% [markdown]
# # Why key locking works
#
# A concept is an edit of the cross-attention's keys (*where* a word acts) and values (*what* it puts there).
# Each figure here makes one claim. Maps that are compared share one colour scale. A number under a map is the
# share of a word's attention that lies on its own object, which is outlined. The base model finds the object
# in the finished picture: where its attention to the super-category's words is above the middle of its range.
# So the judge is the same for every lock, but it is attention too.
#
# This notebook is the script `diagnostics.py`, run with its flags in an environment variable:
#
#     export DIAGNOSTICS='--images examples/teddy --super "teddy bear"'
#     jupytext --to ipynb diagnostics.py && jupyter execute --inplace diagnostics.ipynb

# %%
"""Why key locking works: train what is missing, draw figures, and write a page to explore.

    python diagnostics.py --images examples/teddy --super "teddy bear"
    python diagnostics.py --images examples/teddy --super "teddy bear" \\
        --second examples/cat --second-super cat
    python diagnostics.py --concept teddy.safetensors --trained teddy-trained.safetensors

The output folder receives the figures (PNG), their numbers (CSV), explorer.html, and in trained/ the
concepts, which the next run uses again. A second concept adds figure 6 and explorer_two.html.
"""
import csv
import hashlib
import html
import io
import itertools
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import colormaps
from PIL import Image
from tqdm import tqdm

import diffusion
import perfusion
import weights_loader
from attention_maps import MASK_TIMESTEPS, noised_map, share_inside
from concept import Concept, prepare
from diffusion import ddim_timesteps
from support import command_line, explorer, fast_cpu
from support.command_line import between, unquoted
from support.files import replacing
from support.pictures import digest, list_images
from support.plots import Figure

IN_NOTEBOOK = "ipykernel" in sys.modules
BETA = perfusion.DRAWING_BETA
TAU = perfusion.DRAWING_TAU
SWEEP = (-4, -2, -1, 0, 1, 2)       # beta in figure 5: in tau from where the gate of the word is half open
SEEDS = 3                           # of figure 5
ROWS = 4                            # denoising steps in figures 3 and 4
NOTEBOOK_MAPS = 200_000             # bytes of maps on the page in a notebook
TRAINING_COST = 9                   # of a training step, in guided drawing steps; measured
VERSIONS = {"concept": "locked", "trained": "trained", "inversion": "none"}     # option -> lock in training
LOCKS = (  # name, lock in training, lock in drawing, what it is
    ("super-category", None, "local", "The base model and ordinary words. Nothing is edited."),
    ("locked keys", "locked", "local", "Learned values, and the key of the super-category."),
    ("global lock", "locked", "global", "Learned values, and all keys of the ordinary prompt."),
    ("trained keys", "trained", "local", "Learned values, and a key that was learned with them."),
    ("textual inversion", "none", "local", "Only a word embedding is learned. Nothing is edited."))


def arguments(argv):
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="pictures of the concept, for what is not given as a file")
    add("--super", dest="super_category", metavar="WORDS", help='what it is, in ordinary words: "teddy bear"')
    add("--second", type=Path, metavar="DIR|FILE", help="pictures of a second concept, or its file")
    add("--second-super", metavar="WORDS", help="what the second one is, in ordinary words")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="output folder")
    add("--prompt", type=unquoted, default="a photo of a {} wearing a hat on the beach",
        help="{} stands for the concept")
    add("--words", default="hat,beach", metavar="W,W", help="other words in figure 2")
    add("--pair", type=unquoted, default="a photo of a {} next to a {}", metavar="PROMPT",
        help="prompt of two concepts")
    add("--seed", type=between(0, 2 ** 62), default=0, help="seed of the first picture")
    add("--steps", type=between(1, 999), default=20, help="denoising steps, 1 to 999")
    add("--guidance", type=between(-1000, 1000, float),
        help="weight of the prompt, 1 for no guidance (default: what suits the model)")
    add("--training-steps", type=between(1, 10 ** 6), metavar="N",
        help="of train.py (default: 160 for tiny, 400 for SD v1)")
    command_line.add_model(parser)
    add = parser.add_argument_group("finished files, instead of training").add_argument
    add("--concept", type=Path, metavar="FILE", help="concept with locked keys")
    add("--trained", type=Path, metavar="FILE", help="the same, trained with --lock trained")
    add("--inversion", type=Path, metavar="FILE", help="the same, trained with --lock none")
    args = parser.parse_args(argv)
    args.words = [word.strip() for word in args.words.split(",") if word.strip()]
    if args.prompt.count("{}") != 1 or args.pair.count("{}") != 2:
        parser.error("--prompt needs {} once, --pair twice")
    if bool(args.images) != bool(args.super_category) or not (args.images or args.concept):
        parser.error("give --images with --super, or a finished --concept")
    if args.second and args.second.suffix != ".safetensors" and not args.second_super:
        parser.error("--second with a folder of pictures needs --second-super")
    return args


# %% [markdown]
# ## What is given, and what must be trained

# %%
def attempt(function, *inputs):
    """The function's result; an error that the user can mend ends the script in one sentence."""
    with command_line.plain_errors(memory="a smaller model, or --device cpu, needs less"):
        return function(*inputs)


def load_model():
    device = command_line.pick_device(args.device)
    model = weights_loader.load(args.weights, device, torch.float32 if device == "cpu" else torch.float16,
                                args.tokenizer, prediction=args.prediction)
    fast_cpu.enable(model)
    return model


def concept_files(model):
    """For each concept {lock: its file, or the folder of its training}; the trainings that are missing."""
    given = {lock: file for option, lock in VERSIONS.items() if (file := getattr(args, option))}
    sources = [(given, args.images, args.super_category)]
    if args.second:
        sources.append(({"locked": args.second}, None, None) if args.second.suffix == ".safetensors" else
                       ({}, args.second, args.second_super))
    missing = []
    for files, pictures, words in sources:
        for file in files.values():
            Concept.load(file)        # what is wrong with it is said before minutes of training
        for lock in VERSIONS.values() if pictures else ():
            if lock not in files:
                files[lock] = training_folder(model, pictures, words, lock)
                if not finished(files[lock]):
                    missing.append((files[lock], pictures, words, lock))
    return [files for files, _, _ in sources], missing


def training_folder(model, pictures, words, lock):
    """Where a training is kept: another name for other pictures, words, weights or another length."""
    differs = f"{words}|{model.fingerprint}|{args.training_steps}|{digest(list_images(pictures)[0])}"
    name = f"{pictures.resolve().stem}-{lock}-{hashlib.sha256(differs.encode()).hexdigest()[:8]}"
    return args.out / "trained" / name


def finished(folder):
    """Whether a folder holds a concept whose training was not stopped early."""
    return any(Concept.load(path).metadata.get("steps") == args.training_steps
               for path in folder.glob("*.safetensors"))


def train(folder, pictures, words, lock):
    """Run train.py into the folder; a training that was stopped goes on."""
    command = [sys.executable, Path(explorer.__file__).with_name("train.py"), "--images", pictures,
               "--super", words, "--lock", lock, "--steps", str(args.training_steps), "--preview", "0",
               "--out", folder, "--weights", args.weights]
    for option in ("tokenizer", "prediction", "device"):
        command += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
    command += ["--resume"] if (folder / "checkpoint.pt").exists() else []
    code = subprocess.run(command).returncode
    if code < 0:
        raise ValueError(f"train.py was ended by signal {-code}, perhaps for want of memory: the same "
                         "command goes on from its last checkpoint")
    if code:        # it has said why
        sys.exit(code)


def shared_locks(concepts):
    """The rows of LOCKS that every concept has; concepts: dicts with locks as keys."""
    return [row for row in LOCKS if row[1] is None or all(row[1] in versions for versions in concepts)]


def announce(model, files, missing):
    """Say how long it will take, from the time of a step on this machine; returns the number of pictures."""
    pictures = sum(len(shared_locks(files[:n])) + SEEDS * len(SWEEP) for n in range(1, len(files) + 1))
    pictures += ("trained" in files[0]) + SEEDS * (len(files) - 1)        # figures 3 and 6
    ids, _ = model.tokenizer.encode(["", ""])
    e = model.text_encoder(model.text_encoder.embed(ids))
    start = time.perf_counter()
    diffusion.draw(model, model.unet.keys(e), model.unet.values(e), [0], model.size, 3, model.guidance)
    step = (time.perf_counter() - start) / 3
    seconds = step * (pictures * args.steps + len(missing) * args.training_steps * TRAINING_COST)
    minutes = max(1, round(seconds / 60))
    print(f"{len(missing)} trainings of {args.training_steps} steps and {pictures} pictures of {args.steps}: "
          f"about {minutes} minute{'s'[:minutes - 1]} on this machine", flush=True)
    return pictures


def read_concepts(model, files):
    """{lock: Concept} of one concept, ready for the model; ValueError when its files do not fit together."""
    concepts = {}
    for lock, path in files.items():
        path = path if path.is_file() else next(path.glob("*.safetensors"))
        concepts[lock], = prepare([Concept.load(path)], model)
        if concepts[lock].keys != lock:
            raise ValueError(f"{path} was trained with --lock {concepts[lock].keys}: here one trained with "
                             f"--lock {lock} is needed")
    if len({concept.words for concept in concepts.values()}) > 1:
        raise ValueError("--concept, --trained and --inversion are not of one super-category")
    return concepts


def check_room(model, template, names):
    """ValueError when a prompt is so long that a concept is cut off."""
    prompt = fill(template, names)
    for name in names:
        if len(model.tokenizer.find(prompt, name)) < names.count(name):
            raise ValueError(f'the prompt "{prompt}" is too long: it has no room for "{name}"')


# %% [markdown]
# ## A prompt, drawn under every lock while its attention is kept

# %%
def fill(template, names):
    """A template with the concepts' names, or their ordinary words, in the places of its {}."""
    for name in names:
        template = template.replace("{}", name, 1)
    return template


@dataclass
class Drawn:
    """A picture (3, H, W); the maps of its words and what the U-Net saw, as `explorer.watch` returns them;
    masks (n, h, w) of the concepts' objects; gates (T, n) or None."""
    picture: torch.Tensor
    maps: list
    seen: torch.Tensor
    masks: torch.Tensor
    gates: torch.Tensor | None


class Study:
    """A prompt with one or two concepts, each a dict {lock: Concept}, and what was drawn under every lock."""

    def __init__(self, template, concepts, words=()):
        self.template, self.concepts, self.locks = template, concepts, shared_locks(concepts)
        locked = prepare([versions["locked"] for versions in concepts], model)
        self.tokens, self.names = [c.token for c in locked], [c.words for c in locked]
        check_room(model, template, self.names)
        self.prompt = fill(template, self.tokens)
        self.words = explorer.prompt_words(model.tokenizer, self.prompt, locked)
        self.named = [next(word for word in self.words if word.concept == j) for j in range(len(locked))]
        self.drawn = {}
        for word in words:
            self.rows(word)

    def draw(self):
        """Draw the first seed under every lock."""
        for name, version, lock, _ in self.locks:
            self.drawn[name] = self.watch(args.seed, version, lock)

    def project(self, version, lock="local", beta=None):
        """Keys and values of ["", prompt], and the gates (T, n) of the prompt's tokens or None.

        version: the lock in training of the concepts; None for the ordinary words.
        """
        mine = [versions[version] for versions in self.concepts if version]
        prompt = fill(self.template, [concept.token for concept in mine] or self.names)
        beta = BETA[lock] if beta is None else beta
        keys, values, _, gates = perfusion.condition(model, ["", prompt], mine, beta, TAU, lock)
        return keys, values, None if gates is None else gates[1].cpu()

    def watch(self, seed, version, lock="local", map_version=None):
        """Draw one seed, and keep the attention of the keys that draw, or of those of another version."""
        keys, values, gates = self.project(version, lock)
        map_keys = self.project(map_version, lock)[0] if map_version else None
        latents, maps, seen = explorer.watch(model, keys, values, self.words, seed, args.steps, GUIDANCE,
                                             map_keys)
        progress.update()
        return Drawn(diffusion.decode(model.vae, latents)[0], maps, seen, self.masks(latents), gates)

    def masks(self, latents):
        """Where the base model sees the concepts' ordinary words in a picture: (n, h, w) of 0 and 1."""
        keys, values, _ = self.project(None)
        keys, values = [k[1:] for k in keys], [v[1:] for v in values]
        maps = torch.stack([torch.cat([noised_map(model, latents, t, keys, values, word.tokens)
                                       for word in self.named]) for t in MASK_TIMESTEPS]).mean(0)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return (maps > (low + high) / 2).float().cpu()

    def rows(self, text):
        """Which of the prompt's words are a concept's name or an ordinary phrase; ValueError if none."""
        ordinary = fill(self.template, self.names)
        places = {t for found in model.tokenizer.find(ordinary, text)[:1] for t in found}
        rows = [i for i, word in enumerate(self.words) if word.label == text or places >= set(word.tokens)]
        if not rows:
            raise ValueError(f'--words: the prompt "{self.prompt}" has no word "{text}"')
        return rows

    def map_of(self, text, maps):
        """Maps (steps, h, w) of a word, from one level (steps, words, h, w) of `explorer.watch`'s maps."""
        return maps[:, self.rows(text)].sum(1)

    def sweep(self):
        """Values of beta around the one where the concept's gate is half open, and with locked keys pictures
        (betas, seeds, 3, H, W) and gates (betas, T, n)."""
        opened = self.drawn["locked keys"].gates[self.named[0].tokens[-1], 0]
        middle = BETA["local"] + TAU * torch.logit(opened, eps=1e-6).item()
        betas, pictures, gates = [round(middle + TAU * k, 2) for k in SWEEP], [], []
        for beta in betas:
            keys, values, opened = self.project("locked", beta=beta)
            row = [diffusion.draw(model, keys, values, [args.seed + k], model.size, args.steps, GUIDANCE)
                   for k in range(SEEDS)]
            pictures.append(torch.cat(row))
            gates.append(opened)
            progress.update(SEEDS)
        return betas, torch.stack(pictures), torch.stack(gates)


# %% [markdown]
# ## Tools to plot and to write

# %%
@dataclass
class Map:
    """A cell of a figure: a map (h, w), and where it has an object its mask (h, w), and so a share on it."""
    values: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def inside(self):
        return None if self.mask is None else share_inside(self.values[None], self.mask[None]).item()


def plot(cells, rows, columns, title, tops=None):
    """A grid of pictures (3, H, W) and Maps with labels; tops: the value where each column's colours end."""
    R, C = len(cells), len(cells[0])
    figure = Figure(figsize=(1.4 * C + 0.5, 1.65 * R + 0.7), layout="constrained")
    axes = figure.subplots(R, C, squeeze=False)
    for r, c in itertools.product(range(R), range(C)):
        axis, cell = axes[r, c], cells[r][c]
        axis.set(xticks=[], yticks=[])
        axis.set_title(columns[c] if r == 0 else "", fontsize=8)
        axis.set_ylabel(rows[r] if c == 0 else "", fontsize=8)
        if not isinstance(cell, Map):
            smooth = "nearest" if cell.shape[-1] <= 128 else "auto"
            axis.imshow(diffusion.to_bytes(cell), interpolation=smooth)
            continue
        axis.imshow(cell.values.numpy(), cmap="magma", vmin=0, vmax=tops[c], extent=(0, 1, 1, 0))
        if cell.mask is not None:
            across, down = ((torch.arange(n) + 0.5) / n for n in reversed(cell.mask.shape))
            axis.contour(across, down, cell.mask.numpy(), levels=[0.5], colors="white", linewidths=0.8)
            axis.set_xlabel(f"{cell.inside:.0%} on its object", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def plot_maps(pictures, maps, rows, columns, title, name, one_scale=False):
    """A figure of pictures beside Maps [row][column], and the shares; one scale per column, or for all.

    columns: what is above the pictures, then above each column of maps.
    """
    above, *columns = columns
    tops = [max(row[c].values.max().item() for row in maps) for c in range(len(columns))]
    tops = [max(tops)] * len(tops) if one_scale else tops
    heads = [above, *(f"{column}\n0 to {top:.0%}" for column, top in zip(columns, tops))]
    figure = plot([[picture, *row] for picture, row in zip(pictures, maps)], rows, heads, title, [0, *tops])
    finish(figure, name, ("row", "column", "mean share of attention", "share on its object"),
           [(row, column, f"{cell.values.mean():.5f}", "" if cell.mask is None else f"{cell.inside:.4f}")
            for row, cells in zip(rows, maps) for column, cell in zip(columns, cells)])


def finish(figure, name, header, table):
    """Write a figure as PNG and its numbers as CSV beside it, and show it where there is a notebook."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    with replacing(args.out / f"{name}.png") as path:       # 128 colours take a quarter of the bytes
        Image.open(drawn).convert("RGB").quantize(128, kmeans=1).save(path, "PNG")
    with replacing(args.out / f"{name}.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *table])
    if IN_NOTEBOOK:
        display.display(display.Image(args.out / f"{name}.png"))
    else:
        progress.write(str(args.out / f"{name}.png"))


def write_page(study, name, betas, pictures, gates):
    """Write the page of a study, and show it where there is a notebook."""
    objects = " and ".join(f'"{words}"' for words in study.names)
    about = {
        "concepts": study.tokens, "objects": study.names,
        "lead": f'One prompt, "{study.prompt}", and one seed, under {len(study.locks)} locks. Choose a word: '
                "bright places are where the picture listens to it. A good lock keeps a concept's word on "
                "its object.",
        "made": f"Model {model.name}, seed {args.seed}, {args.steps} DDIM steps, guidance {GUIDANCE:g}; beta "
                f"{BETA['local']}, with the global lock {BETA['global']}; tau {TAU}. A map is a word's share "
                "of each place's attention: the sum over its tokens, the mean over the heads. At every place "
                "the shares of all words sum to 1. The outline is the object: where the base model's own "
                f"attention to {objects}, over the finished picture with noise added, is above the middle of "
                "its range. It is the same judge for every lock, but it is attention too, not a mask made by "
                "hand."}
    text = explorer.page(about, study.words, model.unet.layer_names(),
                         [explorer.View(row[0], row[3], drawn.picture, drawn.maps, drawn.masks, drawn.gates)
                          for row, drawn in zip(study.locks, study.drawn.values())],
                         betas, pictures, gates, [args.seed + k for k in range(SEEDS)],
                         NOTEBOOK_MAPS if IN_NOTEBOOK else explorer.MAP_BYTES)
    with replacing(args.out / name) as path:
        path.write_text(text, encoding="utf-8")
    if IN_NOTEBOOK:
        frame = f'<iframe srcdoc="{html.escape(text)}" width="100%" height="1000" style="border: 0"></iframe>'
        display.display(display.HTML(f"<div>{frame}</div>"))
    else:
        progress.write(f"{args.out / name}: open it in a browser")


# %% [markdown]
# ## Train what is missing, and draw
#
# The same prompt and seed are drawn under every lock. With a second concept, so is the prompt of two.

# %%
def setup():
    """The model, each concept as {lock: Concept}, and how many pictures will be drawn."""
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model()
    args.training_steps = args.training_steps or (160 if model.small else 400)
    if args.super_category:         # what can be wrong is said before minutes of training
        check_room(model, args.prompt, [args.super_category])
    files, missing = concept_files(model)
    pictures = announce(model, files, missing)
    if missing:
        del model                   # two at once would take twice the memory
        for training in missing:
            train(*training)
        model = load_model()
    return model, [read_concepts(model, own) for own in files], pictures


if IN_NOTEBOOK:
    from IPython import display
args = attempt(arguments, shlex.split(os.environ.get("DIAGNOSTICS", "")) if IN_NOTEBOOK else None)
model, concepts, pictures = attempt(setup)
GUIDANCE = model.guidance if args.guidance is None else args.guidance
one = attempt(Study, args.prompt, concepts[:1], args.words)
pair = attempt(Study, args.pair, concepts) if len(concepts) == 2 else None
progress = tqdm(total=pictures, unit="picture", desc="drawing", disable=IN_NOTEBOOK)
for study in filter(None, (one, pair)):
    attempt(study.draw)


# %% [markdown]
# ## 1. The gate: which words does the edit touch?
#
# `sigmoid((sim / energy - beta) / tau)` of every token: open at a concept's own word and shut elsewhere.

# %%
def figure_gates():
    """The gates of all tokens up to the end mark, of one prompt and of the prompt of two concepts."""
    studies, table = [study for study in (one, pair) if study], []
    figure = Figure(figsize=(8, 2.3 * len(studies) + 0.4), layout="constrained")
    for axis, study in zip(figure.subplots(len(studies), 1, squeeze=False)[:, 0], studies):
        places = [(t, piece) for word in study.words if word.label != "padding"
                  for t, piece in zip(word.tokens, word.pieces)]
        gates, n = study.drawn["locked keys"].gates, len(study.tokens)
        for j, token in enumerate(study.tokens):
            axis.bar([t + 0.8 * (j + 0.5) / n - 0.4 for t, _ in places],
                     [gates[t, j].item() for t, _ in places], 0.8 / n, label=token,
                     color=colormaps["viridis"](0.25 + 0.5 * j))
            table += [(study.prompt, t, piece, token, f"{gates[t, j]:.4f}") for t, piece in places]
            if (opened := gates[study.named[j].tokens[-1], j]) < 0.5:
                progress.write(f'in "{study.prompt}" the gate of {token} is only {opened:.2f} open: '
                               f"its word stays nearly ordinary")
        axis.set_xticks(*zip(*places), rotation=35, fontsize=9)
        axis.set(ylim=(0, 1), ylabel="gate")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"How far the gate is open at every token, beta {BETA['local']}, tau {TAU}", fontsize=10)
    finish(figure, "1_gates", ("prompt", "place", "token", "concept", "gate"), table)


attempt(figure_gates)


# %% [markdown]
# ## 2. Where does the word act, under each lock?
#
# The same prompt and seed in every row. A locked word should act where the super-category's words act: on the
# object. A trained key lets it act everywhere.

# %%
def figure_words(study, drawn, words, title, name):
    """Pictures, and the maps of words: the mean over steps, layers and heads."""
    masks = {token: j for j, token in enumerate(study.tokens)}
    maps = [[Map(study.map_of(word, row.maps[0]).mean(0), row.masks[masks[word]] if word in masks else None)
             for word in words] for row in drawn.values()]
    plot_maps([row.picture for row in drawn.values()], maps, list(drawn), ["picture", *words], title, name)


attempt(figure_words, one, one.drawn, [*one.tokens, *args.words],
        f"Where words act under each lock\n{one.prompt}", "2_locks")


# %% [markdown]
# ## 3. The pure effect of the key
#
# One drawing, that of the locked concept. Its queries meet the locked keys and the trained keys. Nothing else
# differs.

# %%
def figure_steps(columns, title, name):
    """What the U-Net saw at several steps of the locked drawing, beside maps {column: (steps, h, w)}."""
    locked = one.drawn["locked keys"]
    steps = torch.linspace(0, args.steps - 1, min(ROWS, args.steps)).round().int()
    seen = diffusion.decode(model.vae, locked.seen[steps].to(model.device))
    maps = [[Map(maps[k], locked.masks[0]) for maps in columns.values()] for k in steps]
    rows = [f"t = {ddim_timesteps(args.steps)[k]}" for k in steps]
    plot_maps(seen, maps, rows, ["what the U-Net saw", *columns], title, name, one_scale=True)


def figure_keys():
    locked, trained = one.drawn["locked keys"], one.watch(args.seed, "locked", map_version="trained")
    columns = {"locked keys": one.map_of(one.tokens[0], locked.maps[0]),
               "trained keys": one.map_of(one.tokens[0], trained.maps[0])}
    figure_steps(columns, f"The same queries under two keys:\nattention to {one.tokens[0]}", "3_keys")


if "trained keys" in one.drawn:
    attempt(figure_keys)
else:
    print("figure 3 needs --trained, or --images to train it")


# %% [markdown]
# ## 4. Over steps and layers
#
# The map of the concept's word in every cross-attention layer (across) at several noise levels (down).

# %%
columns = {name: one.map_of(one.tokens[0], level)
           for name, level in zip(model.unet.layer_names(), one.drawn["locked keys"].maps[1:])}
attempt(figure_steps, columns, f"Attention to {one.tokens[0]} in every layer, with locked keys", "4_layers")


# %% [markdown]
# ## 5. The knob: beta
#
# Beta is where a word's gate is half open. It is chosen when a picture is drawn, without training: lower,
# more of the concept; higher, more of the prompt. The columns go from an open gate to one nearly shut.

# %%
def figure_beta(betas, pictures, gates):
    opened = gates[:, one.named[0].tokens[-1], 0].tolist()
    figure = plot(pictures.transpose(0, 1), [f"seed {args.seed + k}" for k in range(SEEDS)],
                  [f"beta {beta:g}\ngate {x:.0%}" for beta, x in zip(betas, opened)],
                  f"Beta: from the concept to the prompt alone\n{one.prompt}")
    finish(figure, "5_beta", ("beta", "tau", "gate of the concept's word"),
           [(beta, TAU, f"{x:.4f}") for beta, x in zip(betas, opened)])


swept = attempt(one.sweep)
attempt(figure_beta, *swept)


# %% [markdown]
# ## 6. Two concepts, trained apart, in one prompt
#
# Each word should act on its own object.

# %%
if pair:
    seeds = {f"seed {args.seed}": pair.drawn["locked keys"]}
    for k in range(1, SEEDS + 1):
        seeds[f"seed {args.seed + k}"] = attempt(pair.watch, args.seed + k, "locked")
    attempt(figure_words, pair, seeds, pair.tokens, f"Where the words of two concepts act\n{pair.prompt}",
            "6_two")
else:
    print("figure 6 shows two concepts: give --second")


# %% [markdown]
# ## The page: every word, lock, step and layer

# %%
attempt(write_page, one, "explorer.html", *swept)
if pair:
    attempt(write_page, pair, "explorer_two.html", *attempt(pair.sweep))
progress.close()
