"""One-line breaks of linear_gelu's kernels: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/linear_gelu.py"
TEST = "tests/kernels/test_linear_gelu.py"

MUTATIONS = [
    (FILE, "out = y * _normal_below(y)", "out = y * tl.sigmoid(1.702 * y)", f"{TEST}::test_forward"),
    (FILE, "y += tl.load(bias_ptr + n", "y = tl.load(bias_ptr + n", f"{TEST}::test_forward"),
    (
        FILE,
        "(p // patches).to(tl.int64) * image_stride",
        "(p // patches) * patches * patch_stride",
        f"{TEST}::test_layouts_of_x",
    ),
    (FILE, "slope = _normal_below(y) + y *", "slope = _normal_below(y) - y *", f"{TEST}::test_gradients"),
    (
        FILE,
        "mask=inside, other=0.0).to(tl.float32) * slope",
        "mask=inside, other=1.0).to(tl.float32) * slope",
        f"{TEST}::test_gradients",
    ),
    (FILE, "sums_ptr + tile_m.to(tl.int64) * D", "sums_ptr + 0 * D", f"{TEST}::test_gradients"),
    (FILE, "within = program % (GROUP_M * tiles_n)", "within = program % tiles_n", f"{TEST}::test_forward"),
]
