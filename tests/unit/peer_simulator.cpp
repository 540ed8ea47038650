// Runs shard_worker/communicator/peer_all_reduce.cu on a CPU: all ranks, blocks and threads as fibers of one
// thread, in an order drawn from a seed, with memory as weak as the kernel may meet. What a rank stores into
// a peer's memory arrives word by word, in any order, at any later time; what it stores into its own arrives at
// the latest when its kernel ends. Blocks start in order, and only a few are resident.
//
// Compiled by test_peer_all_reduce.py, with KERNEL naming the kernel's file and ELEMENT its type.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

typedef unsigned long long u64;
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };

static int sim_ranks, sim_items;

struct Barrier { unsigned arrived = 0, round = 0; };
struct Block;
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Block* block;
  unsigned thread;
  bool is_done = false;
};
struct Block {
  int rank;
  unsigned index, threads, blocks, running;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<float> exchange;
  char shared[4096];
  std::vector<std::unique_ptr<Fiber>> fibers;
};
struct Store { unsigned* to; unsigned word; bool is_local; };

static ucontext_t scheduler;
static Fiber* current;
static Index threadIdx, blockIdx, blockDim, gridDim;
static std::mt19937_64 draw;
static std::vector<std::vector<Store>> on_the_way;  // by the rank that stored
static std::vector<std::pair<unsigned*, unsigned*>> memory_of;  // by rank: its buffer
static u64 now_ns;

static void yield() { swapcontext(&current->context, &scheduler); }
static bool chance(unsigned one_in) { return draw() % one_in == 0; }
static void wait_for(Barrier& barrier, unsigned count) {
  const unsigned round = barrier.round;
  if (++barrier.arrived == count) { barrier.arrived = 0; barrier.round++; return; }
  while (barrier.round == round) yield();
}
static void __syncthreads() { wait_for(current->block->all, current->block->threads); }
static float __shfl_xor_sync(unsigned, float value, int other) {
  Block& block = *current->block;
  const unsigned thread = current->thread;
  block.exchange[thread] = value;
  wait_for(block.warps[thread / 32], 32);
  const float result = block.exchange[thread ^ other];
  wait_for(block.warps[thread / 32], 32);
  return result;
}
static unsigned atomicAdd(unsigned* at, unsigned more) {
  yield();
  const unsigned old = *at;
  *at += more;
  return old;
}
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static float rsqrtf(float f) { return 1.0f / std::sqrt(f); }
static float from_half(unsigned bits) { _Float16 h; uint16_t b = bits; memcpy(&h, &b, 2); return h; }
static unsigned to_half(float f) { _Float16 h = f; uint16_t b; memcpy(&b, &h, 2); return b; }
static u64 clock_ns() { return now_ns; }

static uint4 load_system(const uint4* from) {
  yield();
  uint4 v;  // words may be of different moments
  const volatile unsigned* words = (const volatile unsigned*)from;
  unsigned* to = (unsigned*)&v;
  for (int i = 0; i < 4; i++) { to[i] = words[i]; if (chance(16)) yield(); }
  return v;
}
static void store_system(uint4* to, uint4 v) {
  const int rank = current->block->rank;
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
  unsigned* at = (unsigned*)to;
  const bool is_local = at >= memory_of[rank].first && at < memory_of[rank].second;
  for (int i = 0; i < 4; i++) on_the_way[rank].push_back({at + i, words[i], is_local});
  if (chance(4)) yield();
}

#define COLROW_SIMULATED
#define RANKS sim_ranks
#define ITEMS sim_items
#define __device__ inline
#define __global__
#define __forceinline__
#define __launch_bounds__(n)
#define SHARED(type, name, count) type* name = (type*)current->block->shared
#include KERNEL

struct Launch {  // as plan_launch says
  const uint4* x;
  uint4 *residual, *weight, *out;
  unsigned count, width;
  float eps;
  int two_shot;
  uint4 *mine, *buffers[8];
  unsigned capacity;
  int rank;
  State* state;
  Mailbox* mailbox;
  u64 timeout_ns;
  unsigned blocks, threads, items;
};

struct Rank {
  std::vector<Launch> launches;
  size_t next_launch = 0;
  unsigned next_block = 0;
  std::vector<std::unique_ptr<Block>> resident;
  bool is_dead = false;
};

static std::vector<Rank> ranks;

static void run_thread() {
  const Rank& rank = ranks[current->block->rank];
  const Launch& a = rank.launches[rank.next_launch];
  uint4* const* b = a.buffers;
  peer_all_reduce(a.x, a.residual, a.weight, a.out, a.count, a.width, a.eps, a.two_shot, a.mine, b[0],
                  b[1], b[2], b[3], b[4], b[5], b[6], b[7], a.capacity, a.rank, a.state, a.mailbox,
                  a.timeout_ns);
  current->is_done = true;
  current->block->running--;
  yield();
}

static void start_block(Rank& rank, int index) {
  const unsigned threads = rank.launches[rank.next_launch].threads;
  auto block = std::make_unique<Block>();
  block->rank = index;
  block->index = rank.next_block++;
  block->threads = block->running = threads;
  block->blocks = rank.launches[rank.next_launch].blocks;
  block->warps.resize(threads / 32);
  block->exchange.resize(threads);
  for (unsigned thread = 0; thread < threads; thread++) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.resize(32 * 1024);
    fiber->block = block.get();
    fiber->thread = thread;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_thread, 0);
    block->fibers.push_back(std::move(fiber));
  }
  rank.resident.push_back(std::move(block));
}

static void resume(Fiber& fiber) {
  current = &fiber;
  const Block& block = *fiber.block;
  threadIdx.x = fiber.thread;
  blockIdx.x = block.index;
  blockDim.x = block.threads;
  gridDim.x = block.blocks;
  swapcontext(&scheduler, &fiber.context);
}

static void deliver(std::vector<Store>& stores, size_t which) {
  *stores[which].to = stores[which].word;
  stores[which] = stores.back();
  stores.pop_back();
}

// A kernel's end: what it stored into its own rank's memory is there.
static void settle(std::vector<Store>& stores) {
  for (size_t i = stores.size(); i-- > 0;)
    if (stores[i].is_local) deliver(stores, i);
}

// One turn of one rank: starts blocks, runs a few threads, ends the kernel when all is done.
static void advance(int index, unsigned most_resident) {
  Rank& rank = ranks[index];
  if (rank.is_dead || rank.next_launch == rank.launches.size()) return;
  const Launch& launch = rank.launches[rank.next_launch];
  sim_items = launch.items;
  while (rank.next_block < launch.blocks && rank.resident.size() < most_resident)
    start_block(rank, index);
  const size_t which = draw() % rank.resident.size();
  Block& block = *rank.resident[which];
  const unsigned first = draw() % launch.threads;
  for (unsigned i = 0; i < launch.threads; i++) {
    Fiber& fiber = *block.fibers[(first + i) % launch.threads];
    if (!fiber.is_done && !chance(3)) resume(fiber);
  }
  if (block.running) return;
  rank.resident.erase(rank.resident.begin() + which);
  if (rank.resident.empty() && rank.next_block == launch.blocks) {
    settle(on_the_way[index]);
    rank.next_launch++;
    rank.next_block = 0;
  }
}

extern "C" {
void reset(int num_ranks, u64 seed) {
  sim_ranks = num_ranks;
  now_ns = 1;
  draw.seed(seed);
  ranks.clear();
  ranks.resize(num_ranks);
  on_the_way.assign(num_ranks, {});
  memory_of.assign(num_ranks, {});
}
void add_launch(const Launch* launch) {
  ranks[launch->rank].launches.push_back(*launch);
  unsigned* first = (unsigned*)launch->mine;
  memory_of[launch->rank] = {first, first + (size_t)3 * sim_ranks * launch->capacity * 4};
}
// Until every rank that lives has made its launches; the number of turns, or -1 after `most_turns`. From
// `death_turn` on `dead` does nothing more (-1: nobody), and the hosts abort at `abort_turn`.
long simulate(unsigned most_resident, long most_turns, int dead, long death_turn, long abort_turn) {
  int favoured = 0;  // ranks drift apart: one is ahead for a while
  for (long turn = 0; turn < most_turns; turn++) {
    now_ns += 1000;
    if (dead >= 0 && turn >= death_turn) ranks[dead].is_dead = true;
    if (turn == abort_turn) for (Rank& rank : ranks) rank.launches[0].mailbox->aborted = 1;
    if (chance(50)) favoured = draw() % sim_ranks;
    advance(chance(3) ? draw() % sim_ranks : favoured, most_resident);
    auto& stores = on_the_way[draw() % sim_ranks];
    for (unsigned some = draw() % 64; some && !stores.empty(); some--) deliver(stores, draw() % stores.size());
    bool is_over = true;
    for (Rank& rank : ranks) is_over = is_over && (rank.is_dead || rank.next_launch == rank.launches.size());
    if (is_over) return turn;
  }
  return -1;
}
}
