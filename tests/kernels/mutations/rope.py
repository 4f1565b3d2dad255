"""One-line breaks of rope's kernel and launcher: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/rope.py"
TEST = "tests/kernels/test_rope.py"

MUTATIONS = [
    (FILE, "(a * cos - b * sin).to", "(a * cos + b * sin).to", f"{TEST}::test_rope"),
    (FILE, "cos_ptr + token * HALF", "cos_ptr + 0 * token", f"{TEST}::test_rope"),
    (FILE, "        sin = -sin", "        sin = sin", f"{TEST}::test_gradient"),
    (FILE, "head * x_head_stride", "head * out_head_stride", f"{TEST}::test_strides"),
    (
        FILE,
        "heads, tl.num_programs(1) * HEADS)",
        "HEADS, HEADS)",
        f"{TEST}::test_one_program_for_all_heads_of_its_tokens",
    ),
]
