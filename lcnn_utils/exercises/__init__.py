"""Instant checks of the notebooks' exercises. One file per notebook, named after it; ``engine`` compares."""
