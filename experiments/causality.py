"""Where the response to one changed token goes: the figures and the picture of causality.md. Needs matplotlib.

    python experiments/causality.py          # prints the table, writes experiments/causality.png

Every operator at initialisation, T = 1024, 768 channels, white noise in, float64. Token 300 is replaced by another one;
energy is the sum over channels of the squared change of the output.
"""
import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from afno import FORMS, AFNO1D, spectral_layer  # noqa: E402

T, C, CHANGED = 1024, 768, 300


@torch.no_grad()
def main():
    torch.manual_seed(0)
    # most forms take the first C channels, the form state all
    u, other = torch.cat([torch.randn(2, 1, T, width, dtype=torch.float64) for width in (C, 2 * C)], -1)
    one = torch.where(torch.arange(T)[:, None] == CHANGED, other, u)
    half = torch.where(torch.arange(T)[:, None] < T // 2, u, other)

    def padded(operator):
        """The paper's layer on the sequence and as many zeros, cut back to T."""
        return lambda x: spectral_layer(x[..., :C], operator.mlp, operator.router, 1.0, 2 * T)[:, :T]

    operators = {}
    for form in ("reference", *FORMS[:-1]):
        torch.manual_seed(1)
        mixer = AFNO1D(C, form=form).double()
        operators[form] = lambda x, mixer=mixer: mixer.operator(x[..., : mixer.sizes[0]])
        if form == "reference":
            operators["reference, zero-padded to 2T"] = padded(mixer.operator)

    print(f"torch {torch.__version__}, T = {T}, C = {C}; token {CHANGED} changed: share of the energy of the response\n"
          "| operator | before it | at it | after it | change of the first half when the second is swapped |\n"
          "|---|---|---|---|---|")
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), sharex=True, sharey=True)
    axes[1, 3].axis("off")
    for axis, (name, operator) in zip(axes.flat, operators.items()):
        y = operator(u)
        energy = (operator(one) - y).square().sum(-1)[0]
        before, at, after = energy[:CHANGED].sum(), energy[CHANGED], energy[CHANGED + 1 :].sum()
        total = energy.sum()
        swapped = (operator(half) - y)[:, : T // 2].norm() / y[:, : T // 2].norm()
        shares = (f"{share:.1%}" if share else "0" for share in (before / total, at / total, after / total, swapped))
        print(f"| {name} | {' | '.join(shares)} |")  # 0 is an exact zero
        axis.plot((energy / total).clamp(min=1e-9).log10(), linewidth=0.7)
        axis.axvline(CHANGED, color="black", linewidth=0.5, linestyle="--")
        axis.set_title(name, fontsize=10)
    axes[0, 0].set_ylabel("log10 share of energy")
    axes[1, 0].set_ylabel("log10 share of energy")
    for axis in axes[1]:
        axis.set_xlabel("position")
    figure.suptitle(f"Response to a change of token {CHANGED} (dashed); shares below 1e-9, zeros too, at -9")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
