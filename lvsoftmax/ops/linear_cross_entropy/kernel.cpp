// Cross-entropy of a linear layer by tiles that stay in cache: products, exponentials and sums of the same numbers.
//
// Letters: N tokens, D hidden, V words; C tokens of one block. A strip is STRIP words whose logits are made together, a
// tile is TILE words whose gradients are. Word-major throughout: row v of an array holds word v for the C tokens.
//
// For a block of tokens, in the letters of README.md (the target is never among the words of a sum):
//   forward    z = w_v . h + b_v,  e = exp(z - reference),  sum over v of e;  e is kept or not
//   backward   e as kept, or made again from the known sum;
//              dw_v += sum over t of e (h scale),  dh += scale sum over v of e w_v
// `reference` is any number near a token's largest logit. It is raised where a logit exceeds it by ROOM, which happens
// in the first strip and hardly ever again; strips made before keep theirs in `references` and are corrected on use.
//
// The products are outer products of ROWS x COLUMNS sums held in registers: `a` is broadcast number by number, `b` is
// packed into panels of COLUMNS. In bfloat16 an operand is a pair of numbers that one instruction multiplies and adds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <omp.h>

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
constexpr int64_t STRIP = 4 * ROWS, TILE = 4 * STRIP;
constexpr double ROOM = 16;

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

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

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

struct Single {
    using Entry = float; using Operand = float; using Sum = float;
    static constexpr int DEPTH = 1;
    static Entry narrow(float x) { return x; }
    static Operand pack(Entry x, Entry) { return x; }
    static vec<float> pack(vec<float> x, vec<float>) { return x; }
    static void add_product(vec<float> &sum, Operand a, vec<float> b) { sum += a * b; }
    static void put(Entry *to, const vec<float> *x, bool past_cache) { store_both(to, x, past_cache); }
};

struct Double {
    using Entry = double; using Operand = double; using Sum = double;
    static constexpr int DEPTH = 1;
    static Entry narrow(double x) { return x; }
    static Operand pack(Entry x, Entry) { return x; }
    static vec<double> pack(vec<double> x, vec<double>) { return x; }
    static void add_product(vec<double> &sum, Operand a, vec<double> b) { sum += a * b; }
    static void put(Entry *to, const vec<double> *x, bool past_cache) { store_both(to, x, past_cache); }
};

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

// ---- one block of tokens --------------------------------------------------------------------------------------------

// Hands out pieces of one stretch of memory, or only counts them where there is none yet.
struct Arena {
    char *memory;
    int64_t used = 0;
    template <class T> T *take(int64_t count) {
        T *piece = memory ? reinterpret_cast<T *>(memory + used) : nullptr;
        used = round_up(used + count * int64_t(sizeof(T)), 64);
        return piece;
    }
};

// What comes in and goes out; [N] and [V] where nothing else is said. Gradients that are null are not computed.
template <class Sum, class Source> struct Arguments {
    const Sum *hidden;                      // [N, D]
    const Source *weight;                   // [V, D]
    const Sum *bias;                        // or null
    const int64_t *target;
    int64_t N, D, V;
    Sum softcap;                            // logits are softcap * tanh(z / softcap); 0: as they are
    Sum *others, *target_logit;             // log of the sum over all words but the target; computed, or known
    const Sum *token_weight;                // of the loss: gradients follow from the sums, or
    double z_loss;                          // factor of the squared log-sum-exp in that loss
    const Sum *others_factor, *target_factor;   // sums are known: dL/dz of the other words is others_factor * e / sum
    Sum *grad_hidden, *grad_weight, *grad_bias;
};

// What one thread has for itself.
template <class P> struct Worker {
    typename P::Operand *words;             // [STRIP, D] of the table, as `a` of the logits
    typename P::Sum *logits;                // [STRIP, C]
    typename P::Entry *tile;                // [TILE, C] exponentials, where they are not kept
    typename P::Operand *pairs;             // [TILE / DEPTH, C] of them as `a` of the hidden gradient, in bfloat16
    typename P::Operand *panel;             // [TILE / DEPTH, COLUMNS] of the table, as `b` of the hidden gradient
    typename P::Sum *grad_hidden;           // [C, D] from this thread's words
    typename P::Sum *reference;             // [C]
    double *sum;                            // [C] of the exponentials relative to reference
};

template <class P, class Source> struct Block {
    using Operand = typename P::Operand;
    using Entry = typename P::Entry;
    using Sum = typename P::Sum;
    static constexpr int64_t DEPTH = P::DEPTH, L = LANES<P>, COLS = COLUMNS<P>;

    const Arguments<Sum, Source> &args;
    int threads;
    bool keeps;
    int64_t size;                           // C: tokens, the last ones perhaps made of zeros; a multiple of COLS
    int64_t stride;                         // of a word's exponentials: an odd number of cache lines, to use all sets
    int64_t steps, width;                   // D in operands; D in whole panels
    Operand *hidden_panels;                 // [C / COLS, steps, COLS], `b` of the logits
    Operand *scaled_panels;                 // [width / COLS, C / DEPTH, COLS] hidden * scale, `b` of the table's
    Entry *kept;                            // [V, C] exponentials
    Sum *references;                        // [V / STRIP, C] what each strip's are relative to
    Sum *shift, *scale;                     // [C] reference of all words; e * scale is the gradient of a logit
    Sum *target_factor;                     // [C] the derivative by the target's (capped) logit
    Worker<P> *workers;

    int64_t start = 0, count = 0;           // the tokens of this block
    const int64_t *target = nullptr;        // [count]

    Block(const Arguments<Sum, Source> &args, int threads, int64_t tokens, bool keeps, Arena &arena)
        : args(args), threads(threads), keeps(keeps), size(round_up(tokens, COLS)) {
        constexpr int64_t line = 64 / sizeof(Entry);
        stride = round_up(size, line);
        stride += stride / line % 2 ? 0 : line;
        steps = round_up(args.D, DEPTH) / DEPTH;
        width = round_up(args.D, COLS);
        hidden_panels = arena.take<Operand>(size * steps);
        scaled_panels = arena.take<Operand>(size / DEPTH * width);
        kept = arena.take<Entry>(keeps ? round_up(args.V, ROWS) * stride + line : 0);
        references = arena.take<Sum>(keeps ? round_up(args.V, STRIP) / STRIP * size : 0);
        shift = arena.take<Sum>(size);
        scale = arena.take<Sum>(size);
        target_factor = arena.take<Sum>(size);
        workers = arena.take<Worker<P>>(threads);
        for (int i = 0; i < threads; i++) {
            Worker<P> own;
            own.words = arena.take<Operand>(STRIP * width / DEPTH);
            own.logits = arena.take<Sum>(STRIP * size);
            own.tile = arena.take<Entry>(keeps ? 0 : TILE * stride + line);
            own.pairs = arena.take<Operand>(DEPTH > 1 ? TILE / DEPTH * size + line : 0);
            own.panel = arena.take<Operand>(TILE / DEPTH * COLS);
            own.grad_hidden = arena.take<Sum>(round_up(size, ROWS) * width);
            own.reference = arena.take<Sum>(size);
            own.sum = arena.take<double>(size);
            if (arena.memory) workers[i] = own;
        }
    }

    void run(int64_t first) {
        start = first;
        count = std::min(size, args.N - first);
        size = round_up(count, COLS);
        target = args.target + first;
        const bool known = args.others_factor, differentiates = known || args.token_weight;
        const int64_t tiles = (args.V + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
        {
            const int thread = omp_get_thread_num();
            Worker<P> &own = workers[thread];
            // The same words in the same order every time: results do not depend on which thread is faster.
            const int64_t from = tiles * thread / threads * TILE;
            const int64_t to = std::min(tiles * (thread + 1) / threads * TILE, args.V);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < size; t += COLS) pack_hidden(t);
            if (!known) {
                std::fill_n(own.reference, size, std::numeric_limits<Sum>::lowest() / 2);
                std::fill_n(own.sum, size, 0.0);
                for (int64_t v = from; v < to; v += STRIP) add_strip(own, v, std::min(STRIP, to - v));
#pragma omp barrier
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < size; t++) known ? take_over(t) : join(t);
            if (differentiates) {
#pragma omp for schedule(static)
                for (int64_t k = 0; k < width; k += COLS) pack_scaled(k);
                std::fill_n(own.grad_hidden, size * width, Sum(0));
                for (int64_t v = from; v < to; v += TILE) differentiate(own, v, std::min(TILE, to - v));
#pragma omp barrier
#pragma omp for schedule(static)
                for (int64_t t = 0; t < count; t++) finish_hidden(t);
            }
        }
    }

    // ---- logits and their exponentials ------------------------------------------------------------------------------

    void pack_hidden(int64_t t) {
        Operand *to = hidden_panels + t * steps;
        for (int64_t i = 0; i < COLS; i++) {
            const Sum *from = args.hidden + (start + t + i) * args.D;
            for (int64_t k = 0; k < steps; k++) {
                const auto entry = [&](int64_t k) { return P::narrow(t + i < count && k < args.D ? from[k] : Sum(0)); };
                to[k * COLS + i] = P::pack(entry(k * DEPTH), entry(k * DEPTH + DEPTH - 1));
            }
        }
    }

    void make_logits(Worker<P> &own, int64_t v, int64_t words) {
        const Operand *a = own.words;
        int64_t a_stride = width / DEPTH;
        Sum bias[STRIP] = {};
        if (args.bias) std::copy_n(args.bias + v, words, bias);
        bool packed = false;
        if constexpr (std::is_same_v<Operand, Source>) {
            if (words % ROWS == 0) a = args.weight + v * args.D, a_stride = args.D, packed = true;
        }
        if (!packed)
            for (int64_t w = 0; w < round_up(words, ROWS); w++)
                for (int64_t k = 0; k < width; k += COLS) {
                    vec<Sum> x[2];
                    read(v + w, v + words, k, x);
                    P::put(reinterpret_cast<Entry *>(own.words) + w * width + k, x, false);
                }
        for (int64_t t = 0; t < size; t += COLS)
            for (int64_t w = 0; w < words; w += ROWS)
                multiply<P, false>(steps, a + w * a_stride, a_stride, hidden_panels + t * steps,
                                   own.logits + w * size + t, size, false, bias + w);
        if (args.softcap > 0)
            for (int64_t i = 0; i < words * size; i += L)
                store(own.logits + i, args.softcap * hyperbolic_tangent<Sum>(load(own.logits + i) / args.softcap));
        for (int64_t t = 0; t < count; t++) {
            const int64_t w = target[t] - v;
            if (w < 0 || w >= words) continue;
            args.target_logit[start + t] = own.logits[w * size + t];
            own.logits[w * size + t] = -std::numeric_limits<Sum>::infinity();
        }
    }

    // COLS numbers of a word of the table, zeros where it has no more columns or the words have ended.
    void read(int64_t v, int64_t end, int64_t k, vec<Sum> *x) const {
        const Source *row = args.weight + v * args.D + k;
        if (v < end && k + COLS <= args.D) {
            for (int half = 0; half < 2; half++) x[half] = widen_vector(row + half * L);
            return;
        }
        Sum edge[COLS] = {};
        for (int64_t i = 0; v < end && i < std::min(COLS, args.D - k); i++) edge[i] = widen(row[i]);
        for (int half = 0; half < 2; half++) x[half] = load(edge + half * L);
    }

    void add_strip(Worker<P> &own, int64_t v, int64_t words) {
        make_logits(own, v, words);
        Entry *to = keeps ? kept + v * stride : nullptr;
        for (int64_t t = 0; t < size; t += COLS) {
            vec<Sum> reference[2], factor[2], sum[2] = {};
            for (int half = 0; half < 2; half++) {
                const vec<Sum> before = load(own.reference + t + half * L);
                vec<Sum> most = before;
                for (int64_t w = 0; w < words; w++)
                    most = largest<Sum>(load(own.logits + w * size + t + half * L), most);
                reference[half] = most > before + Sum(ROOM) ? most : before;
                factor[half] = exponential<Sum>(before - reference[half]);
                store(own.reference + t + half * L, reference[half]);
                if (keeps) store(references + v / STRIP * size + t + half * L, reference[half]);
            }
            exponentiate<true>(own, words, t, reference, to, sum);
            Sum add[COLS], times[COLS];
            for (int half = 0; half < 2; half++) {
                store(add + half * L, sum[half]);
                store(times + half * L, factor[half]);
            }
            for (int64_t i = 0; i < COLS; i++) own.sum[t + i] = own.sum[t + i] * times[i] + add[i];
        }
    }

    // Exponentials of COLS tokens relative to reference; what is stored is what the gradient needs of them.
    template <bool doubleS>
    void exponentiate(Worker<P> &own, int64_t words, int64_t t, const vec<Sum> *reference, Entry *to, vec<Sum> *sum) {
        const Sum inverse = args.softcap > 0 ? 1 / args.softcap : 0;
        for (int64_t w = 0; w < words; w++) {
            const Sum *logit = own.logits + w * size + t;
            vec<Sum> e[2];
            for (int half = 0; half < 2; half++) {
                const vec<Sum> z = load(logit + half * L);
                e[half] = exponential<Sum>(z - reference[half]);
                if (doubleS) sum[half] += e[half];
                if (inverse > 0 && to) {
                    const vec<Sum> slope = Sum(1) - (z * inverse) * (z * inverse);
                    e[half] = e[half] > Sum(0) ? e[half] * slope : e[half];    // the target's logit is infinite here
                }
            }
            if (to) P::put(to + w * stride + t, e, doubleS);
        }
    }

    // ---- what the sums say ------------------------------------------------------------------------------------------

    void join(int64_t t) {
        Sum most = workers[0].reference[t];
        for (int i = 1; i < threads; i++) most = std::max(most, workers[i].reference[t]);
        double sum = 0;
        for (int i = 0; i < threads; i++) sum += workers[i].sum[t] * std::exp(double(workers[i].reference[t]) - most);
        shift[t] = most, scale[t] = target_factor[t] = 0;
        if (t >= count) return;
        const double others = most + std::log(sum), logit = args.target_logit[start + t];
        args.others[start + t] = Sum(others);
        if (!args.token_weight) return;
        const double weight = args.token_weight[start + t], pull = weight / (1 + std::exp(logit - others));
        double slope = 0;                   // of the penalty by the log-sum-exp
        if (args.z_loss != 0) {
            const double larger = std::max(others, logit), smaller = std::min(others, logit);
            slope = 2 * args.z_loss * (larger + std::log1p(std::exp(smaller - larger)));
        }
        scale[t] = sum > 0 ? Sum((1 + slope) * pull / sum) : Sum(0);
        target_factor[t] = Sum(slope * weight / (1 + std::exp(others - logit)) - pull);
    }

    void take_over(int64_t t) {
        shift[t] = scale[t] = target_factor[t] = 0;
        if (t >= count) return;
        shift[t] = args.others[start + t];
        scale[t] = args.others_factor[start + t];
        target_factor[t] = args.target_factor[start + t];
    }

    // The derivative by the target's logit before the cap.
    Sum target_gradient(int64_t t) const {
        const Sum ratio = args.softcap > 0 ? args.target_logit[start + t] / args.softcap : Sum(0);
        return target_factor[t] * (1 - ratio * ratio);
    }

    // ---- gradients --------------------------------------------------------------------------------------------------

    void pack_scaled(int64_t k) {
        Operand *to = scaled_panels + k * (size / DEPTH);
        const auto entry = [&](int64_t t, int64_t k) {
            return P::narrow(t < count && k < args.D ? args.hidden[(start + t) * args.D + k] * scale[t] : Sum(0));
        };
        for (int64_t t = 0; t < size; t += DEPTH, to += COLS)
            for (int64_t i = 0; i < COLS; i++) to[i] = P::pack(entry(t, k + i), entry(t + DEPTH - 1, k + i));
    }

    void differentiate(Worker<P> &own, int64_t v, int64_t words) {
        Entry *e = keeps ? kept + v * stride : own.tile;
        for (int64_t w = 0; w < words; w += STRIP) {
            const int64_t some = std::min(STRIP, words - w);
            keeps ? correct(v + w, some) : remake(own, v + w, some, e + w * stride);
        }
        if (args.grad_weight) differentiate_weight(e, v, words);
        if (args.grad_bias) differentiate_bias(e, v, words);
        for (int64_t t = 0; t < count; t++)
            if (target[t] >= v && target[t] < v + words) add_target(t);
        if (args.grad_hidden) differentiate_hidden(own, e, v, words);
    }

    void correct(int64_t v, int64_t words) {
        const Sum *reference = references + v / STRIP * size;
        if (std::memcmp(reference, shift, size * sizeof(Sum)) == 0) return;
        for (int64_t t = 0; t < size; t++) {
            if (reference[t] == shift[t]) continue;
            const Sum factor = std::exp(reference[t] - shift[t]);
            for (int64_t w = 0; w < words; w++) {
                Entry &e = kept[(v + w) * stride + t];
                e = P::narrow(widen(e) * factor);
            }
        }
    }

    void remake(Worker<P> &own, int64_t v, int64_t words, Entry *to) {
        make_logits(own, v, words);
        for (int64_t t = 0; t < size; t += COLS) {
            const vec<Sum> reference[2] = {load(shift + t), load(shift + t + L)};
            exponentiate<false>(own, words, t, reference, to, nullptr);
        }
    }

    void differentiate_weight(const Entry *e, int64_t v, int64_t words) {
        const auto *a = reinterpret_cast<const Operand *>(e);
        const bool add = start > 0;
        for (int64_t k = 0; k < args.D; k += COLS) {
            const Operand *b = scaled_panels + k * (size / DEPTH);
            const int64_t columns = std::min(COLS, args.D - k);
            for (int64_t w = 0; w < words; w += ROWS) {
                Sum *to = args.grad_weight + (v + w) * args.D + k;
                const int64_t rows = std::min<int64_t>(ROWS, words - w);
                if (rows == ROWS && columns == COLS) {
                    multiply<P, false>(size / DEPTH, a + w * (stride / DEPTH), stride / DEPTH, b, to, args.D, add);
                    continue;
                }
                Sum edge[ROWS * COLS];
                multiply<P, false>(size / DEPTH, a + w * (stride / DEPTH), stride / DEPTH, b, edge, COLS, false);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < columns; i++)
                        to[row * args.D + i] = edge[row * COLS + i] + (add ? to[row * args.D + i] : Sum(0));
            }
        }
    }

    void differentiate_bias(const Entry *e, int64_t v, int64_t words) {
        for (int64_t w = 0; w < words; w++) {
            Sum part[COLS] = {}, total = 0;
            for (int64_t t = 0; t < size; t += COLS)
                for (int64_t i = 0; i < COLS; i++) part[i] += widen(e[w * stride + t + i]) * scale[t + i];
            for (int64_t i = 0; i < COLS; i++) total += part[i];
            args.grad_bias[v + w] = total + (start > 0 ? args.grad_bias[v + w] : Sum(0));
        }
    }

    void add_target(int64_t t) {
        const Sum *hidden = args.hidden + (start + t) * args.D, factor = target_gradient(t);
        if (args.grad_bias) args.grad_bias[target[t]] += factor;
        if (!args.grad_weight) return;
        Sum *row = args.grad_weight + target[t] * args.D;
        for (int64_t k = 0; k < args.D; k++) row[k] += factor * hidden[k];
    }

    void differentiate_hidden(Worker<P> &own, const Entry *e, int64_t v, int64_t words) {
        const auto *a = reinterpret_cast<const Operand *>(e);
        int64_t a_stride = stride;
        const int64_t depth = (words + DEPTH - 1) / DEPTH;
        if constexpr (DEPTH > 1) {
            for (int64_t w = 0; w < depth; w++) {
                const Entry *upper = e + DEPTH * w * stride, *lower = upper + stride;
                const bool both = DEPTH * w + 1 < words;
                for (int64_t t = 0; t < size; t++)
                    own.pairs[w * size + t] = P::pack(upper[t], both ? lower[t] : Entry(0));
            }
            a = own.pairs, a_stride = size;
        }
        for (int64_t k = 0; k < args.D; k += COLS) {
            for (int64_t w = 0; w < depth; w++) {
                vec<Sum> upper[2], lower[2];
                read(v + DEPTH * w, v + words, k, upper);
                if (DEPTH > 1) read(v + DEPTH * w + 1, v + words, k, lower);
                for (int half = 0; half < 2; half++)
                    store(own.panel + w * COLS + half * L, P::pack(upper[half], lower[half]));
            }
            for (int64_t t = 0; t < count; t += ROWS)
                multiply<P, true>(depth, a + t, a_stride, own.panel, own.grad_hidden + t * width + k, width, true);
        }
    }

    void finish_hidden(int64_t t) {
        if (!args.grad_hidden) return;
        const Source *row = args.weight + target[t] * args.D;
        const Sum factor = target_gradient(t);
        for (int64_t k = 0; k < args.D; k++) {
            Sum total = 0;
            for (int i = 0; i < threads; i++) total += workers[i].grad_hidden[t * width + k];
            args.grad_hidden[(start + t) * args.D + k] = total * scale[t] + factor * widen(row[k]);
        }
    }
};

template <class P, class Source>
int64_t run(const Arguments<typename P::Sum, Source> &args, int threads, int64_t tokens, bool keeps, char *memory) {
    Arena arena{memory};
    Block<P, Source> block(args, threads, tokens, keeps, arena);
    for (int64_t start = 0; memory && start < args.N; start += block.count) block.run(start);
    return arena.used;
}

}  // namespace

// Computes what Arguments says, tokens at a time; returns the bytes of workspace that takes, and does no more without.
// The names: what is multiplied, from a table of what. Everything else has the type of the sums.
#define EXPORT(name, precision, source)                                                                           \
    extern "C" int64_t name(const void *hidden, const void *weight, const void *bias, const int64_t *target,      \
                            int64_t N, int64_t D, int64_t V, double softcap, void *others, void *target_logit,    \
                            const void *token_weight, double z_loss, const void *others_factor,                   \
                            const void *target_factor, void *grad_hidden, void *grad_weight, void *grad_bias,     \
                            int64_t threads, int64_t tokens, int64_t keeps, void *workspace) {                    \
        using Sum = precision::Sum;                                                                               \
        const Arguments<Sum, source> args{                                                                        \
            (const Sum *)hidden, (const source *)weight, (const Sum *)bias, target, N, D, V, Sum(softcap),        \
            (Sum *)others, (Sum *)target_logit, (const Sum *)token_weight, z_loss, (const Sum *)others_factor,    \
            (const Sum *)target_factor, (Sum *)grad_hidden, (Sum *)grad_weight, (Sum *)grad_bias};                \
        return run<precision, source>(args, int(threads), tokens, keeps, (char *)workspace);                      \
    }

EXPORT(float32_from_float32, Single, float)
EXPORT(float32_from_bfloat16, Single, uint16_t)
EXPORT(float64_from_float64, Double, double)
#if defined(__AVX512BF16__)
EXPORT(bfloat16_from_float32, Brain, float)
EXPORT(bfloat16_from_bfloat16, Brain, uint16_t)
#endif
