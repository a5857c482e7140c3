#!/usr/bin/env bash
# bash run_afno.sh [fineweb|fineweb-4k|shakespeare|baseline|test] [flags...]
#
#   fineweb      the production run on 24 GB GPUs: the hybrid on 0.5B tokens of FineWeb
#                (fineweb --mixer attn: the control, attention in every layer)
#   fineweb-4k   the same in rows of 4096 tokens
#   shakespeare  a small model on Shakespeare's plays: minutes on a laptop, no GPU needed
#   baseline     NoCap-Test's run: attention and its own recipe on 2.5B tokens of FineWeb
#   test         the test suite; --fast leaves out the slow ones, other flags go to pytest
#
# Without a preset: fineweb where a GPU is, else shakespeare. What a preset is stands in PRESETS in
# train_gpt2_afno.py; flags win over it, and name another folder of runs/. The same command again
# goes on where it stopped, or says that the run is finished. Several GPUs share out each step:
# --gpus N says how many.
# This installs packages; start.py does the rest: facts, data, causality gate, training.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { echo "run_afno.sh: $*"; }
fail() { echo "error: run_afno.sh: $*" >&2; exit 2; }

preset=""
case "${1:-}" in
  fineweb | fineweb-4k | shakespeare | baseline | test) preset=$1; shift ;;
  -h | --help) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
  "" | -*) ;;
  *) fail "unknown preset $1, choose fineweb, fineweb-4k, shakespeare, baseline or test" ;;
esac

# packages: a python that has torch keeps it and gets the rest; otherwise everything goes into .venv
python=""
for candidate in python python3; do
  if "$candidate" -c "import sys, importlib.util as u; sys.exit(u.find_spec('torch') is None)" \
    2> /dev/null; then python=$candidate; break; fi
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
        module = name.replace("-", "_").removeprefix("pytest_")  # of pytest-xdist: xdist
        if name and name != "torch" and importlib.util.find_spec(module) is None:
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
  # a rented machine's system python may be managed by its distribution; a venv ignores this
  PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
fi

if [ "$preset" = test ]; then
  cd "$here"
  if [ "${1:-}" = --fast ]; then shift; set -- -m "not slow" "$@"; fi
  # a process for two cores, at least two and at most six
  processes=$("$python" -c "import os; print(min(6, max(2, (os.cpu_count() or 1) // 2)))")
  exec "$python" -m pytest -q -n "$processes" --dist loadgroup test_causality.py tests "$@"
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

export RUN_AFNO_SECONDS="packages $SECONDS"
exec "$python" "$here/start.py" --preset "$preset" "$@"
