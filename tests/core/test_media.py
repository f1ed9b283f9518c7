"""What pictures, videos and sounds are to the prefix tree."""

from __future__ import annotations

import hashlib

import numpy as np

from phloem.core.media import FIRST, content_ids, real_ids


def test_each_token_of_a_picture_has_thirty_bits_of_the_whole_digest() -> None:
    """Digests that differ in their last byte alone share no token: no part of one names a picture."""
    digest = hashlib.sha256(b"a picture").digest()
    other = digest[:-1] + bytes([digest[-1] ^ 1])
    one, two = content_ids(digest, 5000), content_ids(other, 5000)
    assert ((one >= FIRST) & (one.astype(np.int64) < 2 * FIRST)).all()
    assert not (one == two).any()
    assert len(set(one.tolist())) >= 4990  # of 2^30: that several are the same is unlikely
    high = (one[:, None] >> np.arange(30)) & 1
    assert (np.abs(high.mean(0) - 0.5) < 0.05).all(), "every bit is used"


def test_the_same_picture_is_the_same_tokens_however_many_are_asked_for() -> None:
    digest = hashlib.sha256(b"a picture").digest()
    assert np.array_equal(content_ids(digest, 64)[:10], content_ids(digest, 10))
    mixed = np.concatenate([np.array([3, 4], np.int32), content_ids(digest, 2), np.array([5], np.int32)])
    assert real_ids(mixed, 9).tolist() == [3, 4, 9, 9, 5]
