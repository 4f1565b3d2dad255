"""One-line breaks of sample's kernel and its reference: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/sample.py"
TEST = "tests/kernels/test_sample.py"
SAME = f"{TEST}::test_kernel_and_reference_choose_the_same"
BLOCKS = f"{TEST}::TestBoth::test_a_row_of_several_blocks"
LISTS = f"{TEST}::test_filters_against_sorted_lists"
STRIDES = f"{TEST}::TestBoth::test_strides_of_counts_and_prompt"
NUMBERS = f"{TEST}::TestBoth::test_rows_of_nan_and_infinity"

MUTATIONS = [
    (FILE, "1.0 if COUNT else weights, 0.0)", "1.0, 0.0)", f"{TEST}::TestBoth::test_top_p_is_about_mass"),
    (FILE, "tl.maximum(p * left, _SMALLEST_MASS)", "tl.maximum(p, _SMALLEST_MASS)", SAME),
    (
        FILE,
        "cut = tl.maximum(cut, _cut(",
        "cut = tl.minimum(cut, _cut(",
        f"{TEST}::TestBoth::test_the_stricter_of_top_k_and_top_p_decides",
    ),
    (FILE, "_mix(tokens.to(tl.uint32) + first) ^ second)", "_mix(tokens.to(tl.uint32) + first))", SAME),
    (FILE, "start + tl.argmax(speeds, axis=0)", "tl.argmax(speeds, axis=0)", BLOCKS),
    (FILE, "total = total * tl.exp(top - new) +", "total = total +", BLOCKS),
    (FILE, "count.to(tl.float32)", "(count > 0).to(tl.float32)", SAME),
    (FILE, "seen = seen | (prompt != 0)", "seen = seen & (prompt != 0)", SAME),
    (FILE, "row * logits_stride", "row * vocab", f"{TEST}::TestBoth::test_strides_of_logits_and_settings"),
    (FILE, "seeds.contiguous(),", "seeds,", f"{TEST}::TestBoth::test_strides_of_logits_and_settings"),
    (FILE, "row * counts_stride", "row * vocab", STRIDES),
    (FILE, "row * in_prompt_stride", "row * vocab", STRIDES),
    (FILE, "logit > -_LARGEST, logit, -float", "logit > -_LARGEST, logit, float", NUMBERS),
    (FILE, "return tl.minimum(tl.where(logit > -_LARGEST", "return tl.minimum(tl.where(logit == logit", NUMBERS),
    (
        FILE,
        "* 2**-31 + 2**-32, 1 - 2**-24)",
        "* 2**-31 + 2**-32, 1)",
        f"{TEST}::TestBoth::test_the_longest_time_is_still_finite",
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
        "u = (bits.float() * 2**-31 + 2**-32)",
        "u = ((bits & 0xFF).float() * 2**-8 + 2**-9)",
        f"{TEST}::test_rare_tokens_are_drawn_as_often_as_they_should",
    ),
    (
        FILE,
        "(_mixed(_mixed(tokens + first) ^ second), 1)",
        "(_mixed(tokens + low[:, None] + position[:, None]), 1)",
        f"{TEST}::test_neighbouring_draws_are_independent",
    ),
    (FILE, "(seeds >> 32).int()", "(seeds >> 0).int()", f"{TEST}::test_neighbouring_draws_are_independent"),
    (
        FILE,
        "(_mixed(_mixed(tokens + first) ^ second), 1)",
        "(_mixed(tokens + first), 1)",
        f"{TEST}::test_no_two_draws_share_their_noise",
    ),
]
