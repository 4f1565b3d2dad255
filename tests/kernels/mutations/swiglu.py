"""One-line breaks of swiglu's kernels: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/swiglu.py"
TEST = "tests/kernels/test_swiglu.py"

MUTATIONS = [
    (FILE, "out = gate * tl.sigmoid(gate) * up", "out = up * tl.sigmoid(up) * gate", f"{TEST}::test_swiglu"),
    (FILE, "(1 + gate * (1 - sigmoid))", "(1 + gate * sigmoid)", f"{TEST}::test_gradient"),
    (FILE, "d_up = d_out * gate * sigmoid", "d_up = d_out * sigmoid", f"{TEST}::test_gradient"),
    (FILE, "row * d_out_stride", "row * inner", f"{TEST}::test_strides"),
]
