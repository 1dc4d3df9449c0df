"""The order in which the scatter-add kernel adds, in NumPy: the kernel must agree to the bit."""

import numpy as np

BLOCK, FAN = 64, 32


def _sum(rows: np.ndarray, total: np.ndarray) -> np.ndarray:
    for row in rows:
        total = total + row
    return total


def _cut(start: int, end: int, step: int) -> tuple[int, int, int]:
    """End of the head, and whole steps [first, last) of the range."""
    first = -(-start // step)
    return min(first * step, end), first, max(end // step, first)


def sum_by_id(values: np.ndarray, ids: np.ndarray, num_rows: int) -> np.ndarray:
    """float32 sums of rows by id: rows, blocks of rows, blocks of blocks, blocks, rows."""
    order = np.argsort(ids, kind="stable")
    sorted_ids, values = ids[order], values[order].astype(np.float32)
    zero = np.zeros(values.shape[1], np.float32)
    blocks = [_sum(values[b : b + BLOCK], zero) for b in range(0, len(ids) - BLOCK + 1, BLOCK)]
    blocks = np.array(blocks).reshape(-1, len(zero))
    fans = [_sum(blocks[f : f + FAN], zero) for f in range(0, len(blocks) - FAN + 1, FAN)]
    fans = np.array(fans).reshape(-1, len(zero))
    out = np.zeros((num_rows, len(zero)), np.float32)
    for n in range(num_rows):
        start, end = np.searchsorted(sorted_ids, [n, n + 1])
        head, first, last = _cut(start, end, BLOCK)
        block_head, first_fan, last_fan = _cut(first, last, FAN)
        total = _sum(values[start:head], zero)
        total = _sum(blocks[first:block_head], total)
        total = _sum(fans[first_fan:last_fan], total)
        total = _sum(blocks[max(last_fan * FAN, block_head) : last], total)
        out[n] = _sum(values[max(last * BLOCK, head) : end], total)
    return out
