"""Questions about texts, from files of SQuAD, CoQA, NarrativeQA and TriviaQA.

Understood are the files that SQuAD (1.1 and 2.0), CoQA and TriviaQA publish, and rows as in Hugging Face
datasets, of these three and of NarrativeQA: as a JSON list, one JSON object per line, or straight from there.
What a record is, its keys say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import hub


@dataclass(frozen=True)
class Question:
    id: str
    context: str  # "": there is none
    question: str
    answers: tuple[str, ...]  # each is right; the first is trained on. "" where there is no answer
    history: tuple[tuple[str, str], ...] = ()  # earlier questions about the text, answered


@lru_cache(maxsize=4)
def read_questions(place: str, evidence: str = "") -> tuple[Question, ...]:
    """All questions of a file, or of a hub: place.

    evidence: TriviaQA's folder of that name, with wikipedia/ and web/ inside: its own files only name the
    texts. Without it their questions have no context.

    Raises:
        ValueError: the file cannot be read, or a record is of none of the formats, in one line.
    """
    found: list[Question] = []
    for number, record in enumerate(_records(place)):
        parse = _parser(record, evidence)
        if parse is None:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{place}: record {number}: expected one of SQuAD, CoQA, NarrativeQA or TriviaQA, "
                f"got {keys}"
            )
        try:
            found += parse(record)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            kind = type(error).__name__
            raise ValueError(f"{place}: record {number} is incomplete ({kind}: {error})") from error
    if not found:
        raise ValueError(f"{place}: expected at least one question, got none")
    return tuple(found)


def _records(place: str) -> Iterable:
    if hub.is_hub(place):
        return hub.read_rows(place)
    try:
        text = Path(place).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {place}: {error}") from error
    try:
        content = json.loads(text)
    except ValueError:
        return _lines(place, text)
    if isinstance(content, dict):
        content = content.get("data", content.get("Data", [content]))
    if not isinstance(content, list):
        raise ValueError(f"{place}: expected a list of records, got {type(content).__name__}")
    return content


def _lines(place: str, text: str) -> list:
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{place} is neither JSON nor a JSON object per line: {error}") from error


Parser = Callable[[dict], Iterable[Question]]


def _parser(record: object, evidence: str) -> Parser | None:
    """By the first key that only this format has."""
    formats: dict[str, Parser] = {
        "paragraphs": _squad_article,
        "story": _coqa,
        "document": _narrativeqa,
        "Question": lambda record: _triviaqa(record, evidence),
        "entity_pages": _triviaqa_row,
        "context": _squad_row,
    }
    found = (parse for key, parse in formats.items() if isinstance(record, dict) and key in record)
    return next(found, None)


def _squad_article(record: dict) -> Iterator[Question]:
    for paragraph in record["paragraphs"]:
        for asked in paragraph["qas"]:
            texts = [answer["text"] for answer in asked["answers"]]
            yield Question(
                str(asked["id"]), paragraph["context"], asked["question"], _distinct(texts)
            )


def _squad_row(record: dict) -> Iterator[Question]:
    texts = _distinct(record["answers"]["text"])
    yield Question(str(record["id"]), record["context"], record["question"], texts)


def _coqa(record: dict) -> Iterator[Question]:
    """One question per turn. Published files have objects per turn and answers of further people."""
    is_row = isinstance(record["answers"], dict)
    texts = record["answers"]["input_text"] if is_row else _inputs(record["answers"])
    asked = record["questions"] if is_row else _inputs(record["questions"])
    others = [_inputs(turns) for turns in record.get("additional_answers", {}).values()]
    history: list[tuple[str, str]] = []
    for turn, question in enumerate(asked):
        answers = _distinct([texts[turn], *(other[turn] for other in others)])
        name = f"{record.get('id', record['story'][:40])}#{turn + 1}"
        yield Question(name, record["story"], question, answers, tuple(history))
        history.append((question, texts[turn]))


def _inputs(turns: list[dict]) -> list[str]:
    return [turn["input_text"] for turn in turns]


def _narrativeqa(record: dict) -> Iterator[Question]:
    """About the summary of the book or film; its full text where there is no summary."""
    document = record["document"]
    summary = document.get("summary") or {}
    context = summary.get("text") or document["text"]
    question = record["question"]["text"]
    answers = _distinct([answer["text"] for answer in record["answers"]])
    yield Question(f"{document['id']}: {question}", context, question, answers)


def _triviaqa(record: dict, evidence: str) -> Iterator[Question]:
    """The published files: the texts are those of all pages, then of all search results."""
    answer = record["Answer"]
    texts = []
    for kind, folder in (("EntityPages", "wikipedia"), ("SearchResults", "web")):
        for page in record.get(kind, ()) if evidence else ():
            texts.append(_evidence(Path(evidence) / folder / page["Filename"]))
    answers = _distinct([answer["Value"], *answer.get("Aliases", ())])
    yield Question(str(record["QuestionId"]), "\n".join(texts), record["Question"], answers)


def _evidence(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evidence: cannot read {path}: {error}") from error


def _triviaqa_row(record: dict) -> Iterator[Question]:
    answer = record["answer"]
    pages, results = record["entity_pages"], record.get("search_results", {})
    texts = [*pages.get("wiki_context", ()), *results.get("search_context", ())]
    answers = _distinct([answer["value"], *answer.get("aliases", ())])
    yield Question(str(record["question_id"]), "\n".join(texts), record["question"], answers)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """In their order; of a question without an answer the empty one, as SQuAD 2.0 scores it."""
    return tuple(dict.fromkeys(texts)) or ("",)
