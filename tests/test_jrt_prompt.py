"""JRT-Prompt: the documented formats, truncation round the answer, and the comparison."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recall.tasks import make_task
from resona_ext.jrt import Comparison, Example, compare, compare_tokens, jrt_prompt, truncate
from resona_ext.jrt.prompt import contains_answer

CONTEXT = "Ada wrote the first program. It ran nowhere."
QUESTION = "Who wrote the first program?"

FORMATS = [
    (
        dict(question=QUESTION),
        "Who wrote the first program? Ada wrote the first program. It ran nowhere.\n"
        "Ada wrote the first program. It ran nowhere. Who wrote the first program?",
    ),
    (
        dict(question=QUESTION, repeats=1),
        "Ada wrote the first program. It ran nowhere. Who wrote the first program?",
    ),
    (dict(question="Q?", repeats=3, context="c"), "Q? c.\nc.\nc. Q?"),
    (
        dict(format="key", key="author", context="c"),
        "Information about author. c.\nc. author:",
    ),
    (dict(format="key", question="author", context="c", repeats=1), "c. author:"),
    (
        dict(format="completion", question="Q?", text="The author is", repeats=1, context="c."),
        "Q? c.\nThe author is",
    ),
    (
        dict(question="{context} {0}?", context="{key} }{"),
        "{context} {0}? {key} }{.\n{key} }{. {context} {0}?",
    ),
]


@pytest.mark.parametrize(
    "arguments, expected", FORMATS, ids=lambda x: x[:30] if isinstance(x, str) else ""
)
def test_formats(arguments, expected):
    assert jrt_prompt(**{"context": CONTEXT, **arguments}) == expected


WORDS = " ".join(f"w{i}" for i in range(100))


@pytest.mark.parametrize(
    "answer, first, last",
    [("w50", 45, 54), ("w0 w1", 0, 9), ("w99", 90, 99), ("W20 W21", 16, 25), ("absent", 0, 9)],
)
def test_the_context_is_cut_round_the_answer(answer, first, last):
    cut = truncate(WORDS, 10, answers=[answer])
    assert cut == " ".join(f"w{i}" for i in range(first, last + 1))


def test_the_first_of_several_answers_is_kept():
    assert "w30" in truncate(WORDS, 5, answers=["w70", "", "w30"]).split()


def test_every_copy_is_cut():
    prompt = jrt_prompt(WORDS, "Q?", max_context_tokens=10, answers=["w50"])
    copy = " ".join(f"w{i}" for i in range(45, 55))
    assert prompt == f"Q? {copy}.\n{copy}. Q?"


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n\t", max_size=60), st.integers(1, 12))
def test_a_cut_is_a_piece_of_the_context(context, most):
    cut = truncate(context, most)
    assert cut in context and len(cut.split()) <= most
    assert len(context.split()) > most or len(cut.split()) == len(context.split())


class Letters:
    """A tokenizer in the style of Hugging Face, one token per letter, with a start token by default."""

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(c) for c in text]

    def decode(self, ids):
        return "".join("<s>" if i == 0 else chr(i) for i in ids)

    def convert_ids_to_tokens(self, ids):
        return [chr(i) for i in ids]


@pytest.mark.parametrize("tokenizer", [Letters(), list], ids=["hugging face style", "a callable"])
def test_tokenizers(tokenizer):
    assert truncate("abcdefghij", 4, answers=["f"], tokenizer=tokenizer) == "defg"


def test_a_real_hugging_face_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {f"w{i}": i for i in range(100)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    assert truncate(WORDS, 3, answers=["w50"], tokenizer=tokenizer).split() == ["w49", "w50", "w51"]


BAD = [
    (lambda: jrt_prompt("c", "q", format="twice"), "format: expected one of"),
    (lambda: jrt_prompt("c", "q", repeats=0), "repeats: expected at least 1, got 0"),
    (lambda: jrt_prompt("c"), 'question: expected a text, for format "question"'),
    (lambda: jrt_prompt("c", format="key"), 'key: expected a text, for format "key"'),
    (
        lambda: jrt_prompt("c", "q", format="completion"),
        'text: expected a text, for format "completion"',
    ),
    (
        lambda: jrt_prompt("c", "q", max_context_tokens=0),
        "max_context_tokens: expected at least 1, got 0",
    ),
    (lambda: truncate("abc", 1, tokenizer=3), "tokenizer: expected None, an encoder or a callable"),
    (
        lambda: truncate("a b c", 1, tokenizer=lambda s: [1, 2, 3]),
        "tokenizer: expected strings as tokens",
    ),
    (lambda: compare([], lambda prompt: ""), "examples: expected at least one, got none"),
]


@pytest.mark.parametrize("call, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_the_score_of_the_paper():
    assert contains_answer("it was ADA Lovelace", ["ada lovelace", "countess"])
    assert not contains_answer("it was Charles", ["ada"])


def test_comparison():
    """A model that answers when the question came first, and one that needs two copies as well."""
    examples = [Example("x is 1", "x?", ["1"]), Example("y is 2", "y?", ["2"])]
    base = lambda prompt: "1" if prompt.startswith("x?") else ""  # noqa: E731
    resona = lambda prompt: "1 2" if prompt.startswith(("x?", "y?")) else "1"  # noqa: E731
    assert compare(examples, base, resona) == Comparison(0.0, 0.5, 0.5, 1.0, 2)
    assert compare(examples, base) == Comparison(0.0, 0.5, None, None, 2)


def test_comparison_on_a_recall_task():
    """A model that needs to have read a pair twice, and one that needs it once."""
    task = make_task(dict(name="mqar", vocabulary=64, length=32, pairs=4))
    tokens, labels, _ = task.generate(20, torch.Generator().manual_seed(0))

    def lookup(rows, least):
        """Answers with what followed the same key `least` times before."""
        logits = torch.zeros(*rows.shape, 64)
        for n in range(rows.shape[0]):
            seen: dict = {}
            for t, token in enumerate(rows[n].tolist()):
                known = seen.setdefault(token, [])
                if len(known) >= least:
                    logits[n, t, known[-1]] = 1
                if t + 1 < rows.shape[1]:
                    known.append(int(rows[n, t + 1]))
        return logits

    once, twice = (lambda rows, least=least: lookup(rows, least) for least in (1, 2))
    got = compare_tokens(tokens, labels, twice, once, context=8)
    assert got == Comparison(0.0, 1.0, 1.0, 1.0, 20)
    with pytest.raises(ValueError, match="labels: expected only ignored ones"):
        compare_tokens(tokens, labels, once, context=32)
