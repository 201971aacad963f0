// Calls the kernel of dk and dv with dq, for head dim 64 and bf16, on one head without masks. Compiled for the
// emulation after the source of the kernel, in which faults are planted (tests/kernels/test_sm90_handover.py).

extern "C" {

int planted;  // the number of the fault

__attribute__((visibility("default"))) int unit_dkdv(uint16_t* const* tensors, float* lse2, float* delta,
                                                     float* dq_sums, int rows_q, int rows_k, int fault) {
  planted = fault;
  const auto tensor = [&](int i) { return fastattn::HeadTensor{tensors[i], 0, 0, 64}; };
  uint32_t counters[2] = {};
  fastattn::AttentionCudaArgs args{};
  args.q = tensor(0), args.k = tensor(1), args.v = tensor(2), args.dout = tensor(3);
  args.dk = tensor(4), args.dv = tensor(5);
  args.batch = args.n_heads = args.n_kv_heads = 1;
  args.seqlen_q = args.rows_q = rows_q, args.seqlen_k = args.rows_k = rows_k;
  args.head_dim = args.head_dim_v = 64;
  args.window_left = args.window_right = -1;
  args.scale = 0.125f, args.dtype = fastattn::DType::kBFloat16;
  args.lse2 = lse2, args.delta = delta, args.dq_sums = dq_sums, args.tile_counters = counters;
  args.stats_batch = args.stats_head = rows_q;
  return fastattn::attention_dkdv_sm90(args, nullptr);
}
}
