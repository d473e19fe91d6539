// A token's experts and weights from its logits, row by row: scores, closed groups, the k largest choices, their weights.
//
// The k best so far are a sorted list. A vector of choices of which none beats the last of them is passed over at
// once, so most are looked at only once. Of equal choices the lower index comes first, NaN before all else.
//
// Expects load.h.

constexpr int64_t MOST = 4096;    // experts, and shared ones
constexpr int64_t CHOSEN = 64;    // results of a token
constexpr int64_t GROUPS = 64;
constexpr int64_t GRAIN = 32768;  // logits for which another thread pays

enum Dtype : int64_t { NONE = 0, F32 = 1, BF16 = 2, F16 = 3 };
enum Scoring : int64_t { SOFTMAX = 0, SIGMOID = 1, SQRTSOFTPLUS = 2 };
enum Renorm : int64_t { NO = 0, ADD = 1, CLAMP = 2 };

template <class T>
inline void widen(const T* p, int64_t n, int64_t stride, float* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(p[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(p[i * stride]);
  }
}

// n numbers of any dtype, `stride` apart, from the one at `first` on.
inline void read(const void* p, int64_t first, int64_t n, int64_t stride, int64_t dtype, float* out) {
  switch (dtype) {
    case F32: return widen(static_cast<const float*>(p) + first, n, stride, out);
    case BF16: return widen(static_cast<const at::BFloat16*>(p) + first, n, stride, out);
    default: return widen(static_cast<const at::Half*>(p) + first, n, stride, out);
  }
}

inline void write(void* p, int64_t i, int64_t dtype, float v) {
  switch (dtype) {
    case F32: static_cast<float*>(p)[i] = v; break;
    case BF16: static_cast<at::BFloat16*>(p)[i] = static_cast<at::BFloat16>(v); break;
    default: static_cast<at::Half*>(p)[i] = static_cast<at::Half>(v);
  }
}

inline bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

struct Problem {
  const void* logits;
  const void* bias;
  int64_t logits_dtype, bias_dtype, row_stride, expert_stride;
  int64_t experts, shared, top_k, scoring, on_scores, groups, open, top2, zero, renorm;
  float eps, scale;
};

struct Row {
  float peak, total;  // the largest logit and the sum of exp(x - peak), for a softmax
};

inline V score(V x, const Problem& p, const Row& row) {
  if (p.scoring == SOFTMAX) return (x - V(row.peak)).exp() / V(row.total);
  if (p.scoring == SIGMOID) return V(1.f) / (V(1.f) + x.neg().exp());
  return (at::vec::maximum(x, V(0.f)) + x.abs().neg().exp().log1p()).sqrt();
}

// Scores of n numbers in place; what lies between n and the next whole vector is scored too.
inline void score(float* x, int64_t n, const Problem& p, const Row& row) {
  for (int64_t i = 0; i < n; i += L) score(V::loadu(x + i), p, row).store(x + i);
}

inline Row summed(const float* x, int64_t n) {
  V peak(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < n; i += L) peak = at::vec::maximum(peak, V::loadu(x + i));
  Row row;
  row.peak = at::vec::vec_reduce_all<float>([](V& a, V& b) { return at::vec::maximum(a, b); }, peak);
  V total(0.f);
  for (int64_t i = 0; i < n; i += L) total = total + (V::loadu(x + i) - V(row.peak)).exp();
  row.total = at::vec::vec_reduce_all<float>([](V& a, V& b) { return a + b; }, total);
  return row;
}

// Closes all but the `open` best groups: a group is open if fewer than that are better.
inline void close(float* choice, const Problem& p) {
  const int64_t size = p.experts / p.groups;
  float rank[GROUPS];
  for (int64_t g = 0; g < p.groups; ++g) {
    float first = -std::numeric_limits<float>::infinity(), second = first;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const float v = choice[i];
      second = std::max(second, std::min(first, v));
      first = std::max(first, v);
    }
    rank[g] = p.top2 ? first + second : first;
  }
  const float closed = p.zero ? 0.f : -std::numeric_limits<float>::infinity();
  for (int64_t g = 0; g < p.groups; ++g) {
    int64_t ahead = 0;
    for (int64_t h = 0; h < p.groups; ++h) ahead += before(rank[h], rank[g]) || (h < g && rank[h] == rank[g]);
    if (ahead >= p.open) std::fill(choice + g * size, choice + (g + 1) * size, closed);
  }
}

// The k best of the choices, the best first; `choice` is -inf between the experts' number and the next whole vector.
inline void choose(const float* choice, const Problem& p, int64_t* best) {
  float value[CHOSEN];
  int64_t found = 0;
  const int64_t k = p.top_k;
  auto insert = [&](float v, int64_t e) {
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && before(v, value[at - 1]); --at) {
      value[at] = value[at - 1];
      best[at] = best[at - 1];
    }
    value[at] = v;
    best[at] = e;
  };
  for (int64_t e = 0; e < k; ++e) insert(choice[e], e);
  for (int64_t i = k / L * L; i < p.experts; i += L) {
    const V passed = V::loadu(choice + i) <= V(value[k - 1]);
    if (passed.zero_mask() == 0) continue;
    for (int64_t e = std::max(i, k); e < std::min(i + L, p.experts); ++e)
      if (before(choice[e], value[k - 1])) insert(choice[e], e);
  }
}

template <class Id>
void route(const Problem& p, const float* bias, int64_t t, void* weights, int64_t weights_dtype, Id* ids) {
  alignas(64) float x[MOST + 16], choice[MOST + 16], weight[CHOSEN + 16];
  const int64_t all = p.experts + p.shared;
  read(p.logits, t * p.row_stride, all, p.expert_stride, p.logits_dtype, x);
  float always[CHOSEN];
  std::copy(x + p.experts, x + all, always);
  std::fill(x + p.experts, x + (p.experts + L - 1) / L * L, -std::numeric_limits<float>::infinity());
  const Row row = p.scoring == SOFTMAX ? summed(x, p.experts) : Row{};
  std::copy(x, x + (p.experts + L - 1) / L * L, choice);
  if (p.on_scores) score(choice, p.experts, p, row);
  if (p.bias_dtype != NONE)
    for (int64_t e = 0; e < p.experts; ++e) choice[e] += bias[e];
  if (p.groups > 1) close(choice, p);
  std::fill(choice + p.experts, choice + (p.experts + L - 1) / L * L, -std::numeric_limits<float>::infinity());
  int64_t best[CHOSEN];
  choose(choice, p, best);
  const int64_t n = p.top_k + p.shared;
  std::fill(weight, weight + CHOSEN + 16, 0.f);
  for (int64_t j = 0; j < p.top_k; ++j) weight[j] = x[best[j]];
  std::copy(always, always + p.shared, weight + p.top_k);
  score(weight, n, p, row);
  float total = 0.f;
  for (int64_t j = 0; j < n; ++j) total += weight[j];
  const float norm = p.renorm == ADD ? total + p.eps : p.renorm == CLAMP ? std::max(total, p.eps) : 1.f;
  for (int64_t j = 0; j < n; ++j) write(weights, t * n + j, weights_dtype, weight[j] / norm * p.scale);
  for (int64_t j = 0; j < p.top_k; ++j) ids[t * p.top_k + j] = static_cast<Id>(best[j]);
}

// As above, ids of int64 where they are wide, else of int32.
inline void route(
    const Problem& p, const float* bias, int64_t t, void* weights, int64_t weights_dtype, void* ids, int64_t wide_ids) {
  if (wide_ids) {
    route(p, bias, t, weights, weights_dtype, static_cast<int64_t*>(ids));
  } else {
    route(p, bias, t, weights, weights_dtype, static_cast<int32_t*>(ids));
  }
}
