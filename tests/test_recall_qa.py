"""Question answering: the files of four data sets, tokens, scores, and models that write answers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.recall import __main__ as cli
from benchmarks.recall import answers, report, store
from benchmarks.recall.config import make_cell
from benchmarks.recall.data.questions import Question, read_questions
from benchmarks.recall.data.tokens import Words
from benchmarks.recall.tasks import IGNORED, make_task
from benchmarks.recall.tasks.qa import question_text, write
from resona_ext.cli.errors import CliError

FOLDER = Path(__file__).parent / "data" / "qa"
SQUAD, COQA = str(FOLDER / "squad.json"), str(FOLDER / "coqa.json")
TRIVIAQA, NARRATIVEQA = str(FOLDER / "triviaqa.json"), str(FOLDER / "narrativeqa.jsonl")
EVIDENCE = str(FOLDER / "evidence")
FERRY = (
    "A ferry crosses the lake every hour. In winter the lake freezes and a sledge takes its place."
)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def qa(**settings):
    base = {"vocabulary": 120, "length": 64, "longest_answer": 8, "train": SQUAD, "test": SQUAD}
    return make_task({"name": "qa", **base, **settings})


# --- the files ------------------------------------------------------------------------------------


def test_squad():
    found = read_questions(SQUAD)
    assert [asked.id for asked in found] == ["m1", "m2", "m3", "f1", "f2"]
    assert found[0].answers == ("Anna Reed", "Reed") and found[0].context.startswith("The old mill")
    assert found[2].answers == ("",)  # without an answer, as in SQuAD 2.0
    assert found[3] == Question("f1", FERRY, "What crosses the lake?", ("A ferry",))


def test_coqa_questions_know_what_was_asked_before():
    first, second = read_questions(COQA)
    assert first.answers == ("a ferry", "the ferry") and first.history == ()
    assert second.answers == ("Every hour", "hourly")
    assert second.history == (("What crosses the lake?", "a ferry"),)


def test_narrativeqa_reads_the_summary_or_the_text():
    first, second = read_questions(NARRATIVEQA)
    assert first.context.startswith("Tom, a baker")
    assert first.answers == ("In a loaf.", "Inside a loaf of bread")
    assert second.context == "INT. KITCHEN. The clock stops at four."


def test_triviaqa_has_its_texts_elsewhere():
    assert [asked.context for asked in read_questions(TRIVIAQA)] == ["", ""]
    found = read_questions(TRIVIAQA, EVIDENCE)
    assert [asked.context for asked in found] == ["The Wend is a river. It was moved in 1910.", ""]
    assert found[0].answers == ("Wend", "River Wend", "The Wend")


ROWS = {
    "squad": {
        "id": "f1",
        "title": "The ferry",
        "context": FERRY,
        "question": "What crosses the lake?",
        "answers": {"text": ["A ferry", "ferry"], "answer_start": [0, 2]},
    },
    "coqa": {
        "source": "own",
        "story": FERRY,
        "questions": ["What crosses the lake?"],
        "answers": {"input_text": ["A ferry"], "answer_start": [0], "answer_end": [7]},
    },
    "narrativeqa": {
        "document": {"id": "n", "summary": {"text": FERRY}, "text": "long"},
        "question": {"text": "What crosses the lake?"},
        "answers": [{"text": "A ferry"}],
    },
    "triviaqa": {
        "question": "What crosses the lake?",
        "question_id": "t",
        "entity_pages": {"wiki_context": [FERRY]},
        "search_results": {"search_context": []},
        "answer": {"value": "A ferry", "aliases": ["Ferry"]},
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_hub(name, monkeypatch):
    """What datasets gives for hub:NAME:SPLIT, here by a stand-in."""
    asked = []

    def load_dataset(*place, **options):
        asked.append((*place, options))
        return [ROWS[name]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (found,) = read_questions(f"hub:{name}:validation")
    assert (found.context, found.question) == (FERRY, "What crosses the lake?")
    assert found.answers[0] == "A ferry"
    assert asked[0][2] == {"split": "validation", "revision": None}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("hub:squad:train", ("rajpurkar/squad", None, None, "train")),
        ("hub:triviaqa:test", ("mandarjoshi/trivia_qa", "rc.wikipedia", None, "test")),
        ("hub:me/own/part@abc:train[:9]", ("me/own", "part", "abc", "train[:9]")),
    ],
)
def test_places_of_the_hub(place, expected, monkeypatch):
    from benchmarks.recall.data import hub

    def load_dataset(name, configuration, *, split, revision):
        return name, configuration, revision, split

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert hub.read_rows(place) == expected


def test_the_hub_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets, or download the files and give"):
        read_questions("hub:squad:train")

    def load_dataset(*place, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"\(ConnectionError: no route\); without a connection"):
        read_questions("hub:squad:train")
    for place in ("hub:squad", "hub:sqad:train"):
        with pytest.raises(ValueError, match="expected hub:NAME:SPLIT, where NAME is owner/name"):
            read_questions(place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is neither JSON nor a JSON object per line"),
        ("3", "expected a list of records, got int"),
        ("[]", "expected at least one question, got none"),
        ('[{"a": 1}]', r"record 0: expected one of SQuAD, .*, got \['a'\]"),
        ('{"data": [{"paragraphs": [{}]}]}', r"record 0 is incomplete \(KeyError: 'qas'\)"),
        ('[{"story": "x", "answers": []}]', r"record 0 is incomplete \(KeyError: 'questions'\)"),
    ],
)
def test_wrong_files_are_one_line(text, message, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_questions(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read nowhere\.json"):
        read_questions("nowhere.json")
    with pytest.raises(ValueError, match=r"evidence: cannot read .*Wend\.txt"):
        read_questions(TRIVIAQA, str(tmp_path))


# --- the scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "right", "f1", "exact"),
    [
        ("Anna Reed", "anna reed.", 1.0, 1.0),
        ("The Wend", "a Wend!", 1.0, 1.0),  # articles do not count
        ("Anna", "Anna Reed", 2 / 3, 0.0),
        ("Reed Anna Reed", "Anna Reed", 4 / 5, 0.0),  # a word counts as often as it is right
        ("oats", "wheat", 0.0, 0.0),
        ("", "", 1.0, 1.0),  # SQuAD 2.0: rightly no answer
        ("the", "", 1.0, 1.0),
        ("oats", "", 0.0, 0.0),
    ],
)
def test_f1_and_exact_match_are_those_of_squad(said, right, f1, exact):
    assert answers.word_f1(said, right) == pytest.approx(f1)
    assert answers.exact_match([said], [[right]]) == 100 * exact


def test_the_best_answer_counts():
    right = [["wheat", "oats and barley"], ["Anna Reed"]]
    assert answers.f1(["oats", "Anna"], right) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert answers.exact_match(["wheat", "Anna"], right) == 50


def test_bleu_of_known_overlaps():
    pytest.importorskip("sacrebleu")
    # 5 of 6 words, 4 of 5 pairs, 3 of 4, 2 of 3: their product is 1 / 3.
    assert answers.bleu(["a b c d e f"], [["a b c d e g"]]) == pytest.approx(100 / 3**0.25)
    several = [["nothing", "a b c d e"], ["f g h i j"]]
    assert answers.bleu(["a b c d e", "f g h i j"], several) == pytest.approx(100)


def test_rouge_of_known_overlaps():
    pytest.importorskip("rouge_score")
    assert answers.rouge_l(["a b c d"], [["e f", "a c d e"]]) == pytest.approx(75)  # a c d


def test_meteor_of_known_overlaps(monkeypatch):
    """With a WordNet that has no synonyms: an exact answer of n words scores 1 - (1 / n)^3 / 2."""
    corpus = pytest.importorskip("nltk.corpus")
    empty = SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: [])
    monkeypatch.setattr(corpus, "wordnet", empty)
    got = answers.meteor(["In the old mill"], [["elsewhere", "in the old mill"]])
    assert got == pytest.approx(100 * (1 - (1 / 4) ** 3 / 2))


@pytest.mark.parametrize("error", [LookupError, FileNotFoundError])
def test_what_cannot_be_scored_is_named(error, monkeypatch):
    corpus = pytest.importorskip("nltk.corpus")

    def ensure_loaded():
        raise error("no WordNet, or half of one")

    monkeypatch.setattr(corpus, "wordnet", SimpleNamespace(ensure_loaded=ensure_loaded))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    found = answers.score(["oats"], [["oats"]])
    assert found["f1"] == 100 and "bleu" not in found and "meteor" not in found
    assert "python -m nltk.downloader wordnet" in found["missing"]["meteor"]
    assert "pip install sacrebleu rouge-score nltk" in found["missing"]["bleu"]


# --- the task -------------------------------------------------------------------------------------


def test_words_are_the_most_frequent_and_come_back():
    words = Words(["oats, oats and barley"], 4)
    assert words.encode("oats and oats,") == [2, 0, 2, 3] and words.size == 4
    assert words.decode([2, 3, 0, 1, 77]) == "oats , <unknown> <end> <unknown>"


def test_a_row_is_text_question_and_answer():
    task = qa()
    words, batch = task.tokens, task.test_set()
    for row, asked in enumerate(read_questions(SQUAD)):
        answer = [*words.encode(asked.answers[0]), words.end]
        prompt = words.encode(f"{asked.context} Question: {asked.question} Answer:")
        begin, end = len(prompt) - 1, len(prompt) - 1 + len(answer)
        assert batch.tokens[row, :end].tolist() == prompt + answer[:-1]
        assert batch.labels[row, begin:end].tolist() == answer
        assert (batch.labels[row, :begin] == IGNORED).all()
        assert (batch.labels[row, end:] == IGNORED).all()
    assert torch.equal(batch.labels, batch.targets)


def test_a_conversation_is_shown_up_to_its_last_turns():
    asked = Question("x", "", "c?", ("C",), (("a?", "A"), ("b?", "B")))
    assert question_text(asked, 0) == "\nQuestion: c?\nAnswer:"
    assert question_text(asked, 1) == "\nQuestion: b?\nAnswer: B\nQuestion: c?\nAnswer:"
    assert question_text(asked, 9).startswith("\nQuestion: a?\nAnswer: A\nQuestion: b?")


def test_a_long_text_is_cut_and_the_question_stays():
    task = qa(length=24)
    words = task.tokens
    batch = task.test_set()
    for row, asked in enumerate(read_questions(SQUAD)):
        question = words.encode(f"Question: {asked.question} Answer:")
        prompt = words.encode(asked.context)[: 16 - len(question)] + question
        assert len(prompt) == 16 and batch.tokens[row, :16].tolist() == prompt


def test_training_rows_are_questions_of_the_training_file():
    task = qa(test=COQA)
    rows = {tuple(row) for row in qa().test_set().tokens.tolist()}
    drawn = task.generate(40, torch.Generator().manual_seed(0)).tokens.tolist()
    assert {tuple(row) for row in drawn} == rows
    assert len(task.test_set().tokens) == 2
    assert [asked.id for asked in qa(questions=2).tested()] == ["m1", "m3"]


def test_writing_ends_at_the_end_or_at_the_most():
    """A model that counts: its next token is the last plus one, modulo 10; the end is 7."""

    def count(tokens, last):
        assert tokens.shape[1] == last.max() + 1
        return (tokens[torch.arange(len(last)), last] + 1) % 10

    assert write([[0, 4], [8], [6, 6, 6]], count, 4, 7) == [[5, 6], [9, 0, 1, 2], []]


def test_a_model_that_knows_scores_100():
    task, asked = qa(), read_questions(SQUAD)
    words = task.tokens
    known = {}
    for one in asked:
        prompt = words.encode(f"{one.context} Question: {one.question} Answer:")
        for token in (*words.encode(one.answers[-1]), words.end):
            known[tuple(prompt)] = token
            prompt = [*prompt, token]

    def next_token(tokens, last):
        rows = [tuple(row[: n + 1]) for row, n in zip(tokens.tolist(), last.tolist(), strict=True)]
        return torch.tensor([known.get(row, 0) for row in rows])

    found = task.written(next_token)
    assert found["f1"] == found["exact_match"] == 100 and found["questions"] == 5
    assert found["cut"] == 0 and qa(length=24).written(next_token)["cut"] == 1
    assert task.written(lambda tokens, last: torch.full_like(last, words.end))["f1"] == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ""}, "qa: train: expected a file or hub: place, got ''"),
        ({"longest_answer": 64}, "qa: longest_answer: expected 1 to 63, below length, got 64"),
        ({"questions": 0}, "qa: questions: expected >= 1, or null for all, got 0"),
        ({"turns": -1}, "qa: turns: expected >= 0, got -1"),
        ({"model": "/nowhere"}, "model: no tokenizer of /nowhere: "),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        qa(**settings).test_set()
    assert "\n" not in str(caught.value)


def test_the_report_has_the_papers_figures_where_the_data_are_theirs():
    """Two runs over CoQA, and one over a file."""

    def row(test: str, kind: str, f1: float, **scores) -> dict:
        cell = make_cell(pretrained_cell("m", branch={"kind": kind}))
        cell.task["test"] = test
        missing = {} if "meteor" in scores else {"meteor": "needs WordNet"}
        found = {"questions": 9, "f1": f1, "exact_match": 1.0, "missing": missing, **scores}
        return {"cell": asdict(cell), "result": {"exact": 0.5, "token": 0.5, "written": found}}

    rows = [
        row("hub:coqa:validation", "none", 50.0),
        row("hub:coqa:validation", "resona", 61.0, bleu=20.0, rouge_l=30.0, meteor=40.0),
        row("coqa.json", "none", 70.0),
    ]
    text = report.written(report.group(rows))
    lines = [" ".join(line.split()) for line in text.splitlines()[2:]]
    assert lines[0].endswith("plain 9 - - - 50.0 1.0")
    assert lines[1] == "paper Mamba plain 35.5 73.0 49.3 60.6 -"
    assert lines[2].endswith("+ Resona 9 20.0 30.0 40.0 61.0 1.0")
    assert lines[3] == "paper Mamba + Resona 44.3 75.0 52.2 61.2 -"
    assert lines[4].endswith("plain 9 - - - 70.0 1.0")
    assert lines[5:] == ["METEOR: needs WordNet"]


# --- models ---------------------------------------------------------------------------------------


def run_grid(tmp_path, capsys, defaults: dict, cells: list[dict]) -> list[dict]:
    """The results; the report has been printed and is `capsys`'s."""
    path, output = tmp_path / "answers.json", tmp_path / "answers.jsonl"
    grid = {"suite": "answers", "about": "a test", "defaults": defaults, "cells": cells}
    path.write_text(json.dumps(grid))
    assert cli.main(["run", str(path), "--output", str(output)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["report", str(output)]) == 0
    return [row["result"] for row in store.read(output)[1]]


def test_a_backbone_learns_the_answers_by_heart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "BUILD", tmp_path)
    training = {"examples": None, "steps": 40, "batch": 8, "held_out": 5, "evaluate_every": 20}
    defaults = {
        "task": {"name": "qa", "vocabulary": 120, "length": 64, "longest_answer": 8}
        | {"train": SQUAD, "test": SQUAD},
        "backbone": "baseconv",
        "width": 32,
        "training": training,
    }
    branches = [{"branch": [{"kind": "none"}, {"kind": "resona"}], "training": {}}]
    for result in run_grid(tmp_path, capsys, defaults, branches):
        assert result["written"]["f1"] > 80 and result["written"]["questions"] == 5
    out = capsys.readouterr().out
    assert "Written answers, per cent" in out and "qa: exact sequences" in out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    """A folder with a small Mamba-2 of random weights and a tokenizer of words."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers 5.23 wants Python >= 3.11", exc_type=ImportError
    )
    from small_models import make_model
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Words([FERRY, *(text for asked in read_questions(SQUAD) for text in asked.answers)], 61)
    made = Tokenizer(models.WordLevel(words.ids, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unknown>", eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    make_model().save_pretrained(folder)
    return str(folder)


def pretrained_cell(folder: str, **changes) -> dict:
    task = {"vocabulary": 61, "length": 48, "longest_answer": 4, "train": SQUAD, "test": SQUAD}
    training = {"examples": None, "steps": 2, "batch": 2, "held_out": 2, "learning_rate": 1e-3}
    return {
        "task": {"name": "qa", "model": folder, **task},
        "backbone": "pretrained",
        "training": training,
        **changes,
    }


def test_a_pretrained_model_starts_the_same_with_and_without_resona(
    pretrained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cli, "BUILD", tmp_path)
    options = {"chunk_size": 4, "top_k": 2}
    resona = {"kind": "resona", "layer": ["0,1,2", "spread"], "options": options}
    defaults = pretrained_cell(pretrained)
    stop = {"training": {"stop_at": 0.0}}
    cells = [{"branch": [{"kind": "none"}, resona], **stop}]
    plain, *others = run_grid(tmp_path, capsys, defaults, cells)
    assert plain["steps"] == 0 and plain["branch_parameters"] == 0
    assert plain["source"] == "transformers"
    for other in others:
        assert other["branch_parameters"] == 3 * 4 * 32**2
        for name in ("token", "exact", "macro", "perplexity", "written"):
            assert other[name] == plain[name]
    assert "pretrained" in capsys.readouterr().out


def test_branches_have_a_rate_of_their_own(pretrained, tmp_path):
    from benchmarks.recall.train import Run

    cell = pretrained_cell(pretrained, branch={"kind": "resona", "options": {"chunk_size": 4}})
    cell["training"] |= {"branch_rate": 1e-2, "weight_decay": 0.0, "learning_rate": 0.0}
    run = Run(make_cell(cell), tmp_path)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("resona" in name for name in changed)


def test_writing_equals_the_models_own_generation(pretrained, tmp_path):
    from benchmarks.recall.train import Run

    run = Run(make_cell(pretrained_cell(pretrained)), tmp_path)
    prompts = [[5, 6, 7, 8, 9], [12, 11]]
    written = write(prompts, run._next_token, 6, end=1)
    for prompt, got in zip(prompts, written, strict=True):
        ids = torch.tensor([prompt])
        said = run.model.model.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        expected = said[0, len(prompt) :].tolist()
        assert got == expected[: expected.index(1) if 1 in expected else 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "mqar"}}, "backbone: pretrained: expected a qa task with task.model"),
        ({"branch": {"kind": "mlp"}}, "expected none or resona in a pretrained model, got mlp"),
        ({"branch": {"kind": "resona", "layer": "0,x"}}, "branch.layer: expected .*, got 0,x"),
    ],
)
def test_what_a_pretrained_model_cannot_be(changes, message):
    with pytest.raises(CliError, match=message):
        make_cell(pretrained_cell("somewhere", **changes))


def test_the_vocabulary_is_the_models(pretrained, tmp_path):
    from benchmarks.recall.train import Run

    cell = pretrained_cell(pretrained)
    cell["task"]["vocabulary"] = 70
    with pytest.raises(ValueError, match=r"task.vocabulary: expected 61, that of .*, got 70"):
        Run(make_cell(cell), tmp_path)
