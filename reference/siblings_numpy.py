"""What siblings add to a value model, written to be obviously right: loops, one response at a time.

Same contracts as the functions of the same name in `vrpo.functional`, on numpy arrays in fp64. Imports
nothing from `vrpo`; slow on purpose. The parity tests compare the two.
"""

import math

import numpy as np


def _groups(group_ids, valid):
    """Rows of each group that count."""
    names = sorted({int(g) for g in group_ids})
    return {
        name: [i for i in range(len(group_ids)) if int(group_ids[i]) == name and valid[i]] for name in names
    }


def _pooled_variance(x, groups):
    """Squares about each group's mean over degrees of freedom, all groups together."""
    squares, freedom = 0.0, 0
    for rows in groups.values():
        mean = math.fsum(x[i] for i in rows) / max(len(rows), 1)
        squares += math.fsum((x[i] - mean) ** 2 for i in rows)
        freedom += max(len(rows) - 1, 0)
    return squares / max(freedom, 1)


def sibling_correction(residuals, group_ids, *, valid):
    """Mean residual of the others, times how far the group means lie apart beyond what chance explains."""
    groups, out = _groups(group_ids, valid), np.zeros(len(residuals))
    within = _pooled_variance(residuals, groups)
    seen = [rows for rows in groups.values() if rows]
    beyond = [(math.fsum(residuals[i] for i in rows) / len(rows)) ** 2 - within / len(rows) for rows in seen]
    between = max(math.fsum(beyond) / max(len(seen), 1), 0.0)
    for rows in seen:
        for i in rows:
            others = [residuals[j] for j in rows if j != i]
            if others and between > 0:
                n = len(others)
                out[i] = n * between / (n * between + within) * math.fsum(others) / n
    return out


def covered_values(values, returns, logp, input_ids, mask, *, group_ids):
    """Values in which every different way to go on that a sibling took stands with its probability; and their sum."""
    out, covered = np.zeros(np.shape(mask)), np.zeros(np.shape(mask))

    def response(i):
        """Prompt and response as they were read: what comes after the last chosen token is padding."""
        last = max((t for t in range(len(mask[i])) if mask[i][t]), default=-1)
        return tuple(input_ids[i][: last + 2]), tuple(mask[i][: last + 1])

    for i in range(len(mask)):
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            known = {}
            for j in range(len(mask)):
                begins_alike = (
                    group_ids[j] == group_ids[i]
                    and mask[j][t]
                    and all(input_ids[j][: t + 1] == input_ids[i][: t + 1])
                    and all(mask[j][:t] == mask[i][:t])
                )
                if begins_alike:
                    probability = math.exp(
                        math.fsum(logp[j][k] for k in range(t, len(mask[j])) if mask[j][k])
                    )
                    known.setdefault(response(j), []).append((probability, returns[j][t]))
            for found in known.values():
                covered[i][t] += math.fsum(p for p, _ in found) / len(found)
                out[i][t] += math.fsum(p * r for p, r in found) / len(found)
            covered[i][t] = min(covered[i][t], 1.0)
            out[i][t] += (1.0 - covered[i][t]) * values[i][t]
    return out, covered
