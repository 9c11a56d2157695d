"""Text into tokens and back: words of the training data, or the tokens of a Hugging Face model."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

PIECE = re.compile(r"\w+|[^\w\s]")


class Words:
    """The vocabulary - 2 most frequent words and signs of some texts; what is not among them is lost."""

    unknown, end = 0, 1

    def __init__(self, texts: Iterable[str], vocabulary: int) -> None:
        count = Counter(piece for text in texts for piece in PIECE.findall(text))
        self.words = ["<unknown>", "<end>", *(w for w, _ in count.most_common(vocabulary - 2))]
        self.ids = {word: number for number, word in enumerate(self.words)}
        self.size = vocabulary

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(piece, self.unknown) for piece in PIECE.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] if i < len(self.words) else self.words[0] for i in ids)


class ModelTokens:
    """The tokenizer that lies beside a Hugging Face model."""

    def __init__(self, model: str) -> None:
        try:
            library = importlib.import_module("transformers")
            self.tokenizer = library.AutoTokenizer.from_pretrained(model)
        except Exception as error:  # a missing package, folder, file or connection: many kinds
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise ValueError(f"model: no tokenizer of {model}: {reason}") from error
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"model: the tokenizer of {model} has no end-of-text token")
        self.end = self.tokenizer.eos_token_id
        self.size = len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@lru_cache(maxsize=2)
def model_tokens(model: str) -> ModelTokens:
    return ModelTokens(model)
