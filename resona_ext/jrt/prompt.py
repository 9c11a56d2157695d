"""JRT-Prompt: show a model the context more than once, with the question first.

A recurrent model that reads the question before the context knows what to keep. The formats are those of
"Just read twice" (arXiv 2407.05483, appendix) for its six tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ._require import require

# {question}: what is asked; {key}: a name whose value is wanted; {context}; {text}: text to be continued.
FORMATS: dict[str, tuple[str, str, str]] = {
    # name: opening, between copies, closing; of "opening context between context closing"
    "question": ("{question} ", ".\n", ". {question}"),  # NQ, TriviaQA, DROP
    "key": ("Information about {key}. ", ".\n", ". {key}:"),  # FDA, SWDE
    "completion": ("{question} ", "\n", "\n{text}"),  # SQuAD
}


def jrt_prompt(
    context: str,
    question: str = "",
    *,
    format: str = "question",
    repeats: int = 2,
    key: str | None = None,
    text: str | None = None,
    tokenizer: Any = None,
    max_context_tokens: int | None = None,
    answers: Sequence[str] | None = None,
) -> str:
    """The prompt in which the context stands `repeats` times.

    Args:
        context: what is read. A full stop at its end is not doubled.
        question: what is asked.
        format: "question" `{question} {context}.\\n{context}. {question}`,
            "key" `Information about {key}. {context}.\\n{context}. {key}:`,
            "completion" `{question} {context}\\n{text}`, where the text is to be continued and the
            context stands once, as in the paper, unless repeats says otherwise.
        repeats: 1 is the plain prompt, whose question comes last only: `{context}. {question}`.
        key: of format "key"; default the question.
        text: of format "completion".
        tokenizer: as for `truncate`; None counts words.
        max_context_tokens: each copy of the context is cut to so many.
        answers: texts round which the context is cut, where one of them occurs; else its start stays.

    Raises:
        ValueError: a part that the format needs is missing, or an argument is out of range.
    """
    require(format in FORMATS, "format", f"one of {tuple(FORMATS)}", repr(format))
    require(repeats >= 1, "repeats", "at least 1", repeats)
    parts = {"question": question, "key": question if key is None else key, "text": text}
    needed = {"question": "question", "key": "key", "completion": "text"}[format]
    require(bool(parts[needed]), needed, f'a text, for format "{format}"', repr(parts[needed]))
    if max_context_tokens is not None:
        context = truncate(context, max_context_tokens, answers=answers or (), tokenizer=tokenizer)
    opening, between, closing = FORMATS[format]
    if format != "completion":
        context = context.rstrip().removesuffix(".")
        opening = opening if repeats > 1 else ""
    copies = between.join([context] * repeats)
    # Braces in the texts are text: only the format's own are filled.
    return opening.format(**parts) + copies + closing.format(**parts)


def truncate(
    context: str, max_tokens: int, *, answers: Sequence[str] = (), tokenizer: Any = None
) -> str:
    """At most max_tokens of the context, centred on the first answer that occurs in it, else its start.

    Args:
        tokenizer: None: words between blanks, kept as they are. Hugging Face style: encode(text,
            add_special_tokens=False) and decode(ids). Any other callable: text -> a sequence of
            tokens; strings are joined as they are, other tokens need `.decode`.

    The half that does not fit on one side of the answer goes to the other, so the result has max_tokens
    wherever the context does. Case is ignored in the search.
    """
    require(max_tokens >= 1, "max_context_tokens", "at least 1", max_tokens)
    encode, decode = _coder(tokenizer)
    tokens = encode(context)
    if len(tokens) <= max_tokens:
        return context
    first, last = _answer_span(context, answers, encode)
    start = (first + last) // 2 - max_tokens // 2 if last > first else 0
    start = min(max(start, 0), len(tokens) - max_tokens)
    return decode(tokens[start : start + max_tokens])


def _answer_span(context: str, answers: Sequence[str], encode: Callable) -> tuple[int, int]:
    """The tokens that hold the answer which occurs first; (0, 0) where none does."""
    folded = context.lower()
    found = [(folded.find(a.lower()), a) for a in answers if a and a.lower() in folded]
    if not found:
        return 0, 0
    begin, answer = min(found)
    before = len(encode(context[:begin]))
    return before, max(before + 1, len(encode(context[: begin + len(answer)])))


def _words(text: str) -> list[str]:
    """Words with the blanks round them: joined, they are the text again."""
    return re.findall(r"\s*\S+(?:\s+$)?", text)


def _coder(tokenizer: Any) -> tuple[Callable[[str], Sequence], Callable[[Sequence], str]]:
    if tokenizer is None:
        return _words, lambda words: "".join(words).strip()
    if hasattr(tokenizer, "encode"):
        if hasattr(tokenizer, "convert_ids_to_tokens"):  # Hugging Face adds <s> unless told not to
            return lambda s: tokenizer.encode(s, add_special_tokens=False), tokenizer.decode
        return tokenizer.encode, tokenizer.decode
    require(callable(tokenizer), "tokenizer", "None, an encoder or a callable", type(tokenizer))

    def decode(tokens: Sequence) -> str:
        if hasattr(tokenizer, "decode"):
            return tokenizer.decode(tokens)
        strings = all(isinstance(token, str) for token in tokens)
        require(strings, "tokenizer", "strings as tokens, or a decode method", "other tokens")
        return "".join(tokens)

    return tokenizer, decode


def contains_answer(response: str, answers: Sequence[str]) -> bool:
    """The paper's score: one of the answers stands in the response, case ignored."""
    return any(answer.lower() in response.lower() for answer in answers)
