// A team: helpers of the thread that calls the kernels, started when first needed. A helper is
// given a job by a word of its own. It takes the job, or the caller, through with its work, takes
// it back: a helper that is late (asleep, or waiting for a core that others keep busy) is not
// waited for. Who waits spins for some microseconds, then sleeps: who yields instead goes to the end
// of the queue.
#include "threads.h"

#ifdef _OPENMP
// Of OpenMP 5.0; a library older than GCC 9's has it not.
extern "C" int omp_pause_resource_all(int kind) __attribute__((weak));
constexpr int kPauseSoft = 1;
#endif

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bert_fast {
namespace {

// Longer than the pauses between a model's loops, shorter than anyone's time slice.
constexpr std::chrono::microseconds kSpin{50};

// Helpers do not survive a fork: a child's teams are those made in its generation.
std::atomic<int> generation{0};
const int registered = pthread_atfork(nullptr, nullptr, forked);

void rest() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done() without sleeping, for some time; false if it is not done then.
template <class Done>
bool wait_awake(Done done, std::chrono::microseconds limit) {
  constexpr int kSpins = 100;
  const auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < kSpins; ++i) {
      if (done()) return true;
      rest();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

#ifdef __linux__
int current_core() { return sched_getcpu(); }
// A thread that slept is often woken on its caller's core, where the two take turns until the
// system's balance finds out, tens of milliseconds later. It moves on by itself.
void leave_core(int core) {
  cpu_set_t allowed;
  if (core < 0 || sched_getaffinity(0, sizeof(allowed), &allowed) || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof(others), &others) == 0) {
    sched_setaffinity(0, sizeof(allowed), &allowed);
  }
}
#else
int current_core() { return -1; }
void leave_core(int) {}
#endif

class Helper {
 public:
  Helper() : thread_([this] { serve(); }) {}
  ~Helper() {
    give(kStop, nullptr, nullptr, -1);
    thread_.join();
  }

  void give(Job job, void* data, int core) { give(kGiven, job, data, core); }

  // True where the helper has the job and goes on with it.
  bool keeps() {
    int given = kGiven;
    return !state_.compare_exchange_strong(given, kIdle, std::memory_order_acq_rel);
  }

  void wait() {
    const auto through = [this] { return state_.load(std::memory_order_acquire) == kIdle; };
    if (wait_awake(through, kSpin)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, through);
  }

 private:
  enum State : int { kIdle, kGiven, kTaken, kStop };

  void give(State state, Job job, void* data, int core) {
    job_ = job;
    data_ = data;
    core_ = core;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      state_.store(state, std::memory_order_release);
    }
    if (asleep_.load()) changed_.notify_all();
  }

  void serve() {
    for (;;) {
      const auto called = [this] {
        const int state = state_.load(std::memory_order_acquire);
        return state == kGiven || state == kStop;
      };
      if (!wait_awake(called, kSpin)) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.store(true);
        changed_.wait(lock, called);
        asleep_.store(false);
      }
      int given = kGiven;
      if (state_.compare_exchange_strong(given, kTaken, std::memory_order_acq_rel)) {
        if (current_core() == core_) leave_core(core_);
        job_(data_);
        {
          std::lock_guard<std::mutex> lock(mutex_);
          state_.store(kIdle, std::memory_order_release);
        }
        changed_.notify_all();
      } else if (given == kStop) {
        return;
      }  // else the caller took it back
    }
  }

  Job job_ = nullptr;
  void* data_ = nullptr;
  int core_ = -1;
  alignas(64) std::atomic<int> state_{kIdle};
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::thread thread_;
};

class Team {
 public:
  ~Team() { forget_if_forked(); }

  void run(int num_threads, Job job, void* data) {
    forget_if_forked();
    while (static_cast<int>(helpers_.size()) < num_threads - 1) {
      helpers_.push_back(std::make_unique<Helper>());
    }
    const int core = current_core();
    for (int i = 0; i < num_threads - 1; ++i) helpers_[i]->give(job, data, core);
    job(data);
    for (int i = 0; i < num_threads - 1; ++i) {
      if (helpers_[i]->keeps()) helpers_[i]->wait();
    }
  }

 private:
  void forget_if_forked() {
    const int now = generation.load();
    if (born_ != now) {
      for (auto& helper : helpers_) helper.release();  // their threads are the parent's
      helpers_.clear();
      born_ = now;
    }
  }

  int born_ = generation.load();
  std::vector<std::unique_ptr<Helper>> helpers_;
};

thread_local bool on_team = false;

void run_on_team(int num_threads, Job job, void* data) {
  static thread_local Team team;
  team.run(num_threads, job, data);
}

}  // namespace

void forked() { generation.fetch_add(1); }

bool is_on_team() { return on_team; }

bool put_on_team(bool on) {
  const bool before = on_team;
  on_team = on;
#ifdef _OPENMP
  // Ends the threads that torch's last op left spinning: they hold the cores that the team needs.
  if (on && !before && generation.load() == 0 && omp_pause_resource_all) {
    omp_pause_resource_all(kPauseSoft);
  }
#endif
  return before;
}

void run_parallel(int num_threads, Job job, void* data) {
#ifdef _OPENMP
  if (!on_team && generation.load() == 0) {
#pragma omp parallel num_threads(num_threads)
    job(data);
    return;
  }
#endif
  run_on_team(num_threads, job, data);
}

}  // namespace bert_fast
