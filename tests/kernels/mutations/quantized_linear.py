"""One-line breaks of quantized_linear's kernels: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/quantized_linear.py"
TEST = "tests/kernels/test_quantized_linear.py"
FLOAT8 = f"{TEST}::test_float8_activations_are_taken_where_they_can_be"

MUTATIONS = [
    (FILE, "_position(FORMAT, plane + PLANES)", "_position(FORMAT, plane)", f"{TEST}::test_product"),
    (FILE, "acc += offset * tl.sum(", "acc += scale * tl.sum(", f"{TEST}::test_groups"),
    (FILE, "x_sum += low + high", "x_sum += low", f"{TEST}::test_groups"),
    (FILE, "(signed & -0x78100000)", "(signed & -0x78000000)", f"{TEST}::test_every_code_is_read_exactly"),
    (FILE, "((2**BITS - 1) << POSITION)", "((2**BITS - 2) << POSITION)", f"{TEST}::test_every_code_is_read_exactly"),
    (
        FILE,
        "k = block * BLOCK_K + plane * (2 * WORDS)\n                inside",
        "k = block * BLOCK_K + plane * WORDS\n                inside",
        f"{TEST}::test_product",
    ),
    (
        FILE,
        "offset_ptr, block * N + row, BLOCK_N, FORMAT, DTYPE",
        "offset_ptr, first * N + row, BLOCK_N, FORMAT, DTYPE",
        f"{TEST}::test_product_at_the_table_s_tiles",
    ),
    (
        FILE,
        "inside &= (k + k_of_plane)[:, None] < K",
        "inside &= (k + k_of_plane)[:, None] <= K",
        f"{TEST}::test_layouts_of_x",
    ),
    (
        FILE,
        "(0x3F803F80, 0x07F007F0)",
        "(0x3F003F00, 0x07F007F0)",
        f"{TEST}::test_every_code_is_read_exactly",
    ),
    (FILE, "parts_ptr + split * size + i", "parts_ptr + i", f"{TEST}::test_product"),
    (FILE, "bias_ptr + i % N", "bias_ptr + i * 0", f"{TEST}::test_product"),
    (
        FILE,
        "tile, mul, add, plane, FORMAT, tl.float32",
        "tile, mul, add, 0, FORMAT, tl.float32",
        f"{TEST}::test_dequantising_kernel_equals_the_definition",
    ),
    (FILE, "x.dtype == torch.bfloat16 and out", "out", FLOAT8),
    (FILE, "out_features % 16 == 0", "out_features % 2 == 0", FLOAT8),
    (FILE, "x.numel() > FEW_ROWS * x.shape[-1]", "x.numel() >= FEW_ROWS * x.shape[-1]", FLOAT8),
    (
        FILE,
        "channel_ptr + row) * _unit(FORMAT, False)",
        "channel_ptr + row) * _unit(FORMAT, True)",
        f"{TEST}::test_many_rows",
    ),
]
