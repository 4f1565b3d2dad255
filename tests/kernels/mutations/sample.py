"""One-line breaks of sample's kernel and its reference: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/sample.py"
TEST = "tests/kernels/test_sample.py"
SAME = f"{TEST}::test_kernel_and_reference_choose_the_same"
LISTS = f"{TEST}::test_filters_against_sorted_lists"

MUTATIONS = [
    (FILE, "weights >= cut, 1.0 if COUNT", "weights > cut, 1.0 if COUNT", SAME),
    (FILE, "tl.maximum(p * left, _SMALLEST_MASS)", "tl.maximum(p, _SMALLEST_MASS)", SAME),
    (
        FILE,
        "cut = tl.maximum(cut, _cut(",
        "cut = tl.minimum(cut, _cut(",
        f"{TEST}::TestBoth::test_the_stricter_of_top_k_and_top_p_decides",
    ),
    (FILE, "_mix(tokens.to(tl.uint32) + first) ^ second)", "_mix(tokens.to(tl.uint32) + first))", SAME),
    (FILE, "start + tl.argmax(speeds, axis=0)", "tl.argmax(speeds, axis=0)", SAME),
    (FILE, "total = total * tl.exp(top - new) +", "total = total +", SAME),
    (FILE, "count.to(tl.float32)", "(count > 0).to(tl.float32)", SAME),
    (FILE, "seen = seen | (prompt != 0)", "seen = seen & (prompt != 0)", SAME),
    (FILE, "row * counts_stride", "row * vocab", f"{TEST}::TestBoth::test_strides"),
    (
        FILE,
        "tl.where(x == x, x, -float",
        "tl.where(x == x, x, float",
        f"{TEST}::TestBoth::test_rows_of_nan_and_infinity",
    ),
    (
        FILE,
        "if temperature >= _GREEDY_BELOW:",
        "if temperature > 0:",
        f"{TEST}::TestBoth::test_greedy_takes_the_lowest_of_equals",
    ),
    (
        FILE,
        "start + tl.argmax(x, axis=0)",
        "tl.argmax(x, axis=0)",
        f"{TEST}::TestBoth::test_greedy_takes_the_lowest_of_equals",
    ),
    # The reference, which the kernel is compared with.
    (FILE, "(top_p[:, None] * mass[:, -1:])", "top_p[:, None]", LISTS),
    (FILE, "(weights < cut, 0)", "(weights <= cut, 0)", LISTS),
    (
        FILE,
        "u = bits.float() * 2**-31 + 2**-32",
        "u = (bits & 0xFF).float() * 2**-8 + 2**-9",
        f"{TEST}::test_rare_tokens_are_drawn_as_often_as_they_should",
    ),
    (
        FILE,
        "first = _mixed(_mixed(_mixed(low ^ 0x243F6A88) ^ high) ^ position)[:, None]",
        "first = (position + low)[:, None]",
        f"{TEST}::test_neighbouring_draws_are_independent",
    ),
]
