# the whole schedule: killed with -9, then with TERM, then to its end, then once more
cd "$REPOSITORY"; export CUDA_VISIBLE_DEVICES=0; W=runs/full
rm -rf .cache ~/.triton /tmp/torchinductor_* runs/fineweb
(setsid nvidia-smi --query-gpu=timestamp,memory.used,power.draw,utilization.gpu,clocks.sm --format=csv,noheader -l 5 > $W/out-smi.csv 2>&1 &)
say() { echo "$(date +%H:%M:%S.%N | cut -c1-12) $*" | tee -a $W/full-times.txt; }
step() { tail -n 3 runs/fineweb/metrics.jsonl 2>/dev/null | grep -o '"step": [0-9]*' | tail -1 | grep -o '[0-9]*'; }
lines() { grep -c 'seconds to the first step' runs/fineweb/train.log 2>/dev/null || true; }
begin() { say "begin $1"; before=$(lines); before=${before:-0}; setsid bash run_afno.sh fineweb > $W/out-full-$1.txt 2>&1 & pid=$!; 
  while n=$(lines); [ "${n:-0}" = "$before" ]; do sleep 0.1; kill -0 $pid || break; done; say "first step logged, at step $(step)"; }
until_step() { while s=$(step); [ "${s:-0}" -lt $1 ] && kill -0 $pid 2>/dev/null; do sleep 0.2; done; }
begin 1; until_step $1; say "kill -9 at step $(step)"; kill -9 -- -$pid; wait $pid; say "status $?"; ls -la runs/fineweb | tee -a $W/full-times.txt
begin 2; until_step $2; say "TERM at step $(step)"; kill -TERM $pid; wait $pid; say "status $?"; ls -la runs/fineweb | tee -a $W/full-times.txt
begin 3; wait $pid; say "ended with status $?"
say "once more"; bash run_afno.sh fineweb > $W/out-full-4.txt 2>&1; say "status $?"; ls -la runs/fineweb | tee -a $W/full-times.txt
mkdir -p $W/runs; cp -r runs/fineweb $W/runs/ 2>/dev/null; rm -f $W/runs/fineweb/*.pt
python3 experiments/evaluate.py runs/fineweb --bin data/web/web_val.bin --out $W/runs/eval-fineweb > $W/out-eval.txt 2>&1; say "evaluated $?"
touch $W/full.done
