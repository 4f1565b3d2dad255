"""One-line breaks of paged_attention and store_kv: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/attention/paged.py"
STORE = "kernels/llava_kernels/attention/store_kv.py"
TEST = "tests/kernels/test_paged_attention.py"
PAGED, STRIDES = f"{TEST}::test_paged_attention", f"{TEST}::test_strides"
FAR = f"{TEST}::test_offsets_beyond_int32"
ROUNDS = f"{TEST}::test_float8_rounds_to_nearest_even_and_saturates"

MUTATIONS = [
    (FILE, "<= (before + query)[:, None]", "<= (before + queries)", PAGED),
    (FILE, "first = split * part", "first = 0", PAGED),
    (
        FILE,
        'safe = tl.where(new_top == float("-inf"), 0.0, new_top)',
        "safe = new_top",
        f"{TEST}::test_more_splits_than_keys",
    ),
    (FILE, "tl.load(TABLE + cols // PAGE", "tl.load(TABLE + cols // (2 * PAGE)", PAGED),
    (FILE, "stored = cols < end", "stored = cols < end + 1", PAGED),
    (FILE, "head = kv_head * GROUP + rows % GROUP", "head = kv_head * GROUP", PAGED),
    (FILE, "<< 7) & -16385", "<< 7) & -1", f"{TEST}::test_every_float8_number_is_read_exactly"),
    (FILE, "k_scale * 256, v_scale * 256", "k_scale, v_scale * 256", f"{TEST}::test_float8_cache"),
    (FILE, "tl.sum(parts * weight[:, None], 0) / tl.where", "tl.sum(parts, 0) / tl.where", PAGED),
    (FILE, "tl.where(total == 0.0, 1.0, total)", "total", f"{TEST}::test_query_without_keys_gives_zeros"),
    (FILE, "context_lens.contiguous(), query_start.contiguous()", "context_lens, query_start", STRIDES),
    (STORE, "slots.contiguous()", "slots", f"{TEST}::test_store_kv"),
    (FILE, "kv_head = tl.program_id(0).to(tl.int64)", "kv_head = tl.program_id(0)", FAR),
    (STORE, "(at // HEAD_DIM).to(tl.int64)", "at // HEAD_DIM", FAR),
    (STORE, "if slot < 0:", "if slot < -1:", f"{TEST}::test_store_kv"),
    (STORE, "V + token * stride_vt", "V + token * stride_vct", f"{TEST}::test_store_kv"),
    (STORE, "+ ((bits >> 20) & 1)", "+ 1", ROUNDS),
    (STORE, "tl.minimum(tl.abs(x), 448.0)", "tl.minimum(tl.abs(x), 480.0)", ROUNDS),
    (STORE, "size < 0.015625", "size < 0.0078125", ROUNDS),
]
