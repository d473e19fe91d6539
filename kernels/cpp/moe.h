// out[t] = scale * sum_j wo (act(wi x[t] @ W1[e] + b1[e]) @ W2[e] + b2[e]),  e = ids[t, j]
//
// Rows (token, slot) are listed by expert, and the work is cut by columns: of the first product for each expert by its
// true count of rows, of the second across all experts, so that one thread owns a block of the output and adds experts
// up in order. Hence no atomics, and the result does not depend on the number of threads.
//
// Expects product.h; BRAZE_LAYOUT_*; BRAZE_SEPARATE, whether each expert's weights are tensors of their own, and
// BRAZE_APART, whether so are those of gate and up; `V activation(V g, V u)`.

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

#if BRAZE_LAYOUT_NONE
constexpr int GATES = 1;
#else
constexpr int GATES = 2;
#endif
constexpr int APART = BRAZE_APART ? 2 : 1;  // matrices of an expert's first product
constexpr bool WOVEN = BRAZE_LAYOUT_INTERLEAVED && BRAZE_TRANSPOSED && APART == 1;  // a run of columns holds g, u, g, u ...

// The columns of W1 behind act columns [first, first + count): in one group g, u, g, u ..., or in a group each.
inline Block first_block(const Problem& p, int64_t expert, int64_t first, int64_t count) {
  Block block;
  for (int g = 0; g < 2; ++g)
    block.w[g] = {p.w1.at(expert * APART + (APART == 2 ? g : 0)), p.w1_stride, p.hidden};
  const bool halves = BRAZE_LAYOUT_HALVES;
  if (GATES == 1 || WOVEN) {
    block.groups[0] = {GATES * first, 1, GATES * count};
    block.group_count = 1;
  } else {
    const bool own = APART == 2, step = !own && !halves;
    block.groups[0] = {step ? 2 * first : first, step ? 2 : 1, count};
    block.groups[1] = {own ? first : halves ? p.inner + first : 2 * first + 1, step ? 2 : 1, count};
    block.group_count = 2;
  }
  return block;
}

inline Block second_block(const Problem& p, int64_t expert, int64_t first, int64_t count) {
  return {{{p.w2.at(expert), p.w2_stride, p.inner}}, {{first, 1, count}}, 1};
}

// The biases of a block's columns, those of matrix i; of matrix i + 1 for a second group, where `apart`.
inline void load_bias(const Biases& bias, int64_t i, bool apart, const Block& block, float* out) {
  std::fill(out, out + TILE_COLUMNS, 0.f);
  if (!bias) return;
  for (int g = 0; g < block.group_count; ++g)
    for (int64_t n = 0; n < block.groups[g].count; ++n)
      out[g * GROUP + n] = bias.at(i + (apart ? g : 0), block.groups[g].first + n * block.groups[g].step);
}

// One row of the tile -> act columns, in the dtype and order they are multiplied in.
inline void activate(const float* c, const float* bias, float weight, int64_t count, Operand* out) {
  const V w(weight);
  auto at = [&](int64_t i) { return at::vec::fmadd(V::loadu(c + i), w, V::loadu(bias + i)); };
  auto columns = [&](int64_t j) {
    if constexpr (GATES == 1) return activation(at(j), V(0.f));
    if constexpr (WOVEN) {
      const auto [g, u] = at::vec::deinterleave2(at(2 * j), at(2 * j + L));
      return activation(g, u);
    }
    return activation(at(j), at(GROUP + j));
  };
  if constexpr (BRAZE_SPLIT) {
    for (int64_t j = 0; j < count; j += 2 * L) {
      const V lo = V::set(V(0.f), columns(j), std::min<int64_t>(L, count - j));
      const V hi = count - j > L ? V::set(V(0.f), columns(j + L), std::min<int64_t>(L, count - j - L)) : V(0.f);
      const auto [even, odd] = at::vec::deinterleave2(lo, hi);
      even.store(out + j);
      odd.store(out + j + L);
    }
  } else {
    for (int64_t j = 0; j < count; j += L) store(out + j, columns(j), std::min<int64_t>(L, count - j));
  }
}

// A piece of the work: rows [begin, end) of the list, or of the tokens; columns [first, first + count).
struct Task {
  int64_t expert, begin, end, first, count;
};

constexpr int64_t ROWS_A_TASK = 512;

// Columns a task: as many as `widest`, fewer while there are fewer than four tasks a thread.
inline int64_t columns_per_task(int64_t widest, int64_t least, int64_t columns, int64_t repeats, int threads) {
  int64_t width = widest;
  while (width > least && repeats * ((columns + width - 1) / width) < 4 * threads) width /= 2;
  return width;
}

constexpr int64_t LEAST_COLUMNS = BRAZE_TRANSPOSED || BRAZE_SPLIT ? 2 * L : 8;  // of a task

// Columns of a task that reads weights in place: a run of memory that ends early costs what it takes to start the next,
// so there are no more tasks than it takes to occupy all threads.
inline int64_t columns_per_run(int64_t least, int64_t columns, int64_t repeats, int64_t least_tasks) {
  const int64_t pieces = (least_tasks + repeats - 1) / std::max<int64_t>(repeats, 1);
  return ((columns + pieces - 1) / pieces + least - 1) / least * least;
}

constexpr int64_t FIRST_TASKS = BRAZE_TRANSPOSED ? 2 : 8, SECOND_TASKS = BRAZE_TRANSPOSED ? 1 : 2;  // a thread

inline std::vector<Task> first_tasks(const Problem& p, const Routing& r, int threads) {
  const int64_t experts = r.used.size();
  const int64_t in_place = columns_per_run(LEAST_COLUMNS, p.inner, experts, FIRST_TASKS * threads);
  const int64_t packed = columns_per_task(PANEL_COLUMNS / GATES, LEAST_COLUMNS, p.inner, experts, threads);
  std::vector<Task> tasks;
  for (const int64_t e : r.used) {
    const int64_t width = r.begin[e + 1] - r.begin[e] <= ROWS_IN_PLACE ? in_place : packed;
    for (int64_t begin = r.begin[e]; begin < r.begin[e + 1]; begin += ROWS_A_TASK)
      for (int64_t j = 0; j < p.inner; j += width)
        tasks.push_back({e, begin, std::min(begin + ROWS_A_TASK, r.begin[e + 1]), j, std::min(width, p.inner - j)});
  }
  return tasks;
}

// Tokens are cut too where columns alone do not occupy all threads, or where sums would leave the cache.
inline std::vector<Task> second_tasks(const Problem& p, int64_t most_rows, int threads) {
  constexpr int64_t most = 4096, least = 512;
  const int64_t width = most_rows <= ROWS_IN_PLACE
      ? columns_per_run(LEAST_COLUMNS, p.hidden, 1, SECOND_TASKS * threads)
      : columns_per_task(PANEL_COLUMNS, LEAST_COLUMNS, p.hidden, 1, threads);
  const int64_t blocks = (p.hidden + width - 1) / width;
  int64_t chunk = std::min(most, p.tokens);
  while (chunk > least && blocks * ((p.tokens + chunk - 1) / chunk) < 2 * threads) chunk = (chunk + 1) / 2;
  std::vector<Task> tasks;
  for (int64_t t = 0; t < p.tokens; t += chunk)
    for (int64_t n = 0; n < p.hidden; n += width)
      tasks.push_back({0, t, std::min(t + chunk, p.tokens), n, std::min(width, p.hidden - n)});
  return tasks;
}

// x where rows are multiplied as they are; otherwise a widened copy of it.
template <class T>
inline const Operand* operand_rows(const Problem& p, const T* x, Operand* copy, int64_t* stride) {
  if constexpr (std::is_same_v<Operand, T>) {
    *stride = p.x_stride;
    return x;
  } else {
    *stride = depth(p.hidden);
#pragma omp for
    for (int64_t t = 0; t < p.tokens; ++t) {
      const T* src = x + t * p.x_stride;
      Operand* dst = copy + t * depth(p.hidden);
#if BRAZE_SPLIT
      for (int64_t i = 0; i < p.hidden; i += 2 * L) {
        const __m512i both = load_some(src + i, std::min<int64_t>(2 * L, p.hidden - i));
        part<0>(both).store(dst + i);
        part<1>(both).store(dst + i + L);
      }
#else
      for (int64_t i = 0; i < p.hidden; i += L) {
        const int count = std::min<int64_t>(L, p.hidden - i);
        store(dst + i, count == L ? load_wide(src + i) : load_wide(src + i, count), count);
      }
#endif
    }
    return copy;
  }
}

using Rows = std::vector<const Operand*>;

// Columns of a tile of `rows`; read in place along N, as many as stay in L1.
inline int64_t tile_columns(int64_t rows) {
  if (!BRAZE_TRANSPOSED || rows > ROWS_IN_PLACE) return PANEL_COLUMNS;
  return std::min<int64_t>(TILE_COLUMNS, STRIP_BYTES / sizeof(float) / rows / (2 * L) * (2 * L));
}

// f(first, count) for the columns of a task, `width` at a time.
template <class F>
__attribute__((always_inline)) inline void each_block(const Task& task, int64_t width, F&& f) {
  for (int64_t j = 0; j < task.count; j += width) f(task.first + j, std::min(width, task.count - j));
}

// then: what this thread does next, if it is known.
inline void first_product(
    const Problem& p, const Routing& r, const Task& task, const Task* then, const Operand* x, int64_t x_stride,
    Operand* act, int64_t act_stride, const Workspace& space, Rows& rows) {
  rows.clear();
  for (int64_t s = task.begin; s < task.end; ++s) rows.push_back(x + r.token[s] * x_stride);
  Block next;
  if (then) next = first_block(p, then->expert, then->first, std::min<int64_t>(then->count, PANEL_COLUMNS / GATES));
  each_block(task, tile_columns(rows.size()) / GATES, [&](int64_t column, int64_t columns) {
    const Block block = first_block(p, task.expert, column, columns);
    float bias[TILE_COLUMNS];
    load_bias(p.b1, task.expert * APART, APART == 2, block, bias);
    multiply(block, then ? &next : nullptr, rows.data(), rows.size(), space, [&](int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t s = task.begin + first + i;
        const float weight = p.weight_on_input ? r.weight[s] : 1.f;
        activate(space.tile + i * TILE_STRIDE, bias, weight, columns, act + s * act_stride + column);
      }
    });
  });
}

// sums [tokens of the task][stride], a stride of the task's columns and more.
inline void second_product(
    const Problem& p, const Routing& r, const Task& task, const Task* then, const Operand* act, int64_t act_stride,
    float* sums, int64_t stride, const Workspace& space, Rows& rows) {
  std::fill(sums, sums + (task.end - task.begin) * stride, 0.f);
  for (size_t n = 0; n < r.used.size(); ++n) {
    const int64_t e = r.used[n];
    const auto bound = [&](int64_t token) {
      return std::lower_bound(r.token.begin() + r.begin[e], r.token.begin() + r.begin[e + 1], token) - r.token.begin();
    };
    const int64_t begin = bound(task.begin), end = bound(task.end);
    if (begin == end) continue;
    rows.clear();
    for (int64_t s = begin; s < end; ++s) rows.push_back(act + s * act_stride);
    const Task* after = n + 1 < r.used.size() ? &task : then;
    Block next;
    if (after)
      next = second_block(
          p, r.used[(n + 1) % r.used.size()], after->first, std::min<int64_t>(after->count, PANEL_COLUMNS));
    each_block(task, tile_columns(rows.size()), [&](int64_t column, int64_t count) {
      const Block block = second_block(p, e, column, count);
      float bias[TILE_COLUMNS];
      load_bias(p.b2, e, false, block, bias);
      multiply(block, after ? &next : nullptr, rows.data(), rows.size(), space, [&](int64_t first, int64_t height) {
        for (int64_t i = 0; i < height; ++i) {
          const int64_t s = begin + first + i;
          const V weight(p.weight_on_input ? 1.f : r.weight[s]);
          const float* c = space.tile + i * TILE_STRIDE;
          float* sum = sums + (r.token[s] - task.begin) * stride + column - task.first;
          for (int64_t j = 0; j < count; j += L)
            at::vec::fmadd(V::loadu(c + j) + V::loadu(bias + j), weight, V::loadu(sum + j)).store(sum + j);
        }
      });
    });
  }
  for (int64_t t = task.begin; t < task.end; ++t)
    for (int64_t j = 0; j < task.count; j += L)
      write(
          p.out, t * p.hidden + task.first + j, p.out_dtype,
          V::loadu(sums + (t - task.begin) * stride + j) * V(p.scale), std::min<int64_t>(L, task.count - j));
}

#ifdef _OPENMP
inline size_t thread_number() { return omp_get_thread_num(); }
inline size_t team_size() { return omp_get_num_threads(); }
#else
inline size_t thread_number() { return 0; }
inline size_t team_size() { return 1; }
#endif

// f(task, then) for the tasks of this thread: one of the first, then from the queue whatever is next. Where `early`, it takes
// the next one before it does this one, to know it; otherwise `then` is null, and no thread waits with two in hand.
template <class F>
inline void each_task(std::atomic<size_t>& queue, const std::vector<Task>& tasks, bool early, F&& f) {
  const auto take = [&] { return team_size() + queue++; };
  for (size_t i = thread_number(); i < tasks.size();) {
    const size_t then = early ? take() : tasks.size();
    f(tasks[i], then < tasks.size() ? &tasks[then] : nullptr);
    i = early ? then : take();
  }
}

// Uninitialised memory aligned to a cache line.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const data;
};

inline void moe(const Problem& p, const Routing& r, int threads) {
  int64_t most_rows = 1, most_tokens = 0, most_columns = 0;
  for (const int64_t e : r.used) most_rows = std::max(most_rows, r.begin[e + 1] - r.begin[e]);
  const bool packs = most_rows > ROWS_IN_PLACE;
  const std::vector<Task> first = first_tasks(p, r, threads), second = second_tasks(p, most_rows, threads);
  for (const Task& t : second) {
    most_tokens = std::max(most_tokens, t.end - t.begin);
    most_columns = std::max(most_columns, t.count);
  }
  // Rows that start a multiple of 4 KiB apart would compete for the same lines of the L1 cache.
  const int64_t act_stride = (p.inner + 31) / 32 * 32 + 32;
  const int64_t sum_stride = (most_columns + L - 1) / L * L + L;
  const int64_t panel = (depth(std::max(p.hidden, p.inner)) + UNIT - 1) / UNIT * NR;
  Buffer<Operand> act(r.begin[p.experts] * act_stride);
  Buffer<Operand> copy(std::is_same_v<Operand, Weight> ? 0 : p.tokens * depth(p.hidden));
  std::atomic<size_t> first_queue{0}, second_queue{0};
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> tile(TILE_ROWS * TILE_STRIDE), sums(most_tokens * sum_stride);
    Buffer<uint32_t> panels(packs ? PANELS * panel : 0);
    const Workspace space{tile.data, panels.data};
    Rows rows;
    rows.reserve(most_rows);
    int64_t x_stride;
    const Operand* x = operand_rows(p, p.x, copy.data, &x_stride);
    each_task(first_queue, first, packs, [&](const Task& task, const Task* then) {
      first_product(p, r, task, then, x, x_stride, act.data, act_stride, space, rows);
    });
#pragma omp barrier
    each_task(second_queue, second, packs, [&](const Task& task, const Task* then) {
      second_product(p, r, task, then, act.data, act_stride, sums.data, sum_stride, space, rows);
    });
  }
}

inline void run(
    void* out, const void* x, const void* ids, const void* router, const void* const* w1, const void* const* w2,
    const void* const* b1, const void* const* b2, int64_t out_dtype, int64_t ids_wide, int64_t router_dtype, int64_t b1_dtype, int64_t b2_dtype,
    int64_t tokens, int64_t hidden, int64_t inner, int64_t experts, int64_t top_k, int64_t x_stride,
    int64_t ids_stride0, int64_t ids_stride1, int64_t router_stride0, int64_t router_stride1, int64_t w1_expert,
    int64_t w1_stride, int64_t w2_expert, int64_t w2_stride, int64_t b1_stride0, int64_t b1_stride1,
    int64_t b2_stride0, int64_t b2_stride1, int64_t weight_on_input, float scale) {
  const Problem p{
      tokens, hidden, inner, experts, top_k, static_cast<const Weight*>(x), x_stride,
      {w1, w1_expert}, {w2, w2_expert}, w1_stride, w2_stride,
      {router, router_dtype, router_stride0, router_stride1}, {b1, b1_dtype, b1_stride0, b1_stride1},
      {b2, b2_dtype, b2_stride0, b2_stride1}, weight_on_input != 0, scale, out, out_dtype};
  const Routing r = ids_wide ? route(p, static_cast<const int64_t*>(ids), ids_stride0, ids_stride1)
                             : route(p, static_cast<const int32_t*>(ids), ids_stride0, ids_stride1);
#ifdef _OPENMP
  moe(p, r, omp_get_max_threads());
#else
  moe(p, r, 1);
#endif
}

}  // namespace braze_kernel
