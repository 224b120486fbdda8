#!/usr/bin/env bash
# Trains a small model of every family to find needles in real text, and another on associative recall; then tests
# them at lengths they were not trained at, with their memories' writes on and off.
#
#   bash benchmarks/recall.sh OUT
#
# leaves each run in OUT/<name>, and tables (jsonl), pictures and the printed tables in OUT/mqar, OUT/needle and
# OUT/far. Needles are learned in two phases: short rows at a large batch, then longer ones. All models train at once.
# FIRST, STEPS, PAIR_STEPS: optimizer steps of the first phase, of both, and on pairs. GPUS: how many to spread the runs
# over. Beside the preset's MAC stand three that differ in one thing: "mac_heads" has twice the heads, each half as wide;
# "mac_gates" gates that learn four times as fast; "mac_brisk" at most half the momentum. RUNS="mac mag" trains these
# alone. Ends with status 1 if a run failed.
set -u -o pipefail
out=$1
python=${PYTHON:-python3}
mkdir -p "$out"

needle="data=needle data.recall.needle.kinds=[passkey,number]"
short="$needle data.seq_len=384 data.batch_size=128 data.recall.needle.min_needles=2 data.recall.needle.max_needles=4"
long="$needle data.seq_len=2048 data.batch_size=24 data.recall.needle.min_needles=2 data.recall.needle.max_needles=12"
pairs="data=mqar data.seq_len=384 data.batch_size=64 data.recall.mqar.min_pairs=4 data.recall.mqar.max_pairs=64"
common="data.workers=3 optim.lr=2e-3 optim.warmup_steps=100 train.log_every=50 train.eval_every=0 train.eval_batches=2"
common="$common train.checkpoint_every=0 train.keep_checkpoints=1 train.sample_tokens=40"

needles() { # NAME, preset, settings
  $python scripts/train.py model="$2" $3 $short $common train.steps="${FIRST:-1500}" train.run_dir="$out/$1" &&
    $python scripts/train.py model="$2" $3 $long $common train.steps="${STEPS:-3500}" train.resume="$out/$1"
}
associations() {
  $python scripts/train.py model="$2" $3 $pairs $common train.steps="${PAIR_STEPS:-500}" train.run_dir="$out/$1"
}
test_runs() { # NAME, settings
  local name=$1
  shift
  $python scripts/evaluate.py "$@" samples=20 batch_size=100 piece=2048 compile=none text_rows=0 out="$out/$name" 2>&1 | tee "$out/$name.log"
}
list() { local IFS=,; echo "[$*]"; }

runs=() macs=() pair_runs=() jobs=() gpus=${GPUS:-1}
on_gpu() { export CUDA_VISIBLE_DEVICES=$(($1 % gpus)); }
start() { # TASK, NAME, preset, settings
  "$@" > "$out/$2.log" 2>&1 &
  jobs+=($!)
}
for name in ${RUNS:-mac mag mal lmm transformer mac_heads mac_gates mac_brisk}; do
  # A window as wide as the others', and feed-forwards that make up for the parameters that a family has not.
  case $name in
    mac) preset=mac_recall change="" gpu=0 ;;
    mag) preset=mag_recall change="model.ff=848" gpu=0 ;;
    mac_heads) preset=mac_recall change="model.memory.heads=8 model.memory.head_dim=32" gpu=1 ;;
    mal) preset=mal_recall change="model.ff=848" gpu=1 ;;
    lmm) preset=lmm_recall change="model.ff=1184" gpu=2 ;;
    transformer) preset=transformer_recall change="model.window=64 model.ff=1216" gpu=2 ;;
    mac_gates) preset=mac_recall change="optim.role_rates.gate=4" gpu=3 ;;
    mac_brisk) preset=mac_recall change="model.memory.max_momentum=0.5 model.memory.initial_momentum=0.25" gpu=3 ;;
    *) echo "RUNS: no such run: $name" >&2; exit 2 ;;
  esac
  on_gpu $gpu
  start needles "$name" $preset "$change"
  runs+=("$out/$name")
  case $name in
    mac*) macs+=("$out/$name") ;;
  esac
  case $name in
    mac_*) ;;
    *)
      on_gpu 2
      start associations "${name}_pairs" $preset "$change"
      pair_runs+=("$out/${name}_pairs")
      ;;
  esac
done
finish() {
  for job in "${jobs[@]}"; do
    wait "$job" || { echo "failed; see $out/*.log" >&2; exit 1; }
  done
  jobs=()
}
finish

if [ ${#pair_runs[@]} -gt 0 ]; then
  on_gpu 0
  test_runs mqar "runs=$(list "${pair_runs[@]}")" "tasks=[mqar]" "lengths=[384,1536,6144]" "pairs=[4,8,16,32,64]" &
  jobs+=($!)
fi
on_gpu 3
test_runs needle "runs=$(list "${runs[@]}")" "tasks=[passkey,number]" "lengths=[2048,4096,8192,16384]" &
jobs+=($!)
if [ ${#macs[@]} -gt 0 ]; then
  on_gpu 2
  test_runs far "runs=$(list "${macs[@]}")" "tasks=[passkey]" "lengths=[65536]" memory=on &
  jobs+=($!)
fi
finish
