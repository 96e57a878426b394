"""Keys of stochastic rounding: (seed, layer name) to a 64-bit Philox key."""

import hashlib


def sr_key(seed: int, name: str) -> int:
    """64-bit Philox key of a layer, the same in every process and Python version.

    Args:
        seed: The run's `nvfp4.seed`.
        name: Fully qualified name (FQN) of the layer or expert weight in the unsharded model.

    Returns:
        Integer in [-2**63, 2**63), so that it fits an int64 tensor.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
