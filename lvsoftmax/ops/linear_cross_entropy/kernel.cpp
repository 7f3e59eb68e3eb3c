// Cross-entropy of a linear layer by tiles that stay in cache: products, weights and sums of the same numbers.
//
// Letters: N tokens, D hidden, V words; C tokens of one block. A strip is STRIP words whose logits are made together, a
// tile is TILE words whose gradients are. Word-major throughout: row v of an array holds word v for the C tokens.
//
// For a block of tokens, in the letters of README.md (the target is never among the words of a sum):
//   forward    z = w_v . h + b_v,  f(z) relative to a reference,  sum over v of f;  e ~ f'(z) is kept or not
//   backward   e as kept, or made again from the known sum;
//              dw_v += sum over t of e (h scale),  dh += scale sum over v of e w_v
// weights.h says what f and e are: of the softmax both are exp(z - reference). `reference` is any number near a token's
// largest logit. It is raised where a logit exceeds its room, which happens in the first strip and hardly ever again;
// strips made before keep theirs in `references` and are corrected on use.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <omp.h>

#include "products.h"
#include "weights.h"

constexpr int64_t STRIP = 4 * ROWS, TILE = 4 * STRIP;

namespace {

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

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
    Sum parameter;                          // of the weights
    Sum *others, *target_log_weight;        // log of the sum over all words but the target; computed, or known
    const Sum *token_weight;                // of the loss: gradients follow from the sums, or
    double z_loss;                          // factor of the squared log-sum-exp in that loss
    const Sum *others_factor, *target_factor;   // sums are known: dL/df is others_factor / sum, dL/dlog f of the target
    Sum *grad_hidden, *grad_weight, *grad_bias;
};

// What one thread has for itself.
template <class P> struct Worker {
    typename P::Operand *words;             // [STRIP, D] of the table, as `a` of the logits
    typename P::Sum *logits;                // [STRIP, C]
    typename P::Entry *tile;                // [TILE, C] of what is kept, where nothing is
    typename P::Operand *pairs;             // [TILE / DEPTH, C] of them as `a` of the hidden gradient, in bfloat16
    typename P::Operand *panel;             // [TILE / DEPTH, COLUMNS] of the table, as `b` of the hidden gradient
    typename P::Sum *grad_hidden;           // [C, D] from this thread's words
    typename P::Sum *reference;             // [C]
    double *sum;                            // [C] of the weights relative to reference
};

template <class P, template <class> class Weights, class Source> struct Block {
    using Operand = typename P::Operand;
    using Entry = typename P::Entry;
    using Sum = typename P::Sum;
    static constexpr int64_t DEPTH = P::DEPTH, L = LANES<P>, COLS = COLUMNS<P>;

    const Arguments<Sum, Source> &args;
    const Weights<Sum> weights;
    int threads;
    bool keeps;
    int64_t size;                           // C: tokens, the last ones perhaps made of zeros; a multiple of COLS
    int64_t stride;                         // of a word's kept row: an odd number of cache lines, to use all sets
    int64_t steps, width;                   // D in operands; D in whole panels
    Operand *hidden_panels;                 // [C / COLS, steps, COLS], `b` of the logits
    Operand *scaled_panels;                 // [width / COLS, C / DEPTH, COLS] hidden * scale, `b` of the table's
    Entry *kept;                            // [V, C] what the derivatives of weights follow from
    Sum *references;                        // [V / STRIP, C] what each strip's are relative to
    Sum *shift, *scale;                     // [C] reference of all words; e * scale is the gradient of a logit
    Sum *target_factor, *target_slope;      // [C] dL/dlog f of the target, and dlog f/dz
    Worker<P> *workers;

    int64_t start = 0, count = 0;           // the tokens of this block
    const int64_t *target = nullptr;        // [count]

    Block(const Arguments<Sum, Source> &args, int threads, int64_t tokens, bool keeps, Arena &arena)
        : args(args), weights(args.parameter), threads(threads), keeps(keeps), size(round_up(tokens, COLS)) {
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
        target_slope = arena.take<Sum>(size);
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
#pragma omp single
            threads = omp_get_num_threads();  // fewer than asked for, where the system gives no more
            const int thread = omp_get_thread_num();
            Worker<P> &own = workers[thread];
            // The same words in the same order every time: results do not depend on which thread is faster.
            const int64_t from = tiles * thread / threads * TILE;
            const int64_t to = std::min(tiles * (thread + 1) / threads * TILE, args.V);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < size; t += COLS) pack_hidden(t);
            if (!known) {
                std::fill_n(own.reference, size, weights.start());
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

    // ---- logits and their weights -----------------------------------------------------------------------------------

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
        weights.cap(own.logits, words * size);
        for (int64_t t = 0; t < count; t++) {
            const int64_t w = target[t] - v;
            if (w < 0 || w >= words) continue;
            const Target<Sum> known = weights.target(own.logits[w * size + t]);
            args.target_log_weight[start + t] = known.log_weight;
            target_slope[t] = known.slope;
            own.logits[w * size + t] = Weights<Sum>::STAND_IN;
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
                    most = largest<Sum>(weights.size(load(own.logits + w * size + t + half * L)), most);
                reference[half] = most > weights.room(before) ? most : before;
                factor[half] = weights.change(before, reference[half]);
                store(own.reference + t + half * L, reference[half]);
                if (keeps) store(references + v / STRIP * size + t + half * L, reference[half]);
            }
            weigh<true>(own, words, t, reference, to, sum);
            Sum add[COLS], times[COLS];
            for (int half = 0; half < 2; half++) {
                store(add + half * L, sum[half]);
                store(times + half * L, factor[half]);
            }
            for (int64_t i = 0; i < COLS; i++) own.sum[t + i] = own.sum[t + i] * times[i] + add[i];
        }
        for (int64_t t = 0; t < count; t++)
            if (target[t] >= v && target[t] < v + words) own.sum[t] -= weights.stand_in(own.reference[t]);
    }

    // Weights of COLS tokens relative to reference, summed or not; what is stored is what the gradient needs of them.
    template <bool SUMMED>
    void weigh(Worker<P> &own, int64_t words, int64_t t, const vec<Sum> *reference, Entry *to, vec<Sum> *sum) {
        const Weights<Sum> f = weights;
        const auto left = f.relative(reference[0]), right = f.relative(reference[1]);
        for (int64_t w = 0; w < words; w++) {
            const Sum *logit = own.logits + w * size + t;
            vec<Sum> weight[2], e[2];
            f.weigh(left, load(logit), weight[0], e[0]);
            f.weigh(right, load(logit + L), weight[1], e[1]);
            if (SUMMED)
                for (int half = 0; half < 2; half++) sum[half] += weight[half];
            if (to) P::put(to + w * stride + t, e, SUMMED);
        }
    }

    // ---- what the sums say ------------------------------------------------------------------------------------------

    void join(int64_t t) {
        Sum most = workers[0].reference[t];
        for (int i = 1; i < threads; i++) most = std::max(most, workers[i].reference[t]);
        const double scale_of_most = weights.log_scale(most);
        double sum = 0;
        for (int i = 0; i < threads; i++)
            sum += workers[i].sum[t] * std::exp(weights.log_scale(workers[i].reference[t]) - scale_of_most);
        shift[t] = most, scale[t] = target_factor[t] = 0;
        if (t >= count) return;
        const double others = scale_of_most + std::log(sum), log_weight = args.target_log_weight[start + t];
        args.others[start + t] = Sum(others);
        if (!args.token_weight) return;
        const double weight = args.token_weight[start + t], pull = weight / (1 + std::exp(log_weight - others));
        double slope = 0;                   // of the penalty by the log-sum-exp
        if (args.z_loss != 0) {
            const double larger = std::max(others, log_weight), smaller = std::min(others, log_weight);
            slope = 2 * args.z_loss * (larger + std::log1p(std::exp(smaller - larger)));
        }
        scale[t] = sum > 0 ? Sum((1 + slope) * pull / sum * weights.derivative(most)) : Sum(0);
        target_factor[t] = Sum(slope * weight / (1 + std::exp(others - log_weight)) - pull);
    }

    void take_over(int64_t t) {
        shift[t] = std::numeric_limits<Sum>::max() / 2;     // beside which the weights of no token are nothing
        scale[t] = target_factor[t] = 0;
        if (t >= count) return;
        shift[t] = weights.reference(args.others[start + t]);
        scale[t] = args.others_factor[start + t] * weights.derivative(shift[t]);
        target_factor[t] = args.target_factor[start + t];
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
            const Sum factor = weights.change_of_kept(reference[t], shift[t]);
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
            weigh<false>(own, words, t, reference, to, nullptr);
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
        const Sum *hidden = args.hidden + (start + t) * args.D, factor = target_factor[t] * target_slope[t];
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
        const Sum factor = target_factor[t] * target_slope[t];
        for (int64_t k = 0; k < args.D; k++) {
            Sum total = 0;
            for (int i = 0; i < threads; i++) total += workers[i].grad_hidden[t * width + k];
            args.grad_hidden[(start + t) * args.D + k] = total * scale[t] + factor * widen(row[k]);
        }
    }
};

template <class P, template <class> class Weights, class Source>
int64_t run(const Arguments<typename P::Sum, Source> &args, int threads, int64_t tokens, bool keeps, char *memory) {
    Arena arena{memory};
    Block<P, Weights, Source> block(args, threads, tokens, keeps, arena);
    for (int64_t start = 0; memory && start < args.N; start += block.count) block.run(start);
    return arena.used;
}

}  // namespace

// Computes what Arguments says, tokens at a time; returns the bytes of workspace that takes, and does no more without.
// The names: the weights, what is multiplied, from a table of what. Everything else has the type of the sums.
#define EXPORT(name, weights, precision, source)                                                                  \
    extern "C" int64_t name(const void *hidden, const void *weight, const void *bias, const int64_t *target,      \
                            int64_t N, int64_t D, int64_t V, double parameter, void *others,                      \
                            void *target_log_weight, const void *token_weight, double z_loss,                     \
                            const void *others_factor, const void *target_factor, void *grad_hidden,              \
                            void *grad_weight, void *grad_bias, int64_t threads, int64_t tokens, int64_t keeps,   \
                            void *workspace) {                                                                    \
        using Sum = precision::Sum;                                                                               \
        const Arguments<Sum, source> args{                                                                        \
            (const Sum *)hidden, (const source *)weight, (const Sum *)bias, target, N, D, V, Sum(parameter),      \
            (Sum *)others, (Sum *)target_log_weight, (const Sum *)token_weight, z_loss,                           \
            (const Sum *)others_factor, (const Sum *)target_factor, (Sum *)grad_hidden, (Sum *)grad_weight,       \
            (Sum *)grad_bias};                                                                                    \
        return run<precision, weights, source>(args, int(threads), tokens, keeps, (char *)workspace);             \
    }

#if defined(__AVX512BF16__)
#define EXPORT_PAIRS(name, weights)                                                                               \
    EXPORT(name##_bfloat16_from_float32, weights, Brain, float)                                                   \
    EXPORT(name##_bfloat16_from_bfloat16, weights, Brain, uint16_t)
#else
#define EXPORT_PAIRS(name, weights)
#endif

#define EXPORT_ALL(name, weights)                                                                                 \
    EXPORT(name##_float32_from_float32, weights, Single, float)                                                   \
    EXPORT(name##_float32_from_bfloat16, weights, Single, uint16_t)                                               \
    EXPORT(name##_float64_from_float64, weights, Double, double)                                                  \
    EXPORT_PAIRS(name, weights)

EXPORT_ALL(exponential, Exponential)
EXPORT_ALL(spherical, Spherical)
EXPORT_ALL(sigmoidal, Sigmoidal)
