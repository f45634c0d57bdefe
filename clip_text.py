"""The text side of Stable Diffusion v1: CLIP's tokenizer and the text transformer of CLIP ViT-L/14.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. The
encoder takes embeddings, not ids, so that a caller can write learned vectors into them, at the positions that
the tokenizer names. Parameters are named as in the published files, without the prefix `text_model.`.
"""

import functools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from support.files import read_json, read_lines, read_text, write_json

START, END = "<|startoftext|>", "<|endoftext|>"  # SD v1 pads with END too
WORD_END = "</w>"  # suffix of the vocabulary entries that end a word
PIECES = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
          r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # digits one by one
SHOWN = 200  # characters of a truncated prompt's rest that the warning shows


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text transformer."""
    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    max_length: int = 77


SD_V1 = TextConfig()


class SelfAttention(nn.Module):
    """Multi-head self-attention over x (B, T, width); causal in the text tower. Padding is attended to."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (B, heads, T, width / heads)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps around CLIP's approximation of GELU, x * sigmoid(1.702 x)."""

    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class Layer(nn.Module):
    """Self-attention and MLP, each on a normalised input and added to x (B, T, width)."""

    def __init__(self, width: int, heads: int, intermediate: int, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, heads, causal)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """The text transformer: e = encoder(encoder.embed(ids))."""

    def __init__(self, config: TextConfig = SD_V1):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config.vocab_size, config.width),
            "position_embedding": nn.Embedding(config.max_length, config.width)})
        sizes = config.width, config.heads, config.intermediate
        layers = [Layer(*sizes, causal=True) for _ in range(config.layers)]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.final_layer_norm = nn.LayerNorm(config.width)
        # as CLIP starts: PyTorch's unit variance would drown what the layers add
        nn.init.normal_(self.embeddings["token_embedding"].weight, std=0.02)
        nn.init.normal_(self.embeddings["position_embedding"].weight, std=0.01)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T), on any device -> token embeddings (B, T, d), without positions."""
        table = self.embeddings["token_embedding"]
        return table(ids.to(table.weight.device))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Token embeddings (B, T, d) -> encodings e (B, T, d), after the last layer norm; T <= max_length."""
        x = embeddings + self.embeddings["position_embedding"].weight[:embeddings.shape[1]]
        return self.final_layer_norm(self.encoder["layers"](x))


def in_pieces(bpe: models.BPE) -> tokenizers.Tokenizer:
    """Byte pairs as CLIP uses them: of the PIECES of a text in lower case."""
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


class Tokenizer:
    """CLIP's byte-pair encoding: lower case, `max_length` ids per prompt, start and end included."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int = 77):
        """tokenizer: a tokenizers.Tokenizer; its own truncation and padding are switched off.

        vocabulary: token -> id. ValueError if it is not CLIP's.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self.max_length = tokenizer, max_length
        self._say = functools.cache(functools.partial(warnings.warn, stacklevel=2))     # every text once
        self.vocabulary = tokenizer.get_vocab()
        if not {START, END} <= self.vocabulary.keys():
            raise ValueError(f"not CLIP's vocabulary: {START} or {END} is missing")
        self.start, self.end = self.vocabulary[START], self.vocabulary[END]
        tokenizer.add_special_tokens([START, END])  # a literal <|endoftext|> in a prompt stays one token
        tokenizer.model.unk_token = END  # see _pieces

    @classmethod
    def load(cls, folder: str | Path, max_length: int = 77) -> "Tokenizer":
        """The tokenizer of a folder with vocab.json and merges.txt, or else with tokenizer.json.

        ValueError when the folder has neither, or when a file cannot be read.
        """
        merges, whole = Path(folder, "merges.txt"), Path(folder, "tokenizer.json")
        try:
            if whole.is_file() and not merges.is_file():
                return cls(tokenizers.Tokenizer.from_str(read_text(whole)), max_length)
            pairs = [tuple(line.split()) for line in read_lines(merges) if not line.startswith("#version")]
            bpe = models.BPE(read_json(Path(folder, "vocab.json"), dict), pairs, unk_token=END,
                             end_of_word_suffix=WORD_END, continuing_subword_prefix="")
            return cls(in_pieces(bpe), max_length)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json into an existing folder."""
        config = {"model_max_length": self.max_length, "bos_token": START, "eos_token": END, "unk_token": END,
                  "pad_token": END, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
        self._tokenizer.model.save(str(folder))
        write_json(Path(folder) / "tokenizer_config.json", config)

    def encode(self, prompts: list[str], words: dict[str, str] | None = None) -> tuple[Tensor, list[dict]]:
        """Prompts (a list of B strings) -> ids (B, max_length) int64, and positions.

        words: what stands in a placeholder's place, as {"<teddy>": "teddy bear"}. positions: per prompt a
        dict from each placeholder to its occurrences, each a list of indices into the ids, as
        {"<teddy>": [[4, 5]]}; an occurrence cut off by truncation is missing. What a warning says, once: a
        prompt that is too long is truncated, characters that the vocabulary cannot spell are left out.
        """
        words, room = words or {}, self.max_length - 2
        ids, positions = [], []
        for prompt in prompts:
            text, spans = _substitute(prompt, words)
            row, offsets, unknown = self._pieces(text)
            if unknown:
                self._say(f"unknown to the vocabulary and left out: {' '.join(unknown)}")
            if len(row) > room:
                rest = text[offsets[room][0]:][:SHOWN]
                self._say(f"the prompt has {len(row) - room} tokens too many, cut off: {rest!r}")
            occurrences = {placeholder: [] for placeholder in words}
            for placeholder, span in spans:
                if indices := self._inside(offsets, span):
                    occurrences[placeholder].append(indices)
            ids.append([self.start, *row[:room]] + [self.end] * max(1, self.max_length - 1 - len(row)))
            positions.append(occurrences)
        return torch.tensor(ids, dtype=torch.long).reshape(len(ids), self.max_length), positions

    def find(self, prompt: str, word: str) -> list[list[int]]:
        """Where an ordinary word or phrase stands in a prompt: occurrences as in the positions of encode."""
        _, offsets, _ = self._pieces(prompt)
        matches = _pattern([word], re.IGNORECASE).finditer(prompt)
        return [indices for match in matches if (indices := self._inside(offsets, match.span()))]

    def tokens(self, ids: Tensor) -> list[str]:
        """Ids (T,) -> their text, a list of T strings, for labels of plots."""
        names = [self._tokenizer.id_to_token(int(i)) for i in ids]
        return [name if name in (START, END) else decoders.ByteLevel().decode([name.removesuffix(WORD_END)])
                for name in names]

    def _pieces(self, text: str) -> tuple[list[int], list[tuple[int, int]], list[str]]:
        """Text -> the ids of its tokens, their characters (start, stop), and the characters left out.

        The vocabulary gives what it cannot spell the id of the end mark. A blank takes the place of such a
        character, so that the others stay where they are.
        """
        unknown = {}  # as a set with an order
        while True:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            ends = [text[slice(*span)] for i, span in zip(encoding.ids, encoding.offsets) if i == self.end]
            new = dict.fromkeys(piece for piece in ends if piece != END and piece.strip())
            if not new:
                return encoding.ids, encoding.offsets, list(unknown)
            unknown |= new
            for piece in new:
                text = text.replace(piece, " " * len(piece))

    def _inside(self, offsets: list[tuple[int, int]], span: tuple[int, int]) -> list[int]:
        """Indices of the tokens with characters in the span; none when truncation cut one of them off."""
        indices = [i + 1 for i, (start, stop) in enumerate(offsets) if start < span[1] and stop > span[0]]
        return indices if not indices or indices[-1] < self.max_length - 1 else []


def _pattern(words: list[str] | dict[str, str], flags: int = 0) -> re.Pattern:
    """Regular expression for any of the words, the longest first, never as a part of a longer word."""
    end = r"(?:(?<!\w)|(?!\w))"  # not between two letters
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(f"{end}(?:{longest_first}){end}", flags)


def _substitute(prompt: str, words: dict[str, str]) -> tuple[str, list]:
    """Replace the placeholders; returns the text and a list of (placeholder, (start, stop) of its words)."""
    if not words:
        return prompt, []
    text, spans, done = "", [], 0
    for match in _pattern(words).finditer(prompt):
        text += prompt[done:match.start()] + " "
        spans.append((match.group(), (len(text), len(text) + len(words[match.group()]))))
        text += words[match.group()] + " "
        done = match.end()
    return text + prompt[done:], spans
