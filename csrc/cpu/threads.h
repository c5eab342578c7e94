// Parallel work on the CPU, by OpenMP or by a team of our own.
//
// An op between torch's runs on OpenMP, in the pool that torch uses: those threads spin for
// milliseconds after each of torch's ops, and any other threads would have to share their cores.
// A whole model in one call runs on a team: beside other busy processes a loop that ends by all
// threads waiting for all costs a time slice. In a forked child GNU's OpenMP hangs, so an op there
// runs on a team, too.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace bert_fast {

// The items [0, count), handed out in runs of `grain` to whoever asks next. Nobody waits for a
// thread that has not come yet: the others do its work.
class Work {
 public:
  Work(int64_t count, int64_t grain) : count_(count), grain_(grain) {}

  bool take(int64_t& begin, int64_t& end) {
    begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    end = begin + grain_ < count_ ? begin + grain_ : count_;
    return begin < count_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_, grain_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A job may not throw: others of its threads are still in it.
using Job = void (*)(void* data) noexcept;

// Calls job(data) in the calling thread and in up to num_threads - 1 others; returns when all have
// returned. Each thread that calls this has helpers of its own.
void run_parallel(int num_threads, Job job, void* data);

// Says that the process was forked, to those who were not there.
void forked();

// Whether the calling thread's parallel work runs on a team.
bool is_on_team();

// Says so for what is to come; returns whether it did.
bool put_on_team(bool on);

// While one of these lives, its thread's parallel work runs on a team.
class OnTeam {
 public:
  OnTeam() : before_(put_on_team(true)) {}
  ~OnTeam() { put_on_team(before_); }

 private:
  const bool before_;
};

// Calls body(work) in several threads; each takes what it can get of `count` items.
template <class Body>
void parallel(int num_threads, int64_t count, int64_t grain, const Body& body) {
  struct Call {
    const Body& body;
    Work work;
  } call = {body, {count, grain}};
  if (count <= grain || num_threads <= 1) return body(call.work);
  const int64_t runs = ceil_div(count, grain);
  run_parallel(num_threads < runs ? num_threads : static_cast<int>(runs),
               [](void* data) noexcept {
                 Call& c = *static_cast<Call*>(data);
                 c.body(c.work);
               },
               &call);
}

// Calls body(item) for all that can be got.
template <class Body>
void for_each_of(Work& work, const Body& body) {
  for (int64_t begin, end; work.take(begin, end);) {
    for (int64_t i = begin; i < end; ++i) body(i);
  }
}

// Calls body(item) for each of `count` items, in several threads.
template <class Body>
void parallel_for(int num_threads, int64_t count, int64_t grain, const Body& body) {
  parallel(num_threads, count, grain, [&](Work& work) { for_each_of(work, body); });
}

// Runs of equal items: four a thread, so that one that comes late finds some left for it; or some
// more, where these leave threads less unequal shares. (36 panels in two threads: by runs of five
// one would have 20 of them, by runs of three each has 18.)
inline int64_t grain_for(int64_t count, int threads) {
  constexpr int kTries = 8;
  const auto largest_share = [&](int64_t grain) {
    return grain * ceil_div(ceil_div(count, grain), threads);
  };
  const int64_t most = std::max<int64_t>(1, ceil_div(count, 4 * static_cast<int64_t>(threads)));
  int64_t best = most;
  for (int64_t grain = most; grain > most / 2 && grain > most - kTries; --grain) {
    if (largest_share(grain) < largest_share(best)) best = grain;
  }
  return best;
}

}  // namespace bert_fast
