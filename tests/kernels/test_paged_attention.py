"""paged_attention and store_kv, against float64 arithmetic on dense keys and values, and torch's own float8."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import llava_kernels
from llava_kernels import varlen_attention
from llava_kernels.attention import paged, paged_attention, store_kv
from llava_kernels.attention.paged import paged_attention_reference
from llava_kernels.attention.store_kv import store_kv_reference

FP8 = torch.float8_e4m3fn
DECODE = ((1, 70), (1, 1), (1, 33))  # (queries, tokens in the cache, these queries among them)
CHUNKS = ((5, 70), (1, 33), (0, 40), (18, 50), (3, 3))

pytestmark = pytest.mark.usefixtures("triton_path")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@dataclass
class Cached:
    """Sequences in a cache whose other places hold NaN, under a table whose other entries lead nowhere."""

    q: Tensor
    keys: list[Tensor]  # (context, kv_heads, head_dim) of each sequence, as stored
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    context_lens: Tensor
    query_start: Tensor
    max_query: int
    max_context: int

    def arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.block_table, self.context_lens, self.query_start

    def attend(self, **options) -> Tensor:
        return paged_attention(*self.arguments(), max_query=self.max_query, max_context=self.max_context, **options)

    def exact(self, k_scale: float = 1.0, v_scale: float = 1.0) -> Tensor:
        parts = []
        queries = self.query_start.diff().tolist()
        for q, k, v in zip(self.q.split(queries), self.keys, self.values, strict=True):
            group = q.shape[1] // k.shape[1]
            k, v = ((x.double() * s).repeat_interleave(group, 1) for x, s in ((k, k_scale), (v, v_scale)))
            scores = torch.einsum("ihd,jhd->hij", q.double(), k) / q.shape[-1] ** 0.5
            position = len(k) - len(q) + torch.arange(len(q), device=q.device)
            unseen = torch.arange(len(k), device=q.device) > position[:, None]
            parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v))
        return torch.cat(parts)


def cached(lengths, heads, kv_heads, head_dim, page, dtype, device, stored=None) -> Cached:
    queries, contexts = zip(*lengths, strict=True)
    used = [-(-context // page) for context in contexts]
    blocks = torch.randperm(sum(used) + 3)  # scattered, and three that belong to nobody
    table = torch.full((len(lengths), max(used) + 1), 2**30, dtype=torch.int32)
    shape = (len(blocks), page, kv_heads, head_dim)
    caches = [torch.full(shape, float("nan"), device=device).to(stored or dtype) for _ in "kv"]
    dense: list[list[Tensor]] = [[], []]
    for s, context in enumerate(contexts):
        mine, blocks = blocks[: used[s]], blocks[used[s] :]
        table[s, : used[s]] = mine
        where = [(int(mine[t // page]), t % page) for t in range(context)]
        for cache, kept in zip(caches, dense, strict=True):
            x = torch.randn(context, kv_heads, head_dim, device=device).to(cache.dtype)
            for row, place in zip(bits(x), where, strict=True):
                bits(cache)[place] = row
            kept.append(x)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()])
    q = torch.randn(sum(queries), heads, head_dim, device=device).to(dtype)
    indices = (t.to(device=device, dtype=torch.int32) for t in (table, torch.tensor(contexts), starts))
    return Cached(q, *dense, *caches, *indices, max(queries), max(contexts))


def bits(x: Tensor) -> Tensor:
    """float8 cannot be indexed everywhere."""
    return x.view(torch.uint8) if x.dtype is FP8 else x


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """At most twice torch's own error, plus one rounding of 1 or of the largest value, where torch is exact."""
    assert mine.shape == torchs.shape and mine.dtype == torchs.dtype
    error, torch_error = ((a.double() - exact).abs().max().item() for a in (mine, torchs))
    assert error <= 2 * torch_error + torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("lengths", [DECODE, CHUNKS], ids=["decode", "chunks"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)], ids=["mha", "gqa"])
def test_paged_attention(heads, kv_heads, lengths, splits, dtype, device):
    case = cached(lengths, heads, kv_heads, 16, 16, dtype, device)
    torchs = paged_attention_reference(*case.arguments())
    assert_as_good_as_torch(case.attend(splits=splits), torchs, case.exact())


@pytest.mark.parametrize("page", [1, 4, 32, 64, 128])
def test_block_sizes(page, device):
    case = cached(CHUNKS, 2, 1, 16, page, torch.float32, device)
    assert_as_good_as_torch(case.attend(), paged_attention_reference(*case.arguments()), case.exact())


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_head_sizes(head_dim, splits, dtype, device):
    case = cached(((2, 35), (1, 7)), 3, 1, head_dim, 16, dtype, device)
    assert_as_good_as_torch(case.attend(splits=splits), paged_attention_reference(*case.arguments()), case.exact())


def test_many_heads_of_one_key_head(device):
    """More query heads than the smallest tile has rows."""
    case = cached(DECODE, 40, 2, 16, 16, torch.float32, device)
    assert_as_good_as_torch(case.attend(), paged_attention_reference(*case.arguments()), case.exact())


def test_more_splits_than_keys(device):
    """Splits without keys, and chunks of which some queries see nothing of a split."""
    case = cached(((1, 2), (20, 70)), 2, 2, 16, 16, torch.float32, device)
    assert_as_good_as_torch(case.attend(splits=7), paged_attention_reference(*case.arguments()), case.exact())


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("lengths", [DECODE, CHUNKS], ids=["decode", "chunks"])
def test_float8_cache(lengths, splits, dtype, device):
    case = cached(lengths, 2, 1, 16, 16, dtype, device, stored=FP8)
    scales = {"k_scale": 0.7, "v_scale": 3.0}
    torchs = paged_attention_reference(*case.arguments(), **scales)
    assert_as_good_as_torch(case.attend(splits=splits, **scales), torchs, case.exact(**scales))


def test_every_float8_number_is_read_exactly(dtype, device):
    """A sequence of one token gives its values: here all numbers of the format, subnormals too."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    numbers = torch.where(numbers % 128 == 127, 0, numbers)  # not the NaNs
    cache = numbers.view(FP8).view(1, 1, 2, 128)
    one = torch.ones(1, dtype=torch.int32, device=device)
    out = paged_attention(
        torch.randn(1, 2, 128, device=device).to(dtype), cache, cache, (one - 1).view(1, 1), one,
        torch.tensor([0, 1], dtype=torch.int32, device=device), max_query=1, max_context=1,
    )  # fmt: skip
    assert torch.equal(out.float().flatten(), cache.float().flatten())


def test_queries_beyond_float16_against_a_float8_cache(device):
    """bfloat16 reaches further than the float16 in which such products are taken; they must not become NaN."""
    if device.type == "cpu":
        pytest.skip("the interpreter is wrong in bfloat16; this needs a GPU")
    case = cached(DECODE, 2, 2, 16, 16, torch.bfloat16, device, stored=FP8)
    case.q *= 1e6
    assert case.attend().isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("splits", [1, 2])
def test_query_without_keys_gives_zeros(splits, implementation, device):
    case = cached(DECODE, 2, 2, 16, 16, torch.float32, device)
    case.context_lens[1] = 0
    with llava_kernels.implementation(implementation):
        out = case.attend(splits=splits)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out[::2], case.exact()[::2].float())


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("splits", [1, 2])
def test_queries_before_the_first_key_give_zeros(splits, implementation, device):
    """Five queries and three tokens: the first two queries would stand before the sequence."""
    case = cached(((5, 20), (1, 33)), 2, 2, 16, 16, torch.float32, device)
    case.context_lens[0] = 3
    case.keys[0], case.values[0] = case.keys[0][:3], case.values[0][:3]
    with llava_kernels.implementation(implementation):
        out = case.attend(splits=splits)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    torch.testing.assert_close(out[2:], case.exact()[2:].float())


def test_no_sequences(device):
    case = cached(DECODE, 2, 2, 16, 16, torch.float32, device)
    case.q, case.block_table, case.context_lens = case.q[:0], case.block_table[:0], case.context_lens[:0]
    case.query_start = case.query_start[:1]
    assert case.attend().shape == (0, 2, 16)


def test_strides(device):
    """q out of a merged product; keys and values side by side in one cache, as (blocks, page, 2 kv_heads, head_dim)."""
    case = cached(((5, 70), (3, 33)), 4, 2, 16, 16, torch.float32, device)
    expected = case.exact()
    case.q = torch.cat([case.q, case.q], dim=1)[:, :4]
    both = torch.cat([case.k_cache, case.v_cache], dim=2)
    case.k_cache, case.v_cache = both[:, :, :2], both[:, :, 2:]
    case.block_table = torch.cat([case.block_table, case.block_table], dim=1)[:, : case.block_table.shape[1]]
    case.context_lens, case.query_start = (
        torch.stack([x, torch.zeros_like(x)], 1)[:, 0] for x in (case.context_lens, case.query_start)
    )
    torch.testing.assert_close(case.attend(splits=2), expected.float())


def test_a_prompt_with_nothing_before_it_is_varlen_attention(device):
    case = cached(((17, 17), (40, 40)), 4, 2, 16, 16, torch.float32, device)
    expected = varlen_attention(case.q, torch.cat(case.keys), torch.cat(case.values), (17, 40))
    torch.testing.assert_close(case.attend(), expected)


@pytest.mark.parametrize(
    ("sequences", "max_query", "max_context", "splits"),
    [(64, 1, 1000, 1), (1, 1, 1000, 8), (1, 1, 100, 1), (1, 1, 100_000, 17), (8, 1, 4096, 3), (1, 512, 2048, 3)],
)
def test_splits_come_from_what_the_host_knows(sequences, max_query, max_context, splits, monkeypatch):
    """An H200 has 132 multiprocessors; 32 heads."""
    monkeypatch.setattr(paged, "processors_of", lambda device: 132)
    q = torch.empty(sequences * max_query, 32, 128, dtype=torch.bfloat16)
    assert paged._splits(q, 32, sequences, max_query, max_context) == splits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(3, 3, 16)}, "do not fit together"),
        ({"q": torch.zeros(3, 32)}, "do not fit together"),
        ({"q": torch.zeros(3, 2, 8)}, "do not fit together"),
        ({"q": torch.zeros(3, 2, 16, dtype=torch.float16)}, "both must be torch.float16"),
        ({"v_cache": torch.zeros(9, 16, 2, 16).to(FP8)}, "both must be torch.float32"),
        ({"k_cache": torch.zeros(9, 16, 2, 32)[..., ::2]}, "must be dense"),
        ({"query_start": torch.zeros(3, dtype=torch.int32)}, "they must be S and S \\+ 1"),
        ({"block_table": torch.zeros(2, 4, dtype=torch.int32)}, "they must be S and S \\+ 1"),
        ({"k_cache": torch.zeros(9, 12, 2, 16), "v_cache": torch.zeros(9, 12, 2, 16)}, "not a power of two"),
    ],
)
def test_arguments_are_checked(change, words):
    names = ("q", "k_cache", "v_cache", "block_table", "context_lens", "query_start")
    shapes = ((3, 2, 16), (9, 16, 2, 16), (9, 16, 2, 16), (3, 4), (3,), (4,))
    arguments = {
        n: torch.zeros(s, dtype=None if len(s) > 2 else torch.int32) for n, s in zip(names, shapes, strict=True)
    }
    with pytest.raises(ValueError, match=words):
        paged_attention(**arguments | change, max_query=1, max_context=64)


# store_kv


def stored(dtype, cache_dtype, device, **scales):
    """Both versions' caches after storing 9 tokens, some of them nowhere, in places that are out of order."""
    merged = (8 * torch.randn(9, 6, 16, device=device)).to(dtype)
    k, v = merged[:, 2:4], merged[:, 4:]  # not contiguous
    slots = torch.tensor([31, 0, -1, 17, 5, -1, 30, 16, 2], device=device).repeat_interleave(2)[::2]
    results = []
    for function in (store_kv, store_kv_reference):
        caches = [torch.full((4, 8, 2, 16), 7.0, device=device).to(cache_dtype) for _ in "kv"]
        function(k, v, *caches, slots, **scales)
        results.append(torch.stack([bits(c) for c in caches]))
    return k, v, slots, results


def test_store_kv(dtype, device):
    k, v, slots, (mine, torchs) = stored(dtype, dtype, device)
    expected = torch.full((2, 32, 2, 16), 7.0, device=device).to(dtype)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0, slot], expected[1, slot] = k[token], v[token]
    assert torch.equal(mine.view(expected.shape), expected)
    assert torch.equal(mine, torchs)


def test_store_kv_float8(dtype, device):
    _, _, _, (mine, torchs) = stored(dtype, FP8, device, k_scale=0.03, v_scale=1.7)
    assert torch.equal(mine, torchs)


def test_float8_rounds_to_nearest_even_and_saturates(device):
    """Every float16: all of the format's numbers, the middles between them, what is beyond, infinities and NaN."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).to(device)
    k = halves.float().view(16, 32, 128)
    caches = [torch.zeros(1, 16, 32, 128, device=device).to(FP8) for _ in "kv"]
    store_kv(k, -k, *caches, torch.arange(16, device=device))
    for cache, x in zip(caches, (k, -k), strict=True):
        expected = x.clamp(-448, 448).to(FP8)
        number = ~x.isnan()
        assert torch.equal(bits(cache)[0][number], bits(expected)[number])
        assert bits(cache)[0][~number].remainder(128).eq(127).all()


def test_store_kv_of_nothing(device):
    cache = torch.full((2, 4, 2, 16), 7.0, device=device)
    nothing = torch.zeros(0, 2, 16, device=device)
    store_kv(nothing, nothing, cache, cache.clone(), torch.zeros(0, dtype=torch.int64, device=device))
    assert (cache == 7).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": torch.zeros(3, 2, 8)}, "do not fit together"),
        ({n: torch.zeros(3, 2) for n in "kv"} | {f"{n}_cache": torch.zeros(2, 4, 2) for n in "kv"}, "do not fit"),
        ({"k_cache": torch.zeros(2, 4, 3, 16)}, "do not fit together"),
        ({"k_cache": torch.zeros(2, 4, 2, 16, dtype=torch.float16)}, "both must be torch.float32"),
        ({"k_cache": torch.zeros(2, 4, 16, 2).transpose(2, 3)}, "must be dense"),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, r"slots is \(4,\) for 3 tokens"),
    ],
)
def test_store_kvs_arguments_are_checked(change, words):
    tokens, cache = torch.zeros(3, 2, 16), torch.zeros(2, 4, 2, 16)
    arguments = {"k": tokens, "v": tokens, "k_cache": cache, "v_cache": cache, "slots": torch.arange(3)}
    with pytest.raises(ValueError, match=words):
        store_kv(**arguments | change)


def test_offsets_beyond_int32(device):
    """Heads of q and of the cache so far apart that the third's offset is no int32."""
    q, k, v = (torch.randn(30, 3, 16, device=device).half() for _ in "qkv")
    step, size = 1_100_000_000, 32 * 16
    room = torch.empty(2 * step + 3 * size, dtype=torch.float16, device=device)  # a CPU's memory is taken when written
    caches = [room.as_strided((2, 16, 3, 16), (16 * 16, 16, step, 1), i * size) for i in range(2)]
    far = room.as_strided(q.shape, (16, step, 1), 2 * size).copy_(q)
    store_kv(k, v, *caches, torch.arange(30, device=device))
    table, lens, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0, 1]], [30], [0, 30]))
    out = paged_attention(far, *caches, table, lens, starts, max_query=30, max_context=30)
    expected = varlen_attention(q, k, v, (30,), implementation="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)  # float16


# Registration


def test_opcheck(device):
    case = cached(((2, 20), (1, 7)), 2, 1, 16, 16, torch.float32, device)
    for splits in (2, None):
        torch.library.opcheck(
            torch.ops.llava_kernels.paged_attention.default, (*case.arguments(), 2, 20, 1.0, 1.0, splits)
        )
    k = torch.randn(3, 1, 16, device=device)
    slots = torch.tensor([5, -1, 40], device=device)
    torch.library.opcheck(
        torch.ops.llava_kernels.store_kv.default,
        (k, -k, torch.zeros(4, 16, 1, 16, device=device), torch.ones(4, 16, 1, 16, device=device), slots, 1.0, 1.0),
    )


def test_compile(device):
    case = cached(((1, 20), (1, 7)), 2, 1, 16, 16, torch.float32, device)
    slots = (case.block_table.gather(1, (case.context_lens - 1)[:, None].long() // 16).squeeze(1) * 16).long()
    slots += (case.context_lens - 1) % 16
    k = torch.randn(2, 1, 16, device=device)

    def step(q, k, k_cache, v_cache):
        store_kv(k, -k, k_cache, v_cache, slots)
        return paged_attention(
            q, k_cache, v_cache, case.block_table, case.context_lens, case.query_start, max_query=1, max_context=20
        )

    outs = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        caches = case.k_cache.clone(), case.v_cache.clone()
        outs.append((function(case.q, k, *caches), *caches))
    for eager, compiled in zip(*outs, strict=True):
        torch.testing.assert_close(eager, compiled, equal_nan=True)
    assert not torch.equal(outs[0][1].nan_to_num(), case.k_cache.nan_to_num())


def test_cuda_graph(device):
    """Captured once, replayed for other lengths: what is on the device decides no launch."""
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    case = cached(((1, 70), (1, 33)), 2, 2, 16, 16, torch.float32, device)
    case.attend(splits=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.attend(splits=3)
    case.context_lens -= 20
    graph.replay()
    case.keys, case.values = ([x[:-20] for x in kept] for kept in (case.keys, case.values))
    torch.testing.assert_close(out, case.exact().float())
