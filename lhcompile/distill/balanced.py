"""Balanced truncation of the filter as it stands: zero after its last tap.

A filter of n taps after h_0 is a system whose state is its last n inputs; its Hankel operator is the n × n
matrix H[i, j] = g_{i+j+1}, zero for i + j ≥ n, and the singular vectors of H balance it. The truncated system has

    A_d = Σ^{−1/2} U_dᵀ Z U_d Σ^{1/2},    Z the shift by one with a zero shifted in,

whose poles are those of U_dᵀ Z U_d: a compression of a contraction, so |λ| ≤ 1 always. With its own residues
the frequency response errs by at most 2 Σ_{k>d} σ_k; here residues and direct term are refitted, which can only
lower the l2 error over the taps. The system is asked to die out after the last tap, and spends order on that.

Sources: Moore 1981; Glover 1984; Enns 1984.
"""

from __future__ import annotations

from lhcompile.distill.hankel import Window

__all__ = ["EXTENDED"]

EXTENDED = Window(extended=True)
