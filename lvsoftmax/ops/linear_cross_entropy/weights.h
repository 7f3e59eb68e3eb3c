// How a logit z becomes a weight f(z), of which probabilities are shares: Exponential, Spherical, Sigmoidal.
//
// Weights are held relative to a scale that keeps them in range. The scale follows from a token's `reference`, which is
// raised to the size of a logit that exceeds its room, and hardly ever is after the first words. Of a word is kept what
// times derivative(reference) is its f'(z), relative to the same scale. STAND_IN takes the place of the target's logit:
// nothing is kept of it, and stand_in(reference) is its weight, to be taken off the sum again.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vectors.h"

namespace {

constexpr double ROOM = 16;                 // nats between a logit and an exponential's reference
constexpr double SPHERICAL_ROOM = 1 << 20;

// Of the target: log f(z) and its derivative.
template <class T> struct Target { T log_weight, slope; };

// f = exp(z), scale exp(reference). The parameter c > 0 is a cap: c tanh(z / c) in the place of z; 0 for none.
template <class T> struct Exponential {
    static constexpr T STAND_IN = -std::numeric_limits<T>::infinity();
    T softcap, inverse;

    explicit Exponential(T parameter) : softcap(parameter), inverse(parameter > 0 ? 1 / parameter : 0) {}

    void cap(T *logits, int64_t count) const {
        if (softcap > 0)
            for (int64_t i = 0; i < count; i += BYTES / sizeof(T))
                store(logits + i, softcap * hyperbolic_tangent<T>(load(logits + i) / softcap));
    }
    Target<T> target(T z) const {
        const T ratio = softcap > 0 ? z / softcap : T(0);
        return {z, 1 - ratio * ratio};
    }

    T start() const { return std::numeric_limits<T>::lowest() / 2; }
    vec<T> size(vec<T> z) const { return z; }
    vec<T> room(vec<T> reference) const { return reference + T(ROOM); }
    double log_scale(double reference) const { return reference; }
    T reference(T log_scale) const { return log_scale; }
    T derivative(T) const { return 1; }
    T stand_in(T) const { return 0; }
    vec<T> change(vec<T> before, vec<T> after) const { return exponential<T>(before - after); }   // of weights
    T change_of_kept(T before, T after) const { return std::exp(before - after); }

    struct Relative { vec<T> reference; };
    Relative relative(vec<T> reference) const { return {reference}; }
    void weigh(const Relative &to, vec<T> z, vec<T> &weight, vec<T> &kept) const {
        kept = weight = exponential<T>(z - to.reference);
        if (inverse > 0) {
            const vec<T> slope = T(1) - (z * inverse) * (z * inverse);
            kept = weight > T(0) ? weight * slope : weight;             // the target's logit is infinite here
        }
    }
};

// f = z^2 + epsilon, scale reference^2. The parameter is the root of epsilon. Kept is z / reference.
template <class T> struct Spherical {
    static constexpr T STAND_IN = 0;
    T root;

    explicit Spherical(T parameter) : root(parameter) {}

    void cap(T *, int64_t) const {}
    Target<T> target(T z) const {
        const double length = std::hypot(double(z), double(root));
        return {T(2 * std::log(length)), T(2 * (z / length) / length)};
    }

    T start() const { return std::max(root, std::numeric_limits<T>::min()); }
    vec<T> size(vec<T> z) const { return z < T(0) ? -z : z; }
    vec<T> room(vec<T> reference) const { return reference * T(SPHERICAL_ROOM); }
    double log_scale(double reference) const { return 2 * std::log(reference); }
    T reference(T log_scale) const { return std::exp(log_scale / 2); }
    T derivative(T reference) const { return 2 / reference; }
    T stand_in(T reference) const { const T ratio = root / reference; return ratio * ratio; }
    vec<T> change(vec<T> before, vec<T> after) const { return (before / after) * (before / after); }
    T change_of_kept(T before, T after) const { return before / after; }

    struct Relative { vec<T> inverse, epsilon; };
    Relative relative(vec<T> reference) const {
        return {T(1) / reference, (root / reference) * (root / reference)};
    }
    void weigh(const Relative &to, vec<T> z, vec<T> &weight, vec<T> &kept) const {
        kept = z * to.inverse;
        weight = kept * kept + to.epsilon;
    }
};

// f = exp(z) sigmoid(z), like exp(z) far above zero and like exp(2 z) far below. With m the reference, the scale is
// exp(m + min(m, 0)): with e = exp(z - m), above = exp(min(m, 0)) and below = exp(-max(m, 0)), f / scale is e q and
// sigmoid(z) is above q, where q = e / (above e + below).
template <class T> struct Sigmoidal {
    static constexpr T STAND_IN = -std::numeric_limits<T>::infinity();

    explicit Sigmoidal(T) {}

    void cap(T *, int64_t) const {}
    Target<T> target(T z) const {
        const double x = z, power = std::exp(-std::abs(x)), smaller = power / (1 + power);
        return {T(x + std::min(x, 0.0) - std::log1p(power)), T(x > 0 ? 1 + smaller : 2 - smaller)};
    }

    T start() const { return std::numeric_limits<T>::lowest() / 2; }
    vec<T> size(vec<T> z) const { return z; }
    vec<T> room(vec<T> reference) const { return reference + T(ROOM); }
    double log_scale(double reference) const { return reference + std::min(reference, 0.0); }
    T reference(T log_scale) const { return log_scale > 0 ? log_scale : log_scale / 2; }
    T derivative(T) const { return 1; }
    T stand_in(T) const { return 0; }
    vec<T> change(vec<T> before, vec<T> after) const {
        return exponential<T>((before - after) + (negative(before) - negative(after)));
    }
    T change_of_kept(T before, T after) const { return T(std::exp(log_scale(before) - log_scale(after))); }

    struct Relative { vec<T> reference, above, below; };
    Relative relative(vec<T> reference) const {
        const vec<T> zero{}, below = exponential<T>(reference > T(0) ? -reference : zero);
        // Where both parts of the sum have underflowed, 0 / 0 would be no number.
        return {reference, exponential<T>(negative(reference)), largest<T>(below, all(std::numeric_limits<T>::min()))};
    }
    void weigh(const Relative &to, vec<T> z, vec<T> &weight, vec<T> &kept) const {
        const vec<T> e = exponential<T>(z - to.reference), q = e / (to.above * e + to.below);
        weight = e * q;
        kept = weight * (T(2) - to.above * q);
    }

    static vec<T> negative(vec<T> x) { return x < T(0) ? x : vec<T>{}; }
};

}  // namespace
