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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import diffusion
import perfusion
from attention_maps import share_inside
from concept import Concept, prepare
from diffusion import ddim_timesteps
from perfusion import DRAWING_BETA, DRAWING_TAU
from support import command_line, page
from support.base_model import open_model
from support.command_line import between, concept_name, unquoted
from support.files import replacing
from support.pictures import digest, list_images, read_image
from support.plots import Figure, gates_figure, grid_figure, png
from support.study import Study, check_room

ROOT = Path(__file__).parent
SEEDS = {True: 4, False: 2}         # by whether the model is small
ROWS = 4                            # denoising steps in figures 3 and 4
PICTURES = {1: 15, 2: 22}           # drawn per seed, for one concept and for two; rounded up
TRAINING_COST = 9                   # of a training step, in guided drawing steps; measured
VERSIONS = {"concept": "locked", "trained": "trained", "inversion": "none"}     # option -> keys in training
RECORDS = ROOT / "tiny" / "records.json"


@dataclass
class Source:
    """Where a concept comes from: files {keys in training: file}, or pictures and ordinary words."""
    files: dict[str, Path]
    pictures: Path | None = None
    words: str | None = None


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
        help="of train.py (default: what suits the model)")
    command_line.add_model(parser)
    add = parser.add_argument_group("finished files, instead of training").add_argument
    for option, keys in VERSIONS.items():
        add(f"--{option}", type=Path, metavar="FILE", help=f"the concept, trained with --keys {keys}")
    args = parser.parse_args(argv)
    args.words = [word.strip() for word in args.words.split(",") if word.strip()]
    args.page = args.page or args.out / "index.html"
    if args.prompt.count("{}") != 1 or args.pair.count("{}") != 2:
        parser.error("--prompt needs {} once, --pair twice")
    if bool(args.images) != bool(args.super_category) or not (args.images or args.concept):
        parser.error("give --images with --super, or a finished --concept")
    if args.second and (args.second.suffix == ".safetensors") == bool(args.second_super):
        parser.error("--second is a folder of pictures, with --second-super, or a finished file without it")
    given = {keys: file for option, keys in VERSIONS.items() if (file := getattr(args, option))}
    args.sources = [Source(given, args.images, args.super_category)]
    if args.second and args.second_super:
        args.sources.append(Source({}, args.second, args.second_super))
    elif args.second:
        args.sources.append(Source({"locked": args.second}))
    return args


# ------------------------------------------------------------------------ what is given, and what is trained

def missing_trainings(args, model) -> list[tuple[Source, str, Path]]:
    """What is to be trained: (source, keys, file). Afterwards every source has the files of all its keys."""
    missing = []
    for source in args.sources:
        for keys in VERSIONS.values() if source.pictures else ():
            if keys not in source.files:
                source.files[keys] = file = trained_file(args, model, source, keys)
                missing += [] if finished(file, args.training_steps) else [(source, keys, file)]
    return missing


def trained_file(args, model, source: Source, keys: str) -> Path:
    """What a training makes: in another folder for other pictures, words, weights or another length."""
    pictures = digest(list_images(source.pictures)[0])
    differs = f"{source.words}|{model.fingerprint}|{args.training_steps}|{pictures}"
    folder = f"{source.pictures.resolve().stem}-{keys}-{hashlib.sha256(differs.encode()).hexdigest()[:8]}"
    return args.out / "trained" / folder / f"{concept_name(None, source.pictures)}.safetensors"


def finished(file: Path, steps: int) -> bool:
    """Whether a file is a concept whose training was not stopped early."""
    return file.is_file() and Concept.load(file).metadata.get("steps") == steps


def train(args, source: Source, keys: str, file: Path) -> None:
    """Run train.py; a training that was stopped goes on. Its bar and its errors are shown."""
    command = [sys.executable, ROOT / "train.py", "--images", source.pictures, "--super", source.words,
               "--keys", keys, "--steps", str(args.training_steps), "--preview", "0", "--resume",
               "--out", file.parent, "--weights", args.weights]
    for option in ("tokenizer", "prediction", "device"):
        command += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code < 0:
        raise ValueError(f"train.py was ended by signal {-code}, perhaps for want of memory: the same "
                         "command goes on from its last checkpoint")
    if code:        # it has said why
        sys.exit(code)


def announce(args, model, trainings: int) -> None:
    """Say how long it will take, from the time of a step on this machine."""
    pictures = SEEDS[model.small] * PICTURES[len(args.sources)]
    given = perfusion.condition(model, ["", ""], [])
    start = time.perf_counter()
    diffusion.draw(model, given.keys, given.values, [0], model.size, 3, model.guidance)
    step = (time.perf_counter() - start) / 3
    seconds = step * (pictures * args.steps + trainings * args.training_steps * TRAINING_COST)
    print(f"{trainings} trainings of {args.training_steps} steps and {pictures} pictures of {args.steps}: "
          f"about {max(1, round(seconds / 60))} min on this machine", flush=True)


def read_concepts(model, files: dict) -> dict:
    """{keys: Concept} of one concept, ready for the model; ValueError when its files do not fit together."""
    concepts = {keys: prepare([Concept.load(path)], model)[0] for keys, path in files.items()}
    for keys, concept in concepts.items():
        if concept.keys != keys:
            raise ValueError(f"{files[keys]} was trained with --keys {concept.keys}: here one trained with "
                             f"--keys {keys} is needed")
    if len({concept.words for concept in concepts.values()}) > 1:
        raise ValueError("--concept, --trained and --inversion are not of one super-category")
    return concepts


@dataclass
class Run:
    """The options, the study of one concept, that of two or None, and a bar of pictures."""
    args: object
    one: Study
    pair: Study | None
    bar: tqdm


def start(argv: Sequence[str] | None = None) -> Run:
    """Read the command line, train what is missing, load. ValueError and OSError for what is wrong."""
    args = arguments(argv)
    for folder in (args.out, args.page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # What is wrong with a file is said before minutes go by.
    given = [Concept.load(file) for source in args.sources for file in source.files.values()]
    model = open_model(args, given)
    args.training_steps = args.training_steps or model.training_steps
    args.guidance = model.guidance if args.guidance is None else args.guidance
    if args.super_category:
        check_room(model, args.prompt, [args.super_category])
    missing = missing_trainings(args, model)
    announce(args, model, len(missing))
    if missing:
        del model                   # two at once would take twice the memory
        for n, (source, keys, file) in enumerate(missing, 1):
            print(f"training {n} of {len(missing)}: {source.words}, --keys {keys}", flush=True)
            train(args, source, keys, file)
        model = open_model(args, given)
    concepts = [read_concepts(model, source.files) for source in args.sources]
    bar = tqdm(unit="picture", desc="drawing", delay=1)

    def study(template: str, concepts: list[dict]) -> Study:
        seeds = range(args.seed, args.seed + SEEDS[model.small])
        return Study(model, template, concepts, args.steps, args.guidance, seeds, bar.update)
    one, pair = study(args.prompt, concepts[:1]), study(args.pair, concepts) if args.second else None
    for word in args.words:
        one.rows(word)
    return Run(args, one, pair, bar)


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


def maps_figure(title: str, columns: list, rows: dict, one_scale: bool = False) -> tuple:
    """Pictures beside maps, with the outlines of their objects, and the shares of the maps on them.

    columns: what is above the pictures, then above each column of maps; rows {label: (picture, maps, masks)},
    a map and a mask (h, w) or None for each column. A scale for each column, or one for all.
    """
    above, *columns = columns
    tops = [max(maps[c].max().item() for _, maps, _ in rows.values()) for c in range(len(columns))]
    tops = [max(tops)] * len(tops) if one_scale else tops
    cells, objects, table = [], [], []
    for row, (picture, maps, masks) in rows.items():
        cells.append([picture, *maps])
        objects.append([None])
        for column, cell, mask in zip(columns, maps, masks):
            share = None if mask is None else share_inside(cell[None], mask[None]).item()
            objects[-1].append(None if mask is None else (mask, f"{share:.0%} on its object"))
            table.append((row, column, f"{cell.mean():.5f}", "" if mask is None else f"{share:.4f}"))
    heads = [above, *(f"{column}\n0 to {top:.0%}" for column, top in zip(columns, tops))]
    figure = grid_figure(cells, list(rows), heads, title, [0, *tops], objects)
    return figure, ("row", "column", "mean share of attention", "share on its object"), table


def words_figure(study: Study, drawn: dict, words: list, title: str) -> tuple:
    """Drawings {row: Drawn}, and the maps of words: the mean over steps, layers and heads."""
    rows = {}
    for row, drawing in drawn.items():
        masks = dict(zip(study.tokens, drawing.masks))
        maps = [study.map_of(word, drawing.maps[0]).mean(0) for word in words]
        rows[row] = drawing.picture, maps, [masks.get(word) for word in words]
    return maps_figure(f"{title}\n{study.prompt}", ["picture", *words], rows)


def figure_locks(run: Run) -> tuple:
    """2. Where the word acts under each lock. A locked one where the ordinary words act: on the object."""
    drawn = {name: run.one.drawn(name, run.args.seed) for name in run.one.locks}
    return words_figure(run.one, drawn, [*run.one.tokens, *run.args.words], "Where words act under each lock")


def steps_figure(run: Run, levels: dict, title: str) -> tuple:
    """What the U-Net saw at some steps of the locked drawing, beside its word's maps {column: level}."""
    one, of, rows = run.one, run.args.steps, {}
    locked = one.drawn("locked keys", run.args.seed)
    columns = {name: one.map_of(one.tokens[0], level) for name, level in levels.items()}
    for k in torch.linspace(0, of - 1, min(ROWS, of)).round().int().tolist():
        seen, = diffusion.decode(one.model.vae, locked.seen[[k]].to(one.model.device))
        maps = [steps[k] for steps in columns.values()]
        rows[f"t = {ddim_timesteps(of)[k]}"] = seen, maps, [locked.masks[0]] * len(maps)
    return maps_figure(title, ["what the U-Net saw", *columns], rows, one_scale=True)


def figure_keys(run: Run) -> tuple:
    """3. The pure effect of the key: the queries of one drawing meet locked keys and trained keys."""
    levels = {"locked keys": run.one.drawn("locked keys", run.args.seed).maps[0],
              "trained keys": run.one.drawn("locked keys", run.args.seed, "trained keys").maps[0]}
    return steps_figure(run, levels, f"The same queries under two keys:\nattention to {run.one.tokens[0]}")


def figure_layers(run: Run) -> tuple:
    """4. Over steps and layers: the concept's word in every cross-attention layer."""
    maps = run.one.drawn("locked keys", run.args.seed).maps
    levels = dict(zip(run.one.model.unet.layer_names(), maps[1:]))
    return steps_figure(run, levels, f"Attention to {run.one.tokens[0]} in every layer, with locked keys")


def figure_beta(run: Run) -> tuple:
    """5. The knob: beta is where a gate is half open. Lower: more of the concept; higher: of the prompt."""
    one, t = run.one, run.one.named[0].tokens[-1]
    gates = [one.condition("locked keys", beta).gates[1, t, 0].item() for beta in page.BETAS]
    heads = [f"beta {beta:g}\ngate {gate:.0%}" for beta, gate in zip(page.BETAS, gates)]
    figure = grid_figure(list(zip(*(one.moved(beta=beta) for beta in page.BETAS))),
                         [f"seed {seed}" for seed in one.seeds], heads,
                         f"Beta: from more of the concept to more of the prompt\n{one.prompt}")
    table = [(beta, DRAWING_TAU, f"{gate:.4f}") for beta, gate in zip(page.BETAS, gates)]
    return figure, ("beta", "tau", "gate of the concept's word"), table


def figure_two(run: Run) -> tuple:
    """6. Two concepts, trained apart, in one prompt: each word should act on its own object."""
    drawn = {f"seed {seed}": run.pair.drawn("locked keys", seed) for seed in run.pair.seeds}
    return words_figure(run.pair, drawn, run.pair.tokens, "Where the words of two concepts act")


FIGURES = (figure_gates, figure_locks, figure_keys, figure_layers, figure_beta, figure_two)


def save(path: Path, figure: Figure, header: tuple, table: list) -> None:
    """Write a figure as PNG and its numbers as CSV beside it."""
    with replacing(path) as partial:
        partial.write_bytes(png(figure))
    with replacing(path.with_suffix(".csv")) as partial, \
            open(partial, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *table])


# ------------------------------------------------------------------------------------------------- the page

def write_page(run: Run) -> Path:
    """Write the page of the study of two concepts, or of the one there is."""
    args, study = run.args, run.pair or run.one
    model = study.model
    objects = " and ".join(f'"{words}"' for words in study.names)
    made = (f"Model {model.name} ({model.fingerprint}), seeds {study.seeds[0]} to {study.seeds[-1]}, "
            f"{args.steps} DDIM steps, guidance {args.guidance:g}; beta {DRAWING_BETA['local']}, with the "
            f"global lock {DRAWING_BETA['global']}; tau {DRAWING_TAU}. The base model finds the objects: "
            f"where its attention to {objects}, over the finished picture with noise added, is above the "
            "middle of its range. So the judge is the same for every lock, but it is attention too.")
    training = []
    for source in args.sources:
        files = list_images(source.pictures)[0][:10] if source.pictures else []
        training.append([read_image(file, model.size[0])[0] / 2 + 0.5 for file in files])
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else None
    with replacing(args.page) as path:
        path.write_text(page.page(study, training, made, records), encoding="utf-8")
    return args.page


def main(argv: Sequence[str] | None = None) -> None:
    run = start(argv)
    for n, draw in enumerate(FIGURES, 1):
        if draw is figure_keys and "trained keys" not in run.one.locks:
            run.bar.write("figure 3 needs --trained, or --images to train it")
        elif draw is figure_two and not run.pair:
            run.bar.write("figure 6 shows two concepts: give --second")
        else:
            path = run.args.out / f"{n}_{draw.__name__.removeprefix('figure_')}.png"
            save(path, *draw(run))
            run.bar.write(str(path))
    path = write_page(run)
    run.bar.close()
    files = [word for source in run.args.sources for word in ("--concept", source.files["locked"])]
    prompt = (run.pair or run.one).prompt
    print(f"{path}: open it in a browser\ndraw with it:\n  "
          + command_line.command(run.args, "sample.py", prompt, *files))


if __name__ == "__main__":
    with command_line.plain_errors(memory="a smaller model, or --device cpu, needs less"):
        main()
