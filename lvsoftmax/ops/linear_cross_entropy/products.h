// Products of matrices in several precisions: outer products of ROWS x COLUMNS sums held in registers.
//
// `a` is broadcast number by number, `b` is packed into panels of COLUMNS. In bfloat16 an operand is a pair of numbers
// that one instruction multiplies and adds.

#pragma once

#include "vectors.h"

namespace {

inline float widen(uint16_t x) { uint32_t bits = uint32_t(x) << 16; float y; std::memcpy(&y, &bits, 4); return y; }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline vec<float> widen_vector(const float *x) { return load(x); }
inline vec<double> widen_vector(const double *x) { return load(x); }
inline vec<float> widen_vector(const uint16_t *x) {
    float y[BYTES / 4];
    for (int i = 0; i < BYTES / 4; i++) y[i] = widen(x[i]);
    return load(y);
}

// ---- precisions: what is multiplied, and what it is summed in -------------------------------------------------------

template <class T> struct Plain {
    using Entry = T; using Operand = T; using Sum = T;
    static constexpr int DEPTH = 1;
    static Entry narrow(T x) { return x; }
    static Operand pack(Entry x, Entry) { return x; }
    static vec<T> pack(vec<T> x, vec<T>) { return x; }
    static void add_product(vec<T> &sum, Operand a, vec<T> b) { sum += a * b; }
    static void put(Entry *to, const vec<T> *x, bool past_cache) { store_both(to, x, past_cache); }
};
using Single = Plain<float>;
using Double = Plain<double>;

#if defined(__AVX512BF16__)
struct Brain {
    using Entry = uint16_t; using Operand = uint32_t; using Sum = float;
    static constexpr int DEPTH = 2;
    static Entry narrow(float x) {
        uint32_t bits; std::memcpy(&bits, &x, 4);
        if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);    // not a number stays none
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                   // to nearest, ties to even
    }
    static Operand pack(Entry x, Entry y) { return uint32_t(x) | uint32_t(y) << 16; }
    static vec<uint32_t> pack(vec<float> x, vec<float> y) {
        const auto wide = [](vec<float> x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); };
        return (vec<uint32_t>)wide(x) | (vec<uint32_t>)wide(y) << 16;
    }
    static void add_product(vec<float> &sum, Operand a, vec<uint32_t> b) {
        sum = (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
    static void put(Entry *to, const vec<float> *x, bool past_cache) {
        const auto both = (vec<Entry>)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
        past_cache ? stream(to, both) : store(to, both);
    }
};
#endif

// ---- products -------------------------------------------------------------------------------------------------------

template <class P> constexpr int LANES = BYTES / sizeof(typename P::Sum);
template <class P> constexpr int COLUMNS = 2 * LANES<P>;

// c[ROWS x COLUMNS] = start + a b, or += a b.  a(row, k) = a[row * stride + k], or a[k * stride + row] where ADJACENT.
template <class P, bool ADJACENT>
inline void multiply(int64_t depth, const typename P::Operand *a, int64_t stride, const typename P::Operand *b,
                     typename P::Sum *c, int64_t c_stride, bool add, const typename P::Sum *start = nullptr) {
    using Sum = typename P::Sum;
    constexpr int L = LANES<P>;
    vec<Sum> sum[ROWS][2];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++) sum[row][0] = sum[row][1] = start ? all(start[row]) : vec<Sum>{};
    for (int64_t k = 0; k < depth; k++, b += 2 * L) {
        const auto left = load(b), right = load(b + L);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            const auto x = ADJACENT ? a[row] : a[row * stride];
            P::add_product(sum[row][0], x, left);
            P::add_product(sum[row][1], x, right);
        }
        a += ADJACENT ? stride : 1;
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++, c += c_stride) {
        store(c, add ? load(c) + sum[row][0] : sum[row][0]);
        store(c + L, add ? load(c + L) + sum[row][1] : sum[row][1]);
    }
}

}  // namespace
