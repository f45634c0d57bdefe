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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import diffusion
import perfusion
import weights_loader
from clip_text import TextConfig, TextEncoder, Tokenizer
from concept import Concept, prepare
from support import clip_image, command_line, fast_cpu, pictures
from support.command_line import between, numbers, unquoted
from support.files import read_lines, replacing
from support.intervals import mean_and_interval, written
from support.plots import pareto

# DreamBench's prompts (Ruiz et al. 2023, arXiv 2208.12242): the first ten serve objects and live subjects.
PLACES = ("a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street",
          "a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background",
          "a {} with a mountain in the background", "a {} with a blue house in the background",
          "a {} on top of a purple rug in a forest")
CHANGES = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
OBJECTS = PLACES + (
    "a {} with a wheat field in the background", "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background", "a {} floating on top of water",
    "a {} floating in an ocean of milk", "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror", "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road", "a {} on top of a white rug") + CHANGES
LIVE = PLACES + (
    "a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit",
    "a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit") + CHANGES
TINY = ("a photo of a {} on the beach", "a photo of a {} on the grass", "a photo of a {} in the snow",
        "a photo of a {} at night", "a photo of a {} in a room", "a photo of a {} on a blue background",
        "a photo of a {} wearing a hat on the beach", "a photo of a {} wearing sunglasses in a room",
        "a photo of a {} holding a balloon on the grass", "a photo of a {} wearing a scarf in the snow",
        "a photo of a {} next to a ball on the grass", "a photo of a {} next to a mug at night")
PROMPTS = {"tiny": TINY, "objects": OBJECTS, "live": LIVE}
PUBLIC_CLIP = "openai/clip-vit-large-patch14"
BATCH = 8          # pictures drawn at once


# ------------------------------------------------------------------------------------------ the two numbers

def image_similarity(generated: Tensor, training: Tensor) -> Tensor:
    """Unit vectors (..., d) and (m, d) -> mean cosine with the training pictures (...)."""
    return generated @ training.mean(0)


def text_similarity(generated: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (p, seeds, d) and one text per prompt (p, d) -> cosines (p, seeds)."""
    return (generated * texts[:, None]).sum(-1)


def harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


# --------------------------------------------------------------------------------------------- what goes in

def read_prompts(name: str) -> tuple[str, ...]:
    """A built-in set, or a file with one prompt a line in which {} stands for the concept."""
    if name in PROMPTS:
        return PROMPTS[name]
    prompts = tuple(unquoted(line) for line in read_lines(name))
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
    need = {"config": [["config.json"]], "weights": [["model.safetensors"], ["pytorch_model.bin"]]}
    folder = weights_loader.locate(source, need)["config"][0].parent
    _, sizes = clip_image.read_config(folder)
    if sizes is None:
        text_encoder, tokenizer = copy.deepcopy(model.text_encoder).float(), model.tokenizer
    else:
        text_encoder = TextEncoder(TextConfig(**sizes))
        tokenizer = Tokenizer.load(weights_loader.find_vocabulary(source), sizes["max_length"])
    name = f"{model.name}'s own" if own and folder == own else source
    return clip_image.load(folder, text_encoder).to(model.device), tokenizer, name


# ------------------------------------------------------------------------------------------------ measuring

class Row(NamedTuple):
    """What one row of the table measures; without a concept the base model draws the super-category."""
    name: str
    file: str
    concept: Concept | None
    super_category: str
    folder: str
    beta: float | None


def plan(args: argparse.Namespace, concepts: list[Concept], folders: list[str]) -> list[Row]:
    """The rows: every file at every beta, and once for each super-category and folder the base model."""
    rows, stems = [], [Path(file).stem for file in args.concept]
    for file, stem, concept, folder in zip(args.concept, stems, concepts, folders):
        kind = concept.super_category
        base = Row(f"{kind} (no concept)", "", None, kind, folder, None)
        if base not in rows:
            rows.append(base)
        betas = args.beta if concept.edits else [None]     # a textual inversion has no gate
        name = stem if stems.count(stem) == 1 else file
        rows += [Row(name, file, concept, kind, folder, beta) for beta in betas]
    return rows


@dataclass
class Study:
    """What all rows have in common. training: folder -> unit vectors (m, d) of its pictures."""
    model: weights_loader.Model
    clip: clip_image.CLIP
    tokenizer: Tokenizer       # of the CLIP's text tower
    clip_name: str
    prompts: tuple[str, ...]
    training: dict[str, Tensor]
    args: argparse.Namespace
    bar: tqdm                  # over pictures

    @torch.no_grad()
    def draw(self, row: Row) -> Tensor:
        """Unit vectors (prompts, seeds, d) of a row's pictures, from seeds 0, 1, ..."""
        model, args, concepts = self.model, self.args, [row.concept] if row.concept else []
        word, embedded = row.concept.token if row.concept else row.super_category, []
        for prompt in self.prompts:
            keys, values, _, _ = perfusion.condition(model, ["", prompt.replace("{}", word)], concepts,
                                                   row.beta or 0, args.tau, args.lock)
            for seeds in torch.arange(args.seeds).split(BATCH):
                images = diffusion.draw(model, keys, values, seeds.tolist(), model.size, args.steps,
                                        args.guidance)
                embedded.append(self.clip.image_embedding(images.to(model.device)).cpu())
                self.bar.update(len(seeds))
        return torch.cat(embedded).view(len(self.prompts), args.seeds, -1)

    def measure(self, row: Row) -> dict[str, object]:
        """A line of the results. Pictures of one seed share their start noise: intervals are over seeds."""
        args, drawn, edited = self.args, self.draw(row), row.beta is not None
        ids, _ = self.tokenizer.encode([prompt.replace("{}", row.super_category) for prompt in self.prompts])
        texts = self.clip.text_embedding(ids.to(self.model.device)).cpu()
        (image, image_interval), (text, text_interval) = (
            mean_and_interval(similarity.mean(0).tolist()) for similarity in (
                image_similarity(drawn, self.training[row.folder]), text_similarity(drawn, texts)))
        return {"concept": row.name, "keys": row.concept.keys if row.concept else "",
                "beta": row.beta if edited else "", "tau": args.tau if edited else "",
                "lock": args.lock if edited else "", "image_similarity": image,
                "image_interval": image_interval, "text_similarity": text, "text_interval": text_interval,
                "harmonic_mean": harmonic_mean(image, text), "clip": self.clip_name, "prompts": args.prompts,
                "number_of_prompts": len(self.prompts), "seeds": args.seeds}


# ------------------------------------------------------------------------------------------------ reporting

def table(results: list[dict]) -> str:
    """The rows as text, one line each, and what their numbers are."""
    columns = f"{'beta':>5} {'image similarity':>18} {'text similarity':>18}  harmonic"
    lines = [f"{'concept':26} {'keys':8} {columns}"]
    for row in results:
        both = " ".join(f"{written(row[f'{kind}_similarity'], row[f'{kind}_interval']):>18}"
                        for kind in ("image", "text"))
        start = f"{row['concept'][:26]:26} {row['keys']:8} {row['beta']:>5}"
        lines.append(f"{start} {both}  {row['harmonic_mean']:8.4f}")
    return "\n".join([*lines, caption(results)])


def caption(results: list[dict]) -> str:
    row = results[0]
    interval = "no intervals, too few seeds" if math.isnan(row["image_interval"]) else \
        "± is a 95 % interval over seeds"
    return (f"CLIP: {row['clip']}; {row['number_of_prompts']} prompts ({row['prompts']}), "
            f"{row['seeds']} seeds, {interval}")


def best(rows: list[Row], results: list[dict]) -> dict[str, tuple[Row, dict]]:
    """Token of each concept -> the row with the largest harmonic mean, and its result."""
    ranked = sorted(zip(rows, results), key=lambda pair: pair[1]["harmonic_mean"], reverse=True)
    return {row.concept.token: (row, result) for row, result in reversed(ranked) if row.concept}


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
               caption(results)).savefig(partial, format="png", dpi=150)


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
    add("--clip", help=f"folder or hub id (default: the model's own, else {PUBLIC_CLIP})")
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
    device = command_line.pick_device(args.device)
    prompts = read_prompts(args.prompts)
    concepts = [Concept.load(path) for path in args.concept]
    given = args.images or [None]
    given = given * (len(concepts) // len(given))
    sources = [training_files(concept, folder) for concept, folder in zip(concepts, given)]
    prediction = command_line.prediction(args.prediction, concepts)
    args.out.mkdir(parents=True, exist_ok=True)

    model = weights_loader.load(args.weights, device, torch.float32 if device == "cpu" else torch.float16,
                                args.tokenizer, prediction=prediction)
    fast_cpu.enable(model)
    if args.guidance is None:
        args.guidance = model.guidance
    # One at a time: two files may hold the same name, trained with different keys or for fewer steps.
    concepts = [prepare([concept], model)[0] for concept in concepts]
    clip, tokenizer, clip_name = load_clip(args.clip, model)
    side = clip.config.image_size
    training = {}
    for folder, files in dict(sources).items():
        images, _ = pictures.read_images(files, side)
        training[folder] = clip.image_embedding((images / 2 + 0.5).to(device)).cpu()

    rows, results = plan(args, concepts, [folder for folder, _ in sources]), []
    with tqdm(total=len(rows) * len(prompts) * args.seeds, unit="picture", desc="evaluating") as bar:
        study = Study(model, clip, tokenizer, clip_name, prompts, training, args, bar)
        for row in rows:
            results.append(study.measure(row))
            write_csv(results, args.out / "results.csv")
    print(table(results))
    for token, (row, result) in best(rows, results).items():
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
    write_figure(results, args.out / "pareto.png")
    print(f"written: {args.out}/results.csv, {args.out}/pareto.png")


if __name__ == "__main__":
    with command_line.plain_errors(memory="fewer --seeds, which are drawn together, or --device cpu"):
        main()
