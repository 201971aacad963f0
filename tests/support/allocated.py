"""The memory of a step on the CPU, from the records of PyTorch's allocator instead of the process."""

import torch


def allocated_peak(step):
    """The peak of bytes allocated by the CPU allocator during `step`, without the tensors that `step` returns."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        results = step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - sum(t.nbytes for t in results)
