"""Memory of a step on the CPU, counted from the records of PyTorch's allocator and not from the process."""

import torch


def allocated_peak(step):
    """Most bytes that the CPU allocator had handed out at one time during `step`, without the tensors it returns."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        results = step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - sum(t.nbytes for t in results)
