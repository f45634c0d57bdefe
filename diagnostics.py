# %% [markdown]
# # Why key locking works
#
# A concept is an edit of the cross-attention's keys (*where* a word acts) and values (*what* it puts there). Each cell
# makes one figure, and each figure makes one claim. Maps that are compared share one colour scale. A number under a
# map is the share of a word's attention that lies on its own object. The object is found by the base model, in the
# finished picture: where its attention to the super-category's words is above the middle of its range. So the judge is
# the same for every lock, but it is attention too.
#
# As a script: `python diagnostics.py --images examples/teddy --super "teddy bear"`
#
# As a notebook: `DIAGNOSTICS='--images examples/teddy --super "teddy bear"' jupytext --to notebook --execute diagnostics.py`

# %%
"""Show why key locking works: train what is missing, draw the figures, and write a page to explore.

    python diagnostics.py --images examples/teddy --super "teddy bear"
    python diagnostics.py --images examples/teddy --super "teddy bear" --second examples/cat --second-super cat
    python diagnostics.py --concept teddy.safetensors --trained teddy-trained.safetensors

The output folder receives the figures (PNG), their numbers (CSV), explorer.html, and in trained/ the concepts, which
the next run uses again.
"""
import argparse
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
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import drawing
import explorer
import fast_cpu
import perfusion
import weights_loader
from attention_maps import MASK_TIMESTEPS, attention, record_queries, share_inside, word_map
from diffusion import ddim_timesteps, seeded_noise
from files import replacing
from image_files import list_images

IN_NOTEBOOK = "ipykernel" in sys.modules
ROOT = Path(explorer.__file__).parent
BETA = {"local": 0.7, "global": 0.5}            # the middle of the paper's ranges
TAU = 0.15
SWEEP = (-4, -2, -1, 0, 1, 2)      # figure 5: beta, in tau away from where the word's gate is half open
ROWS = 4                           # denoising steps in figures 3 and 4
NOTEBOOK_MAPS = 400_000            # bytes of maps of the page in a notebook
TRAINING_COST = 9                               # of a training step, in guided drawing steps; measured
OPTIONS = {"concept": "locked", "trained": "trained", "inversion": "none"}     # option -> lock of its file
LOCKS = (  # name, which concept, lock when drawing, what it is
    ("super-category", None, "local", "The base model and ordinary words. Nothing is edited."),
    ("locked keys", "locked", "local", "The concept's values; its word has the key of the super-category."),
    ("global lock", "locked", "global", "The concept's values; all words have the keys of the ordinary prompt."),
    ("trained keys", "trained", "local", "The concept's values, and a key that was trained with them."),
    ("textual inversion", "none", "local", "Only a word embedding was trained. Nothing is edited."))


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="pictures of the concept, to train what is not given as a file")
    add("--super", dest="super_category", metavar="WORDS", help='what it is, in ordinary words: "teddy bear"')
    add("--second", type=Path, metavar="DIR|FILE", help="pictures of a second concept, or its file")
    add("--second-super", metavar="WORDS", help="what the second one is, in ordinary words")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="output folder (default: figures)")
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id (default: tiny)")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt, for a single file")
    add("--prompt", default="a photo of a {} wearing a hat on the beach",
        help="{} stands for the concept (default: %(default)s)")
    add("--words", default="hat,beach", metavar="WORDS", help="other words of figure 2 (default: %(default)s)")
    add("--pair", default="a photo of a {} next to a {}", help="prompt of two concepts (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    add("--steps", type=int, default=20, help="denoising steps, 1 to 999 (default: %(default)s)")
    add("--guidance", type=float, help="weight of the prompt (default: 7.5, for the small model 4)")
    add("--training-steps", type=int, metavar="N", help="(default: 160 for tiny, 400 for SD v1)")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default: the best one present)")
    files = parser.add_argument_group("finished files, instead of training")
    files.add_argument("--concept", type=Path, metavar="FILE", help="concept with locked keys")
    files.add_argument("--trained", type=Path, metavar="FILE", help="the same, trained with --lock trained")
    files.add_argument("--inversion", type=Path, metavar="FILE", help="the same, trained with --lock none")
    args = parser.parse_args(argv)
    if args.prompt.count("{}") != 1 or args.pair.count("{}") != 2:
        parser.error("--prompt needs {} once, --pair twice")
    args.words = [word.strip() for word in args.words.split(",") if word.strip()]
    if not 1 <= args.steps <= 999 or not 0 <= args.seed < 2 ** 63 - 4:
        parser.error("--steps must be 1 to 999, --seed 0 to 2**63 - 5")
    if bool(args.images) != bool(args.super_category) or not (args.images or args.concept):
        parser.error("give --images with --super, or a finished --concept")
    if args.second and args.second.suffix != ".safetensors" and not args.second_super:
        parser.error("--second with a folder of pictures needs --second-super")
    return args


# %% [markdown]
# ## What is given, and what must be trained

# %%
def attempt(function, *inputs):
    """The function's result; an error that the user can mend ends the script with one sentence and exit code 2."""
    try:
        return function(*inputs)
    except (ValueError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError and "memory" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def shared_locks(versions):
    """The rows of LOCKS that all concepts have; versions: for each concept a dict whose keys are locks."""
    return [row for row in LOCKS if row[1] is None or all(row[1] in own for own in versions)]


def load_model():
    device = drawing.pick_device(args.device)
    model = weights_loader.load(args.weights, device, torch.float32 if device == "cpu" else torch.float16,
                                tokenizer=args.tokenizer)
    fast_cpu.enable(model)
    return model


def concept_files(model):
    """For each concept {lock: its file or folder}, and what is to be trained before: arguments of `train`."""
    given = [({lock: file for option, lock in OPTIONS.items() if (file := getattr(args, option))}, args.images,
              args.super_category)]
    if args.second and args.second.suffix == ".safetensors":
        given.append(({"locked": args.second}, None, None))
    elif args.second:
        given.append(({}, args.second, args.second_super))
    missing = []
    for files, pictures, words in given:
        for file in files.values():
            if not file.is_file():
                raise ValueError(f"{file}: there is no such file")
        for lock in OPTIONS.values() if pictures else ():
            if lock not in files:
                files[lock] = training_folder(model, pictures, words, lock)
                if not files[lock].exists():
                    missing.append((files[lock], pictures, words, lock))
    return [files for files, _, _ in given], missing


def training_folder(model, pictures, words, lock):
    """Where a training is kept: another name for other pictures, other words, other weights or another length."""
    digest = hashlib.sha256(f"{words}|{model.fingerprint}|{args.training_steps}".encode())
    for file in list_images(pictures)[0]:
        digest.update(file.name.encode() + file.read_bytes())
    return args.out / "trained" / f"{pictures.resolve().stem}-{lock}-{digest.hexdigest()[:8]}"


def train(folder, pictures, words, lock):
    """Run train.py. The folder gets its name at the end; a training that was stopped goes on."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    command = [sys.executable, ROOT / "train.py", "--images", pictures, "--super", words, "--lock", lock, "--steps",
               str(args.training_steps), "--preview", "0", "--out", unfinished, "--weights", args.weights]
    for option in ("tokenizer", "device"):
        command += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
    command += ["--resume"] if (unfinished / "checkpoint.pt").exists() else []
    print(f"training {folder}", flush=True)
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)
    unfinished.rename(folder)


def announce(model, missing, files):
    """Say how long everything will take, from the time of one drawing step on this machine; returns the pictures."""
    pictures = sum(len(shared_locks(files[:n + 1])) + len(SEEDS) * len(SWEEP) for n in range(len(files)))
    pictures += ("trained" in files[0]) + len(SEEDS) * (len(files) - 1)
    ids, _ = model.tokenizer.encode(["", args.prompt])
    e = model.text_encoder(model.text_encoder.embed(ids.to(model.device)))
    keys, values = model.unet.keys(e), model.unet.values(e)
    start = time.perf_counter()
    drawing.draw(model, keys, values, [0], model.size, 3, args.guidance or model.guidance)
    step = (time.perf_counter() - start) / 3
    seconds = step * (pictures * args.steps + len(missing) * args.training_steps * TRAINING_COST)
    print(f"{len(missing)} trainings of {args.training_steps} steps and {pictures} pictures of {args.steps} steps: "
          f"about {max(1, round(seconds / 60))} minutes on this machine", flush=True)
    return pictures


def read_concepts(model, files):
    """{lock: Concept} of one concept, ready for the model; ValueError when the files do not belong together."""
    concepts = {}
    for lock, path in files.items():
        path = path if path.is_file() else next(path.glob("*.safetensors"))
        concept, = perfusion.prepare([perfusion.Concept.load(path)], model)
        if concept.lock != lock:
            raise ValueError(f"{path} was trained with --lock {concept.lock}; here --lock {lock} is needed")
        concepts[lock] = concept
    if len({concept.words for concept in concepts.values()}) > 1:
        raise ValueError("the files are not of one concept: their super-categories differ")
    return concepts


# %% [markdown]
# ## Tools: from a prompt to a drawing whose attention is kept

# %%
def fill(template, names):
    """A template with the concepts' names, or their ordinary words, in the places of its {}."""
    for name in names:
        template = template.replace("{}", name, 1)
    return template


def project(prompt, mine, lock, beta=None):
    """Keys and values of ["", prompt] with the concepts `mine`, and the gates (T, n) of its tokens or None."""
    beta, n = BETA[lock] if beta is None else beta, len(mine)
    e, e_super, (_, found) = perfusion.encode(model.text_encoder, model.tokenizer, ["", prompt], mine)
    for concept in mine:
        if not found[concept.token]:
            raise ValueError(f'the prompt "{prompt}" is too long: it cuts off {concept.token}')
    keys, values = perfusion.keys_and_values(model.unet, e, e_super, mine, [beta] * n, [TAU] * n, lock)
    edited = [concept for concept in mine if concept.lock != "none"]
    if not edited:
        return keys, values, None
    _, sims = perfusion.split(e, torch.stack([c.i_star for c in edited]), torch.stack([c.d_star for c in edited]))
    return keys, values, perfusion.gate(sims, beta, TAU)[1].cpu()


@dataclass
class Drawn:
    """A picture (3, H, W); its words' maps and what the U-Net saw, from `explorer.watch`; masks (n, h, w) of the
    concepts' objects; gates (T, n) or None."""
    picture: torch.Tensor
    maps: list
    seen: torch.Tensor
    masks: torch.Tensor
    gates: torch.Tensor | None


class Study:
    """A prompt with one or two concepts, each a dict {lock: Concept}, and what was drawn under every lock."""

    def __init__(self, template, concepts):
        self.template, self.concepts = template, concepts
        self.locked = [versions["locked"] for versions in concepts]
        self.names = [concept.words for concept in self.locked]
        self.prompt, self.ordinary = fill(template, [c.token for c in self.locked]), fill(template, self.names)
        self.words = explorer.prompt_words(model.tokenizer, self.prompt, self.locked)
        self.locks = shared_locks(concepts)
        self.drawn = {}

    def draw(self):
        """Draw the first seed under every lock."""
        for name, version, lock, _ in self.locks:
            self.drawn[name] = self.watch(version, lock, args.seed)

    def project(self, version, lock, beta=None):
        """As `project`, of the concepts in one version; with version None of the ordinary words."""
        mine = [versions[version] for versions in self.concepts] if version else []
        return project(fill(self.template, [c.token for c in mine] or self.names), mine, lock, beta)

    def watch(self, version, lock, seed, map_version=None):
        """Draw one seed and keep all attention: of the keys that draw, or of those of another version."""
        keys, values, gates = self.project(version, lock)
        map_keys = self.project(map_version, lock)[0] if map_version else None
        latents, maps, seen = explorer.watch(model, keys, values, self.words, seed, args.steps, GUIDANCE, map_keys)
        progress.update()
        return Drawn(drawing.decode(model.vae, latents)[0], maps, seen, self.masks(latents), gates)

    def masks(self, latents):
        """Where the base model sees the concepts' ordinary words in a picture: (n, h, w) of 0 and 1."""
        keys, values, _ = self.project(None, "local")
        sums = 0
        for t in MASK_TIMESTEPS:
            noise = seeded_noise(0, latents.shape[1:]).to(latents)
            z = model.schedule.add_noise(latents, noise, torch.tensor([t], device=latents.device))
            with record_queries(model.unet) as queries:
                model.unet(z.to(keys[0].dtype), t, [k[1:] for k in keys], [v[1:] for v in values])
            maps = attention(queries, [k[1:] for k in keys], model.unet.config.attention_heads)
            sums = sums + torch.cat([word_map(maps, word.tokens, latents.shape[-2:]) for word in self.named()])
        low, high = sums.amin((1, 2), keepdim=True), sums.amax((1, 2), keepdim=True)
        return (sums > (low + high) / 2).float().cpu()

    def named(self):
        """The words that name the concepts, in the concepts' order."""
        return [next(word for word in self.words if word.concept == j) for j in range(len(self.concepts))]

    def row(self, text):
        """Which of the prompt's words make up a concept's name or an ordinary word or phrase; ValueError: none."""
        found = (model.tokenizer.find(self.ordinary, text) or [[]])[0]
        rows = [i for i, word in enumerate(self.words) if word.label == text or set(word.tokens) <= set(found)]
        if not rows:
            raise ValueError(f'--words: the prompt "{self.ordinary}" has no word "{text}"')
        return rows

    def sweep(self, betas):
        """Pictures (betas, seeds, 3, H, W) and gates (betas, T, n) with locked keys."""
        pictures, gates = [], []
        for beta in betas:
            keys, values, opened = self.project("locked", "local", beta)
            pictures.append(torch.cat([drawing.draw(model, keys, values, [seed], model.size, args.steps, GUIDANCE)
                                       for seed in SEEDS]))
            gates.append(opened)
            progress.update(len(SEEDS))
        return torch.stack(pictures), torch.stack(gates)

    def betas(self):
        """Values of beta around the one at which the gate of the concept's word is half open."""
        last = self.named()[0].tokens[-1]
        at = BETA["local"] + TAU * torch.logit(self.drawn["locked keys"].gates[last, 0], eps=1e-6).item()
        return [round(at + TAU * k, 2) for k in SWEEP]

    def views(self):
        """What the page shows of every lock."""
        return [explorer.View(name, note, drawn.picture, drawn.maps, drawn.masks, drawn.gates)
                for (name, _, _, note), drawn in zip(self.locks, self.drawn.values())]


def share(maps, mask):
    """The share of a map (h, w) that lies in a mask of any size."""
    return share_inside(maps[None], mask[None]).item()


# %% [markdown]
# ## Tools: plots

# %%
def plot(cells, rows, columns, title, notes=None, outlines=None, top=None):
    """A grid of pictures (3, H, W) and maps (h, w). notes: texts under the cells; outlines: a mask (h, w) per row;
    top: where the colours of the maps end, one number or one per column."""
    R, C = len(cells), len(cells[0])
    figure = Figure(figsize=(1.4 * C + 0.5, 1.65 * R + 0.7), layout="constrained")
    axes = figure.subplots(R, C, squeeze=False)
    for r, c in itertools.product(range(R), range(C)):
        axis, cell = axes[r, c], cells[r][c]
        axis.set(xticks=[], yticks=[])
        if cell.ndim == 3:
            axis.imshow(drawing.to_bytes(cell))
        else:
            vmax = top[c] if isinstance(top, list) else top
            axis.imshow(cell.numpy(), cmap="magma", vmin=0, vmax=vmax, extent=(0, 1, 1, 0))
            if outlines is not None:
                across, down = ((torch.arange(n) + 0.5) / n for n in reversed(outlines[r].shape))
                axis.contour(across, down, outlines[r].numpy(), levels=[0.5], colors="white", linewidths=0.8)
        if notes is not None:
            axis.set_xlabel(notes[r][c], fontsize=8)
        if r == 0:
            axis.set_title(columns[c], fontsize=8)
        if c == 0:
            axis.set_ylabel(rows[r], fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def finish(figure, name, header, table):
    """Write a figure as PNG and its numbers as CSV beside it, and show it where there is a notebook."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    with replacing(args.out / f"{name}.png") as path:       # 256 colours: a third of the bytes
        Image.open(drawn).convert("RGB").quantize(256).save(path, "PNG", optimize=True)
    with replacing(args.out / f"{name}.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *table])
    if IN_NOTEBOOK:
        display.display(display.Image(args.out / f"{name}.png"))
    else:
        progress.write(str(args.out / f"{name}.png"))


def write_page(study, sweep, name):
    """Write the page of a study, and show it where there is a notebook."""
    named = " and ".join(f'"{words}"' for words in study.names)
    about = {
        "concepts": [concept.token for concept in study.locked], "objects": study.names,
        "lead": f"{study.prompt[0].upper()}{study.prompt[1:]}: one prompt and one seed, under {len(study.locks)} locks. Choose a word: bright "
                "places are where the picture listens to it. A good lock keeps the concept's word on its object.",
        "made": f'"{study.prompt}", seed {args.seed}, {args.steps} DDIM steps, guidance {GUIDANCE:g}, model {model.name}; '
                f"local locks with beta {BETA['local']}, the global lock with beta {BETA['global']}, tau {TAU}. A map is a "
                "word's share of each place's attention, the sum over its tokens and the mean over heads; the shares of all "
                f"words of the prompt add up to 1. The white outline is the object: where the base model's own attention to "
                f"{named}, over the finished picture with noise added, is above the middle of its range. It is the "
                "same judge for every lock, but it is attention too, not a mask drawn by hand."}
    text = explorer.page(about, study.words, model.unet.layer_names(), study.views(), *sweep, SEEDS, *[NOTEBOOK_MAPS] * IN_NOTEBOOK)
    with replacing(args.out / name) as path:
        path.write_text(text, encoding="utf-8")
    if IN_NOTEBOOK:
        display.display(display.HTML(f'<iframe srcdoc="{html.escape(text)}" width="100%" height="1000"></iframe>'))
    else:
        progress.write(f"{args.out / name}: open it in a browser")


# %% [markdown]
# ## Load, train, draw
#
# What is missing is trained first: locked keys, trained keys, textual inversion. Then the same prompt and seed are drawn
# under every lock: ordinary words, locked keys, the global lock, trained keys, textual inversion.

# %%
def setup():
    """The model, the concepts as [{lock: Concept}], and how many pictures will be drawn."""
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model()
    args.training_steps = args.training_steps or (400 if model.vae.factor == 8 else 160)
    files, missing = concept_files(model)
    if args.super_category:
        check_words(model, args.prompt, [args.super_category], args.words)
    pictures = announce(model, missing, files)
    if missing:
        del model           # two models at once would take twice the memory
        for training in missing:
            train(*training)
        model = load_model()
    return model, [read_concepts(model, own) for own in files], pictures


def check_words(model, template, names, words):
    """ValueError when a prompt has no room for a concept, or no such word."""
    prompt = fill(template, names)
    for name in [*names, *words]:
        if len(model.tokenizer.find(prompt, name)) < max(1, names.count(name)):
            raise ValueError(f'the prompt "{prompt}" has no word "{name}", or is too long for it')


if IN_NOTEBOOK:
    from IPython import display
args = arguments(shlex.split(os.environ.get("DIAGNOSTICS", "")) if IN_NOTEBOOK else None)
SEEDS = [args.seed + k for k in range(3)]
model, concepts, pictures = attempt(setup)
GUIDANCE = model.guidance if args.guidance is None else args.guidance
progress = tqdm(total=pictures, unit="picture", desc="drawing", disable=IN_NOTEBOOK)
one = attempt(Study, args.prompt, concepts[:1])
pair = attempt(Study, args.pair, concepts) if len(concepts) == 2 else None
for study in filter(None, (one, pair)):
    attempt(study.draw)


# %% [markdown]
# ## 1. The gate: which words does the edit touch?
#
# `sigmoid((sim / energy - beta) / tau)` of every token. It should be open at a concept's own word and shut elsewhere.

# %%
def figure_gates():
    """The gate of every token up to the end mark, of one prompt and of the prompt of two concepts."""
    studies, table = [study for study in (one, pair) if study], []
    figure = Figure(figsize=(8, 2.3 * len(studies) + 0.4), layout="constrained")
    for axis, study in zip(figure.subplots(len(studies), 1, squeeze=False)[:, 0], studies):
        tokens = [(t, piece) for word in study.words for t, piece in zip(word.tokens, word.pieces)
                  if word.label != "padding"]
        gates, n = study.drawn["locked keys"].gates, len(study.locked)
        for j, concept in enumerate(study.locked):
            axis.bar([t + 0.8 * (j + 0.5) / n - 0.4 for t, _ in tokens], [gates[t, j].item() for t, _ in tokens], 0.8 / n,
                     label=concept.token, color=colormaps["viridis"](0.25 + 0.5 * j))
            table += [(study.prompt, t, piece, concept.token, f"{gates[t, j]:.4f}") for t, piece in tokens]
        axis.set_xticks([t for t, _ in tokens], [piece for _, piece in tokens], rotation=35, fontsize=9)
        axis.set(ylim=(0, 1), ylabel="gate")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"How far the gate is open at every token (beta {BETA['local']}, tau {TAU})", fontsize=10)
    finish(figure, "1_gates", ("prompt", "place", "token", "concept", "gate"), table)


attempt(figure_gates)


# %% [markdown]
# ## 2. Where does the word act, under each lock?
#
# The same prompt and seed in every row. A locked word should act where the super-category's words act, on the object. The
# number belongs to the concept's word only: the share of its attention on its own object, which is outlined.

# %%
def figure_locks():
    """Pictures, and maps of the concept and other words, the mean over steps, layers and heads."""
    rows = {one.locked[0].token: one.row(one.locked[0].token), **{word: one.row(word) for word in args.words}}
    cells, notes, table = [], [], []
    for name, drawn in one.drawn.items():
        maps = [drawn.maps[0][:, row].sum(1).mean(0) for row in rows.values()]
        inside = share(maps[0], drawn.masks[0])
        cells.append([drawn.picture, *maps])
        notes.append(["", f"{inside:.0%} on the object", *[""] * len(args.words)])
        table += [(name, word, f"{x.mean():.5f}", f"{inside:.4f}" if i == 0 else "")
                  for i, (word, x) in enumerate(zip(rows, maps))]
    top = [0, *(max(row[c].max().item() for row in cells) for c in range(1, len(rows) + 1))]
    columns = ["picture", *(f"{word}\n0 to {top[c]:.0%}" for c, word in enumerate(rows, 1))]
    figure = plot(cells, list(one.drawn), columns, f"Where words act under each lock\n{one.prompt}", notes,
                  [drawn.masks[0] for drawn in one.drawn.values()], top)
    finish(figure, "2_locks", ("lock", "word", "mean share of attention", "share on the object"), table)


attempt(figure_locks)


# %% [markdown]
# ## 3. The pure effect of the key
#
# One drawing, that of the locked concept. Its queries meet the locked keys and the trained keys. Nothing else differs.

# %%
def spread(n):
    """At most n denoising steps, evenly spread from the first to the last."""
    return torch.linspace(0, args.steps - 1, min(n, args.steps)).round().int().tolist()


def seen_at(drawn, k):
    """What the U-Net saw at step k, decoded: a noisy picture (3, H, W)."""
    return drawing.decode(model.vae, drawn.seen[k:k + 1].to(model.device))[0]


def figure_keys():
    """The map of the word under either keys at several steps."""
    locked, trained = one.drawn["locked keys"], one.watch("locked", "local", args.seed, map_version="trained")
    (row,), steps, names = one.row(one.locked[0].token), spread(ROWS), ("locked keys", "trained keys")
    maps = [[drawn.maps[0][k, row] for drawn in (locked, trained)] for k in steps]
    inside = [[share(x, locked.masks[0]) for x in pair_of_maps] for pair_of_maps in maps]
    top = max(x.max().item() for pair_of_maps in maps for x in pair_of_maps)
    labels = [f"t = {ddim_timesteps(args.steps)[k]}" for k in steps]
    figure = plot([[seen_at(locked, k), *row_of_maps] for k, row_of_maps in zip(steps, maps)], labels,
                  ["what the U-Net saw", *(f"{name}\n0 to {top:.0%}" for name in names)],
                  f"The same queries under two keys: attention to {one.locked[0].token}",
                  [["", *(f"{x:.0%} on the object" for x in numbers)] for numbers in inside],
                  [locked.masks[0]] * len(steps), top)
    finish(figure, "3_keys", ("step", "keys", "share on the object"),
           [(label, name, f"{x:.4f}") for label, numbers in zip(labels, inside) for name, x in zip(names, numbers)])


if "trained keys" in one.drawn:
    attempt(figure_keys)
else:
    print("figure 3 needs --trained, or --images to train it")


# %% [markdown]
# ## 4. Over steps and layers
#
# The map of the concept's word in every cross-attention layer (across) at several noise levels (down), on one scale.

# %%
def figure_layers():
    """What the U-Net saw, and the map of the word in every layer, at several steps."""
    locked, (row,), steps = one.drawn["locked keys"], one.row(one.locked[0].token), spread(ROWS)
    maps = [[level[k, row] for level in locked.maps[1:]] for k in steps]
    inside = [[share(x, locked.masks[0]) for x in layers] for layers in maps]
    top, names = max(x.max().item() for layers in maps for x in layers), model.unet.layer_names()
    labels = [f"t = {ddim_timesteps(args.steps)[k]}" for k in steps]
    figure = plot([[seen_at(locked, k), *layers] for k, layers in zip(steps, maps)], labels, ["what the U-Net saw", *names],
                  f"Attention to {one.locked[0].token} in every layer, locked keys, 0 to {top:.0%}; % on the object",
                  [["", *(f"{x:.0%}" for x in numbers)] for numbers in inside], [locked.masks[0]] * len(steps), top)
    finish(figure, "4_layers", ("step", "layer", "share on the object"),
           [(label, name, f"{x:.4f}") for label, numbers in zip(labels, inside) for name, x in zip(names, numbers)])


attempt(figure_layers)


# %% [markdown]
# ## 5. The knob: beta
#
# Beta is where the gate of a word is half open. It is chosen when a picture is drawn, without training: lower, more of
# the concept; higher, more of the prompt. The columns go from an open gate to one that is shut.

# %%
def figure_beta():
    """Pictures of three seeds at several beta; returns them and the gates of their tokens."""
    betas, last = one.betas(), one.named()[0].tokens[-1]
    pictures, gates = one.sweep(betas)
    figure = plot(pictures.transpose(0, 1), [f"seed {seed}" for seed in SEEDS],
                  [f"beta {beta:g}\ngate {opened[last, 0]:.0%}" for beta, opened in zip(betas, gates)],
                  f"Beta: from the concept to the prompt alone\n{one.prompt}")
    finish(figure, "5_beta", ("beta", "tau", "gate of the concept's word"),
           [(beta, TAU, f"{opened[last, 0]:.4f}") for beta, opened in zip(betas, gates)])
    return betas, pictures, gates


swept = attempt(figure_beta)


# %% [markdown]
# ## 6. Two concepts, trained apart, in one prompt
#
# Each word's map should cover its own object.

# %%
def figure_two():
    """Pictures of four seeds, and the maps of both words with the share on their own objects."""
    drawn = [pair.drawn["locked keys"], *(pair.watch("locked", "local", args.seed + k) for k in (1, 2, 3))]
    tokens = [concept.token for concept in pair.locked]
    maps = [[one_drawn.maps[0][:, pair.row(token)].sum(1).mean(0) for token in tokens] for one_drawn in drawn]
    inside = [[share(x, mask) for x, mask in zip(row, one_drawn.masks)] for row, one_drawn in zip(maps, drawn)]
    top = max(x.max().item() for row in maps for x in row)
    names = [f"seed {args.seed + k}" for k in range(4)]
    figure = plot([[one_drawn.picture, *row] for one_drawn, row in zip(drawn, maps)], names,
                  ["picture", *(f"{token}\n0 to {top:.0%}" for token in tokens)], pair.prompt,
                  [["", *(f"{x:.0%} on its object" for x in row)] for row in inside], None, top)
    finish(figure, "6_two", ("seed", "concept", "share on its own object"),
           [(name, token, f"{x:.4f}") for name, row in zip(names, inside) for token, x in zip(tokens, row)])


if pair:
    attempt(figure_two)
else:
    print("figure 6 shows two concepts with --second")


# %% [markdown]
# ## The page: every word, lock, step and layer

# %%
attempt(write_page, one, swept, "explorer.html")
if pair:
    attempt(lambda: write_page(pair, (pair.betas(), *pair.sweep(pair.betas())), "explorer_two.html"))
progress.close()
