// What a call is given, and its rows (token, slot) listed by expert.
//
// Expects BRAZE_LAYOUT_*; BRAZE_SEPARATE, whether each expert's weights are tensors of their own, and BRAZE_APART,
// whether so are those of gate and up.

enum Dtype : int64_t { NONE = 0, F32 = 1, BF16 = 2, F16 = 3 };

inline float read(const void* p, int64_t i, int64_t dtype) {
  switch (dtype) {
    case F32: return static_cast<const float*>(p)[i];
    case BF16: return widen(static_cast<const at::BFloat16*>(p)[i]);
    default: return widen(static_cast<const at::Half*>(p)[i]);
  }
}

inline void write(void* p, int64_t i, int64_t dtype, V v, int count) {
  switch (dtype) {
    case F32: return store(static_cast<float*>(p) + i, v, count);
    case BF16: return store(static_cast<at::BFloat16*>(p) + i, v, count);
    default: return store(static_cast<at::Half*>(p) + i, v, count);
  }
}

// A tensor of fp32, bfloat16 or float16, read element by element where speed does not matter.
struct Table {
  const void* data;
  int64_t dtype, stride0, stride1;
  float at(int64_t i, int64_t j) const { return read(data, i * stride0 + j * stride1, dtype); }
};

// What lies in one tensor for all experts, the i-th `stride` elements after the first, or in a tensor each.
struct Weights {
  const void* const* data;
  int64_t stride;
  const Weight* at(int64_t i) const {
    return static_cast<const Weight*>(data[BRAZE_SEPARATE ? i : 0]) + (BRAZE_SEPARATE ? 0 : i * stride);
  }
};

struct Biases {
  const void* const* data;
  int64_t dtype, stride0, stride1;
  explicit operator bool() const { return dtype != NONE; }
  float at(int64_t i, int64_t j) const {
    return read(data[BRAZE_SEPARATE ? i : 0], (BRAZE_SEPARATE ? 0 : i * stride0) + j * stride1, dtype);
  }
};

struct Problem {
  int64_t tokens, hidden, inner, experts, top_k;
  const Weight* x;
  int64_t x_stride;
  Weights w1, w2;
  int64_t w1_stride, w2_stride;
  Table router;
  Biases b1, b2;
  bool weight_on_input;
  float scale;
  void* out;
  int64_t out_dtype;
};

// The rows by expert: those of expert e at [begin[e], begin[e + 1]), tokens ascending.
struct Routing {
  std::vector<int64_t> begin;
  std::vector<int32_t> token;
  std::vector<float> weight;
  std::vector<int32_t> used;  // experts with a row
};

template <class Id>
Routing route(const Problem& p, const Id* ids, int64_t stride0, int64_t stride1) {
  Routing r;
  r.begin.assign(p.experts + 1, 0);
  auto id = [&](int64_t t, int64_t j) { return static_cast<int64_t>(ids[t * stride0 + j * stride1]); };
  auto known = [&](int64_t e) { return e >= 0 && e < p.experts; };
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t j = 0; j < p.top_k; ++j)
      if (const int64_t e = id(t, j); known(e)) ++r.begin[e + 1];
  for (int64_t e = 0; e < p.experts; ++e) {
    if (r.begin[e + 1]) r.used.push_back(static_cast<int32_t>(e));
    r.begin[e + 1] += r.begin[e];
  }
  std::vector<int64_t> next(r.begin.begin(), r.begin.end() - 1);
  r.token.resize(r.begin[p.experts]);
  r.weight.resize(r.begin[p.experts]);
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t j = 0; j < p.top_k; ++j)
      if (const int64_t e = id(t, j); known(e)) {
        r.token[next[e]] = static_cast<int32_t>(t);
        r.weight[next[e]++] = p.router.at(t, j);
      }
  return r;
}

// Where there are no ids: every token has the one expert, with the weight 1.
inline Routing of_one_expert(const Problem& p) {
  Routing r{{0, p.tokens}, std::vector<int32_t>(p.tokens), std::vector<float>(p.tokens, 1.f), {0}};
  std::iota(r.token.begin(), r.token.end(), 0);
  return r;
}

#if BRAZE_LAYOUT_NONE
constexpr int GATES = 1;
#else
constexpr int GATES = 2;
#endif
constexpr int APART = BRAZE_APART ? 2 : 1;  // matrices of an expert's first product
constexpr bool WOVEN = BRAZE_LAYOUT_INTERLEAVED && BRAZE_TRANSPOSED && APART == 1;  // a run of columns holds g, u, g, u ...
