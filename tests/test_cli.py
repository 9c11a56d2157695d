"""The command line: what the demo computes, and what every command says when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from resona_ext import cli
from resona_ext.cli import machine, progress
from resona_ext.cli.demo import document, embedding, mqar, plot, recurrence, timing, training

SMALL = mqar.Task(vocabulary=256, length=64, pairs=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- MQAR data ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_batch() -> mqar.Batch:
    return mqar.generate(SMALL, 20_000, seeded())


def test_mqar_context_is_distinct_keys_and_values(small_batch):
    context = small_batch.tokens[:, : 2 * SMALL.pairs]
    keys, values = context[:, 0::2], context[:, 1::2]
    half = SMALL.vocabulary // 2
    assert keys.min() == 1 and keys.max() == half - 1
    assert values.min() == half and values.max() == SMALL.vocabulary - 1
    for drawn in (keys, values):
        assert (drawn.sort(dim=1).values.diff(dim=1) > 0).all()


def test_mqar_queries_each_key_once_in_an_even_slot(small_batch):
    context = 2 * SMALL.pairs
    tail = small_batch.tokens[:, context:]
    row, position = tail.nonzero(as_tuple=True)
    assert (position % 2 == 0).all()
    asked = tail[row, position].view(-1, SMALL.pairs)
    keys = small_batch.tokens[:, 0:context:2]
    assert torch.equal(asked.sort(dim=1).values, keys.sort(dim=1).values)


def test_mqar_labels_are_the_values_at_the_queries_only(small_batch):
    context = 2 * SMALL.pairs
    row, position = small_batch.wanted.nonzero(as_tuple=True)
    assert torch.equal(row.bincount(), torch.full((20_000,), SMALL.pairs))
    assert (position >= context).all()
    asked = small_batch.tokens[row, position]
    pair = (small_batch.tokens[row, 0:context:2] == asked[:, None]).int().argmax(dim=1)
    assert torch.equal(
        small_batch.labels[row, position],
        small_batch.tokens[row, 1:context:2][range(len(row)), pair],
    )


def test_mqar_first_drawn_slot_follows_the_power_law(small_batch):
    """Independently of the module: p(g) ~ a (g + 1)^(a - 1), which at L = 64 has p(0) near 0.25."""
    context = 2 * SMALL.pairs
    first_key = small_batch.tokens[:, :1]
    slot = (small_batch.tokens[:, context:] == first_key).int().argmax(dim=1) // 2
    slots = (SMALL.length - context) // 2
    expected = np.array([0.01 * (g + 1) ** (0.01 - 1) for g in range(slots)])
    expected /= expected.sum()
    assert expected[0] == pytest.approx(0.25, abs=0.01)
    seen = slot.bincount(minlength=slots).numpy() / len(slot)
    assert np.all(np.abs(seen - expected) < 5 * np.sqrt(expected * (1 - expected) / len(slot)))
    assert slot.median() == 3


def test_mqar_later_draws_avoid_taken_slots():
    """With as many keys as slots every slot is used: drawing is without replacement."""
    task = mqar.Task(vocabulary=64, length=16, pairs=4)
    batch = mqar.generate(task, 100, seeded())
    assert (batch.tokens[:, 8::2] != mqar.FILLER).all()


def test_mqar_follows_its_seed():
    first, again, other = (mqar.generate(SMALL, 8, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (SMALL._replace(length=63), "length must be even, got 63"),
        (SMALL._replace(vocabulary=64), "vocabulary must exceed length 64, got 64"),
        (SMALL._replace(pairs=17), "pairs must be 1 to length / 4 = 16, got 17"),
        (SMALL._replace(pairs=0), "pairs must be 1 to length / 4 = 16, got 0"),
    ],
)
def test_mqar_names_the_broken_constraint(task, message):
    with pytest.raises(ValueError, match=message):
        mqar.generate(task, 1, seeded())


# --- The models -----------------------------------------------------------------------------------


def test_parallel_recurrence_equals_its_steps():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 17, 5, dtype=torch.float64)
    log_decay = torch.nn.functional.logsigmoid(torch.randn(2, 3, 17, dtype=torch.float64))
    state = torch.zeros(2, 3, 5, 5, dtype=torch.float64)
    steps = []
    for t in range(17):
        state = log_decay[..., t, None, None].exp() * state
        state = state + key[..., t, :, None] * value[..., t, None, :]
        steps.append((query[..., t, None, :] @ state)[..., 0, :])
    parallel = recurrence.linear_recurrence(query, key, value, log_decay)
    torch.testing.assert_close(parallel, torch.stack(steps, dim=2))


TINY = training.Recipe(
    task=mqar.Task(vocabulary=64, length=32, pairs=4),
    width=32,
    batch=32,
    steps=60,
    curve_examples=50,
    test_examples=200,
)


@pytest.mark.parametrize("augmented", [False, True])
def test_models_never_read_the_future(augmented):
    model = training.build(TINY, augmented, seed=0)
    tokens = mqar.generate(TINY.task, 4, seeded()).tokens
    changed = tokens.clone()
    changed[:, 20:] = 5
    wanted = torch.ones_like(tokens, dtype=torch.bool)
    before, after = (model(x, wanted).view(4, 32, -1) for x in (tokens, changed))
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_both_models_start_from_the_same_backbone():
    plain = training.build(TINY, False, seed=3).state_dict()
    augmented = training.build(TINY, True, seed=3).state_dict()
    assert all(torch.equal(augmented[name], weight) for name, weight in plain.items())
    assert any(name.startswith("resona.") for name in augmented)


def test_resona_recalls_where_the_plain_model_does_not():
    plain, augmented = training.compare(TINY, seed=0)
    assert augmented.final.token > 0.9
    assert augmented.final.token > plain.final.token + 0.3
    assert augmented.final.exact <= augmented.final.token
    assert augmented.steps == plain.steps == [*range(0, 60, 10), 60]


def test_accuracy_counts_tokens_and_whole_sequences():
    """A model that answers all but the last query of the second of two sequences."""
    batch = mqar.generate(SMALL, 2, seeded())
    answers = batch.labels[batch.wanted].clone()
    answers[-1] = 0

    def model(tokens, wanted):
        return torch.nn.functional.one_hot(answers, SMALL.vocabulary).float()

    assert training.evaluate(model, batch) == (7 / 8, 1 / 2)


# --- The document ---------------------------------------------------------------------------------

SEA = "the harbour pilot steered a heavy ship past rocks while sailors hauled wet ropes and sails"
BREAD = "the baker kneaded warm dough with flour and yeast before loaves rose inside a stone oven"


def two_topics() -> document.Document:
    """Forty passages of sixteen words that alternate irregularly between two topics."""
    shuffle = np.random.default_rng(0)
    topics = shuffle.integers(0, 2, size=40)
    text, sections = "", []
    for topic in topics:
        words = (SEA, BREAD)[topic].split()
        sections.append((len(text), ("sea", "bread")[topic]))
        text += " ".join(shuffle.permutation(words)) + " "
    return document.Document("two topics", text, sections)


def test_retrieval_brings_passages_of_the_same_topic():
    found = document.retrieve_passages(two_topics(), passage_words=16, top_k=2)
    share, chance = document.same_section_share(found)
    assert chance < 0.65
    assert share > 0.9  # the first passage of a topic has none of its own to find


def test_retrieved_passages_lie_in_the_past_and_are_the_nearest():
    tested = two_topics()
    found = document.retrieve_passages(tested, passage_words=16, top_k=2)
    words = tested.text.split()
    means = embedding.embed_words(words, 16).reshape(40, 16, -1).mean(axis=1)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert found.indices[0].tolist() == [-1, -1] and found.indices[1].tolist() == [0, -1]
    for j in range(2, 40):
        best = np.sort(unit[:j] @ unit[j])[::-1][:2]
        assert (found.indices[j] < j).all()
        np.testing.assert_allclose(found.scores[j].numpy(), best, atol=1e-5)


def test_ppmi_matches_its_definition():
    words = list("abacbdaacddb")
    ids, size = embedding._vocabulary_ids(words)
    count = np.zeros((size, size))
    for i in range(len(words)):
        for j in range(len(words)):
            if i != j and abs(i - j) <= embedding.WINDOW:
                count[ids[i], ids[j]] += 1
    joint = count / count.sum()
    marginal = joint.sum(axis=1)
    with np.errstate(divide="ignore"):
        expected = np.maximum(np.log(joint / np.outer(marginal, marginal)), 0)
    np.testing.assert_allclose(embedding._ppmi(ids, size), expected, atol=1e-5)


def test_factor_reconstructs_a_positive_low_rank_matrix():
    basis = np.random.default_rng(0).standard_normal((50, 6))
    matrix = basis @ basis.T
    vectors = embedding._factor(matrix, dim=8, seed=0)
    assert vectors.shape == (50, 8)
    np.testing.assert_allclose(vectors @ vectors.T, matrix, atol=1e-6)


def test_words_found_everywhere_weigh_less():
    words = two_topics().text.split()
    length = dict(zip(words, np.linalg.norm(embedding.embed_words(words, 16), axis=1), strict=True))
    assert length["the"] < 0.1 * length["harbour"]


@pytest.mark.parametrize("text", ["word " * 400, "".join(f"w{i} " for i in range(400))])
def test_degenerate_documents_run(text):
    """One word repeated has zero vectors; words that all differ share no company."""
    found = document.retrieve_passages(document.Document("odd", text, []))
    assert torch.isfinite(found.scores[3]).all()
    assert document.same_section_share(found) is None


def test_passages_are_the_text_and_know_their_section():
    found = document.retrieve_passages(two_topics(), passage_words=16)
    assert sorted(found.passages[0].text.split()) in (sorted(SEA.split()), sorted(BREAD.split()))
    topic = {"sea": SEA, "bread": BREAD}
    for passage in found.passages:
        assert set(passage.text.split()) == set(topic[passage.section].split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 words; the document part needs at least 256"),
        (b"too short", "has 2 words"),
        (b"caf\xe9 " * 500, "is not UTF-8 text"),
        (None, "cannot read"),
    ],
)
def test_bad_documents_give_one_line_and_status_2(tmp_path, capsys, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["demo", "--only", "document", "--text", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1


def test_document_part_prints_passages_with_scores(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(two_topics().text, encoding="utf-8")
    assert cli.main(["demo", "--only", "document", "--text", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "640 words make 10 passages" in printed
    assert "0.9" in printed or "1.000" in printed
    assert max(map(len, printed.splitlines())) <= 110


# --- Timing and the plot --------------------------------------------------------------------------

TINY_SHAPE = timing.Shape(heads=2, head_dim=8, retrieval_dim=8, chunk_size=4, top_k=2)


def test_timing_measures_each_length_in_order():
    rows = list(timing.measure((64, 128), shape=TINY_SHAPE, max_calls=3))
    assert [row.length for row in rows] == [64, 128]
    for row in rows:
        assert row.calls == 3 and row.warmed and row.dtype == "float32"
        assert row.operator_seconds > 0 and row.attention_seconds > 0
        assert row.ratio == row.attention_seconds / row.operator_seconds


def test_timing_stays_within_its_budget():
    """With no time to spend each length gets one timed call and no other."""
    budget = {"seconds_per_length": 0.0, "untimed_limit": 0.0}
    rows = list(timing.measure((64, 128, 256), shape=TINY_SHAPE, **budget))
    assert [row.calls for row in rows] == [1, 1, 1]
    assert not any(row.warmed for row in rows)


def test_timing_calls_compute_what_they_are_named_for():
    operator_call, attention_call = timing._calls(32, torch.float32, TINY_SHAPE, seed=0)
    assert operator_call().shape == (1, 32, 2, 8)
    assert attention_call().shape == (1, 2, 32, 8)
    assert (operator_call()[:, :4] == 0).all() and (operator_call()[:, 4:] != 0).any()


def test_plot_draws_the_panels_that_have_data(tmp_path):
    rows = [timing.Row(n, "float32", n * 1e-6, n * n * 1e-8, 3, True) for n in (64, 128)]
    half = training.Accuracy(0.5, 0.1)
    results = [training.Result(name, 10, [0, 5], [half, half], half) for name in ("a", "b")]
    sizes = []
    for drawn_results, drawn_rows in ((results, rows), ([], rows), (results, [])):
        plot.save(tmp_path / "plot.png", drawn_results, drawn_rows, "")
        content = (tmp_path / "plot.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        sizes.append(int.from_bytes(content[16:20], "big"))  # the width, from the header
    assert sizes[1] == sizes[2] == sizes[0] // 2


def test_missing_matplotlib_skips_only_the_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "QUICK_LENGTHS", (64, 128))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output = tmp_path / "plot.png"
    assert cli.main(["demo", "--quick", "--only", "timing", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "matplotlib is not installed" in printed and "bfloat16" in printed
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mqar", "--text", "x"], "--text belongs to the document part"),
        (["--output", "no/such/folder/x.png"], "its directory does not exist"),
        (["--output", "."], "is a directory"),
    ],
)
def test_demo_refuses_bad_arguments_before_any_work(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(training, "compare", lambda *_: pytest.fail("work began"))
    assert cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_demo_quick_end_to_end(tmp_path):
    output = tmp_path / "demo.png"
    command = [sys.executable, "-m", "resona_ext", "demo", "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    for part in ("token accuracy", "Table 9", "passage", "SDPA / Resona", "8,192"):
        assert part in done.stdout
    assert "4/4" in done.stderr  # the progress bar, as lines where there is no terminal
    assert output.stat().st_size > 10_000


# --- info, explain and the small parts ------------------------------------------------------------


def test_info_json_parses_and_holds_the_facts(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"package", "build", "cuda", "machine"}
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert facts["build"] == json.loads(torch.ops.resona._build_info())
    assert "resona" in facts["package"]["library"]


def test_info_prints_every_fact(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for fact in (
        machine.cpu_model(),
        torch.__version__,
        *json.loads(torch.ops.resona._build_info()),
    ):
        assert fact in printed


def test_info_needs_torch_alone():
    """numpy and matplotlib are the demo's, which says so."""
    code = (
        "import sys, importlib.util; sys.modules.update(numpy=None, matplotlib=None)\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'numpy' else real(name, *a)\n"
        "from resona_ext import cli\n"
        "assert cli.main(['info']) == 0\n"
        "sys.exit(cli.main(['demo', '--only', 'document']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "torch" in done.stdout
    assert 'the document part needs numpy: pip install "resona_ext[demo]"' in done.stderr


class FakePlan(types.SimpleNamespace):
    """What resona_ext._C.plan returns, as far as the table needs it."""


@pytest.fixture
def fake_extension(monkeypatch):
    asked = {}

    def plan(**problem):
        asked.update(problem)
        if problem["top_k"] < 1:
            raise ValueError("plan: top_k must be at least 1, got 0")
        stage = types.SimpleNamespace(
            name="search",
            kernel="cpu_search",
            reason="one kernel for every problem",
            parameters={"tile": 64, "rows": 4096},
        )
        return FakePlan(stages=[stage], workspace_bytes=3 * 2**20)

    module = types.ModuleType("resona_ext._C")
    module.plan = plan
    monkeypatch.setitem(sys.modules, "resona_ext._C", module)
    return asked


def test_explain_prints_the_plan(fake_extension, capsys):
    command = "explain --queries 128 --heads 8 --kv-heads 2 --top-k 3 --dtype bfloat16 --threads 5"
    command += " --isa amx"
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr().out
    for part in (
        "search",
        "cpu_search",
        "tile 64, rows 4,096",
        "one kernel",
        "3,145,728",
        "3.0 MiB",
    ):
        assert part in printed
    assert fake_extension == {
        "batch": 1,
        "queries": 128,
        "context": 128,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "retrieval_heads": 1,
        "retrieval_dim": 64,
        "chunk_size": 64,
        "top_k": 3,
        "threads": 5,
        "dtype": "bfloat16",
        "embedding_dtype": "bfloat16",
        "device": "cpu",
        "isa": "amx",
    }


def test_explain_reports_an_illegal_problem(fake_extension, capsys):
    assert cli.main(["explain", "--top-k", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ("resona_ext explain: error: plan: top_k must be at least 1, got 0\n")
    assert captured.out == ""


def test_explain_without_the_extension_says_how_to_build_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resona_ext._C", None)
    assert cli.main(["explain"]) == 2
    error = capsys.readouterr().err
    assert "resona_ext._C" in error and "pip install" in error


def test_explain_with_the_real_extension(capsys):
    pytest.importorskip("resona_ext._C")
    assert cli.main(["explain", "--queries", "4096", "--threads", "2"]) == 0
    printed = capsys.readouterr().out
    assert "queries 4096" in printed and "workspace" in printed and "search" in printed
    here = json.loads(torch.ops.resona._build_info())["cpu_isa"]
    assert cli.main(["explain", "--dtype", "bfloat16"]) == 0
    assert ("chunk_stationary_tiles" in capsys.readouterr().out) == (here in ("amx", "avx512_bf16"))
    assert cli.main(["explain", "--head-dim", "257"]) == 2
    assert "head_dim" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["9223372036854775808", "1.5", "many"])
def test_explain_sizes_are_64_bit_integers(value, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["explain", "--queries", value])
    assert exit_info.value.code == 2
    assert "--queries: invalid 64-bit integer value" in capsys.readouterr().err


def test_progress_bar_draws_in_place_on_a_terminal():
    class Terminal:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    bar = progress.ProgressBar("work", 4, terminal)
    for done, note in ((1, "a long note"), (2, ""), (4, "")):
        bar.update(done, note)
    drawn = terminal.text.split("\r")[1:]
    assert len(drawn) == 3 and drawn[2].endswith("\n")
    assert "[######..................] 1/4" in drawn[0] and "[" + "#" * 24 + "]" in drawn[2]
    assert len(drawn[1]) >= len(drawn[0])  # the long note is overwritten
