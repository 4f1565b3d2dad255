"""rope_store_kv: against complex float64 arithmetic, and bit for bit against rope_ and then store_kv."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import llava_kernels
from llava_kernels import rope_, rope_store_kv, store_kv
from llava_kernels.rope import rope_reference

FP8 = torch.float8_e4m3fn
PAGE = 4
# (tokens, heads, kv_heads, head_dim): one pair, odd counts, the head sizes in use, more heads than a program takes at
# once with their rest partly filled, more tokens than tiles are shared between programs for.
SHAPES = [(1, 1, 1, 2), (5, 3, 3, 6), (9, 4, 2, 64), (3, 5, 1, 80), (2, 19, 17, 128), (300, 2, 1, 10)]

pytestmark = pytest.mark.usefixtures("triton_path")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@dataclass
class Case:
    """A layer's arguments. The cache, in which keys and values lie side by side, holds 7 everywhere."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    cache: Tensor  # (blocks, PAGE, 2, kv_heads, head_dim)
    slots: Tensor
    heads: int

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        k_cache, v_cache = self.cache.unbind(2)
        return k_cache, v_cache

    @property
    def parts(self) -> list[Tensor]:
        """Query, key and value heads, each (T, heads of the kind, head_dim)."""
        kv_heads = self.cache.shape[3]
        return list(self.qkv.split((self.heads, kv_heads, kv_heads), dim=1))

    def copy(self) -> Case:
        return replace(self, qkv=self.qkv.clone(), cache=self.cache.clone())

    def arguments(self) -> tuple[Tensor, ...]:
        return self.qkv, self.cos, self.sin, *self.caches, self.slots

    def run(self, **scales) -> Tensor:
        return rope_store_kv(*self.arguments(), heads=self.heads, **scales)

    def run_separately(self, **scales) -> Tensor:
        q, k, v = self.parts
        store_kv(rope_(k.clone(), self.cos, self.sin), v, *self.caches, self.slots, **scales)
        return rope_(q, self.cos, self.sin)

    def stored(self) -> Tensor:
        """(T, 2, kv_heads, head_dim): what the cache holds for each token."""
        return bits(self.cache).flatten(0, 1)[self.slots].view(self.cache.dtype)


def make(shape, device, dtype=torch.float32, stored=None) -> Case:
    tokens, heads, kv_heads, head_dim = shape
    blocks = -(-tokens // PAGE) + 2
    angles = torch.randint(0, 50, (tokens, 1)) * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    return Case(
        torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype).to(device),
        (1.25 * angles.cos()).to(device),  # scaled, as yarn scales them
        (1.25 * angles.sin()).to(device),
        torch.full((blocks, PAGE, 2, kv_heads, head_dim), 7.0).to(stored or dtype).to(device),
        torch.randperm(blocks * PAGE)[:tokens].to(device),
        heads,
    )


def bits(x: Tensor) -> Tensor:
    """float8 can be neither indexed nor compared everywhere."""
    return x.view(torch.uint8) if x.dtype is FP8 else x


def assert_same(mine: Tensor, other: Tensor) -> None:
    """Every bit in the interpreter; on a GPU the compiler decides where a product and a sum are rounded as one."""
    assert mine.dtype == other.dtype
    if mine.device.type == "cpu":
        assert torch.equal(bits(mine), bits(other))
    else:
        torch.testing.assert_close(mine.float(), other.float(), rtol=torch.finfo(mine.dtype).eps, atol=1e-5)


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.double().tensor_split(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """At most twice torch's own error, plus one rounding of 1 or of the largest value, where torch is exact."""
    assert mine.shape == torchs.shape and mine.dtype == torchs.dtype
    error, torch_error = ((a.double() - exact).abs().max().item() for a in (mine, torchs))
    assert error <= 2 * torch_error + torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_rope_store_kv(shape, dtype, device):
    case = make(shape, device, dtype)
    before = case.copy()
    q, k, v = before.parts
    out, stored = case.run(), case.stored()
    for mine, x in ((out, q), (stored[:, 0], k)):
        turned = rope_reference(x, case.cos, case.sin)
        assert_as_good_as_torch(mine, turned, exact(x, case.cos, case.sin))
    assert torch.equal(stored[:, 1], v)
    unused = torch.ones(case.cache.shape[:2], dtype=torch.bool, device=device)
    unused.view(-1)[case.slots] = False
    assert (case.cache[unused] == 7).all()


@pytest.mark.parametrize("stored", [None, FP8], ids=["same", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_rope_and_then_store_kv(shape, stored, dtype, device):
    case = make(shape, device, dtype, stored)
    scales = {"k_scale": 0.03, "v_scale": 1.7} if stored else {}
    separate, defined = case.copy(), case.copy()
    out = case.run(**scales)
    with llava_kernels.implementation("reference"):
        defined_out = defined.run(**scales)
    for other, other_out in ((separate, separate.run_separately(**scales)), (defined, defined_out)):
        assert_same(out, other_out)
        assert_same(case.cache, other.cache)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_queries_are_turned_where_they_lie_and_keys_and_values_stay(implementation, device):
    case = make((5, 4, 2, 8), device)
    _, k, v = case.copy().parts
    with llava_kernels.implementation(implementation):
        out = case.run()
    assert out.data_ptr() == case.qkv.data_ptr() and out.stride() == case.qkv.stride()
    assert torch.equal(case.parts[1], k) and torch.equal(case.parts[2], v)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_tokens_that_are_not_stored(implementation, device):
    """As in the padding of a CUDA graph. Their queries are turned like all others."""
    case = make((7, 4, 2, 8), device)
    case.slots[[1, 2, 6]] = -1
    before = case.copy()
    with llava_kernels.implementation(implementation):
        out = case.run()
    torch.testing.assert_close(out, rope_reference(before.parts[0], case.cos, case.sin))
    before.run_separately()
    torch.testing.assert_close(case.cache, before.cache)
    assert (case.cache == 7).flatten(2).all(2).sum() == case.cache.shape[0] * PAGE - 4


@pytest.mark.parametrize("tokens_at_once", [1, 4])
def test_a_program_takes_several_tiles(tokens_at_once, device, monkeypatch):
    """As with many tokens, two programs for each: both get query, key and value tiles, the last of each kind partly
    filled."""
    blocks = {"pairs": 16 * tokens_at_once, "shares": 2, "num_warps": 4}
    module = importlib.import_module("llava_kernels.attention.rope_store_kv")
    monkeypatch.setattr(module, "blocks_for", lambda *_: dict(blocks))
    case = make((6, 11, 5, 10), device)
    separate = case.copy()
    assert_same(case.run(), separate.run_separately())
    assert_same(case.cache, separate.cache)


@pytest.mark.parametrize("layout", ["apart", "heads first", "block of all layers"])
def test_layouts_of_the_cache(layout, device):
    case = make((9, 4, 2, 8), device)
    separate = case.copy()
    blocks = case.cache.shape[0]
    k_cache, v_cache = {
        "apart": lambda: [torch.full((blocks, PAGE, 2, 8), 7.0, device=device) for _ in "kv"],
        "heads first": lambda: torch.full((2, blocks, 2, PAGE, 8), 7.0, device=device).transpose(2, 3),
        "block of all layers": lambda: torch.full((blocks, 3, 2, PAGE, 2, 8), 7.0, device=device)[:, 1].unbind(1),
    }[layout]()
    out = rope_store_kv(case.qkv, case.cos, case.sin, k_cache, v_cache, case.slots, heads=4)
    assert_same(out, separate.run_separately())
    assert_same(torch.stack([k_cache, v_cache], 2), separate.cache)


def test_strides_of_the_other_arguments(device):
    """qkv beside other columns and with its heads apart, angles and slots not dense."""
    case = make((9, 4, 2, 8), device)
    separate = case.copy()
    wide = torch.zeros(9, 11, 20, device=device)
    case.qkv = wide[:, 2:10, 4:12].copy_(case.qkv)
    case.cos, case.sin = (x.t().contiguous().t() for x in (case.cos, case.sin))
    case.slots = case.slots.repeat_interleave(2)[::2]
    assert_same(case.run(), separate.run_separately())
    assert_same(case.cache, separate.cache)
    wide[:, 2:10, 4:12] = 0
    assert not wide.any()


def test_float8_of_what_is_beyond_it(device):
    """Keys and values are divided by their own scales and rounded to qkv's dtype before; 448 is the largest number."""
    case = make((3, 2, 2, 8), device, torch.float16, FP8)
    case.qkv *= 100
    separate = case.copy()
    case.run(k_scale=0.5, v_scale=0.01)
    separate.run_separately(k_scale=0.5, v_scale=0.01)
    assert_same(case.cache, separate.cache)
    assert case.stored().float().abs().amax((0, 2, 3)).tolist() == [448, 448]


def test_no_tokens(device):
    case = make((0, 3, 1, 8), device)
    assert case.run().shape == (0, 3, 8)
    assert (case.cache == 7).all()


def test_offsets_beyond_int32(device):
    """Heads of qkv and of the cache so far apart that the third's offset is no int32."""
    case = make((5, 1, 1, 16), device, torch.float16)
    separate = case.copy()
    step = 1_100_000_000
    room = torch.empty(2 * step + 1024, dtype=torch.float16, device=device)  # a CPU's memory is taken when written
    case.qkv = room.as_strided(case.qkv.shape, (16, step, 1)).copy_(case.qkv)
    assert_same(case.run(), separate.run_separately())
    assert_same(case.cache, separate.cache)
    case = make((5, 3, 3, 16), device, torch.float16)
    separate = case.copy()
    caches = [room.as_strided((4, PAGE, 3, 16), (64, 16, step, 1), 512 * i).fill_(7) for i in range(2)]
    rope_store_kv(case.qkv, case.cos, case.sin, *caches, case.slots, heads=3)
    separate.run_separately()
    assert_same(torch.stack(caches, 2), separate.cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.zeros(3, 8, 8, requires_grad=True)}, "use rope"),
        ({"qkv": torch.zeros(3, 64)}, "do not fit together with heads=4"),
        ({"qkv": torch.zeros(3, 9, 8)}, "do not fit together with heads=4"),
        ({"heads": 6}, "do not fit together with heads=6"),
        ({"heads": 0, "qkv": torch.zeros(3, 4, 8)}, "do not fit together with heads=0"),
        ({"k_cache": torch.zeros(2, 4, 8)}, "do not fit together with heads=4"),
        ({"qkv": torch.zeros(3, 8, 16)[..., ::2]}, "last dimension of qkv must be dense"),
        ({"cos": torch.zeros(3, 8)}, "twice"),
        ({"sin": torch.zeros(2, 4)}, "twice"),
        ({"v_cache": torch.zeros(2, 4, 1, 8)}, "do not fit together"),
        ({"k_cache": torch.zeros(2, 4, 2, 16), "v_cache": torch.zeros(2, 4, 2, 16)}, "do not fit together"),
        ({"qkv": torch.zeros(3, 8, 8, dtype=torch.float16)}, "both must be torch.float16"),
        ({"v_cache": torch.zeros(2, 4, 2, 8).to(FP8)}, "both must be torch.float32"),
        ({"k_cache": torch.zeros(2, 4, 8, 2).transpose(2, 3)}, "last dimension of the caches must be dense"),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, r"slots is \(4,\) for 3 tokens"),
    ],
)
def test_arguments_are_checked(change, words):
    arguments = {
        **{"qkv": torch.zeros(3, 8, 8), "cos": torch.zeros(3, 4), "sin": torch.zeros(3, 4), "heads": 4},
        **{"k_cache": torch.zeros(2, 4, 2, 8), "v_cache": torch.zeros(2, 4, 2, 8), "slots": torch.arange(3)},
    }
    with pytest.raises(ValueError, match=words):
        rope_store_kv(**arguments | change)


def test_opcheck(device):
    case = make((5, 4, 2, 8), device)
    op = torch.ops.llava_kernels.rope_store_kv.default
    k_cache, v_cache = (x.contiguous() for x in case.caches)
    torch.library.opcheck(op, (case.qkv, case.cos, case.sin, k_cache, v_cache, case.slots, 4, 1.0, 1.0))
    aliases = {argument.name: argument.alias_info for argument in op._schema.arguments}
    written = [name for name, alias in aliases.items() if alias and alias.is_write]
    assert written == ["qkv", "k_cache", "v_cache"]


def test_compiled(device):
    """The product is the compiled function's own tensor; the caches are views of one tensor of the caller's."""
    case = make((5, 4, 2, 8), device)
    separate = case.copy()

    def step(qkv, cache):
        k_cache, v_cache = cache.unbind(2)
        return rope_store_kv(qkv * 2, case.cos, case.sin, k_cache, v_cache, case.slots, heads=4) + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.qkv, case.cache), step(separate.qkv, separate.cache))
    torch.testing.assert_close(case.cache, separate.cache)
    assert not (case.cache == 7).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("stored", [None, FP8], ids=["same", "fp8"])
def test_cuda_graph(stored, device):
    """Captured once, replayed for other tokens and other slots."""
    case = make((6, 8, 2, 128), device, torch.bfloat16, stored)
    case.copy().run()  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    case.qkv.normal_()
    case.slots.copy_(case.slots.flip(0))
    case.slots[2] = -1
    separate = case.copy()
    graph.replay()
    assert_same(out, separate.run_separately())
    assert_same(case.cache, separate.cache)
