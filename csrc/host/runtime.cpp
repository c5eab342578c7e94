#include "runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bert_fast {
namespace host {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kLanes = 32;
constexpr size_t kMostBytes = 64;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  State state;
  uint3 index;
  std::deque<std::vector<Copy>> copies;  // committed groups; the last is being filled
};

struct Warp {
  // Two rounds in turn: a lane may begin the next before its neighbours have read the last.
  unsigned char slots[2][kLanes][kMostBytes];
  int round = 0, arrived = 0;
  const char* what = nullptr;
};

std::mutex running;
ucontext_t scheduler;
std::vector<std::unique_ptr<unsigned char[]>> stacks;
std::deque<Fiber> fibers;
std::deque<Warp> warps;
Fiber* current;
uint3 block;
dim3 grid_dim;
unsigned char* shared;
size_t shared_size;
const std::function<void()>* kernel;
std::string failure;
uint64_t launches = 0;
std::mt19937_64 random_bits;

void to_scheduler() { swapcontext(&current->context, &scheduler); }

void enter() {
  (*kernel)();
  if (!current->copies.empty() && !(current->copies.size() == 1 && current->copies[0].empty())) {
    fail("ends with an asynchronous copy that it never waited for");
  }
  current->state = State::kDone;
  to_scheduler();
}

std::string this_block() {
  return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
         std::to_string(block.z) + ")";
}

void describe_deadlock() {
  int count[4] = {};
  for (const Fiber& f : fibers) ++count[static_cast<int>(f.state)];
  failure = this_block() + " is stuck: " + std::to_string(count[1]) + " threads at a barrier, " +
            std::to_string(count[2]) + " at a warp's exchange, " + std::to_string(count[3]) +
            " at their end";
}

void land(const Copy& c) {
  c.valid ? std::memcpy(c.to, c.from, c.bytes) : std::memset(c.to, 0, c.bytes);
}

void run_block(int threads) {
  fibers.clear();
  fibers.resize(threads);
  warps.clear();
  warps.resize((threads + kLanes - 1) / kLanes);
  while (stacks.size() < static_cast<size_t>(threads)) {
    stacks.emplace_back(new unsigned char[kStack]);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.state = State::kReady;
    f.index = {static_cast<unsigned>(i), 0, 0};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[i].get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  std::vector<int> candidates;
  for (;;) {
    candidates.clear();
    for (size_t w = 0; w < warps.size(); ++w) {
      for (int i = w * kLanes; i < std::min<int>(threads, (w + 1) * kLanes); ++i) {
        if (fibers[i].state == State::kReady) {
          candidates.push_back(w);
          break;
        }
      }
    }
    if (candidates.empty()) {
      int at_barrier = 0, done = 0;
      for (const Fiber& f : fibers) {
        at_barrier += f.state == State::kAtBarrier;
        done += f.state == State::kDone;
      }
      if (done == threads) return;
      if (at_barrier != threads) return describe_deadlock();
      for (Fiber& f : fibers) f.state = State::kReady;
      continue;
    }
    const int w = candidates[random_bits() % candidates.size()];
    // As far as the warp can go, or rarely to one of its exchanges.
    for (bool moved = true; moved && random_bits() % 16;) {
      moved = false;
      for (int i = w * kLanes; i < std::min<int>(threads, (w + 1) * kLanes); ++i) {
        if (fibers[i].state != State::kReady) continue;
        current = &fibers[i];
        moved = true;
        swapcontext(&scheduler, &current->context);
        if (!failure.empty()) return;
      }
    }
  }
}

}  // namespace

const uint3& thread_index() { return current->index; }
const uint3& block_index() { return block; }
const dim3& grid_size() { return grid_dim; }
unsigned char* shared_memory() { return shared; }

void fail(const char* what) {
  failure = this_block() + ", thread " + std::to_string(current->index.x) + " " + what;
  to_scheduler();
  std::abort();  // a failed block is never resumed
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("accesses memory misaligned");
}

void check_shared(const void* address, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < shared || p + bytes > shared + shared_size) fail("leaves its shared memory");
  check_aligned(address, bytes);
}

void barrier() {
  current->state = State::kAtBarrier;
  to_scheduler();
}

const unsigned char* exchange(const void* mine, size_t bytes, const char* what) {
  const int lane = current->index.x % kLanes;
  Warp& warp = warps[current->index.x / kLanes];
  if (bytes > kMostBytes) fail("exchanges too much");
  if (warp.arrived && std::strcmp(warp.what, what)) fail("and its warp are at different exchanges");
  warp.what = what;
  unsigned char* slots = warp.slots[warp.round][0];
  std::memcpy(slots + lane * bytes, mine, bytes);
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    warp.round ^= 1;
    const size_t first = current->index.x / kLanes * kLanes;
    for (size_t i = first; i < first + kLanes; ++i) fibers[i].state = State::kReady;
  } else {
    current->state = State::kAtExchange;
    to_scheduler();
  }
  return slots;
}

void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  check_shared(to, bytes);
  if (valid) check_aligned(from, bytes);
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.back().push_back({to, from, bytes, valid});
}

void copy_async_commit() {
  auto& groups = current->copies;
  if (groups.empty()) groups.emplace_back();
  if (random_bits() % 2) {
    for (const Copy& c : groups.back()) land(c);
    groups.back().clear();
  }
  groups.emplace_back();
}

void copy_async_wait(int groups_left) {
  auto& groups = current->copies;
  while (groups.size() > static_cast<size_t>(groups_left) + 1) {  // the last is not committed
    for (const Copy& c : groups.front()) land(c);
    groups.pop_front();
  }
}

uint64_t launched() { return launches; }

int capability() {
  const char* wanted = std::getenv("BERT_FAST_HOST_CAPABILITY");
  return wanted ? std::atoi(wanted) : 80;
}

int multiprocessors() {
  const char* wanted = std::getenv("BERT_FAST_HOST_MULTIPROCESSORS");
  return wanted ? std::atoi(wanted) : 108;
}

// As CUDA keeps it: of a launch that it refused, until somebody asks.
static thread_local cudaError_t last_error = cudaSuccess;

void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const std::lock_guard<std::mutex> lock(running);
  const char* seed = std::getenv("BERT_FAST_HOST_SEED");
  random_bits.seed((seed ? std::atoll(seed) : 0) * 1000003 + launches++);
  kernel = &body;
  grid_dim = grid;
  failure.clear();
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const uint3& b : blocks) {
    block = b;
    // Of its own for every block, so that AddressSanitizer knows its bounds.
    shared_size = shared_bytes;
    shared = static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
    std::memset(shared, 0xFF, shared_bytes);
    run_block(threads);
    std::free(shared);
    if (!failure.empty()) throw std::runtime_error(failure);
  }
}

}  // namespace host
}  // namespace bert_fast

// The runtime calls that launchers make.
extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return std::exchange(bert_fast::host::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "another error";
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  using namespace bert_fast::host;
  const int chip = capability();
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor: *value = chip / 10; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors(); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = chip < 80 ? 65536 : 101376; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
}
