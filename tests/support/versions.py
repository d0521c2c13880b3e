"""Tests of what a package has only since some version: where it is older they are skipped, by name."""

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement

LOADS_BITSANDBYTES = "transformers>=4.51"  # on a CPU; earlier ones change what bitsandbytes has frozen


def needs(requirement: str) -> pytest.MarkDecorator:
    """Skip what is marked where ``requirement``, such as ``"transformers>=5"``, is not what is installed."""
    wanted = Requirement(requirement)
    try:
        found = version(wanted.name)
        met = wanted.specifier.contains(found, prereleases=True)
    except PackageNotFoundError:
        found, met = "missing", False
    return pytest.mark.skipif(not met, reason=f"needs {requirement}, which is {found} here")
