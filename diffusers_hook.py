"""Draw personal concepts, gates and all, in a pipeline of the package diffusers.

    model = weights_loader.load(folder)                           # the pipeline's own weights
    concepts = prepare([Concept.load("teddy.safetensors")], model)
    with personal(pipeline, model, concepts, beta=0.7) as encode:
        picture = pipeline(**encode("a <teddy> on the beach")).images[0]

Every pipeline with the U-Net of Stable Diffusion v1 will do: text to image, image to image, inpainting,
ControlNet. This file does not import diffusers; it only relies on the published names of the U-Net's layers.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import perfusion
from concept import Concept

NEAR = 0.01  # share of its norm by which half precision may move an encoding; another prompt is farther away


@contextlib.contextmanager
def personal(pipeline, model, concepts: list[Concept], beta=None, tau=perfusion.DRAWING_TAU,
             lock: str = "local") -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Edit the pipeline's keys and values for as long as the context lasts; afterwards it is as before.

    pipeline: or only its U-Net. model: its base, from `weights_loader.load`; here it encodes the text.
    concepts: from `prepare`. beta, tau: one number or one per concept; by default those for drawing
    with this lock, "local" or "global". ValueError for another lock and another kind of U-Net.

    Yields encode(prompt, negative="") for strings or lists of B strings. It returns what takes their place in
    the pipeline's call: {"prompt_embeds": (B, T, d), "negative_prompt_embeds": (B, T, d)}.
    """
    if lock not in ("local", "global"):
        raise ValueError(f'the lock is "local" or "global", not "{lock}"')
    if beta is None:
        beta = perfusion.DRAWING_BETA[lock]
    unet, paths = getattr(pipeline, "unet", pipeline), {m: path for path, m in model.unet.named_modules()}
    try:
        layers = [unet.get_submodule(paths[ours]) for ours in model.unet.cross_attentions]
    except AttributeError as error:
        raise ValueError(f"the pipeline's U-Net is of another kind than {model.name}'s: {error}") from None
    encoded: list[tuple[Tensor, Tensor]] = []  # every prompt's e and e_super

    @torch.no_grad()
    def encode(prompt: str | list[str], negative: str | list[str] = "") -> dict[str, Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negatives = [negative] * len(prompts) if isinstance(negative, str) else negative
        texts = [*prompts, *negatives]
        e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, texts, concepts)
        encoded.extend(zip(e, e_super))
        return {"prompt_embeds": e[:len(prompts)], "negative_prompt_embeds": e[len(prompts):]}

    # `module.forward` calls no hooks: neither hook calls itself.
    def edit(targets: list[Tensor]) -> Callable:
        """A forward hook of to_k or to_v: eq. 3 instead of W e. targets: (width,) per edited concept."""
        def hook(module, inputs, output):
            e_perp, gates = perfusion.split_and_gate(inputs[0], concepts, beta, tau)
            o = torch.stack(targets).to(gates)
            return perfusion.edit(lambda x: [module.forward(x)], e_perp, gates, [o])[0]
        return hook

    def lock_globally(module, inputs, output):
        """A forward hook of to_k: W e_super instead of W e, in whatever order the prompts arrive."""
        x = inputs[0].flatten(1).float()
        e, e_super = (torch.stack(t).to(x) for t in zip(*encoded)) if encoded else (x + torch.inf, x)
        distance, nearest = torch.cdist(x, e.flatten(1)).min(1)
        if not (distance <= NEAR * x.norm(dim=1)).all():
            raise ValueError("with the global lock the pipeline takes only prompts made by `encode`")
        return module.forward(e_super[nearest].to(inputs[0]))

    edits, hooks = [concept for concept in concepts if concept.edits], []
    try:
        for i, layer in enumerate(layers):
            if lock == "global":
                hooks += [layer.to_k.register_forward_hook(lock_globally)]
            elif edits:
                hooks += [layer.to_k.register_forward_hook(edit([concept.o_keys[i] for concept in edits]))]
            if edits:
                hooks += [layer.to_v.register_forward_hook(edit([concept.o_values[i] for concept in edits]))]
        yield encode
    finally:
        for hook in hooks:
            hook.remove()
