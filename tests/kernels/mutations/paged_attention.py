"""One-line breaks of paged_attention and store_kv: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/attention/paged.py"
STORE = "kernels/llava_kernels/attention/store_kv.py"
TEST = "tests/kernels/test_paged_attention.py"
PAGED, ROUNDS = f"{TEST}::test_paged_attention", f"{TEST}::test_float8_rounds_to_nearest_even_and_saturates"

MUTATIONS = [
    (FILE, "<= (before + query)[:, None]", "<= (before + queries)", PAGED),
    (FILE, "first = split * part", "first = 0", PAGED),
    (
        FILE,
        'safe = tl.where(new_top == float("-inf"), 0.0, new_top)',
        "safe = new_top",
        f"{TEST}::test_more_splits_than_keys",
    ),
    (FILE, "mask=cols < end, other=0).to", "mask=cols < end + PAGE, other=0).to", PAGED),
    (FILE, "stored = cols < end", "stored = cols < end + 1", PAGED),
    (FILE, "head = kv_head * GROUP + rows % GROUP", "head = kv_head * GROUP", PAGED),
    (FILE, "<< 7) & -16385", "<< 7) & -1", f"{TEST}::test_every_float8_number_is_read_exactly"),
    (FILE, "k_scale * 256, v_scale * 256", "k_scale, v_scale * 256", f"{TEST}::test_float8_cache"),
    (FILE, "tl.sum(parts * weight[:, None], 0) / tl.where", "tl.sum(parts, 0) / tl.where", PAGED),
    (FILE, "tl.where(total == 0.0, 1.0, total)", "total", f"{TEST}::test_query_without_keys_gives_zeros"),
    (STORE, "if slot < 0:", "if slot < -1:", f"{TEST}::test_store_kv"),
    (STORE, "V + token * stride_vt", "V + token * stride_vct", f"{TEST}::test_store_kv"),
    (STORE, "+ ((bits >> 20) & 1)", "+ 1", ROUNDS),
    (STORE, "tl.minimum(tl.abs(x), 448.0)", "tl.minimum(tl.abs(x), 480.0)", ROUNDS),
    (STORE, "size < 0.015625", "size < 0.0078125", ROUNDS),
]
