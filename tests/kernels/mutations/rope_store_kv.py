"""One-line breaks of rope_store_kv's kernel and launcher: (file, fragment, broken fragment, test that must fail)."""

FILE = "kernels/llava_kernels/attention/rope_store_kv.py"
TEST = "tests/kernels/test_rope_store_kv.py"
SAME = f"{TEST}::test_is_rope_and_then_store_kv"
TILES = f"{TEST}::test_a_program_takes_several_tiles"
STRIDES = f"{TEST}::test_strides_of_the_other_arguments"
FAR = f"{TEST}::test_offsets_beyond_int32"

MUTATIONS = [
    (FILE, "left * cos - right * sin", "left * cos + right * sin", f"{TEST}::test_rope_store_kv"),
    (FILE, ".to(a.dtype), (right", ", (right", f"{TEST}::test_is_rope_and_then_store_kv"),
    (FILE, "b.to(tl.float32) / factor", "b.to(tl.float32) * factor", SAME),
    (FILE, "known & (slot >= 0)", "known", f"{TEST}::test_tokens_that_are_not_stored"),
    (FILE, "known & (head < heads)", "stored & (head < heads)", f"{TEST}::test_tokens_that_are_not_stored"),
    (FILE, "slot // PAGE * stride_kcb", "slot // PAGE * stride_vct", SAME),
    (FILE, "slot % PAGE * stride_vct", "slot % PAGE * stride_vch", SAME),
    (FILE, "head * stride_vch", "head * stride_h", f"{TEST}::test_layouts_of_the_cache"),
    (FILE, "rows + head * stride_h", "rows + head * 2 * HALF", STRIDES),
    (FILE, "(heads + head) * stride_h", "(heads + kv_heads + head) * stride_h", SAME),
    (FILE, "(heads + kv_heads + head) * stride_h", "(2 * heads + head) * stride_h", SAME),
    (FILE, "tl.cdiv(heads, HEADS)  #", "heads // HEADS  #", TILES),
    (FILE, "first_k + tl.cdiv(kv_heads, HEADS)", "first_k + 1", TILES),
    (FILE, "2 * first_v - first_k, tl.num_programs(1)", "2 * first_v - first_k, 2 * tl.num_programs(1)", TILES),
    (FILE, "k_place + head", "v_place + head", SAME),
    (FILE, "k_factor, inside, HALF, QUANTIZED", "v_factor, inside, HALF, QUANTIZED", SAME),
    (FILE, "slots.contiguous()", "slots", STRIDES),
    (FILE, "cos.contiguous()", "cos", STRIDES),
    (FILE, "tl.arange(0, HEADS).to(tl.int64)", "tl.arange(0, HEADS)", FAR),
    (FILE, "return q.copy_(", "return (", f"{TEST}::test_queries_are_turned_where_they_lie_and_keys_and_values_stay"),
]
