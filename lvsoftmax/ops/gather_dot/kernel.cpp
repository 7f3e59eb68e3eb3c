// Each token's products with rows of its own, and their gradients. See README.md.
// N tokens, D hidden, V rows of the table, K rows of a token, P = N K pairs, U rows that occur; arrays are contiguous.
// A row is D numbers from anywhere in memory: those that come next are asked for while this one is worked on.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace {

constexpr int64_t AHEAD = 8;  // rows asked for in advance
constexpr int64_t FEW = 1 << 14;  // multiplications: below, waking other threads takes longer than the work

template <typename T>
inline void ask_for(const T *row, int64_t D) {
    for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
}

// Calls a function of up to four in a row until all are done.
template <typename Function>
inline void by_fours(int64_t count, Function function) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) function(i, std::integral_constant<int, 4>());
    for (; i < count; i++) function(i, std::integral_constant<int, 1>());
}

// Calls a function of p and the rows of the pairs from p on for the K pairs from `first` on, up to four at a time.
template <typename T, typename Function>
inline void rows_by_fours(const T *weight, const int64_t *ids, int64_t first, int64_t K, int64_t P, int64_t D,
                          Function function) {
    by_fours(K, [&](int64_t k, auto count) {
        const int64_t p = first + k;
        const T *row[4];
        for (int64_t i = 0; i < count(); i++) {
            row[i] = weight + ids[p + i] * D;
            if (p + i + AHEAD < P) ask_for(weight + ids[p + i + AHEAD] * D, D);
        }
        function(p, row, count);
    });
}

template <int COUNT, typename T>
inline void dots(const T *x, const T *const *row, int64_t D, T *result) {
    if constexpr (COUNT == 4) {
        const T *__restrict a = row[0], *__restrict b = row[1], *__restrict c = row[2], *__restrict d = row[3];
        T s = 0, t = 0, u = 0, v = 0;
#pragma omp simd reduction(+ : s, t, u, v)
        for (int64_t k = 0; k < D; k++) s += x[k] * a[k], t += x[k] * b[k], u += x[k] * c[k], v += x[k] * d[k];
        result[0] = s, result[1] = t, result[2] = u, result[3] = v;
    } else {
        const T *__restrict a = row[0];
        T s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t k = 0; k < D; k++) s += x[k] * a[k];
        result[0] = s;
    }
}

// sum = (fresh ? 0 : sum) + the sum of g[i] row[i].
template <int COUNT, typename T>
inline void gather(const T *g, const T *const *row, int64_t D, bool fresh, T *__restrict sum) {
    for (int64_t k = 0; k < D; k++) {
        T y = fresh ? T(0) : sum[k];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) y += g[i] * row[i][k];
        sum[k] = y;
    }
}

template <typename T>
void products(const T *hidden, const T *weight, const T *bias, const int64_t *ids, int64_t N, int64_t D, int64_t K,
              int64_t threads, T *result) {
    const int64_t P = N * K;
#pragma omp parallel for num_threads(threads) if (threads > 1 && P * D > FEW)
    for (int64_t n = 0; n < N; n++) {
        rows_by_fours(weight, ids, n * K, K, P, D, [&](int64_t p, const T *const *row, auto count) {
            dots<count()>(hidden + n * D, row, D, result + p);
            for (int64_t i = 0; bias && i < count(); i++) result[p + i] += bias[ids[p + i]];
        });
    }
}

template <typename T>
void to_hidden(const T *upstream, const T *weight, const int64_t *ids, int64_t N, int64_t D, int64_t K,
               int64_t threads, T *result) {
    const int64_t P = N * K;
#pragma omp parallel for num_threads(threads) if (threads > 1 && P * D > FEW)
    for (int64_t n = 0; n < N; n++) {
        if (!K) std::fill_n(result + n * D, D, T(0));
        rows_by_fours(weight, ids, n * K, K, P, D, [&](int64_t p, const T *const *row, auto count) {
            gather<count()>(upstream + p, row, D, p == n * K, result + n * D);
        });
    }
}

// A result whose pointer is null is not wanted. With rows, result u belongs to row[u], and all others are not there.
template <typename T>
void to_table(const T *upstream, const T *hidden, const int64_t *pair, const int64_t *row, const int64_t *start,
              int64_t U, int64_t D, int64_t K, bool dense, int64_t threads, T *to_weight, T *to_bias) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads) if (threads > 1 && start[U] * D > FEW)
    for (int64_t u = 0; u < U; u++) {
        const int64_t out = dense ? row[u] : u, *own = pair + start[u];
        T total = 0;
        by_fours(start[u + 1] - start[u], [&](int64_t j, auto count) {
            const T *vector[4];
            T g[4];
            for (int64_t i = 0; i < count(); i++) {
                vector[i] = hidden + own[j + i] / K * D;
                total += g[i] = upstream[own[j + i]];
            }
            if (to_weight) gather<count()>(g, vector, D, j == 0, to_weight + out * D);
        });
        if (to_bias) to_bias[out] = total;
    }
}

}  // namespace

extern "C" {

// Sorts the pairs by their rows, those of a row in their order: pair[P]. Returns U, and of the rows that occur their
// numbers, row[U], and where their pairs start, start[U + 1]. count[V] is workspace.
int64_t sort_pairs(const int64_t *ids, int64_t P, int64_t V, int32_t *count, int64_t *pair, int64_t *row,
                   int64_t *start) {
    for (int64_t v = 0; v < V; v++) count[v] = 0;
    for (int64_t p = 0; p < P; p++) count[ids[p]]++;
    int64_t U = 0, end = 0;
    for (int64_t v = 0; v < V; v++) {
        if (!count[v]) continue;
        row[U] = v;
        start[U++] = end;
        end += count[v];
        count[v] = int32_t(end - count[v]);
    }
    start[U] = P;
    for (int64_t p = 0; p < P; p++) pair[count[ids[p]]++] = p;
    return U;
}

#define FOR_EACH_TYPE(T)                                                                                              \
    void products_##T(const T *hidden, const T *weight, const T *bias, const int64_t *ids, int64_t N, int64_t D,      \
                      int64_t K, int64_t threads, T *result) {                                                        \
        products(hidden, weight, bias, ids, N, D, K, threads, result);                                                \
    }                                                                                                                 \
    void to_hidden_##T(const T *upstream, const T *weight, const int64_t *ids, int64_t N, int64_t D, int64_t K,       \
                       int64_t threads, T *result) {                                                                  \
        to_hidden(upstream, weight, ids, N, D, K, threads, result);                                                   \
    }                                                                                                                 \
    void to_table_##T(const T *upstream, const T *hidden, const int64_t *pair, const int64_t *row,                    \
                      const int64_t *start, int64_t U, int64_t D, int64_t K, int64_t dense, int64_t threads,          \
                      T *to_weight, T *to_bias) {                                                                     \
        to_table(upstream, hidden, pair, row, start, U, D, K, dense != 0, threads, to_weight, to_bias);               \
    }

FOR_EACH_TYPE(float)
FOR_EACH_TYPE(double)
}
