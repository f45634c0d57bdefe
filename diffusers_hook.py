"""Draw personal concepts, gates and all, in a pipeline of the package diffusers.

    model = weights_loader.load(folder)                           # the pipeline's own weights
    concepts = prepare([Concept.load("teddy.safetensors")], model)
    with personal(pipeline, model, concepts, beta=0.7) as encode:
        picture = pipeline(**encode("a <teddy> on the beach")).images[0]

Every pipeline with the U-Net of Stable Diffusion v1 will do: text to image, image to image, inpainting,
ControlNet. This file does not import diffusers; it only relies on the published names of the U-Net's layers.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import perfusion
from concept import Concept

NEAR = 0.01  # share of its norm by which half precision may move an encoding; another prompt is farther away


class Edit:
    """What takes the place of layers in a pipeline's U-Net, and whether it did."""

    def __init__(self, model, concepts: list[Concept], beta, tau):
        self.model, self.concepts, self.beta, self.tau = model, concepts, beta, tau
        self.targets: dict[torch.nn.Module, Tensor | None] = {}     # layer -> o_star (n, width), as `replace`
        self.encoded: list[tuple[Tensor, Tensor]] = []              # every prompt's e and e_super
        self.ran, self.drawn = set(), False     # ran: layers in the present forward pass

    @torch.no_grad()
    def encode(self, prompt: str | list[str], negative: str | list[str] = "") -> dict[str, Tensor]:
        """Prompts as a pipeline takes them, with the concepts' embeddings: see `personal`."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negatives = [negative] * len(prompts) if isinstance(negative, str) else negative
        texts = [*prompts, *negatives]
        e, e_super, _ = perfusion.encode(self.model.text_encoder, self.model.tokenizer, texts, self.concepts)
        self.encoded.extend(zip(e, e_super))
        return {"prompt_embeds": e[:len(prompts)], "negative_prompt_embeds": e[len(prompts):]}

    def super_encodings(self, e: Tensor) -> Tensor | None:
        """e_super of encoded prompts e (B, T, d), in whatever order; None if one is not from `encode`."""
        if not self.encoded or e.shape[1:] != self.encoded[0][0].shape:
            return None
        known, e_super = (torch.stack(found).to(e.device) for found in zip(*self.encoded))
        x = e.flatten(1).float()
        distance, nearest = torch.cdist(x, known.flatten(1).float()).min(1)
        return e_super[nearest].to(e) if (distance <= NEAR * x.norm(dim=1)).all() else None

    def replace(self, layer, inputs, output) -> Tensor:
        """A forward hook of a layer: eq. 3 in the place of W e; without a target W e_super."""
        self.ran.add(layer)             # `layer.forward` calls no hooks: this does not call itself
        e, o = inputs[0], self.targets[layer]
        if o is not None:
            e_perp, gates = perfusion.split_and_gate(e, self.concepts, self.beta, self.tau)
            return perfusion.edit(lambda x: [layer.forward(x)], e_perp, gates, [o.to(gates)])[0]
        e_super = self.super_encodings(e)
        if e_super is None:
            raise ValueError("with the global lock the pipeline takes only prompts made by `encode`")
        return layer.forward(e_super)

    def check(self, unet, inputs, named, output) -> None:
        """A forward hook of the U-Net: an edit that does not act, or not on a prompt, is never silent."""
        if self.ran != set(self.targets):
            raise ValueError(f"the edit acted in {len(self.ran)} of {len(self.targets)} layers: the U-Net "
                             "was changed and does not call the others, as by fuse_qkv_projections()")
        self.ran, self.drawn = set(), True
        e = named["encoder_hidden_states"] if "encoder_hidden_states" in named else inputs[2]
        if self.super_encodings(e) is None:
            warnings.warn("the pipeline draws a prompt that is not from `encode`: the name of a concept "
                          "means nothing in it")


@contextlib.contextmanager
def personal(pipeline, model, concepts: list[Concept], beta=None, tau=perfusion.DRAWING_TAU,
             lock: str = "local") -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Edit the pipeline's keys and values for as long as the context lasts; afterwards it is as before.

    pipeline: or only its U-Net. model: its base, from `weights_loader.load`; here it encodes the text.
    concepts: from `prepare`. beta, tau: one number or one per concept; by default those for drawing
    with this lock, "local" or "global". ValueError for another lock, another kind of U-Net, and wherever the
    edit does not act; a warning for prompts that are not from `encode`. Inside, torch.compile is off.

    Yields encode(prompt, negative="") for strings or lists of B strings. It returns what takes their place in
    the pipeline's call: {"prompt_embeds": (B, T, d), "negative_prompt_embeds": (B, T, d)}.
    """
    if lock not in perfusion.DRAWING_BETA:
        raise ValueError(f'the lock is "local" or "global", not "{lock}"')
    beta = perfusion.DRAWING_BETA[lock] if beta is None else beta
    if any(torch.as_tensor(x).numel() not in (1, len(concepts)) for x in (beta, tau)):
        raise ValueError(f"beta and tau are one number, or one for each of the {len(concepts)} concepts")
    unet, ours = getattr(pipeline, "unet", pipeline), model.unet.cross_attentions
    paths = {module: path for path, module in model.unet.named_modules()}
    try:
        layers = [unet.get_submodule(paths[layer]) for layer in ours]
    except AttributeError:
        layers = []
    if [x.to_k.weight.shape for x in layers] != [x.to_k.weight.shape for x in ours]:
        raise ValueError(f"the pipeline's U-Net is of another kind or size than {model.name}'s")
    if any(isinstance(getattr(hook, "__self__", None), Edit) for hook in unet._forward_hooks.values()):
        raise ValueError("the U-Net is edited already: give all concepts to one context")
    edits, own = [concept for concept in concepts if concept.edits], Edit(model, concepts, beta, tau)
    if any(concept.o_keys is None for concept in edits):
        raise ValueError("a concept's locked keys are missing: call prepare(concepts, model)")
    for i, layer in enumerate(layers if edits else []):
        own.targets[layer.to_k] = torch.stack([concept.o_keys[i] for concept in edits])
        own.targets[layer.to_v] = torch.stack([concept.o_values[i] for concept in edits])
    if lock == "global":
        own.targets |= {layer.to_k: None for layer in layers}
    with contextlib.ExitStack() as hooks:
        for layer in own.targets:
            hooks.enter_context(layer.register_forward_hook(own.replace))
        hooks.enter_context(unet.register_forward_hook(own.check, with_kwargs=True))
        hooks.enter_context(torch.compiler.set_stance("force_eager"))       # compiled, it would not call them
        yield own.encode
        if not own.drawn and not own.ran:
            raise ValueError("the edit did not act: nothing was drawn with this U-Net inside the context")
