"""One-line breaks of varlen_attention: (file, fragment, broken fragment, test that must fail)."""

FOLDER = "kernels/llava_kernels/attention"
FILE = f"{FOLDER}/triton_varlen.py"
TEST = "tests/kernels/test_varlen_attention.py"
FAR = f"{TEST}::test_offsets_beyond_int32"
TRITON, HANDED = f"{TEST}::test_triton", f"{TEST}::test_what_the_libraries_are_handed"

MUTATIONS = [
    (FILE, "s = tl.where(seen, s, float(", "s = tl.where(seen, s, 0 * float(", TRITON),
    (FILE, "norm = norm * shrink +", "norm = norm +", f"{TEST}::test_scores_far_from_zero"),
    (FILE, '"GROUP": q.shape[1] // k.shape[1],', '"GROUP": 1,', TRITON),
    (
        FILE,
        "inside &= dims < HEAD_DIM\n    return",
        "inside &= dims < BLOCK_D\n    return",
        f"{TEST}::test_triton_head_sizes",
    ),
    (FILE, "tl.sum(out * d_out, 1)", "tl.sum(out, 1)", TRITON),
    (FILE, "D_OUT += m0.to(tl.int64) * stride_t", "D_OUT += m0.to(tl.int64) * heads", f"{TEST}::test_strides"),
    (FILE, "p = tl.where(cols <= rows[None, :], p, 0.0)", "p = p", TRITON),
    (FILE, "for i in range(GROUP):", "for i in range(1):", TRITON),
    (FILE, "p = tl.where(seen, p, 0.0)", "p = p", TRITON),
    (FILE, "- delta[:, None])", ")", TRITON),
    (
        FILE,
        "ctx.causal, want_q, want_k or want_v",
        "ctx.causal, True, True",
        f"{TEST}::test_nothing_is_computed_for_what_is_frozen",
    ),
    (FILE, "head = (pid // blocks % heads).to(tl.int64)  #", "head = pid // blocks % heads  #", FAR),
    (FILE, "kv_head = (pid // blocks % kv_heads).to(tl.int64)", "kv_head = pid // blocks % kv_heads", FAR),
    (FILE, "head = tl.program_id(1).to(tl.int64)", "head = tl.program_id(1)", FAR),
    (f"{FOLDER}/torch_varlen.py", "(-1, 0) if causal", "(-1, -1) if causal", HANDED),
    (f"{FOLDER}/torch_varlen.py", 'options["enable_gqa"] = True', "pass", HANDED),
    (f"{FOLDER}/xformers.py", "expand(-1, -1, -1, group, -1)", "expand(-1, -1, -1, 1, -1)", HANDED),
    (f"{FOLDER}/flash_attn.py", "causal=causal", "causal=True", HANDED),
    (f"{FOLDER}/varlen.py", "[n for n in lengths if n], None", "[n for n in lengths if n], cu_seqlens", HANDED),
    (
        f"{FOLDER}/backend.py",
        "return cu_seqlens.contiguous()",
        "return cu_seqlens",
        f"{TEST}::test_cu_seqlens_may_be_given",
    ),
    (f"{FOLDER}/backend.py", "card < 80", "card < 70", f"{TEST}::test_auto_on_a_gpu"),
]
