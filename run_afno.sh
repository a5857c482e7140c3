#!/usr/bin/env bash
# bash run_afno.sh [fineweb|shakespeare|test] [flags...]
#
#   fineweb      the production run on one 24 GB GPU: d12 hybrid, 1024 tokens a row, 1.26B tokens of FineWeb
#   shakespeare  a small model on Shakespeare's plays: minutes on a laptop, no GPU needed
#   test         the test suite; flags go to pytest
#
# Without a preset: fineweb where CUDA is, else shakespeare. Flags go to train_gpt2_afno.py and win over the preset's.
# Each step says what it does: packages, data, causality gate, training.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { echo "run_afno.sh: $*"; }
fail() { echo "error: run_afno.sh: $*" >&2; exit 2; }

preset=""
case "${1:-}" in
  fineweb | shakespeare | test) preset=$1; shift ;;
  -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
  "" | -*) ;;
  *) fail "unknown preset $1, choose fineweb, shakespeare or test" ;;
esac

# packages: a python that has torch keeps it and gets the rest; otherwise everything goes into .venv
python=""
for candidate in python python3; do
  if "$candidate" -c "import torch" 2> /dev/null; then python=$candidate; break; fi
done
wanted=("$here/requirements.txt")
if [ "$preset" = test ]; then wanted+=("$here/tests/requirements.txt"); fi
missing() { # the requirements that this python does not import, torch left alone
  "$python" - "${wanted[@]}" << 'EOF'
import importlib.util, re, sys
for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        requirement = line.partition("#")[0].strip()
        name = re.split(r"[^\w-]", requirement)[0]
        if name and name != "torch" and importlib.util.find_spec(name.replace("-", "_")) is None:
            print(requirement)
EOF
}
if [ -n "$python" ]; then
  say "python: $(command -v "$python"), its torch stays as it is"
else
  python="$here/.venv/bin/python"
  if ! "$python" -c "import torch" 2> /dev/null; then
    say "python: no torch found, installing requirements.txt into .venv"
    command -v python3 > /dev/null || fail "python3 is not installed"
    python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" || fail "$(python3 -V) is too old, 3.10 is needed"
    python3 -m venv "$here/.venv" || fail "python3 -m venv failed (on Debian: apt install python3-venv)"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  else
    say "python: .venv"
  fi
fi
packages=()
while IFS= read -r package; do packages+=("$package"); done < <(missing)
if [ ${#packages[@]} -gt 0 ]; then
  say "installing ${packages[*]}"
  # a rented machine's system python may be marked as managed by its distribution; a virtual environment ignores this
  PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
fi

if [ "$preset" = test ]; then
  cd "$here"
  exec "$python" -m pytest -q test_causality.py tests "$@"
fi
if [ -z "$preset" ]; then
  if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    preset=fineweb
    say "preset fineweb, because there is a CUDA device"
  else
    preset=shakespeare
    say "preset shakespeare, because there is no CUDA device"
  fi
fi

case $preset in
  fineweb)
    data=("$here/data/cached_fineweb10B.py" 13)
    launch=("$python" -m torch.distributed.run --standalone --nproc_per_node=1)
    # 32,768 tokens a micro-batch took some 15 GB on an H100; 262,144 a step; 4800 steps are 1.26B tokens, half of the
    # baseline's, and the warmdown is half of them: for the arithmetic see "The fineweb preset" in
    # experiments/benchmark_results.md. Rows of 1024, because the loss to reach was measured on such. 6 heads, of 128, are for
    # d12: another --model wants its --n_head (3, of 256, were better on an H100; how fast they are on a 4090 is not known)
    flags=(--input_bin "$here/data/fineweb10B/fineweb_train_*.bin" --input_val_bin "$here/data/fineweb10B/fineweb_val_*.bin"
      --model d12 --mixer afno --attn_layers 5,10 --sequence_length 1024 --batch_size 32 --grad_accumulation_steps 8
      --optimizer muon --learning_rate 0.0043 --num_iterations 4800 --row_order spread --warmdown_iters 2400
      --final_lr_fraction 0.1 --embedding_norm 1 --logit_softcap 15 --embedding_residual 1 --residual_bf16 1
      --n_head 6 --qk_norm 1 --attn_short_conv 4 --attn_gate 1 --half_rotary 1 --value_residual 1 --swiglu 1 --fp8_head 1
      --fp8_mlp 1 --rest_lr 0.01 --momentum 0.9 --beta1 0.7 --beta2 0.98 --afno_silu 1 --afno_short_conv 1)
    ;;
  shakespeare)
    data=("$here/data/shakespeare.py")
    launch=("$python")
    flags=(--input_bin "$here/data/shakespeare/train_*.bin" --input_val_bin "$here/data/shakespeare/val_*.bin"
      --model d4 --mixer afno --sequence_length 256 --batch_size 8 --grad_accumulation_steps 1 --num_iterations 120
      --val_loss_every 60 --save_every 60)
    ;;
esac
say "data: ${data[*]#"$here"/}"
"$python" "${data[@]}"
say "causality gate"
"$python" "$here/test_causality.py" "${flags[@]}" "$@"
say "training"
exec "${launch[@]}" "$here/train_gpt2_afno.py" "${flags[@]}" "$@"
