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
        self.encoded: list[tuple[Tensor, Tensor]] = []  # every prompt's e and e_super
        self.edited, self.ran = set(), set()            # layers: all, and those of the present forward pass
        self.handles, self.drawn, self.warned = [], False, False

    @torch.no_grad()
    def encode(self, prompt: str | list[str], negative: str | list[str] = "") -> dict[str, Tensor]:
        """Prompts as a pipeline takes them, with the concepts' embeddings: see `personal`."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negatives = [negative] * len(prompts) if isinstance(negative, str) else negative
        texts = [*prompts, *negatives]
        e, e_super, _ = perfusion.encode(self.model.text_encoder, self.model.tokenizer, texts, self.concepts)
        self.encoded.extend(zip(e, e_super))
        return {"prompt_embeds": e[:len(prompts)], "negative_prompt_embeds": e[len(prompts):]}

    def find(self, e: Tensor) -> Tensor | None:
        """Which of the encoded prompts each of e (B, T, d) is, in whatever order; None if one is another."""
        if not self.encoded or e.shape[1:] != self.encoded[0][0].shape:
            return None
        x, known = e.flatten(1).float(), torch.stack([known for known, _ in self.encoded]).flatten(1)
        distance, nearest = torch.cdist(x, known.to(x)).min(1)
        return nearest if (distance <= NEAR * x.norm(dim=1)).all() else None

    # `module.forward` calls no hooks: neither of these calls itself.
    def rank_one(self, module, e: Tensor, targets: list[Tensor]) -> Tensor:
        """Eq. 3 instead of W e. targets: (width,) per edited concept."""
        e_perp, gates = perfusion.split_and_gate(e, self.concepts, self.beta, self.tau)
        o = torch.stack(targets).to(gates)
        return perfusion.edit(lambda x: [module.forward(x)], e_perp, gates, [o])[0]

    def lock_globally(self, module, e: Tensor) -> Tensor:
        """W e_super instead of W e."""
        nearest = self.find(e)
        if nearest is None:
            raise ValueError("with the global lock the pipeline takes only prompts made by `encode`")
        return module.forward(torch.stack([e_super for _, e_super in self.encoded]).to(e)[nearest])

    def replace(self, layer, function: Callable, *targets) -> None:
        """Let function(layer, e, *targets) be the output of a layer."""
        def hook(module, inputs, output):
            self.ran.add(module)
            return function(module, inputs[0], *targets)
        self.edited.add(layer)
        self.handles.append(layer.register_forward_hook(hook))

    def check(self, unet, inputs, named, output) -> None:
        """A forward hook of the U-Net: an edit that does not act, or not on this prompt, is never silent."""
        if self.ran != self.edited:
            raise ValueError(f"the edit acted in {len(self.ran)} of {len(self.edited)} layers: the U-Net was "
                             "changed and does not call the others, for instance by fuse_qkv_projections()")
        e = named["encoder_hidden_states"] if "encoder_hidden_states" in named else inputs[2]
        if not self.warned and self.find(e) is None:
            self.warned = True
            warnings.warn("the pipeline draws a prompt that is not from `encode`: the name of a concept means "
                          "nothing in it", stacklevel=2)
        self.drawn = True
        self.ran.clear()


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
    unet, paths = getattr(pipeline, "unet", pipeline), {m: path for path, m in model.unet.named_modules()}
    try:
        layers = [unet.get_submodule(paths[ours]) for ours in model.unet.cross_attentions]
    except AttributeError as error:
        raise ValueError(f"the pipeline's U-Net is of another kind than {model.name}'s: {error}") from None
    edits, own = [concept for concept in concepts if concept.edits], Edit(model, concepts, beta, tau)
    try:
        for i, layer in enumerate(layers):
            if lock == "global":
                own.replace(layer.to_k, own.lock_globally)
            elif edits:
                own.replace(layer.to_k, own.rank_one, [concept.o_keys[i] for concept in edits])
            if edits:
                own.replace(layer.to_v, own.rank_one, [concept.o_values[i] for concept in edits])
        own.handles.append(unet.register_forward_hook(own.check, with_kwargs=True))
        with torch.compiler.set_stance("force_eager"):      # compiled code would not call the hooks
            yield own.encode
        if not own.drawn and not own.ran:
            raise ValueError("the edit did not act: nothing was drawn with this U-Net inside the context")
    finally:
        for handle in own.handles:
            handle.remove()
