"""Why key locking works: train what is missing, draw figures, and write a page that explains it.

    python diagnostics.py --images examples/teddy --super "teddy bear"
    python diagnostics.py --images examples/teddy --super "teddy bear" \\
        --second examples/cat --second-super cat --page docs/index.html
    python diagnostics.py --concept teddy.safetensors --trained teddy-trained.safetensors

The output folder receives the figures (PNG), their numbers (CSV), the page (index.html), and in trained/ the
concepts, which the next run uses again. A second concept adds figure 6; the page is then about both. The
second command makes what is committed: figures/1_gates.png and on, and docs/index.html.

Each figure makes one claim. Maps that are compared share one colour scale. A number under a map is the share
of a word's attention that lies on its own object, which is outlined. The base model finds the object in the
finished picture: where its attention to the ordinary words is above the middle of its range. So the judge is
the same for every lock, but it is attention too. diagnostics.ipynb tells the story with the same functions.
"""

import csv
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import diffusion
from attention_maps import share_inside
from concept import Concept, prepare
from diffusion import ddim_timesteps
from support import command_line, page
from support.base_model import open_model
from support.command_line import between, unquoted
from support.files import replacing
from support.pictures import digest, list_images, read_image
from support.plots import Figure, gates_figure, grid_figure, png
from support.study import DRAWING_BETA, DRAWING_TAU, Study, check_room

ROOT = Path(__file__).parent
SEEDS = {True: 4, False: 2}         # by whether the model is small
ROWS = 4                            # denoising steps in figures 3 and 4
PICTURES = {1: 15, 2: 22}           # drawn per seed, for one concept and for two; rounded up
TRAINING_COST = 9                   # of a training step, in guided drawing steps; measured
VERSIONS = {"concept": "locked", "trained": "trained", "inversion": "none"}     # option -> lock in training
RECORDS = ROOT / "tiny" / "records.json"


def arguments(argv: Sequence[str] | None):
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="pictures of the concept, for what is not given as a file")
    add("--super", dest="super_category", metavar="WORDS", help='what it is, in ordinary words: "teddy bear"')
    add("--second", type=Path, metavar="DIR|FILE", help="pictures of a second concept, or its file")
    add("--second-super", metavar="WORDS", help="what the second one is, in ordinary words")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="output folder")
    add("--page", type=Path, metavar="FILE", help="the page (default: index.html in --out)")
    add("--prompt", type=unquoted, default="a photo of a {} wearing a hat on the beach",
        help="{} stands for the concept")
    add("--words", default="hat,beach", metavar="W,W", help="other words in figure 2")
    add("--pair", type=unquoted, default="a photo of a {} next to a {} on the grass", metavar="PROMPT",
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
    add("--trained", type=Path, metavar="FILE", help="the same, trained with --keys trained")
    add("--inversion", type=Path, metavar="FILE", help="the same, trained with --keys none")
    args = parser.parse_args(argv)
    args.words = [word.strip() for word in args.words.split(",") if word.strip()]
    args.page = args.page or args.out / "index.html"
    if args.prompt.count("{}") != 1 or args.pair.count("{}") != 2:
        parser.error("--prompt needs {} once, --pair twice")
    if bool(args.images) != bool(args.super_category) or not (args.images or args.concept):
        parser.error("give --images with --super, or a finished --concept")
    if args.second and (args.second.suffix == ".safetensors") == bool(args.second_super):
        parser.error("--second is a folder of pictures, with --second-super, or a finished file without it")
    return args


# ------------------------------------------------------------------------ what is given, and what is trained

def concept_files(args, model) -> tuple[list[dict], list[tuple]]:
    """For each concept {lock: its file, or the folder of its training}; the trainings that are missing."""
    given = {lock: file for option, lock in VERSIONS.items() if (file := getattr(args, option))}
    sources = [(given, args.images, args.super_category)]
    if args.second:
        sources.append(({}, args.second, args.second_super) if args.second_super else
                       ({"locked": args.second}, None, None))
    missing = []
    for files, pictures, words in sources:
        for lock in VERSIONS.values() if pictures else ():
            if lock not in files:
                files[lock] = training_folder(args, model, pictures, words, lock)
                if not finished(files[lock], args.training_steps):
                    missing.append((files[lock], pictures, words, lock))
    return [files for files, _, _ in sources], missing


def training_folder(args, model, pictures: Path, words: str, lock: str) -> Path:
    """Where a training is kept: another name for other pictures, words, weights or another length."""
    differs = f"{words}|{model.fingerprint}|{args.training_steps}|{digest(list_images(pictures)[0])}"
    name = f"{pictures.resolve().stem}-{lock}-{hashlib.sha256(differs.encode()).hexdigest()[:8]}"
    return args.out / "trained" / name


def finished(folder: Path, steps: int) -> bool:
    """Whether a folder holds a concept whose training was not stopped early."""
    return any(Concept.load(path).metadata.get("steps") == steps for path in folder.glob("*.safetensors"))


def train(args, folder: Path, pictures: Path, words: str, lock: str) -> None:
    """Run train.py into the folder; a training that was stopped goes on. Its bar and its errors are shown."""
    command = [sys.executable, ROOT / "train.py", "--images", pictures, "--super", words, "--keys", lock,
               "--steps", str(args.training_steps), "--preview", "0", "--out", folder,
               "--weights", args.weights]
    for option in ("tokenizer", "prediction", "device"):
        command += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
    command += ["--resume"] if (folder / "checkpoint.pt").exists() else []
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code < 0:
        raise ValueError(f"train.py was ended by signal {-code}, perhaps for want of memory: the same "
                         "command goes on from its last checkpoint")
    if code:        # it has said why
        sys.exit(code)


def announce(args, model, trainings: int) -> None:
    """Say how long it will take, from the time of a step on this machine."""
    pictures = SEEDS[model.small] * PICTURES[1 + bool(args.second)]
    ids, _ = model.tokenizer.encode(["", ""])
    e = model.text_encoder(model.text_encoder.embed(ids))
    start = time.perf_counter()
    diffusion.draw(model, model.unet.keys(e), model.unet.values(e), [0], model.size, 3, model.guidance)
    step = (time.perf_counter() - start) / 3
    seconds = step * (pictures * args.steps + trainings * args.training_steps * TRAINING_COST)
    minutes = max(1, round(seconds / 60))
    print(f"{trainings} trainings of {args.training_steps} steps and {pictures} pictures of {args.steps}: "
          f"about {minutes} minute{'s'[:minutes - 1]} on this machine", flush=True)


def read_concepts(model, files: dict) -> dict:
    """{lock: Concept} of one concept, ready for the model; ValueError when its files do not fit together."""
    concepts = {}
    for lock, path in files.items():
        concepts[lock], = prepare([Concept.load(concept_file(path))], model)
        if concepts[lock].keys != lock:
            raise ValueError(f"{path} was trained with --keys {concepts[lock].keys}: here one trained with "
                             f"--keys {lock} is needed")
    if len({concept.words for concept in concepts.values()}) > 1:
        raise ValueError("--concept, --trained and --inversion are not of one super-category")
    return concepts


def concept_file(path: Path) -> Path:
    """A concept's file, given itself or as the folder of its training."""
    return path if path.is_file() else next(path.glob("*.safetensors"))


@dataclass
class Run:
    """The model, the study of one concept, that of two or None, the page's study, and a bar of pictures."""
    args: object
    model: object
    one: Study
    pair: Study | None
    bar: tqdm
    drawing: str                    # the command that draws with the locked concepts

    @property
    def main(self) -> Study:
        return self.pair or self.one


def start(argv: Sequence[str] | None = None) -> Run:
    """Read the command line, train what is missing, load. ValueError and OSError for what is wrong."""
    args = arguments(argv)
    for folder in (args.out, args.page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    given = [args.concept, args.trained, args.inversion, None if args.second_super else args.second]
    given = [Concept.load(file) for file in given if file]      # what is wrong is said before minutes go by
    model = open_model(args, given)
    args.training_steps = args.training_steps or (160 if model.small else 400)
    args.guidance = model.guidance if args.guidance is None else args.guidance
    if args.super_category:
        check_room(model, args.prompt, [args.super_category])
    files, missing = concept_files(args, model)
    announce(args, model, len(missing))
    if missing:
        del model                   # two at once would take twice the memory
        for n, training in enumerate(missing, 1):
            print(f"training {n} of {len(missing)}: {training[2]}, --keys {training[3]}", flush=True)
            train(args, *training)
        model = open_model(args, given)
    concepts = [read_concepts(model, own) for own in files]

    def study(template, concepts):
        return Study(model, template, concepts, args.steps, args.guidance,
                     range(args.seed, args.seed + SEEDS[model.small]), lambda n: bar.update(n))
    one, pair = study(args.prompt, concepts[:1]), study(args.pair, concepts) if len(concepts) == 2 else None
    for word in args.words:
        one.rows(word)
    options = [word for own in files for word in ("--concept", concept_file(own["locked"]))]
    drawing = command_line.command(args, "sample.py", (pair or one).prompt, *options)
    bar = tqdm(unit="picture", desc="drawing", delay=1)
    return Run(args, model, one, pair, bar, drawing)


# ---------------------------------------------------------------------------- the figures, with their numbers

def figure_gates(run: Run) -> tuple:
    """1. The gate: open at a concept's own word and shut elsewhere."""
    prompts, table = [], []
    for study in filter(None, (run.one, run.pair)):
        places = [(t, piece) for word in study.words if word.label != "padding"
                  for t, piece in zip(word.tokens, word.pieces)]
        gates = study.drawn("locked keys", run.args.seed).gates
        prompts.append((places, study.tokens, gates))
        for j, token in enumerate(study.tokens):
            table += [(study.prompt, t, piece, token, f"{gates[t, j]:.4f}") for t, piece in places]
            if (opened := gates[study.named[j].tokens[-1], j]) < 0.5:
                run.bar.write(f'in "{study.prompt}" the gate of {token} is only {opened:.2f} open: '
                              f"its word stays nearly ordinary")
    title = f"How far the gate is open at every token, beta {DRAWING_BETA['local']}, tau {DRAWING_TAU}"
    return gates_figure(prompts, title), ("prompt", "place", "token", "concept", "gate"), table


def maps_figure(pictures: Sequence, maps: list, masks: list, rows: list, columns: list, title: str,
                one_scale: bool = False) -> tuple:
    """Pictures beside maps [row][column], with masks (h, w) or None of their objects, and the shares on them.

    columns: what is above the pictures, then above each column of maps; a scale for each, or one for all.
    """
    above, *columns = columns
    tops = [max(row[c].max().item() for row in maps) for c in range(len(columns))]
    tops = [max(tops)] * len(tops) if one_scale else tops
    objects, table = [], []
    for row, cells, own in zip(rows, maps, masks):
        shares = [None if mask is None else share_inside(cell[None], mask[None]).item()
                  for cell, mask in zip(cells, own)]
        objects.append([None, *(mask is not None and (mask, f"{share:.0%} on its object")
                                for mask, share in zip(own, shares))])
        table += [(row, column, f"{cell.mean():.5f}", "" if share is None else f"{share:.4f}")
                  for column, cell, share in zip(columns, cells, shares)]
    heads = [above, *(f"{column}\n0 to {top:.0%}" for column, top in zip(columns, tops))]
    figure = grid_figure([[picture, *row] for picture, row in zip(pictures, maps)], rows, heads, title,
                         [0, *tops], objects)
    return figure, ("row", "column", "mean share of attention", "share on its object"), table


def words_figure(study: Study, drawn: dict, words: list, title: str) -> tuple:
    """Drawings {row: Drawn}, and the maps of words: the mean over steps, layers and heads."""
    masks = [[row.masks[study.tokens.index(word)] if word in study.tokens else None for word in words]
             for row in drawn.values()]
    maps = [[study.map_of(word, row.maps[0]).mean(0) for word in words] for row in drawn.values()]
    return maps_figure([row.picture for row in drawn.values()], maps, masks, list(drawn), ["picture", *words],
                       f"{title}\n{study.prompt}")


def figure_locks(run: Run) -> tuple:
    """2. Where the word acts under each lock. A locked one where the ordinary words act: on the object."""
    drawn = {name: run.one.drawn(name, run.args.seed) for name in run.one.locks}
    return words_figure(run.one, drawn, [*run.one.tokens, *run.args.words], "Where words act under each lock")


def steps_figure(run: Run, columns: dict, title: str) -> tuple:
    """What the U-Net saw at several steps of the locked drawing, beside maps {column: (steps, h, w)}."""
    of, locked = run.args.steps, run.one.drawn("locked keys", run.args.seed)
    steps = torch.linspace(0, of - 1, min(ROWS, of)).round().int()
    seen = diffusion.decode(run.model.vae, locked.seen[steps].to(run.model.device))
    maps = [[maps[k] for maps in columns.values()] for k in steps]
    return maps_figure(seen, maps, [[locked.masks[0]] * len(columns)] * len(steps),
                       [f"t = {ddim_timesteps(of)[k]}" for k in steps], ["what the U-Net saw", *columns],
                       title, one_scale=True)


def figure_keys(run: Run) -> tuple:
    """3. The pure effect of the key: the queries of one drawing meet locked keys and trained keys."""
    one, seed = run.one, run.args.seed
    columns = {"locked keys": one.drawn("locked keys", seed),
               "trained keys": one.drawn("locked keys", seed, map_version="trained")}
    columns = {name: one.map_of(one.tokens[0], drawn.maps[0]) for name, drawn in columns.items()}
    return steps_figure(run, columns, f"The same queries under two keys:\nattention to {one.tokens[0]}")


def figure_layers(run: Run) -> tuple:
    """4. Over steps and layers: the concept's word in every cross-attention layer."""
    one = run.one
    levels = one.drawn("locked keys", run.args.seed).maps[1:]
    columns = {name: one.map_of(one.tokens[0], level)
               for name, level in zip(run.model.unet.layer_names(), levels)}
    return steps_figure(run, columns, f"Attention to {one.tokens[0]} in every layer, with locked keys")


def figure_beta(run: Run) -> tuple:
    """5. The knob: beta is where a gate is half open. Lower: more of the concept; higher: of the prompt."""
    one, t = run.one, run.one.named[0].tokens[-1]
    gates = [one.condition("locked", beta=beta).gates[1, t, 0].item() for beta in page.BETAS]
    rows = zip(*(one.moved(beta=beta) for beta in page.BETAS))
    figure = grid_figure(list(rows), [f"seed {seed}" for seed in one.seeds],
                         [f"beta {beta:g}\ngate {x:.0%}" for beta, x in zip(page.BETAS, gates)],
                         f"Beta: from more of the concept to more of the prompt\n{one.prompt}")
    return figure, ("beta", "tau", "gate of the concept's word"), [
        (beta, DRAWING_TAU, f"{x:.4f}") for beta, x in zip(page.BETAS, gates)]


def figure_two(run: Run) -> tuple:
    """6. Two concepts, trained apart, in one prompt: each word should act on its own object."""
    drawn = {f"seed {seed}": run.pair.drawn("locked keys", seed) for seed in run.pair.seeds}
    return words_figure(run.pair, drawn, run.pair.tokens, "Where the words of two concepts act")


def figures(run: Run) -> Iterator[tuple[str, tuple]]:
    """The names of the figures that can be drawn; each one's figure, and the header and rows of its table."""
    yield "1_gates", figure_gates(run)
    yield "2_locks", figure_locks(run)
    if run.one.has("trained"):
        yield "3_keys", figure_keys(run)
    else:
        run.bar.write("figure 3 needs --trained, or --images to train it")
    yield "4_layers", figure_layers(run)
    yield "5_beta", figure_beta(run)
    if run.pair:
        yield "6_two", figure_two(run)
    else:
        run.bar.write("figure 6 shows two concepts: give --second")


def save(folder: Path, name: str, figure: Figure, header: tuple, table: list) -> None:
    """Write a figure as PNG and its numbers as CSV beside it."""
    with replacing(folder / f"{name}.png") as path:
        path.write_bytes(png(figure))
    with replacing(folder / f"{name}.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *table])


# ------------------------------------------------------------------------------------------------- the page

def write_page(run: Run) -> Path:
    """Write the page of the study of two concepts, or of the one there is."""
    args, study = run.args, run.main
    objects = " and ".join(f'"{words}"' for words in study.names)
    made = (f"Model {run.model.name} ({run.model.fingerprint}), seeds {study.seeds[0]} to {study.seeds[-1]}, "
            f"{args.steps} DDIM steps, guidance {args.guidance:g}; beta {DRAWING_BETA['local']}, with the "
            f"global lock {DRAWING_BETA['global']}; tau {DRAWING_TAU}. The base model finds the objects: "
            f"where its attention to {objects}, over the finished picture with noise added, is above the "
            "middle of its range. So the judge is the same for every lock, but it is attention too.")
    about = {"fingerprint": run.model.fingerprint, "made": made}
    folders = [args.images, args.second][:len(study.concepts)]
    files = [list_images(path)[0][:10] if path and path.suffix != ".safetensors" else [] for path in folders]
    training = [[read_image(file, run.model.size[0])[0] / 2 + 0.5 for file in own] for own in files]
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else None
    with replacing(args.page) as path:
        path.write_text(page.page(study, training, about, records), encoding="utf-8")
    return args.page


def main(argv: Sequence[str] | None = None) -> None:
    run = start(argv)
    for name, drawn in figures(run):
        save(run.args.out, name, *drawn)
        run.bar.write(str(run.args.out / f"{name}.png"))
    path = write_page(run)
    run.bar.close()
    print(f"{path}: open it in a browser\ndraw with it:\n  {run.drawing}")


if __name__ == "__main__":
    with command_line.plain_errors(memory="a smaller model, or --device cpu, needs less"):
        main()
