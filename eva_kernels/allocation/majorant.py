"""Values that fall, in the place of such that do not."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["concave_slopes"]


def concave_slopes(
    values: ArrayLike,  # (k,) real
) -> NDArray[np.float64]:  # (k,)
    """The slopes of the least concave function that is nowhere below the sums of the first 0, 1, … k values.

    Where components can only be taken in order, a small one before a large one is worth taking for what both have: each
    run of values that does not fall is given its mean (pool adjacent violators, Ayer et al. 1955). Values that fall
    stay as they are, to the bit. By these slopes a greedy choice is the best one, but for the run that it ends in.
    """
    sums: list[float] = []
    counts: list[int] = []
    for value in np.asarray(values, np.float64).tolist():
        total, count = value, 1
        while sums and sums[-1] * count < total * counts[-1]:
            total += sums.pop()
            count += counts.pop()
        sums.append(total)
        counts.append(count)
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    slopes = np.repeat(np.asarray(means, np.float64), np.asarray(counts, np.int64))
    return np.minimum.accumulate(slopes)  # a quotient's rounding may rise
