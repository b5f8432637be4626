"""How the queries of a block are cut, which the op and its fake must agree upon; importable without triton."""


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two that is neither below n nor `least`, a matrix unit's smallest side."""
    return max(least, 1 << (n - 1).bit_length())


def cut(side: int, channels: int) -> tuple[int, int]:
    """(tiles, queries of a tile) of a block of side * side queries, for heads of so many channels."""
    count = side * side
    queries = power_of_2(count) if count <= (128 if channels <= 64 else 64) else 64
    return -(-count // queries), queries
