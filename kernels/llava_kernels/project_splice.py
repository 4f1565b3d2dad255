"""project_splice: project image features and put them, with the text embeddings, at their places in the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llava_kernels import native
from llava_kernels.build import Build
from llava_kernels.dispatch import use_triton
from llava_kernels.linear import linear
from llava_kernels.tiles import TABLE, blocks_for


def project_splice(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    input_ids: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
) -> Tensor:
    """The decoder's input: ``H_v = W Z_v`` (Visual Instruction Tuning, equation 1) among the text embeddings.

    Features are read where they lie: (N, n, C) with any strides over images and patches, as the vision tower's output
    without its class token (``x[:, 1:]``) has them, is not copied.

    Args:
        features: (..., C) image features Z_v; flattened to (P, C) in order.
        weight: (D, C) projection W, of the features' dtype.
        bias: (D,) or None.
        embedding: (V, D) token embedding table.
        input_ids: (T,) int64 token ids; what stands at image rows is never looked up.
        image_rows: (P,) integer, where row p of the projected features goes.
        text_rows: (T-P,) integer, all other positions.

    Returns:
        (T, D) of the embedding's dtype, every row written exactly once.

    Raises:
        ValueError: the sizes do not fit together, or the Triton kernel is to run on a dtype that it does not take.
    """
    _check(features, weight, bias, embedding, input_ids, image_rows, text_rows)
    given = (features, weight, bias, embedding, input_ids, image_rows, text_rows)
    if use_triton(features):
        return torch.ops.llava_kernels.project_splice(*given)
    if native.use_native(features, weight, bias, embedding, choices=("auto", "native")):
        return native.call(torch.ops.llava_kernels.project_splice, native.project_splice, *given)
    return project_splice_reference(*given)


def project_splice_reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    input_ids: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
) -> Tensor:
    """The definition of :func:`project_splice`."""
    image = linear(features.reshape(-1, features.shape[-1]), weight, bias)  # (P, D)
    text = F.embedding(input_ids[text_rows], embedding)  # (T-P, D)
    both = torch.cat((image.to(text.dtype), text))
    return both.new_empty(both.shape).index_copy(0, torch.cat((image_rows, text_rows)).long(), both)


def _check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    input_ids: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
) -> None:
    (d, c), p = weight.shape, features.shape[:-1].numel()
    if features.shape[-1] != c:
        raise ValueError(f"features have {features.shape[-1]} columns, weight {tuple(weight.shape)} takes {c}")
    if embedding.shape[1] != d or (bias is not None and bias.shape != (d,)):
        raise ValueError(f"weight {tuple(weight.shape)} gives rows of {d}; the embedding or the bias has another width")
    if image_rows.shape[0] != p or p + text_rows.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"{p} rows of features and {input_ids.shape[0]} tokens need as many places, "
            f"not {image_rows.shape[0]} image_rows and {text_rows.shape[0]} text_rows"
        )


# ---- forward: one launch, the first programs project tiles of image rows, the others copy text rows


@triton.jit(do_not_specialize=["image_count", "text_count", "patches"])
def _project_splice_forward_kernel(
    features_ptr,  # row p = (image p // patches, patch p % patches), C contiguous
    weight_ptr,  # (D, C)
    bias_ptr,  # (D,) or None
    embedding_ptr,  # (V, D)
    input_ids_ptr,  # (T,)
    image_rows_ptr,  # (P,)
    text_rows_ptr,  # (T-P,)
    out_ptr,  # (T, D)
    image_count,  # P
    text_count,  # T-P
    patches,
    image_stride,
    patch_stride,
    C,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    COPY_ROWS: tl.constexpr,
    COPY_COLUMNS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = tl.cdiv(image_count, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    # The copies come last: they fill the multiprocessors that the last, incomplete wave of tiles leaves idle.
    if program < tiles:
        tile_m, tile_n = _grouped(program, image_count, D, BLOCK_M, BLOCK_N, GROUP_M)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Rows past the end read the last row instead: no mask in the loop, and nothing of them is stored.
        p = tl.minimum(m, image_count - 1)
        row = (p // patches).to(tl.int64) * image_stride + (p % patches).to(tl.int64) * patch_stride
        column = tl.minimum(n, D - 1).to(tl.int64) * C
        features_at = features_ptr + row[:, None] + k[None, :]  # (BLOCK_M, BLOCK_K)
        weight_at = weight_ptr + column[None, :] + k[:, None]  # (BLOCK_K, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, C, BLOCK_K):
            if EVEN_K:
                a = tl.load(features_at)
                b = tl.load(weight_at)
            else:
                a = tl.load(features_at, mask=(start + k < C)[None, :], other=0.0)
                b = tl.load(weight_at, mask=(start + k < C)[:, None], other=0.0)
            product = tl.dot(a, b, product, input_precision="ieee")
            features_at += BLOCK_K
            weight_at += BLOCK_K
        if bias_ptr is not None:
            product += tl.load(bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
        place = tl.load(image_rows_ptr + m, mask=m < image_count, other=0).to(tl.int64)
        out_at = out_ptr + place[:, None] * D + n[None, :]
        tl.store(out_at, product.to(out_ptr.dtype.element_ty), mask=(m < image_count)[:, None] & (n < D)[None, :])
    else:
        blocks = tl.cdiv(D, COPY_COLUMNS)
        i = (program - tiles) // blocks * COPY_ROWS + tl.arange(0, COPY_ROWS)
        columns = (program - tiles) % blocks * COPY_COLUMNS + tl.arange(0, COPY_COLUMNS)
        here = tl.load(text_rows_ptr + i, mask=i < text_count, other=0).to(tl.int64)
        token = tl.load(input_ids_ptr + here, mask=i < text_count, other=0).to(tl.int64)
        inside = (i < text_count)[:, None] & (columns < D)[None, :]
        text = tl.load(embedding_ptr + token[:, None] * D + columns[None, :], mask=inside)  # (COPY_ROWS, COPY_COLUMNS)
        tl.store(out_ptr + here[:, None] * D + columns[None, :], text, mask=inside)


@triton.jit
def _grouped(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile_m, tile_n): neighbours share GROUP_M rows of tiles, so that what they read stays in the L2 cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height


# ---- backward, weight and bias: d_weight = d_out[image_rows].T @ features, gathered while loading


@triton.jit(do_not_specialize=["image_count"])
def _project_splice_weight_grad_kernel(
    grad_ptr,  # (T, D) gradient of the output
    features_ptr,  # as in the forward
    image_rows_ptr,  # (P,)
    d_weight_ptr,  # (D, C)
    d_bias_ptr,  # (D,) or None
    image_count,  # P
    image_stride,
    patch_stride,
    C,
    D,
    PATCHES: tl.constexpr,  # rows an image: a constant, since the loop divides by it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # One program an output tile, looping over all P rows: nothing is split, so nothing has to be added up afterwards
    # and the result is the same every time. 4096 x 1024 outputs are 128 tiles of 128 x 256.
    tile_m, tile_n = _grouped(tl.program_id(0), D, C, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # columns of the gradient
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # columns of the features
    # The bias gradient is the gradient's sum over rows: the programs of the first column of tiles have it at hand.
    if tile_n == 0:
        d_weight, d_bias = _sum_over_rows(
            grad_ptr, features_ptr, image_rows_ptr, image_count, image_stride, patch_stride, m, n, C, D,
            PATCHES, BLOCK_M, BLOCK_N, BLOCK_K, d_bias_ptr is not None,
        )  # fmt: skip
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + m, d_bias.to(d_bias_ptr.dtype.element_ty), mask=m < D)
    else:
        d_weight, d_bias = _sum_over_rows(
            grad_ptr, features_ptr, image_rows_ptr, image_count, image_stride, patch_stride, m, n, C, D,
            PATCHES, BLOCK_M, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
    d_weight_at = d_weight_ptr + m.to(tl.int64)[:, None] * C + n[None, :]
    tl.store(d_weight_at, d_weight.to(d_weight_ptr.dtype.element_ty), mask=(m < D)[:, None] & (n < C)[None, :])


@triton.jit
def _sum_over_rows(
    grad_ptr, features_ptr, image_rows_ptr, image_count, image_stride, patch_stride, m, n, C, D,
    PATCHES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WITH_BIAS: tl.constexpr,
):  # fmt: skip
    """(grad[rows].T @ features, grad[rows].sum(0)) of columns m and n, float32."""
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # A product with ones rather than tl.sum: the tile stays in shared memory, where tensor cores read it.
    ones = tl.full((BLOCK_K, 16), 1.0, dtype=features_ptr.dtype.element_ty)
    sums = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    for start in range(0, image_count, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        inside = p < image_count
        place = tl.load(image_rows_ptr + p, mask=inside, other=0).to(tl.int64)
        grad_at = grad_ptr + place[None, :] * D + m[:, None]
        g = tl.load(grad_at, mask=inside[None, :] & (m < D)[:, None], other=0.0)  # (BLOCK_M, BLOCK_K)
        row = (p // PATCHES).to(tl.int64) * image_stride + (p % PATCHES).to(tl.int64) * patch_stride
        features_at = features_ptr + row[:, None] + n[None, :]
        x = tl.load(features_at, mask=inside[:, None] & (n < C)[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        g = g.to(x.dtype)
        product = tl.dot(g, x, product, input_precision="ieee")
        if WITH_BIAS:
            sums = tl.dot(g, ones, sums, input_precision="ieee")
    return product, tl.max(sums, axis=1)  # the 16 columns are the same


# ---- backward, features: d_features = d_out[image_rows] @ weight


@triton.jit(do_not_specialize=["image_count"])
def _project_splice_feature_grad_kernel(
    grad_ptr,  # (T, D)
    weight_ptr,  # (D, C)
    image_rows_ptr,  # (P,)
    d_features_ptr,  # (P, C)
    image_count,  # P
    C,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tile_m, tile_n = _grouped(tl.program_id(0), image_count, C, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    place = tl.load(image_rows_ptr + m, mask=m < image_count, other=0).to(tl.int64)
    grad_at = grad_ptr + place[:, None] * D + k[None, :]  # (BLOCK_M, BLOCK_K)
    weight_at = weight_ptr + k.to(tl.int64)[:, None] * C + n[None, :]  # (BLOCK_K, BLOCK_N)
    inside = (n < C)[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            g = tl.load(grad_at)
            w = tl.load(weight_at, mask=inside, other=0.0)
        else:
            g = tl.load(grad_at, mask=(start + k < D)[None, :], other=0.0)
            w = tl.load(weight_at, mask=(start + k < D)[:, None] & inside, other=0.0)
        product = tl.dot(g.to(w.dtype), w, product, input_precision="ieee")
        grad_at += BLOCK_K
        weight_at += BLOCK_K * C
    d_features_at = d_features_ptr + m.to(tl.int64)[:, None] * C + n[None, :]
    tl.store(d_features_at, product.to(d_features_ptr.dtype.element_ty), mask=(m < image_count)[:, None] & inside)


# ---- backward, embedding table: rows of one token added up in their order in the sequence


@triton.jit(do_not_specialize=["text_count"])
def _project_splice_embedding_grad_kernel(
    grad_ptr,  # (T, D)
    token_ptr,  # (T-P,) token ids in rising order
    place_ptr,  # (T-P,) where in the sequence each of them stands
    d_embedding_ptr,  # (V, D) zeros
    text_count,  # T-P
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # A program for every (text row, block of columns). The one at the first row of a token adds up that token's rows,
    # the others end at once: no atomics, so the sum is taken in the same order every time.
    first = tl.program_id(0)
    token = tl.load(token_ptr + first)
    before = tl.load(token_ptr + first - 1, mask=first > 0, other=-1)
    if token != before:
        n = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
        rows = BLOCK_ROWS
        while rows == BLOCK_ROWS:
            i = first + tl.arange(0, BLOCK_ROWS)
            same = tl.load(token_ptr + i, mask=i < text_count, other=-1) == token
            place = tl.load(place_ptr + i, mask=same, other=0).to(tl.int64)
            grad_at = grad_ptr + place[:, None] * D + n[None, :]
            g = tl.load(grad_at, mask=same[:, None] & (n < D)[None, :], other=0.0)  # (BLOCK_ROWS, BLOCK_COLUMNS)
            total += tl.sum(g.to(tl.float32), axis=0)
            first += BLOCK_ROWS
            rows = tl.sum(same.to(tl.int32), axis=0)
        d_embedding_at = d_embedding_ptr + token.to(tl.int64) * D + n
        tl.store(d_embedding_at, total.to(d_embedding_ptr.dtype.element_ty), mask=n < D)


# ---- launchers and registration


@torch.library.custom_op("llava_kernels::project_splice", mutates_args=())
def _project_splice(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    input_ids: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
) -> Tensor:
    _check_dtypes(features, weight, bias)
    (d, c), p, text = weight.shape, image_rows.shape[0], text_rows.shape[0]
    out = embedding.new_empty(p + text, d)
    rows, patches, image_stride, patch_stride = _rows_of(features)
    sizes = _sizes("project_splice", features, p)
    tiles = triton.cdiv(p, sizes["BLOCK_M"]) * triton.cdiv(d, sizes["BLOCK_N"])
    copies = triton.cdiv(text, sizes["COPY_ROWS"]) * triton.cdiv(d, sizes["COPY_COLUMNS"])
    if tiles + copies:
        with torch.cuda.device_of(out):
            _project_splice_forward_kernel[(tiles + copies,)](
                rows, weight.contiguous(), None if bias is None else bias.contiguous(), embedding.contiguous(),
                input_ids.contiguous(), image_rows.contiguous(), text_rows.contiguous(), out,
                p, text, patches, image_stride, patch_stride, c, d, EVEN_K=c % sizes["BLOCK_K"] == 0, **sizes,
            )  # fmt: skip
    return out


@_project_splice.register_fake
def _(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    input_ids: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
) -> Tensor:
    return embedding.new_empty(image_rows.shape[0] + text_rows.shape[0], weight.shape[0])


native.runs_on_cpu(_project_splice, native.project_splice)


@torch.library.custom_op("llava_kernels::project_splice_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, features: Tensor, image_rows: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    (d, c), p = (grad.shape[1], features.shape[-1]), image_rows.shape[0]
    d_weight, d_bias = _new_weight_grad(grad, features, with_bias)
    rows, patches, image_stride, patch_stride = _rows_of(features)
    sizes = _sizes("project_splice_weight_grad", features, p)
    tiles = triton.cdiv(d, sizes["BLOCK_M"]) * triton.cdiv(c, sizes["BLOCK_N"])
    with torch.cuda.device_of(grad):
        _project_splice_weight_grad_kernel[(tiles,)](
            grad.contiguous(), rows, image_rows.contiguous(), d_weight, d_bias if with_bias else None,
            p, image_stride, patch_stride, c, d, PATCHES=patches, **sizes,
        )  # fmt: skip
    return d_weight, d_bias


@_weight_grad.register_fake
def _(grad: Tensor, features: Tensor, image_rows: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    return _new_weight_grad(grad, features, with_bias)


def _new_weight_grad(grad: Tensor, features: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    d = grad.shape[1]
    return features.new_empty(d, features.shape[-1]), features.new_empty(d if with_bias else 0)


@torch.library.custom_op("llava_kernels::project_splice_feature_grad", mutates_args=())
def _feature_grad(grad: Tensor, weight: Tensor, image_rows: Tensor) -> Tensor:
    (d, c), p = weight.shape, image_rows.shape[0]
    d_features = weight.new_empty(p, c)
    sizes = _sizes("project_splice_feature_grad", weight, p)
    tiles = triton.cdiv(p, sizes["BLOCK_M"]) * triton.cdiv(c, sizes["BLOCK_N"])
    if tiles:
        with torch.cuda.device_of(grad):
            _project_splice_feature_grad_kernel[(tiles,)](
                grad.contiguous(), weight.contiguous(), image_rows.contiguous(), d_features, p, c, d,
                EVEN_K=d % sizes["BLOCK_K"] == 0, **sizes,
            )  # fmt: skip
    return d_features


@_feature_grad.register_fake
def _(grad: Tensor, weight: Tensor, image_rows: Tensor) -> Tensor:
    return weight.new_empty(image_rows.shape[0], weight.shape[1])


@torch.library.custom_op("llava_kernels::project_splice_embedding_grad", mutates_args=())
def _embedding_grad(grad: Tensor, input_ids: Tensor, text_rows: Tensor, vocabulary: int) -> Tensor:
    # A stable sort on the device brings each token's rows together in their order: nothing is asked of the host, and
    # d_out is read in place, where index_add and embedding_dense_backward want its text rows copied out first.
    tokens, order = torch.sort(input_ids[text_rows], stable=True)
    places = text_rows[order]
    d_embedding = grad.new_zeros(vocabulary, grad.shape[1])
    sizes = blocks_for("project_splice_embedding_grad", grad.device, places.shape[0])
    if places.shape[0]:
        grid = (places.shape[0], triton.cdiv(grad.shape[1], sizes["BLOCK_COLUMNS"]))
        with torch.cuda.device_of(grad):
            _project_splice_embedding_grad_kernel[grid](
                grad.contiguous(), tokens, places, d_embedding, places.shape[0], grad.shape[1], **sizes
            )
    return d_embedding


@_embedding_grad.register_fake
def _(grad: Tensor, input_ids: Tensor, text_rows: Tensor, vocabulary: int) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weight, _bias, embedding, input_ids, image_rows, text_rows = inputs
    needs_features, needs_weight, needs_bias, needs_embedding = ctx.needs_input_grad[:4]
    ctx.with_bias = needs_bias
    ctx.vocabulary = embedding.shape[0]
    ctx.features_shape = features.shape
    ctx.save_for_backward(
        features if needs_weight or needs_bias else None,
        weight if needs_features else None,
        image_rows if needs_features or needs_weight or needs_bias else None,
        input_ids if needs_embedding else None,
        text_rows if needs_embedding else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, weight, image_rows, input_ids, text_rows = ctx.saved_tensors
    ops = torch.ops.llava_kernels
    d_features = d_weight = d_bias = d_embedding = None
    if weight is not None:
        d_features = ops.project_splice_feature_grad(grad, weight, image_rows).reshape(ctx.features_shape)
    if features is not None:
        d_weight, d_bias = ops.project_splice_weight_grad(grad, features, image_rows, ctx.with_bias)
    if input_ids is not None:
        d_embedding = ops.project_splice_embedding_grad(grad, input_ids, text_rows, ctx.vocabulary)
    return d_features, d_weight, d_bias if ctx.with_bias else None, d_embedding, None, None, None


_project_splice.register_autograd(_backward, setup_context=_save)


def _check_dtypes(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"the Triton kernel takes float32, float16 and bfloat16, not {features.dtype}; "
            "llava_kernels.implementation('reference') takes it"
        )
    if weight.dtype != features.dtype or (bias is not None and bias.dtype != features.dtype):
        raise ValueError(f"features are {features.dtype}; weight and bias must be so too")


def _rows_of(features: Tensor) -> tuple[Tensor, int, int, int]:
    """(features, patches, image stride, patch stride): row p is patch p % patches of image p // patches."""
    if features.dim() > 3:
        features = features.flatten(0, -3)
    if features.stride(-1) != 1:
        features = features.contiguous()
    if features.dim() < 3:
        features = features.reshape(-1, features.shape[-1])
        return features, 1, features.stride(0), 0
    images, patches, _ = features.shape
    image_stride, patch_stride, _ = features.stride()
    if images <= 1 or image_stride == patches * patch_stride:  # one run: nothing to divide
        return features, 1, patch_stride, 0
    return features, max(patches, 1), image_stride, patch_stride


def _sizes(op: str, tensor: Tensor, rows: int) -> dict[str, int]:
    # float32 has twice the bytes and no tensor cores at full precision: tiles of its own
    return blocks_for(op if tensor.element_size() == 2 else f"{op}_fp32", tensor.device, rows)


# ---- for compiling ahead of time


def builds(arch: int) -> list[Build]:
    """Every kernel at the block sizes with which LLaVA's sizes are launched, in bfloat16."""
    bf16, rows = "*bf16", {"image_rows_ptr": "*i32", "image_count": "i32", "C": "i32", "D": "i32"}
    strides = {"image_stride": "i32", "patch_stride": "i32"}
    forward = {
        "features_ptr": bf16, "weight_ptr": bf16, "bias_ptr": bf16, "embedding_ptr": bf16, "input_ids_ptr": "*i64",
        "text_rows_ptr": "*i32", "out_ptr": bf16, "text_count": "i32", "patches": "i32", **strides, **rows,
    }  # fmt: skip
    weight = {
        "grad_ptr": bf16, "features_ptr": bf16, "d_weight_ptr": bf16, "d_bias_ptr": bf16, **strides, **rows,
    }  # fmt: skip
    feature = {"grad_ptr": bf16, "weight_ptr": bf16, "d_features_ptr": bf16, **rows}
    embedding = {
        "grad_ptr": bf16, "token_ptr": "*i64", "place_ptr": "*i32", "d_embedding_ptr": bf16,
        "text_count": "i32", "D": "i32",
    }  # fmt: skip
    even: dict[str, Any] = {"EVEN_K": True}
    kinds: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
        ("project_splice", _project_splice_forward_kernel, forward, even),
        *(
            ("project_splice_weight_grad", _project_splice_weight_grad_kernel, weight, {"PATCHES": patches})
            for patches in (1, 256, 576)
        ),
        ("project_splice_feature_grad", _project_splice_feature_grad_kernel, feature, even),
        ("project_splice_embedding_grad", _project_splice_embedding_grad_kernel, embedding, {}),
    ]
    found = []
    for op, kernel, signature, constants in kinds:
        for row in TABLE[op]:
            if row.arch != arch:
                continue
            blocks = dict(row.blocks)
            launch = {name: blocks.pop(name) for name in ("num_warps", "num_stages") if name in blocks}
            size = "x".join(str(v) for v in (*blocks.values(), *constants.values()) if v is not True)
            build = Build(
                name=f"{op}_bf16_{size}",
                kernel=kernel,
                signature=signature,
                constants={**blocks, **constants},
                kind="memory" if op.endswith("embedding_grad") else "gemm",
                not_aligned=("image_count", "text_count", "patches"),
                **launch,
            )
            found.append(build)
    return found


def candidates(arch: int) -> list[dict[str, int]]:
    """Block sizes to time for the forward pass."""
    return [
        {
            **{"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "COPY_ROWS": 8, "COPY_COLUMNS": 1024},
            **{"num_warps": 8 if m * n > 128 * 128 else 4, "num_stages": stages},
        }
        for m, n in ((64, 128), (64, 256), (128, 128), (128, 256), (256, 128))
        for k, stages in ((32, 4), (64, 3), (64, 4))
    ]


def tuning_case(rows: int, device: torch.device) -> Callable[[], Any]:
    """LLaVA-7B's projector on so many image rows, half as many text rows around them."""
    texts, (c, d) = rows // 2, (1024, 4096)
    features, weight, table = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((rows, c), (d, c), (32_000, d))
    )
    ids = torch.arange(rows + texts, device=device) % 32_000
    places = torch.arange(rows + texts, dtype=torch.int32, device=device)
    return lambda: project_splice(features, weight, None, table, ids, places[texts:], places[:texts])
