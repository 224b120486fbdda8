#!/usr/bin/env bash
# Compares AdamW, Muon and the nested optimizer over each, under one budget: the same batches, schedule, steps and number
# of learning rates for all; 3 seeds.
#
#   bash benchmarks/optimizers.sh OUT [SETTING ...]
#
# leaves table, runs and curves in OUT/all. Every optimizer runs by itself, spread over GPUS (all at once with PARALLEL=1,
# when times a step mean nothing); the last call makes no run, it puts the table together. SETTINGS are those of scripts/compare.py, for all. Ends with status 1 if one failed.
set -u -o pipefail
out=$1
shift
python=${PYTHON:-python3}
names=(adamw muon nested_adamw nested_muon)
budget="model=mac_24gb data.seq_len=512 data.batch_size=32 data.workers=3 train.steps=400 train.eval_every=50"
budget="$budget seeds=[0,1,2] lr_factors=[0.25,0.5,1,2,4]"
mkdir -p "$out/all"

jobs=()
for i in "${!names[@]}"; do
  export CUDA_VISIBLE_DEVICES=$((i % ${GPUS:-1}))
  $python scripts/compare.py $budget "optims=[${names[i]}]" "$@" out="$out/${names[i]}" > "$out/${names[i]}.log" 2>&1 &
  jobs+=($!)
  [ "${GPUS:-1}" -gt 1 ] || [ "${PARALLEL:-}" = 1 ] || wait "${jobs[-1]}" || { echo "failed; see $out/*.log" >&2; exit 1; }
done
for job in "${jobs[@]}"; do
  wait "$job" || { echo "failed; see $out/*.log" >&2; exit 1; }
done

cp "$out/adamw/comparison.yaml" "$out/all/comparison.yaml"
for name in "${names[@]}"; do cat "$out/$name/runs.jsonl"; done > "$out/all/runs.jsonl"
$python scripts/compare.py $budget "optims=[$(IFS=,; echo "${names[*]}")]" "$@" out="$out/all" | tee "$out/all.log"
