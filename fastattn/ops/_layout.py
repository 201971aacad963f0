"""The memory layout of results."""


def empty_in_layout(like, last):
    """An empty (batch, heads, seqlen, last) tensor with the stride order of `like`: BSHD in, BSHD out."""
    shape = (*like.shape[:3], last)
    strides = like.stride()[:3]
    order = [0, 1, 2]
    if 0 not in strides:  # an expanded tensor has no stride order to follow
        order.sort(key=lambda dim: -strides[dim])
    inverse = [order.index(dim) for dim in range(3)]
    return like.new_empty([shape[dim] for dim in order] + [last]).permute(*inverse, 3)
