"""The embedded task's words: a caption becomes five one-hot vectors, in place of text encoders.

    scene_tokenizer   a caption -> five ids: colour, digit, relation, colour, digit
    SceneText         captions -> cond (no weights)
    attributes        ids -> what is named of each object

A caption is `a [colour] (digit | "digit") (left of | above | and) a [colour] (digit | "digit")`. A
colour left out is the pad token, and the null caption is five pads. B batch.
"""

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from config import Refusal

PAD = "[pad]"
COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANY_DIGIT = "digit"
RELATIONS = ("left", "above", "and")
VOCABULARY = (PAD, *COLOURS, *DIGITS, ANY_DIGIT, *RELATIONS)
WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}
SLOTS = ((PAD, *COLOURS), (*DIGITS, ANY_DIGIT), RELATIONS, (PAD, *COLOURS), (*DIGITS, ANY_DIGIT))
GRAMMAR = "a [colour] (digit word | digit) (left of | above | and) a [colour] (digit word | digit)"
ARTICLE = r"\b(a|an)\s+"


def attributes(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, 5) -> colours (B, 2), -1 where open, and digits (B, 2), 10 where open."""
    return ids[:, [0, 3]] - WORD_ID[COLOURS[0]], ids[:, [1, 4]] - WORD_ID[DIGITS[0]]


def scene_tokenizer() -> Tokenizer:
    """Word level; an article straight before a digit becomes the pad token, an open colour."""
    tokenizer = Tokenizer(models.WordLevel(WORD_ID, unk_token=PAD))
    digit = "|".join((*DIGITS, ANY_DIGIT))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(rf"{ARTICLE}(?=({digit})\b)"), f"{PAD} "),
            normalizers.Replace(Regex(ARTICLE), ""),
            normalizers.Replace(Regex(r"\bleft\s+of\b"), "left"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class SceneText(nn.Module):
    """Captions as one-hot vectors, in place of text encoders. It has no weights.

    context (B, 5, words + 5): each slot's word and its place; pooled (B, 5 words): the same words,
    flat.
    """

    context_width = len(VOCABULARY) + len(SLOTS)
    pooled_width = len(VOCABULARY) * len(SLOTS)

    def __init__(self):
        super().__init__()
        self.tokenizer = scene_tokenizer()
        self.allowed = [{WORD_ID[word] for word in words} for words in SLOTS]

    def tokens(self, captions: list[str]) -> Tensor:
        """(B, 5) ids.

        An empty caption is the null caption. Raises ValueError that names what is not understood.
        """
        return torch.tensor([self._ids(caption) for caption in captions])

    def _ids(self, caption: str) -> list[int]:
        if not caption.strip():
            return [WORD_ID[PAD]] * len(SLOTS)
        normal = self.tokenizer.normalizer.normalize_str(caption)
        unknown = [word for word in normal.split() if word not in WORD_ID]
        if unknown:
            known = ", ".join((*COLOURS, *DIGITS, ANY_DIGIT, "left of", "above", "and"))
            names = ", ".join(f'"{word}"' for word in unknown)
            raise Refusal(
                f'unknown word {names} in the prompt "{caption}"; the vocabulary is: a, an, {known}'
            )
        ids = self.tokenizer.encode(caption).ids
        if len(ids) != len(SLOTS) or any(
            i not in ok for i, ok in zip(ids, self.allowed, strict=True)
        ):
            raise Refusal(f'the prompt "{caption}" is not of the form: {GRAMMAR}')
        return ids

    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        """Token ids (B, 5) -> cond."""
        words = F.one_hot(ids, len(VOCABULARY)).float()  # (B, 5, words)
        places = torch.eye(len(SLOTS), device=ids.device).expand(len(ids), -1, -1)  # (B, 5, 5)
        return {"context": torch.cat([words, places], dim=-1), "pooled": words.flatten(1)}

    def forward(
        self, captions: list[str], device: torch.device | str = "cpu", sizes=None
    ) -> dict[str, Tensor]:
        return self.encode(self.tokens(captions).to(device))

    def embedding(self, captions: list[str], device: torch.device | str = "cpu") -> Tensor:
        """What the discriminator reads: the words (B, 5 words), L2-normalised.

        For the large teachers that is CLIP's text embedding.
        """
        return F.normalize(self(captions, device)["pooled"], dim=-1)
