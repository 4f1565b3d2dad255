"""One-line breaks of rms_norm's kernels and launchers: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/rms_norm.py"
TEST = "tests/kernels/test_rms_norm.py"

MUTATIONS = [
    (FILE, "keep_dims=True) / dim + eps)", "keep_dims=True) / BLOCK + eps)", f"{TEST}::test_rms_norm"),
    (
        FILE,
        "normed = (x * rstd).to(out_ptr.dtype.element_ty)",
        "normed = x * rstd",
        f"{TEST}::test_rounds_before_the_weight_as_llama_does",
    ),
    (FILE, "x = total.to(tl.float32)", "x = x", f"{TEST}::test_norms_the_rounded_sum"),
    (FILE, "rows * residual_stride", "rows * x_stride", f"{TEST}::test_strides"),
    (FILE, "(g - h * (tl", "(g + h * (tl", f"{TEST}::test_rms_norm_gradients"),
    (FILE, "d_weight += d_out *", "d_weight = d_out *", f"{TEST}::test_rms_norm_gradients"),
    (FILE, "d_x += d_sum.to", "d_x = d_sum.to", f"{TEST}::test_add_rms_norm_gradients"),
    (FILE, "rows * d_out_stride", "rows * x_stride", f"{TEST}::test_strides"),
    (
        FILE,
        "*ctx.saved_tensors, needs_x, needs_weight)",
        "*ctx.saved_tensors, True, True)",
        f"{TEST}::test_nothing_is_computed_for_what_is_frozen",
    ),
]
