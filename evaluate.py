"""Measure concepts: how much the pictures look like the concept, and how well they follow the prompt.

    python evaluate.py --concept teddy.safetensors --images examples/teddy --beta 0.4:0.9:0.05
    python evaluate.py --concept out/teddy/steps/*.safetensors --beta 0.6,0.7 --keep-best out/teddy

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
from collections.abc import Sequence
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
from support.files import read_lines, replacing
from support.intervals import mean_and_interval, written
from support.plots import pareto

# "objects" and "live" are DreamBench's prompts: Ruiz et al., arXiv 2208.12242.
PROMPTS = {name: command_line.ROOT / f"support/prompts/{name}.txt" for name in ("tiny", "objects", "live")}
PUBLIC_CLIP = "openai/clip-vit-large-patch14"
BATCH = 8          # pictures drawn at once


# ------------------------------------------------------------------------------------------ the two numbers

def image_similarity(generated: Tensor, training: Tensor) -> Tensor:
    """Unit vectors (..., d) and (m, d) -> mean cosine with the training pictures (...)."""
    return generated @ training.mean(0)


def text_similarity(generated: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (p, seeds, d) and one text per prompt (p, d) -> cosines (p, seeds)."""
    return (generated * texts[:, None]).sum(-1)


def measure(drawn: Tensor, training: Tensor, texts: Tensor) -> dict[str, float]:
    """Both similarities of a row's pictures and their intervals, and the harmonic mean of the two.

    Pictures of one seed share their start noise, so the intervals are over seeds.
    """
    image, image_half = mean_and_interval(image_similarity(drawn, training).mean(0).tolist())
    text, text_half = mean_and_interval(text_similarity(drawn, texts).mean(0).tolist())
    return {"image_similarity": image, "image_interval": image_half,
            "text_similarity": text, "text_interval": text_half,
            "harmonic_mean": 2 * image * text / (image + text) if image > 0 and text > 0 else 0.0}


# --------------------------------------------------------------------------------------------- what goes in

def read_prompts(name: str) -> list[str]:
    """A built-in set, or a file with one prompt a line in which {} stands for the concept."""
    prompts = [unquoted(line) for line in read_lines(PROMPTS.get(name, name))]
    if not prompts or not all(prompt.count("{}") == 1 for prompt in prompts):
        raise ValueError(f"{name}: every prompt needs {{}} once, where the concept's word belongs")
    return prompts


def training_files(concept: Concept, given: str | None) -> tuple[str, list[Path]]:
    """A folder and its pictures: the one given, else the one that a concept was trained on.

    ValueError if that is gone or holds other pictures now; a warning if the one given holds others.
    """
    folder = given or str(concept.metadata.get("folder", ""))
    if not given and not (folder and Path(folder).exists()):
        raise ValueError(f"the training pictures of {concept.token} are not at {folder or 'a known place'}: "
                         "name their folder with --images")
    files, _ = pictures.list_images(Path(folder))
    if concept.metadata.get("pictures") not in (None, pictures.digest(files)):
        sentence = f"{folder} does not hold the pictures that {concept.token} was trained on"
        if not given:
            raise ValueError(f"{sentence}: name those to compare with by --images")
        warnings.warn(sentence, stacklevel=2)
    return folder, files


def load_clip(source: str | None, model: weights_loader.Model) -> tuple[clip_image.CLIP, Tokenizer, str]:
    """A CLIP, its tokenizer and its name, from a folder or the hub; without a text tower, the model's."""
    own = model.folder and Path(model.folder) / "clip"
    source = source or (str(own) if own and own.is_dir() else PUBLIC_CLIP)
    need = {"config": ["config.json"], "weights": ["model.safetensors", "pytorch_model.bin"]}
    folder = weights_loader.locate(source, need)["config"][0].parent
    clip, tokenizer = clip_image.load(folder, model.text_encoder), model.tokenizer
    if clip.text_model is model.text_encoder:
        clip.text_model = copy.deepcopy(clip.text_model).float()
    else:
        vocabulary = weights_loader.find_vocabulary(source)
        tokenizer = Tokenizer.load(vocabulary, clip.text_model.config.max_length)
    name = f"{model.name}'s own" if own and folder == own else source
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


def write_csv(results: list[dict], path: Path) -> None:
    """All rows so far, whole or not at all."""
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, results[0].keys())
        writer.writeheader()
        writer.writerows(results)


def write_figure(results: list[dict], path: Path) -> None:
    """Image similarity over text similarity: a curve over beta for each concept, a cross without any."""
    curves = {row["concept"]: ([], []) for row in results}
    for row in results:
        points, marks = curves[row["concept"]]
        points.append((row["text_similarity"], row["image_similarity"],
                       row["text_interval"], row["image_interval"]))
        marks += [f"{row['beta']:g}"] if row["beta"] != "" else []
    with replacing(path) as partial:
        pareto(curves, "text similarity", "image similarity", "Concepts over beta (at the points)",
               caption(results[0])).savefig(partial, format="png", dpi=150)


def announce(token: str, row: Row, result: dict, args: argparse.Namespace) -> None:
    """Say which row of a concept is the best, and how to draw with its file; --keep-best copies that."""
    path = row.file
    if args.keep_best:
        args.keep_best.mkdir(parents=True, exist_ok=True)
        path = args.keep_best / f"{token.strip('<>')}.safetensors"
        content = Path(row.file).read_bytes()
        with replacing(path) as partial:
            partial.write_bytes(content)
    gate = () if row.beta is None else ("--beta", row.beta, "--tau", args.tau, "--lock", args.lock)
    line = command_line.command(args, "sample.py", f"a {token} on the beach", "--concept", path, *gate)
    print(f"{token}: {' '.join(map(str, (row.name, *gate[:2])))} has the best harmonic mean, "
          f"{result['harmonic_mean']:.4f}\n  {line}")


# ----------------------------------------------------------------------------------------------- the script

def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--concept", metavar="FILE", nargs="+", required=True, help="concept files; each becomes a curve")
    add("--images", metavar="DIR", nargs="+",
        help="training pictures, a folder or one file: one for all or one for each (default: as files say)")
    command_line.add_model(parser)
    add("--beta", type=numbers, default="0.4:0.9:0.05", help="START:STOP:STEP or a list with commas")
    add("--tau", type=between(1e-6, 100, float), default=perfusion.DRAWING_TAU,
        help="gate temperature above 0")
    add("--lock", choices=("local", "global"), default="local", help="key lock in drawing")
    add("--prompts", metavar="SET",
        help="tiny, objects, live, or a file with {} in each line (default: tiny, for other models objects)")
    add("--seeds", type=between(1, 10_000), default=4, help="pictures for each prompt and beta")
    add("--steps", type=between(1, 999), default=30, help="DDIM steps, 1 to 999")
    add("--guidance", type=between(-1000, 1000, float),
        help="weight of the prompt, 1 for no guidance (default: what suits the model)")
    add("--clip", metavar="DIR", help=f"folder or hub id (default: the model's own, else {PUBLIC_CLIP})")
    add("--out", type=Path, default=Path("evaluation"), help="folder of the results")
    add("--keep-best", type=Path, metavar="DIR",
        help="copy the best file of each concept to DIR/NAME.safetensors")
    args = parser.parse_args(argv)
    args.prompts = args.prompts or ("tiny" if args.weights == "tiny" else "objects")
    if args.images and len(args.images) not in (1, len(args.concept)):
        parser.error(f"--images takes one folder or one for each of the {len(args.concept)} concept files")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    prompts = read_prompts(args.prompts)
    concepts = [Concept.load(path) for path in args.concept]
    given = args.images or [None]
    given = given * (len(concepts) // len(given))
    sources = [training_files(concept, folder) for concept, folder in zip(concepts, given)]
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
            write_csv(results, args.out / "results.csv")
    print(table(results))
    for token in dict.fromkeys(concept.token for concept in concepts):
        own = [(row, result) for row, result in zip(rows, results) if row.word == token]
        announce(token, *max(own, key=lambda pair: pair[1]["harmonic_mean"]), args)
    write_figure(results, args.out / "pareto.png")
    print(f"written: {args.out}/results.csv, {args.out}/pareto.png")


if __name__ == "__main__":
    with command_line.plain_errors(memory="fewer --seeds, which are drawn together, or --device cpu"):
        main()
