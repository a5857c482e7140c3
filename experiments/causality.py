"""Show where the response to one changed token goes: figures and picture of causality.md.

    python experiments/causality.py    # prints the table, writes runs/causality.png

Every operator at initialisation, T = 1024, 768 channels, white noise in, float64. Token 300 is
replaced by another one; energy is the sum over channels of the squared change of the output. Needs
matplotlib.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from afno import FORMS, AFNO1D, spectral_layer  # noqa: E402
from data.text_to_bin import InputError, Parser, first_line, run_main  # noqa: E402

T, C, CHANGED = 1024, 768, 300


@torch.no_grad()
def main():
    """Print the table and write the picture."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/causality.png",
                        help="(runs/causality.png)")
    output = parser.parse_args().output
    try:
        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError(f"{output}: {first_line(error)}") from None
    torch.manual_seed(0)
    # most forms take the first C channels, the form state all
    noise = [torch.randn(2, 1, T, width, dtype=torch.float64) for width in (C, 2 * C)]
    u, other = torch.cat(noise, -1)
    one = torch.where(torch.arange(T)[:, None] == CHANGED, other, u)
    half = torch.where(torch.arange(T)[:, None] < T // 2, u, other)

    def padded(operator):
        """Return the paper's layer on the sequence and as many zeros, cut back to T."""
        layer = lambda x: spectral_layer(x, operator.mlp, operator.router, 1.0, 2 * T)
        return lambda x: layer(x[..., :C])[:, :T]

    operators = {}
    for form in ("reference", *FORMS[:-1]):
        torch.manual_seed(1)
        mixer = AFNO1D(C, form=form).double()
        operators[form] = lambda x, mixer=mixer: mixer.operator(x[..., : mixer.c_in.out_features])
        if form == "reference":
            operators["reference, zero-padded to 2T"] = padded(mixer.operator)

    print(f"torch {torch.__version__}, T = {T}, C = {C}; token {CHANGED} changed: "
          "share of the energy of the response\n"
          "| operator | before it | at it | after it | "
          "change of the first half when the second is swapped |\n|---|---|---|---|---|")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, sharey=True)
    for axis, (name, operator) in zip(axes.flat, operators.items()):
        y = operator(u)
        energy = (operator(one) - y).square().sum(-1)[0]
        before, at, after = energy[:CHANGED].sum(), energy[CHANGED], energy[CHANGED + 1 :].sum()
        total = energy.sum()
        swapped = (operator(half) - y)[:, : T // 2].norm() / y[:, : T // 2].norm()
        shares = (before / total, at / total, after / total, swapped)
        cells = (f"{share:.1%}" if share else "0" for share in shares)  # 0 is an exact zero
        print(f"| {name} | {' | '.join(cells)} |")
        axis.plot((energy / total).clamp(min=1e-9).log10(), linewidth=0.7)
        axis.axvline(CHANGED, color="black", linewidth=0.5, linestyle="--")
        axis.set_title(name, fontsize=10)
    axes[0, 0].set_ylabel("log10 share of energy")
    axes[1, 0].set_ylabel("log10 share of energy")
    for axis in axes[1]:
        axis.set_xlabel("position")
    figure.suptitle(f"Response to a change of token {CHANGED} (dashed); "
                    "shares below 1e-9, zeros too, at -9")
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    print(f"{output}: written")


if __name__ == "__main__":
    run_main(main)
