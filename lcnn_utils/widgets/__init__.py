"""Interactive figures behind keyboard-usable sliders. One file per notebook, named after it; ``engine`` draws."""
