"""A pseudo-random permutation of any size, one position at a time, without a list of it.

A Feistel network permutes the numbers of 2h bits, whatever its round function: (L, R) becomes (R, L ^ F(R)), which can
be undone. Here 2h is the fewest bits that hold all of range(n), and a number that comes out at n or beyond is sent
through again until it is below n ("cycle walking"; Black and Rogaway, 2002): on range(n) that is a permutation too. It
takes less than four passes on average, since 2 ** 2h < 4n.

Everything is integer arithmetic and BLAKE2b: the same on every platform and in every version of Python.
"""

from functools import lru_cache
from hashlib import blake2b

_ROUNDS = 8
_SHORTEST_HALF = 3
"""Four rounds of random functions look random if halves are long. With these, no order of a few numbers is visibly more
likely than another; with halves of two bits some are, whatever the number of rounds."""
_MASK = 2**64 - 1


def position(i: int, n: int, key: tuple[int, ...]) -> int:
    """Where number i goes in the permutation of range(n) that belongs to `key`: different i, different positions.

    Takes O(1) memory and a few microseconds. n is at most 2 ** 64.

    Raises:
        ValueError: i is not in range(n), or n is larger.
    """
    if not 0 <= i < n <= 2**64:
        raise ValueError(f"{i} is not in range({n}), or there are more than 2 ** 64")
    half, round_keys = _network(n, key)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for round_key in round_keys:
            # The finaliser of splitmix64: every bit of its input changes every bit of the output half of the time.
            z = (right + round_key) & _MASK
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
            left, right = right, left ^ ((z ^ (z >> 31)) & low)
        i = left << half | right
        if i < n:
            return i


@lru_cache(maxsize=1024)
def _network(n: int, key: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Bits h of a half, and a 64-bit key for each round."""
    half = max(_SHORTEST_HALF, ((n - 1).bit_length() + 1) // 2)
    digest = blake2b(",".join(map(str, (n, *key))).encode(), digest_size=8 * _ROUNDS).digest()
    return half, tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))
