// A rotation of the heads of q and k, an RMSNorm over each before it: a head is read, turned in float32 and written once.
//
// A pair (a, b) becomes (a aa - b ab, b bb + a ba): a token's four rows of factors are its tables, times the norm's weights,
// made once for all its heads. Of each head BLOCK tokens' rows are turned one after the other.
// Expects: In, Out, the types of what turns and of the result; BRAZE_IN_INTERLEAVED, BRAZE_OUT_INTERLEAVED, whether a pair's
// components lie side by side or half a rotation apart.

using V = at::vec::Vectorized<float>;
constexpr int64_t L = V::size();
constexpr int64_t W = 2 * L;      // elements of a step
constexpr int64_t MOST = 512;     // elements of a head
constexpr int64_t BLOCK = 4;      // tokens of a task
constexpr int64_t TOGETHER = 16;  // heads that a token's factors are loaded for
constexpr int64_t GRAIN = 32768;  // elements for which another thread pays

struct Two {
  V a, b;
};

// The W elements from p on, or the first n of them, in order.
template <class T>
inline Two read(const T* p, int64_t n = W) {
  if constexpr (std::is_same_v<T, float>) {
    if (n == W) return {V::loadu(p), V::loadu(p + L)};
    return {V::loadu(p, std::min(n, L)), n > L ? V::loadu(p + L, n - L) : V(0.0f)};
  } else {
    using X = at::vec::Vectorized<T>;
    const auto [a, b] = at::vec::convert_to_float<T>(n == W ? X::loadu(p) : X::loadu(p, n));
    return {a, b};
  }
}

template <class T>
inline void write(T* p, Two v, int64_t n = W) {
  if constexpr (std::is_same_v<T, float>) {
    v.a.store(p, std::min(n, L));
    if (n > L) v.b.store(p + L, n - L);
  } else {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      const auto both = (__m512i)_mm512_cvtne2ps_pbh(v.b, v.a);
      if (n == W) return _mm512_storeu_si512(p, both);
      return _mm512_mask_storeu_epi16(p, (__mmask32)((uint64_t(1) << n) - 1), both);
    }
#endif
    at::vec::convert_from_float<T>(v.a, v.b).store(p, static_cast<int>(n));
  }
}

// Of the W elements from p on, or the first n, the even ones and the odd ones.
template <class T>
inline Two read_apart(const T* p, int64_t n = W) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m512i both = n == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((__mmask32)((uint64_t(1) << n) - 1), p);
    const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)};
  }
#endif
  const Two v = read(p, n);
  const auto [even, odd] = at::vec::deinterleave2<float>(v.a, v.b);
  return {even, odd};
}

template <class T>
inline void write_joined(T* p, Two v, int64_t n = W) {
  const auto [first, second] = at::vec::interleave2<float>(v.a, v.b);
  write(p, {first, second}, n);
}

// One row of a table: n numbers, `step` apart, in float32; as it lies where that will do.
template <class T>
inline const float* row_of(const T* p, int64_t n, int64_t step, float* room) {
  int64_t i = 0;
  if (step == 1) {
    if constexpr (std::is_same_v<T, float>) return p;
    for (; i < n; i += W) {
      const Two v = read(p + i, std::min(n - i, W));
      v.a.store(room + i);
      v.b.store(room + i + L);
    }
    return room;
  }
  if (step == 2)
    for (; i + L < n; i += L) read_apart(p + 2 * i).a.store(room + i);
  for (; i < n; ++i) room[i] = static_cast<float>(p[i * step]);
  return room;
}

// Type: 0 float32, 1 bfloat16, 2 float16.
inline const float* row_of(const void* p, int64_t type, int64_t first, int64_t n, int64_t step, float* room) {
  if (type == 0) return row_of(static_cast<const float*>(p) + first, n, step, room);
  if (type == 1) return row_of(static_cast<const at::BFloat16*>(p) + first, n, step, room);
  return row_of(static_cast<const at::Half*>(p) + first, n, step, room);
}

// What multiplies the first and the second component of each pair.
struct Pair {
  const float *a, *b;
};

inline Pair components(const float* row, int64_t half, bool wide, bool apart, float* room) {
  if (!wide) return {row, row};
  if (apart) return {row, row + half};
  int64_t i = 0;
  for (; i + L <= half; i += L) {
    const Two v = read_apart(row + 2 * i);
    v.a.store(room + i);
    v.b.store(room + MOST / 2 + i);
  }
  for (; i < half; ++i) {
    room[i] = row[2 * i];
    room[MOST / 2 + i] = row[2 * i + 1];
  }
  return {room, room + MOST / 2};
}

// A token's factors, for each pair.
struct alignas(64) Factors {
  float aa[MOST / 2 + W], ab[MOST / 2 + W], bb[MOST / 2 + W], ba[MOST / 2 + W];
};

inline void factors(Factors& to, Pair c, Pair s, Pair weight, int64_t half, float sign, bool weighted) {
  const V signs(sign), one(1.0f);
  for (int64_t i = 0; i < half; i += L) {
    const int64_t n = std::min(half - i, L);
    const V sa = V::loadu(s.a + i, n) * signs, sb = V::loadu(s.b + i, n) * signs;
    const V wa = weighted ? V::loadu(weight.a + i, n) : one, wb = weighted ? V::loadu(weight.b + i, n) : one;
    (V::loadu(c.a + i, n) * wa).store(to.aa + i);
    (sa * wb).store(to.ab + i);
    (V::loadu(c.b + i, n) * wb).store(to.bb + i);
    (sb * wa).store(to.ba + i);
  }
}

// The same pairs of `count` heads of a token, n of them from pair i on; by: what scales a head.
template <bool Scaled, bool All>
inline void step(
    Out* out, const In* x, int64_t to, int64_t from, int64_t count, int64_t i, int64_t half, const Factors& f, const float* by) {
  const int64_t n = All ? W : half - i;
  const auto of = [i](const float* row) { return Two{V::loadu(row + i), V::loadu(row + i + L)}; };
  const Two aa = of(f.aa), ab = of(f.ab), bb = of(f.bb), ba = of(f.ba);
  for (int64_t h = 0; h < count; ++h, x += from, out += to) {
    Two a, b;
#if BRAZE_IN_INTERLEAVED
    const Two first = read_apart(x + 2 * i, All ? W : std::min(2 * n, W));
    const Two second = All || n > L ? read_apart(x + 2 * i + W, All ? W : 2 * n - W) : first;
    a = {first.a, second.a};
    b = {first.b, second.b};
#else
    a = read(x + i, n);
    b = read(x + half + i, n);
#endif
    if constexpr (Scaled) {
      const V scale(by[h]);
      a = {a.a * scale, a.b * scale};
      b = {b.a * scale, b.b * scale};
    }
    const Two c = {at::vec::fmsub(a.a, aa.a, b.a * ab.a), at::vec::fmsub(a.b, aa.b, b.b * ab.b)};
    const Two d = {at::vec::fmadd(b.a, bb.a, a.a * ba.a), at::vec::fmadd(b.b, bb.b, a.b * ba.b)};
#if BRAZE_OUT_INTERLEAVED
    write_joined(out + 2 * i, {c.a, d.a}, All ? W : std::min(2 * n, W));
    if (All || n > L) write_joined(out + 2 * i + W, {c.b, d.b}, All ? W : 2 * n - W);
#else
    write(out + i, c, n);
    write(out + half + i, d, n);
#endif
  }
}

template <bool Scaled>
inline void turn(
    Out* out, const In* x, int64_t to, int64_t from, int64_t count, int64_t half, const Factors& f, const float* by) {
  int64_t i = 0;
  for (; i + W <= half; i += W) step<Scaled, true>(out, x, to, from, count, i, half, f, by);
  if (i < half) step<Scaled, false>(out, x, to, from, count, i, half, f, by);
}

// n elements that do not turn.
template <bool Scaled, class To, class From>
inline void pass(To* out, const From* x, int64_t n, float by, const float* weight) {
  if constexpr (!Scaled && std::is_same_v<From, To>) {
    using X = at::vec::Vectorized<From>;
    int64_t i = out == x ? n : 0;
    for (; i + X::size() <= n; i += X::size()) X::loadu(x + i).store(out + i);
    if (i < n) X::loadu(x + i, n - i).store(out + i, n - i);
    return;
  }
  const V scale(by);
  for (int64_t i = 0; i < n; i += W) {
    const int64_t m = std::min(n - i, W);
    Two v = read(x + i, m);
    if constexpr (Scaled) {
      const Two w = read(weight + i, m);
      v = {v.a * scale * w.a, v.b * scale * w.b};
    }
    write(out + i, v, m);
  }
}

inline float mean_of_squares(const In* x, int64_t n) {
  V even(0.0f), odd(0.0f);
  int64_t i = 0;
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<In, at::BFloat16>) {
    for (; i + 2 * W <= n; i += 2 * W) {
      const auto a = (__m512bh)_mm512_loadu_si512(x + i), b = (__m512bh)_mm512_loadu_si512(x + i + W);
      even = _mm512_dpbf16_ps(even, a, a);
      odd = _mm512_dpbf16_ps(odd, b, b);
    }
  }
#endif
  for (; i < n; i += W) {
    const Two v = read(x + i, std::min(n - i, W));
    even = at::vec::fmadd(v.a, v.a, even);
    odd = at::vec::fmadd(v.b, v.b, odd);
  }
  return at::vec::vec_reduce_all<float>([](V& a, V& b) { return a + b; }, even + odd) / static_cast<float>(n);
}

// The heads of q or of k; strides are for (batch, token, head).
struct Heads {
  const In* x;
  Out* out;
  const void* weight;
  int64_t weight_at, count;
  const int64_t *from, *to;
};

// Row t of batch i from element at + i * batch + t * token on, its elements `step` apart.
struct Table {
  const void* base;
  int64_t at, type, batch, token, step;

  const float* row(int64_t i, int64_t t, int64_t n, float* room) const {
    return row_of(base, type, at + i * batch + t * token, n, step, room);
  }
};

// Which row of the result a token of k goes to: its own, `first` further on, or what an index says, of `type` 1 int32, 2 int64.
struct Places {
  const void* index;
  int64_t at, type, batch, token, first, count;

  int64_t of(int64_t i, int64_t t) const {
    if (type == 0) return first + t;
    const int64_t place = at + i * batch + t * token;
    const int64_t n = type == 1 ? static_cast<const int32_t*>(index)[place] : static_cast<const int64_t*>(index)[place];
    return n < 0 ? n + count : n;
  }
};

struct Form {
  int64_t size, start, half, norm, weight_type;  // norm: 0 none, 1 without a weight, 2 with one
  bool wide, inverse;
  float add, eps;
};

// The norm's weights: in order, and those that turn, by component.
struct Weights {
  alignas(64) float all[MOST + W], apart[MOST + W];
  Pair turning;

  Weights(const Heads& x, const Form& f) {
    for (int64_t i = 0; i < f.size; ++i) all[i] = 1.0f;
    if (f.norm == 2) {
      const float* row = row_of(x.weight, f.weight_type, x.weight_at, f.size, 1, apart);
      for (int64_t i = 0; i < f.size; ++i) all[i] = row[i] + f.add;
    }
    turning = components(all + f.start, f.half, true, !BRAZE_IN_INTERLEAVED, apart);
  }
};

// Heads of `count` tokens from `first` on of batch i. to: their rows of the result.
template <bool Normed>
inline void turn_heads(
    const Heads& x, const Form& f, const Weights& weights, const Factors* rows, int64_t i, int64_t first, int64_t count,
    const int64_t* to) {
  const int64_t end = f.start + 2 * f.half, next = x.from[2], place = x.to[2];
  for (int64_t h = 0; h < x.count; h += TOGETHER) {
    const int64_t heads = std::min(TOGETHER, x.count - h);
    const In* in = x.x + i * x.from[0] + first * x.from[1] + h * next;
    float by[BLOCK][TOGETHER] = {};
    if constexpr (Normed) {  // of all tokens before the first is turned: loads would wait for stores 4 KiB apart
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t n = 0; n < heads; ++n) by[m][n] = mean_of_squares(in + m * x.from[1] + n * next, f.size);
        for (int64_t n = 0; n < TOGETHER; n += L) (V(1.0f) / (V::loadu(by[m] + n) + V(f.eps)).sqrt()).store(by[m] + n);
      }
    }
    for (int64_t m = 0; m < count; ++m) {
      const In* from = in + m * x.from[1];
      Out* out = x.out + i * x.to[0] + to[m] * x.to[1] + h * place;
      const auto carry = [&](int64_t begin, int64_t n) {
        for (int64_t j = 0; n > 0 && j < heads; ++j)
          pass<Normed>(out + j * place + begin, from + j * next + begin, n, Normed ? by[m][j] : 1.0f, weights.all + begin);
      };
      carry(0, f.start);
      turn<Normed>(out + f.start, from + f.start, place, next, heads, f.half, rows[m], by[m]);
      carry(end, f.size - end);
    }
  }
}

inline void block(
    const Heads& q, const Heads& k, const Weights& q_weights, const Weights& k_weights, const Table& cos, const Table& sin,
    const Places& places, const Form& f, int64_t i, int64_t first, int64_t count) {
  const int64_t width = f.wide ? 2 * f.half : f.half;
  Factors rows[BLOCK];
  for (const auto* x : {&q, &k}) {
    if (x->count == 0) continue;
    const Weights& weights = x == &q ? q_weights : k_weights;
    int64_t to[BLOCK];
    for (int64_t m = 0; m < count; ++m) {
      const int64_t t = first + m;
      to[m] = x == &q ? t : places.of(i, t);
      if (x == &k && f.norm != 2) continue;  // as for q
      alignas(64) float rooms[4][MOST + W];
      const Pair c = components(cos.row(i, t, width, rooms[0]), f.half, f.wide, !BRAZE_OUT_INTERLEAVED, rooms[2]);
      const Pair s = components(sin.row(i, t, width, rooms[1]), f.half, f.wide, !BRAZE_OUT_INTERLEAVED, rooms[3]);
      factors(rows[m], c, s, weights.turning, f.half, f.inverse ? -1.0f : 1.0f, f.norm == 2);
    }
    if (f.norm) {
      turn_heads<true>(*x, f, weights, rows, i, first, count, to);
    } else {
      turn_heads<false>(*x, f, weights, rows, i, first, count, to);
    }
  }
}

inline void rope(
    const Heads& q, const Heads& k, const Table& cos, const Table& sin, const Places& places, const Form& f, int64_t batch,
    int64_t tokens) {
  if (k.count && places.type)
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t t = 0; t < tokens; ++t)
        if (places.of(i, t) < 0 || places.of(i, t) >= places.count)
          throw std::out_of_range("index out of bounds for the rows of a cache");
  const int64_t blocks = (tokens + BLOCK - 1) / BLOCK, tasks = batch * blocks;
  const Weights q_weights(q, f), k_weights(k, f);
  const auto run = [&](int64_t task) {
    const int64_t first = task % blocks * BLOCK;
    block(q, k, q_weights, k_weights, cos, sin, places, f, task / blocks, first, std::min(BLOCK, tokens - first));
  };
  if (tasks == 1 || batch * tokens * (q.count + k.count) * f.size <= GRAIN) {  // no team for a few tokens
    for (int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
#pragma omp parallel for
  for (int64_t task = 0; task < tasks; ++task) run(task);
}
