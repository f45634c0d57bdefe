"""Measure concepts: how much the pictures look like the concept, and how well they follow the prompt.

    python evaluate.py --concept teddy.safetensors --images examples/teddy --beta 0.4:0.9:0.05
    python evaluate.py --concept out/teddy/steps/*.safetensors --beta 0.6,0.7

Image similarity is the mean cosine between the CLIP embeddings of generated and of training pictures; text
similarity the cosine between a generated picture and its prompt, with the concept's word replaced by its
super-category, as the paper does. One concept swept over beta draws a curve between the two. Every file and
every beta is drawn from the same seeds. Of the files of one concept, the best has the largest harmonic mean.
"""

import argparse
import copy
import csv
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import diffusion
import perfusion
import weights_loader
from clip_text import Tokenizer
from concept import Concept, prepare
from support import clip_image, command_line, pictures
from support.base_model import open_model
from support.command_line import between, numbers, unquoted
from support.files import read_lines, read_text, replacing
from support.intervals import mean_and_interval, written
from support.plots import pareto

# "objects" and "live" are DreamBench's prompts: Ruiz et al., arXiv 2208.12242.
PROMPTS = {name: command_line.ROOT / f"support/prompts/{name}.txt" for name in ("tiny", "objects", "live")}
PUBLIC_CLIP = "openai/clip-vit-large-patch14"
BATCH = 8          # pictures drawn at once


def measure(drawn: Tensor, training: Tensor, texts: Tensor) -> dict[str, float]:
    """The two numbers of a row with their intervals, and their harmonic mean.

    Unit vectors: of the pictures (p prompts, seeds, d), of the m training pictures (m, d), of the prompts
    (p, d). Pictures of one seed share their start noise, so the intervals are over seeds.
    """
    image = drawn @ training.mean(0)                # (p, seeds): the mean cosine with the training pictures
    text = (drawn * texts[:, None]).sum(-1)         # (p, seeds): each picture's cosine with its own prompt
    (image, image_half), (text, text_half) = (mean_and_interval(x.mean(0).tolist()) for x in (image, text))
    return {"image_similarity": image, "image_interval": image_half,
            "text_similarity": text, "text_interval": text_half,
            "harmonic_mean": 2 * image * text / (image + text) if image > 0 and text > 0 else 0.0}


# --------------------------------------------------------------------------------------------- what goes in

def read_prompts(name: str) -> list[str]:
    """A built-in set, or a file with one prompt a line in which {} stands for the concept."""
    path = PROMPTS.get(name, Path(name))
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip() and line.count("{}") != 1:
            raise ValueError(f"{path}, line {number}: a prompt needs {{}} once, where the concept's word "
                             "belongs")
    return [unquoted(line) for line in read_lines(path)]


def training_files(concept: Concept, given: str | None) -> tuple[str, list[Path]]:
    """A folder and its pictures: the one given, else the one that a concept was trained on.

    ValueError if it is gone, a warning if it holds other pictures than those of the training.
    """
    folder = given or str(concept.metadata.get("folder", ""))
    if not (folder and Path(folder).exists()):
        raise ValueError(f"the training pictures of {concept.token} are not at {folder or 'a known place'}: "
                         "name their folder with --images")
    files, _ = pictures.list_images(Path(folder))
    if concept.metadata.get("pictures") not in (None, pictures.digest(files)):
        warnings.warn(f"{folder} does not hold the pictures that {concept.token} was trained on")
    return folder, files


def load_clip(source: str | None, model: weights_loader.Model) -> tuple[clip_image.CLIP, Tokenizer, str]:
    """A CLIP, its tokenizer and its name, from a folder or the hub; without a text tower, the model's."""
    own = model.folder and model.folder / "clip"
    source = source or (str(own) if own and own.is_dir() else PUBLIC_CLIP)
    need = {"config": ["config.json"], "weights": ["model.safetensors", "pytorch_model.bin"]}
    folder = weights_loader.locate(source, need)["config"][0].parent
    text_encoder, tokenizer = copy.deepcopy(model.text_encoder).float(), model.tokenizer
    clip = clip_image.load(folder, text_encoder)
    if clip.text_model is not text_encoder:
        tokenizer = Tokenizer.load(weights_loader.find_vocabulary(source), clip.text_model.config.max_length)
    name = f"{model.name}'s own" if folder == own else source
    return clip.to(model.device), tokenizer, name


# -------------------------------------------------------------------------------------------------- the rows

class Row(NamedTuple):
    """What one row of the table is about; without a concept the base model draws the super-category."""
    name: str
    file: str
    word: str                       # in the place of {} in the prompts
    concepts: list[Concept]         # one or none
    super_category: str
    folder: str                     # of the training pictures
    beta: float | None              # None where nothing is edited


def plan(args: argparse.Namespace, concepts: list[Concept], folders: list[str]) -> list[Row]:
    """The rows: every file at every beta, and once for each super-category and folder the base model."""
    rows, stems = [], [Path(file).stem for file in args.concept]
    for file, stem, concept, folder in zip(args.concept, stems, concepts, folders):
        kind, name = concept.super_category, stem if stems.count(stem) == 1 else file
        base = Row(f"{kind} (no concept)", "", kind, [], kind, folder, None)
        if base not in rows:
            rows.append(base)
        for beta in args.beta if concept.edits else [None]:     # a textual inversion has no gate
            rows.append(Row(name, file, concept.token, [concept], kind, folder, beta))
    return rows


@torch.no_grad()
def draw(row: Row, prompts: list[str], model, clip: clip_image.CLIP, args: argparse.Namespace,
         bar: tqdm) -> Tensor:
    """Unit vectors (prompts, seeds, d) of a row's pictures, from seeds 0, 1, ..."""
    embedded = []
    for prompt in prompts:
        keys, values, _, _ = perfusion.condition(model, ["", prompt.replace("{}", row.word)], row.concepts,
                                                 row.beta, args.tau, args.lock)
        for seeds in torch.arange(args.seeds).split(BATCH):
            images = diffusion.draw(model, keys, values, seeds.tolist(), model.size, args.steps,
                                    args.guidance)
            embedded.append(clip.image_embedding(images.to(model.device)).cpu())
            bar.update(len(seeds))
    return torch.cat(embedded).view(len(prompts), args.seeds, -1)


# ------------------------------------------------------------------------------------------------ reporting

def table(results: list[dict]) -> str:
    """The rows as text, one line each, and what their numbers are."""
    line = "{:26} {:8} {:>5} {:>18} {:>18}  {:>8}".format
    lines = [line("concept", "keys", "beta", "image similarity", "text similarity", "harmonic")]
    for row in results:
        image = written(row["image_similarity"], row["image_interval"])
        text = written(row["text_similarity"], row["text_interval"])
        lines.append(line(row["concept"][:26], row["keys"], row["beta"], image, text,
                          f"{row['harmonic_mean']:.4f}"))
    return "\n".join([*lines, caption(results[0])])


def caption(row: dict) -> str:
    """What the numbers are; any row says it."""
    interval = "no intervals, too few seeds" if math.isnan(row["image_interval"]) else \
        "± is a 95 % interval over seeds"
    return (f"CLIP: {row['clip']}; {row['number_of_prompts']} prompts ({row['prompts']}), "
            f"{row['seeds']} seeds, {interval}")


def announce(rows: list[Row], results: list[dict], args: argparse.Namespace) -> None:
    """Say which row of each concept is the best, and how to draw with its file."""
    for token in dict.fromkeys(row.word for row in rows if row.concepts):
        own = [(row, result["harmonic_mean"]) for row, result in zip(rows, results) if row.word == token]
        best, mean = max(own, key=lambda pair: pair[1])
        gate = () if best.beta is None else ("--beta", best.beta, "--tau", args.tau, "--lock", args.lock)
        print(f"{token}: {' '.join(map(str, (best.name, *gate[:2])))} has the best harmonic mean, {mean:.4f}")
        words = f"a {token} on the beach", "--concept", best.file, *gate
        print("  " + command_line.command(args, "sample.py", *words))


# ----------------------------------------------------------------------------------------------- the script

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--concept", metavar="FILE", nargs="+", required=True, help="concept files; each becomes a curve")
    add("--images", metavar="DIR", help="training pictures, a folder or one file (default: as files say)")
    command_line.add_model(parser)
    add("--beta", type=numbers, default="0.4:0.9:0.05", help="START:STOP:STEP or a list with commas")
    add("--tau", type=between(1e-6, 100, float), default=perfusion.DRAWING_TAU, help="gate temperature")
    add("--lock", choices=("local", "global"), default="local", help="key lock in drawing")
    add("--prompts", metavar="SET",
        help="tiny, objects, live, or a file with {} in each line (default: tiny, for other models objects)")
    add("--seeds", type=between(1, 10_000), default=4, help="pictures for each prompt and beta")
    add("--steps", type=between(1, 999), default=30, help="DDIM steps, 1 to 999")
    add("--guidance", type=between(-1000, 1000, float),
        help="weight of the prompt, 1 for no guidance (default: what suits the model)")
    add("--clip", metavar="DIR", help=f"folder or hub id (default: the model's own, else {PUBLIC_CLIP})")
    add("--out", type=Path, default=Path("evaluation"), help="folder of the results")
    args = parser.parse_args(argv)
    args.prompts = args.prompts or ("tiny" if args.weights == "tiny" else "objects")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    prompts = read_prompts(args.prompts)
    concepts = [Concept.load(path) for path in args.concept]
    sources = [training_files(concept, args.images) for concept in concepts]
    args.out.mkdir(parents=True, exist_ok=True)

    model = open_model(args, concepts)
    args.guidance = model.guidance if args.guidance is None else args.guidance
    # One at a time: two files may hold the same name, trained with different keys or for fewer steps.
    concepts = [prepare([concept], model)[0] for concept in concepts]
    clip, tokenizer, clip_name = load_clip(args.clip, model)
    training = {}
    for folder, files in dict(sources).items():
        images, _ = pictures.read_images(files, clip.config.image_size)
        training[folder] = clip.image_embedding((images / 2 + 0.5).to(model.device)).cpu()

    rows, results = plan(args, concepts, [folder for folder, _ in sources]), []
    with tqdm(total=len(rows) * len(prompts) * args.seeds, unit="picture", desc="evaluating") as bar:
        for row in rows:
            drawn = draw(row, prompts, model, clip, args, bar)
            ids, _ = tokenizer.encode([prompt.replace("{}", row.super_category) for prompt in prompts])
            texts = clip.text_embedding(ids.to(model.device)).cpu()
            beta, tau, lock = ("", "", "") if row.beta is None else (row.beta, args.tau, args.lock)
            results.append({
                "concept": row.name, "keys": row.concepts[0].keys if row.concepts else "", "beta": beta,
                "tau": tau, "lock": lock, **measure(drawn, training[row.folder], texts), "clip": clip_name,
                "prompts": args.prompts, "number_of_prompts": len(prompts), "seeds": args.seeds})
            with replacing(args.out / "results.csv") as partial, \
                    open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, results[0])
                writer.writeheader()
                writer.writerows(results)
    print(table(results))
    announce(rows, results, args)
    with replacing(args.out / "pareto.png") as partial:
        pareto(results, caption(results[0])).savefig(partial, format="png", dpi=150)
    print(f"written: {args.out}/results.csv, {args.out}/pareto.png")


if __name__ == "__main__":
    command_line.run(main, memory="fewer --seeds, which are drawn together, or --device cpu")
