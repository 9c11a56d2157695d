"""How written answers are scored, all in per cent: F1 and exact match as SQuAD defines them, BLEU
(sacrebleu), ROUGE-L (rouge-score) and METEOR (nltk, with WordNet).

A question may have several right answers. F1, exact match, ROUGE-L and METEOR count the best of them and
are means over the questions; BLEU is of the whole corpus. METEOR's penalty for scattered words gives a right
answer of one word 50. The paper does not say how its own were computed.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean

References = Sequence[Sequence[str]]  # of every question the right answers
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Missing(Exception):
    """A score that cannot be had here; the message says what it needs."""


def normalise(text: str) -> list[str]:
    """SQuAD's words: lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def word_f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall over the words, 0 to 1; of two empty texts 1."""
    ours, theirs = normalise(said), normalise(right)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def f1(said: Sequence[str], right: References) -> float:
    return _mean_of_best(word_f1, said, right)


def exact_match(said: Sequence[str], right: References) -> float:
    return _mean_of_best(lambda a, b: float(normalise(a) == normalise(b)), said, right)


def bleu(said: Sequence[str], right: References) -> float:
    library = _package("sacrebleu")
    most = max(len(answers) for answers in right)
    streams = [[a[i] if i < len(a) else None for a in right] for i in range(most)]
    return library.corpus_bleu(list(said), streams).score


def rouge_l(said: Sequence[str], right: References) -> float:
    scorer = _package("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return _mean_of_best(lambda a, b: scorer.score(b, a)["rougeL"].fmeasure, said, right)


def meteor(said: Sequence[str], right: References) -> float:
    score = _package("nltk.translate.meteor_score").single_meteor_score
    wordnet = _package("nltk.corpus").wordnet
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:  # there is none, or it is not whole
        raise Missing("needs the data of WordNet (python -m nltk.downloader wordnet)") from error

    def one(said: str, right: str) -> float:
        return score(_words(right), _words(said), wordnet=wordnet)

    return _mean_of_best(one, said, right)


SCORES: dict[str, Callable[[Sequence[str], References], float]] = {
    "bleu": bleu,
    "rouge_l": rouge_l,
    "meteor": meteor,
    "f1": f1,
    "exact_match": exact_match,
}


def score(said: Sequence[str], right: References) -> dict:
    """Every score that can be had, and under "missing" why the others cannot."""
    found: dict = {"questions": len(said)}
    missing = {}
    for name, compute in SCORES.items():
        try:
            found[name] = round(compute(said, right), 3)
        except Missing as error:
            missing[name] = str(error)
    return {**found, "missing": missing}


def _mean_of_best(
    compare: Callable[[str, str], float], said: Sequence[str], right: References
) -> float:
    pairs = zip(said, right, strict=True)
    return 100 * mean(max(compare(ours, answer) for answer in answers) for ours, answers in pairs)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def _package(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(
            f"needs a package ({error}): pip install sacrebleu rouge-score nltk"
        ) from error
