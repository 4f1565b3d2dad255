/* One case a run: test_library CASE. 0: passed, 1: failed, 77: does not apply here. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "fake_cuda.h"
#include "llava_kernels.h"

static int failures;

#define CHECK(condition) check((condition), #condition, __LINE__)

static void check(_Bool holds, const char *condition, int line) {
    if (!holds) failures++, printf("line %d: %s\n", line, condition);
}

static int says(const lk_handle *handle, const char *words) {
    if (strstr(lk_last_error(handle), words)) return 1;
    printf("the message is \"%s\"; ", lk_last_error(handle));
    return 0;
}

static void symbols(void) {
    const char *names[] = {"lk_create", "lk_destroy", "lk_error_string", "lk_last_error",   "lk_project_splice",
                           "lk_rms_norm", "lk_rope",    "lk_swiglu",       "lk_store_kv",     "lk_paged_attention",
                           "lk_linear",   "lk_set_threads", "lk_set_instructions", "lk_instructions",
                           "lk_decoder_create", "lk_decoder_step", "lk_decoder_head", "lk_decoder_likeliest", "lk_decoder_next", "lk_decoder_destroy",
                           "lk_prepare_image"};
    void *library = dlopen("libllava_kernels.so.0", RTLD_NOW | RTLD_NOLOAD);
    CHECK(library != NULL);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) CHECK(dlsym(library, names[i]) != NULL);
    CHECK(!dlsym(library, "lk_launch")); /* the inside stays inside */
    CHECK(!dlsym(library, "lk_kernels"));
}

static float x[64], w[64], e[64], o[64];
static int64_t ids[4] = {0, 1, 2, 3};
static int32_t images[2] = {0, 1}, texts[2] = {2, 3};

static lk_project_splice_args splice(void) {
    return (lk_project_splice_args){
        .dtype = LK_FLOAT32, .images = 1, .image_patches = 2, .texts = 2, .channels = 3, .width = 4, .vocabulary = 5,
        .features = x, .weight = w, .embedding = e, .input_ids = ids, .image_rows = images, .text_rows = texts, .out = o,
    };
}

static void arguments(void) {
    lk_handle *cpu = NULL;
    CHECK(lk_create(NULL, LK_CPU) == LK_INVALID_ARGUMENT && says(NULL, "handle is NULL"));
    CHECK(lk_create(&cpu, -2) == LK_INVALID_ARGUMENT && says(NULL, "device -2") && !cpu);
    CHECK(lk_create(&cpu, LK_CPU) == LK_OK && says(NULL, "") && !*lk_last_error(NULL));

    lk_project_splice_args args = splice();
    CHECK(lk_project_splice(NULL, &args, NULL) == LK_INVALID_ARGUMENT);
    CHECK(lk_project_splice(cpu, NULL, NULL) == LK_INVALID_ARGUMENT && says(cpu, "args is NULL"));
    CHECK(lk_project_splice(cpu, &args, NULL) == LK_OK);
#define REJECTED(change, status, words)                                                                            \
    args = splice(), args.change, CHECK(lk_project_splice(cpu, &args, NULL) == status && says(cpu, words))
    REJECTED(dtype = 9, LK_INVALID_ARGUMENT, "dtype 9");
    REJECTED(dtype = LK_FLOAT16, LK_UNSUPPORTED, "takes float32 and bfloat16");
    REJECTED(images = -1, LK_INVALID_ARGUMENT, "images is -1");
    REJECTED(texts = 1ll << 40, LK_INVALID_ARGUMENT, "texts is 1099511627776");
    REJECTED(width = 0, LK_INVALID_ARGUMENT, "width is 0");
    REJECTED(channels = 0, LK_INVALID_ARGUMENT, "channels is 0");
    REJECTED(features = NULL, LK_INVALID_ARGUMENT, "features is NULL");
    REJECTED(embedding = NULL, LK_INVALID_ARGUMENT, "embedding is NULL");
    REJECTED(out = NULL, LK_INVALID_ARGUMENT, "out is NULL");
    REJECTED(vocabulary = 3, LK_INVALID_ARGUMENT, "input_ids[3] is 3");
    images[1] = 4;
    REJECTED(dtype = LK_FLOAT32, LK_INVALID_ARGUMENT, "image_rows[1] is 4");
    images[1] = 2;
    REJECTED(dtype = LK_FLOAT32, LK_INVALID_ARGUMENT, "row 2 stands twice");
    images[1] = 1, texts[0] = -1;
    REJECTED(dtype = LK_FLOAT32, LK_INVALID_ARGUMENT, "text_rows[0] is -1");
    texts[0] = 2;
    args = splice(), args.images = args.texts = 0, args.out = NULL;
    CHECK(lk_project_splice(cpu, &args, NULL) == LK_OK);

    lk_rms_norm_args norm = {.dtype = LK_FLOAT16, .rows = 1, .width = 4, .x = x, .weight = w, .out = o};
    CHECK(lk_rms_norm(cpu, &norm, NULL) == LK_UNSUPPORTED && says(cpu, "takes float32 and bfloat16"));
    norm.residual = e;
    CHECK(lk_rms_norm(cpu, &norm, NULL) == LK_INVALID_ARGUMENT && says(cpu, "go together"));
    lk_rope_args rope = {.tokens = 1, .heads = 1, .head_dim = 3};
    CHECK(lk_rope(cpu, &rope, NULL) == LK_INVALID_ARGUMENT && says(cpu, "odd"));
    lk_swiglu_args swiglu = {.rows = 1, .inner = 4, .out = o};
    CHECK(lk_swiglu(cpu, &swiglu, NULL) == LK_INVALID_ARGUMENT && says(cpu, "gate_up is NULL"));
    lk_destroy(cpu);
    lk_destroy(NULL);
    for (int status = LK_OK; status <= LK_CUDA; status++) CHECK(strcmp(lk_error_string(status), "unknown error"));
    CHECK(!strcmp(lk_error_string(99), "unknown error"));
}

/* A device's handle where there is no driver; the build without kernels says so first. */
static int no_driver(void) {
    if (dlopen("libcuda.so.1", RTLD_NOW)) return 77;
    lk_handle *handle;
    lk_status status = lk_create(&handle, 0);
    if (status == LK_NO_KERNELS)
        CHECK(says(NULL, "built without GPU kernels"));
    else
        CHECK(status == LK_NO_DRIVER && says(NULL, "libcuda.so.1"));
    CHECK(!handle);
    return 0;
}

static struct fake_state *fake;

/* A handle on the fake driver's device; NULL where the library has no kernels to launch. */
static lk_handle *fake_handle(int major, int minor) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    fake = library ? dlsym(library, "fake_state") : NULL;
    if (!fake) return puts("the fake driver is not on LD_LIBRARY_PATH"), NULL;
    fake->major = major, fake->minor = minor;
    lk_handle *handle;
    lk_status status = lk_create(&handle, 0);
    if (status == LK_NO_KERNELS) return NULL;
    if (status) printf("lk_create: %s\n", lk_last_error(NULL));
    CHECK(status == LK_OK);
    return handle;
}

/* Whether the last launch had the value among its parameters, whatever their order. */
static int launched_with(uint64_t value) {
    for (int i = 0; i < fake->last.parameter_count; i++)
        if (fake->last.parameters[i] == value) return 1;
    return 0;
}

#define AT(n) ((void *)(uintptr_t)(0x10000 * (n))) /* stands for device memory */

static void launch_norm(lk_handle *handle) {
    lk_rms_norm_args args = {.dtype = LK_BFLOAT16, .rows = 77, .width = 4096, .eps = 0.5f, .x = AT(1), .weight = AT(2),
                             .out = AT(3), .x_stride = 8192};
    CHECK(lk_rms_norm(handle, &args, AT(9)) == LK_OK && says(handle, ""));
    CHECK(strstr(fake->last.entry, "rms_norm") && fake->last.stream == AT(9));
    CHECK(fake->last.block_x % 32 == 0 && fake->last.grid[0] >= 1 && fake->last.grid[0] <= 77);
    for (int n = 1; n <= 3; n++) CHECK(launched_with((uintptr_t)AT(n)));
    CHECK(launched_with(77) && launched_with(4096) && launched_with(8192) && launched_with(0x3f000000));
    CHECK(fake->last.parameters[fake->last.parameter_count - 1] == 0); /* scratch */
    CHECK(fake->last.parameters[fake->last.parameter_count - 2] == 0);
    args.residual = AT(4), args.sum = AT(5);
    CHECK(lk_rms_norm(handle, &args, NULL) == LK_OK && launched_with((uintptr_t)AT(4)) && launched_with((uintptr_t)AT(5)));
    int launches = fake->launches;
    args.x_stride = 8193;
    CHECK(lk_rms_norm(handle, &args, NULL) == LK_UNSUPPORTED && says(handle, "x_stride to be a multiple of 16"));
    args.x_stride = 0, args.x = (char *)AT(1) + 2;
    CHECK(lk_rms_norm(handle, &args, NULL) == LK_UNSUPPORTED && says(handle, "x_ptr aligned to 16 bytes"));
    args.x = AT(1), args.width = 64;
    CHECK(lk_rms_norm(handle, &args, NULL) == LK_UNSUPPORTED && says(handle, "compiled for"));
    args.width = 4096, args.dtype = LK_FLOAT16;
    CHECK(lk_rms_norm(handle, &args, NULL) == LK_UNSUPPORTED && says(handle, "not *fp16"));
    args.dtype = LK_BFLOAT16, args.rows = 0;
    CHECK(lk_rms_norm(handle, &args, NULL) == LK_OK && fake->launches == launches);
}

static void launch_splice(lk_handle *handle) {
    lk_project_splice_args args = {
        .dtype = LK_BFLOAT16, .images = 3, .image_patches = 576, .texts = 123, .channels = 1024, .width = 4096,
        .vocabulary = 32000, .features = AT(1), .image_stride = 577 * 1024, .weight = AT(2), .bias = AT(3),
        .embedding = AT(4), .input_ids = AT(5), .image_rows = AT(6), .text_rows = AT(7), .out = AT(8),
    };
    CHECK(lk_project_splice(handle, &args, NULL) == LK_OK && says(handle, ""));
    for (int n = 1; n <= 8; n++) CHECK(launched_with((uintptr_t)AT(n)));
    CHECK(launched_with(3 * 576) && launched_with(576) && launched_with(123) && launched_with(577 * 1024));
    CHECK(fake->last.shared_bytes > 48 * 1024); /* so the limit was raised */
    unsigned all = fake->last.grid[0];
    args.texts = 0, args.embedding = NULL, args.input_ids = NULL, args.text_rows = NULL;
    CHECK(lk_project_splice(handle, &args, NULL) == LK_OK && fake->last.grid[0] < all);
    unsigned tiles = fake->last.grid[0];
    args.images = 1;
    CHECK(lk_project_splice(handle, &args, NULL) == LK_OK && fake->last.grid[0] != tiles);
    args.channels = 1008;
    CHECK(lk_project_splice(handle, &args, NULL) == LK_UNSUPPORTED && says(handle, "channels is 1008"));
}

static void launch_rope_and_swiglu(lk_handle *handle) {
    lk_rope_args rope = {.dtype = LK_BFLOAT16, .tokens = 1000, .heads = 33, .head_dim = 128, .x = AT(1), .cos = AT(2),
                         .sin = AT(3), .out = AT(1), .x_token_stride = 12288, .out_token_stride = 12288};
    CHECK(lk_rope(handle, &rope, NULL) == LK_OK && says(handle, ""));
    CHECK(launched_with(12288) && launched_with(128) && launched_with(1000) && launched_with(33));
    rope.tokens = 1;
    CHECK(lk_rope(handle, &rope, NULL) == LK_OK && fake->last.grid[1] > 1); /* a token's heads are shared out */
    rope.head_dim = 96;
    CHECK(lk_rope(handle, &rope, NULL) == LK_UNSUPPORTED);
    lk_swiglu_args swiglu = {.dtype = LK_BFLOAT16, .rows = 5, .inner = 11008, .gate_up = AT(1), .out = AT(2)};
    CHECK(lk_swiglu(handle, &swiglu, NULL) == LK_OK && says(handle, ""));
    CHECK(launched_with(11008) && launched_with(22016) && fake->last.grid[0] >= 5);
    fake->fail_launch = 700;
    CHECK(lk_swiglu(handle, &swiglu, NULL) == LK_CUDA && says(handle, "illegal memory access") && says(handle, "(700)"));
    fake->fail_launch = 0;
}

static void launch_paged(lk_handle *handle) {
    lk_store_kv_args store = {
        .dtype = LK_BFLOAT16, .cache_dtype = LK_BFLOAT16, .tokens = 7, .kv_heads = 32, .head_dim = 128, .block_size = 16,
        .k = AT(1), .v = AT(2), .token_stride = 12288, .k_cache = AT(3), .v_cache = AT(4), .slots = AT(5),
    };
    CHECK(lk_store_kv(handle, &store, NULL) == LK_OK && says(handle, ""));
    for (int n = 1; n <= 5; n++) CHECK(launched_with((uintptr_t)AT(n)));
    CHECK(launched_with(12288) && launched_with(16 * 4096) && launched_with(4096) && launched_with(128));
    CHECK(fake->last.grid[0] == 7 && fake->last.grid[1] >= 1);
    store.block_size = 24;
    CHECK(lk_store_kv(handle, &store, NULL) == LK_INVALID_ARGUMENT && says(handle, "power of two"));
    store.block_size = 16, store.cache_dtype = LK_FLOAT8_E4M3, store.k_scale = 0.5f;
    CHECK(lk_store_kv(handle, &store, NULL) == LK_OK && launched_with(0x3f000000) && launched_with(0x3f800000));
    store.cache_dtype = LK_FLOAT16;
    CHECK(lk_store_kv(handle, &store, NULL) == LK_INVALID_ARGUMENT && says(handle, "cache_dtype"));

    lk_paged_attention_args attend = {
        .dtype = LK_BFLOAT16, .cache_dtype = LK_BFLOAT16, .tokens = 3, .sequences = 3, .heads = 32, .kv_heads = 32,
        .head_dim = 128, .block_size = 16, .max_query = 1, .q = AT(1), .k_cache = AT(2), .v_cache = AT(3),
        .block_table = AT(4), .table_stride = 100, .context_lens = AT(5), .query_start = AT(6), .out = AT(7),
    };
    int launches = fake->launches;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_OK && says(handle, "") && fake->launches == launches + 1);
    for (int n = 1; n <= 7; n++) CHECK(launched_with((uintptr_t)AT(n)));
    CHECK(fake->last.grid[0] == 32 && fake->last.grid[1] == 1 && fake->last.grid[2] == 3 && launched_with(100));
    attend.heads = attend.kv_heads = 40;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_OK && says(handle, "") && fake->last.grid[0] == 40);
    attend.heads = attend.kv_heads = 32, attend.splits = 8;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_INVALID_ARGUMENT && says(handle, "workspace is NULL"));
    attend.workspace = AT(8);
    launches = fake->launches;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_OK && fake->launches == launches + 2);
    CHECK(launched_with((uintptr_t)AT(8)) && launched_with((uintptr_t)AT(7)) && fake->last.grid[0] == 3 * 32);
    attend.splits = 7;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_UNSUPPORTED && says(handle, "SPLITS"));
    attend.splits = 1, attend.max_query = 512;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_OK && fake->last.grid[1] > 1);
    attend.kv_heads = 8;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_UNSUPPORTED && says(handle, "GROUP"));
    attend.kv_heads = 5;
    CHECK(lk_paged_attention(handle, &attend, NULL) == LK_INVALID_ARGUMENT && says(handle, "multiple of kv_heads"));
}

static int launches(int major) {
    lk_handle *handle = fake_handle(major, 0);
    if (!handle) return 77;
    CHECK(fake->modules > 0 && fake->contexts == 1 && fake->depth == 0);
    launch_norm(handle);
    launch_splice(handle);
    launch_rope_and_swiglu(handle);
    launch_paged(handle);
    CHECK(fake->depth == 0);
    lk_destroy(handle);
    CHECK(fake->modules == 0 && fake->contexts == 0 && fake->depth == 0);
    return 0;
}

/* 8.9 has less shared memory than 8.0 and runs what fits; 7.5 runs nothing. */
static int old_card(void) {
    lk_handle *handle = fake_handle(8, 9);
    if (!handle) return 77;
    launch_norm(handle);
    lk_destroy(handle);
    fake->major = 7, fake->minor = 5;
    CHECK(lk_create(&handle, 0) == LK_NO_DEVICE && says(NULL, "compute capability 7.5") && !handle);
    CHECK(fake->modules == 0 && fake->contexts == 0);
    return 0;
}

static int no_device(void) {
    lk_handle *handle = fake_handle(9, 0);
    if (!handle) return 77;
    lk_destroy(handle);
    CHECK(lk_create(&handle, 1) == LK_NO_DEVICE && says(NULL, "device 1: there are 1"));
    fake->devices = 0;
    CHECK(lk_create(&handle, 0) == LK_NO_DEVICE && says(NULL, "finds no device"));
    return 0;
}

int main(int count, char **words) {
    const char *name = count > 1 ? words[1] : "";
    int skipped = 0;
    if (!strcmp(name, "symbols")) symbols();
    else if (!strcmp(name, "arguments")) arguments();
    else if (!strcmp(name, "no_driver")) skipped = no_driver();
    else if (!strcmp(name, "launches_sm_80")) skipped = launches(8);
    else if (!strcmp(name, "launches_sm_90")) skipped = launches(9);
    else if (!strcmp(name, "old_card")) skipped = old_card();
    else if (!strcmp(name, "no_device")) skipped = no_device();
    else return puts("there is no such case"), 1;
    return failures ? 1 : skipped;
}
