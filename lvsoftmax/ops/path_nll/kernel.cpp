// The likelihood along the paths of a tree, and its gradients, for tokens sorted by the leaves of their targets.
//
// Sorted so, the tokens whose paths meet a node stand side by side. They are worked on in blocks of BLOCK tokens: the
// hidden vectors of a block and the nodes on the few paths through it stay in the processor's nearest caches. A piece is
// what a block and a node have in common: consecutive tokens, those that go left first. Nothing is padded, and no pair
// is sorted.
//
// Letters: N tokens, D hidden, M nodes, L depth of the tree, U nodes that are met, P pairs of a token and a node on its
// path, in the order of the pieces.
//
// Nothing is allocated here, since running out of memory would end the process: whoever calls brings the workspace.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

// native.py, which brings the workspace, repeats these, but for AHEAD, and the sizes of the two structures.
constexpr int64_t BLOCK = 24;
constexpr int64_t LANES = 128;  // tokens that go down the tree together
constexpr int64_t CLIMB = 16;   // tokens that go up it together: each step waits for memory, and they wait at once
constexpr int64_t AHEAD = 4;    // pieces: a node's row is anywhere in memory, and asked for that long before it is read

struct Piece {
  int32_t met;    // which of the U nodes, in the order of a walk from the root, left before right
  int32_t first;  // token, in sorted order
  int32_t size;
  int32_t left;   // how many go left: they come first
  int32_t pair;   // where its pairs begin
  int32_t opens;  // whether it is the first piece of its node
};

struct Met {
  int32_t node;
  int32_t row;  // among the nodes met, by number
};

// What a call works on, as it comes from Python.
struct Plan {
  const int32_t* order;  // [N] the tokens, sorted
  const Piece* piece;
  const Met* met;
  const int32_t* block_piece;  // where the pieces of each block begin, and where the last ends
  int64_t tokens;
};

template <typename T>
inline void ask_for(const T* row, int64_t width) {
  for (int64_t k = 0; k < width; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + k);
}

inline int64_t blocks(int64_t tokens) { return (tokens + BLOCK - 1) / BLOCK; }

inline float power_of_two(int32_t n) {
  const uint32_t bits = uint32_t(n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) for x <= 0, relative error below 2e-7; where there are no more normal numbers, denormal ones and then 0.
inline float exp_of_negative(float x) {
  x = x < -104.f ? -104.f : x;  // not a number stays what it is
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // the logarithm of 2 in two parts
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const int32_t whole = n == n ? int32_t(n) : 0, half = whole / 2;  // 2^n in two factors, each a normal number
  return y * power_of_two(half) * power_of_two(whole - half);
}

// log(1 + e) for e in [0, 1], relative error below 2e-7: twice the area hyperbolic tangent of e / (2 + e).
inline float log1p_of_share(float e) {
  const float z = e / (2.f + e), s = z * z;
  float y = 2.f / 15;
  y = y * s + 2.f / 13;
  y = y * s + 2.f / 11;
  y = y * s + 2.f / 9;
  y = y * s + 2.f / 7;
  y = y * s + 2.f / 5;
  y = y * s + 2.f / 3;
  return z * (y * s + 2.f);
}

inline double exp_of_negative(double x) { return std::exp(x); }
inline double log1p_of_share(double e) { return std::log1p(e); }

// In place of confidences c: the shortfalls log(1 + exp(-c)), and what is missing to certainty, 1 / (1 + exp(c)).
template <typename T>
void decide(const T* confidence, int64_t size, T* shortfall, T* missing) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) {
    const T c = confidence[i], e = exp_of_negative(c > 0 ? -c : c);
    shortfall[i] = log1p_of_share(e) + (c > 0 ? T(0) : -c);
    missing[i] = (c > 0 ? e : T(1)) / (1 + e);
  }
}

// result[i] = row . vector[i], four at a time: the row is read once for them.
template <typename T>
void dots(const T* __restrict row, const T* const* vector, int64_t count, int64_t width, T* result) {
  for (; count >= 4; count -= 4, vector += 4, result += 4) {
    const T *__restrict a = vector[0], *__restrict b = vector[1], *__restrict c = vector[2], *__restrict d = vector[3];
    T s = 0, t = 0, u = 0, v = 0;
#pragma omp simd reduction(+ : s, t, u, v)
    for (int64_t k = 0; k < width; k++) s += row[k] * a[k], t += row[k] * b[k], u += row[k] * c[k], v += row[k] * d[k];
    result[0] = s, result[1] = t, result[2] = u, result[3] = v;
  }
  if (count >= 2) {
    const T *__restrict a = vector[0], *__restrict b = vector[1];
    T s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
    for (int64_t k = 0; k < width; k++) s += row[k] * a[k], t += row[k] * b[k];
    result[0] = s, result[1] = t;
    count -= 2, vector += 2, result += 2;
  }
  if (count) {
    const T* __restrict a = vector[0];
    T s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t k = 0; k < width; k++) s += row[k] * a[k];
    result[0] = s;
  }
}

// vector[i] = (fresh ? 0 : vector[i]) + g[i] row.
template <int COUNT, typename T>
void spread(const T* g, const T* row, int64_t width, bool fresh, T* const* vector) {
  const auto add = [&](auto before) {
#pragma omp simd
    for (int64_t k = 0; k < width; k++) {
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) vector[i][k] = before(vector[i][k]) + g[i] * row[k];
    }
  };
  if (fresh) {
    add([](T) { return T(0); });
  } else {
    add([](T x) { return x; });
  }
}

// sum = (fresh ? 0 : sum) + the sum of g[i] vector[i].
template <int COUNT, typename T>
void gather(const T* g, const T* const* vector, int64_t width, bool fresh, T* sum) {
  const auto add = [&](auto before) {
#pragma omp simd
    for (int64_t k = 0; k < width; k++) {
      T y = 0;
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) y += g[i] * vector[i][k];
      sum[k] = before(k) + y;
    }
  };
  if (fresh) {
    add([](int64_t) { return T(0); });
  } else {
    add([&](int64_t k) { return sum[k]; });
  }
}

// Calls a function of up to four in a row until all are done.
template <typename Function>
void by_fours(int64_t count, Function function) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) function(i, std::integral_constant<int, 4>());
  if (count - i == 3) function(i, std::integral_constant<int, 3>());
  if (count - i == 2) function(i, std::integral_constant<int, 2>());
  if (count - i == 1) function(i, std::integral_constant<int, 1>());
}

// Scores the pairs of a block: shortfalls add up to nll, slopes are kept. work: [3, room], with room for any block's pairs.
template <typename T>
void score(const Plan& plan, int64_t block, const T* hidden, const T* weight, const T* bias, const T* pace,
           int64_t width, int64_t room, T* work, T* slope, T* nll) {
  T *factor = work, *confidence = factor + room, *shortfall = confidence + room;
  const Piece* end = plan.piece + plan.block_piece[blocks(plan.tokens)];
  const Piece *first = plan.piece + plan.block_piece[block], *last = plan.piece + plan.block_piece[block + 1];
  const int64_t pairs = last[-1].pair + last[-1].size - first->pair;
  for (const Piece* p = first; p < last; p++) {
    if (p + AHEAD < end && p[AHEAD].opens) ask_for(weight + plan.met[p[AHEAD].met].node * width, width);
    const int64_t node = plan.met[p->met].node, at = p->pair - first->pair;
    const T* vector[BLOCK];
    for (int32_t i = 0; i < p->size; i++) vector[i] = hidden + plan.order[p->first + i] * width;
    dots(weight + node * width, vector, p->size, width, &confidence[at]);
    for (int32_t i = 0; i < p->size; i++) {
      factor[at + i] = i < p->left ? pace[node] : -pace[node];
      confidence[at + i] = factor[at + i] * (confidence[at + i] + bias[node]);
    }
  }
  T* to_slope = slope + first->pair;
  decide(confidence, pairs, shortfall, to_slope);
  for (int64_t i = 0; i < pairs; i++) to_slope[i] *= -factor[i];
  for (int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, plan.tokens); i++) nll[plan.order[i]] = 0;
  for (const Piece* p = first; p < last; p++) {
    for (int32_t i = 0; i < p->size; i++) nll[plan.order[p->first + i]] += shortfall[p->pair - first->pair + i];
  }
}

// work: [threads, 3, room].
template <typename T>
void forward(const Plan& plan, const T* hidden, const T* weight, const T* bias, const T* pace, int64_t width,
             int64_t room, int64_t threads, T* work, T* slope, T* nll) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks(plan.tokens); block++) {
    score(plan, block, hidden, weight, bias, pace, width, room, work + omp_get_thread_num() * 3 * room, slope, nll);
  }
}

// A gradient whose pointer is null is not wanted. shared: [U] workspace. prepare(thread, block) comes before whatever is
// done with a block, and may make its slopes.
template <typename T, typename Prepare>
void backward(const Plan& plan, const T* hidden, const T* weight, const T* slope, const T* upstream, int64_t width,
              int64_t nodes, bool by_node, int64_t threads, char* shared, T* to_hidden, T* to_weight, T* to_bias,
              Prepare prepare) {
  const auto add = [&](const Piece& p, bool root, bool to_tokens, bool to_node) {
    const Met met = plan.met[p.met];
    const int64_t out = by_node ? met.node : met.row;
    int64_t token[BLOCK];
    T g[BLOCK], total = 0;
    for (int32_t i = 0; i < p.size; i++) {
      token[i] = plan.order[p.first + i];
      g[i] = upstream[token[i]] * slope[p.pair + i];
      total += g[i];
    }
    if (to_tokens) {
      T* vector[BLOCK];
      for (int32_t i = 0; i < p.size; i++) vector[i] = to_hidden + token[i] * width;
      by_fours(p.size, [&](int64_t i, auto n) {
        spread<n()>(g + i, weight + met.node * width, width, root, vector + i);
      });
    }
    if (to_node && to_weight) {
      const T* vector[BLOCK];
      for (int32_t i = 0; i < p.size; i++) vector[i] = hidden + token[i] * width;
      by_fours(p.size, [&](int64_t i, auto n) {
        gather<n()>(g + i, vector + i, width, p.opens && i == 0, to_weight + out * width);
      });
    }
    if (to_node && to_bias) to_bias[out] = p.opens ? total : to_bias[out] + total;
  };
  const int64_t all = blocks(plan.tokens);
  const Piece* end = plan.piece + plan.block_piece[all];
  // Threads take consecutive blocks each. A node whose pieces lie with several threads waits until all are done, so
  // that its sum has one order, however many there are.
  std::memset(shared, 0, nodes);
  for (int64_t thread = 1; thread < threads; thread++) {
    const Piece* start = plan.piece + plan.block_piece[all * thread / threads];
    for (const Piece* p = start; p < end && p->first == start->first; p++) shared[p->met] |= !p->opens;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t share = thread; share < threads; share += team) {
      for (int64_t block = all * share / threads; block < all * (share + 1) / threads; block++) {
        prepare(thread, block);
        // The first piece of a block is that of the root, which is on every path.
        const Piece* first = plan.piece + plan.block_piece[block];
        for (const Piece* p = first; p < plan.piece + plan.block_piece[block + 1]; p++) {
          if (p + AHEAD < end && p[AHEAD].opens) {
            const Met met = plan.met[p[AHEAD].met];
            if (to_hidden) ask_for(weight + met.node * width, width);
            if (to_weight) ask_for(to_weight + (by_node ? met.node : met.row) * width, width);
          }
          add(*p, p == first, to_hidden, !shared[p->met]);
        }
      }
    }
#pragma omp barrier
    for (const Piece* p = plan.piece; threads > 1 && p < end; p++) {
      if (shared[p->met] && p->met % team == thread) add(*p, false, false, true);
    }
  }
}

// Every word's log-probability: result [V, N], a row for each word, from the nodes' scores [M, N]. Up to LANES tokens go
// down the tree together; nodes are numbered by level, so that each is reached before it is asked what lies below.
// child: [2 M] workspace, the node that hangs from each branch, or ~word; reached: [threads, M, min(LANES, N)].
template <typename T>
void log_prob(const int32_t* node_branch, const int32_t* word_branch, int64_t nodes, const T* score, int64_t tokens,
              int64_t threads, int32_t* child, T* reached, T* result) {
  for (int64_t n = 1; n < nodes; n++) child[node_branch[n]] = int32_t(n);
  for (int64_t w = 0; w <= nodes; w++) child[word_branch[w]] = ~int32_t(w);
#pragma omp parallel num_threads(threads)
  {
    T* here = reached + omp_get_thread_num() * nodes * std::min(LANES, tokens);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tokens; first += LANES) {
      const int64_t lanes = std::min(LANES, tokens - first);
      const auto below = [&](int32_t to) { return to < 0 ? result + ~to * tokens + first : here + to * lanes; };
      std::fill(here, here + lanes, T(0));
      for (int64_t n = 0; n < nodes; n++) {
        const T *x = score + n * tokens + first, *log_p = here + n * lanes;
        T *even = below(child[2 * n]), *odd = below(child[2 * n + 1]);
#pragma omp simd
        for (int64_t i = 0; i < lanes; i++) {
          const T shared = log1p_of_share(exp_of_negative(x[i] > 0 ? -x[i] : x[i]));
          const T above = log_p[i];
          even[i] = above - (shared + (x[i] > 0 ? T(0) : -x[i]));
          odd[i] = above - (shared + (x[i] > 0 ? x[i] : T(0)));
        }
      }
    }
  }
}

}  // namespace

// Sorts the tokens, finds the pieces and the nodes met. There is room for N L of both; counts becomes {U, P}.
// work: [2 N + (CLIMB + 5) L + 1].
extern "C" void plan(const int32_t* node_branch, const int32_t* word_branch, const int32_t* word_rank, int64_t depth,
                     const int64_t* target, int64_t tokens, int32_t* order, Piece* piece, Met* met,
                     int32_t* block_piece, int32_t* work, int64_t* counts) {
  struct Ranked {
    int32_t rank, token;
  };
  Ranked* sorted = reinterpret_cast<Ranked*>(work);
  for (int32_t i = 0; i < tokens; i++) sorted[i] = {word_rank[target[i]], i};
  std::sort(sorted, sorted + tokens, [](const Ranked& a, const Ranked& b) {
    return a.rank < b.rank || (a.rank == b.rank && a.token < b.token);
  });
  int32_t* climbed = work + 2 * tokens;                  // the ways up from the leaves of CLIMB tokens ...
  int32_t climbed_length[CLIMB];                         // ... and how long they are
  int32_t* path = climbed + CLIMB * depth;               // from the root to this token ...
  int32_t* before = path + depth;                        // ... and to the last
  int32_t length = 0, last = 0;                          // of the two paths
  int32_t *node = before + depth, *open = node + depth;  // of every level on the way: the node met, its open piece
  int32_t* next = open + depth;                          // of every level, how many are met
  std::fill(next, next + depth + 1, 0);
  int32_t nodes = 0, pieces = 0, pairs = 0;

  const auto climb = [&](int32_t from) {
    const int64_t count = std::min(CLIMB, tokens - from);
    int32_t branch[CLIMB];
    for (int64_t t = 0; t < count; t++) branch[t] = word_branch[target[sorted[from + t].token]], climbed_length[t] = 0;
    for (bool on = true; on;) {
      on = false;
      for (int64_t t = 0; t < count; t++) {
        if (branch[t] < 0) continue;
        climbed[t * depth + climbed_length[t]++] = branch[t];
        branch[t] = node_branch[branch[t] >> 1];
        on = true;
      }
    }
  };
  const auto close = [&](int32_t from, int32_t token) {
    for (int32_t l = from; l < last; l++) {
      Piece& p = piece[open[l]];
      p.size = token - p.first;
      if (p.left < 0) p.left = before[l] & 1 ? 0 : p.size;
    }
  };
  for (int32_t i = 0; i < tokens; i++) {
    order[i] = sorted[i].token;
    if (i % CLIMB == 0) climb(i);
    length = climbed_length[i % CLIMB];
    std::reverse_copy(climbed + i % CLIMB * depth, climbed + i % CLIMB * depth + length, path);
    int32_t common = 0;
    while (common < last && path[common] == before[common]) common++;
    const int32_t fresh = i ? common + 1 : 0;  // at the node where they part, the last token went left and this one right
    const bool cut = i % BLOCK == 0;
    close(cut ? 0 : fresh, i);
    if (!cut && common < length) piece[open[common]].left = i - piece[open[common]].first;
    if (cut) block_piece[i / BLOCK] = pieces;
    for (int32_t l = fresh; l < length; l++) {
      met[nodes] = {path[l] >> 1, l};  // the level, until there are rows
      next[l + 1]++;
      node[l] = nodes++;
    }
    for (int32_t l = cut ? 0 : fresh; l < length; l++) {
      piece[pieces] = {node[l], i, 0, -1, 0, l >= fresh};
      open[l] = pieces++;
    }
    std::swap(path, before);
    last = length;
  }
  close(0, tokens);
  block_piece[blocks(tokens)] = pieces;
  for (int32_t s = 0; s < pieces; s++) piece[s].pair = pairs, pairs += piece[s].size;
  // The nodes of a level are numbered from left to right: in the order in which they were met.
  for (int64_t l = 0; l < depth; l++) next[l + 1] += next[l];
  for (int32_t u = 0; u < nodes; u++) met[u].row = next[met[u].row]++;
  counts[0] = nodes, counts[1] = pairs;
}

extern "C" void numbers_met(const Met* met, int64_t nodes, int64_t* number) {
  for (int64_t u = 0; u < nodes; u++) number[met[u].row] = met[u].node;
}

#define FOR_TYPE(T)                                                                                                   \
  extern "C" void forward_##T(const int32_t* order, const Piece* piece, const Met* met, const int32_t* block_piece,   \
                              int64_t tokens, const T* hidden, const T* weight, const T* bias, const T* pace,         \
                              int64_t width, int64_t room, int64_t threads, T* work, T* slope, T* nll) {              \
    forward({order, piece, met, block_piece, tokens}, hidden, weight, bias, pace, width, room, threads, work, slope,  \
            nll);                                                                                                     \
  }                                                                                                                   \
  extern "C" void backward_##T(const int32_t* order, const Piece* piece, const Met* met, const int32_t* block_piece,  \
                               int64_t tokens, const T* hidden, const T* weight, const T* slope, const T* upstream,   \
                               int64_t width, int64_t nodes, int64_t by_node, int64_t threads, char* shared,          \
                               T* to_hidden, T* to_weight, T* to_bias) {                                              \
    backward({order, piece, met, block_piece, tokens}, hidden, weight, slope, upstream, width, nodes, by_node,        \
             threads, shared, to_hidden, to_weight, to_bias, [](int64_t, int64_t) {});                                \
  }                                                                                                                   \
  extern "C" void weighted_##T(const int32_t* order, const Piece* piece, const Met* met, const int32_t* block_piece,  \
                               int64_t tokens, const T* hidden, const T* weight, T* slope, const T* upstream,         \
                               int64_t width, int64_t nodes, int64_t by_node, int64_t threads, char* shared,          \
                               T* to_hidden, T* to_weight, T* to_bias, const T* bias, const T* pace, int64_t room,    \
                               T* work, T* nll) {                                                                     \
    const Plan plan{order, piece, met, block_piece, tokens};                                                          \
    backward(plan, hidden, weight, slope, upstream, width, nodes, by_node, threads, shared, to_hidden, to_weight,     \
             to_bias, [&](int64_t thread, int64_t block) {                                                            \
               score(plan, block, hidden, weight, bias, pace, width, room, work + thread * 3 * room, slope, nll);     \
             });                                                                                                      \
  }                                                                                                                   \
  extern "C" void log_prob_##T(const int32_t* node_branch, const int32_t* word_branch, int64_t nodes, const T* score, \
                               int64_t tokens, int64_t threads, int32_t* child, T* reached, T* result) {              \
    log_prob(node_branch, word_branch, nodes, score, tokens, threads, child, reached, result);                        \
  }

FOR_TYPE(float)
FOR_TYPE(double)
