// Updates of some rows of a table, each read and written once. See reference.py for the formulas.
// U rows of D numbers; row[u] is where row u lies in the table and its state, each index once, or row is null: all of
// them in order. Arrays are contiguous. `per_row`: the state of squares has one number per row, for their mean.

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t FEW = 1 << 14;  // numbers: below, waking other threads takes longer than the work
constexpr int64_t AHEAD = 3;      // rows asked for before their turn: they lie anywhere
constexpr int64_t LINE = 16;      // numbers of a cache line

// Asks for the row of a table or its state, of `width` numbers, that comes AHEAD rows after u.
inline void ask_for_next(const float *array, const int64_t *row, int64_t u, int64_t U, int64_t width) {
    if (!row || u + AHEAD >= U) return;
    const float *next = array + row[u + AHEAD] * width;
    for (int64_t d = 0; d < width; d += LINE) __builtin_prefetch(next + d, 1);
}

}

extern "C" {

// velocity is null where there is no momentum.
void sgd_rows(float *table, float *velocity, const int64_t *row, const float *gradient, int64_t U, int64_t D, double lr,
              double momentum, double decay, int64_t threads) {
    const float rate = lr, keep = momentum, pull = decay;
#pragma omp parallel for num_threads(threads) if (threads > 1 && U * D > FEW)
    for (int64_t u = 0; u < U; u++) {
        const int64_t place = row ? row[u] : u;
        ask_for_next(table, row, u, U, D);
        if (velocity) ask_for_next(velocity, row, u, U, D);
        float *__restrict p = table + place * D;
        const float *__restrict g = gradient + u * D;
        if (!velocity) {
            for (int64_t d = 0; d < D; d++) p[d] -= rate * (g[d] + pull * p[d]);
            continue;
        }
        float *__restrict m = velocity + place * D;
        for (int64_t d = 0; d < D; d++) {
            m[d] = keep * m[d] + (g[d] + pull * p[d]);
            p[d] -= rate * m[d];
        }
    }
}

void adagrad_rows(float *table, float *sum, const int64_t *row, const float *gradient, int64_t U, int64_t D,
                  int64_t per_row, double lr, double epsilon, double decay, int64_t threads) {
    const float rate = lr, eps = epsilon, pull = decay;
#pragma omp parallel for num_threads(threads) if (threads > 1 && U * D > FEW)
    for (int64_t u = 0; u < U; u++) {
        const int64_t place = row ? row[u] : u;
        ask_for_next(table, row, u, U, D);
        ask_for_next(sum, row, u, U, per_row ? 1 : D);
        float *__restrict p = table + place * D;
        const float *__restrict g = gradient + u * D;
        if (per_row) {
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int64_t d = 0; d < D; d++) squares += (g[d] + pull * p[d]) * (g[d] + pull * p[d]);
            sum[place] += squares / float(D);
            const float root = std::sqrt(sum[place]) + eps;
            for (int64_t d = 0; d < D; d++) p[d] -= rate * ((g[d] + pull * p[d]) / root);
            continue;
        }
        float *__restrict s = sum + place * D;
        for (int64_t d = 0; d < D; d++) {
            const float slope = g[d] + pull * p[d];
            s[d] += slope * slope;
            p[d] -= rate * (slope / (std::sqrt(s[d]) + eps));
        }
    }
}

void adam_rows(float *table, float *first, float *second, const int64_t *row, const float *gradient, int64_t U,
               int64_t D, int64_t per_row, double lr, double beta1, double beta2, double correction1,
               double correction2, double epsilon, double decay, int64_t threads) {
    const float rate = lr, keep1 = beta1, keep2 = beta2, new1 = 1 - beta1, new2 = 1 - beta2;
    const float whole1 = correction1, whole2 = correction2, eps = epsilon, pull = decay;
#pragma omp parallel for num_threads(threads) if (threads > 1 && U * D > FEW)
    for (int64_t u = 0; u < U; u++) {
        const int64_t place = row ? row[u] : u;
        ask_for_next(table, row, u, U, D);
        ask_for_next(first, row, u, U, D);
        ask_for_next(second, row, u, U, per_row ? 1 : D);
        float *__restrict p = table + place * D;
        float *__restrict m = first + place * D;
        const float *__restrict g = gradient + u * D;
        if (per_row) {
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int64_t d = 0; d < D; d++) squares += g[d] * g[d];
            second[place] = keep2 * second[place] + new2 * (squares / float(D));
            const float root = std::sqrt(second[place] / whole2) + eps;
            for (int64_t d = 0; d < D; d++) {
                m[d] = keep1 * m[d] + new1 * g[d];
                p[d] -= rate * (m[d] / whole1 / root + pull * p[d]);
            }
            continue;
        }
        float *__restrict v = second + place * D;
        for (int64_t d = 0; d < D; d++) {
            m[d] = keep1 * m[d] + new1 * g[d];
            v[d] = keep2 * v[d] + new2 * (g[d] * g[d]);
            p[d] -= rate * (m[d] / whole1 / (std::sqrt(v[d] / whole2) + eps) + pull * p[d]);
        }
    }
}
}
