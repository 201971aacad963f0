"""Greedy and beam search for the likeliest continuations of a batch of token rows.

`next_logits` is called with tokens (rows, n), one token per row more than in the last call, and returns logits (rows,
vocab_size). Its method reorder(rows) is called if row i of the next call continues row rows[i] of the last call.
"""

import torch


def greedy_search(next_logits, tokens, max_new_tokens, stop=()):
    """Add the most likely token in each step.

    Args:
        next_logits: see above.
        tokens: (batch, n) int64, the prompts.
        max_new_tokens: the most tokens to add.
        stop: tokens that end a row; they are not returned.
    Returns: for each row the list of its new tokens.
    """
    results, active = [[] for _ in tokens], list(range(len(tokens)))
    for _ in range(max_new_tokens):
        chosen = next_logits(tokens).argmax(-1)
        keep = [row for row, token in enumerate(chosen.tolist()) if token not in stop]
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        if len(keep) < len(active):
            active = [active[row] for row in keep]
            rows = torch.tensor(keep, dtype=torch.int64, device=tokens.device)
            next_logits.reorder(rows)
            tokens = tokens[rows]
        for row, token in zip(active, tokens[:, -1].tolist(), strict=True):
            results[row].append(token)
        if not active:
            break
    return results


def beam_search(next_logits, tokens, max_new_tokens, *, beams, length_penalty=1.0, stop=()):
    """The best continuation that a beam of `beams` candidates finds for each row; finished rows leave the batch.

    Args:
        next_logits, tokens, max_new_tokens, stop: as for `greedy_search`.
        beams: candidates kept for each row.
        length_penalty: candidates are compared by log-probability / length ** length_penalty, the stop token included.
    Returns: for each row the list of its new tokens.
    """
    device, prompt = tokens.device, tokens.shape[1]
    active = list(range(len(tokens)))
    finished = [[] for _ in tokens]  # of each row: (log-probability / length ** length_penalty, new tokens)
    scores, width = torch.zeros(len(tokens), 1, device=device), 1  # (active rows, width candidates of each)
    for length in range(1, max_new_tokens + 1):
        log_p = next_logits(tokens).float().log_softmax(-1)
        vocab_size = log_p.shape[-1]
        total = (scores.flatten()[:, None] + log_p).view(len(active), width * vocab_size)
        # This many candidates leave `beams` in every row after those that end now are removed.
        best = total.topk(min(total.shape[1], beams * (1 + len(stop))))
        still, parents, added, follow = [], [], [], []
        for place, row in enumerate(active):
            candidates = []
            for score, index in zip(best.values[place].tolist(), best.indices[place].tolist(), strict=True):
                parent, token = divmod(index, vocab_size)
                parent += place * width
                if token in stop:
                    finished[row].append((score / length**length_penalty, tokens[parent, prompt:].tolist()))
                elif len(candidates) < beams:
                    candidates.append((score, parent, token))
            if not candidates:
                continue
            # No candidate can overtake the finished ones, because log-probabilities only fall.
            limit = candidates[0][0] / max_new_tokens**length_penalty
            if len(finished[row]) >= beams and max(score for score, _ in finished[row]) >= limit:
                continue
            still.append(row)
            follow.append([score for score, _, _ in candidates])
            parents += [parent for _, parent, _ in candidates]
            added += [token for _, _, token in candidates]
        active = still
        if not active:
            break
        parents = torch.tensor(parents, device=device)
        next_logits.reorder(parents)
        tokens = torch.cat([tokens[parents], torch.tensor(added, device=device)[:, None]], 1)
        scores = torch.tensor(follow, device=device)
        width = scores.shape[1]
    for place, row in enumerate(active):  # these rows are cut off at max_new_tokens
        for score, numbers in zip(follow[place], tokens[place * width :][:width, prompt:].tolist(), strict=True):
            finished[row].append((score / max_new_tokens**length_penalty, numbers))
    return [max(candidates, key=lambda candidate: candidate[0])[1] for candidates in finished]
