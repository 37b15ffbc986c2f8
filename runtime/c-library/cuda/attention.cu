// RotaryAttention: qkv [N, 3D] float16 -> y [N, D] float16: queries and keys rotated by the angle of their row's
// position, then softmax(q k' / 8) v within each text and head. No padding is computed, no score is written to
// memory.
//
// Rotated keys and values lie in shared memory, queries, scores and outputs in registers. Scores and outputs are
// float32 sums; rotated queries and keys and the exponentials are rounded to float16, as products take them.
#include "attention.h"

#include <climits>

namespace jinaclip {
namespace {

constexpr int kKeys = 64;  // rows of a key tile
// Longest text of the short kernel with four warps, and with eight. Longer texts, whose keys are loaded by many blocks,
// have them rotated once before.
constexpr int kFourWarpRows = 128, kEightWarpRows = 256;
// A block of the short kernel takes fewer heads until there are so many blocks for each multiprocessor.
constexpr int kBlocksPerMultiprocessor = 4;

// A warp's registers for Tiles * 16 queries of one head: query fragments, outputs and softmax state.
template <int Tiles>
struct Queries {
  uint32_t fragments[Tiles][4][4];
  float outputs[Tiles][8][4];
  RunningSoftmax softmax[Tiles];

  // From Tiles * 16 rows of a tile.
  __device__ void read(const __half* rows) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      softmax[t] = {};
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        outputs[t][i / 4][i % 4] = 0.0f;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        load_matrices<false>(rows + tile_at(16 * t + lane % 16, 2 * k + lane / 16), fragments[t][k]);
      }
    }
  }

  // Attends to the first `valid_keys` of Groups * 16 keys and their values, rows of tiles; with `first` there are no
  // earlier outputs to rescale.
  template <int Groups>
  __device__ void attend(const __half* keys, const __half* values, int valid_keys, bool first) {
    const int lane = threadIdx.x % kWarp;
    float scores[Tiles][2 * Groups][4] = {};
#pragma unroll
    for (int g = 0; g < Groups; ++g) {  // 16 keys
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 columns
        uint32_t words[4];
        load_matrices<false>(keys + tile_at(16 * g + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2), words);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          multiply(scores[t][2 * g], fragments[t][k], words[0], words[1]);
          multiply(scores[t][2 * g + 1], fragments[t][k], words[2], words[3]);
        }
      }
    }
    uint32_t weights[Tiles][Groups][4];
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      if (valid_keys < 16 * Groups) {
        mask_scores(scores[t], valid_keys);
      }
      float scales[2];
      if (softmax[t].update(scores[t], scales) && !first) {
        rescale(outputs[t], scales);
      }
      round_weights(scores[t], weights[t]);
    }
#pragma unroll
    for (int k = 0; k < Groups; ++k) {  // 16 keys
#pragma unroll
      for (int g = 0; g < 4; ++g) {  // 16 columns
        uint32_t words[4];
        load_matrices<true>(values + tile_at(16 * k + lane % 16, 2 * g + lane / 16), words);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          multiply(outputs[t][2 * g], weights[t][k], words[0], words[1]);
          multiply(outputs[t][2 * g + 1], weights[t][k], words[2], words[3]);
        }
      }
    }
  }

  // The same for up to 64 keys, in as few groups as hold them.
  __device__ void attend_last(const __half* keys, const __half* values, int valid_keys, bool first) {
    if (valid_keys > 48) {
      attend<4>(keys, values, valid_keys, first);
    } else if (valid_keys > 32) {
      attend<3>(keys, values, valid_keys, first);
    } else if (valid_keys > 16) {
      attend<2>(keys, values, valid_keys, first);
    } else {
      attend<1>(keys, values, valid_keys, first);
    }
  }
};

// Short texts. A block has one head of a text, or several heads of a text that is short enough: all their queries, keys
// and values lie in shared memory at once, Warps * 32 rows of each, a head's rows rounded up to 16. Queries and keys
// are rotated there; then each warp takes 16 queries of a head at a time.
template <int Warps, bool Interleaved>
__global__ void __launch_bounds__(Warps* kWarp, 16 / Warps)
    short_attention_kernel(AttentionArguments a, int most_heads) {
  begin_kernel();
  constexpr int kThreads = Warps * kWarp, kRows = Warps * 32;
  TextTile tile;
  if (!find_text(a, blockIdx.x, tile)) {
    return;
  }
  const int warp = threadIdx.x / kWarp;
  const int steps = (tile.length + 15) / 16, rows_of_head = 16 * steps;
  const int fitting = kRows / rows_of_head, heads = fitting < most_heads ? fitting : most_heads;  // of the block
  const int first_head = blockIdx.y * heads;
  const int own_heads = a.heads - first_head < heads ? a.heads - first_head : heads;
  if (own_heads <= 0) {
    return;
  }
  __half* queries = static_cast<__half*>(dynamic_shared_memory());
  __half* keys = queries + kRows * kTileColumns;
  __half* values = keys + kRows * kTileColumns;
  const int columns = a.heads * kHeadColumns, stride = 3 * columns;
  const __half* text = a.qkv + int64_t{1} * tile.begin * stride + first_head * kHeadColumns;
  const unsigned reciprocal = 65536 / rows_of_head + 1;  // row * reciprocal >> 16 is row / rows_of_head for rows < 256
  const int rows = own_heads * rows_of_head, pairs = own_heads * steps;
  for (int row = threadIdx.x / 8; row < rows; row += kThreads / 8) {
    const int head = row * reciprocal >> 16, in_text = row - head * rows_of_head, chunk = threadIdx.x % 8;
    const bool inside = in_text < tile.length;
    const __half* from = text + (int64_t{1} * (inside ? in_text : 0) * stride + head * kHeadColumns + 8 * chunk);
    const int at = tile_at(row, chunk);
    copy_16_bytes(queries + at, from, inside);
    copy_16_bytes(keys + at, from + columns, inside);
    copy_16_bytes(values + at, from + 2 * columns, inside);
  }
  commit_copies();
  Angles angles;
  int angles_of = -1;
  const auto read_angles = [&](int row) {
    const int in_text = row - (row * reciprocal >> 16) * rows_of_head;
    if (in_text != angles_of) {
      angles.read(a, position_of(a, tile, in_text < tile.length ? in_text : 0), threadIdx.x % 4);
      angles_of = in_text;
    }
  };
  read_angles(threadIdx.x / 4);
  wait_for_copies<0>();
  __syncthreads();
  for (int row = threadIdx.x / 4; row < rows; row += kThreads / 4) {
    read_angles(row);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      __half* tiles = part == 0 ? keys : queries;
      uint4 chunks[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        chunks[j] = *reinterpret_cast<uint4*>(tiles + tile_at(row, chunk_of<Interleaved>(threadIdx.x % 4, j)));
      }
      rotate_chunks<Interleaved>(angles, chunks);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        *reinterpret_cast<uint4*>(tiles + tile_at(row, chunk_of<Interleaved>(threadIdx.x % 4, j))) = chunks[j];
      }
    }
  }
  __syncthreads();
  for (int pair = warp; pair < pairs; pair += Warps) {
    const int head = pair / steps, row = pair % steps * 16;
    Queries<1> own;
    own.read(queries + pair * 16 * kTileColumns);
    const __half* of_head = keys + head * rows_of_head * kTileColumns;
    int left = tile.length;
    for (; left > kKeys; left -= kKeys, of_head += kKeys * kTileColumns) {
      own.template attend<4>(of_head, of_head + kRows * kTileColumns, kKeys, left == tile.length);
    }
    own.attend_last(of_head, of_head + kRows * kTileColumns, left, left == tile.length);
    store_outputs(a, tile, first_head + head, row, own.softmax[0], own.outputs[0], queries + pair * 16 * kTileColumns);
  }
}

constexpr int kLongTiles = 2;  // of 16 queries, of a warp
constexpr int kLongWarps = 4, kLongThreads = kLongWarps * kWarp;

struct alignas(128) KeyTile {
  __half keys[kKeys * kTileColumns], values[kKeys * kTileColumns];
};

// Starts the copies of rotated keys and of values first to first + 63 of a text's head; rows beyond the text become
// zero.
__device__ inline void copy_tile(const AttentionArguments& a, const TextTile& tile, int head, int first, KeyTile& to) {
  const int64_t columns = int64_t{1} * a.heads * kHeadColumns;
#pragma unroll
  for (int i = 0; i < kKeys / (kLongThreads / 8); ++i) {
    const int row = i * (kLongThreads / 8) + threadIdx.x / 8, chunk = threadIdx.x % 8;
    const bool inside = first + row < tile.length;
    const int64_t at = tile.begin + (inside ? first + row : 0);
    copy_16_bytes(to.keys + tile_at(row, chunk), a.keys + at * columns + head * kHeadColumns + 8 * chunk, inside);
    copy_16_bytes(to.values + tile_at(row, chunk), a.qkv + (3 * at + 2) * columns + head * kHeadColumns + 8 * chunk,
                  inside);
  }
  commit_copies();
}

// Longer texts, with keys that are rotated already: a block computes kLongTiles * 64 queries of a head; a warp has
// kLongTiles * 16 of them. While the products of 64 keys run, the next are copied.
template <bool Interleaved>
__global__ void __launch_bounds__(kLongThreads, 2) long_attention_kernel(AttentionArguments a) {
  begin_kernel();
  __shared__ KeyTile tiles[2];
  TextTile tile;
  if (!find_tile<kLongTiles * kLongWarps * 16>(a, blockIdx.x, tile)) {
    return;
  }
  const int head = blockIdx.y, warp = threadIdx.x / kWarp;
  const int row = tile.first + warp * 16 * kLongTiles;  // of the warp's first query
  copy_tile(a, tile, head, 0, tiles[0]);
  __half* own_rows = tiles[1].keys + warp * 16 * kLongTiles * kTileColumns;  // before and after the second tile is used
  Queries<kLongTiles> queries;
#pragma unroll
  for (int t = 0; t < kLongTiles; ++t) {
    load_queries<Interleaved>(a, tile, head, row + 16 * t, own_rows + t * 16 * kTileColumns);
  }
  __syncwarp();
  queries.read(own_rows);
  int current = 0;
  for (int first = 0; first < tile.length; first += kKeys, current ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    if (first + kKeys < tile.length) {
      copy_tile(a, tile, head, first + kKeys, tiles[current ^ 1]);
    }
    if (row < tile.length) {
      const KeyTile& keys = tiles[current];
      if (first + kKeys <= tile.length) {
        queries.template attend<4>(keys.keys, keys.values, kKeys, first == 0);
      } else {
        queries.attend_last(keys.keys, keys.values, tile.length - first, first == 0);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kLongTiles; ++t) {
    store_outputs(a, tile, head, row + 16 * t, queries.softmax[t], queries.outputs[t],
                  own_rows + t * 16 * kTileColumns);
  }
}

constexpr int kRotatedRows = 4;  // of a block of rotate_keys_kernel
constexpr int kRotateThreads = 256;

// keys [N, D]: those of qkv, rotated.
template <bool Interleaved>
__global__ void __launch_bounds__(kRotateThreads) rotate_keys_kernel(AttentionArguments a, __half* keys) {
  begin_kernel();
  TextTile tile;
  if (!find_tile<kRotatedRows>(a, blockIdx.x, tile)) {
    return;
  }
  const int columns = a.heads * kHeadColumns, parts = columns / 16;  // of a row: two chunks each
  for (int unit = threadIdx.x; unit < kRotatedRows * parts; unit += kRotateThreads) {
    const int row = tile.first + unit / parts, head = unit % parts / 4, part = unit % 4;
    if (row >= tile.length) {
      return;
    }
    const int64_t at = tile.begin + row;
    const __half* from = a.qkv + (3 * at + 1) * columns + head * kHeadColumns;
    __half* to = keys + at * columns + head * kHeadColumns;
    uint4 chunks[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      chunks[j] = *reinterpret_cast<const uint4*>(from + 8 * chunk_of<Interleaved>(part, j));
    }
    Angles angles;
    angles.read(a, position_of(a, tile, row), part);
    rotate_chunks<Interleaved>(angles, chunks);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      *reinterpret_cast<uint4*>(to + 8 * chunk_of<Interleaved>(part, j)) = chunks[j];
    }
  }
}

template <int Warps>
void launch_short(const AttentionArguments& a, bool interleaved, Stream stream) {
  const auto kernel = interleaved ? short_attention_kernel<Warps, true> : short_attention_kernel<Warps, false>;
  int most_heads = Warps;
  while (most_heads > 1 && int64_t{1} * a.texts * a.heads < most_heads * kBlocksPerMultiprocessor * multiprocessors()) {
    most_heads /= 2;
  }
  launch_with_memory(kernel, dim3(static_cast<unsigned>(a.texts), static_cast<unsigned>(a.heads)), dim3(Warps * kWarp),
                     3 * sizeof(__half) * Warps * 32 * kTileColumns + kSharedAlignment, stream, a, most_heads);
}

void launch_long(const AttentionArguments& a, bool interleaved, Stream stream) {
  const auto kernel = interleaved ? long_attention_kernel<true> : long_attention_kernel<false>;
  const int64_t tiles = tile_count<kLongTiles * kLongWarps * 16>(a);
  launch(kernel, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(a.heads)), dim3(kLongThreads), stream, a);
}

void launch_rotate_keys(const AttentionArguments& a, bool interleaved, __half* keys, Stream stream) {
  const auto kernel = interleaved ? rotate_keys_kernel<true> : rotate_keys_kernel<false>;
  launch(kernel, dim3(static_cast<unsigned>(tile_count<kRotatedRows>(a))), dim3(kRotateThreads), stream, a, keys);
}

}  // namespace

int64_t rotated_key_rows(int64_t rows, int64_t longest) { return longest > kEightWarpRows ? rows : 0; }

void rotary_attention(const Half* qkv, const float* cos, const float* sin, const int32_t* positions,
                      const int32_t* offsets, Half* y, Half* keys, int64_t rows, int64_t longest, int texts,
                      int table_rows, int num_heads, bool interleaved, Stream stream) {
  AttentionArguments a = {};
  a.qkv = static_cast<const __half*>(qkv);
  a.keys = static_cast<const __half*>(keys);
  a.cos = cos;
  a.sin = sin;
  a.positions = positions;
  a.offsets = offsets;
  a.y = static_cast<__half*>(y);
  a.rows = rows;
  a.length = longest;
  a.texts = texts;
  a.heads = num_heads;
  a.table_rows = table_rows;
  a.at_most = INT_MAX;
  if (!aligned(qkv) || !aligned_for_load(cos) || !aligned_for_load(sin) || !aligned(y)) {
    throw std::runtime_error("RotaryAttention: memory that does not begin at a multiple of 16 bytes");
  }
  if (offsets != nullptr || longest <= kEightWarpRows) {
    a.at_most = kEightWarpRows;
    const auto launch = longest <= kFourWarpRows ? launch_short<4> : launch_short<8>;
    launch(a, interleaved, stream);
  }
  if (longest > kEightWarpRows) {
    a.more_than = kEightWarpRows;
    a.at_most = INT_MAX;
    launch_rotate_keys(a, interleaved, static_cast<__half*>(keys), stream);
    if (hopper_attention_runs()) {
      hopper_attention(a, interleaved, stream);
    } else {
      launch_long(a, interleaved, stream);
    }
  }
}

}  // namespace jinaclip
