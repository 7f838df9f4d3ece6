"""Buckets beside backward: sums that can be done by hand, and the two ends between which every bucket size lies."""

import pytest

from minillm.plan.network import Link, find_link, predict
from minillm.plan.overlap import one_after_another, overlapped

SLOW = Link(alpha=0.5, bandwidth=10.0)  # two ranks: 1 s to start and 0.1 s a byte


def spans(sendings):
    return [(sending.ready, sending.start, sending.end) for sending in sendings]


def test_two_buckets_by_hand():
    # 20 bytes in 4 s of backward: halves are full at 2 and 4 s, and take 1 + 2/2 · 10/10 = 2 s each
    assert spans(overlapped(4, 20, 10, 2, SLOW)) == [(2, 2, 4), (4, 4, 6)]
    assert spans(one_after_another(4, 20, 10, 2, SLOW)) == [(2, 4, 6), (4, 6, 8)]


def test_a_bucket_waits_for_the_one_before():
    # backward twice as fast: full at 1 and 2 s
    assert spans(overlapped(2, 20, 10, 2, SLOW)) == [(1, 1, 3), (2, 3, 5)]


def test_what_is_left_over_is_a_bucket():
    assert [sending.size for sending in overlapped(1, 25, 10, 2, SLOW)] == [10, 10, 5]
    assert [sending.size for sending in overlapped(1, 25, 100, 2, SLOW)] == [25]


@pytest.mark.parametrize("bucket", [1e6, 25e6, 1e9, 20e9])
def test_bounds(bucket):
    link, backward, size = find_link("infiniband-ndr"), 0.4, 13.5e9
    together, alone = overlapped(backward, size, bucket, 8, link), one_after_another(backward, size, bucket, 8, link)
    whole = predict("ring_all_reduce", size, 8, link)
    # nothing beats the longer of the two, and overlapping never loses; 1e-9 covers the sums' rounding
    assert max(backward, whole) < together[-1].end <= alone[-1].end + 1e-9
    assert alone[-1].end == pytest.approx(backward + whole + 14 * link.alpha * (len(alone) - 1))
    assert together[-1].end > backward and all(one.end <= other.start + 1e-9 for one, other in zip(together, together[1:]))


def test_one_rank_sends_nothing_that_takes_time():
    assert overlapped(1, 100, 10, 1, SLOW)[-1].end == 1


def test_sizes_must_be_there():
    with pytest.raises(ValueError, match="bucket = 0 bytes"):
        overlapped(1, 100, 0, 2, SLOW)
