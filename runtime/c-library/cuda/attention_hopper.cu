// RotaryAttention's long texts and images on Hopper (compute capability 9.0): its warpgroup products (wgmma).
//
// One block a multiprocessor takes query tiles of 192 rows in turn. The producer warpgroup copies rotated keys and
// values, 96 rows at a time, into eight pipeline stages. Three consumer warpgroups have 64 queries each, with their
// scores and outputs in registers. A stage is full when its copies have arrived, and empty when all consumer warps have
// released it. Consumers issue products in a fixed order, so that one multiplies while others compute exponentials.
// Each issues the scores of the next key tile before the product with the values of the last one.
#include <type_traits>

#include "attention.h"
#include "warpgroup.h"

namespace jinaclip {
namespace {

constexpr int kConsumers = 3;  // warpgroups
constexpr int kQueries = 64 * kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kStages = 8;
constexpr int kCopiesInFlight = 3;  // groups of copies, while the next is started
constexpr int kStageHalves = kHopperKeys * kTileColumns;

struct Shared {
  __half stages[kStages][kStageHalves];
  __half queries[kConsumers][64 * kTileColumns];
  Arrivals full[kStages], empty[kStages], order[kConsumers], queries_written[kConsumers];
};

// Index of a pipeline stage, and the parity of its barriers: it flips when the index returns to 0.
struct StageIndex {
  int index = 0;
  unsigned phase = 0;

  __device__ void next() {
    if (++index == kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// Lane 0's value: the compiler can keep it in a uniform register.
[[maybe_unused]] __device__ inline int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Calls work(tile, head) for this block's share of all tiles and heads; the blocks take them in turn. 32 texts are
// looked up at a time, a lane each.
template <typename Work>
__device__ inline void for_each_tile(const AttentionArguments& a, Work work) {
  const int lane = threadIdx.x % kWarp;
  unsigned number = blockIdx.x;  // of this block's next tile, counted from the first of a text
  for (int first = 0; first < a.texts; first += kWarp) {
    TextTile text = {};
    const bool wanted = first + lane < a.texts && find_text(a, first + lane, text);
    for (unsigned left = __ballot_sync(0xffffffffu, wanted); left != 0; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int length = __shfl_sync(0xffffffffu, text.length, source);
      const unsigned tiles = (length + kQueries - 1) / kQueries;
      for (; number < tiles * a.heads; number += gridDim.x) {
        const int begin = __shfl_sync(0xffffffffu, text.begin, source);
        work(TextTile{begin, length, static_cast<int>(number % tiles) * kQueries}, static_cast<int>(number / tiles));
      }
      number -= tiles * a.heads;
    }
  }
}

[[maybe_unused]] __device__ inline void produce(const AttentionArguments& a, Shared& shared) {
  const int thread = threadIdx.x, columns = a.heads * kHeadColumns;
  const int row_of_thread = thread / 8, chunk = thread % 8;
  const int at = tile_at(row_of_thread, chunk);
  StageIndex free_stage, copied;
  int under_way = 0;
  const auto signal_full = [&] {
    publish_copies();
    __syncwarp();
    if (thread % kWarp == 0) {
      shared.full[copied.index].arrive();
    }
    copied.next();
  };
  const auto copy = [&](const __half* from, int64_t stride, int rows) {
    shared.empty[free_stage.index].wait(free_stage.phase ^ 1);
    __half* to = shared.stages[free_stage.index] + at;
#pragma unroll
    for (int i = 0; i < kHopperKeys / 16; ++i) {
      const int row = row_of_thread + 16 * i;
      copy_16_bytes(to + i * 16 * kTileColumns, from + (row < rows ? row : 0) * stride, row < rows);
    }
    commit_copies();
    free_stage.next();
    if (++under_way > kCopiesInFlight) {
      wait_for_copies<kCopiesInFlight>();
      signal_full();
      --under_way;
    }
  };
  for_each_tile(a, [&](const TextTile& tile, int head) {
    for (int row = tile.first + thread; row < tile.first + kQueries && row < tile.length; row += 128) {
      // The queries, which the consumers load when they come to this tile.
      prefetch(a.qkv + int64_t{3} * (tile.begin + row) * columns + head * kHeadColumns);
    }
    const __half* keys = a.keys + int64_t{1} * tile.begin * columns + head * kHeadColumns + chunk * 8;
    const __half* values = a.qkv + (int64_t{3} * tile.begin + 2) * columns + head * kHeadColumns + chunk * 8;
    copy(keys, columns, tile.length);
    for (int first = 0; first < tile.length; first += kHopperKeys) {
      const int next = first + kHopperKeys;
      if (next < tile.length) {
        copy(keys + int64_t{1} * next * columns, columns, tile.length - next);
      }
      copy(values + int64_t{3} * first * columns, 3 * columns, tile.length - first);
    }
  });
  wait_for_copies<0>();
  for (; under_way > 0; --under_way) {
    signal_full();
  }
}

template <bool Interleaved>
__device__ inline void consume(const AttentionArguments& a, Shared& shared) {
  const int lane = threadIdx.x % kWarp;
  const int warp = uniform(threadIdx.x / kWarp) - 4, group = warp / 4;  // of the consumers
  StageIndex stage;
  unsigned order = group == 0 ? 1 : 0, queries_phase = 0;
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) {
      shared.empty[stage.index].arrive();
    }
    stage.next();
  };
  // A stage is released only after the next one's product has been issued.
  const auto advance = [&] { stage.next(); };
  const auto release_previous = [&] {
    __syncwarp();
    if (lane == 0) {
      shared.empty[stage.index > 0 ? stage.index - 1 : kStages - 1].arrive();
    }
  };
  const auto wait_for_order = [&] {
    shared.order[group].wait(order);
    order ^= 1;
  };
  const auto signal_next_group = [&] {
    if (lane == 0) {
      shared.order[group + 1 < kConsumers ? group + 1 : 0].arrive();
    }
  };
  for_each_tile(a, [&](const TextTile& tile, int head) {
    if (tile.first + 64 * group >= tile.length) {  // no query for this warpgroup
      for (int first = 0; first < tile.length; first += kHopperKeys) {
        if (first > 0) {
          wait_for_order();
          __syncwarp();
          signal_next_group();
        }
        for (int part = 0; part < 2; ++part) {
          shared.full[stage.index].wait(stage.phase);
          release();
        }
      }
      return;
    }
    const int row = tile.first + 16 * warp;
    uint32_t weights[kHopperKeys / 16][4];
    float scores[kHopperKeys / 8][4], outputs[8][4] = {}, scales[2];
    RunningSoftmax softmax;
    // A later product of this warpgroup has finished, so no warp still reads the last query tile.
    const auto own_rows = [&] { return shared.queries[group] + warp % 4 * 16 * kTileColumns; };
    load_queries<Interleaved>(a, tile, head, row, own_rows());
    publish_copies();
    __syncwarp();
    if (lane == 0) {
      shared.queries_written[group].arrive();
    }
    shared.queries_written[group].wait(queries_phase);
    queries_phase ^= 1;
    int left = tile.length;  // keys, from the next tile's first on
    shared.full[stage.index].wait(stage.phase);
    start_scores<kHopperKeys>(scores, shared.queries[group], shared.stages[stage.index]);
    finish_products<0>(scores);
    release();
    if (left < kHopperKeys) {
      mask_scores(scores, left);
    }
    softmax.update(scores, scales);
    round_weights(scores, weights);
    left -= kHopperKeys;
    // The scores of the next Keys keys, and the values of the last.
    const auto step = [&](auto keys) {
      constexpr int Keys = decltype(keys)::value;
      wait_for_order();
      shared.full[stage.index].wait(stage.phase);
      start_scores<Keys>(scores, shared.queries[group], shared.stages[stage.index]);
      advance();
      shared.full[stage.index].wait(stage.phase);
      start_outputs<kHopperKeys>(outputs, weights, shared.stages[stage.index]);
      signal_next_group();
      finish_products<1>(scores);
      release_previous();
      if (left < kHopperKeys) {
        mask_scores(scores, left);
      }
      const bool rescaled = softmax.update(scores, scales);
      finish_products<0>(outputs);
      release();
      if (rescaled) {
        rescale(outputs, scales);
      }
      round_weights(scores, weights);
      left -= kHopperKeys;
    };
    while (left >= kHopperKeys) {
      step(std::integral_constant<int, kHopperKeys>{});
    }
    if (left > kHopperKeys / 2) {
      step(std::integral_constant<int, kHopperKeys>{});
    } else if (left > 0) {
      step(std::integral_constant<int, kHopperKeys / 2>{});
    }
    shared.full[stage.index].wait(stage.phase);
    if (-left >= kHopperKeys / 2) {  // the last tile has no more than its first half
      start_outputs<kHopperKeys / 2>(outputs, weights, shared.stages[stage.index]);
    } else {
      start_outputs<kHopperKeys>(outputs, weights, shared.stages[stage.index]);
    }
    finish_products<0>(outputs);
    release();
    store_outputs(a, tile, head, row, softmax, outputs, own_rows());
  });
}

template <bool Interleaved>
__global__ void __launch_bounds__(kThreads, 1) hopper_attention_kernel(AttentionArguments a) {
#ifdef JINACLIP_WARPGROUPS
  begin_kernel();
  Shared& shared = *static_cast<Shared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      shared.full[stage].expect(4);
      shared.empty[stage].expect(4 * kConsumers);
    }
    for (int group = 0; group < kConsumers; ++group) {
      shared.order[group].expect(4);
      shared.queries_written[group].expect(4);
    }
    publish_barriers();
  }
  __syncthreads();
  if (uniform(threadIdx.x / 128) == 0) {
    fewer_registers<56>();  // 128 * 56 + 384 * 152 = 65,536
    produce(a, shared);
  } else {
    more_registers<152>();
    consume<Interleaved>(a, shared);
  }
#else
  begin_kernel();
  __trap();  // PTX of compute_90 has no wgmma: an error in place of unwritten outputs
#endif
}

}  // namespace

void hopper_attention(const AttentionArguments& arguments, bool interleaved, Stream stream) {
  const auto kernel = interleaved ? hopper_attention_kernel<true> : hopper_attention_kernel<false>;
  const int64_t tiles = tile_count<kQueries>(arguments) * arguments.heads;  // or fewer
  const int64_t blocks = multiprocessors();
  launch_with_memory(kernel, dim3(static_cast<unsigned>(tiles < blocks ? tiles : blocks)), dim3(kThreads),
                     sizeof(Shared) + kSharedAlignment, stream, arguments);
}

}  // namespace jinaclip
