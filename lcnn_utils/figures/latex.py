"""Tables for LaTeX: a ``booktabs`` tabular of pure ASCII, our symbols among the numbers turned into mathematics."""

from __future__ import annotations

import re
import unicodedata

import pandas as pd

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "η": "eta", "κ": "kappa", "λ": "lambda",
    "μ": "mu", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "varphi", "Δ": "Delta", "Π": "Pi", "Σ": "Sigma",
}  # fmt: skip
SYMBOLS = {character: rf"\{name} " for character, name in GREEK.items()} | {  # as they stand in mathematics
    "‖": r"\|", "∇": r"\nabla ", "ℓ": r"\ell ", "∞": r"\infty ", "∂": r"\partial ", "√": r"\surd ", "′": "'", "″": "''",
    "±": r"\pm ", "×": r"\times ", "·": r"\cdot ", "−": "-", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ",
    "≠": r"\ne ", "→": r"\to ", "∈": r"\in ", "°": r"^{\circ}", "<": "<", ">": ">", "|": "|",
    "✓": r"\surd ", "✗": r"\times ",  # these two without a package
}  # fmt: skip
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True)) | {"ᵀ": r"\top "}
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)) | {"ᵢ": "i", "ⱼ": "j", "ₗ": "l"}
TEXT = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "*": "{*}",  # the last two may follow a \\
    "–": "--", "—": "---", "…": r"\dots{}", "’": "'", "“": "``", "”": "''", "\N{NO-BREAK SPACE}": "~",
    "ä": r'\"a', "ö": r'\"o', "ü": r'\"u', "é": r"\'e",
}  # fmt: skip
_letters, _raised, _lowered = ("".join(table) for table in (GREEK, RAISED, LOWERED))
# a norm or a Greek letter, with its index; exponents; indices; any one character
_PIECE = re.compile(
    rf"(?:‖[^‖]*‖|[{_letters}∇ℓ])(?:_[\w{_letters}])?|[{_raised}]+|[{_lowered}]+|.", re.DOTALL | re.ASCII
)
_MATHEMATICS = re.compile(rf"[{_raised}]+|[{_lowered}]+|.", re.DOTALL)


def tabular(frame: pd.DataFrame, name: str) -> str:
    """A frame as a LaTeX table; ``name`` is for the comment, which says where its provenance is.

    Raises:
        ValueError: a character without a translation.
    """
    rows = [" & ".join(map(cell, row)) + r" \\" for row in frame.astype(str).to_numpy().tolist()]
    lines = [
        rf"% {name}.json says what made this (command: lcnn figures); needs \usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{l{'r' * (frame.shape[1] - 1)}}}",
        r"\toprule",
        " & ".join(cell(str(column)) for column in frame.columns) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text with symbols as LaTeX: ``‖∇²f‖ ≤ 3 %`` → ``$\\|\\nabla ^{2}f\\|$ $\\le$ 3 \\%``.

    Errors as :func:`tabular`.
    """
    signed = re.sub(r"(?<!\w)-(?=\d)", "−", text)  # a minus, not a hyphen
    pieces = (_piece(match[0], text) for match in _PIECE.finditer(signed))
    return re.sub(r"(?<!\\)\$\$", "", "".join(pieces))  # neighbours in one formula


def _piece(piece: str, text: str) -> str:
    if piece in TEXT:
        return TEXT[piece]
    if " " <= piece <= "~" and piece not in SYMBOLS:
        return piece
    return f"${_MATHEMATICS.sub(lambda match: _symbols(match[0], text), piece).rstrip()}$"


def _symbols(piece: str, text: str) -> str:
    if piece[0] in RAISED:
        return f"^{{{''.join(RAISED[character] for character in piece).rstrip()}}}"
    if piece[0] in LOWERED:
        return f"_{{{''.join(LOWERED[character] for character in piece)}}}"
    if piece in SYMBOLS:
        return SYMBOLS[piece]
    if " " <= piece <= "~":
        return piece if piece in "_^" else TEXT.get(piece, piece)
    name = f"U+{ord(piece):04X} {unicodedata.name(piece, 'without a name')}"
    raise ValueError(f"no LaTeX for {piece!r} ({name}) in {text!r}: add it to SYMBOLS in lcnn_utils/latex.py")
