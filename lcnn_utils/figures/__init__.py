"""Figures: each function takes a tidy frame and returns a Figure; it computes nothing and saves nothing.

One file per notebook, named after it; ``style`` holds what they share."""
