// The next token of one row of logits: penalties, temperature, top-k, top-p, min-p and the race, as in
// llava_kernels/sample.py, which says why.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace {

using lk::Draw;

constexpr float LARGEST_LOGIT = 3.4e38f, GREEDY_BELOW = 1e-5f, SMALLEST_MASS = 1e-30f;

// What is no number, or no more than -LARGEST_LOGIT, is -inf.
INLINE vf number(vf x) {
    const vf some = x > -LARGEST_LOGIT ? x : all(-__builtin_inff());
    return some < LARGEST_LOGIT ? some : all(LARGEST_LOGIT);
}

INLINE vf tail(const float *from, int64_t count, float rest) {
    float some[L];
    for (int64_t i = 0; i < L; i++) some[i] = i < count ? from[i] : rest;
    return load<vf>(some);
}

// ln x to 2 units in the last place, for normal numbers: 2 atanh((m - 1) / (m + 1)) with m within a root of 2 from 1.
INLINE vf logarithm(vf x) {
    constexpr uint32_t ONE = 0x3f800000, ROOT_HALF = 0x3f3504f3;
    const vu bits = (vu)x + (ONE - ROOT_HALF);
    const vf exponent = __builtin_convertvector((vi)(bits >> 23) - 127, vf);
    const vf m = (vf)((bits & 0x7fffff) + ROOT_HALF), s = (m - 1.f) / (m + 1.f), z = s * s;
    const vf series = (((z * (1 / 9.f) + 1 / 7.f) * z + 1 / 5.f) * z + 1 / 3.f) * z;
    return exponent * 0.693147181f + 2.f * (s + s * series);
}

template <class V>
INLINE V mixed(V x) { // the finaliser of MurmurHash3
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

// Distributed as Exp(1), by seed, position and token.
struct Race {
    uint32_t first, second;
    Race(int64_t seed, int64_t position) {
        const uint32_t low = (uint32_t)seed, high = (uint32_t)((uint64_t)seed >> 32), place = (uint32_t)position;
        first = mixed(mixed(mixed(low ^ 0x243F6A88u) ^ high) ^ place);
        second = mixed(mixed(mixed(place ^ 0x13198A2Eu) ^ low) ^ high);
    }
    INLINE vf times(vu tokens) const {
        const vu bits = mixed(mixed(tokens + first) ^ second) >> 1;
        vf u = __builtin_convertvector((vi)bits, vf) * 0x1p-31f + 0x1p-32f;
        u = u < 1 - 0x1p-24f ? u : all(1 - 0x1p-24f);
        return u < 0x1p-6f ? u * (1.f + u * (0.5f + u * (1 / 3.f))) : -logarithm(1.f - u);
    }
};

// Logits as numbers, with penalties, -inf behind the last; returns the largest.
float penalised(const Draw &task, float *x) {
    const int64_t count = task.vocabulary;
    vf most = all(-__builtin_inff());
    for (int64_t i = 0; i < count; i += L)
        store(x + i, number(i + L <= count ? load<vf>(task.logits + i) : tail(task.logits + i, count - i, -__builtin_inff())));
    for (int64_t i = 0; task.counts && i < count; i++) {
        const int32_t often = task.counts[i];
        if (often > 0 || (task.in_prompt && task.in_prompt[i])) x[i] *= x[i] > 0 ? 1 / task.repetition : task.repetition;
        if (often > 0) x[i] = x[i] - task.presence - task.frequency * (float)often;
    }
    for (int64_t i = 0; i < count; i += L) most = larger(most, load<vf>(x + i));
    return largest(most);
}

// How many weights are at least `cut`, or what these add up to.
INLINE float at_least(const float *weights, int64_t count, float cut, bool number_of) {
    vf total = {};
    for (int64_t i = 0; i < count; i += L) {
        const vf w = load<vf>(weights + i);
        total += w >= cut ? (number_of ? all(1.f) : w) : vf{};
    }
    return sum(total);
}

// The largest cut at which they reach `target`; floats from 0 to 1 have 30 bits, and sort as these do.
float cut_at(const float *weights, int64_t count, float target, bool number_of) {
    uint32_t cut = 0;
    for (uint32_t bit = 1u << 29; bit; bit >>= 1) {
        const uint32_t higher = cut | bit;
        float value;
        memcpy(&value, &higher, sizeof value);
        if (at_least(weights, count, value, number_of) >= target) cut = higher;
    }
    float value;
    memcpy(&value, &cut, sizeof value);
    return value;
}

// The token that finishes first, 0 where none runs.
int64_t first_of(const float *weights, int64_t count, float cut, const Race &race) {
    uint32_t tokens[L];
    for (int i = 0; i < L; i++) tokens[i] = (uint32_t)i;
    vu at = load<vu>(tokens), best_at = {};
    vf best = {};
    const vf least_weight = cut > 0 ? all(cut) : all(0x1p-149f);
    for (int64_t i = 0; i < count; i += L, at += (uint32_t)L) {
        const vf w = load<vf>(weights + i);
        if (largest(w) < least_weight[0]) continue;
        const vf speed = w >= least_weight ? w / race.times(at) : vf{};
        const vi faster = speed > best;
        best = faster ? speed : best, best_at = faster ? at : best_at;
    }
    float speed = 0;
    uint32_t token = 0;
    for (int i = 0; i < L; i++)
        if (best[i] > speed || (best[i] == speed && speed > 0 && best_at[i] < token)) speed = best[i], token = best_at[i];
    return token;
}

float logprob_of(const Draw &task, int64_t token) {
    const int64_t count = task.vocabulary;
    vf most = all(-__builtin_inff()), total = {};
    auto logits = [&](int64_t i) {
        return number(i + L <= count ? load<vf>(task.logits + i) : tail(task.logits + i, count - i, -__builtin_inff()));
    };
    for (int64_t i = 0; i < count; i += L) most = larger(most, logits(i));
    const float top = largest(most);
    if (!(top > -__builtin_inff())) return __builtin_nanf("");
    for (int64_t i = 0; i < count; i += L) total += exponential(logits(i) - top);
    return number(all(task.logits[token]))[0] - top - logarithm(all(sum(total)))[0];
}

int64_t draw(const Draw &task) {
    const int64_t count = task.vocabulary;
    float *x = task.scratch;
    const float top = penalised(task, x);
    int64_t token = 0;
    if (!(top > -__builtin_inff())) {
        // nothing can be drawn
    } else if (task.temperature < GREEDY_BELOW) {
        while (x[token] != top) token++;
    } else {
        const float factor = 1 / task.temperature;
        for (int64_t i = 0; i < count; i += L) store(x + i, exponential((load<vf>(x + i) - top) * factor));
        float cut = 0;
        if (task.top_k > 0 && task.top_k < count) cut = cut_at(x, count, (float)task.top_k, true);
        if (task.top_p < 1) {
            const float mass = at_least(x, count, cut, false) * task.top_p;
            const float higher = cut_at(x, count, mass > SMALLEST_MASS ? mass : SMALLEST_MASS, false);
            cut = higher > cut ? higher : cut;
        }
        const float least_weight = task.min_p < 1 ? task.min_p : 1;
        token = first_of(x, count, least_weight > cut ? least_weight : cut, Race(task.seed, task.position));
    }
    if (task.logprob) *task.logprob = logprob_of(task, token);
    return token;
}

} // namespace
