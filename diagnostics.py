"""Why key locking works: train what is missing, draw figures, and write a page that explains it.

    python diagnostics.py --images examples/teddy --super "teddy bear"
    python diagnostics.py --images examples/teddy --super "teddy bear" \\
        --second examples/cat --second-super cat --page docs/index.html
    python diagnostics.py --concept teddy.safetensors teddy-trained.safetensors

The output folder receives the figures (PNG), the page (index.html), and in trained/ the concepts, which the
next run uses again. Figure 3 needs trained keys too, figure 5 a second concept; the page is then about both.
The second command makes what is committed: figures/1_gates.png and on, and docs/index.html.

Each figure makes one claim. Maps that are compared share one colour scale. A number under a map is the share
of a word's attention that lies on its own object, which is outlined. The base model finds the object in the
finished picture: where its attention to the ordinary words is above the middle of its range. So the judge is
the same for every lock, but it is attention too. diagnostics.ipynb tells the story with the same functions.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import diffusion
from attention_maps import share_inside
from concept import KEYS, Concept, prepare
from perfusion import DRAWING_BETA, DRAWING_TAU
from support import command_line
from support.base_model import open_model
from support.files import read_json, write
from support.page import BETAS, page
from support.pictures import digest, list_images, read_image
from support.plots import VIRIDIS, Figure, grid_figure, label, png
from support.study import Drawn, Study, check_room

ROOT = Path(__file__).parent
SEEDS = {True: 4, False: 2}         # by whether the model is small


class Source:
    """Where a concept comes from: finished files, and pictures with ordinary words to train the others.

    files: {keys in training: file}. token: its name in prompts. ValueError when it cannot be drawn.
    """

    def __init__(self, files: list[Path], pictures: Path | None = None, words: str | None = None):
        self.pictures, self.words = pictures, words
        self.files = {Concept.load(path).keys: path for path in files}
        names = ", ".join(str(path) for path in files)
        if len(self.files) < len(files):
            raise ValueError(f"two of these files were trained with the same --keys: {names}")
        if not pictures and "locked" not in self.files:
            raise ValueError(f"{names}: a file with locked keys is needed too, or --images to train one")
        self.token = f"<{command_line.concept_name(None, pictures)}>" if pictures else ""
        if "locked" in self.files:
            self.token = Concept.load(self.files["locked"]).token


def arguments(argv: list[str] | None):
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="pictures of the concept, for what is not given as a file")
    add("--super", dest="super_category", metavar="WORDS", help='what it is, in ordinary words: "teddy bear"')
    add("--second", type=Path, metavar="DIR|FILE", help="pictures of a second concept, or its file")
    add("--second-super", metavar="WORDS", help="what the second one is, in ordinary words")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="output folder")
    add("--page", type=Path, metavar="FILE", help="the page (default: index.html in --out)")
    add("--prompt", type=command_line.unquoted, default="a photo of a {} wearing a hat on the beach",
        help="{} stands for the concept")
    add("--words", default="hat,beach", metavar="W,W", help="other words in figure 2")
    add("--pair", type=command_line.unquoted, default="a photo of a {} next to a {} on the grass",
        metavar="PROMPT", help="prompt of two concepts")
    add("--seed", type=command_line.between(0, 2 ** 62), default=0, help="seed of the first picture")
    add("--steps", type=command_line.between(1, 999), default=20, help="denoising steps, 1 to 999")
    add("--training-steps", type=command_line.between(1, 10 ** 6), metavar="N",
        help="of train.py (default: what suits the model)")
    add("--concept", "--trained", "--inversion", type=Path, nargs="+", action="extend", default=[],
        metavar="FILE", help="finished files of the concept, of different --keys, instead of training")
    command_line.add_model(parser)
    args = parser.parse_args(argv)
    args.words = [word.strip() for word in args.words.split(",") if word.strip()]
    args.page = args.page or args.out / "index.html"
    if args.prompt.count("{}") != 1 or args.pair.count("{}") != 2:
        parser.error("--prompt needs {} once, --pair twice")
    if bool(args.images) != bool(args.super_category) or not (args.images or args.concept):
        parser.error("give --images with --super, or a finished --concept")
    if args.second and (args.second.suffix == ".safetensors") == bool(args.second_super):
        parser.error("--second is a folder of pictures, with --second-super, or a finished file without it")
    args.sources = [Source(args.concept, args.images, args.super_category)]
    if args.second:
        given = ([], args.second) if args.second_super else ([args.second], None)
        args.sources.append(Source(*given, args.second_super))
    if len({source.token for source in args.sources}) < len(args.sources):
        parser.error(f"both concepts are called {args.sources[0].token}: rename a folder, or train one again "
                     "with another --token")
    return args


# ------------------------------------------------------------------------ what is given, and what is trained

def missing_trainings(args, model) -> list[tuple[Source, str]]:
    """What is to be trained: (source, keys). Afterwards a source with pictures has the files of all keys.

    A file that is there is used again only for the same pictures, words, weights and length.
    """
    missing = []
    for source in [source for source in args.sources if source.pictures]:
        differs = f"{source.words}|{model.fingerprint}|{args.training_steps}|{model.schedule.prediction_type}"
        differs = digest([*list_images(source.pictures)[0], differs.encode()])
        for keys in [keys for keys in KEYS if keys not in source.files]:
            folder = args.out / "trained" / f"{source.pictures.resolve().stem}-{keys}-{differs}"
            source.files[keys] = file = folder / f"{source.token.strip('<>')}.safetensors"
            if not file.is_file() or Concept.load(file).metadata.get("steps") != args.training_steps:
                missing.append((source, keys))
    return missing


def train(args, source: Source, keys: str) -> None:
    """Run train.py; a training that was stopped goes on. Its bar and its errors are shown."""
    command = [sys.executable, ROOT / "train.py", "--images", source.pictures, "--super", source.words,
               "--keys", keys, "--steps", str(args.training_steps), "--preview", "0", "--resume",
               "--token", source.token, "--out", source.files[keys].parent, "--weights", args.weights]
    for option in ("tokenizer", "prediction", "device"):
        command += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code < 0:
        raise ValueError(f"train.py was ended by signal {-code}, perhaps for want of memory: the same "
                         "command goes on from its last checkpoint")
    if code:        # it has said why
        sys.exit(code)


def read_concepts(model, source: Source) -> dict[str, Concept]:
    """{keys: Concept} of a source, under one name, ready for the model; ValueError if they are not alike."""
    concepts = {keys: Concept.load(path) for keys, path in source.files.items()}
    for keys, concept in concepts.items():
        concept.token = source.token
        concepts[keys], = prepare([concept], model)
    if len({concept.words for concept in concepts.values()}) > 1:
        raise ValueError(f"the files of {source.token} are not of one super-category")
    if len({concept.metadata.get("pictures") for concept in concepts.values()} - {None}) > 1:
        warnings.warn(f"the files of {source.token} were trained on different pictures")
    return concepts


def start(argv: list[str] | None = None) -> tuple:
    """Read the command line, train what is missing, load. ValueError and OSError for what is wrong.

    Returns the options, the study of one concept, that of two or None, and a bar of pictures.
    """
    args = arguments(argv)
    for folder in (args.out, args.page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    given = [Concept.load(file) for source in args.sources for file in source.files.values()]
    model = open_model(args, given)
    args.training_steps = args.training_steps or model.training_steps
    if any("prediction" in concept.metadata for concept in given):
        args.prediction = model.schedule.prediction_type        # for what is trained beside them
    if args.super_category:
        check_room(model, args.prompt.replace("{}", args.super_category), [args.super_category])
    if missing := missing_trainings(args, model):
        del model                   # two at once would take twice the memory
        for n, (source, keys) in enumerate(missing, 1):
            print(f"training {n} of {len(missing)}: {source.words}, --keys {keys}", flush=True)
            train(args, source, keys)
        model = open_model(args, given)
    concepts = [read_concepts(model, source) for source in args.sources]
    bar = tqdm(unit="picture", desc="drawing", delay=1)
    seeds = range(args.seed, args.seed + SEEDS[model.small])
    common = args.steps, seeds, bar.update
    one = Study(model, args.prompt, concepts[:1], *common)
    pair = Study(model, args.pair, concepts, *common) if args.second else None
    for word in args.words:
        one.rows(word)
    return args, one, pair, bar


# ----------------------------------------------------------------------------------------------- the figures

def figure_gates(studies: list[Study]) -> Figure:
    """1. The gate: open at a concept's own word and shut elsewhere."""
    figure = Figure(figsize=(8, 2.3 * len(studies) + 0.4), layout="constrained")
    for axis, study in zip(figure.subplots(len(studies), 1, squeeze=False)[:, 0], studies):
        pieces = [label(piece) for word in study.words if word.label != "padding" for piece in word.pieces]
        gates, width = study.condition("locked keys").gates[1, :len(pieces)], 0.8 / len(study.tokens)
        for j, (token, heights) in enumerate(zip(study.tokens, gates.T.tolist())):
            places = [t + width * (j + 0.5) - 0.4 for t in range(len(pieces))]
            axis.bar(places, heights, width, label=label(token), color=VIRIDIS(0.25 + 0.5 * j))
        axis.set_xticks(range(len(pieces)), pieces, rotation=35, fontsize=9)
        axis.set(ylim=(0, 1), ylabel="gate")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("How far the gate is open at every token, "
                    f"beta {DRAWING_BETA['local']}, tau {DRAWING_TAU}", fontsize=10)
    return figure


def maps_figure(title: str, columns: list, rows: dict, one_scale: bool = False) -> Figure:
    """Pictures beside maps, with the outlines of their objects, and the shares of the maps on them.

    columns: what is above the pictures, then above each column of maps; rows {label: (picture, maps, masks)},
    a map (h, w) for each column, a mask for the first ones. A scale for each column, or one for all.
    """
    cells, objects = [], {}
    for r, (picture, maps, masks) in enumerate(rows.values()):
        cells.append([picture, *maps])
        for c, (where, mask) in enumerate(zip(maps, masks), 1):
            share = share_inside(where[None], mask[None]).item()
            objects[r, c] = mask, f"{share:.0%} on its object"
    tops = [max(where.max().item() for where in column) for column in list(zip(*cells))[1:]]
    tops = [max(tops)] * len(tops) if one_scale else tops
    heads = [columns[0], *(f"{column}\n0 to {top:.0%}" for column, top in zip(columns[1:], tops))]
    return grid_figure(cells, list(rows), heads, title, [1, *tops], objects)


def words_figure(study: Study, drawn: dict[str, Drawn], words: list[str], title: str) -> Figure:
    """Drawings {row: Drawn}, and the maps of words, the concepts' first: means over steps, layers, heads."""
    rows = {}
    for row, drawing in drawn.items():
        maps = [study.map_of(word, drawing.maps[0]).mean(0) for word in words]
        rows[row] = drawing.picture, maps, drawing.masks
    return maps_figure(f"{title}\n{study.prompt}", ["picture", *words], rows)


def figure_locks(study: Study, words: list[str]) -> Figure:
    """2. Where the word acts under each lock. A locked one where the ordinary words act: on the object."""
    drawn = {name: study.drawn(name, study.seeds[0]) for name in study.locks}
    return words_figure(study, drawn, [*study.tokens, *words], "Where words act under each lock")


def figure_keys(study: Study) -> Figure:
    """3. The pure effect of the key: the queries of one drawing meet locked keys and trained keys."""
    word, seed, rows = study.tokens[0], study.seeds[0], {}
    locked, trained = (study.drawn("locked keys", seed, *keys) for keys in ((), ("trained keys",)))
    maps = [study.map_of(word, drawn.maps[0]) for drawn in (locked, trained)]
    for k in torch.linspace(0, study.steps - 1, min(4, study.steps)).round().int().tolist():
        seen, = diffusion.decode(study.model.vae, locked.seen[[k]].to(study.model.device))
        time = diffusion.ddim_timesteps(study.steps)[k]
        rows[f"t = {time}"] = seen, [steps[k] for steps in maps], locked.masks[[0, 0]]
    return maps_figure(f"The same queries under two keys:\nattention to {word}",
                       ["what the U-Net saw", "locked keys", "trained keys"], rows, one_scale=True)


def figure_beta(study: Study) -> Figure:
    """4. The knob: beta is where a gate is half open. Lower: more of the concept; higher: of the prompt."""
    place = study.named[0].tokens[-1]
    gates = [study.condition("locked keys", beta).gates[1, place, 0] for beta in BETAS]
    heads = [f"beta {beta:g}\ngate {gate:.0%}" for beta, gate in zip(BETAS, gates)]
    pictures = zip(*(study.moved(beta=beta) for beta in BETAS))
    return grid_figure(list(pictures), [f"seed {seed}" for seed in study.seeds], heads,
                       f"Beta: from more of the concept to more of the prompt\n{study.prompt}")


def figure_two(study: Study) -> Figure:
    """5. Two concepts, trained apart, in one prompt: each word should act on its own object."""
    drawn = {f"seed {seed}": study.drawn("locked keys", seed) for seed in study.seeds}
    return words_figure(study, drawn, study.tokens, "Where the words of two concepts act")


# ------------------------------------------------------------------------------------------------- the page

def write_page(args, study: Study) -> None:
    """Write the page of a study."""
    model = study.model
    objects = " and ".join(f'"{words}"' for words in study.names)
    made = (f"Model {model.name} ({model.fingerprint}), seeds {study.seeds[0]} to {study.seeds[-1]}, "
            f"{args.steps} DDIM steps, guidance {model.guidance:g}; beta {DRAWING_BETA['local']}, with the "
            f"global lock {DRAWING_BETA['global']}; tau {DRAWING_TAU}. The base model finds the objects: "
            f"where its attention to {objects}, over the finished picture with noise added, is above the "
            "middle of its range. So the judge is the same for every lock, but it is attention too.")
    training = []
    for source in args.sources:
        files = list_images(source.pictures)[0][:10] if source.pictures else []
        training.append([read_image(file, model.size[0])[0] / 2 + 0.5 for file in files])
    records = read_json(ROOT / "tiny" / "records.json", dict)
    write(args.page, page(study, training, made, records))


def main(argv: list[str] | None = None) -> None:
    args, one, pair, bar = start(argv)

    def save(name: str, figure: Figure) -> None:
        write(args.out / f"{name}.png", png(figure))
        bar.write(str(args.out / f"{name}.png"))
    save("1_gates", figure_gates([one, pair] if pair else [one]))
    save("2_locks", figure_locks(one, args.words))
    if "trained keys" in one.locks:
        save("3_keys", figure_keys(one))
    save("4_beta", figure_beta(one))
    if pair:
        save("5_two", figure_two(pair))
    write_page(args, pair or one)
    bar.close()
    files = [word for source in args.sources for word in ("--concept", source.files["locked"])]
    print(f"{args.page}: open it in a browser\ndraw with it:\n  "
          + command_line.command(args, "sample.py", (pair or one).prompt, *files))


if __name__ == "__main__":
    command_line.run(main, memory="a smaller model, or --device cpu, needs less")
