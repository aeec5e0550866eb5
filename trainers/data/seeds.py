"""Seeds: 64 well-mixed bits of integers, the run's only source of randomness."""

from __future__ import annotations

_MASK64 = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """Hash integers to 64 bits (SplitMix64, Steele et al. 2014, chained). It is the run's only source of seeds."""
    state = 0x6F75746C61737400
    for part in parts:
        state = (state ^ (part & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state
