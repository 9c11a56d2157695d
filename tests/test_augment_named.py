"""`augment` on a model that nothing is known of, by the names of its mixers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resona_ext.integrations import augment, load_resona, save_resona

WIDTH, VOCABULARY = 16, 23


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


class Recurrence(nn.GRU):
    """A mixer that returns a tuple and can go on from where it stopped."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH, batch_first=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mixers = nn.Sequential(*(Recurrence() for _ in range(3)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, states=(None, None, None), attention_mask=None):
        hidden, new = self.embed(ids), []
        for mixer, state in zip(self.mixers, states, strict=True):
            y, state = mixer(hidden, state)
            hidden, new = hidden + y, [*new, state]
        return self.head(hidden), new


def augmented(**settings):
    torch.manual_seed(0)
    model = Model()
    augmentation = augment(model, ["mixers.0", "mixers.2"], chunk_size=4, top_k=2, **settings)
    with torch.no_grad():
        for layer in augmentation.layers.values():
            layer.o_proj.weight.normal_(std=0.5)
    return model, augmentation


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length))


def test_there_and_back():
    torch.manual_seed(0)
    plain, ids = Model(), tokens()
    model, augmentation = augmented()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert list(augmentation.layers) == ["mixers.0", "mixers.2"] and len(model.mixers) == 3
    assert not torch.equal(model(ids)[0], plain(ids)[0])
    augmentation.set(alpha=0.0)
    assert torch.equal(model(ids)[0], plain(ids)[0])
    augmentation.remove()
    assert list(model.state_dict()) == list(plain.state_dict()) and dir(model) == dir(plain)
    assert torch.equal(model(ids)[0], plain(ids)[0])


def test_steps_with_a_cache_from_outside():
    model, augmentation = augmented()
    ids = tokens()
    with torch.no_grad():
        full, _ = model(ids)
        states, parts = (None, None, None), []
        with augmentation.use_cache(augmentation.make_cache()) as cache:
            for begin, end in itertools.pairwise([0, 7, *range(8, 21)]):
                part, states = model(ids[:, begin:end], states)
                parts.append(part)
            assert cache.get_seq_length() == 20
        torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)
        assert torch.equal(model(ids)[0], full)


def test_left_padding():
    model, _ = augmented()
    layer = model.resona_layers[0]
    seen = []
    layer.register_forward_hook(lambda _, a, k, out: seen.append((k, out)), with_kwargs=True)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    model(tokens(), attention_mask=mask)
    assert torch.equal(seen[0][0]["attention_mask"], mask)


def test_saved_and_loaded(tmp_path):
    model, _ = augmented()
    ids = tokens()
    save_resona(model, tmp_path / "r.safetensors")
    twin = Model()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "resona" not in k})
    load_resona(twin, tmp_path / "r.safetensors")
    assert torch.equal(model(ids)[0], twin(ids)[0])


def test_the_embedding_by_name_or_module():
    for embedding in ("embed", None):
        model = Model()
        assert augment(model, "mixers.1", embedding=embedding).layout.embedding is model.embed
    model = Model()
    augment(model, "mixers.1", embedding=model.embed)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_attention_model_of_transformers(num_beams):
    """Its cache comes as `past_key_values`, and holds the retrieval caches too."""
    transformers = pytest.importorskip("transformers", reason="it wants Python >= 3.11")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    config = transformers.LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    augmentation = augment(model, ["model.layers.1.self_attn"], chunk_size=4, top_k=2)
    ids = torch.randint(1, VOCABULARY, (2, 9))
    settings = {"max_new_tokens": 10, "do_sample": False, "num_beams": num_beams}
    plain = model.generate(ids, **settings)
    with torch.no_grad():
        augmentation.layers["model.layers.1.self_attn"].o_proj.weight.normal_(std=0.5)
    got = model.generate(ids, **settings)
    assert torch.equal(got, model.generate(ids, use_cache=False, **settings))
    assert not torch.equal(got, plain)
    augmentation.remove()
    assert torch.equal(model.generate(ids, **settings), plain)


# --- Two processes --------------------------------------------------------------------------------


def gradients(model, ids):
    model.zero_grad()
    model(ids)[0].logsumexp(-1).mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def worker(rank: int, path: str, batches: list, expected: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=2)
    try:
        got = gradients(DistributedDataParallel(augmented()[0]), batches[rank])
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, msg=name)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_with_two_processes_equals_one_large_batch(tmp_path):
    ids = tokens(batch=4)
    model, _ = augmented()
    expected = {k: g for k, g in gradients(model, ids).items() if g is not None}
    assert any("resona_layers" in name for name in expected)
    arguments = (str(tmp_path), [ids[:2], ids[2:]], expected)
    torch.multiprocessing.spawn(worker, arguments, nprocs=2)
