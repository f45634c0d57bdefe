# %% [markdown]
# # Why key locking works, in six figures
#
# A concept is an edit of the cross-attention's keys (*where* a word acts) and values (*what* it puts there).
# Each cell asks one question of one trained concept. Maps that are compared share one colour scale, and the
# number on a map is the share of the word's attention that falls inside the object. The base model itself
# finds the object: where its map of the super-category's word, over the noised picture, exceeds half its
# maximum.
#
# As a script: `python diagnostics.py --concept teddy.safetensors --trained teddy-trained.safetensors`
# As a notebook, with the flags in an environment variable:
# `jupytext --to notebook diagnostics.py`
# `DIAGNOSTICS="--concept teddy.safetensors" jupyter execute --inplace diagnostics.ipynb`

# %%
"""Six figures that show what a concept's edit does: gates, attention maps, sweeps."""
import argparse
import os
import shlex
import sys
from pathlib import Path

import matplotlib
import torch

import drawing
import perfusion
import weights_loader
from attention_maps import attention, record_queries, share_inside, word_map
from diffusion import seeded_noise

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of the backend)

BETA = {"local": 0.7, "global": 0.5}       # the middle of the paper's ranges
TAU = 0.15
SEGMENT_TIMES = (201, 401, 601)            # noise levels at which the base model looks for the object
MAP_TIMES = (1, 201, 401, 601, 801)        # rows of figure 4
BETAS = (0.5, 0.7, 0.9, 1.1, 1.3, 1.5)    # figure 5: until the gate of the word itself is shut
TAUS = (0.05, 0.1, 0.15, 0.2, 0.3)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--concept", metavar="FILE", required=True, help="concept with locked keys, of every figure")
    add("--trained", metavar="FILE", help="the same, trained with --lock trained (figures 2 and 3)")
    add("--inversion", metavar="FILE", help="the same, trained with --lock none (figure 2)")
    add("--second", metavar="FILE", help="another concept (figures 1 and 6)")
    add("--prompt", default="a photo of a {} wearing a hat on the beach", help="{} stands for the concept")
    add("--words", default="hat,beach", help="other words to map, with commas (default hat,beach)")
    add("--pair", default="a photo of a {} next to a {}", help="prompt of two concepts (figures 1 and 6)")
    add("--seed", type=int, default=0, help="seed of the first picture (default 0)")
    add("--steps", type=int, default=30, help="DDIM steps (default 30)")
    add("--guidance", type=float, help="weight of the prompt (default 7.5, for the small model 4)")
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id (default tiny)")
    add("--device", choices=("cpu", "cuda", "mps"), help="default the best one present")
    add("--out", type=Path, default=Path("figures"), help="folder of the PNGs (default figures)")
    args = parser.parse_args(argv)
    if args.prompt.count("{}") != 1 or args.pair.count("{}") != 2 or not 1 <= args.steps <= 999:
        parser.error("--prompt needs {} once, --pair twice, and --steps is 1 to 999")
    return args


def load(args):
    """The model and the concepts {option: Concept} of the files that were given."""
    device = drawing.pick_device(args.device)
    files = {name: getattr(args, name) for name in ("concept", "trained", "inversion", "second")}
    concepts = {name: perfusion.Concept.load(path) for name, path in files.items() if path}
    if "second" in concepts and concepts["second"].token == concepts["concept"].token:
        raise ValueError(f"--concept and --second are both called {concepts['second'].token}")
    args.out.mkdir(parents=True, exist_ok=True)
    model = weights_loader.load(args.weights, device, torch.float32 if device == "cpu" else torch.float16)
    concepts = {name: perfusion.prepare([concept], model)[0] for name, concept in concepts.items()}
    ordinary = args.prompt.replace("{}", concepts["concept"].words)
    for word in filter(None, args.words.split(",")):
        if not model.tokenizer.find(ordinary, word):
            raise ValueError(f'--words: the prompt "{ordinary}" has no word "{word}"')
    return model, concepts


try:
    args = arguments(shlex.split(os.environ.get("DIAGNOSTICS", "")) if IN_NOTEBOOK else None)
    model, concepts = load(args)
except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
concept = concepts["concept"]
SIZE = model.size
GUIDANCE = model.guidance if args.guidance is None else args.guidance
LATENT = tuple(side // model.vae.factor for side in SIZE)
WORDS = [word for word in args.words.split(",") if word]


# %% [markdown]
# ## Tools: a drawing with its maps, and three kinds of plot

# %%
def as_text(template, mine):
    """A prompt template with the concepts' tokens in it, and the same with their ordinary words."""
    return template.format(*[c.token for c in mine]), template.format(*[c.words for c in mine])


@torch.no_grad()
def projections(prompt, mine, beta, tau, lock):
    """Keys and values of ["", prompt] for the concepts `mine`; plain ones without concepts."""
    e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, ["", prompt], mine)
    n = len(mine)
    return perfusion.keys_and_values(model.unet, e, e_super, mine, [beta] * n, [tau] * n, lock)


def token_indices(ordinary, word):
    """Where a word stands in a prompt; the same places hold for the concept in its super-category's place."""
    return model.tokenizer.find(ordinary, word)[0]


def word_maps(queries, keys, indices):
    """Maps (words, h, w) at latent size of the last prompt of the batch, averaged over layers and heads."""
    maps = attention([q[-1:] for q in queries], [k[-1:] for k in keys], model.unet.config.attention_heads)
    return torch.cat([word_map(maps, tokens, LATENT) for tokens in indices]).cpu()


def draw_with_maps(keys, values, indices, seed):
    """A picture (3, H, W), its latents (1, c, h, w), and the words' maps (words, h, w), mean over steps."""
    maps = []
    with record_queries(model.unet) as queries:
        def keep(z):
            maps.append(word_maps(queries, keys, indices))
        latents = drawing.draw_latents(model.unet, model.schedule, keys, values, [seed], LATENT, args.steps,
                                       GUIDANCE, on_step=keep)
    return drawing.decode(model.vae, latents)[0], latents, torch.stack(maps).mean(0)


@torch.no_grad()
def queries_of_noised(latents, keys, values, t):
    """The queries of every layer over a picture noised to timestep t, under the last prompt of the batch."""
    noise = seeded_noise(args.seed, latents.shape[1:]).to(latents)
    z = model.schedule.add_noise(latents, noise, torch.tensor([t], device=latents.device))
    with record_queries(model.unet) as queries:
        model.unet(z.to(keys[0].dtype), t, [k[-1:] for k in keys], [v[-1:] for v in values])
    return queries


def maps_of_noised(latents, keys, values, indices, t, other_keys=None):
    """Maps (words, h, w) over a picture noised to timestep t, from its queries and its or other keys."""
    return word_maps(queries_of_noised(latents, keys, values, t), other_keys or keys, indices)


def object_mask(latents, ordinary, words):
    """Where the base model sees `words` in a picture: above the middle of the range of their map."""
    keys, values = projections(ordinary, [], 0, 1, "local")
    indices = [token_indices(ordinary, words)]
    where = torch.stack([maps_of_noised(latents, keys, values, indices, t)[0] for t in SEGMENT_TIMES]).mean(0)
    return (where > (where.max() + where.min()) / 2).float()


def shares(maps, mask):
    """Share of each map (..., h, w) inside the mask (h, w)."""
    return share_inside(maps.flatten(0, -3), mask[None]).view(maps.shape[:-2])


def finish(figure, name):
    figure.savefig(args.out / name, dpi=150)
    if IN_NOTEBOOK:
        pyplot.show()
    else:
        pyplot.close(figure)
        print(args.out / name)


def plot_maps(pictures, maps, inside, masks, rows, columns, title, name, scale="column"):
    """Pictures (R, 3, H, W) beside maps (R, C, h, w) with the shares `inside` (R, C) under them.

    masks (R, h, w) become outlines; pictures and masks may be None. scale: one per "column" or for "all".
    """
    R, C, first = len(maps), maps.shape[1], int(pictures is not None)
    figure, axes = pyplot.subplots(R, C + first, figsize=(1.9 * (C + first), 2.0 * R + 0.6), squeeze=False,
                                   layout="constrained")
    for r in range(R):
        if first:
            axes[r, 0].imshow(drawing.to_bytes(pictures[r]))
        for c in range(C):
            top = (maps[:, c] if scale == "column" else maps).max().item()
            axes[r, c + first].imshow(maps[r, c].numpy(), cmap="magma", vmin=0, vmax=top)
            if masks is not None:
                axes[r, c + first].contour(masks[r].numpy(), levels=[0.5], colors="white", linewidths=0.7)
            if inside is not None:
                axes[r, c + first].set_xlabel(f"{inside[r, c]:.0%} inside", fontsize=9)
        axes[r, 0].set_ylabel(rows[r], fontsize=9)
    for axis, column in zip(axes[0], ["picture"] * first + list(columns)):
        axis.set_title(column, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=10)
    finish(figure, name)


def plot_pictures(images, rows, columns, title, name):
    """Pictures (R, C, 3, H, W) as a labelled grid."""
    R, C = images.shape[:2]
    figure, axes = pyplot.subplots(R, C, figsize=(1.6 * C, 1.6 * R + 0.7), squeeze=False,
                                   layout="constrained")
    for r in range(R):
        for c in range(C):
            axes[r, c].imshow(drawing.to_bytes(images[r, c]))
            axes[r, c].set(xticks=[], yticks=[])
            if r == 0:
                axes[r, c].set_title(columns[c], fontsize=9)
        axes[r, 0].set_ylabel(rows[r], fontsize=9)
    figure.suptitle(title, fontsize=10)
    finish(figure, name)


# %% [markdown]
# ## 1. The gate: which words does the edit touch?
#
# `sigmoid((sim / energy - beta) / tau)` of every token. It should be open at the concept's word and closed
# elsewhere. No U-Net is needed for this.

# %%
@torch.no_grad()
def token_gates(template, mine):
    """Labels (T) and gates (T, concepts) of the tokens of a prompt, up to the end mark."""
    prompt, ordinary = as_text(template, mine)
    e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, [prompt], mine)
    _, sims = perfusion.split(e, torch.stack([c.i_star for c in mine]), torch.stack([c.d_star for c in mine]))
    gates = perfusion.gate(sims, BETA["local"], TAU)[0].cpu()
    labels = model.tokenizer.tokens(model.tokenizer.encode([ordinary])[0][0])
    end = labels.index("<|endoftext|>") + 1 if "<|endoftext|>" in labels else len(labels)
    return labels[:end], gates[:end]


def plot_gates(panels, name):
    """panels: list of (labels, gates (T, n), names of the n concepts)."""
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 2.4 * len(panels)), squeeze=False,
                                   layout="constrained")
    for axis, (labels, gates, names) in zip(axes[:, 0], panels):
        n = gates.shape[1]
        for j in range(n):
            places = [k + 0.8 * (j + 0.5) / n - 0.4 for k in range(len(labels))]
            axis.bar(places, gates[:, j].numpy(), 0.8 / n, label=names[j],
                     color=pyplot.get_cmap("viridis")(0.25 + 0.5 * j))
        axis.set_xticks(range(len(labels)), [label.strip("<|>") for label in labels], rotation=35, fontsize=9)
        axis.set(ylim=(0, 1), ylabel="gate")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"The gate of every token (beta {BETA['local']}, tau {TAU})", fontsize=10)
    finish(figure, name)


gate_panels = [(*token_gates(args.prompt, [concept]), [concept.token])]
if "second" in concepts:
    both = [concept, concepts["second"]]
    gate_panels.append((*token_gates(args.pair, both), [c.token for c in both]))
plot_gates(gate_panels, "1_gates.png")

# %% [markdown]
# ## 2. Where does the word act, under each lock?
#
# The same prompt and seed for every row. Locked keys should act where the super-category acts; trained keys
# spread over the picture, and the concept's looks with them. The object is outlined.

# %%
prompt, ordinary = as_text(args.prompt, [concept])
indices = [token_indices(ordinary, word) for word in (concept.words, *WORDS)]
variants = {"super-category": (ordinary, [], "local"), "locked keys": (prompt, [concept], "local"),
            "global lock": (prompt, [concept], "global")}
for option, label in (("trained", "trained keys"), ("inversion", "textual inversion")):
    if option in concepts:
        mine = [concepts[option]]
        variants[label] = (as_text(args.prompt, mine)[0], mine, "local")

drawn = {}
for label, (text, mine, lock) in variants.items():
    text_keys, text_values = projections(text, mine, BETA[lock], TAU, lock)
    drawn[label] = draw_with_maps(text_keys, text_values, indices, args.seed)
lock_maps = torch.stack([maps for _, _, maps in drawn.values()])
lock_masks = torch.stack([object_mask(latents, ordinary, concept.words) for _, latents, _ in drawn.values()])
lock_shares = torch.stack([shares(maps, mask) for maps, mask in zip(lock_maps, lock_masks)])
plot_maps([picture for picture, _, _ in drawn.values()], lock_maps, lock_shares, lock_masks, list(drawn),
          [f'"{word}"' for word in (concept.words, *WORDS)],
          f"Attention of {concept.token} and other words, mean over steps and heads", "2_locks.png")

# %% [markdown]
# ## 3. The pure effect of the key
#
# One set of queries (the locked concept's picture, noised), met by the locked and by the trained keys.
# Nothing else differs.

# %%
if "trained" in concepts:
    locked_keys, locked_values = projections(prompt, [concept], BETA["local"], TAU, "local")
    trained_prompt, trained, _ = variants["trained keys"]
    trained_keys, _ = projections(trained_prompt, trained, BETA["local"], TAU, "local")
    picture, latents, _ = drawn["locked keys"]
    mask = object_mask(latents, ordinary, concept.words)
    key_maps = torch.stack([
        torch.cat([maps_of_noised(latents, locked_keys, locked_values, indices[:1], t, keys)
                   for keys in (locked_keys, trained_keys)]) for t in SEGMENT_TIMES])
    plot_maps([picture] * len(key_maps), key_maps, shares(key_maps, mask), [mask] * len(key_maps),
              [f"t = {t}" for t in SEGMENT_TIMES], ["locked keys", "trained keys"],
              f"The same queries under two sets of keys: attention of {concept.token}", "3_keys.png", "all")
else:
    print("figure 3 needs --trained")

# %% [markdown]
# ## 4. Over timesteps and layers
#
# The map of the concept's word in every cross-attention layer (across) at several noise levels (down).

# %%
@torch.no_grad()
def layer_maps(latents, keys, values, tokens):
    """Maps (times, layers, h, w) of one word at MAP_TIMES."""
    rows = []
    for t in MAP_TIMES:
        queries = queries_of_noised(latents, keys, values, t)
        maps = attention(queries, [k[-1:] for k in keys], model.unet.config.attention_heads)
        rows.append(torch.cat([word_map([layer], tokens, LATENT) for layer in maps]).cpu())
    return torch.stack(rows)


picture, latents, _ = drawn["locked keys"]
over_layers = layer_maps(latents, *projections(prompt, [concept], BETA["local"], TAU, "local"), indices[0])
over_layers_inside = shares(over_layers, object_mask(latents, ordinary, concept.words))
plot_maps(None, over_layers, over_layers_inside, None, [f"t = {t}" for t in MAP_TIMES],
          model.unet.layer_names(), f"Attention of {concept.token} in every layer", "4_layers.png",
          "all")

# %% [markdown]
# ## 5. The knobs: beta and tau
#
# Both are chosen when a picture is drawn, without training. Lower beta: more of the concept; higher: more of
# the prompt. tau softens the gate.

# %%
def sweep(settings):
    """Pictures (3 seeds, settings, 3, H, W) for a list of (beta, tau)."""
    columns = []
    for beta, tau in settings:
        keys, values = projections(prompt, [concept], beta, tau, "local")
        columns.append(drawing.draw(model, keys, values, range(args.seed, args.seed + 3), SIZE, args.steps,
                                    GUIDANCE))
    return torch.stack(columns, dim=1)


seed_names = [f"seed {args.seed + k}" for k in range(3)]
plot_pictures(sweep([(beta, TAU) for beta in BETAS]), seed_names, [f"beta {beta}" for beta in BETAS],
              f"{prompt}, tau {TAU}", "5_beta.png")
plot_pictures(sweep([(BETA["local"], tau) for tau in TAUS]), seed_names, [f"tau {tau}" for tau in TAUS],
              f"{prompt}, beta {BETA['local']}", "5_tau.png")

# %% [markdown]
# ## 6. Two concepts, trained apart, in one prompt
#
# Each word's map should cover its own object.

# %%
if "second" in concepts:
    pair_prompt, pair_ordinary = as_text(args.pair, both)
    pair_indices = [token_indices(pair_ordinary, c.words) for c in both]
    if pair_indices[0] == pair_indices[1]:          # two of one kind: the second occurrence is the second's
        pair_indices[1] = model.tokenizer.find(pair_ordinary, both[1].words)[1]
    pair_keys, pair_values = projections(pair_prompt, both, BETA["local"], TAU, "local")
    pair_drawn = [draw_with_maps(pair_keys, pair_values, pair_indices, args.seed + k) for k in range(4)]
    pair_maps = torch.stack([maps for _, _, maps in pair_drawn])
    pair_masks = torch.stack([torch.stack([object_mask(latents, pair_ordinary, c.words) for c in both])
                              for _, latents, _ in pair_drawn])
    pair_shares = torch.stack([torch.stack([shares(m[j:j + 1], mask[j])[0] for j in range(2)])
                               for m, mask in zip(pair_maps, pair_masks)])
    plot_maps([picture for picture, _, _ in pair_drawn], pair_maps, pair_shares, None,
              [f"seed {args.seed + k}" for k in range(4)], [c.token for c in both], pair_prompt, "6_two.png")
else:
    print("figures 1 and 6 show two concepts with --second")
