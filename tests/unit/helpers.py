"""What several unit tests use."""

import contextlib

import pytest


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Let the kernel refuse to write more than ``size`` bytes into a file, which needs no privileges."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
