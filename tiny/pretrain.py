"""Train the embedded model from nothing: tokenizer, VAE, text encoder with U-Net, small CLIP.

    python tiny/pretrain.py --device cuda       # what made tiny/weights: 13 minutes of an H200, 14 GB of it

Without a GPU it takes days.
Stages, in order: tokenizer, vae, latents, text2image, clip. All is drawn by `world.py` while it trains.
A stage that was interrupted goes on from its last checkpoint in --workdir; a finished one is read from there.
The weights are written to --out in the layout of the published Stable Diffusion folders, in float16.
"""
import copy
import json
import math
import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library files lie one folder up
import clip_text
import covariance
import weights_loader
import world
from attention_maps import attention, record_queries
from clip_text import TextEncoder, Tokenizer
from diffusion import Schedule
from judge import TEMPERATURE, to_images
from support import clip_image, command_line
from support.files import replacing
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

MAX_LENGTH = 48  # tokens; more than the world's longest caption has
VOCABULARY = 600
VAE_CONFIG = VAEConfig(latent_channels=16, block_out_channels=(16, 32, 64, 64), layers_per_block=1,
                       norm_num_groups=8, scaling_factor=1.0)
UNET_CONFIG = UNetConfig(in_channels=16, out_channels=16, block_out_channels=(40, 80, 128),
                         layers_per_block=1, cross_attention_dim=128, attention_heads=2, norm_num_groups=8,
                         cross_attention=(True, True, False), sample_size=16)
TEXT_CONFIG = clip_text.TextConfig(width=128, layers=4, heads=4, intermediate=512, max_length=MAX_LENGTH)
CLIP_CONFIG = clip_image.ImageConfig(image_size=64, patch_size=8, width=128, layers=4, heads=4,
                                     intermediate=512, projection=64, text_width=128)
KL_WEIGHT = 1e-3  # per latent number; keeps some posterior noise, so that the decoder forgives small errors
CAPTIONS_PER_PICTURE = 4
# Big models' words act where their objects are; so small a one puts a caption into the padding if it is let.
ATTENTION_WEIGHT = 0.1  # of `attention_loss`
ATTENTION_FLOOR = 0.8   # share of an object's attention that its noun should have
DRAWS = 3  # noise draws that share one caption and latent: saves text encoding
EMPTY_PROMPT = 0.1  # share of captions that are dropped, for classifier-free guidance
EMA = 0.998
CHECKPOINT_EVERY = 250  # steps
FIRST = {"vae": 10**8, "text2image": 0, "clip": 2 * 10**8, "held out": 10**9}  # numbers of their pictures


@dataclass
class Plan:
    """How much of each stage; the defaults are the embedded model's."""
    vae_steps: int = 2000
    vae_batch: int = 64
    vae_lr: float = 5e-3
    pictures: int = 160_000
    steps: int = 3500
    batch: int = 1023
    lr: float = 3e-3
    clip_steps: int = 1000
    clip_batch: int = 64
    clip_lr: float = 2e-3
    covariance_captions: int = 10_000


class Optimizer:
    """Muon for the hidden weight matrices (convolutions flattened), AdamW for everything else.

    Muon (Keller Jordan, 2024): the momentum of each matrix is replaced by the nearest orthogonal one, found
    by five Newton-Schulz steps. The factor 0.2 sqrt(max(rows, columns)) gives its updates AdamW's size, so
    that both share one learning rate (Liu et al., arXiv 2502.16982). torch's own Muon takes these steps in
    bfloat16 only, eleven times slower on a processor that has no such products, and takes no convolutions.
    """

    def __init__(self, networks: list, betas=(0.95, 0.99), weight_decay=0.01):
        self.beta, self.weight_decay = betas[0], weight_decay
        named = [(name, p) for network in networks for name, p in network.named_parameters()
                 if p.requires_grad]
        edge = ("conv_in", "conv_out", "embedding.weight", "quant_conv", "class_embedding")
        matrices = [p for name, p in named if p.ndim >= 2 and not any(word in name for word in edge)]
        shapes = dict.fromkeys(p.flatten(1).shape for p in matrices)
        self.groups = [[p for p in matrices if p.flatten(1).shape == shape] for shape in shapes]
        chosen = {id(p) for p in matrices}
        self.momenta = [torch.stack([torch.zeros_like(p).flatten(1) for p in group]) for group in self.groups]
        self.adamw = torch.optim.AdamW([p for _, p in named if id(p) not in chosen], betas=(0.9, betas[1]),
                                       weight_decay=0.0)
        self.parameters = [p for _, p in named]

    @torch.no_grad()
    def step(self, lr: float, clip: float = 1.0):
        """Clip the norm of the gradients and move every parameter once."""
        nn.utils.clip_grad_norm_(self.parameters, clip)
        for group, momenta in zip(self.groups, self.momenta):
            gradients = torch.stack([p.grad.flatten(1) for p in group])
            momenta.lerp_(gradients, 1 - self.beta)
            updates = orthogonal(gradients.lerp(momenta, self.beta))
            for p, update in zip(group, updates * (0.2 * max(updates.shape[1:]) ** 0.5)):
                p.mul_(1 - lr * self.weight_decay).sub_(update.view_as(p), alpha=lr)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict:
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict):
        self.momenta = state["momenta"]
        self.adamw.load_state_dict(state["adamw"])


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrices nearest to x (n, rows, columns), roughly: singular values of 0.7 to 1.2."""
    wide = x.mT if x.shape[1] > x.shape[2] else x
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.mT if x.shape[1] > x.shape[2] else wide


def learning_rate(step: int, steps: int, peak: float, hold: float = 0.5) -> float:
    """Linear warm-up over 100 steps, constant until `hold` of the training, then linear to 2 %."""
    decay = min(1.0, (1 - step / steps) / (1 - hold))
    return peak * min(1.0, (step + 1) / 100) * max(decay, 0.02)


class Training:
    """What one stage keeps: networks, their moving average, optimizer, step; its checkpoint and its log."""

    def __init__(self, name: str, networks: list, run: Path, device: str):
        self.name, self.networks = name, [network.to(device) for network in networks]
        self.optimizer = Optimizer(networks)
        self.averages = [copy.deepcopy(network).eval().requires_grad_(False) for network in networks]
        self.step = 0
        self.file, self.log = run / f"{name}.pt", run / f"{name}.jsonl"
        if self.file.exists():
            state = torch.load(self.file, map_location=device)
            for module, weights in zip(networks + self.averages, state["networks"] + state["averages"]):
                module.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        torch.manual_seed(1000 * self.step)

    @torch.no_grad()
    def update(self, lr: float):
        """One optimizer step and one step of the moving average."""
        self.optimizer.step(lr)
        self.step += 1
        decay = min(EMA, (1 + self.step) / (20 + self.step))
        for network, average in zip(self.networks, self.averages):
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)

    def checkpoint_due(self, steps: int) -> bool:
        """True now and then, and at the end."""
        return self.step % CHECKPOINT_EVERY == 0 or self.step >= steps

    def save(self, row: dict):
        """Write the checkpoint and one line of the log."""
        state = {"networks": [network.state_dict() for network in self.networks],
                 "averages": [average.state_dict() for average in self.averages],
                 "optimizer": self.optimizer.state_dict(), "step": self.step}
        with replacing(self.file) as path:
            torch.save(state, path)
        row = {"step": self.step} | row
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(self.name, " ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def train_tokenizer(run: Path) -> Tokenizer:
    """Byte-pair encoding of the captions, with CLIP's conventions; every letter and digit stays encodable."""
    folder = run / "tokenizer"
    if not (folder / "merges.txt").exists():
        rng = random.Random(0)
        captions = [world.describe(world.random_spec(rng), rng) for _ in range(4000)]
        letters = [" ".join("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-*<>")]
        bpe = clip_text.in_pieces(models.BPE(end_of_word_suffix=clip_text.WORD_END, unk_token=clip_text.END))
        bpe.train_from_iterator(captions + letters, trainers.BpeTrainer(
            vocab_size=VOCABULARY, show_progress=False, end_of_word_suffix=clip_text.WORD_END,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        folder.mkdir(parents=True, exist_ok=True)
        bpe.model.save(str(folder))
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        vocabulary |= {token: len(vocabulary) + k for k, token in enumerate((clip_text.START, clip_text.END))}
        with replacing(folder / "vocab.json") as path:
            path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return Tokenizer.load(folder, MAX_LENGTH)


class Pictures(torch.utils.data.Dataset):
    """The world's pictures, each drawn from its number, as a tuple of tensors: image (3, S, S) in [0, 1]; ids
    (captions, T) of several captions; per caption the index of every region's noun (captions, regions), -1
    where it names none; regions (regions, 16, 16), coverages."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __getitem__(self, number: int) -> tuple:
        rng = random.Random(number)
        spec = world.random_spec(rng)
        image, masks = world.render(spec, masks=True)
        captions, nouns = [world.describe(spec, rng) for _ in range(CAPTIONS_PER_PICTURE)], world.nouns(spec)
        found = [[noun and self.tokenizer.find(caption, noun) for noun in nouns] for caption in captions]
        places = torch.tensor([[tokens[0][-1] if tokens else -1 for tokens in row] for row in found])
        regions = torch.from_numpy(np.stack([masks[name] for name in world.REGIONS]))
        return (to_images([image])[0], self.tokenizer.encode(captions)[0], places,
                F.adaptive_avg_pool2d(regions, UNET_CONFIG.sample_size))


def pictures(tokenizer: Tokenizer, stage: str, steps: range, batch: int, device: str) -> DataLoader:
    """A batch of Pictures for each of these steps of a stage. With a GPU, the other cores draw them."""
    numbers = range(FIRST[stage] + steps.start * batch, FIRST[stage] + steps.stop * batch)
    return DataLoader(Pictures(tokenizer), batch, sampler=numbers,
                      num_workers=0 if device == "cpu" else max(1, os.cpu_count() - 1))


def train_vae(run: Path, plan: Plan, device: str, tokenizer: Tokenizer) -> VAE:
    """L1 + squared error + a little KL. The scaling factor then gives the latents unit variance."""
    torch.manual_seed(0)
    training = Training("vae", [VAE(VAE_CONFIG)], run, device)
    (network,), (average,), n = training.networks, training.averages, plan.vae_batch
    held_out = next(iter(pictures(tokenizer, "held out", range(1), n, device)))[0]
    held_out = held_out.to(device) * 2 - 1
    for images, *_ in pictures(tokenizer, "vae", range(training.step, plan.vae_steps), n, device):
        images = images.to(device) * 2 - 1
        mean, logvar = network.moments(images)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        decoded = network.decode(z)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + KL_WEIGHT * kl
        loss.backward()
        training.update(learning_rate(training.step, plan.vae_steps, plan.vae_lr))
        if training.checkpoint_due(plan.vae_steps):
            with torch.no_grad():
                decoded = average.decode(average.moments(held_out)[0]).clamp(-1, 1)
            psnr = -10 * ((decoded - held_out) / 2).square().mean((1, 2, 3)).log10()
            training.save({"seen": training.step * n, "loss": round(loss.item(), 4),
                           "psnr": round(psnr.mean().item(), 2)})
    with torch.no_grad():
        std = average.moments(held_out)[0].std().item()
    average.config = replace(VAE_CONFIG, scaling_factor=round(1 / std, 5))
    return average


@torch.no_grad()
def encode_pictures(run: Path, plan: Plan, device: str, vae: VAE, tokenizer: Tokenizer) -> list:
    """The training pictures, five tensors with a row per picture: latents' means and spreads (n, c, h, w),
    unscaled; then ids, places and regions as `Pictures` has them. Small types."""
    file = run / "latents.pt"
    if not file.exists():
        batches, steps = [], range(-(-plan.pictures // 16))
        for images, ids, places, regions in pictures(tokenizer, "text2image", steps, 16, device):
            mean, logvar = vae.moments(images.to(device) * 2 - 1)
            spread = torch.exp(0.5 * logvar)
            batches.append((mean.half().cpu(), spread.half().cpu(), ids.short(), places.short(),
                            regions.half()))
        with replacing(file) as path:
            torch.save([torch.cat(part) for part in zip(*batches)], path)
    return torch.load(file, map_location=device)


def attention_loss(attentions: list, places: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Every noun should have much of the attention where its object is, and none elsewhere.

    A cross entropy of the noun's share of a pixel's attention with its region, without a reward beyond
    ATTENTION_FLOOR: adjectives need a part too. attentions per layer (B, heads, HW, T), places (B, R): index
    of each region's noun, or -1; regions (B, R, h, w), coverages.
    """
    named, total = (places >= 0).float()[:, None], 0
    for layer in attentions:
        B, _, HW, _ = layer.shape
        share = layer.mean(1).gather(2, places.clamp(min=0)[:, None].expand(B, HW, -1))
        share = share.clamp(1e-6, 1 - 1e-6)                                         # (B, HW, R)
        covered = F.adaptive_avg_pool2d(regions, math.isqrt(HW)).flatten(2).mT      # (B, HW, R)
        missing, leaking = F.relu(math.log(ATTENTION_FLOOR) - share.log()), -torch.log1p(-share)
        total = total + (named * (covered * missing + (1 - covered) * leaking)).sum() / HW
    return total / named.sum().clamp(min=1) / len(attentions)


def train_text2image(run: Path, plan: Plan, device: str, vae: VAE, tokenizer: Tokenizer,
                     data: tuple) -> weights_loader.Model:
    """The U-Net and the text encoder together, with Stable Diffusion's noise schedule and loss, and
    `attention_loss`."""
    torch.manual_seed(1)
    config = replace(TEXT_CONFIG, vocab_size=len(tokenizer.vocabulary))
    training = Training("text2image", [UNet(UNET_CONFIG), TextEncoder(config)], run, device)
    unet, text_encoder = training.networks
    schedule, empty = Schedule.sd_v1("v_prediction"), tokenizer.encode([""])[0].to(device)
    model = weights_loader.Model(*training.averages, vae, tokenizer, schedule, "", "tiny", None)
    means, stds, ids, places, regions = data
    n, losses = plan.batch // DRAWS, []
    while training.step < plan.steps:
        chosen = torch.randint(len(means), (n,), device=device)
        which = torch.randint(CAPTIONS_PER_PICTURE, (n,), device=device)
        mean, std, region = (x[chosen].float() for x in (means, stds, regions))
        caption, place = (x[chosen, which].long() for x in (ids, places))
        dropped = torch.rand(n, 1, device=device) < EMPTY_PROMPT
        caption, place = torch.where(dropped, empty, caption), place.masked_fill(dropped, -1)
        e = text_encoder(text_encoder.embed(caption))
        keys, values, (mean, std, place, region) = (
            [x.repeat_interleave(DRAWS, 0) for x in several]
            for several in (unet.keys(e), unet.values(e), (mean, std, place, region)))
        z = (mean + std * torch.randn_like(mean)) * vae.config.scaling_factor
        noise = torch.randn_like(z)
        even = (torch.rand(1) + torch.randperm(plan.batch) / plan.batch) % 1  # spread evenly over the batch
        t = (even * 1000).long().clamp(max=999).to(device)
        with record_queries(unet) as queries:
            output = unet(schedule.add_noise(z, noise, t), t, keys, values)
        loss = F.mse_loss(output, schedule.target(z, noise, t))
        focus = attention_loss(attention(queries, keys, UNET_CONFIG.attention_heads), place, region)
        (loss + ATTENTION_WEIGHT * focus).backward()
        training.update(learning_rate(training.step, plan.steps, plan.lr))
        losses.append(torch.stack([loss.detach(), focus.detach()]))
        if training.checkpoint_due(plan.steps):
            mean_loss, mean_focus = torch.stack(losses).mean(0).tolist()
            training.save({"seen": training.step * plan.batch, "loss": round(mean_loss, 5),
                           "attention_loss": round(mean_focus, 4)})
            losses = []
    return model


def train_clip(run: Path, plan: Plan, device: str, text_encoder: TextEncoder,
               tokenizer: Tokenizer) -> clip_image.CLIP:
    """An image tower and two projections, fitted to the frozen text encoder by CLIP's contrastive loss."""
    torch.manual_seed(2)
    clip = clip_image.CLIP(CLIP_CONFIG, text_encoder.requires_grad_(False))
    training = Training("clip", [clip], run, device)
    n, losses = plan.clip_batch, []
    for batch in pictures(tokenizer, "clip", range(training.step, plan.clip_steps), n, device):
        logits = similarities(clip, batch) / TEMPERATURE
        pairs = torch.arange(n, device=device)
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        loss.backward()
        training.update(learning_rate(training.step, plan.clip_steps, plan.clip_lr))
        losses.append(loss.detach())
        if training.checkpoint_due(plan.clip_steps):
            training.save({"loss": round(torch.stack(losses).mean().item(), 4),
                           "retrieval": round(retrieval(training.averages[0], tokenizer, device), 3)})
            losses = []
    return training.averages[0]


def similarities(clip: clip_image.CLIP, batch: tuple) -> torch.Tensor:
    """Cosines (n, n) of n Pictures with their first captions."""
    images, ids = (x.to(clip.visual_projection.weight.device) for x in batch[:2])
    return clip.image_embedding(images) @ clip.text_embedding(ids[:, 0]).T


@torch.no_grad()
def retrieval(clip: clip_image.CLIP, tokenizer: Tokenizer, device: str, groups: int = 8,
              n: int = 64) -> float:
    """Share of held-out pictures whose own caption is the most similar of n."""
    best = torch.stack([similarities(clip, batch).argmax(1).cpu()
                        for batch in pictures(tokenizer, "held out", range(groups), n, device)])
    return (best == torch.arange(n)).float().mean().item()


def export(model: weights_loader.Model, out: Path, captions: int):
    """Write the weights as Stable Diffusion is published, and the covariance of the built-in captions."""
    for network in (model.unet, model.text_encoder, model.vae):
        network.cpu()
    weights_loader.save(model, out, torch.float16)
    model.tokenizer.save(out / "tokenizer")
    model = weights_loader.load(str(out))
    texts = covariance.built_in_captions(captions, model.tokenizer)
    C = covariance.covariance(model.text_encoder, model.tokenizer, texts)
    covariance.store(C, model)


def run(plan: Plan, folder: Path, out: Path, device: str):
    """All stages. folder: checkpoints and logs."""
    torch.set_float32_matmul_precision("high")      # on a GPU: TF32 products
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder)
    vae = train_vae(folder, plan, device, tokenizer)
    data = encode_pictures(folder, plan, device, vae, tokenizer)
    model = train_text2image(folder, plan, device, vae, tokenizer, data)
    export(model, out, plan.covariance_captions)
    clip = train_clip(folder, plan, device, model.text_encoder, tokenizer)
    clip_image.save(clip.cpu(), out / "clip")


def main(argv=None):
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/tiny"), help="checkpoints and logs")
    add("--out", type=Path, default=Path("tiny/weights"), help="folder of the finished weights")
    add("--steps", type=int, default=Plan.steps, help="steps of the U-Net and the text encoder")
    add("--batch", type=int, default=Plan.batch, help="views per step")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the networks are")
    args = parser.parse_args(argv)
    device = command_line.pick_device(args.device)
    run(Plan(steps=args.steps, batch=args.batch), args.workdir, args.out, device)


if __name__ == "__main__":
    command_line.run(main, memory="a smaller --batch needs less")
