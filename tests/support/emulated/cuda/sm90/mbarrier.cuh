#pragma once
// Replaces csrc/cuda/sm90/mbarrier.cuh.
#include "cuda/sm90/shared.cuh"

namespace fastattn::sm90 {

class Barrier {
 public:
  void init(int arrivals) {
    arrivals_ = pending_ = arrivals;
    phase_ = 0;
    bytes_ = 0;
  }
  static void publish() {}

  void arrive() { arrive_expecting(0); }
  void arrive_expecting(int bytes) {
    emulated::check_fenced();
    bytes_ += bytes;
    if (pending_ == 0) {
      emulated::fail("more arrivals at an mbarrier than it was made for");
    }
    --pending_;
    end_phase();
  }
  void wait(int parity) {
    emulated::wait_until([this, parity] { return phase_ != parity; });
  }

  void complete(int bytes) {  // called by the copy engine
    bytes_ -= bytes;
    end_phase();
  }

 private:
  void end_phase() {
    if (pending_ == 0 && bytes_ == 0) {
      pending_ = arrivals_;
      phase_ ^= 1;
    }
  }

  uint16_t arrivals_;
  uint16_t pending_ : 15;
  uint16_t phase_ : 1;
  int32_t bytes_;
};
static_assert(sizeof(Barrier) == 8);

}  // namespace fastattn::sm90
