"""Write a concept for other tools: a LoRA file of rank one and an embedding file.

    python export.py --concept out/teddy/teddy.safetensors --weights sd15 --out exported

Without its gate the edit is a change of rank one of every key and value matrix,

    W' = W + (o_star - W i_star) d_star^T / (d_star . i_star)

and that is what a LoRA is. Programs for Stable Diffusion read `teddy_lora.safetensors`; its strength takes
the place of beta. `teddy_word.safetensors` is the concept's word, one embedding per token, as in textual
inversion. README says what to type. A concept that was learned by textual inversion has only the second file.

Several concepts become two files each. Give them in one run if they will be used together: then all the LoRAs
together are the edit with all the concepts.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

import weights_loader
from concept import Concept, prepare
from support import command_line
from support.files import write


@torch.no_grad()
def lora(unet, concepts: list[Concept]) -> list[dict[str, Tensor]]:
    """The ungated edit with prepared concepts: for each, the tensors of a LoRA of rank one.

    Together they are eq. 3 with gates = ratio: W' = W + sum_j (o_star_j / energy_j - W b_j) d_star_j^T, where
    b_j is row j of (I D^T)^-1 I: i_star / energy for one concept. ValueError if float16 is too narrow.
    """
    I, D = (torch.stack([getattr(c, name) for c in concepts]) for name in ("i_star", "d_star"))
    D = D / D.abs().amax(1, keepdim=True)  # as in the concept's file, so float16 loses nothing of it
    energy = I @ D.T
    b = torch.linalg.solve(energy, I)
    paths = {module: path for path, module in unet.named_modules()}
    loras = [{} for _ in concepts]
    for side, kind, projected in (("o_keys", "to_k", unet.keys(b)), ("o_values", "to_v", unet.values(b))):
        for layer, module in enumerate(unet.cross_attentions):
            name = f"lora_unet_{paths[module]}.{kind}".replace(".", "_")
            for j, concept in enumerate(concepts):
                up = (getattr(concept, side)[layer] / energy[j, j] - projected[layer][j]).half()
                if not up.isfinite().all():
                    raise ValueError(f"{concept.token}: {name} does not fit float16")
                loras[j] |= {f"{name}.lora_down.weight": D[j, None].half().clone(),
                             f"{name}.lora_up.weight": up[:, None],
                             f"{name}.alpha": torch.tensor(1.0)}    # divided by the rank, it scales the edit
    return loras


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--concept", type=Path, nargs="+", action="extend", required=True, metavar="FILE",
        help="concept files made by train.py")
    add("--weights", default="tiny", metavar="MODEL", help="their base, as in train.py")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt (default: the model's own)")
    add("--out", type=Path, default=Path("exported"), help="folder of the new files")
    args = parser.parse_args(argv)
    concepts = [Concept.load(path) for path in args.concept]
    names = [concept.token.strip("<>") for concept in concepts]
    words = [args.out / f"{name}_word.safetensors" for name in names]
    loras = [args.out / f"{name}_lora.safetensors" for name, concept in zip(names, concepts) if concept.edits]
    for file in words + loras:
        if file.exists():
            raise ValueError(f"{file} exists already: delete it, or choose another --out")
    model = weights_loader.load(args.weights, tokenizer=args.tokenizer)
    concepts = prepare(concepts, model)
    edited = [concept for concept in concepts if concept.edits]
    contents = [{"emb_params": concept.embedding.half()} for concept in concepts]
    contents += lora(model.unet, edited) if edited else []
    args.out.mkdir(parents=True, exist_ok=True)
    for file, tensors in zip(words + loras, contents, strict=True):
        write(file, save(tensors))
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    command_line.run(main, memory="close other programs")
