"""The recall tasks: every batch obeys its description, and its statistics are those described."""

from __future__ import annotations

import pytest
import torch

from benchmarks.recall import tasks
from benchmarks.recall.tasks import IGNORED, TASKS, make_task
from benchmarks.recall.tasks.base import first_occurrence
from benchmarks.recall.tasks.niah import score

SETTINGS = [
    {"name": "mqar"},
    {"name": "mqar", "length": 16, "pairs": 4, "vocabulary": 64, "random_non_queries": True},
    *({"name": task.name} for task in tasks.MAD),
    {"name": "noisy-recall", "frac_noise": 0.8, "length": 32},
    {"name": "fuzzy-recall", "motif": 2, "length": 40, "vocabulary": 12},
    {"name": "copying"},
    {"name": "copying", "distinct": True, "shortest": 4, "length": 10},
    {"name": "niah"},
    {"name": "niah", "needles": 3, "values": 2, "length": 64},
    {"name": "niah", "depth": 1.0, "length": 40},
    {"name": "niah", "context": "appended", "length": 40},
    {"name": "niah", "context": "retrieved", "rag_chunk": 6, "rag_chunks": 3},
    {"name": "set-disjointness"},
    {"name": "set-disjointness", "first": 9, "second": 3, "vocabulary": 16},
]


def generator(state: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(state)


def draw(examples: int = 256, test: bool = False, **settings) -> tasks.Batch:
    return make_task(settings).generate(examples, generator(), test)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("test", [False, True])
def test_batches_have_their_shape_and_range(settings, test):
    task = make_task(settings)
    batch = task.generate(20, generator(), test)
    for tensor in batch:
        assert tensor.shape == (20, task.width) and tensor.dtype == torch.int64
    assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocabulary
    wanted = batch.labels != IGNORED
    assert wanted.any(dim=1).all()
    assert (batch.labels[wanted] >= 0).all() and (batch.labels[wanted] < task.vocabulary).all()
    torch.testing.assert_close(batch.targets[wanted], batch.labels[wanted])


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("text", "qa")])
def test_the_generator_alone_decides(name):
    task = make_task({"name": name})
    first, again, other = (task.generate(8, generator(state)) for state in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.tokens, other.tokens)


def test_first_occurrence_is_that_of_a_loop():
    code = torch.randint(0, 6, (50, 20), generator=generator())
    expected = [[row.index(c) for c in row] for row in code.tolist()]
    assert first_occurrence(code).tolist() == expected


def test_mqar_filler_may_be_random():
    plain, noisy = (
        draw(name="mqar", length=64, vocabulary=128, random_non_queries=noise)
        for noise in (False, True)
    )
    assert torch.equal(plain.labels, noisy.labels)
    filler = plain.tokens == 0
    assert torch.equal(plain.tokens[~filler], noisy.tokens[~filler])
    mean = noisy.tokens[filler].double().mean().item()
    assert mean == pytest.approx(63.5, abs=1.5)  # 12,288 draws, standard error 0.33


def test_in_context_recall_asks_for_values_of_keys_seen():
    batch = draw(name="in-context-recall")
    for tokens, labels, targets in zip(*(x.tolist() for x in batch), strict=True):
        sequence = [*tokens, targets[-1]]
        value_of = {}
        for i in range(0, len(sequence), 2):
            key, value = sequence[i : i + 2]
            assert key < 8 <= value
            assert labels[i] == (value if key in value_of else IGNORED)
            assert value_of.setdefault(key, value) == value
            if i:
                assert labels[i - 1] == IGNORED
        assert labels[-1] == sequence[-1]
        assert tokens[1:] == targets[:-1]


def test_the_probe_of_in_context_recall_is_uniform_over_the_keys_seen():
    """Not over the pairs: a key that stands there three times is as likely as one that does once."""
    batch = draw(20_000, name="in-context-recall", vocabulary=4, length=8)
    keys, probe = batch.tokens[:, 0:6:2], batch.tokens[:, 6]
    twice_zero = (keys == 0).sum(dim=1) == 2
    share = (probe[twice_zero] == 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=0.025)  # by pairs it would be 2 / 3


@pytest.mark.parametrize("frac", [0.2, 0.8])
def test_noise_replaces_whole_pairs(frac):
    batch = draw(2000, name="noisy-recall", frac_noise=frac)
    pairs = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1).unflatten(1, (-1, 2))
    is_noise = pairs >= 16
    assert torch.equal(is_noise[..., 0], is_noise[..., 1])
    assert (~is_noise[:, :-1, 0]).any(dim=1).all() and not is_noise[:, -1].any()
    share = is_noise[:, :-1, 0].double().mean().item()
    assert share == pytest.approx(frac * (1 - 1 / 63), abs=0.01)
    assert (batch.labels[:, 0::2][is_noise[..., 0]] == IGNORED).all()
    for row, labels in zip(pairs.tolist(), batch.labels[:, 0::2].tolist(), strict=True):
        value_of = {}
        for (key, value), label in zip(row, labels, strict=True):
            if key < 16:
                assert label == (value if key in value_of else IGNORED)
                assert value_of.setdefault(key, value) == value


def motifs(row: list[int], boundary: int, pad: int) -> list[tuple[tuple, tuple, int]]:
    """The pairs of a row of fuzzy recall, and where the value of each starts."""
    found, i = [], 0
    while row[i] == pad:
        i += 1
    while i < len(row):
        begin = i
        while row[i] < boundary:
            i += 1
        middle = i
        while i < len(row) and boundary <= row[i] < pad:
            i += 1
        found.append((tuple(row[begin:middle]), tuple(row[middle:i]), middle))
    return found


@pytest.mark.parametrize("test", [False, True])
def test_fuzzy_recall_asks_for_values_of_motifs_seen(test):
    task = make_task({"name": "fuzzy-recall"})
    batch = task.generate(300, generator(), test)
    sizes = []
    for tokens, labels, targets in zip(*(x.tolist() for x in batch), strict=True):
        # The first token is padding: no row is full.
        pairs = motifs([*tokens, targets[-1]], 7, 15)
        value_of, wanted = {}, [IGNORED] * len(labels)
        for key, value, start in pairs:
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            if key in value_of:
                wanted[start - 1 : start - 1 + len(value)] = value
            assert value_of.setdefault(key, value) == value
        assert labels == wanted
        assert pairs[-1][0] in [key for key, _, _ in pairs[:-1]]
        assert sum(len(k) + len(v) for k, v, _ in pairs) > 128 - 3 * 6
        sizes += [len(key) for key, _, _ in pairs]
    share = torch.bincount(torch.tensor(sizes), minlength=4)[1:] / len(sizes)
    expected = [0, 0, 1] if test else [1 / 3] * 3
    torch.testing.assert_close(share, torch.tensor(expected, dtype=share.dtype), atol=0.03, rtol=0)


def test_selective_copying_keeps_the_order():
    batch = draw(2000, name="selective-copying", length=40, copies=6)
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        content = [token for token in tokens[:33] if token < 14]
        assert len(content) == 6 and tokens[32] < 14 and tokens[33] == 15
        assert tokens[34:] == [14] * 6
        assert labels == [IGNORED] * 34 + content
    # 27 blanks choose among 6 contents: the first content stands at 27 / 6 on average.
    first = (batch.tokens < 14).int().argmax(dim=1).double().mean().item()
    assert first == pytest.approx(27 / 6, abs=0.15)


def test_compression_wants_every_input():
    batch = draw(name="compression")
    assert torch.equal(batch.labels, batch.tokens)
    assert (batch.tokens[:, -1] == 15).all() and (batch.tokens[:, :-1] < 15).all()


def test_memorization_is_one_injective_map():
    train, again = draw(name="memorization"), draw(name="memorization", test=True)
    facts = {}
    for batch in (train, again):
        assert (batch.tokens[:, 1::2] == 255).all() and (batch.labels[:, 0::2] == IGNORED).all()
        keys, values = batch.tokens[:, 0::2].flatten(), batch.labels[:, 1::2].flatten()
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            assert key < 127 <= value < 255 and facts.setdefault(key, value) == value
    assert len(facts) == len(set(facts.values())) == 127


def test_copying_wants_the_string_again():
    batch = draw(3000, name="copying", length=9, shortest=2)
    sizes = []
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        n = tokens.index(1)
        sizes.append(n)
        string = tokens[:n]
        assert all(token >= 2 for token in string)
        assert tokens == [*string, 1, *string[:-1], *[0] * (18 - 2 * n)]
        assert labels == [*[IGNORED] * n, *string, *[IGNORED] * (18 - 2 * n)]
    share = torch.bincount(torch.tensor(sizes), minlength=10)[2:] / len(sizes)
    assert share.min() > 0.1 and share.max() < 0.15  # 1 / 8 each
    assert (draw(name="copying", length=9, test=True).tokens[:, 9] == 1).all()


def test_a_needle_stands_once_and_is_asked_for():
    batch = draw(2000, name="niah", needles=2, values=3, length=40, keys=5, vocabulary=32)
    starts = []
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        begins = [i for i, token in enumerate(tokens) if token == 0]
        value_of = {tokens[i + 1]: tokens[i + 2 : i + 5] for i in begins}
        assert len(begins) == len(value_of) == 2 and begins[1] - begins[0] >= 5
        assert tokens[36] == 1 and labels[:37] == [IGNORED] * 37
        assert labels[37:] == value_of[tokens[37]] and tokens[38:] == labels[37:39]
        starts.append(begins[0])
    # The lesser of two uniform gaps 0 .. 26: its mean is 8.66.
    assert sum(starts) / len(starts) == pytest.approx(8.66, abs=0.5)


@pytest.mark.parametrize(("depth", "expected"), [(0.0, 0), (0.5, 14), (1.0, 29)])
def test_depth_places_the_needle(depth, expected):
    batch = draw(8, name="niah", depth=depth, length=40)
    assert ((batch.tokens == 0).int().argmax(dim=1) == expected).all()


@pytest.mark.parametrize(("context", "width"), [("appended", 48), ("retrieved", 13)])
def test_rag_shows_the_chunk_of_the_key(context, width):
    """Rows whose needle lies in one chunk; the question with its answers stays at the end."""
    settings = {"name": "niah", "length": 40, "depth": 0.0, "keys": 5, "vocabulary": 32}
    whole, made = draw(50, **settings), draw(50, **settings, context=context)
    assert made.tokens.shape == made.labels.shape == (50, width)
    assert torch.equal(made.tokens[:, -5:], whole.tokens[:, -5:])
    assert torch.equal(made.labels[:, -5:], whole.labels[:, -5:])
    assert (made.labels[:, :-5] == IGNORED).all()
    assert torch.equal(made.tokens[:, -13:-5], whole.tokens[:, :8])
    if context == "appended":
        assert torch.equal(made.tokens[:, :35], whole.tokens[:, :35])


def test_rag_keeps_the_order_of_several_chunks():
    settings = {"name": "niah", "length": 40, "keys": 5, "vocabulary": 32, "rag_chunks": 4}
    made = draw(50, **settings, context="retrieved")
    assert torch.equal(made.tokens[:, :32], draw(50, **settings).tokens[:, :32])  # all there are


@pytest.mark.parametrize(("first", "second"), [(3, 7), (7, 3)])
def test_two_lists_share_the_one_token_that_is_wanted(first, second):
    batch = draw(6000, name="set-disjointness", first=first, second=second, vocabulary=24)
    assert (batch.labels[:, :-1] == IGNORED).all() and torch.equal(batch.labels, batch.targets)
    shared = batch.labels[:, -1:]
    marks = batch.tokens[:, [0, first + 1, first + second + 2]]
    assert torch.equal(marks, torch.tensor([1, 2, 3]).expand_as(marks))
    lists = batch.tokens[:, 1 : first + 1], batch.tokens[:, first + 2 : -1]
    for part in lists:
        assert (part.sort(dim=1).values.diff(dim=1) > 0).all()  # no token twice in a list
        place = (part == shared).double()
        assert (place.sum(dim=1) == 1).all()
        size = part.shape[1]
        assert place.mean(dim=0).tolist() == pytest.approx([1 / size] * size, abs=0.025)
    common = (lists[0].unsqueeze(2) == lists[1].unsqueeze(1)).sum(dim=(1, 2))
    assert (common == 1).all()
    share = torch.bincount(shared.flatten(), minlength=24)[4:].double() / len(shared)
    assert share.tolist() == pytest.approx([1 / 20] * 20, abs=0.012)  # four standard errors


@pytest.mark.parametrize(
    ("response", "needle", "expected"),
    [
        ("the needle is here", "needle", 5.0),
        ("needle", "needle", 5.0),
        ("the need is here", "needle", 5 * 4 / 6),
        ("eedle", "needle", 0.0),  # a prefix counts, not any part
        ("nope, needl", "needle", 5 * 5 / 6),
        ("", "needle", 0.0),
    ],
)
def test_score(response, needle, expected):
    assert score(response, needle) == pytest.approx(expected)


def test_mad_sweeps_one_variable_at_a_time():
    counts = {task.name: len(tasks.mad_settings(task.name)) for task in tasks.MAD}
    assert counts == {
        "compression": 11,
        "in-context-recall": 11,
        "noisy-recall": 14,
        "fuzzy-recall": 11,
        "selective-copying": 13,
        "memorization": 6,
    }
    for name in counts:
        for settings, _ in tasks.mad_settings(name):
            assert len(settings) <= 2
            make_task(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mqra"}, "task: expected one of mqar, .*, got 'mqra'"),
        ({"name": "mqar", "lenght": 4}, "mqar: unknown setting 'lenght', expected length, pairs"),
        ({"name": "mqar", "pairs": 17}, "mqar: pairs must be 1 to length / 4 = 16, got 17"),
        ({"name": "mqar", "vocabulary": 64}, "mqar: vocabulary must exceed length 64, got 64"),
        ({"name": "mqar", "length": 65}, "mqar: length must be even, got 65"),
        ({"name": "mqar", "power": 0}, "mqar: power: expected > 0, got 0"),
        ({"name": "in-context-recall", "length": 7}, "length: expected even, got 7"),
        ({"name": "noisy-recall", "vocabulary": 18}, "vocabulary: expected >= 20, got 18"),
        ({"name": "noisy-recall", "frac_noise": 1}, r"frac_noise: expected in \[0, 1\), got 1"),
        ({"name": "fuzzy-recall", "vocabulary": 6}, "vocabulary: expected >= 7, got 6"),
        ({"name": "fuzzy-recall", "length": 17}, "length: expected >= 18, got 17"),
        ({"name": "selective-copying", "copies": 128}, "length: expected >= 257, got 256"),
        ({"name": "compression", "vocabulary": 1}, "vocabulary: expected >= 2, got 1"),
        ({"name": "memorization", "length": 31}, "length: expected even, got 31"),
        ({"name": "copying", "shortest": 65}, "shortest: expected 1 to length = 64, got 65"),
        ({"name": "copying", "distinct": True}, "vocabulary: expected >= 66, got 28"),
        ({"name": "set-disjointness", "first": 0}, "first: expected >= 1, got 0"),
        ({"name": "set-disjointness", "vocabulary": 83}, "vocabulary: expected >= 84, got 83"),
        ({"name": "set-disjointness", "length": 80}, r"first \+ second \+ 3 = 83, got 80"),
        ({"name": "niah", "needles": 33}, "needles: expected 1 to 32, got 33"),
        ({"name": "niah", "length": 10}, "length: expected >= 11, got 10"),
        ({"name": "niah", "depth": 2}, "depth: expected None, or 0 to 1 with one needle, got 2"),
        ({"name": "niah", "context": "none"}, "context: expected one of .*, got none"),
        (
            {"name": "niah", "rag_chunks": 32},
            "rag_chunk, rag_chunks: expected chunks of at most 251",
        ),
    ],
)
def test_impossible_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_task(settings)
    assert "\n" not in str(caught.value)


def test_an_empty_needle_is_no_needle():
    with pytest.raises(ValueError, match="needle: expected at least one character"):
        score("anything", "")
