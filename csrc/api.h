#pragma once
// The interface between the op wrappers (LibTorch stable ABI) and the kernels (no torch header at all):
// plain structs and raw pointers in, an error code out.
#include <atomic>
#include <cstdint>

namespace fastattn {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Declares one CPU kernel for every instruction set: rows, tiles or chunks [begin, end) on the calling thread.
#define FASTATTN_DECLARE_CPU(name, Args)                             \
  void name##_default(const Args& args, int64_t begin, int64_t end); \
  void name##_avx2(const Args& args, int64_t begin, int64_t end);    \
  void name##_avx512(const Args& args, int64_t begin, int64_t end)

// Dropout: a kept element is multiplied by scale; the halfword of an element is compared with threshold. rng points to
// (seed, offset) on the device of the op; nullptr: no dropout; else threshold > 0.
struct Dropout {
  const int64_t* rng;
  uint32_t threshold;
  float scale;
};

struct DropoutArgs {
  const void* x;         // (rows, cols), rows x_stride apart
  const void* residual;  // of out_dtype, or null
  void* out;             // contiguous
  int64_t rows, cols, x_stride, residual_stride;
  DType x_dtype, out_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(dropout_fwd, DropoutArgs);  // rows

struct NormFwdArgs {
  const void* x;         // (rows, cols), rows x_stride apart
  const void* residual;  // of r_dtype, or null
  const void* weight;    // (cols) of weight_dtype, or null; the CPU kernels take fp32
  const void* bias;      // (cols) of bias_dtype, or null; the CPU kernels take fp32
  const void* x_bias;    // (cols) of x_bias_dtype, or null; the CPU kernels take fp32
  void* y;               // of x_dtype, contiguous
  void* r;               // contiguous, or null: not wanted
  float* mean;           // (rows), null for rms or where not wanted
  float* rstd;           // (rows), null where not wanted
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  bool rms;
  DType x_dtype, r_dtype, weight_dtype, bias_dtype, x_bias_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(norm_fwd, NormFwdArgs);  // rows

constexpr int kNormSums = 3;

struct NormBwdArgs {
  const void* dy;      // of x_dtype, rows dy_stride apart
  const void* dr_out;  // of r_dtype, or null
  const void* r;       // rows r_stride apart
  const void* weight;  // of weight_dtype, or null; the CPU kernels take fp32
  const float* mean;   // null: rms
  const float* rstd;
  void* dx;         // of x_dtype, contiguous
  void* dresidual;  // of r_dtype, contiguous, or null: the same as dx
  void* dweight;    // of weight_dtype, or null
  void* dbias;      // of weight_dtype, or null
  void* dx_bias;    // of weight_dtype, or null
  float* sums;      // (chunks, kNormSums, cols): dweight, dbias and dx_bias of the rows of each chunk
  int64_t rows, cols, dy_stride, dr_out_stride, r_stride, rows_per_chunk, chunks;
  DType x_dtype, r_dtype, weight_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(norm_bwd, NormBwdArgs);          // chunks
FASTATTN_DECLARE_CPU(norm_bwd_columns, NormBwdArgs);  // columns, after all chunks

// CUDA: launch on `stream`, a cudaStream_t of the current device; the result is a cudaError_t.
int dropout_fwd_cuda(const DropoutArgs& args, void* stream);
int norm_fwd_cuda(const NormFwdArgs& args, void* stream);
int norm_bwd_cuda(const NormBwdArgs& args, void* stream);
int64_t norm_bwd_chunks_cuda(const NormBwdArgs& args);  // what args.chunks must be; 0: no sums
const char* cuda_error_string(int error);

// Feed-forward: the passes between the products. Rows of inputs lie a stride apart, outputs are contiguous; a null
// pointer is an input that is absent or an output that nobody wants. Order of the names as in reference.ACTIVATIONS.
enum class Activation : int { kGelu, kGeluTanh, kRelu, kRelu2, kSilu };

struct ActivationArgs {
  const void* preact;
  const void* gate;
  const void* dhidden;
  int64_t preact_stride, gate_stride, dhidden_stride;
  void* hidden;
  void* dpreact;
  void* dgate;
  float* dbias_partial;  // one row of sums per block of rows, on CUDA per chunk, which are added in order
  float* dbias_gate_partial;
  void* dbias;
  void* dbias_gate;
  int64_t rows, cols, chunks;
  Dropout dropout;
  Activation activation;
  DType dtype;
};

constexpr int64_t kActivationBlockRows = 32;

FASTATTN_DECLARE_CPU(activation_fwd, ActivationArgs);    // rows
FASTATTN_DECLARE_CPU(activation_bwd, ActivationArgs);    // blocks of kActivationBlockRows rows
FASTATTN_DECLARE_CPU(activation_dbias, ActivationArgs);  // columns

int activation_fwd_cuda(const ActivationArgs& args, void* stream);
int activation_bwd_cuda(const ActivationArgs& args, void* stream);
int64_t activation_bwd_chunks_cuda(const ActivationArgs& args);  // what args.chunks must be; looks at sizes

// Softmax cross-entropy of rows of logits, which become their gradient where it is wanted.
struct CrossEntropyArgs {
  void* logits;           // (rows, cols), rows logits_stride apart
  const int64_t* target;  // (rows): a column or ignore_index; anything else makes the row NaN
  const float* dloss;     // (rows), or null: ones
  float* loss;            // (rows)
  int64_t rows, cols, logits_stride, ignore_index;
  float label_smoothing, z_loss, softcap;  // softcap 0: none
  bool need_grad;
  DType dtype;
};
FASTATTN_DECLARE_CPU(cross_entropy_fwd, CrossEntropyArgs);  // rows

// c (m, n) = a (m, k) · b (k, n) in fp32, plus bias or plus c. Strides count elements; of the two strides of a one is
// 1, of b likewise.
struct GemmArgs {
  const float *a, *b;
  const float* bias;  // (n), or null
  float* c;           // rows c_row apart
  int64_t m, n, k;
  int64_t a_row, a_col, b_row, b_col, c_row;
  bool add;  // to c
  // kFewRows reads b where it lies; it needs b_row == 1 and does not add
  enum class Way { kBlocked, kFewRows } way;
  int64_t rows;               // kBlocked: of a task
  std::atomic<bool>* failed;  // out of memory
};
constexpr int64_t kGemmPanel = 64;     // kBlocked: columns of a task
constexpr int64_t kGemmGroup = 16;     // kFewRows: columns of a task
FASTATTN_DECLARE_CPU(gemm, GemmArgs);  // tasks

// y (m, n) = x (m, k) · weightᵀ, times scale, plus bias, plus residual: few rows, the weight read as it lies. Rows lie
// a stride apart, in elements; the last stride is 1.
enum class WeightType : int { kFloat32, kBFloat16, kInt8 };

struct GemvArgs {
  const float* x;
  const void* weight;     // (n, k)
  const float* scale;     // (n), or null
  const float* bias;      // (n), or null
  const float* residual;  // (m, n), or null; may be y
  float* y;
  int64_t m, n, k;
  int64_t x_row, weight_row, residual_row, y_row;
  WeightType type;
};
constexpr int64_t kGemvGroup = 16;     // columns of a task
FASTATTN_DECLARE_CPU(gemv, GemvArgs);  // tasks

// Attention. Sizes and strides count elements; the last stride is 1. Packed sequences: batch stride 0, row b of
// cu_seqlens says where sequence b begins.
struct HeadTensor {
  void* data;
  int64_t batch, head, row;
};

struct ScoreTensor {  // broadcast dimensions have stride 0; null: absent
  const void* data;
  int64_t batch, head, row, key;
};

constexpr int64_t kAttentionPieceKeys = 256;  // the CPU backward sums dk and dv for that many keys at a time

struct AttentionArgs {
  HeadTensor q, k, v, out, dout, dq, dk, dv;
  float* lse;         // (batch, head, row): strides lse_batch, lse_head, 1; null in the forward: not wanted
  float* lse_low;     // as lse, what rounding took from it; null: not wanted, in the backward not known
  const float* dlse;  // as lse, or null
  int64_t lse_batch, lse_head;
  ScoreTensor mask, bias;
  DType bias_dtype;
  const int32_t *seqlens_k, *cu_seqlens_q, *cu_seqlens_k;
  const float* alibi_slopes;
  int64_t alibi_batch;
  const float* sink;
  int64_t batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;  // packed: seqlens are the longest
  int64_t window_left, window_right;                                             // -1: unlimited
  bool top_left;
  float softcap, scale;
  Dropout dropout;
  DType dtype;
  // backward
  float* dsink_partial;  // (batch, head), or null
  ScoreTensor dbias;     // strides as if broadcast dimensions had size 1; null: not wanted
  // which tasks make dbias: those of the backward, one per key head and sequence or one for all sequences of a batch,
  // or those of attention_dbias
  enum class DbiasFrom { kSequence, kWholeBatch, kOwnPass } dbias_from;
  bool split;  // pieces of a head's keys are tasks of their own; 16 bits: attention_dq makes dq then
  std::atomic<int32_t>* dq_turns;  // (batch, head, block of queries): how many pieces dq has; fp32 and split only
  std::atomic<int64_t>* next;      // the task to take next; threads take them as they come, results do not depend on it
  std::atomic<bool>* failed;       // out of memory
};

// Rotary embedding of one tensor, or of two with one head_dim and one position per token. Packed sequences are one
// batch.
struct RotaryArgs {
  HeadTensor x[2], out[2];  // out may be x
  int64_t n_heads[2];       // 0: no second tensor
  const void *cos, *sin;    // of table_dtype; row p for position p, table_batch apart from batch entry to batch entry
  int64_t table_rows, table_row, table_batch;
  const void*
      positions;  // int64 if wide_positions, else int32, positions_batch apart; null: offset + index of the token
  int64_t positions_batch, offset;
  int64_t batch, seqlen, head_dim, rotary_dim;
  bool wide_positions, interleaved, conjugate;  // conjugate: sin negated
  DType dtype, table_dtype;
};

constexpr int64_t kRotaryTokens = 16;  // of a piece of the CPU kernel

FASTATTN_DECLARE_CPU(rotary_fwd, RotaryArgs);  // pieces; every batch entry has ceil(seqlen / kRotaryTokens)

int rotary_fwd_cuda(const RotaryArgs& args, void* stream);

#define FASTATTN_DECLARE_ATTENTION(variant)                \
  void attention_fwd_##variant(const AttentionArgs& args); \
  void attention_bwd_##variant(const AttentionArgs& args); \
  void attention_dq_##variant(const AttentionArgs& args);  \
  void attention_dbias_##variant(const AttentionArgs& args)

FASTATTN_DECLARE_ATTENTION(default);
FASTATTN_DECLARE_ATTENTION(avx2);
FASTATTN_DECLARE_ATTENTION(avx512);
FASTATTN_DECLARE_ATTENTION(avx512bf16);  // bf16 only

// Attention on a cache of keys and values. A row of the cache is a page of page_size keys; without block_table each
// sequence has one page.
struct DecodeArgs {
  HeadTensor q, k, v, out;         // k, v: batch is the stride from page to page
  float* lse;                      // (batch, head, row), contiguous
  const int32_t* cache_seqlens;    // valid keys without the seqlen_new that were appended
  const int32_t* block_table;      // (batch, pages), or null
  const int32_t* cache_batch_idx;  // the page of each sequence, or null: its own number
  const int32_t* cache_leftpad;    // the first visible key, or null
  const float* alibi_slopes;       // as in AttentionArgs
  const float* sink;               // (n_heads), or null
  int64_t alibi_batch, seqlen_new, page_size, pages;
  int64_t batch, n_heads, n_kv_heads, seqlen_q, head_dim, head_dim_v;
  int64_t window_left, window_right;  // -1: unlimited
  float softcap, scale;
  DType dtype;
  int64_t splits;              // parts the keys of a sequence are divided into
  float* partial;              // if splits > 1, decode_partial floats a task
  std::atomic<int64_t>* next;  // the task to take next
  std::atomic<int32_t>*
      remaining;              // if splits > 1: splits that are still at work, per group of tasks; the last combines
  std::atomic<bool>* failed;  // out of memory
};

constexpr int64_t kDecodeRows = 64;  // of a task: the queries of the heads that share a key head
constexpr int kDecodeKeys = 128;     // of a tile

// Floats of the unfinished rows of a task: sums as wide as the widest vectors want them, maximum and total of each row.
constexpr int64_t decode_partial(int64_t rows, int64_t head_dim_v) {
  return rows * ((head_dim_v + 31) / 32 * 32 + 2);
}

void attention_decode_default(const DecodeArgs& args);
void attention_decode_avx2(const DecodeArgs& args);
void attention_decode_avx512(const DecodeArgs& args);
void attention_decode_avx512bf16(const DecodeArgs& args);  // bf16 only

// CUDA on Hopper (csrc/cuda/attention_*_sm90.cu); packed: the tensors have batch 1
struct AttentionCudaArgs : AttentionArgs {
  int64_t rows_q, rows_k;  // of the tensors: the sum of the lengths if packed
  float *lse2, *delta;     // workspace of the backward: (batch, head, row), strides stats_batch, stats_head, 1
  int64_t stats_batch, stats_head;
  float* dq_sums;           // workspace: (batch, head, row, head_dim), or nullptr: dq from a kernel of its own
  uint32_t* tile_counters;  // workspace: 1 word for the forward, 2 for the backward
};
int64_t attention_stats_rows_sm90(const AttentionCudaArgs& args);  // what stats_head must be
int attention_fwd_sm90(const AttentionCudaArgs& args, void* stream);
int attention_stats_sm90(const AttentionCudaArgs& args, void* stream);  // fills the workspace, before the next
int attention_dkdv_sm90(const AttentionCudaArgs& args, void* stream);   // with dq_sums adds to them
int attention_dq_sm90(const AttentionCudaArgs& args, void* stream);
int attention_round_sm90(const AttentionCudaArgs& args, void* stream);  // dq from dq_sums

// Neither leftpad, ALiBi, softcap nor sink; pages hold whole blocks of kDecodeKeysSm90. partial: (split, batch, head,
// row, head_dim) if there are several splits, and without the last the maxima, times log2(e), and sums of the weights.
struct DecodeCudaArgs : DecodeArgs {
  int64_t cache_rows;
  HeadTensor k_new, v_new;  // of seqlen_new keys, to be appended
  float *partial_max, *partial_sum;
};
constexpr int kDecodeKeysSm90 = 64;
int64_t attention_decode_splits_sm90(const DecodeCudaArgs& args, int64_t wanted);  // what args.splits must be
int attention_decode_fwd_sm90(const DecodeCudaArgs& args, void* stream);
int attention_decode_append_sm90(const DecodeCudaArgs& args, void* stream);

}  // namespace fastattn
