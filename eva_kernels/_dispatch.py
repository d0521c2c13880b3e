"""One rule for every op's ``impl`` argument."""


def choose_impl(impl: str, available: tuple[str, ...] = ("reference",)) -> str:
    """Resolve ``impl``; "auto" takes the first available, an explicit name never falls back.

    Raises:
        ValueError: ``impl`` is not "auto" nor one of ``available``.
    """
    if impl == "auto":
        return available[0]
    if impl not in available:
        raise ValueError(f"impl: expected 'auto' or one of {available}, got {impl!r}")
    return impl
