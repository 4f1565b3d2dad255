"""varlen_attention: its kernels against float64 arithmetic, and which back end runs and what it is handed.

The libraries that need a GPU are stood in for by fakes that check their arguments and compute the exact result.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import llava_kernels
from llava_kernels import library, varlen_attention
from llava_kernels.attention import IMPLEMENTATIONS, backend, triton_varlen
from llava_kernels.attention.varlen import choose

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CUDA = torch.device("cuda", 0)
# Empty ones between others, one token, several blocks of queries and keys, the last of them in part.
LONG, SHORT = (0, 150, 1), (0, 5, 0, 40, 1, 32, 0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("LLAVA_ATTENTION", raising=False)
    monkeypatch.delenv("LLAVA_KERNELS", raising=False)


def exact(q: Tensor, k: Tensor, v: Tensor, seqlens, causal: bool) -> Tensor:
    """All sequences at once under a block-diagonal mask, in float64."""
    tokens = q.shape[0]
    of = torch.repeat_interleave(torch.tensor(seqlens, device=q.device))
    mask = of[:, None] == of
    if causal:
        mask &= torch.ones_like(mask).tril()
    q, k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    assert mask.shape == (tokens, tokens)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def assert_as_good_as_torch(mine: Tensor, torchs: Tensor, exact: Tensor, times: int, roundings: int = 1) -> None:
    """At most ``times`` torch's own error, plus some roundings of 1 or of the largest value, where torch is exact."""
    assert mine.shape == torchs.shape and mine.dtype == torchs.dtype
    error, torch_error = ((a.double() - exact.double()).abs().max().item() for a in (mine, torchs))
    assert error <= times * torch_error + roundings * torch.finfo(mine.dtype).eps * max(1, exact.abs().max().item())


def noise(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype, device="cpu") -> list[Tensor]:
    shapes = ((tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim))
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def gradients(out: Tensor, inputs) -> tuple[Tensor, ...]:
    d_out = torch.linspace(-2, 2, out.numel(), dtype=torch.float64, device=out.device).sin().view(out.shape)
    return torch.autograd.grad(out, inputs, d_out.to(out.dtype))


def check(qkv: list[Tensor], seqlens, causal: bool, implementation: str = "triton", roundings: int = 1) -> None:
    results = [
        varlen_attention(*qkv, seqlens, causal=causal, implementation=implementation),
        varlen_attention(*qkv, seqlens, causal=causal, implementation="reference"),
        exact(*qkv, seqlens, causal),
    ]
    assert_as_good_as_torch(*results, times=2)
    for one_of_each in zip(*(gradients(r, qkv) for r in results), strict=True):
        assert_as_good_as_torch(*one_of_each, times=3, roundings=roundings)


native = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")


@native
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 64), (4, 2, 18), (6, 2, 128), (2, 2, 256)])
@pytest.mark.parametrize("seqlens", [LONG, SHORT])
def test_native(seqlens, heads, kv_heads, head_dim, causal, dtype):
    check(noise(sum(seqlens), heads, kv_heads, head_dim, dtype), seqlens, causal, "native", roundings=4)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("seqlens", "heads", "kv_heads", "head_dim"), [(LONG, 1, 1, 64), (SHORT, 4, 2, 16)])
def test_triton(seqlens, heads, kv_heads, head_dim, causal, dtype, device):
    check(noise(sum(seqlens), heads, kv_heads, head_dim, dtype, device), seqlens, causal)


@pytest.mark.parametrize("head_dim", [8, 32, 80, 96, 128])
def test_triton_head_sizes(head_dim, dtype, device):
    check(noise(43, 2, 1, head_dim, dtype, device), (36, 7), True)


@pytest.mark.parametrize("implementation", ["sdpa", "triton", pytest.param("native", marks=native)])
@pytest.mark.parametrize("seqlens", [(1,), (1, 1, 1), (0, 17)])
def test_short(implementation, seqlens, device):
    """Of one key the definition gives exact zeros for the gradients of q and k; others get them by subtraction."""
    check(noise(sum(seqlens), 2, 1, 16, FP32, device), seqlens, True, implementation, roundings=8)


implementations = pytest.mark.parametrize("implementation", ["triton", pytest.param("native", marks=native)])


@implementations
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # numpy's remark, on scores that are masked after
def test_scores_far_from_zero(implementation, device):
    """The largest score is subtracted before exp, whichever block it is in.

    The backward pass takes probabilities from a sum's logarithm, which is rounded at the size of the scores: hundreds.
    """
    q, k, v = noise(70, 1, 1, 16, FP32, device)
    qkv = [q.detach().mul(60).requires_grad_(), k, v]
    mine, torchs = (varlen_attention(*qkv, (70,), implementation=i) for i in (implementation, "reference"))
    expected = exact(*qkv, (70,), True)
    assert_as_good_as_torch(mine, torchs, expected, times=2)
    for a, b in zip(gradients(mine, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@implementations
def test_strides(implementation, device):
    """q, k and v as views of one merged product, and with heads whose values do not lie side by side."""
    merged = torch.randn(40, 8, 16, device=device)
    q, k, v = (x.detach().requires_grad_() for x in merged.split((4, 2, 2), dim=1))
    assert q.stride() == k.stride() == (128, 16, 1)
    check([q, k, v], (9, 31), True, implementation)
    q, k, v = (torch.randn(16, n, 40, device=device).permute(2, 1, 0).requires_grad_() for n in (4, 2, 2))
    check([q, k, v], (9, 31), True, implementation)
    d_out = torch.randn(16, 4, 40, device=device).permute(2, 1, 0)
    mine, expected = (
        torch.autograd.grad(varlen_attention(q, k, v, (9, 31), implementation=i), q, d_out)[0]
        for i in (implementation, "reference")
    )
    torch.testing.assert_close(mine, expected)


def test_offsets_beyond_int32(device):
    """The third head's offset is no int32, as in a transposed (heads, T, head_dim) of many tokens."""
    near = [torch.randn(20, 3, 16, device=device).half() for _ in range(4)]
    step, size = 1_100_000_000, near[0].numel()
    room = torch.empty(2 * step + 4 * size, dtype=torch.float16, device=device)  # a CPU's memory is taken when written
    far = [room.as_strided(x.shape, (16, step, 1), i * size).copy_(x) for i, x in enumerate(near)]
    results = []
    for *qkv, d_out in (near, far):
        inputs = [x.requires_grad_() for x in qkv]
        out = varlen_attention(*inputs, (9, 11), implementation="triton")
        results.append((out, *torch.autograd.grad(out, inputs, d_out)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["reference", "sdpa", "triton", "auto"])
@pytest.mark.parametrize("seqlens", [(), (0,), (0, 0)])
def test_no_tokens(implementation, seqlens, device):
    qkv = noise(0, 2, 1, 16, FP32, device)
    out = varlen_attention(*qkv, seqlens, implementation=implementation)
    assert out.shape == (0, 2, 16)
    assert [g.shape for g in torch.autograd.grad(out.sum(), qkv)] == [x.shape for x in qkv]


def test_cu_seqlens_may_be_given(device):
    qkv = noise(20, 2, 2, 16, FP32, device)
    ends = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
    given = varlen_attention(*qkv, (7, 13), implementation="triton", cu_seqlens=ends)
    assert torch.equal(given, varlen_attention(*qkv, (7, 13), implementation="triton"))
    apart = torch.stack([ends, ends + 1], 1)[:, 0]
    assert torch.equal(given, varlen_attention(*qkv, (7, 13), implementation="triton", cu_seqlens=apart))
    with_empty = torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=device)
    assert torch.equal(given, varlen_attention(*qkv, (7, 0, 13), implementation="triton", cu_seqlens=with_empty))


def test_gradients_by_finite_differences(device):
    """Along one random direction of all three inputs; float32, so to three digits."""
    qkv = noise(9, 2, 1, 16, FP32, device)
    directions = [torch.randn_like(x) for x in qkv]

    def value(step: float) -> float:
        moved = [(x + step * d).detach() for x, d in zip(qkv, directions, strict=True)]
        return varlen_attention(*moved, (4, 5), implementation="triton").double().sin().sum().item()

    out = varlen_attention(*qkv, (4, 5), implementation="triton")
    slopes = torch.autograd.grad(out.double().sin().sum(), qkv)
    slope = sum((g * d).sum().item() for g, d in zip(slopes, directions, strict=True))
    assert slope == pytest.approx((value(1e-2) - value(-1e-2)) / 2e-2, rel=5e-3)


@pytest.mark.parametrize(("trained", "wanted"), [("q", (True, False)), ("k", (False, True)), ("v", (False, True))])
def test_nothing_is_computed_for_what_is_frozen(trained, wanted, monkeypatch, device):
    asked = []
    launch = triton_varlen._launch_backward
    monkeypatch.setattr(triton_varlen, "_launch_backward", lambda *a: asked.append(a[-2:]) or launch(*a))
    inputs = dict(zip("qkv", (x.detach() for x in noise(9, 2, 1, 16, FP32, device)), strict=True))
    inputs[trained].requires_grad_()
    grads = [
        torch.autograd.grad(varlen_attention(**inputs, seqlens=(9,), implementation=i).sin().sum(), inputs[trained])[0]
        for i in ("triton", "reference")
    ]
    assert asked == [wanted]
    torch.testing.assert_close(*grads)


def test_the_same_to_the_last_bit(device, dtype):
    qkv = noise(70, 2, 1, 16, dtype, device)
    outs = [varlen_attention(*qkv, (40, 30), implementation="triton") for _ in range(2)]
    assert torch.equal(*outs)
    for a, b in zip(*(gradients(o, qkv) for o in outs), strict=True):
        assert torch.equal(a, b)


def test_opcheck(device):
    qkv = noise(9, 2, 1, 16, FP32, device)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.llava_kernels.varlen_attention.default, (*qkv, ends, 5, True))
    out, lse = (x.detach() for x in torch.ops.llava_kernels.varlen_attention(*qkv, ends, 5, True))
    arguments = (out, *(x.detach() for x in qkv), out, lse, ends, 5, True)
    backward = torch.ops.llava_kernels.varlen_attention_backward.default
    torch.library.opcheck(backward, (*arguments, True, True))
    for wanted in ((False, True), (True, False)):  # other shapes come out
        torch.library.opcheck(backward, (*arguments, *wanted), test_utils="test_faketensor")


def test_compile(device):
    qkv = noise(9, 2, 1, 16, FP32, device)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)

    def double(q, k, v):
        return 2 * varlen_attention(q, k, v, (4, 5), implementation="triton", cu_seqlens=ends)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(gradients(compiled(*qkv), qkv), gradients(double(*qkv), qkv), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seqlens": (4, 4)}, "add up to 8, but q has 9"),
        ({"seqlens": (10, -1)}, "add up to 9"),
        ({"k": torch.zeros(9, 2, 8)}, "do not fit together"),
        ({"k": torch.zeros(9, 3, 16), "v": torch.zeros(9, 3, 16)}, "do not fit together"),
        ({"v": torch.zeros(9, 2, 16, dtype=FP16)}, "one dtype"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"must be \(2,\) int32"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32)}, r"must be \(2,\) int32"),
        ({"implementation": "fast"}, "'fast' is not known; choose auto, reference, sdpa, flash-attn"),
    ],
)
def test_arguments_are_checked(change, words):
    arguments = {"q": torch.zeros(9, 4, 16), "k": torch.zeros(9, 2, 16), "v": torch.zeros(9, 2, 16), "seqlens": (9,)}
    with pytest.raises(ValueError, match=words):
        varlen_attention(**arguments | change)


# The back ends that need a GPU.


@pytest.fixture
def bare(monkeypatch):
    """A machine with an A100 where none of the optional libraries is installed, whatever this one has."""
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(backend, "capability", lambda device: 80)
    backend._failure.cache_clear()
    yield monkeypatch
    backend._failure.cache_clear()


def put(monkeypatch, name: str, **content) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def seqlens_of(ends: Tensor, q: Tensor, longest: int) -> list[int]:
    assert ends.dtype == torch.int32 and ends.device == q.device
    lengths = ends.diff().tolist()
    assert ends[0] == 0 and ends[-1] == q.shape[0] and longest == max(lengths) and min(lengths) > 0
    return lengths


def fake_flash(returns_tuple: bool):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and type(max_seqlen_q) is int
        out = exact(q, k, v, seqlens_of(cu_seqlens_q, q, max_seqlen_q), causal).to(q.dtype)
        return (out, out[..., 0]) if returns_tuple else out

    return flash_attn_varlen_func


def install(monkeypatch, name: str) -> None:
    backend._failure.cache_clear()
    if name == "flash-attn":
        put(monkeypatch, "flash_attn", flash_attn_varlen_func=fake_flash(False))
    elif name == "flash-attn-3":
        put(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=fake_flash(False))
    elif name == "flash-attn-4":
        put(monkeypatch, "flash_attn")
        put(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=fake_flash(True))
    elif name == "xformers":
        install_xformers(monkeypatch)


def install_xformers(monkeypatch) -> None:
    class BlockDiagonalMask:
        causal = False

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert isinstance(q_seqlen, list) and kv_seqlen is None and device is not None
            mask = cls()
            mask.seqlens = q_seqlen
            return mask

    class BlockDiagonalCausalMask(BlockDiagonalMask):
        causal = True

    def memory_efficient_attention(query, key, value, attn_bias=None):
        assert query.shape[0] == 1 and query.shape == key.shape == value.shape  # no broadcasting of its own
        q, k, v = (x.flatten(2, 3).squeeze(0) if x.dim() == 5 else x.squeeze(0) for x in (query, key, value))
        return exact(q, k, v, attn_bias.seqlens, attn_bias.causal).to(q.dtype).view(query.shape)

    masks = put(
        monkeypatch,
        "xformers.ops.fmha.attn_bias",
        BlockDiagonalMask=BlockDiagonalMask,
        BlockDiagonalCausalMask=BlockDiagonalCausalMask,
    )
    fmha = put(monkeypatch, "xformers.ops.fmha", attn_bias=masks)
    ops = put(monkeypatch, "xformers.ops", fmha=fmha, memory_efficient_attention=memory_efficient_attention)
    put(monkeypatch, "xformers", ops=ops)


def fake_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa):
    assert cu_seq_q is cu_seq_k and max_q == max_k
    assert window_size in ((-1, 0), (-1, -1))
    assert q.shape[1] == k.shape[1] or enable_gqa
    return exact(q, k, v, seqlens_of(cu_seq_q, q, max_q), window_size == (-1, 0)).to(q.dtype)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return fake_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, False)


def varlen_attn_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):  # fmt: skip
    return fake_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa)


def install_varlen_attn(monkeypatch, function) -> None:
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("given", [True, False], ids=["given", "built"])
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "torch-2.11", "torch-2.12"])
def test_what_the_libraries_are_handed(name, given, kv_heads, causal, bare):
    """With the device's refusal out of the way, on a CPU, through the public function."""
    install(bare, name)
    if name.startswith("torch"):
        install_varlen_attn(bare, varlen_attn_2_11 if name == "torch-2.11" else varlen_attn_2_12)
        name = "torch-varlen"
    bare.setattr("llava_kernels.attention.varlen.choose", lambda *a: name)
    qkv = noise(20, 4, kv_heads, 16, FP32)
    cu_seqlens = torch.tensor([0, 7, 7, 20], dtype=torch.int32) if given else None
    out = varlen_attention(*qkv, (7, 0, 13), causal=causal, implementation=name, cu_seqlens=cu_seqlens)
    expected = exact(*qkv, (7, 0, 13), causal)
    torch.testing.assert_close(out, expected.float())
    for mine, theirs in zip(gradients(out, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_this_torchs_varlen_attn_takes_what_it_is_handed():
    from torch.nn.attention.varlen import varlen_attn

    from llava_kernels.attention.torch_varlen import groups_heads

    signature = inspect.signature(varlen_attn)
    bound = signature.bind("q", "k", "v", "ends", "ends", 9, 9, window_size=(-1, 0))
    names = [n.replace("query", "q").replace("key", "k").replace("value", "v") for n in bound.arguments]
    assert names[:7] == ["q", "k", "v", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    if groups_heads(varlen_attn):
        signature.bind("q", "k", "v", "ends", "ends", 9, 9, window_size=(-1, 0), enable_gqa=True)
    assert groups_heads(varlen_attn_2_12) and not groups_heads(varlen_attn_2_11)


ALL = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers")


@pytest.mark.parametrize(
    ("installed", "card", "dtype", "head_dim", "expected"),
    [
        (ALL, 90, BF16, 128, "flash-attn-3"),
        (("flash-attn-4", "xformers"), 90, BF16, 128, "flash-attn-4"),
        (("flash-attn-4", "xformers"), 90, BF16, 256, "torch-varlen"),
        (("flash-attn-3", "xformers"), 100, BF16, 128, "torch-varlen"),
        (("flash-attn-3", "flash-attn"), 80, FP16, 128, "flash-attn"),
        (("xformers",), 80, BF16, 64, "torch-varlen"),
        ((), 80, BF16, 64, "torch-varlen"),
        ((), 80, FP32, 64, "triton"),
        (ALL, 90, FP32, 128, "triton"),
        (ALL, 90, BF16, 100, "triton"),
        (ALL, 75, FP16, 64, "triton"),
        (ALL, 90, FP32, 256, "sdpa"),
        (ALL, 90, torch.float64, 64, "sdpa"),
    ],
)
def test_auto_on_a_gpu(installed, card, dtype, head_dim, expected, bare):
    bare.setattr(backend, "capability", lambda device: card)
    for name in installed:
        install(bare, name)
    assert choose("auto", CUDA, dtype, head_dim) == expected


def test_auto_without_torchs_varlen_attn(bare):
    bare.setitem(sys.modules, "torch.nn.attention.varlen", None)
    install(bare, "xformers")
    assert choose("auto", CUDA, BF16, 128) == "xformers"


def test_auto_on_a_cpu(bare):
    install(bare, "flash-attn")
    cpu, built = torch.device("cpu"), "native" if library.load() else "sdpa"
    assert choose("auto", cpu, BF16, 128) == built
    assert choose("auto", cpu, FP16, 128) == choose("auto", cpu, BF16, 257) == "sdpa"
    qkv = noise(9, 2, 1, 16, FP32)
    assert torch.equal(varlen_attention(*qkv, (4, 5)), varlen_attention(*qkv, (4, 5), implementation=built))


def test_a_library_that_does_not_load_is_passed_over(bare):
    """As one built for another CUDA is; by name the reason is told."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "flash_attn":
                raise OSError("libcudart.so.9: cannot open shared object file")

    bare.delitem(sys.modules, "flash_attn")
    bare.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert choose("auto", CUDA, BF16, 128) == "torch-varlen"
    with pytest.raises(ImportError, match=r"libcudart\.so\.9"):
        choose("flash-attn", CUDA, BF16, 128)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("flash-attn", r"pip install 'llava-fast\[flash-attn\]'"),
        ("flash-attn-3", "folder hopper of github.com/Dao-AILab/flash-attention"),
        ("flash-attn-4", "pip install flash-attn-4"),
        ("xformers", r"pip install 'llava-fast\[xformers\]'"),
    ],
)
def test_missing_by_name_says_how_to_install_it(name, how, bare):
    with pytest.raises(ImportError, match=f"attention='{name}' is not installed .*install it with: .*{how}"):
        varlen_attention(*noise(9, 2, 1, 16, FP32), (9,), implementation=name)


@pytest.mark.parametrize(
    ("name", "card", "device", "dtype", "head_dim", "words"),
    [
        ("flash-attn", 80, torch.device("cpu"), BF16, 64, "needs a CUDA device, not cpu"),
        ("flash-attn", 75, CUDA, BF16, 64, "sm_80 or later, not sm_75"),
        ("flash-attn", 80, CUDA, FP32, 64, "takes float16 and bfloat16, not float32"),
        ("flash-attn", 80, CUDA, BF16, 65, "multiples of 8 up to 256, not 65"),
        ("flash-attn-3", 80, CUDA, BF16, 64, "a card of sm_90, not sm_80"),
        ("flash-attn-4", 80, CUDA, BF16, 64, "sm_90 or sm_100 or sm_110, not sm_80"),
        ("flash-attn-4", 90, CUDA, BF16, 136, "up to 128, not 136"),
        ("xformers", 80, CUDA, BF16, 264, "up to 256, not 264"),
        ("torch-varlen", 80, CUDA, FP32, 64, "not float32"),
        ("triton", 80, CUDA, torch.float64, 64, "not float64"),
        ("triton", 80, CUDA, FP32, 160, "up to 128, not 160"),
    ],
)
def test_what_does_not_fit_by_name_is_refused(name, card, device, dtype, head_dim, words, bare):
    bare.setattr(backend, "capability", lambda _: card)
    install(bare, name)
    with pytest.raises(ValueError, match=f"attention='{name}' .*{words}"):
        choose(name, device, dtype, head_dim)


def test_triton_on_a_cpu(monkeypatch):
    cpu = torch.device("cpu")
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=True))
    monkeypatch.setattr(triton_varlen.triton, "knobs", knobs)
    assert choose("triton", cpu, FP32, 64) == "triton"
    with pytest.raises(ValueError, match="wrong in bfloat16 under Triton's interpreter"):
        choose("triton", cpu, BF16, 64)
    knobs.runtime.interpret = False
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        choose("triton", cpu, FP32, 64)


def test_forced_by_the_environment_or_the_caller(monkeypatch):
    where = (torch.device("cpu"), FP32, 64)
    monkeypatch.setenv("LLAVA_ATTENTION", "reference")
    assert choose("auto", *where) == "reference"
    assert choose("sdpa", *where) == "sdpa"  # an explicit name is stronger
    with llava_kernels.implementation("triton"):  # so is what every op is told
        assert choose("auto", *where) == "triton"
    monkeypatch.setenv("LLAVA_ATTENTION", "auto")
    assert choose("auto", *where) == ("native" if library.load() else "sdpa")
    monkeypatch.setenv("LLAVA_ATTENTION", "fastest")
    with pytest.raises(ValueError, match="'fastest' is not known"):
        choose("auto", *where)
    monkeypatch.setenv("LLAVA_KERNELS", "reference")
    assert choose("auto", *where) == "reference"


def test_every_name_is_one_of_auto_or_asked_for():
    assert {*llava_kernels.attention.FASTEST, "native", "reference"} == set(IMPLEMENTATIONS)
