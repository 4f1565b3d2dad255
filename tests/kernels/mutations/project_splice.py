"""One-line breaks of project_splice's kernels: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/project_splice.py"
TEST = "tests/kernels/test_project_splice.py"
REPEATED = f"{TEST}::test_embedding_gradient_of_repeated_tokens_is_the_same_every_time"

MUTATIONS = [
    # forward: tiles
    (FILE, "out_at = out_ptr + place[:, None] * D", "out_at = out_ptr + m[:, None] * D", f"{TEST}::test_forward"),
    (FILE, "product += tl.load(bias_ptr + n", "product = tl.load(bias_ptr + n", f"{TEST}::test_forward"),
    (
        FILE,
        "(p // patches).to(tl.int64) * image_stride",
        "(p // patches) * patches * patch_stride",
        f"{TEST}::test_forward",
    ),
    (
        FILE,
        "first = program // (GROUP_M * tiles_n) * GROUP_M",
        "first = program // tiles_n * GROUP_M",
        f"{TEST}::test_forward",
    ),
    # forward: copies
    (FILE, "tl.load(input_ids_ptr + here,", "tl.load(input_ids_ptr + i,", f"{TEST}::test_forward"),
    (FILE, "(program - tiles) % blocks * COPY_COLUMNS", "(program - tiles) % blocks", f"{TEST}::test_forward"),
    # gradients
    (FILE, "grad_at = grad_ptr + place[None, :] * D", "grad_at = grad_ptr + p[None, :] * D", f"{TEST}::test_gradients"),
    (
        FILE,
        "p % PATCHES).to(tl.int64) * patch_stride",
        "p % PATCHES).to(tl.int64) * C",
        f"{TEST}::test_layouts_of_features",
    ),
    (FILE, "    if tile_n == 0:\n", "    if tile_n == 1:\n", f"{TEST}::test_gradients"),
    (FILE, "weight_at += BLOCK_K * C", "weight_at += BLOCK_K", f"{TEST}::test_gradients"),
    (
        FILE,
        "mask=i < text_count, other=-1) == token",
        "mask=i < text_count, other=-1) >= token",
        f"{TEST}::test_gradients",
    ),
    (FILE, "first += BLOCK_ROWS", "first += BLOCK_ROWS + 1", REPEATED),
    (
        FILE,
        "token_ptr + first - 1, mask=first > 0, other=-1)",
        "token_ptr + first - 1, mask=first > 0, other=0)",
        REPEATED,
    ),
]
