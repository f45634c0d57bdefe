"""Measure concepts: how much the pictures look like the concept, and how well they follow the prompt.

    python evaluate.py --concept teddy.safetensors --images examples/teddy --beta 0.4:0.9:0.05

Image similarity is the mean cosine between the CLIP embeddings of generated and of training pictures; text
similarity the cosine between a generated picture and its prompt, with the concept's word replaced by its
super-category, as the paper does. One concept swept over beta draws a curve between the two. Every concept
and every beta is drawn from the same seeds; intervals are 95 % over seeds.
"""

import argparse
import copy
import csv
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

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
FIELDS = ("concept", "keys", "beta", "tau", "lock", "image_similarity", "image_interval", "text_similarity",
          "text_interval", "harmonic_mean", "clip", "prompts", "number_of_prompts", "seeds")


# ------------------------------------------------------------------------------------------ the two numbers

def image_similarity(generated, training):
    """Unit vectors (..., d) and (m, d) -> mean cosine with the training pictures (...)."""
    return generated @ training.mean(0)


def text_similarity(generated, texts):
    """Unit vectors (p, seeds, d) and one text per prompt (p, d) -> cosines (p, seeds)."""
    return (generated * texts[:, None]).sum(-1)


def mean_and_interval(similarity):
    """Values (prompts, seeds) -> their mean, and the half-width of its 95 % interval (nan for one seed).

    Pictures of one seed share their start noise, so the seeds are the independent units. The factor is
    Student's t quantile, from a table and above that from its expansion in 1 / degrees of freedom.
    """
    per_seed = similarity.mean(0)
    n = len(per_seed)
    if n == 1:
        return per_seed.mean().item(), math.nan
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    t = exact.get(n - 1, 1.960 + 2.372 / (n - 1) + 2.823 / (n - 1) ** 2)
    return per_seed.mean().item(), t * per_seed.std().item() / math.sqrt(n)


def harmonic_mean(a, b):
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


# --------------------------------------------------------------------------------------------- what goes in

def numbers(text):
    """'0.4:0.9:0.05' (both ends included) or '0.6,0.7' -> list of floats."""
    if ":" not in text:
        values = [float(part) for part in text.split(",")]
    else:
        start, stop, step = (float(part) for part in text.split(":"))
        if not (step > 0 and stop >= start and (stop - start) / step < 1000):
            raise argparse.ArgumentTypeError(f"{text} is not START:STOP:STEP with a positive step")
        values = [round(start + k * step, 6) for k in range(int((stop - start) / step + 1e-6) + 1)]
    if not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text} holds a number that is not finite")
    return values


def read_prompts(name):
    """A built-in set, or a file with one prompt a line in which {} stands for the concept."""
    if name in PROMPTS:
        return PROMPTS[name]
    lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
    prompts = tuple(line for line in lines if line)
    if not prompts or not all(prompt.count("{}") == 1 for prompt in prompts):
        raise ValueError(f"{name}: every prompt needs {{}} once, where the concept's word belongs")
    return prompts


def read_images(folder):
    """The pictures of a folder as a list of (1, 3, H, W) in [0, 1], turned by EXIF, alpha over white."""
    import torch
    from PIL import Image

    import pictures
    images = []
    for path in pictures.list_images(Path(folder))[0]:
        picture, _ = pictures.open_image(path)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        images.append(data.view(1, picture.height, picture.width, 3).movedim(-1, 1) / 255)
    return images


def load_clip(source, model, device):
    """A CLIP and its tokenizer, from a folder or the hub; one without a text tower shares the model's."""
    import clip_image
    from clip_text import TextConfig, TextEncoder, Tokenizer
    own = model.folder and Path(model.folder) / "clip"
    if source is None:
        source = str(own) if own and own.is_dir() else PUBLIC_CLIP
    folder = Path(source) if Path(source).is_dir() else download_clip(source)
    _, sizes = clip_image.read_config(folder)
    if sizes is None:
        text_encoder, tokenizer = copy.deepcopy(model.text_encoder).float(), model.tokenizer
    else:
        text_encoder = TextEncoder(TextConfig(**sizes))
        tokenizer = Tokenizer.load(folder, sizes["max_length"])
    name = f"{model.name}'s own" if own and folder == own else source
    return clip_image.load(folder, text_encoder).to(device), tokenizer, name


def download_clip(repo):
    """The files of a CLIP on the hub, in the hub's cache; returns their folder."""
    from huggingface_hub import errors, hf_hub_download
    names = ["config.json", "vocab.json", "merges.txt", "model.safetensors"]
    try:
        for name in names:
            try:
                path = hf_hub_download(repo, name)
            except errors.EntryNotFoundError:
                if name != "model.safetensors":
                    raise
                path = hf_hub_download(repo, "pytorch_model.bin")      # older public files
    except Exception as error:          # several libraries raise their own kinds below this call
        raise ValueError(f"{repo} is neither a folder here nor a CLIP that the hub can send "
                         f"({type(error).__name__})") from None
    return Path(path).parent


# ------------------------------------------------------------------------------------------------ measuring

@dataclass
class Study:
    """What every row of the table has in common."""
    model: object          # weights_loader.Model
    clip: object           # clip_image.CLIP
    tokenizer: object      # of the CLIP's text tower
    clip_name: str
    prompts: tuple
    args: argparse.Namespace
    bar: object            # tqdm over pictures


def draw_embeddings(study, concepts, word, beta):
    """Unit vectors (prompts, seeds, d) of the pictures of every prompt about `word`, from seeds 0, 1, ..."""
    import torch

    import drawing
    import perfusion
    model, args, n = study.model, study.args, len(concepts)
    size = model.size
    rows = []
    for prompt in study.prompts:
        with torch.no_grad():
            texts = ["", prompt.replace("{}", word)]
            e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, texts, concepts)
            keys, values = perfusion.keys_and_values(model.unet, e, e_super, concepts, [beta] * n,
                                                     [args.tau] * n, lock=args.lock)
        parts = []
        for first in range(0, args.seeds, BATCH):
            seeds = range(first, min(first + BATCH, args.seeds))
            images = drawing.draw(model, keys, values, seeds, size, args.steps, args.guidance)
            parts.append(study.clip.image_embedding(images.to(device_of(study.clip))).cpu())
            study.bar.update(len(seeds))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def device_of(network):
    return next(network.parameters()).device


def measure(study, name, concept, super_category, training, beta):
    """One row of the table, a dict of FIELDS; without a concept the base model draws the super-category."""
    args, word = study.args, concept.token if concept else super_category
    drawn = draw_embeddings(study, [concept] if concept else [], word, beta)
    ids, _ = study.tokenizer.encode([prompt.replace("{}", super_category) for prompt in study.prompts])
    texts = study.clip.text_embedding(ids.to(device_of(study.clip))).cpu()
    image, image_interval = mean_and_interval(image_similarity(drawn, training))
    text, text_interval = mean_and_interval(text_similarity(drawn, texts))
    edited = concept is not None and concept.lock != "none"
    return {"concept": name, "keys": concept.lock if concept else "", "beta": beta if edited else "",
            "tau": args.tau if edited else "", "lock": args.lock if edited else "", "image_similarity": image,
            "image_interval": image_interval, "text_similarity": text, "text_interval": text_interval,
            "harmonic_mean": harmonic_mean(image, text), "clip": study.clip_name, "prompts": args.prompts,
            "number_of_prompts": len(study.prompts), "seeds": args.seeds}


def measure_all(study, concepts, trainings):
    """Rows for every concept and beta, and for each super-category without one; yielded when done.

    A textual inversion has no gate, so that it is measured once.
    """
    done, paths = set(), [Path(path) for path in study.args.concept]
    stems = [path.stem for path in paths]
    for path, concept, training in zip(paths, concepts, trainings):
        kind, name = concept.super_category, path.stem if stems.count(path.stem) == 1 else str(path)
        if (kind, id(training)) not in done:
            done.add((kind, id(training)))
            yield measure(study, f"{kind} (no concept)", None, kind, training, None)
        for beta in study.args.beta if concept.lock != "none" else study.args.beta[:1]:
            yield measure(study, name, concept, kind, training, beta)


# ------------------------------------------------------------------------------------------------ reporting

def table(rows):
    """The rows as text, one line each."""
    columns = f"{'beta':>5} {'image similarity':>18} {'text similarity':>18}  harmonic"
    lines = [f"{'concept':26} {'keys':8} {columns}"]
    for row in rows:
        both = " ".join(f"{row[f'{kind}_similarity']:9.4f} ± {row[f'{kind}_interval']:.4f}"
                        for kind in ("image", "text"))
        start = f"{row['concept'][:26]:26} {row['keys']:8} {row['beta']:>5}"
        lines.append(f"{start} {both}  {row['harmonic_mean']:8.4f}")
    return "\n".join(lines)


def proposals(rows):
    """For each concept that was swept the sentence that names its beta of the best harmonic mean."""
    for name in dict.fromkeys(row["concept"] for row in rows if row["beta"] != ""):
        best = max((row for row in rows if row["concept"] == name), key=lambda row: row["harmonic_mean"])
        yield (f"{name}: beta {best['beta']} has the best harmonic mean, {best['harmonic_mean']:.4f} "
               f"(image {best['image_similarity']:.4f} ± {best['image_interval']:.4f}, text "
               f"{best['text_similarity']:.4f} ± {best['text_interval']:.4f})")


def caption(rows):
    row = rows[0]
    return (f"CLIP: {row['clip']}; {row['number_of_prompts']} prompts ({row['prompts']}), "
            f"{row['seeds']} seeds, ± is a 95 % interval over seeds")


def write_csv(rows, path):
    """All rows so far, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def pareto_figure(rows, path):
    """Image similarity over text similarity: a curve over beta for each concept, a cross without any."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 5.5), layout="constrained")
    names = list(dict.fromkeys(row["concept"] for row in rows))
    colors = pyplot.get_cmap("viridis")([k / max(len(names) - 1, 1) * 0.85 for k in range(len(names))])
    for name, color in zip(names, colors):
        mine = [row for row in rows if row["concept"] == name]
        x, x_error, y, y_error = ([row[key] for row in mine] for key in (
            "text_similarity", "text_interval", "image_similarity", "image_interval"))
        swept = mine[0]["beta"] != ""
        axes.errorbar(x, y, y_error, x_error, color=color, label=name, linewidth=1.5, elinewidth=0.6,
                      marker="o" if swept else "X", markersize=5 if swept else 9)
        for row in mine if swept else []:
            axes.annotate(f"{row['beta']:g}", (row["text_similarity"], row["image_similarity"]), fontsize=7,
                          xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="text similarity", ylabel="image similarity", title="Concepts over beta (at the points)")
    axes.legend(fontsize=8)
    figure.supxlabel(caption(rows), fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------- the script

def training_folders(concepts):
    """Where the training pictures of each concept lay, as its file tells; ValueError if they are gone."""
    folders = [concept.metadata.get("folder", "") for concept in concepts]
    for concept, folder in zip(concepts, folders):
        if not folder or not Path(folder).exists():
            raise ValueError(f"the training pictures of {concept.token} are not at "
                             f"{folder or 'a known place'}: name their folder with --images")
    return folders


def arguments(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--concept", metavar="FILE", nargs="+", required=True, help="concept files; each becomes a curve")
    add("--images", metavar="DIR", nargs="+",
        help="folder of training pictures: one for all files or one for each (default what each file names)")
    add("--beta", type=numbers, default=numbers("0.4:0.9:0.05"),
        help="START:STOP:STEP or a list with commas (default 0.4:0.9:0.05)")
    add("--tau", type=float, default=0.15, help="gate temperature above 0 (default 0.15)")
    add("--lock", choices=("local", "global"), default="local", help="key lock in drawing (default local)")
    add("--prompts", default=None, metavar="SET",
        help="tiny, objects, live, or a file with {} in each line (default tiny, for other models objects)")
    add("--seeds", type=int, default=4, help="pictures for each prompt and beta (default 4)")
    add("--steps", type=int, default=30, help="DDIM steps, 1 to 999 (default 30)")
    add("--guidance", type=float, help="weight of the prompt (default 7.5, for the small model 4)")
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id (default tiny)")
    add("--clip", metavar="CLIP", help=f"folder or hub id (default the model's own, else {PUBLIC_CLIP})")
    add("--device", choices=("cpu", "cuda", "mps"), help="default the best present; fp32 on a CPU, else fp16")
    add("--out", type=Path, default=Path("evaluation"), help="folder of the results (default evaluation)")
    args = parser.parse_args(argv)
    args.prompts = args.prompts or ("tiny" if args.weights == "tiny" else "objects")
    if args.seeds < 1 or not 1 <= args.steps <= 999 or not 0 < args.tau < math.inf:
        parser.error("--seeds must be at least 1, --steps 1 to 999, --tau above 0")
    if args.images and len(args.images) not in (1, len(args.concept)):
        parser.error(f"--images takes one folder or one for each of the {len(args.concept)} concept files")
    return args


def run(args):
    import torch
    from tqdm import tqdm

    import drawing
    import perfusion
    import weights_loader

    device = drawing.pick_device(args.device)
    prompts = read_prompts(args.prompts)
    concepts = [perfusion.Concept.load(path) for path in args.concept]
    folders = [str(folder) for folder in args.images or training_folders(concepts)]
    pictures = {folder: read_images(folder) for folder in folders}
    args.out.mkdir(parents=True, exist_ok=True)

    model = weights_loader.load(args.weights, device=device,
                                dtype=torch.float32 if device == "cpu" else torch.float16)
    if args.guidance is None:
        args.guidance = model.guidance
    # One at a time: two files may hold the same name, trained with different keys.
    concepts = [perfusion.prepare([concept], model)[0] for concept in concepts]
    clip, tokenizer, clip_name = load_clip(args.clip, model, device)
    embedded = {folder: torch.cat([clip.image_embedding(image.to(device)).cpu() for image in images])
                for folder, images in pictures.items()}
    trainings = [embedded[folder] for folder in folders]
    trainings = trainings * len(concepts) if len(trainings) == 1 else trainings

    kinds = {(concept.super_category, id(training)) for concept, training in zip(concepts, trainings)}
    n_rows = len(kinds) + sum(len(args.beta) if concept.lock != "none" else 1 for concept in concepts)
    rows = []
    with tqdm(total=n_rows * len(prompts) * args.seeds, unit="picture", desc="evaluating") as bar:
        study = Study(model, clip, tokenizer, clip_name, prompts, args, bar)
        for row in measure_all(study, concepts, trainings):
            rows.append(row)
            write_csv(rows, args.out / "results.csv")
    pareto_figure(rows, args.out / "pareto.png")
    print(table(rows), caption(rows), *proposals(rows), sep="\n")
    print(f"written: {args.out}/results.csv, {args.out}/pareto.png")


def main(argv=None):
    args = arguments(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
