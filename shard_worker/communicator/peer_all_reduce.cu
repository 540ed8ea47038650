// The sum of a small tensor over the GPUs of one host, by stores into each other's memory: one hop over
// NVLink where NCCL takes several. With `weight` it goes on to the residual stream and its RMSNorm.
//
// The data is its own flag. A buffer is filled with a mark that no rank ever sends, and whoever waits reads
// until none is left. The mark is a word of two negative zeros of 16 bits; what equals it, or half of it, is
// sent as positive zero (as float32 it is the number -4.6e-41). So nothing has to be ordered, and no block
// waits for another block of its own GPU: blocks need not all be resident.
//
// Each rank has a buffer of [3 turns][RANKS senders][capacity] vectors of 16 bytes. Call t uses turn t % 3 and
// empties what call t - 1 used. That is in time: a peer writes there again in its call t + 2, which it begins
// with this rank's data of call t + 1 in hand, and this rank sent those after it had emptied.
//
// One shot: every rank sends all to all and adds everything up. Two shots: a row has an owner, who gets the
// others' terms, adds them up and sends the sum; fewer bytes for more than two ranks, and one more hop.
// Either way terms are added in rank order in float32 and rounded once, so that all ranks hold the same bits.
//
// (Lamport buffers: NCCL's LL protocol and TensorRT-LLM's one-shot kernels know the idea too.)
//
// To be defined: RANKS (2 to 8), ELEMENT (0: bfloat16, 1: float16, 2: float32), ITEMS (vectors a thread).
// Calls may differ in all but RANKS.

#ifndef COLROW_SIMULATED  // tests run this file on a CPU, with these said differently
typedef unsigned long long u64;

__device__ __forceinline__ uint4 load_system(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_system(uint4* to, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};"
               :: "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ u64 clock_ns() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
__device__ __forceinline__ float from_half(unsigned bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)bits));
  return f;
}
__device__ __forceinline__ unsigned to_half(float f) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
#define SHARED(type, name, count) __shared__ type name[count]
#endif

#define BFLOAT16 0
#define FLOAT16 1
#define FLOAT32 2
#define PER_VECTOR (ELEMENT == FLOAT32 ? 4 : 8)

struct State {  // of one rank, in its own memory
  unsigned calls;            // so far
  unsigned blocks_done;      // of this call
  unsigned last_count;       // vectors that the last call had
  unsigned last_width;       // and how many a row
  unsigned last_two_shot;
  unsigned failed;           // a peer did not come: nobody is waited for any more
};

struct Mailbox {  // in the host's memory
  unsigned aborted;          // the host: stop waiting
  unsigned missing[8];       // the device: these did not come
};

#define EMPTY 0x80008000u

__device__ __forceinline__ bool is_empty(unsigned word) {
  if (ELEMENT == FLOAT32) return word == EMPTY;
  return (word & 0xffffu) == 0x8000u || (word >> 16) == 0x8000u;
}
__device__ __forceinline__ unsigned sendable(unsigned word) {
  if (ELEMENT == FLOAT32) return word == EMPTY ? 0u : word;
  if ((word & 0xffffu) == 0x8000u) word &= 0xffff0000u;
  if ((word >> 16) == 0x8000u) word &= 0xffffu;
  return word;
}
__device__ __forceinline__ bool has_empty(uint4 v) {
  return is_empty(v.x) || is_empty(v.y) || is_empty(v.z) || is_empty(v.w);
}
__device__ __forceinline__ uint4 sendable(uint4 v) {
  return make_uint4(sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w));
}
__device__ __forceinline__ uint4 emptiness() { return make_uint4(EMPTY, EMPTY, EMPTY, EMPTY); }

__device__ __forceinline__ unsigned round_bfloat16(float f) {  // to nearest, ties to even
  const unsigned bits = __float_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;  // not a number
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
__device__ __forceinline__ void unpack(uint4 v, float* to) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (ELEMENT == FLOAT32) {
      to[i] = __uint_as_float(words[i]);
    } else if (ELEMENT == FLOAT16) {
      to[2 * i] = from_half(words[i] & 0xffffu);
      to[2 * i + 1] = from_half(words[i] >> 16);
    } else {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}
__device__ __forceinline__ uint4 pack(const float* from) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (ELEMENT == FLOAT32) words[i] = __float_as_uint(from[i]);
    else if (ELEMENT == FLOAT16) words[i] = to_half(from[2 * i]) | (to_half(from[2 * i + 1]) << 16);
    else words[i] = round_bfloat16(from[2 * i]) | (round_bfloat16(from[2 * i + 1]) << 16);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// How long one thread has waited. It looks at clock and mailbox now and then only: they are far.
struct Patience {
  State* state;
  volatile Mailbox* mailbox;
  u64 timeout_ns;
  u64 since_ns;
  unsigned polls;
  bool is_over;

  __device__ __forceinline__ bool ends(int peer) {
    if (is_over) return true;
    if (++polls & 127u) return false;
    const u64 now_ns = clock_ns();
    if (since_ns == 0) since_ns = now_ns;
    const bool is_late = now_ns - since_ns > timeout_ns;
    if (!is_late && !mailbox->aborted) return false;
    if (is_late) mailbox->missing[peer] = 1;
    state->failed = 1;
    return is_over = true;
  }
};

__device__ __forceinline__ uint4 await(const uint4* from, uint4 v, Patience& patience, int peer) {
  while (has_empty(v) && !patience.ends(peer)) v = load_system(from);
  return v;
}

__device__ __forceinline__ float block_sum(float value) {
  SHARED(float, sums, 32);
  for (int other = 16; other; other >>= 1) value += __shfl_xor_sync(0xffffffffu, value, other);
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = value;
  __syncthreads();
  float total = 0.f;
  for (unsigned warp = 0; warp < (blockDim.x + 31) / 32; warp++) total += sums[warp];
  return total;
}

// One block a row of `width` vectors, ITEMS vectors a thread; `count` vectors in all. blockDim.x is a multiple
// of 32. `out` may be `x`. With `weight`: residual += the sum, in place, and out = that, normalised; then
// count is a multiple of width. Else out = the sum.
extern "C" __global__ void __launch_bounds__(1024) peer_all_reduce(
    const uint4* x, uint4* residual, const uint4* weight, uint4* out, unsigned count, unsigned width,
    float eps, int two_shot, uint4* mine, uint4* buffer0, uint4* buffer1, uint4* buffer2, uint4* buffer3,
    uint4* buffer4, uint4* buffer5, uint4* buffer6, uint4* buffer7, unsigned capacity, int rank,
    State* state, Mailbox* mailbox, u64 timeout_ns) {
  uint4* const buffers[8] = {buffer0, buffer1, buffer2, buffer3, buffer4, buffer5, buffer6, buffer7};
  const unsigned call = state->calls;
  const unsigned last_count = state->last_count, last_width = state->last_width;
  const bool last_two_shot = state->last_two_shot;
  Patience patience = {state, mailbox, timeout_ns, 0, 0, state->failed != 0};

  const unsigned row = blockIdx.x;
  const int owner = two_shot ? row % RANKS : rank;
  const size_t turn = (size_t)(call % 3) * RANKS * capacity;

  // Everything that this rank has to say goes out before it waits for anything.
  uint4 own[ITEMS];
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const unsigned column = threadIdx.x + item * blockDim.x, at = row * width + column;
    if (column >= width || at >= count) continue;
    own[item] = sendable(x[at]);
#pragma unroll
    for (int p = 0; p < RANKS; p++)
      if (p != rank && (!two_shot || p == owner))
        store_system(buffers[p] + turn + (size_t)rank * capacity + at, own[item]);
  }

  // What the last call left. Its peers' data were read before this call began.
  uint4* const stale = mine + (size_t)((call + 2) % 3) * RANKS * capacity;
  for (unsigned at = blockIdx.x * blockDim.x + threadIdx.x; at < last_count; at += gridDim.x * blockDim.x) {
    const int last_owner = last_two_shot ? (at / last_width) % RANKS : rank;
#pragma unroll
    for (int p = 0; p < RANKS; p++)
      if (p != rank && (last_owner == rank || p == last_owner))
        store_system(stale + (size_t)p * capacity + at, emptiness());
  }

  float squares = 0.f;
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const unsigned column = threadIdx.x + item * blockDim.x, at = row * width + column;
    if (column >= width || at >= count) continue;
    if (owner == rank) {
      uint4 terms[RANKS];
#pragma unroll
      for (int p = 0; p < RANKS; p++)  // all on their way at once
        terms[p] = p == rank ? own[item] : load_system(mine + turn + (size_t)p * capacity + at);
      float sum[PER_VECTOR] = {}, term[PER_VECTOR];
#pragma unroll
      for (int p = 0; p < RANKS; p++) {
        if (p != rank) terms[p] = await(mine + turn + (size_t)p * capacity + at, terms[p], patience, p);
        unpack(terms[p], term);
#pragma unroll
        for (int i = 0; i < PER_VECTOR; i++) sum[i] = p == 0 ? term[i] : sum[i] + term[i];
      }
      if (weight) {
        unpack(residual[at], term);
#pragma unroll
        for (int i = 0; i < PER_VECTOR; i++) sum[i] += term[i];
      }
      own[item] = sendable(pack(sum));
      if (two_shot)
#pragma unroll
        for (int p = 0; p < RANKS; p++)
          if (p != rank) store_system(buffers[p] + turn + (size_t)rank * capacity + at, own[item]);
    } else {
      const uint4* from = mine + turn + (size_t)owner * capacity + at;
      own[item] = await(from, load_system(from), patience, owner);
    }
    if (!weight) {
      out[at] = own[item];
      continue;
    }
    residual[at] = own[item];
    // Of the rounded sum, as whoever normalises the stored stream would.
    float stored[PER_VECTOR];
    unpack(own[item], stored);
#pragma unroll
    for (int i = 0; i < PER_VECTOR; i++) squares += stored[i] * stored[i];
  }

  if (weight) {
    const float scale = rsqrtf(block_sum(squares) / (width * PER_VECTOR) + eps);
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      const unsigned column = threadIdx.x + item * blockDim.x;
      if (column >= width) continue;
      float stored[PER_VECTOR], gain[PER_VECTOR];
      unpack(own[item], stored);
      unpack(weight[column], gain);
#pragma unroll
      for (int i = 0; i < PER_VECTOR; i++) stored[i] = stored[i] * scale * gain[i];
      out[row * width + column] = pack(stored);
    }
  }

  __syncthreads();  // all threads have read the state
  if (threadIdx.x == 0 && atomicAdd(&state->blocks_done, 1u) == gridDim.x - 1) {
    state->blocks_done = 0;
    state->last_count = count;
    state->last_width = width;
    state->last_two_shot = two_shot;
    state->calls = call + 1;
  }
}
