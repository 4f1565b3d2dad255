"""sample: the next token of every sequence, each by its own settings and its own seed.

The draw is a race (the exponential form of the Gumbel-max trick): token i finishes after Exp(1) / p_i, and the first
to finish is i with probability p_i. The random number is a hash of seed, position and token, so nothing depends on how
many sequences are sampled together, and nothing has to be summed up or sorted. Top-k and top-p cut off at a value of
the softmax, which the kernel finds one bit of the float at a time: a count or a sum over the row a bit, and no sorting.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native, native_sample
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on

GREEDY_BELOW = 1e-5
LARGEST = 3.4e38  # +inf counts as this, and minus this as -inf, so that differences of logits are numbers
SMALLEST_MASS = 1e-30


def sample(
    logits: Tensor,
    *,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    counts: Tensor | None = None,
    in_prompt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Penalties, then temperature, then top-k, then top-p, then min-p, then the draw. No host synchronisation.

    A setting that is None is off for all rows. Logits that are NaN or -3.4e38 and below count as -inf, those above
    3.4e38 as that. A row without any logit above -inf gives id 0 and a log-probability of NaN.

    Args:
        logits: (B, V), any floating dtype; what follows is float32.
        seeds: (B,) int64, one a request.
        positions: (B,) int64, the place in its sequence of the token that is drawn. One seed and position give one
            random number a token, whatever else is in the batch.
        temperature: (B,) float; below 1e-5 the largest logit is taken, of equal ones the lowest id. None: 1.
        top_k: (B,) int; the k likeliest stay, and all as likely as the k-th. Below 1: off.
        top_p: (B,) float; of what top-k left, the likeliest stay until their mass reaches p (at least one, and all
            as likely as the last). 1 and above: off.
        min_p: (B,) float; tokens below min_p times the largest probability go. 0 and below: off.
        repetition_penalty: (B,) float > 0; logits of ids in ``counts`` or ``in_prompt`` are divided by it when
            positive, multiplied when negative.
        presence_penalty: (B,) float, subtracted once for ids in ``counts``.
        frequency_penalty: (B,) float, subtracted for every time an id occurs in ``counts``.
        counts: (B, V) int, how often each id was generated; needed by the three penalties.
        in_prompt: (B, V) bool, ids that the prompt holds; the repetition penalty alone looks at it.

    Returns:
        ids: (B,) int64.
        logprobs: (B,) float32, log-softmax of the given logits (before penalties and temperature) at the ids.

    Raises:
        ValueError: shapes that do not fit together, no vocabulary, seeds or positions of another dtype, or penalties
            without counts.
    """
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    settings = (temperature, top_k, top_p, min_p, *penalties)
    _check(logits, seeds, positions, settings, counts, in_prompt)
    if counts is None and any(p is not None for p in penalties):
        raise ValueError("penalties need counts, how often each id was generated")
    given = (logits, seeds, positions, *settings, counts, in_prompt)
    if use_triton(logits):
        return torch.ops.llava_kernels.sample(*given)
    if native_sample.fits(logits):
        return native.call(torch.ops.llava_kernels.sample, native_sample.sample, *given)
    return sample_reference(*given)


def _check(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    settings: tuple[Tensor | None, ...],
    counts: Tensor | None,
    in_prompt: Tensor | None,
) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits is {tuple(logits.shape)}; (B, V) with V > 0 is needed")
    rows = logits.shape[:1]
    for one in (seeds, positions, *settings):
        if one is not None and one.shape != rows:
            raise ValueError(f"a setting is {tuple(one.shape)}, and logits of {len(logits)} rows need ({len(logits)},)")
    if not seeds.dtype == positions.dtype == torch.int64:
        raise ValueError(f"seeds are {seeds.dtype} and positions {positions.dtype}; both must be torch.int64")
    for table in (counts, in_prompt):
        if table is not None and table.shape != logits.shape:
            raise ValueError(f"counts or in_prompt is {tuple(table.shape)}, logits {tuple(logits.shape)}")


def sample_reference(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    counts: Tensor | None,
    in_prompt: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = logits.float()  # (B, V)
    x = torch.where(x > -LARGEST, x, float("-inf")).clamp(max=LARGEST)
    log_total = (x - _top(x)).exp().sum(-1, keepdim=True).log() + _top(x)
    raw = x
    if repetition_penalty is not None:
        assert counts is not None
        seen, r = counts > 0 if in_prompt is None else (counts > 0) | in_prompt, repetition_penalty[:, None]
        x = torch.where(seen, torch.where(x > 0, x * (1 / r), x * r), x)
    if presence_penalty is not None:
        assert counts is not None
        x = x - presence_penalty[:, None] * (counts > 0)
    if frequency_penalty is not None:
        assert counts is not None
        x = x - frequency_penalty[:, None] * counts
    ids = x.argmax(-1)
    greedy = torch.zeros_like(ids, dtype=torch.bool) if temperature is None else temperature < GREEDY_BELOW
    if x.is_cuda or not greedy.all():
        x = x - _top(x)
        if temperature is not None:
            x = x * torch.where(greedy, 1, 1 / temperature)[:, None]
        weights = _filtered(x.exp(), top_k, top_p, min_p)
        ids = torch.where(greedy, ids, (weights / _race_times(seeds, positions, x.shape[1])).argmax(-1))
    logprobs = raw.gather(1, ids[:, None]) - log_total
    return ids, logprobs[:, 0]


def _top(x: Tensor) -> Tensor:
    """(B, 1) largest value of each row; a number even if the row is -inf throughout."""
    return x.amax(-1, keepdim=True).clamp(min=-LARGEST)


def _filtered(weights: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """(B, V) softmax up to a factor, the largest of a row being 1; what the three filters drop becomes 0."""
    cut = weights.new_zeros(len(weights), 1)
    if top_k is not None or top_p is not None:
        vocab = weights.shape[1]
        sizes = weights.sort(-1, descending=True).values
        if top_k is not None:
            last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)[:, None] - 1
            cut = sizes.gather(1, last)
            sizes = sizes.masked_fill(sizes < cut, 0)
        if top_p is not None:
            mass = sizes.cumsum(-1)
            short = mass < (top_p[:, None] * mass[:, -1:]).clamp(min=SMALLEST_MASS)
            last = short.sum(-1, keepdim=True).clamp(max=vocab - 1)
            cut = torch.where(top_p[:, None] < 1, torch.maximum(cut, sizes.gather(1, last)), cut)
    if min_p is not None:
        cut = torch.maximum(cut, min_p.clamp(max=1)[:, None])
    return weights.masked_fill(weights < cut, 0)


def _race_times(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """(B, V) positive numbers distributed as Exp(1), each a function of seed, position and token alone."""
    low, high, position = seeds.int(), (seeds >> 32).int(), positions.int()
    first = _mixed(_mixed(_mixed(low ^ 0x243F6A88) ^ high) ^ position)[:, None]
    second = _mixed(_mixed(_mixed(position ^ 0x13198A2E) ^ low) ^ high)[:, None]
    tokens = torch.arange(vocab, device=seeds.device, dtype=torch.int32)
    bits = _shifted(_mixed(_mixed(tokens + first) ^ second), 1)
    # In (0, 1): small ones keep all their digits, and 1, which would take for ever, rounds down.
    u = (bits.float() * 2**-31 + 2**-32).clamp(max=1 - 2**-24)
    return torch.where(u < 2**-6, u * (1 + u * (0.5 + u * (1 / 3))), -torch.log(1 - u))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3: 32 bits in, 32 well mixed bits out; int32, whose products wrap around."""
    x = (x ^ _shifted(x, 16)) * (0x85EBCA6B - 2**32)
    x = (x ^ _shifted(x, 13)) * (0xC2B2AE35 - 2**32)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & (2 ** (32 - by) - 1)


_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_MASS = tl.constexpr(SMALLEST_MASS)


@triton.jit
def _number(logit):
    """float32 up to _LARGEST; -inf for NaN, which is above nothing, and for what is no more than -_LARGEST."""
    logit = logit.to(tl.float32)
    return tl.minimum(tl.where(logit > -_LARGEST, logit, -float("inf")), _LARGEST)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _race_time(seed, position, tokens):
    """What _race_times computes; seed and position int64, tokens (n,)."""
    low, high, place = seed.to(tl.uint32), (seed >> 32).to(tl.uint32), position.to(tl.uint32)
    first = _mix(_mix(_mix(low ^ 0x243F6A88) ^ high) ^ place)
    second = _mix(_mix(_mix(place ^ 0x13198A2E) ^ low) ^ high)
    bits = _mix(_mix(tokens.to(tl.uint32) + first) ^ second) >> 1
    u = tl.minimum(bits.to(tl.int32).to(tl.float32) * 2**-31 + 2**-32, 1 - 2**-24)
    return tl.where(u < 2**-6, u * (1 + u * (0.5 + u * (1 / 3))), -tl.log(1 - u))


@triton.jit
def _at_least(weights_ptr, cut, vocab, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many weights of a row are at least ``cut``, or what they add up to."""
    part = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        weights = tl.load(weights_ptr + start + tl.arange(0, BLOCK))
        part += tl.where(weights >= cut, 1.0 if COUNT else weights, 0.0)
    return tl.sum(part, axis=0)


@triton.jit
def _cut(weights_ptr, target, vocab, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest cut at which _at_least reaches ``target``; floats from 0 to 1 have 30 bits, and sort as these do."""
    cut = tl.full((), 0, tl.int32)
    bit = tl.full((), 1 << 29, tl.int32)
    for _ in range(30):
        higher = (cut + bit).to(tl.float32, bitcast=True)
        cut = tl.where(_at_least(weights_ptr, higher, vocab, COUNT, BLOCK) >= target, cut + bit, cut)
        bit = bit >> 1
    return cut.to(tl.float32, bitcast=True)


@triton.jit
def _penalised(
    x,
    at,
    row,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    in_prompt_ptr,
    counts_stride,
    in_prompt_stride,
    vocab,
):
    """The logits x (n,) of a row at the ids ``at`` after its penalties."""
    count = tl.load(counts_ptr + row * counts_stride + at, mask=at < vocab, other=0)
    if repetition_ptr is not None:
        seen = count > 0
        if in_prompt_ptr is not None:
            prompt = tl.load(in_prompt_ptr + row * in_prompt_stride + at, mask=at < vocab, other=0)
            seen = seen | (prompt != 0)
        repetition = tl.load(repetition_ptr + row)
        x = tl.where(seen, x * tl.where(x > 0, tl.div_rn(1.0, repetition), repetition), x)
    if presence_ptr is not None:
        x -= tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    if frequency_ptr is not None:
        x -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    return x


@triton.jit
def _smallest_kept(weights_ptr, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab, BLOCK: tl.constexpr):
    """The weight below which the three filters drop tokens; 0 if none does."""
    cut = 0.0
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + row)
        if (k > 0) & (k < vocab):
            cut = _cut(weights_ptr, k.to(tl.float32), vocab, True, BLOCK)
    if top_p_ptr is not None:
        p = tl.load(top_p_ptr + row)
        if p < 1:
            left = _at_least(weights_ptr, cut, vocab, False, BLOCK)
            target = tl.maximum(p * left, _SMALLEST_MASS)
            cut = tl.maximum(cut, _cut(weights_ptr, target, vocab, False, BLOCK))
    if min_p_ptr is not None:
        cut = tl.maximum(cut, tl.minimum(tl.load(min_p_ptr + row), 1.0))
    return cut


@triton.jit
def _winner(weights_ptr, cut, seed, position, vocab, BLOCK: tl.constexpr):
    """The id that finishes first among those whose weight is at least ``cut``."""
    chosen = 0
    speed = 0.0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weights = tl.load(weights_ptr + at)
        speeds = tl.where(weights >= cut, weights / _race_time(seed, position, at), 0.0)
        new = tl.max(speeds, axis=0)
        chosen = tl.where(new > speed, start + tl.argmax(speeds, axis=0), chosen)
        speed = tl.maximum(speed, new)
    return chosen


@triton.jit
def _sample_kernel(
    logits_ptr,  # (rows, vocab)
    seeds_ptr,  # (rows,) int64
    positions_ptr,  # (rows,) int64
    temperature_ptr,  # (rows,) float32, or None, as all that follow down to in_prompt
    top_k_ptr,  # (rows,) int
    top_p_ptr,
    min_p_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,  # (rows, vocab) int
    in_prompt_ptr,  # (rows, vocab) bool
    weights_ptr,  # (rows, vocab rounded up to BLOCK) float32, written and read again
    ids_ptr,  # (rows,) int64
    logprobs_ptr,  # (rows,) float32
    logits_stride,
    counts_stride,
    in_prompt_stride,
    weights_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    """A program takes one row. It reads the logits once; the passes after that find its weights in cache."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    logits_ptr += row * logits_stride
    weights_ptr += row * weights_stride

    top = -_LARGEST  # of the given logits
    total = tl.zeros((BLOCK,), tl.float32)  # each lane's part of sum exp(logit - top)
    best = -_LARGEST  # of the logits after penalties
    chosen = 0  # where that is
    for start in range(0, vocab, BLOCK):
        at = start + columns
        x = _number(tl.load(logits_ptr + at, mask=at < vocab, other=-float("inf")))
        new = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
        if counts_ptr is not None:
            x = _penalised(
                x, at, row, repetition_ptr, presence_ptr, frequency_ptr, counts_ptr, in_prompt_ptr,
                counts_stride, in_prompt_stride, vocab,
            )  # fmt: skip
        tl.store(weights_ptr + at, x)
        new = tl.max(x, axis=0)
        chosen = tl.where(new > best, start + tl.argmax(x, axis=0), chosen)
        best = tl.maximum(best, new)
    log_total = tl.log(tl.sum(total, axis=0)) + top

    temperature = 1.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    if temperature >= _GREEDY_BELOW:
        tl.debug_barrier()  # a thread may load what another one stored
        for start in range(0, vocab, BLOCK):
            x = tl.load(weights_ptr + start + columns)
            tl.store(weights_ptr + start + columns, tl.exp((x - best) * tl.div_rn(1.0, temperature)))
        tl.debug_barrier()
        cut = _smallest_kept(weights_ptr, row, top_k_ptr, top_p_ptr, min_p_ptr, vocab, BLOCK)
        seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
        chosen = _winner(weights_ptr, cut, seed, position, vocab, BLOCK)
    tl.store(ids_ptr + row, chosen)
    tl.store(logprobs_ptr + row, _number(tl.load(logits_ptr + chosen)) - log_total)


@torch.library.custom_op("llava_kernels::sample", mutates_args=())
def _sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    counts: Tensor | None,
    in_prompt: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return ids, logprobs
    floats = (temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    temperature, top_p, min_p, *penalties = (None if s is None else s.float().contiguous() for s in floats)
    tables = [None if t is None else t if t.stride(1) == 1 else t.contiguous() for t in (logits, counts, in_prompt)]
    blocks = blocks_for("sample", logits.device, vocab)
    weights = logits.new_empty(rows, triton.cdiv(vocab, blocks["BLOCK"]) * blocks["BLOCK"], dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _sample_kernel[(rows,)](
            tables[0],
            seeds.contiguous(),
            positions.contiguous(),
            temperature,
            None if top_k is None else top_k.contiguous(),
            top_p,
            min_p,
            *penalties,
            *tables[1:],
            weights,
            ids,
            logprobs,
            *(0 if t is None else t.stride(0) for t in tables),
            weights.stride(0),
            vocab,
            **blocks,
        )
    return ids, logprobs


@_sample.register_fake
def _(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    counts: Tensor | None,
    in_prompt: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


def _on_cpu(logits: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    draw: Any = native_sample.sample if native_sample.fits(logits) else sample_reference
    return draw(logits, *rest)


native.runs_on_cpu(_sample, _on_cpu)


def builds(arch: int) -> list[Build]:
    """No setting; temperature, top-k and top-p, as is usual; every setting. LLaMA's vocabulary."""
    usual = ("temperature_ptr", "top_k_ptr", "top_p_ptr")
    return [_build(arch, "plain", ()), _build(arch, "usual", usual), _build(arch, "all", tuple(_SETTINGS))]


def _build(arch: int, name: str, used: tuple[str, ...]) -> Build:
    always = {
        "logits_ptr": "*bf16",
        "seeds_ptr": "*i64",
        "positions_ptr": "*i64",
        "weights_ptr": "*fp32",
        "ids_ptr": "*i64",
        "logprobs_ptr": "*fp32",
        "logits_stride": "i32",
        "counts_stride": "i32",
        "in_prompt_stride": "i32",
        "weights_stride": "i32",
        "vocab": "i32",
    }
    blocks = blocks_on("sample", arch, 32_000)
    num_warps = blocks.pop("num_warps")
    return Build(
        name=f"sample_{name}_bf16_32000",
        kernel=_sample_kernel,
        signature=always | {s: kind for s, kind in _SETTINGS.items() if s in used},
        constants={**{s: None for s in _SETTINGS if s not in used}, **blocks},
        num_warps=num_warps,
        kind="memory",
    )


_SETTINGS = {
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "repetition_ptr": "*fp32",
    "presence_ptr": "*fp32",
    "frequency_ptr": "*fp32",
    "counts_ptr": "*i32",
    "in_prompt_ptr": "*i1",
}
