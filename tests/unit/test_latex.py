"""Tables for LaTeX: pure ASCII, valid, and a symbol nobody foresaw is named."""

import shutil
import subprocess

import pandas as pd
import pytest

from lcnn_utils.figures.latex import LOWERED, RAISED, SYMBOLS, TEXT, cell, tabular
from lcnn_utils.lab import PROJECT


def compiles(tabulars: list[str], folder) -> None:
    """Let pdflatex set them, or skip where it is not installed (Debian, Ubuntu: texlive-latex-recommended)."""
    if shutil.which("pdflatex") is None:
        pytest.skip("there is no pdflatex here")
    if not subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).stdout:
        pytest.skip("LaTeX is here without booktabs")
    head = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
    (folder / "all.tex").write_text(head + "\n\n".join(tabulars) + "\n\\end{document}\n", encoding="ascii")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("‖∇²f‖ ≤ 3 %", r"$\|\nabla ^{2}f\|$ $\le$ 3 \%"),
        ("‖H‖_F", r"$\|H\|_F$"),
        ("λ_β = 0.1", r"$\lambda _\beta$ = 0.1"),
        ("change of ∇ℓ, random η", r"change of $\nabla\ell$, random $\eta$"),
        ("96.0 ± 0.4 (94 – 97)", r"96.0 $\pm$ 0.4 (94 -- 97)"),
        ("s₀, 10⁻³, C₁²", r"s$_{0}$, 10$^{-3}$, C$_{1}^{2}$"),
        ("|uᵀHu|", r"$|$u$^{\top}$Hu$|$"),
        ("a_b & c$β\\", r"a\_b \& c\$$\beta$\textbackslash{}"),
        ("‖a & b‖", r"$\|a \& b\|$"),
        ("[x] * 5", "{[}x] {*} 5"),
        ("-0.5 (-1 – 2), 1e-05, 3-layer", r"$-$0.5 ($-$1 -- 2), 1e-05, 3-layer"),
        ("", ""),
    ],
)
def test_cell(text, latex):
    assert cell(text) == latex


@pytest.mark.parametrize(("character", "name"), [("Ж", "U+0416 CYRILLIC CAPITAL LETTER ZHE"), ("\n", "U+000A")])
def test_an_unknown_character_is_named(character, name):
    with pytest.raises(ValueError, match=r"no LaTeX for .*add it to SYMBOLS in lcnn_utils/latex.py") as error:
        tabular(pd.DataFrame({"net": [f"a {character}"]}), "t")
    assert name in str(error.value)
    with pytest.raises(ValueError, match="no LaTeX for"):
        cell(f"‖{character}‖")


def test_every_symbol_is_valid_latex(tmp_path):
    known = [*SYMBOLS, *RAISED, *LOWERED, *TEXT, "‖H‖_F", "‖∇²f‖₂", "‖a & b % #‖"]
    frame = pd.DataFrame({"alone": known, "after text": [f"a{c}" for c in known], "twice": [f"{c} {c}" for c in known]})
    text = tabular(frame, "t")
    assert text.isascii()
    compiles(
        [r"\scriptsize" + part for part in map(str, (tabular(frame[i : i + 30], "t") for i in range(0, 99, 30)))],
        tmp_path,
    )


def test_tabular():
    lines = tabular(pd.DataFrame({"net": ["A & B", "‖x‖"], "C": [1.5, 2.0], "β": ["–", "5"]}), "it").splitlines()
    assert lines[0].startswith("% it.json says what made this")
    assert "booktabs" in lines[0]
    assert lines[1:] == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"net & C & $\beta$ \\",
        r"\midrule",
        r"A \& B & 1.5 & -- \\",
        r"$\|x\|$ & 2.0 & 5 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_tables_we_made(tmp_path):
    texts = {path.stem: path.read_text("utf-8") for path in sorted((PROJECT / "figures").glob("*.tex"))}
    assert set(texts) == {path.stem for path in (PROJECT / "figures").glob("*.csv")}
    assert [name for name, text in texts.items() if not text.isascii()] == []
    for name, text in texts.items():
        rows = (PROJECT / "figures" / f"{name}.md").read_text("utf-8").splitlines()
        cells = [line.replace(r"\&", "").count("&") for line in text.splitlines() if line.endswith(r"\\")]
        assert cells == [rows[1].count("---") - 1] * (len(rows) - 1), name
    compiles(list(texts.values()), tmp_path)
