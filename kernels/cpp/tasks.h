// How the work is cut, and who does which piece: by columns of the first product for each expert by its true count of
// rows, of the second across all experts. A task that reads weights in place reads as long a run of memory as can be.

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
