// The CPU operations against sums in double, under every instruction set of this machine and with several threads.
// Every array has exactly the size that the header asks for, so that AddressSanitizer sees a read past its end.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "checking.h"
#include "llava_kernels.h"

static std::mt19937 generator(0);

template <class T>
using List = std::vector<T>;

static List<float> normal(int64_t count) {
    std::normal_distribution<float> draw;
    List<float> values((size_t)count);
    for (float &value : values) value = draw(generator);
    return values;
}

struct Matrix {
    lk_weight weight{};
    List<float> values; // (N, K), what the weight stands for
    List<float> scale;
    List<uint16_t> halves, group_scale, group_offset;
    List<uint32_t> pairs;
    List<uint8_t> bytes;
};

// A code by the formula of quantized_linear.py: k = plane * (block / planes) + 2 * word + half.
static void put_code(Matrix &m, int64_t block, int bits, int64_t n, int64_t k, uint32_t code) {
    const int64_t padded = (m.weight.in_features + block - 1) / block * block, planes = 16 / bits;
    const int64_t g = k / block, inside = k % block, plane = inside / (block / planes), rest = inside % (block / planes);
    const int64_t word = rest / 2, bit = bits * plane + 16 * (rest % 2);
    uint8_t *at = m.bytes.data() + (n * padded + g * block) * bits / 8 + 4 * word + bit / 8;
    *at = (uint8_t)(*at | code << (bit % 8));
}

// Codes at random.
static void fill_codes(Matrix &m, int64_t block, int bits) {
    const int64_t out = m.weight.out_features, in = m.weight.in_features, padded = (in + block - 1) / block * block;
    m.bytes.assign((size_t)(out * padded * bits / 8), 0);
    for (int64_t n = 0; n < out; n++) {
        m.scale.push_back(0.5f + (float)(generator() % 100) / 100);
        for (int64_t k = 0; k < padded; k++) {
            const uint32_t code = bits == 8 ? 1 + generator() % 255 : generator() % 16;
            put_code(m, block, bits, n, k, code);
            if (k >= in) continue;
            const int64_t s = k / block * out + n;
            const float value = bits == 8 ? (float)code - 128
                                          : whole(m.group_scale[(size_t)s]) * (float)code + whole(m.group_offset[(size_t)s]);
            m.values.push_back(value * m.scale.back());
        }
    }
    m.weight.data = m.bytes.data(), m.weight.scale = m.scale.data();
}

static void make(Matrix &m, lk_weight_format format, int64_t out, int64_t in, int64_t group) {
    m.weight.format = format, m.weight.out_features = out, m.weight.in_features = in;
    if (format == LK_WEIGHT_FLOAT32) {
        m.values = normal(out * in);
        for (float &value : m.values) value /= std::sqrt((float)in); // sizes as in a network: softmax has no cliffs
        m.weight.data = m.values.data();
    } else if (format == LK_WEIGHT_BFLOAT16) {
        for (float value : normal(out * in)) {
            if (m.halves.size() % 151 == 150) value = std::ldexp(value, (int)(m.halves.size() % 141) - 140); // what is rare
            m.halves.push_back(half(value)), m.values.push_back(whole(m.halves.back()));
        }
        m.weight.data = m.halves.data();
    } else if (format == LK_WEIGHT_INT8) {
        fill_codes(m, 128, 8);
    } else {
        const int64_t groups = (in + group - 1) / group, stride = (groups + 7) / 8 * 8;
        m.pairs.assign((size_t)(out * stride), 0);
        for (int64_t i = 0; i < groups * out; i++) {
            m.group_scale.push_back(half(0.01f + (float)(generator() % 64) / 1000));
            m.group_offset.push_back(half(-(float)(generator() % 64) / 100));
            m.pairs[(size_t)(i % out * stride + i / out)] = (uint32_t)m.group_scale.back() << 16 | m.group_offset.back();
        }
        m.weight.group_pairs = m.pairs.data(); // and nothing else, where it is not said
        m.weight.group_size = group;
        fill_codes(m, group, 4);
    }
}

// What 8 bits make of another's values.
static void round_to_bytes(Matrix &m, const Matrix &other) {
    const int64_t out = other.weight.out_features, in = other.weight.in_features, padded = (in + 127) / 128 * 128;
    m.weight.format = LK_WEIGHT_INT8, m.weight.out_features = out, m.weight.in_features = in;
    m.bytes.assign((size_t)(out * padded), 0);
    for (int64_t n = 0; n < out; n++) {
        float most = 0;
        for (int64_t k = 0; k < in; k++) most = std::max(most, std::fabs(other.values[(size_t)(n * in + k)]));
        m.scale.push_back(most / 127);
        for (int64_t k = 0; k < padded; k++) {
            const float code = k < in ? std::round(other.values[(size_t)(n * in + k)] / m.scale.back()) : 0;
            put_code(m, 128, 8, n, k, (uint32_t)(code + 128));
            if (k < in) m.values.push_back(code * m.scale.back());
        }
    }
    m.weight.data = m.bytes.data(), m.weight.scale = m.scale.data();
}

// Sums that operations are compared with. The thread sanitizer need not watch them: what they read this thread has made, and
// nobody changes it; they took most of its time.
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))

template <class T>
UNWATCHED static double dot(const T *x, const float *w, int64_t count, double *size) {
    double total = 0, sizes = 0;
    for (int64_t k = 0; k < count; k++) {
        const double one = (double)x[k] * w[k];
        total += one, sizes += std::fabs(one);
    }
    *size = sizes;
    return total;
}

// By how much a product is off if activations are off by half of 1/127 of their group's largest.
UNWATCHED static double rounding(const float *x, const float *w, int64_t count, int64_t group) {
    double steps = 0;
    for (int64_t k = 0; k < count; k += group) {
        const int64_t end = k + group < count ? k + group : count;
        float most = 0, weights = 0;
        for (int64_t i = k; i < end; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most, weights += std::fabs(w[i]);
        steps += most / 254 * weights;
    }
    return steps;
}

static double product(const Matrix &m, const float *x, int64_t n, double *size) {
    return dot(x, m.values.data() + n * m.weight.in_features, m.weight.in_features, size);
}

static bool reads_compact(const lk_handle *handle) { return std::strcmp(lk_instructions(handle), "portable"); }

static void linear(lk_handle *handle, lk_weight_format format, int64_t group, int64_t rows, int64_t out, int64_t in) {
    Matrix m;
    make(m, format, out, in, group);
    // Rows a little apart where there is an odd number of them; what lies between is no number, and must not be read.
    const int64_t gap = rows % 2 ? 3 : 0, x_stride = in + gap, out_stride = out + gap;
    const List<float> bias = normal(out);
    List<float> x((size_t)((rows - 1) * x_stride + in), NAN), y((size_t)((rows - 1) * out_stride + out), -7.f);
    for (int64_t r = 0; r < rows; r++) {
        const List<float> own = normal(in);
        std::copy(own.begin(), own.end(), x.begin() + r * x_stride);
    }
    List<float> spread;
    List<uint16_t> spread_halves;
    if (gap && format == LK_WEIGHT_FLOAT32) {
        spread.assign((size_t)((out - 1) * (in + gap) + in), NAN);
        for (int64_t n = 0; n < out; n++) std::copy_n(m.values.begin() + n * in, in, spread.begin() + n * (in + gap));
        m.weight.data = spread.data(), m.weight.row_stride = in + gap;
    } else if (gap && format == LK_WEIGHT_BFLOAT16) {
        spread_halves.assign((size_t)((out - 1) * (in + gap) + in), 0x7fff);
        for (int64_t n = 0; n < out; n++) std::copy_n(m.halves.begin() + n * in, in, spread_halves.begin() + n * (in + gap));
        m.weight.data = spread_halves.data(), m.weight.row_stride = in + gap;
    }
    lk_linear_args args{};
    args.x_stride = x_stride, args.out_stride = out_stride;
    args.rows = rows, args.weight = m.weight, args.x = x.data(), args.bias = bias.data(), args.out = y.data();
    args.gelu = out == 53;
    CHECK(lk_linear(handle, &args, nullptr) == LK_OK);
    if (format == LK_WEIGHT_INT4) { // the same from scales and offsets that lie apart
        List<float> again(y.size(), -7.f);
        args.weight.group_scale = m.group_scale.data(), args.weight.group_offset = m.group_offset.data();
        args.weight.group_pairs = nullptr, args.out = again.data();
        CHECK(lk_linear(handle, &args, nullptr) == LK_OK && again == y);
        args.weight.group_offset = nullptr;
        CHECK(lk_linear(handle, &args, nullptr) == LK_INVALID_ARGUMENT);
    }
    // 4 bits: a value's offset and code are large beside the value; 8 and 4 bits meet activations of 16 bits
    const double tolerance = format >= LK_WEIGHT_INT8 ? 2e-4 : 5e-7;
    std::vector<double> exact, sizes;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < out; n++) {
            double size, value = product(m, x.data() + r * x_stride, n, &size) + bias[(size_t)n];
            exact.push_back(args.gelu ? value * std::erfc(-value / std::sqrt(2)) / 2 : value), sizes.push_back(size + 1);
        }
    auto check = [&] {
        double worst = 0;
        for (int64_t i = 0; i < rows * out; i++) {
            const double off = std::fabs(exact[(size_t)i] - y[(size_t)(i / out * out_stride + i % out)]) / sizes[(size_t)i];
            if (worst == worst && !(off <= worst)) worst = off; // a NaN is the worst, and stays it
        }
        for (int64_t r = 0; r + 1 < rows; r++)
            for (int64_t i = 0; i < gap; i++) CHECK(y[(size_t)(r * out_stride + out + i)] == -7);
        if (!(worst < tolerance)) std::printf("format %d, %lld x (%lld, %lld): %g\n", format, (long long)rows, (long long)out, (long long)in, worst);
        CHECK(worst < tolerance);
    };
    check();
    if (format == LK_WEIGHT_BFLOAT16 && reads_compact(handle)) { // the same values in 12 bits
        lk_compact *compact;
        CHECK(lk_compact_create(handle, &args.weight, &compact) == LK_OK && lk_compact_bytes(compact) > 0);
        std::fill(y.begin(), y.end(), -7.f);
        args.weight.compact = compact;
        CHECK(lk_linear(handle, &args, nullptr) == LK_OK);
        check();
        args.weight.in_features++;
        CHECK(lk_linear(handle, &args, nullptr) == LK_INVALID_ARGUMENT);
        lk_compact_destroy(compact);
    }
}

// What has no compact form says so, and so does what is not of bfloat16.
static void not_compact(lk_handle *handle) {
    lk_compact *compact;
    Matrix spread, floats;
    make(spread, LK_WEIGHT_BFLOAT16, 64, 64, 0);
    for (size_t i = 0; i < spread.halves.size(); i++) spread.halves[i] = (uint16_t)(i * 8); // every power of two
    CHECK(lk_compact_create(handle, &spread.weight, &compact) == LK_UNSUPPORTED && !compact);
    CHECK(std::strstr(lk_last_error(handle), reads_compact(handle) ? "upper bytes" : "portable"));
    make(floats, LK_WEIGHT_FLOAT32, 64, 64, 0);
    CHECK(lk_compact_create(handle, &floats.weight, &compact) == LK_UNSUPPORTED && !compact);
    CHECK(lk_compact_create(handle, nullptr, &compact) == LK_INVALID_ARGUMENT);
    CHECK(lk_compact_bytes(nullptr) == 0);
    lk_compact_destroy(nullptr);
}

// The same with bfloat16 activations, bias and result: what may be multiplied in tiles.
static void half_linear(lk_handle *handle, lk_weight_format format, int64_t rows, int64_t out, int64_t in) {
    Matrix m;
    make(m, format, out, in, 64);
    const int64_t gap = rows % 2 ? 5 : 0, x_stride = in + gap, out_stride = out + gap;
    List<uint16_t> x((size_t)((rows - 1) * x_stride + in), 0x7fff), y((size_t)((rows - 1) * out_stride + out), 0x1234), bias;
    List<float> values(x.size());
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < in; i++) {
            const size_t at = (size_t)(r * x_stride + i);
            x[at] = half(normal(1)[0]), values[at] = whole(x[at]);
        }
    for (float value : normal(out)) bias.push_back(half(value));
    lk_linear_args args{};
    args.dtype = LK_BFLOAT16, args.x_stride = x_stride, args.out_stride = out_stride;
    args.rows = rows, args.weight = m.weight, args.x = x.data(), args.bias = bias.data(), args.out = y.data();
    if (out % 2) args.weight.group_pairs = nullptr; // 4 bits: scales and offsets apart
    args.weight.group_scale = m.group_scale.data(), args.weight.group_offset = m.group_offset.data();
    lk_compact *compact = nullptr;
    if (format == LK_WEIGHT_BFLOAT16 && out != 16 && reads_compact(handle))
        CHECK(lk_compact_create(handle, &m.weight, &compact) == LK_OK);
    args.weight.compact = compact;
    CHECK(lk_linear(handle, &args, nullptr) == LK_OK);
    lk_compact_destroy(compact);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t n = 0; n < out; n++) {
            double size, exact = product(m, values.data() + r * x_stride, n, &size) + whole(bias[(size_t)n]);
            const double off = std::fabs(exact - whole(y[(size_t)(r * out_stride + n)]));
            CHECK(off <= std::fabs(exact) / 256 + (format >= LK_WEIGHT_INT8 ? 2e-4 : 1e-6) * (size + 1));
        }
        for (int64_t i = 0; r + 1 < rows && i < gap; i++) CHECK(y[(size_t)(r * out_stride + out + i)] == 0x1234);
    }
}

// A decoder of two layers, prompts in pieces and single tokens, against a plain loop in double.
struct Tiny {
    static constexpr int LAYERS = 2, WIDTH = 40, HEADS = 6, KV = 2, DIM = 34, INNER = 24, VOCAB = 17;
    static constexpr int BLOCKS = 40, BLOCK = 4, LENGTH = 80;
    Matrix qkv[LAYERS], out[LAYERS], gate_up[LAYERS], down[LAYERS], head;
    List<float> norms[2 * LAYERS + 1], cos, sin, k[LAYERS], v[LAYERS];
    lk_decoder *decoder = nullptr;

    explicit Tiny(lk_handle *handle) {
        lk_layer layers[LAYERS] = {};
        for (auto &norm : norms) norm = normal(WIDTH);
        for (int i = 0; i < LENGTH * DIM / 2; i++) {
            const double angle = (double)(i / (DIM / 2)) * std::pow(10.0, -(i % (DIM / 2)));
            cos.push_back((float)std::cos(angle)), sin.push_back((float)std::sin(angle));
        }
        sized(head, VOCAB, WIDTH);
        for (int l = 0; l < LAYERS; l++) {
            sized(qkv[l], (HEADS + 2 * KV) * DIM, WIDTH);
            sized(out[l], WIDTH, HEADS * DIM);
            sized(gate_up[l], 2 * INNER, WIDTH);
            sized(down[l], WIDTH, INNER);
            k[l].assign(BLOCKS * BLOCK * KV * DIM, 0), v[l] = k[l];
            layers[l] = {norms[2 * l].data(), qkv[l].weight, out[l].weight, norms[2 * l + 1].data(),
                         gate_up[l].weight, down[l].weight, k[l].data(), v[l].data()};
        }
        lk_decoder_args args{};
        args.layers = LAYERS, args.width = WIDTH, args.heads = HEADS, args.kv_heads = KV, args.head_dim = DIM;
        args.eps = 1e-5f, args.layer = layers, args.norm = norms[2 * LAYERS].data(), args.head = head.weight;
        args.cos = cos.data(), args.sin = sin.data(), args.positions = LENGTH, args.blocks = BLOCKS, args.block_size = BLOCK;
        CHECK(lk_decoder_create(handle, &args, &decoder) == LK_OK);
        args.head.in_features++;
        lk_decoder *none;
        CHECK(lk_decoder_create(handle, &args, &none) == LK_INVALID_ARGUMENT && !none);
    }
    ~Tiny() { lk_decoder_destroy(decoder); }

    // Weights that keep the size of what they multiply: larger ones make attention of one token alone, and chaos of that.
    static void sized(Matrix &m, int64_t out, int64_t in) {
        make(m, LK_WEIGHT_FLOAT32, out, in, 0);
        for (float &value : m.values) value /= std::sqrt((float)in);
    }

    static List<double> normed(const double *x, const List<float> &weight) {
        double squares = 0;
        for (int i = 0; i < WIDTH; i++) squares += x[i] * x[i];
        List<double> y;
        for (int i = 0; i < WIDTH; i++) y.push_back(x[i] / std::sqrt(squares / WIDTH + 1e-5) * weight[(size_t)i]);
        return y;
    }
    static List<double> times(const Matrix &m, const List<double> &x) {
        List<double> y;
        for (int64_t n = 0; n < m.weight.out_features; n++) {
            double size;
            y.push_back(dot(x.data(), m.values.data() + (size_t)n * x.size(), (int64_t)x.size(), &size));
        }
        return y;
    }

    // The hidden states of a whole sequence of embeddings (tokens, WIDTH).
    List<double> exact(const List<float> &embeddings) const {
        List<double> x(embeddings.begin(), embeddings.end());
        const int tokens = (int)x.size() / WIDTH;
        for (int l = 0; l < LAYERS; l++) {
            List<List<double>> rows;
            for (int t = 0; t < tokens; t++) {
                rows.push_back(times(qkv[l], normed(&x[(size_t)(t * WIDTH)], norms[2 * l])));
                for (int h = 0; h < HEADS + KV; h++)
                    for (int i = 0; i < DIM / 2; i++) {
                        double &a = rows.back()[(size_t)(h * DIM + i)], &b = rows.back()[(size_t)(h * DIM + i + DIM / 2)];
                        const double c = cos[(size_t)(t * DIM / 2 + i)], s = sin[(size_t)(t * DIM / 2 + i)], first = a;
                        a = a * c - b * s, b = b * c + first * s;
                    }
            }
            for (int t = 0; t < tokens; t++) {
                List<double> attended(HEADS * DIM);
                for (int h = 0; h < HEADS; h++) {
                    const int kv = h / (HEADS / KV);
                    double total = 0;
                    List<double> weights;
                    for (int u = 0; u <= t; u++) {
                        double score = 0;
                        for (int i = 0; i < DIM; i++)
                            score += rows[(size_t)t][(size_t)(h * DIM + i)] * rows[(size_t)u][(size_t)((HEADS + kv) * DIM + i)];
                        weights.push_back(std::exp(score / std::sqrt(DIM))), total += weights.back();
                    }
                    for (int u = 0; u <= t; u++)
                        for (int i = 0; i < DIM; i++)
                            attended[(size_t)(h * DIM + i)] +=
                                weights[(size_t)u] / total * rows[(size_t)u][(size_t)((HEADS + KV + kv) * DIM + i)];
                }
                const List<double> o = times(out[l], attended);
                double *own = &x[(size_t)(t * WIDTH)];
                for (int i = 0; i < WIDTH; i++) own[i] += o[(size_t)i];
                const List<double> both = times(gate_up[l], normed(own, norms[2 * l + 1]));
                List<double> gated;
                for (int i = 0; i < INNER; i++)
                    gated.push_back(both[(size_t)i] / (1 + std::exp(-both[(size_t)i])) * both[(size_t)(INNER + i)]);
                const List<double> d = times(down[l], gated);
                for (int i = 0; i < WIDTH; i++) own[i] += d[(size_t)i];
            }
        }
        return x;
    }
};

static void decode(lk_handle *handle) {
    Tiny tiny(handle);
    // Two sequences, blocks backwards and in one piece, as long as two tiles of keys; in chunks, then token by token.
    int32_t table[2][20];
    for (int b = 0; b < 20; b++) table[0][b] = 19 - b, table[1][b] = 20 + b;
    const int lengths[2] = {72, 70};
    const int chunks[4][2] = {{70, 3}, {1, 65}, {0, 1}, {1, 1}};
    List<float> embeddings[2] = {normal(lengths[0] * Tiny::WIDTH), normal(lengths[1] * Tiny::WIDTH)};
    List<double> exact[2] = {tiny.exact(embeddings[0]), tiny.exact(embeddings[1])};
    int done[2] = {0, 0};
    for (const auto &chunk : chunks) {
        List<float> x;
        List<int32_t> positions, starts{0}, contexts;
        List<int64_t> slots;
        for (int s = 0; s < 2; s++) {
            for (int t = done[s]; t < done[s] + chunk[s]; t++) {
                x.insert(x.end(), embeddings[s].begin() + t * Tiny::WIDTH, embeddings[s].begin() + (t + 1) * Tiny::WIDTH);
                positions.push_back(t), slots.push_back(table[s][t / Tiny::BLOCK] * Tiny::BLOCK + t % Tiny::BLOCK);
            }
            starts.push_back((int32_t)positions.size()), contexts.push_back(done[s] + chunk[s]);
        }
        List<float> hidden(x.size()), logits((size_t)Tiny::VOCAB * 2);
        lk_step_args step{};
        step.tokens = (int64_t)positions.size(), step.sequences = 2, step.x = x.data(), step.positions = positions.data();
        step.slots = slots.data(), step.block_table = &table[0][0], step.table_stride = 20;
        step.context_lens = contexts.data(), step.query_start = starts.data(), step.hidden = hidden.data();
        CHECK(lk_decoder_step(tiny.decoder, &step) == LK_OK);
        for (int s = 0, row = 0; s < 2; s++)
            for (int t = done[s]; t < done[s] + chunk[s]; t++, row++)
                for (int i = 0; i < Tiny::WIDTH; i++) {
                    const double right = exact[s][(size_t)(t * Tiny::WIDTH + i)];
                    CHECK(std::fabs(hidden[(size_t)(row * Tiny::WIDTH + i)] - right) < 2e-5 * (1 + std::fabs(right)));
                }
        // The same for some tokens alone, or none: the last of each chunk, as a prompt wants it.
        List<int64_t> last;
        for (int s = 0; s < 2; s++)
            if (chunk[s]) last.push_back(starts[(size_t)s + 1] - 1);
        List<float> some(last.size() * Tiny::WIDTH);
        step.hidden = some.data(), step.rows = last.data(), step.outputs = (int64_t)last.size();
        CHECK(lk_decoder_step(tiny.decoder, &step) == LK_OK);
        for (size_t i = 0; i < last.size(); i++)
            for (int j = 0; j < Tiny::WIDTH; j++) {
                const float right = hidden[(size_t)(last[i] * Tiny::WIDTH + j)];
                CHECK(std::fabs(some[i * Tiny::WIDTH + (size_t)j] - right) < 2e-5f * (1 + std::fabs(right)));
            }
        step.outputs = 0;
        CHECK(lk_decoder_step(tiny.decoder, &step) == LK_OK);
        last.push_back(step.tokens); // refused: there is no such token
        step.rows = last.data(), step.outputs = (int64_t)last.size();
        CHECK(lk_decoder_step(tiny.decoder, &step) == LK_INVALID_ARGUMENT);
        last.back() = last[0];
        CHECK(lk_decoder_step(tiny.decoder, &step) == LK_INVALID_ARGUMENT);
        step.hidden = hidden.data(), step.rows = nullptr, step.outputs = 0;
        CHECK(lk_decoder_head(tiny.decoder, std::min<int64_t>(2, step.tokens), hidden.data(), logits.data()) == LK_OK);
        const List<double> first(hidden.begin(), hidden.begin() + Tiny::WIDTH);
        const List<double> right = Tiny::times(tiny.head, Tiny::normed(first.data(), tiny.norms[2 * Tiny::LAYERS]));
        for (int i = 0; i < Tiny::VOCAB; i++) CHECK(std::fabs(right[(size_t)i] - logits[(size_t)i]) < 1e-4 * (1 + std::fabs(right[(size_t)i])));
        for (int s = 0; s < 2; s++) done[s] += chunk[s];
        slots[0] = Tiny::BLOCKS * Tiny::BLOCK; // refused before anything is written
        CHECK(lk_decoder_step(tiny.decoder, &step) == LK_INVALID_ARGUMENT);
        slots[0] = -1, positions[0] = Tiny::LENGTH;
        CHECK(lk_decoder_step(tiny.decoder, &step) == LK_INVALID_ARGUMENT);
    }
    CHECK(done[0] == lengths[0] && done[1] == lengths[1]);
}

// Two sequences that go on by lk_decoder_next, the second three tokens behind the first, in rows 2 and 0 of tables of three:
// logits against the loop in double, and the likeliest of them.
static void go_on(lk_handle *handle) {
    constexpr int STEPS = 9, ALONE = 3, HELD = 3; // more than two blocks, and more than one
    Tiny tiny(handle);
    const List<float> embedding = normal(Tiny::VOCAB * Tiny::WIDTH);
    const int32_t table[3][HELD] = {{7, 3, 9}, {0, 0, 0}, {1, 2, 4}};
    const List<int64_t> rows{2, 0};
    List<int64_t> last{5, -1, 16}, computed{0, 0}, tokens(2, -1);
    List<float> logits(2 * Tiny::VOCAB), seen[2];
    lk_next_args args{};
    args.embedding = embedding.data(), args.vocabulary = Tiny::VOCAB, args.rows = rows.data();
    args.computed = computed.data(), args.table_rows = 3, args.last = last.data(), args.block_table = &table[0][0];
    args.table_stride = HELD, args.tokens = tokens.data();
    for (int step = 0; step < STEPS; step++) {
        const size_t count = step < ALONE ? 1 : 2;
        args.sequences = (int64_t)count;
        for (size_t s = 0; s < count; s++) {
            const float *one = embedding.data() + last[(size_t)rows[s]] * Tiny::WIDTH;
            seen[s].insert(seen[s].end(), one, one + Tiny::WIDTH);
        }
        tokens.assign(2, -1), args.logits = logits.data();
        CHECK(lk_decoder_next(tiny.decoder, &args) == LK_OK);
        CHECK(tokens[0] == -1 && tokens[1] == -1); // a caller draws
        args.logits = nullptr; // the same again, which is stored again in the same place
        CHECK(lk_decoder_next(tiny.decoder, &args) == LK_OK);
        for (size_t s = 0; s < count; s++) {
            const List<double> hidden = tiny.exact(seen[s]);
            const List<double> right = Tiny::times(
                tiny.head, Tiny::normed(hidden.data() + hidden.size() - Tiny::WIDTH, tiny.norms[2 * Tiny::LAYERS]));
            const float *found = logits.data() + s * Tiny::VOCAB;
            for (size_t i = 0; i < Tiny::VOCAB; i++) CHECK(std::fabs(right[i] - found[i]) < 1e-4 * (1 + std::fabs(right[i])));
            CHECK(tokens[s] == std::max_element(found, found + Tiny::VOCAB) - found);
            last[(size_t)rows[s]] = tokens[s], computed[s]++;
        }
        CHECK(count == 2 || tokens[1] == -1);
    }
    const lk_next_args good = args;
    int64_t wrong = 3, low = -1;
    auto refused = [&](lk_next_args bad, lk_status status, const char *words) {
        CHECK(lk_decoder_next(tiny.decoder, &bad) == status);
        CHECK(std::strstr(lk_last_error(handle), words));
    };
    lk_next_args bad = good;
    bad.sequences = 1, bad.rows = &wrong, refused(bad, LK_INVALID_ARGUMENT, "rows[0] is 3, not below 3");
    bad.rows = &low, refused(bad, LK_INVALID_ARGUMENT, "rows[0] is -1");
    wrong = 1, bad.rows = &wrong, refused(bad, LK_INVALID_ARGUMENT, "last[1] is -1, not below 17");
    bad = good, bad.vocabulary = 1, last[0] = last[2] = 1, refused(bad, LK_INVALID_ARGUMENT, "is 1, not below 1");
    bad = good, computed[1] = HELD * Tiny::BLOCK, refused(bad, LK_INVALID_ARGUMENT, "computed[1] is 12, not below 12");
    computed[1] = -1, refused(bad, LK_INVALID_ARGUMENT, "computed[1] is -1"), computed[1] = 0;
    const int32_t outside[3][HELD] = {{Tiny::BLOCKS, 0, 0}, {0, 0, 0}, {1, 2, 4}};
    bad = good, bad.block_table = &outside[0][0], refused(bad, LK_INVALID_ARGUMENT, "slots[1] is 160");
    bad = good, bad.tokens = nullptr, refused(bad, LK_INVALID_ARGUMENT, "tokens is NULL");
    bad = good, bad.embedding = nullptr, refused(bad, LK_INVALID_ARGUMENT, "embedding is NULL");
    bad = good, bad.dtype = LK_FLOAT16, refused(bad, LK_UNSUPPORTED, "float32 and bfloat16");
    bad = good, bad.sequences = 0, bad.tokens = nullptr;
    CHECK(lk_decoder_next(tiny.decoder, &bad) == LK_OK && lk_decoder_next(nullptr, &good) == LK_INVALID_ARGUMENT);
    CHECK(lk_decoder_next(tiny.decoder, nullptr) == LK_INVALID_ARGUMENT);
}

// The likeliest token, with a screen of 8 bits and without, beside logits in double.
static void likeliest(lk_handle *handle, lk_dtype dtype) {
    constexpr int64_t WIDTH = 200, VOCAB = 700;
    List<float> norm = normal(WIDTH);
    List<uint16_t> halves;
    for (float &value : norm) halves.push_back(half(value)), value = whole(halves.back());
    // No screen, one, one before a head whose rows are all alike, one that is far off, one before a head of 4 bits.
    for (int kind = 0; kind < 5; kind++) {
        Matrix screen, head;
        if (kind == 4) make(head, LK_WEIGHT_INT4, VOCAB, WIDTH, 64), round_to_bytes(screen, head);
        else make(screen, LK_WEIGHT_INT8, VOCAB, WIDTH, 0);
        if (kind < 4) head.weight.format = LK_WEIGHT_BFLOAT16, head.weight.out_features = VOCAB, head.weight.in_features = WIDTH;
        List<float> error;
        for (int64_t n = 0; n < VOCAB; n++) {
            double off = 0, size = 0;
            for (int64_t k = 0; kind == 4 && k < WIDTH; k++) {
                const double value = head.values[(size_t)(n * WIDTH + k)], apart = value - screen.values[(size_t)(n * WIDTH + k)];
                off += apart * apart, size += value * value;
            }
            for (int64_t k = 0; kind < 4 && k < WIDTH; k++) {
                float value = screen.values[(size_t)((kind == 2 ? 0 : n) * WIDTH + k)];
                if (kind == 1) value += 2 * screen.scale[(size_t)n] * normal(1)[0]; // the screen's own likeliest is another
                head.halves.push_back(half(value)), head.values.push_back(whole(head.halves.back()));
                const double apart = head.values.back() - screen.values[(size_t)(n * WIDTH + k)];
                off += apart * apart, size += (double)value * value;
            }
            error.push_back((float)(std::sqrt(off) * (kind == 3 ? 1000 : 1) + std::sqrt(size) * 5e-4));
        }
        if (kind < 4) head.weight.data = head.halves.data();
        const float table[2] = {1, 0};
        const lk_layer none{};
        lk_decoder_args args{};
        args.width = WIDTH, args.heads = args.kv_heads = 1, args.head_dim = 2, args.eps = 1e-5f, args.layer = &none;
        args.dtype = dtype, args.norm = dtype == LK_BFLOAT16 ? static_cast<const void *>(halves.data()) : norm.data();
        args.head = head.weight, args.cos = args.sin = table, args.positions = args.blocks = 1;
        args.block_size = 1;
        if (kind) args.screen = screen.weight, args.screen_error = error.data();
        args.activation_bits = 8;
        lk_decoder *decoder;
        CHECK(lk_decoder_create(handle, &args, &decoder) == LK_OK);
        for (int64_t rows : {1, 3, 4, 9, 70})
            for (int round = 0; round < (rows > 9 ? 1 : 10); round++) {
                List<float> hidden = normal(rows * WIDTH);
                List<int64_t> tokens((size_t)rows, -1);
                List<float> logits((size_t)(rows * VOCAB));
                CHECK(lk_decoder_likeliest(decoder, rows, hidden.data(), tokens.data()) == LK_OK);
                CHECK(lk_decoder_head(decoder, rows, hidden.data(), logits.data()) == LK_OK);
                for (int64_t r = 0; r < rows; r++) {
                    double squares = 0, most = -INFINITY, found = NAN, size;
                    List<float> x;
                    for (int64_t k = 0; k < WIDTH; k++) squares += (double)hidden[(size_t)(r * WIDTH + k)] * hidden[(size_t)(r * WIDTH + k)];
                    for (int64_t k = 0; k < WIDTH; k++)
                        x.push_back((float)(hidden[(size_t)(r * WIDTH + k)] / std::sqrt(squares / WIDTH + 1e-5)) * norm[(size_t)k]);
                    for (int64_t n = 0; n < VOCAB; n++) {
                        const double logit = product(head, x.data(), n, &size);
                        most = std::max(most, logit), found = n == tokens[(size_t)r] ? logit : found;
                    }
                    // Activations of 8 bits are off by up to most / 254, where their mean size is some most / 3: twice that.
                    const double off = kind == 4 ? (rows > 4 ? 1. / 32 : 1e-5) : dtype == LK_BFLOAT16 ? 1. / 256 : 1e-5;
                    CHECK(found >= most - off * size);
                    const float *own = logits.data() + r * VOCAB; // the same head, whose activations may have been rounded
                    CHECK(own[tokens[(size_t)r]] >= *std::max_element(own, own + VOCAB) - 1e-5 * size);
                    if (kind == 2) CHECK(tokens[(size_t)r] == 0); // the first of equals
                }
            }
        for (int64_t rows : {2, 70}) { // few, and more than a task takes: found somewhere, and nothing breaks
            List<float> lost((size_t)(rows * WIDTH), NAN);
            List<int64_t> tokens((size_t)rows, -1);
            CHECK(lk_decoder_likeliest(decoder, rows, lost.data(), tokens.data()) == LK_OK);
            for (int64_t token : tokens) CHECK(token == 0);
        }
        lk_decoder_destroy(decoder);
        args.screen = screen.weight, args.screen_error = nullptr;
        CHECK(lk_decoder_create(handle, &args, &decoder) == LK_INVALID_ARGUMENT);
        args.screen_error = error.data(), args.screen.out_features--;
        CHECK(lk_decoder_create(handle, &args, &decoder) == LK_INVALID_ARGUMENT);
    }
}

// A head and a product of 8 or 4 bits whose activations may be rounded to 8: exact where they are whole numbers up to 127, else
// off by at most half a step for each of them.
static void coarse_head(lk_handle *handle, lk_weight_format format, int64_t group, int64_t rows, int64_t out, int64_t in) {
    Matrix m;
    make(m, format, out, in, group);
    if (out % 2) m.weight.group_pairs = nullptr; // 4 bits: scales and offsets apart
    m.weight.group_scale = m.group_scale.data(), m.weight.group_offset = m.group_offset.data();
    const List<float> norm((size_t)in, 1.f);
    const float table[2] = {1, 0};
    const lk_layer none{};
    lk_decoder_args args{};
    args.width = in, args.heads = args.kv_heads = 1, args.head_dim = 2, args.layer = &none, args.norm = norm.data();
    args.head = m.weight, args.cos = args.sin = table, args.positions = args.blocks = args.block_size = 1;
    args.activation_bits = 4;
    lk_decoder *decoder;
    CHECK(lk_decoder_create(handle, &args, &decoder) == LK_INVALID_ARGUMENT);
    args.activation_bits = 8;
    CHECK(lk_decoder_create(handle, &args, &decoder) == LK_OK);
    for (bool exact : {true, false}) {
        List<float> hidden = normal(rows * in), logits((size_t)(rows * out));
        for (int64_t i = 0; exact && i < rows * in; i++)
            hidden[(size_t)i] = i % in % 16 == 0 ? -127.f : (float)(generator() % 255) - 127;
        CHECK(lk_decoder_head(decoder, rows, hidden.data(), logits.data()) == LK_OK);
        for (int64_t r = 0; r < rows; r++) {
            float *x = hidden.data() + r * in;
            double squares = 0;
            for (int64_t k = 0; k < in; k++) squares += (double)x[k] * x[k];
            for (int64_t k = 0; k < in; k++) x[k] = (float)(x[k] / std::sqrt(squares / (double)in));
        }
        List<float> products((size_t)(rows * out));
        lk_linear_args linear{};
        linear.rows = rows, linear.weight = m.weight, linear.x = hidden.data(), linear.x_stride = in;
        linear.out = products.data(), linear.out_stride = out, linear.activation_bits = 8;
        CHECK(lk_linear(handle, &linear, nullptr) == LK_OK);
        const List<float> by_linear = products;
        linear.activation_bits = 4;
        CHECK(lk_linear(handle, &linear, nullptr) == LK_INVALID_ARGUMENT);
        for (int bits : {8, 16}) { // values that are hardly there
            if (exact) continue;
            const List<float> none((size_t)(rows * in), 1e-39f);
            linear.x = none.data(), linear.activation_bits = bits;
            CHECK(lk_linear(handle, &linear, nullptr) == LK_OK);
            for (float y : products) CHECK(std::fabs(y) < 1e-30);
        }
        double worst = 0;
        for (int64_t r = 0; r < rows; r++) {
            const float *x = hidden.data() + r * in;
            for (int64_t n = 0; n < out; n++) {
                double size, right = product(m, x, n, &size);
                const double steps = exact ? 0 : rounding(x, m.values.data() + n * in, in, group);
                for (float found : {logits[(size_t)(r * out + n)], by_linear[(size_t)(r * out + n)]}) {
                    const double off = std::fabs(found - right) / (steps + 2e-4 * (size + 1));
                    if (worst == worst && !(off <= worst)) worst = off; // a NaN is the worst, and stays it
                }
            }
        }
        if (!(worst <= 1)) std::printf("coarse, format %d, %lld x (%lld, %lld): %g\n", format, (long long)rows, (long long)out, (long long)in, worst);
        CHECK(worst <= 1);
        for (float lost : {NAN, INFINITY}) { // is seen in all of its row, and in no other
            List<float> other = hidden;
            other[(size_t)(rows / 2 * in + in / 3)] = lost;
            List<float> found((size_t)(rows * out));
            CHECK(lk_decoder_head(decoder, rows, other.data(), found.data()) == LK_OK);
            for (int64_t i = 0; i < rows * out; i++) CHECK(std::isfinite(found[(size_t)i]) == (i / out != rows / 2));
            if (exact) continue;
            linear.x = other.data(), linear.out = found.data(), linear.activation_bits = 8; // with no norm before it
            CHECK(lk_linear(handle, &linear, nullptr) == LK_OK);
            for (int64_t i = 0; i < rows * out; i++) CHECK(std::isfinite(found[(size_t)i]) == (i / out != rows / 2));
        }
    }
    lk_decoder_destroy(decoder);
}

// A head that sees rounded activations, by which another of its two tokens is the likelier: the screen must know.
static void rounded_screen(lk_handle *handle) {
    constexpr int64_t THIRD = 64, WIDTH = 3 * THIRD, PADDED = 256, BLOCK = 128;
    List<float> hidden, scale(2, 1 / 127.f), error(2, 0.003f); // far enough for what 8 bits lose, no more
    // Those that token 0 looks at become 1, as do those that token 1 looks at, who has a little more; the last make the norm 1.
    const double down = 1.0038, up = 0.9981, rest = std::sqrt(3 - down * down - up * up);
    for (double value : {down, up, rest}) hidden.insert(hidden.end(), THIRD, (float)value);
    List<uint16_t> head(2 * WIDTH, 0), norms(WIDTH, half(1.f));
    List<uint8_t> codes(2 * PADDED, 128);
    auto put = [&](int64_t token, int64_t k, float value) {
        const int64_t inside = k % BLOCK, other = inside % (BLOCK / 2); // as in fill_codes
        head[(size_t)(token * WIDTH + k)] = half(value);
        codes[(size_t)(token * PADDED + k / BLOCK * BLOCK + other / 2 * 4 + other % 2 * 2 + inside / (BLOCK / 2))] =
            (uint8_t)(128 + std::lround(127 * value));
    };
    for (int64_t k = 0; k < THIRD; k++) put(0, k, 1), put(1, THIRD + k, 1);
    put(1, 2 * THIRD, 0.125f);
    const float table[2] = {1, 0};
    const lk_layer none{};
    lk_decoder_args args{};
    args.dtype = LK_BFLOAT16, args.width = WIDTH, args.heads = args.kv_heads = 1, args.head_dim = 2, args.eps = 0;
    args.layer = &none, args.norm = norms.data(), args.cos = args.sin = table;
    args.positions = args.blocks = args.block_size = 1;
    args.head.format = LK_WEIGHT_BFLOAT16, args.head.out_features = 2, args.head.in_features = WIDTH, args.head.data = head.data();
    args.screen.format = LK_WEIGHT_INT8, args.screen.out_features = 2, args.screen.in_features = WIDTH;
    args.screen.data = codes.data(), args.screen.scale = scale.data(), args.screen_error = error.data();
    lk_decoder *decoder;
    CHECK(lk_decoder_create(handle, &args, &decoder) == LK_OK);
    float logits[2];
    int64_t token = -1;
    CHECK(lk_decoder_head(decoder, 1, hidden.data(), logits) == LK_OK);
    CHECK(lk_decoder_likeliest(decoder, 1, hidden.data(), &token) == LK_OK);
    CHECK(token == (logits[1] > logits[0]));
    lk_decoder_destroy(decoder);
}

// Many short calls on several handles at once: helpers fall asleep, wake and are let go.
static void many_calls() {
    List<std::thread> callers;
    for (int caller = 0; caller < 3; caller++)
        callers.emplace_back([caller] {
            const List<float> ones(64 * 96, 1.f);
            for (int round = 0; round < 5; round++) {
                lk_handle *handle;
                CHECK(lk_create(&handle, LK_CPU) == LK_OK && lk_set_threads(handle, 2 + caller) == LK_OK);
                for (int call = 0; call < 60; call++) {
                    List<float> y(2 * 96);
                    lk_linear_args args{};
                    args.rows = 2, args.weight.out_features = 96, args.weight.in_features = 64;
                    args.weight.data = ones.data(), args.x = ones.data(), args.out = y.data();
                    CHECK(lk_linear(handle, &args, nullptr) == LK_OK);
                    for (float value : y) CHECK(value == 64);
                    if (call % 20 == 19) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                }
                lk_destroy(handle);
            }
        });
    for (auto &caller : callers) caller.join();
}

// Helpers that were pushed off their caller's core may use all of the process's cores as before.
static void cores_stay() {
#if defined(__linux__)
    lk_handle *handle;
    CHECK(lk_create(&handle, LK_CPU) == LK_OK && lk_set_threads(handle, 4) == LK_OK);
    const List<float> ones(64 * 960, 1.f);
    List<float> y(960);
    lk_linear_args args{};
    args.rows = 1, args.weight.out_features = 960, args.weight.in_features = 64;
    args.weight.data = ones.data(), args.x = ones.data(), args.out = y.data();
    for (int call = 0; call < 300; call++) {
        CHECK(lk_linear(handle, &args, nullptr) == LK_OK && y[959] == 64);
        if (call % 3 == 2) std::this_thread::sleep_for(std::chrono::milliseconds(1)); // long enough to fall asleep
    }
    cpu_set_t own, other;
    CHECK(sched_getaffinity(0, sizeof own, &own) == 0);
    int threads = 0;
    for (const auto &entry : std::filesystem::directory_iterator("/proc/self/task")) {
        CHECK(sched_getaffinity(std::stoi(entry.path().filename()), sizeof other, &other) == 0 && CPU_EQUAL(&own, &other));
        threads++;
    }
    CHECK(threads >= 4);
    lk_destroy(handle);
#endif
}

// The largest codes of 4 bits with the largest activations: no sum on the way may overflow. All but the first of a group are
// `most` of that: those of 16 bits may be added up byte by byte, and the lower byte is largest elsewhere than the upper.
static void largest_codes(lk_handle *handle, int64_t rows, int64_t group, int bits, float most) {
    constexpr int64_t OUT = 17, IN = 512;
    const List<uint8_t> codes(OUT * IN / 2, 0xff);
    const List<uint32_t> pairs(OUT * 8, 0x3f800000); // scale 1, offset 0
    const List<float> scale(OUT, 1.f), norm(IN, 1.f);
    const float table[2] = {1, 0};
    const lk_layer none{};
    lk_decoder_args args{};
    args.width = IN, args.heads = args.kv_heads = 1, args.head_dim = 2, args.layer = &none, args.norm = norm.data();
    args.head.format = LK_WEIGHT_INT4, args.head.out_features = OUT, args.head.in_features = IN, args.head.data = codes.data();
    args.head.scale = scale.data(), args.head.group_pairs = pairs.data(), args.head.group_size = group;
    args.cos = args.sin = table, args.positions = args.blocks = args.block_size = 1, args.activation_bits = bits;
    lk_decoder *decoder;
    CHECK(lk_decoder_create(handle, &args, &decoder) == LK_OK);
    for (float sign : {1.f, -1.f}) {
        List<float> hidden((size_t)(rows * IN), sign * most);
        for (size_t k = 0; k < hidden.size(); k += (size_t)group) hidden[k] = sign;
        const double ones = (double)IN / (double)group, others = IN - ones;
        const double norm_of_x = std::sqrt((ones + others * most * most) / IN); // the head divides by it
        List<float> logits((size_t)(rows * OUT));
        CHECK(lk_decoder_head(decoder, rows, hidden.data(), logits.data()) == LK_OK);
        for (float y : logits) CHECK(std::fabs(y - sign * 15 * (ones + others * most) / norm_of_x) < 1);
    }
    lk_decoder_destroy(decoder);
}

int main(int count, char **words) {
    const char *name = count > 1 ? words[1] : "threads";
    if (!std::strcmp(name, "threads")) return many_calls(), cores_stay(), failures != 0;
    lk_handle *handle;
    CHECK(lk_create(&handle, LK_CPU) == LK_OK);
    if (lk_set_instructions(handle, name) != LK_OK) return std::puts(lk_last_error(handle)), lk_destroy(handle), 77;
    CHECK(!std::strcmp(lk_instructions(handle), name));
#if defined(__SANITIZE_THREAD__)
    const int counts[] = {3}; // one thread has nobody to race with
#else
    const int counts[] = {1, 3};
#endif
    for (int threads : counts) {
        CHECK(lk_set_threads(handle, threads) == LK_OK);
        for (int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 17, 66})
            for (int64_t out : {1, 6, 53})
                for (int64_t in : {1, 31, 128, 200, 1027, 2200}) {
                    if (in > 1000 && (rows > 9 || rows < 4) && rows != 1) continue; // two pieces, or runs of groups: enough
                    linear(handle, LK_WEIGHT_FLOAT32, 0, rows, out, in);
                    linear(handle, LK_WEIGHT_BFLOAT16, 0, rows, out, in);
                    linear(handle, LK_WEIGHT_INT8, 0, rows, out, in);
                    for (int64_t group : {64, 128, 256}) linear(handle, LK_WEIGHT_INT4, group, rows, out, in);
                }
        for (int64_t rows : {1, 4, 7, 8, 13, 17, 30, 35, 45, 50, 66, 130}) // few, and whole and half tiles
            for (int64_t out : {1, 16, 47, 300})
                for (int64_t in : {1, 31, 32, 200, 1101}) {
                    if (in > 1000 && rows * out > 1000) continue;
                    for (lk_weight_format format : {LK_WEIGHT_BFLOAT16, LK_WEIGHT_INT8, LK_WEIGHT_INT4})
                        half_linear(handle, format, rows, out, in);
                }
        for (int64_t rows : {1, 2, 7, 8, 16, 21, 32, 35, 45, 50, 66, 130})
            for (int64_t out : {1, 16, 47, 300})
                for (int64_t in : {1, 60, 128, 700, 2200}) { // of groups of 256 more than are looked at together
                    if (in > 500 && rows * out > 3000) continue;
                    if (in > 1000 && (rows > 8 || out != 47)) continue;
                    if (rows == 45 && out < 47) continue;
                    coarse_head(handle, LK_WEIGHT_INT8, 128, rows, out, in);
                    for (int64_t group : {64, 128, 256}) coarse_head(handle, LK_WEIGHT_INT4, group, rows, out, in);
                }
        for (int64_t rows : {1, 2, 4, 33})
            for (int64_t group : {64, 128, 256}) {
                for (int bits : {8, 16}) largest_codes(handle, rows, group, bits, 1.f);
                for (float code : {126.5f * 256, 126.5f * 256 - 1}) largest_codes(handle, rows, group, 16, code / (127 * 257));
            }
        not_compact(handle);
        decode(handle);
        go_on(handle);
        for (lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16}) likeliest(handle, dtype);
        rounded_screen(handle);
    }
    lk_destroy(handle);
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
