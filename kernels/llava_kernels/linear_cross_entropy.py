"""linear_cross_entropy: output head and next-token loss, for the supervised rows alone.

The Triton path holds a chunk of logits at a time, and turns it in place into its gradient while the loss is taken; the
three matrix products are cuBLAS's.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.tiles import blocks_for, blocks_on


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of ``hidden @ weight.T`` against ``labels``, taken in float32.

    On a GPU the gradients are made together with the loss, and only those that are needed: backward scales them.

    Args:
        hidden: (L, D) final hidden states of the supervised positions.
        weight: (V, D) output head, of hidden's dtype.
        labels: (L,) int64 targets, all of them real (no ignored ones). One outside [0, V) makes the loss NaN on a GPU
            and is not looked up there.

    Returns:
        float32 scalar, the sum over the L rows; zero, still attached to the graph, when L is 0.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; (L, D) and (V, D) are needed"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; they must agree")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels is {tuple(labels.shape)}, and {len(hidden)} rows need ({len(hidden)},)")
    if use_triton(hidden):
        grad = torch.is_grad_enabled()
        return torch.ops.llava_kernels.linear_cross_entropy(
            hidden, weight, labels, grad and hidden.requires_grad, grad and weight.requires_grad
        )[0]
    return linear_cross_entropy_reference(hidden, weight, labels)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()  # (L, V)
    return F.cross_entropy(logits, labels, reduction="sum")


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (rows, vocab), becomes its gradient when GRADIENT
    labels_ptr,  # (rows,) int64
    losses_ptr,  # (rows,) float32
    logits_stride,
    vocab,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes one row: once over it for the maximum and the sum, once more (from cache) for the gradient."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    label = tl.load(labels_ptr + row)
    # Every thread has read this before the first gradient is stored: the reductions of the first loop lie between.
    # A label outside the row is not read; its NaN runs through to the loss and the gradient.
    real = (label >= 0) & (label < vocab)
    target = tl.load(logits_ptr + label, mask=real, other=float("nan")).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top = -3.4e38  # running maximum; finite, so that a block of -inf yields no inf - inf
    others = tl.zeros((BLOCK,), tl.float32)  # each lane's part of sum exp(logit - top) over all but the label
    for start in range(0, vocab, BLOCK):
        at = start + columns
        x = tl.load(logits_ptr + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, axis=0))
        others = others * tl.exp(top - new) + tl.where(at == label, 0.0, tl.exp(x - new))
        top = new
    rest = tl.sum(others, axis=0)
    total = rest + tl.exp(target - top)
    tl.store(losses_ptr + row, tl.log(total) + (top - target))
    if GRADIENT:
        scale = 1.0 / total
        for start in range(0, vocab, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
            # softmax - 1 at the label as minus the others' share: no digits are lost where softmax is nearly 1.
            gradient = tl.where(at == label, -rest, tl.exp(x - top)) * scale
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < vocab)


def _cross_entropy(logits: Tensor, labels: Tensor, losses: Tensor, gradient: bool) -> None:
    """Fill ``losses`` and, if asked, overwrite ``logits`` with the gradient of their sum."""
    rows, vocab = logits.shape
    blocks = blocks_for("cross_entropy", logits.device, vocab)
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](logits, labels, losses, logits.stride(0), vocab, GRADIENT=gradient, **blocks)


def chunk_rows(rows: int, dim: int, trains_weight: bool) -> int:
    """How many rows' logits are held at a time.

    Head frozen: an eighth of the rows, but enough for products that fill the card. Head trained: each further chunk
    reads and writes the whole float32 weight gradient, which takes as long as the product over about 1,000 rows; so the
    chunks have up to dim rows (their logits take what the weight takes), and all is done at once up to 2 * dim rows,
    where the logits take no more than that float32 gradient would.
    """
    chunks = max(1, min(8, rows // 1024))
    if trains_weight:
        chunks = 1 if rows <= 2 * dim else triton.cdiv(rows, dim)
    return min(rows, _multiple(triton.cdiv(rows, chunks)))  # whole tiles of the products


def _multiple(size: int, of: int = 128) -> int:
    return triton.cdiv(size, of) * of


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    step = chunk_rows(len(hidden), hidden.shape[1], needs_weight)
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    d_hidden = hidden.new_empty(hidden.shape) if needs_hidden else None
    d_weight = None
    if needs_weight:
        d_weight = weight.new_empty(weight.shape, dtype=weight.dtype if step >= len(hidden) else torch.float32)
    if len(hidden):
        _fill(losses, d_hidden, d_weight, hidden, weight, labels.contiguous(), step)
    elif d_weight is not None:
        d_weight.zero_()
    return (
        losses.sum(),
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight.to(weight.dtype),
    )


def _fill(
    losses: Tensor,  # (L,)
    d_hidden: Tensor | None,  # (L, D)
    d_weight: Tensor | None,  # (V, D), float32 if there are several chunks
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    step: int,
) -> None:
    """Write the three outputs, ``step`` rows at a time."""
    # Rows at a multiple of 16 bytes, without which cuBLAS takes slower kernels.
    buffer = hidden.new_empty(step, _multiple(len(weight), 64))
    for start in range(0, len(hidden), step):
        chunk = slice(start, start + step)
        x = hidden[chunk]  # (n, D)
        logits = buffer[: len(x), : len(weight)]  # (n, V)
        torch.mm(x, weight.t(), out=logits)
        _cross_entropy(logits, labels[chunk], losses[chunk], gradient=d_hidden is not None or d_weight is not None)
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[chunk])
        if d_weight is not None:
            _accumulate(d_weight, logits, x, first=start == 0)


def _accumulate(d_weight: Tensor, d_logits: Tensor, x: Tensor, first: bool) -> None:
    """Add ``d_logits.T @ x``, (V, n) @ (n, D), to ``d_weight``, which holds nothing yet the first time."""
    beta = 0 if first else 1
    if d_weight.dtype == d_logits.dtype:
        torch.addmm(d_weight, d_logits.t(), x, beta=beta, out=d_weight)
    elif d_weight.is_cuda:  # only there do half precision products have a float32 result
        torch.addmm(d_weight, d_logits.t(), x, out_dtype=torch.float32, beta=beta, out=d_weight)
    else:
        torch.addmm(d_weight, d_logits.t().float(), x.float(), beta=beta, out=d_weight)


# The flags say what gradients to make: whether a tensor wants one is not known any more inside the op.
@torch.library.custom_op("llava_kernels::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient by hidden, by weight); of a gradient that is not needed, an empty tensor."""
    return _forward(hidden, weight, labels, needs_hidden, needs_weight)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
    )


@torch.library.custom_op("llava_kernels::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(d_loss: Tensor, by_hidden: Tensor, by_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients times ``d_loss``, into new tensors: the saved ones serve a second backward too."""
    return by_hidden * d_loss, by_weight * d_loss


@_linear_cross_entropy_backward.register_fake
def _(d_loss: Tensor, by_hidden: Tensor, by_weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(by_hidden), torch.empty_like(by_weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, by_hidden, by_weight = output
    ctx.mark_non_differentiable(by_hidden, by_weight)
    ctx.save_for_backward(by_hidden, by_weight)


def _differentiate(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = torch.ops.llava_kernels.linear_cross_entropy_backward(d_loss, *ctx.saved_tensors)
    return d_hidden if needs_hidden else None, d_weight if needs_weight else None, None, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def builds(arch: int) -> list[Build]:
    """Loss alone, and loss with gradient, at LLaMA's vocabulary."""
    blocks = blocks_on("cross_entropy", arch, 32_000)
    num_warps = blocks.pop("num_warps")
    return [
        Build(
            name=f"cross_entropy_{name}_bf16_32000",
            kernel=_cross_entropy_kernel,
            signature={
                "logits_ptr": "*bf16",
                "labels_ptr": "*i64",
                "losses_ptr": "*fp32",
                "logits_stride": "i32",
                "vocab": "i32",
            },
            constants={"GRADIENT": gradient, **blocks},
            num_warps=num_warps,
            kind="memory",
        )
        for name, gradient in (("loss", False), ("gradient", True))
    ]
