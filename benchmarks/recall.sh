#!/usr/bin/env bash
# Trains small models of every family to find needles in real text, and one of each on associative recall; then tests
# them at lengths they were not trained at, with their memories' writes on and off.
#   bash benchmarks/recall.sh OUT            (OUT/needle, OUT/mqar: tables as jsonl, pictures; OUT/<run>: each run)
# Two phases for needles: short rows at a large batch first, then longer ones. All models train beside each other.
set -u
out=$1
python=${PYTHON:-python3}
short="data=needle data.seq_len=384 data.batch_size=128 data.recall.needle.min_needles=2 data.recall.needle.max_needles=4"
long="data=needle data.seq_len=1536 data.batch_size=32 data.recall.needle.min_needles=4 data.recall.needle.max_needles=16"
pairs="data=mqar data.seq_len=384 data.batch_size=64 data.recall.mqar.min_pairs=4 data.recall.mqar.max_pairs=64"
common="data.workers=3 optim.lr=2e-3 optim.warmup_steps=100 train.eval_every=0 train.eval_batches=2 train.checkpoint_every=0 train.log_every=50 train.keep_checkpoints=1 train.sample_tokens=40"
first=${FIRST:-2500}
steps=${STEPS:-3300}

needles() {
  $python scripts/train.py model="$1" $2 $short $common train.steps="$first" train.run_dir="$out/$1" &&
    $python scripts/train.py model="$1" $2 $long $common train.steps="$steps" train.resume="$out/$1"
}
associations() {
  $python scripts/train.py model="$1" $2 $pairs $common train.steps="${PAIR_STEPS:-1500}" train.run_dir="$out/$1_mqar"
}

families="mac mag mal lmm transformer"
runs=() pair_runs=()
for family in $families; do
  name="${family}_recall"
  change=""
  # A window as wide as the others; feed-forwards that make up for the parameters that a family has not.
  [ "$family" = transformer ] && change="model.window=64 model.ff=1216"
  [ "$family" = lmm ] && change="model.ff=1184"
  needles "$name" "$change" > "$out/$name.log" 2>&1 &
  associations "$name" "$change" > "$out/${name}_mqar.log" 2>&1 &
  runs+=("$out/$name") pair_runs+=("$out/${name}_mqar")
done
wait
join() { local IFS=,; echo "[$*]"; }
$python scripts/evaluate.py "runs=$(join "${runs[@]}")" "tasks=[passkey,number]" "lengths=[2048,4096,8192,16384]" \
  samples=20 batch_size=20 text_rows=0 out="$out/needle" > "$out/needle.log" 2>&1
$python scripts/evaluate.py "runs=$(join "${pair_runs[@]}")" "tasks=[mqar]" "lengths=[384,1536]" "pairs=[4,8,16,32,64]" \
  samples=20 batch_size=20 text_rows=0 out="$out/mqar" > "$out/mqar.log" 2>&1
