// Registers of numbers, and the functions of them that there is no instruction for.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int BYTES = 64, ROWS = 14;
#elif defined(__AVX__)
constexpr int BYTES = 32, ROWS = 6;
#elif defined(__aarch64__)
constexpr int BYTES = 16, ROWS = 12;
#else
constexpr int BYTES = 16, ROWS = 6;
#endif

namespace {

template <class T> struct Vector { typedef T type __attribute__((vector_size(BYTES))); };
template <class T> using vec = typename Vector<T>::type;

template <class T> inline vec<T> load(const T *from) { vec<T> x; std::memcpy(&x, from, BYTES); return x; }
template <class T> inline void store(T *to, vec<T> x) { std::memcpy(to, &x, BYTES); }
template <class T> inline vec<T> all(T x) { return vec<T>{} + x; }
template <class T> inline vec<T> largest(vec<T> x, vec<T> y) { return x > y ? x : y; }

// Past the caches, for what is read again only when they have forgotten it: saves reading the lines before writing.
template <class T> inline void stream(T *to, vec<T> x) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)to, (__m512i)x);
#else
    store(to, x);
#endif
}
template <class T> inline void store_both(T *to, const vec<T> *x, bool past_cache) {
    for (int half = 0; half < 2; half++) {
        T *part = to + half * (BYTES / int(sizeof(T)));
        past_cache ? stream(part, x[half]) : store(part, x[half]);
    }
}

// ---- exponentials ---------------------------------------------------------------------------------------------------

// exp(x) = power * (1 + rest), with |rest| < 0.42; x in [-87, 87] in float32, [-708, 708] in float64.
template <class T> inline void split_exp(vec<T> x, vec<T> &power, vec<T> &rest) {
    constexpr bool single = std::is_same_v<T, float>;
    using Int = std::conditional_t<single, int32_t, int64_t>;
    constexpr T shifter = single ? T(12582912) : T(6755399441055744);       // 1.5 * 2^23, 1.5 * 2^52: adding it rounds
    constexpr T high = single ? T(0.693359375) : T(6.93147180369123816490e-1);
    constexpr T low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
    const vec<T> shifted = x * T(1.44269504088896340736) + shifter;
    const vec<T> whole = shifted - shifter;
    const vec<T> r = (x - whole * high) - whole * low;
    vec<T> p = all(T(0));
    constexpr int degree = single ? 7 : 13;
    constexpr double factorial[] = {1,     1,      2,       6,        24,        120,       720,
                                    5040.0, 40320.0, 362880.0, 3628800.0, 39916800.0, 479001600.0, 6227020800.0};
#pragma GCC unroll 16
    for (int k = degree; k > 1; k--) p = p * r + T(1 / factorial[k]);
    rest = p * r * r + r;
    constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
    power = (vec<T>)(((vec<Int>)shifted + Int(bias)) << mantissa);
}

// exp(x) for x <= 80; exactly 0 below the smallest normal number.
template <class T> inline vec<T> exponential(vec<T> x) {
    constexpr T lowest = std::is_same_v<T, float> ? T(-87) : T(-708);
    vec<T> power, rest;
    split_exp<T>(x < lowest ? all(lowest) : x, power, rest);
    return x < lowest ? vec<T>{} : power * rest + power;
}

// tanh(x), right to the last digits at any size.
template <class T> inline vec<T> hyperbolic_tangent(vec<T> x) {
    const vec<T> size = x < T(0) ? -x : x;
    vec<T> power, rest;
    split_exp<T>(size > T(10 + 10 * (sizeof(T) == 8)) ? all(T(20 + 20 * (sizeof(T) == 8))) : 2 * size, power, rest);
    const vec<T> minus_one = power * rest + (power - T(1)), y = minus_one / (minus_one + T(2));
    return x < T(0) ? -y : y;
}

}  // namespace
