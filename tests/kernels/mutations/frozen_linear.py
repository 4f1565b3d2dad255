"""One-line breaks of frozen_linear: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/frozen_linear.py"
TEST = "tests/kernels/test_frozen_linear.py"

MUTATIONS = [
    (FILE, "x *= tl.load(columns_ptr + k, mask=inside, other=0.0)", "pass", f"{TEST}::test_rows_are_rounded"),
    (FILE, "row * stride + k", "row * K + k", f"{TEST}::test_strides"),
    (FILE, "tl.where(largest == 0, 1.0, largest / 448.0)", "largest / 448.0", f"{TEST}::test_a_row_of_zeros"),
    (FILE, "round_rows(dy, scale)", "round_rows(dy)", f"{TEST}::test_gradient_is_the_rounded_functions"),
    (FILE, "codes.t().contiguous()", "codes.t()[:].clone().flip(0)", f"{TEST}::test_gradient_is_the_rounded_functions"),
    (FILE, "largest / FP8_MAX)", "largest / 224)", f"{TEST}::test_rows_are_rounded"),
]
