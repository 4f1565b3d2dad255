/* The inference operations of llava_kernels for programs in C: plain pointers, sizes, strides and a stream.
 *
 * A handle belongs to one CUDA device, or to the CPU. On a device the operations launch Triton kernels that were
 * compiled when the library was built, asynchronously, on the stream that is given; every pointer is a device pointer,
 * and the calls may be captured in a CUDA graph. On the CPU they run before the call returns. Row-major everywhere;
 * strides count elements, and 0 stands for contiguous. A field that is left out of a designated initialiser is 0.
 *
 * A handle may be used by one thread at a time. The CUDA driver is looked for when a device's handle is created.
 */
#ifndef LLAVA_KERNELS_H
#define LLAVA_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LK_API __attribute__((visibility("default")))

typedef enum lk_status {
    LK_OK = 0,
    LK_INVALID_ARGUMENT = 1, /* a size, stride or pointer that cannot be */
    LK_UNSUPPORTED = 2,      /* nothing was compiled for these sizes or this type, or the CPU has no version of the op */
    LK_NO_KERNELS = 3,       /* the library was built without GPU kernels */
    LK_NO_DRIVER = 4,        /* libcuda.so.1 is missing, or too old */
    LK_NO_DEVICE = 5,        /* no such device, or a card that no kernels were compiled for */
    LK_OUT_OF_MEMORY = 6,
    LK_CUDA = 7 /* the driver reported an error: lk_last_error has its words */
} lk_status;

/* GPUs take LK_BFLOAT16, the CPU LK_FLOAT32 and LK_BFLOAT16; LK_FLOAT8_E4M3 is for key-value caches on GPUs. */
typedef enum lk_dtype { LK_FLOAT32 = 0, LK_FLOAT16 = 1, LK_BFLOAT16 = 2, LK_FLOAT8_E4M3 = 3 } lk_dtype;

typedef struct lk_handle lk_handle;
typedef void *lk_stream; /* a CUstream or cudaStream_t; NULL is the default stream */

#define LK_CPU (-1)

/* A handle for a CUDA device (0, 1, ...) or for LK_CPU. On failure *handle is NULL. */
LK_API lk_status lk_create(lk_handle **handle, int device);
LK_API void lk_destroy(lk_handle *handle); /* NULL is fine */

/* What a code means. */
LK_API const char *lk_error_string(lk_status status);
/* What went wrong last with this handle; with NULL, in this thread's last lk_create. "" when nothing did. */
LK_API const char *lk_last_error(const lk_handle *handle);

/* The decoder's input: image features projected (W Z + b, Visual Instruction Tuning, equation 1) and put, with the text
 * embeddings, at their places in the packed sequence of patches + texts tokens. Every row of out is written once.
 * Together image_rows and text_rows must hold every number below patches + texts once; the CPU checks it, a GPU cannot.
 */
typedef struct lk_project_splice_args {
    lk_dtype dtype; /* of features, weight, bias, embedding and out */
    int64_t images, image_patches; /* patches = images * image_patches */
    int64_t texts;
    int64_t channels, width, vocabulary;
    const void *features;       /* (images, image_patches, channels) */
    int64_t image_stride;       /* of features, from image to image: a class token is skipped by it, not by a copy */
    int64_t patch_stride;       /* of features, from patch to patch */
    const void *weight;         /* (width, channels) */
    const void *bias;           /* (width,), or NULL */
    const void *embedding;      /* (vocabulary, width) */
    const int64_t *input_ids;   /* (patches + texts,) token ids; what stands at image rows is not looked at */
    const int32_t *image_rows;  /* (patches,) where the projected patches go */
    const int32_t *text_rows;   /* (texts,) all other positions */
    void *out;                  /* (patches + texts, width) */
} lk_project_splice_args;
LK_API lk_status lk_project_splice(lk_handle *handle, const lk_project_splice_args *args, lk_stream stream);

/* x / sqrt(mean(x^2) + eps) * weight over rows of `width`, the statistics in float32, rounded before the weight; with a
 * residual, of x + residual as it is written to sum. */
typedef struct lk_rms_norm_args {
    lk_dtype dtype;
    int64_t rows, width;
    float eps;
    const void *x;         /* (rows, width) */
    int64_t x_stride;      /* from row to row */
    const void *residual;  /* (rows, width), or NULL */
    int64_t residual_stride;
    const void *weight;    /* (width,) */
    void *out;             /* (rows, width) */
    void *sum;             /* (rows, width) x + residual; NULL without a residual */
    float *rstd;           /* (rows,) 1 / sqrt(mean(x^2) + eps) for a backward pass, on the CPU only; or NULL */
} lk_rms_norm_args;
LK_API lk_status lk_rms_norm(lk_handle *handle, const lk_rms_norm_args *args, lk_stream stream);

/* Rotary embedding, element i turned with element i + head_dim/2. out may be x. */
typedef struct lk_rope_args {
    lk_dtype dtype;            /* of x and out */
    int64_t tokens, heads, head_dim;
    const void *x;             /* (tokens, heads, head_dim) */
    int64_t x_token_stride, x_head_stride;
    const float *cos, *sin;    /* (tokens, head_dim/2) of each token's position */
    void *out;                 /* (tokens, heads, head_dim) */
    int64_t out_token_stride, out_head_stride;
    int inverse;               /* 1: by the opposite angle, which is the backward pass */
} lk_rope_args;
LK_API lk_status lk_rope(lk_handle *handle, const lk_rope_args *args, lk_stream stream);

/* silu(gate) * up. */
typedef struct lk_swiglu_args {
    lk_dtype dtype;
    int64_t rows, inner;
    const void *gate_up;     /* (rows, 2 * inner), gate first */
    int64_t gate_up_stride;  /* from row to row */
    void *out;               /* (rows, inner) */
} lk_swiglu_args;
LK_API lk_status lk_swiglu(lk_handle *handle, const lk_swiglu_args *args, lk_stream stream);

/* Each token's keys and values into its slot of a cache that is cut into blocks. */
typedef struct lk_store_kv_args {
    lk_dtype dtype, cache_dtype;
    int64_t tokens, kv_heads, head_dim, block_size;
    const void *k, *v;                /* (tokens, kv_heads, head_dim) */
    int64_t token_stride, head_stride; /* of k and of v */
    void *k_cache, *v_cache;          /* (blocks, block_size, kv_heads, head_dim) */
    int64_t cache_block_stride, cache_token_stride, cache_head_stride; /* of both */
    const int64_t *slots;             /* (tokens,) block * block_size + offset, each at most once; -1: not stored */
    float k_scale, v_scale;           /* of an LK_FLOAT8_E4M3 cache: values are divided by them; 0 stands for 1 */
} lk_store_kv_args;
LK_API lk_status lk_store_kv(lk_handle *handle, const lk_store_kv_args *args, lk_stream stream);

/* Attention of each sequence's last tokens over all of its tokens in the cache, themselves included, causal. One query
 * a sequence is decoding, several are a chunk of a prompt; both may stand in one call. */
typedef struct lk_paged_attention_args {
    lk_dtype dtype, cache_dtype;
    int64_t tokens, sequences, heads, kv_heads, head_dim, block_size;
    int64_t max_query;                /* no sequence has more queries */
    const void *q;                    /* (tokens, heads, head_dim) */
    int64_t q_token_stride, q_head_stride;
    const void *k_cache, *v_cache;    /* (blocks, block_size, kv_heads, head_dim) */
    int64_t cache_block_stride, cache_token_stride, cache_head_stride; /* of both */
    const int32_t *block_table;       /* (sequences, table_stride) the numbers of each sequence's blocks, in order */
    int64_t table_stride;
    const int32_t *context_lens;      /* (sequences,) tokens in the cache, the queries included */
    const int32_t *query_start;       /* (sequences + 1,) where each sequence's queries start in q, then tokens */
    float k_scale, v_scale;           /* of an LK_FLOAT8_E4M3 cache: its values are multiplied by them; 0 stands for 1 */
    int64_t splits;                   /* parts that a sequence's keys are worked on in at a time; 0 stands for 1 */
    void *workspace;                  /* tokens * heads * splits * (head_dim + 1) floats; NULL with one split */
    void *out;                        /* (tokens, heads, head_dim) */
} lk_paged_attention_args;
LK_API lk_status lk_paged_attention(lk_handle *handle, const lk_paged_attention_args *args, lk_stream stream);

/* ---- On the CPU only: lk_create with LK_CPU. Weights are read where they lie and are not copied. */

/* Threads that a call may use, the caller's among them; 1 to begin with. They sleep when no call comes for
 * 60 us, or for 500 us where the call before came as soon. */
LK_API lk_status lk_set_threads(lk_handle *handle, int threads);
/* "portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx" or "neon": LK_UNSUPPORTED where the processor or
 * the build lacks it. To begin with, and with NULL, the best there is. */
LK_API lk_status lk_set_instructions(lk_handle *handle, const char *name);
LK_API const char *lk_instructions(const lk_handle *handle);

typedef enum lk_weight_format {
    LK_WEIGHT_FLOAT32 = 0,
    LK_WEIGHT_BFLOAT16 = 1,
    LK_WEIGHT_INT8 = 2, /* scale * (code - 128); llava_kernels.Int8Weight */
    LK_WEIGHT_INT4 = 3  /* scale * (group_scale * code + group_offset); llava_kernels.Int4Weight */
} lk_weight_format;

typedef struct lk_compact lk_compact; /* a weight of bfloat16 in 12 bits a value: lk_compact_create */

/* A matrix (out_features, in_features). The codes of 8 and 4 bits lie as quantized_linear.py says, in_features rounded
 * up to a multiple of 128 or of group_size. Activations that meet them are rounded to 16 bits a group of values. With "amx"
 * and "avx512bf16", where the dtype of the call is bfloat16, activations are rounded to bfloat16: those that meet weights of
 * 16 bits always, others from five ("amx") or sixteen rows on. */
typedef struct lk_weight {
    lk_weight_format format;
    int64_t out_features, in_features;
    const void *data;
    int64_t row_stride;                     /* of the float formats; 0: contiguous */
    const float *scale;                     /* (out_features,) of the codes */
    const void *group_scale, *group_offset; /* (groups, out_features) bfloat16, of 4 bits; may be NULL beside group_pairs */
    int64_t group_size;                     /* of 4 bits: 64, 128 or 256 */
    const uint32_t *group_pairs;            /* of 4 bits: (out_features, groups rounded up to a multiple of 8), scales in
                                             * the upper halves, offsets in the lower; 0 where there is no group. Read
                                             * with the codes, in one stream: faster. NULL: there is none */
    const lk_compact *compact;              /* of bfloat16: the same values, read in place of data where so few activations
                                             * meet them that memory is what takes the time. NULL: there is none */
} lk_weight;

/* The values of a bfloat16 weight in 12 bits each: three quarters of the bytes, and nothing is rounded. It does not refer to
 * the weight afterwards, and must outlive the decoder that reads it. LK_UNSUPPORTED: the weight's values span so many
 * powers of two that it has no such form, or the handle's instructions ("portable") would not read it. */
LK_API lk_status lk_compact_create(lk_handle *handle, const lk_weight *weight, lk_compact **compact);
LK_API void lk_compact_destroy(lk_compact *compact); /* NULL is fine */
LK_API int64_t lk_compact_bytes(const lk_compact *compact); /* of memory that it takes; of NULL: 0 */

/* x W^T + b, added up in float32 (int8 and int4: in integers within a group), or GELU(x W^T + b). */
typedef struct lk_linear_args {
    lk_dtype dtype; /* of x, bias and out: LK_FLOAT32 or LK_BFLOAT16 */
    int64_t rows;
    lk_weight weight;
    const void *x;      /* (rows, in_features) */
    int64_t x_stride;   /* from row to row */
    const void *bias;   /* (out_features,), or NULL */
    void *out;          /* (rows, out_features) */
    int64_t out_stride; /* from row to row */
    int gelu;           /* not 0: GELU by the normal distribution (Hendrycks and Gimpel 2016), before anything is rounded */
    int activation_bits; /* 8: activations that meet weights of 8 and 4 bits are rounded to 8 bits where that is faster. Before
                          * 4 bits: on x86 but for "portable", a scale for each of the weight's groups, or for 64 values from
                          * five rows on ("avxvnni"), 21 ("avx2") or eight ("avx512", "avx512vnni", "avx512bf16"); with "amx"
                          * where tiles do not meet them. Before 8 bits: a scale for 64 values, "avxvnni" from five rows on,
                          * "avx512vnni" and "avx512bf16" from six. 0 or 16: never, they have 16 bits */
} lk_linear_args;
LK_API lk_status lk_linear(lk_handle *handle, const lk_linear_args *args, lk_stream stream);

/* A LLaMA decoder whose layers run in one call: norm, QKV, rope, cache; attention; output and residual; norm, gate, up,
 * SwiGLU; down and residual. Between products everything is float32. */
typedef struct lk_layer {
    const void *attention_norm; /* (width,) of lk_decoder_args.dtype */
    lk_weight qkv;              /* ((heads + 2 kv_heads) * head_dim, width) */
    lk_weight out;              /* (width, heads * head_dim) */
    const void *mlp_norm;
    lk_weight gate_up;          /* (2 * inner, width), gate first */
    lk_weight down;             /* (width, inner) */
    void *k_cache, *v_cache;    /* (blocks, block_size, kv_heads, head_dim) */
} lk_layer;

typedef struct lk_decoder_args {
    lk_dtype dtype, cache_dtype; /* of norms and of the cache: LK_FLOAT32 or LK_BFLOAT16 */
    int64_t layers, width, heads, kv_heads, head_dim; /* head_dim: even, up to 256 */
    float eps;
    const lk_layer *layer;       /* (layers,), copied */
    const void *norm;            /* (width,) */
    lk_weight head;              /* (vocabulary, width) */
    const float *cos, *sin;      /* (positions, head_dim / 2) */
    int64_t positions;
    int64_t blocks, block_size;  /* of the cache */
    int64_t cache_block_stride, cache_token_stride, cache_head_stride; /* 0: contiguous */
    lk_weight screen;            /* of the head's shape in 8 bits, for the likeliest token; data is NULL: none */
    const float *screen_error;   /* (vocabulary,): no logit is further than this, times the normed hidden state's norm in
                                  * l2, from what the screen and the activations' 16 bits make of it */
    int activation_bits;         /* as lk_linear_args.activation_bits; a head with a screen meets one to four rows in 16 bits */
} lk_decoder_args;
typedef struct lk_decoder lk_decoder;

/* The weights, tables and caches must outlive it, and it must be destroyed before its handle. */
LK_API lk_status lk_decoder_create(lk_handle *handle, const lk_decoder_args *args, lk_decoder **decoder);
LK_API void lk_decoder_destroy(lk_decoder *decoder);

typedef struct lk_step_args {
    lk_dtype dtype;              /* of x */
    int64_t tokens, sequences;
    const void *x;               /* (tokens, width) embeddings */
    const int32_t *positions;    /* (tokens,) */
    const int64_t *slots;        /* (tokens,) as in lk_store_kv_args */
    const int32_t *block_table;  /* the rest as in lk_paged_attention_args */
    int64_t table_stride;
    const int32_t *context_lens, *query_start;
    float *hidden;               /* (tokens, width) out: before the final norm */
    const int64_t *rows;         /* (outputs,) ascending: hidden is (outputs, width), of these tokens alone; NULL: of all */
    int64_t outputs;
} lk_step_args;
LK_API lk_status lk_decoder_step(lk_decoder *decoder, const lk_step_args *args);
/* Final norm and head: hidden (rows, width) -> logits (rows, vocabulary). */
LK_API lk_status lk_decoder_head(lk_decoder *decoder, int64_t rows, const float *hidden, float *logits);
/* hidden (rows, width) -> the index of each row's largest logit, the first of equals, (rows,). With a screen and few rows
 * only those of the head's features are read that can have it: the rest lie below by more than the screen is off. */
LK_API lk_status lk_decoder_likeliest(lk_decoder *decoder, int64_t rows, const float *hidden, int64_t *tokens);

/* A step and then lk_decoder_likeliest or lk_decoder_head in one call, for sequences that add one token each: what is small
 * is then done here, and not by a caller whose code and data the weights have just pushed out of the caches. */
typedef struct lk_next_args {
    lk_dtype dtype;             /* of embedding */
    const void *embedding;      /* (vocabulary, width) */
    int64_t vocabulary;
    int64_t sequences;
    const int64_t *rows;        /* (sequences,) which of the table_rows rows of last and block_table is theirs */
    const int64_t *computed;    /* (sequences,) tokens that the cache has of it */
    int64_t table_rows;
    const int64_t *last;        /* (table_rows,) the token after those, which is looked up in embedding and computed */
    const int32_t *block_table; /* (table_rows, table_stride) as in lk_paged_attention_args */
    int64_t table_stride;
    int64_t *tokens;            /* (sequences,) out: the likeliest next */
    float *logits;              /* not NULL: (sequences, vocabulary) out in place of those, which a caller draws from */
} lk_next_args;
LK_API lk_status lk_decoder_next(lk_decoder *decoder, const lk_next_args *args);

/* The next token of every row: penalties, temperature, top-k, top-p, min-p, then a draw that depends on the row's seed and
 * position and on nothing else; llava_kernels.sample says exactly how, and draws the same. Settings are (rows,) each, NULL
 * where they are off for all rows. */
typedef struct lk_sample_args {
    int64_t rows, vocabulary;
    const float *logits;              /* (rows, vocabulary) */
    int64_t logits_stride;            /* from row to row */
    const int64_t *seeds, *positions;
    const float *temperature;         /* below 1e-5: the largest logit, of equal ones the first */
    const int32_t *top_k;             /* below 1: off */
    const float *top_p, *min_p;       /* 1 and above, 0 and below: off */
    const float *repetition_penalty, *presence_penalty, *frequency_penalty; /* need counts */
    const int32_t *counts;            /* (rows, vocabulary) how often each id was generated, or NULL */
    int64_t counts_stride;
    const uint8_t *in_prompt;         /* (rows, vocabulary) 1 where the prompt has the id, or NULL */
    int64_t in_prompt_stride;
    const int64_t *table_rows;        /* (rows,) which rows of counts and in_prompt are theirs; NULL: as many, in order */
    int64_t *ids;                     /* (rows,) */
    float *logprobs;                  /* (rows,) log-softmax of the logits as given, at the ids; or NULL */
} lk_sample_args;
LK_API lk_status lk_sample(lk_handle *handle, const lk_sample_args *args);

/* A CLIP vision tower in one call: patches, class token and positions, LayerNorm; then layers of LayerNorm, QKV, attention,
 * output and residual; LayerNorm, fc1, quick GELU, fc2 and residual. Between products everything is float32. */
typedef struct lk_vision_layer {
    const void *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias; /* (width,) of lk_vision_args.dtype */
    lk_weight qkv, out, fc1, fc2;                                      /* (3 width, width), (width, width), ... */
    const void *qkv_bias, *out_bias, *fc1_bias, *fc2_bias;             /* as many as the weight has features */
} lk_vision_layer;

typedef struct lk_vision_args {
    lk_dtype dtype;                   /* of vectors and out: LK_FLOAT32 or LK_BFLOAT16 */
    int64_t layers, width, heads;     /* width / heads: up to 256 */
    float eps;
    lk_weight patch_embedding;        /* (width, 3 * patch * patch) */
    const void *class_embedding;      /* (width,) */
    const void *position_embedding;   /* (1 + grid * grid, width) */
    const void *norm_weight, *norm_bias;
    const lk_vision_layer *layer;     /* (layers,) */
    int64_t images, patch, grid;      /* an image is grid * grid patches of patch * patch pixels */
    const float *pixels;              /* (images, 3, grid * patch, grid * patch) */
    void *out;                        /* (images, 1 + grid * grid, width) */
} lk_vision_args;
LK_API lk_status lk_vision_tower(lk_handle *handle, const lk_vision_args *args);

/* ---- Training on the CPU. Float32 inside; every result is written once, and nothing depends on the threads. */

/* With h = x * rstd and g = d_out * weight: d_x = rstd * (g - h * mean(g * h)) + d_sum, d_weight = sum of d_out * h. */
typedef struct lk_rms_norm_backward_args {
    lk_dtype dtype;
    int64_t rows, width;
    const void *d_out;     /* (rows, width) */
    int64_t d_out_stride;  /* from row to row */
    const void *d_sum;     /* (rows, width) a further gradient of x, or NULL */
    int64_t d_sum_stride;
    const void *x;         /* (rows, width) what was normed */
    int64_t x_stride;
    const void *weight;    /* (width,) */
    const float *rstd;     /* (rows,) */
    void *d_x;             /* (rows, width), or NULL */
    float *d_weight;       /* (width,), or NULL */
} lk_rms_norm_backward_args;
LK_API lk_status lk_rms_norm_backward(lk_handle *handle, const lk_rms_norm_backward_args *args);

typedef struct lk_swiglu_backward_args {
    lk_dtype dtype;
    int64_t rows, inner;
    const void *d_out;       /* (rows, inner) */
    int64_t d_out_stride;    /* from row to row */
    const void *gate_up;     /* (rows, 2 * inner), gate first */
    int64_t gate_up_stride;
    void *d_gate_up;         /* (rows, 2 * inner) */
} lk_swiglu_backward_args;
LK_API lk_status lk_swiglu_backward(lk_handle *handle, const lk_swiglu_backward_args *args);

/* softmax(q k^T / sqrt(head_dim)) v inside each of the sequences that lie end to end. */
typedef struct lk_varlen_attention_args {
    lk_dtype dtype;
    int64_t tokens, sequences, heads, kv_heads, head_dim; /* head_dim: up to 256 */
    int causal;                /* 1: a token sees itself and what comes before it */
    const void *q;             /* (tokens, heads, head_dim) */
    int64_t q_token_stride, q_head_stride;
    const void *k, *v;         /* (tokens, kv_heads, head_dim) */
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    const int32_t *cu_seqlens; /* (sequences + 1,) where each sequence starts, then tokens */
    void *out;                 /* (tokens, heads, head_dim) */
    float *lse;                /* (heads, tokens) log2 of the sum of 2^score, scores in units of log 2 */
} lk_varlen_attention_args;
LK_API lk_status lk_varlen_attention(lk_handle *handle, const lk_varlen_attention_args *args);

typedef struct lk_varlen_attention_backward_args {
    lk_varlen_attention_args forward; /* its out and lse are read */
    const void *d_out;                /* (tokens, heads, head_dim) */
    int64_t d_out_token_stride, d_out_head_stride;
    void *dq;                         /* (tokens, heads, head_dim), or NULL */
    void *dk, *dv;                    /* (tokens, kv_heads, head_dim), or both NULL */
} lk_varlen_attention_backward_args;
LK_API lk_status lk_varlen_attention_backward(lk_handle *handle, const lk_varlen_attention_backward_args *args);

/* ---- Pictures on the CPU. No handle: any number of threads may call at once, each on its own memory. */

/* A picture laid on a canvas of the background colour, the canvas resized by Pillow's bicubic filter, and of the result
 * the window of size x size pixels at (out_top, out_left) as floats: value * scale + shift, rounded after each of the
 * two. The bits are those of Pillow's resize and numpy's arithmetic; only what the window shows is computed. Heights and
 * widths are at most 2^24, a stride 2^31 - 1. Errors have no message but lk_error_string's. */
typedef struct lk_prepare_image_args {
    const uint8_t *pixels;              /* (height, width) pixels of red, green, blue, and nothing or one ignored byte */
    int64_t height, width;
    int64_t row_stride;                 /* bytes from row to row, which may be negative; 0: the rows lie end to end */
    int64_t pixel_stride;               /* bytes from pixel to pixel, 3 or 4; 0 stands for 3 */
    int64_t canvas_height, canvas_width; /* 0 stands for the picture's own */
    int64_t top, left;                  /* where on the canvas the picture lies; it may not reach over an edge */
    uint8_t background[3];
    int64_t new_height, new_width;      /* of the canvas once it is resized */
    int64_t out_top, out_left, size;    /* the window: it may not reach over an edge either */
    int height_first;                   /* 1: resized in height, then in width; between the two values are rounded */
    float scale[3], shift[3];           /* of each colour */
    float *out;                         /* (3, size, size) */
    const char *instructions;           /* as for lk_set_instructions; NULL: the best there are */
} lk_prepare_image_args;
LK_API lk_status lk_prepare_image(const lk_prepare_image_args *args);

#ifdef __cplusplus
}
#endif

#endif
