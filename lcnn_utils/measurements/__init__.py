"""The measurements behind the figures: each function computes a tidy frame. One file per notebook, named after it."""
