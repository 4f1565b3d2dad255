"""One-line breaks of linear_cross_entropy's kernel and launchers: (file, fragment, broken fragment, failing test)."""

FILE = "kernels/llava_kernels/linear_cross_entropy.py"
TEST = "tests/kernels/test_linear_cross_entropy.py"

MUTATIONS = [
    (FILE, "others = others * tl.exp(top - new) +", "others = others +", f"{TEST}::test_loss_and_gradients"),
    (FILE, "top = -3.4e38", 'top = -float("inf")', f"{TEST}::test_logits_of_minus_infinity"),
    (
        FILE,
        "tl.where(at == label, -rest, tl.exp(x - top)) * scale",
        "tl.where(at == label, tl.exp(x - top) * scale - 1, tl.exp(x - top) * scale).to(tl.float16).to(tl.float32)",
        f"{TEST}::test_gradient_of_a_label_that_is_nearly_certain",
    ),
    (
        FILE,
        "real = (label >= 0) & (label < vocab)",
        "real = label < vocab",
        f"{TEST}::test_label_outside_the_vocabulary_poisons_its_row_alone",
    ),
    (
        FILE,
        'mask=real, other=float("nan")',
        "mask=real, other=0.0",
        f"{TEST}::test_label_outside_the_vocabulary_poisons_its_row_alone",
    ),
    (FILE, "    if GRADIENT:", "    if True:", f"{TEST}::test_the_loss_alone_leaves_the_logits_as_they_are"),
    (
        FILE,
        "row.to(tl.int64) * logits_stride",
        "row.to(tl.int64) * vocab",
        f"{TEST}::test_label_outside_the_vocabulary_poisons_its_row_alone",
    ),
    (FILE, "beta = 0 if first else 1", "beta = 0", f"{TEST}::test_chunks_add_up"),
    (
        FILE,
        "if step >= len(hidden) else torch.float32)",
        "if step >= len(hidden) else weight.dtype)",
        f"{TEST}::test_weight_gradient_over_many_chunks_keeps_small_parts",
    ),
    (
        FILE,
        "by_hidden * d_loss, by_weight * d_loss",
        "by_hidden * 1, by_weight * 1",
        f"{TEST}::test_scale_from_above_and_two_backwards",
    ),
    (
        FILE,
        "grad and hidden.requires_grad, grad and weight",
        "hidden.requires_grad, weight",
        f"{TEST}::test_no_gradient_under_no_grad",
    ),
]
