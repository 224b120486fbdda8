#!/usr/bin/env bash
# What the README says of training steps on a GPU, in one run of about ten minutes on two GPUs:
#
#   bash benchmarks/steps_gpu.sh OUT [COMMIT]
#
# GPU 0: mac_168m with empty and with filled caches while nothing else runs, then steps beside transformers. GPU 1 (GPU 0
# where there is but one), once the caches are measured: titans-pytorch's MAC at its own setting (where it is installed),
# small steps with and without a CUDA graph, time against length, decoding, and how a step compiles by variant. OUT gets a
# json each, traces' tables in them, and state, which says what failed; ends with status 1 if anything did.
set -u -o pipefail
out=$1
commit=${2:-$(git rev-parse --short HEAD)}
python=${PYTHON:-python3}
caches=$(mktemp -d)
mkdir -p "$out/logs"
second=$(($($python -c 'import torch; print(torch.cuda.device_count())') > 1 ? 1 : 0))
fast=kernels=triton

did() { echo "$1 $2" >> "$out/state"; }
steps() { # NAME GPU BENCH_STEP'S ARGUMENTS
  local name=$1 gpu=$2
  shift 2
  CUDA_VISIBLE_DEVICES=$gpu $python scripts/bench_step.py "$@" --commit "$commit" --out "$out/h200_steps_$name.json" \
    > "$out/logs/$name.log" 2>&1
  did "$name" $?
}
lengths() { # NAME LENGTHS' ARGUMENTS
  local name=$1
  shift
  CUDA_VISIBLE_DEVICES=$second $python benchmarks/lengths.py "$@" --commit "$commit" --out "$out/h200_$name.json" \
    > "$out/logs/$name.log" 2>&1
  did "$name" $?
}
beside() {
  [ "$second" = 1 ] || while ! grep -q "^table" "$out/state" 2>/dev/null; do sleep 2; done
  while ! grep -q "^warm" "$out/state" 2>/dev/null; do sleep 1; done
  ours=mac_24gb@4x2048:$fast,layers=6,vocab_size=32000,mac.segment=128,memory.heads=8,layer_code=shared
  steps peers "$second" --models "$ours" titans_pytorch_mac titans_pytorch_mac:memory=none --jobs 3 --steps 20
  steps small "$second" --models "mac_tiny:$fast,precision=bf16" --steps 50 --caches "$caches/small"
  steps small_launched "$second" --models "mac_tiny:$fast,precision=bf16" --steps 50 --caches "$caches/small" --no-cuda-graph
  lengths lengths train --profile --jobs 10
  lengths decode decode
}

rm -f "$out/state"
beside & rest=$!
steps cold 0 --models "mac_168m:$fast" --steps 50 --caches "$caches/168m"
steps warm 0 --models "mac_168m:$fast" --steps 50 --caches "$caches/168m"
steps table 0 --models "mac_168m:$fast" transformer_168m torch_transformer:transformer_168m "mac_168m@8x2048:$fast" \
  transformer_168m@8x2048 --jobs 5 --steps 50 --profile "$caches/traces" --caches "$caches/168m"
CUDA_VISIBLE_DEVICES=0 $python scripts/compile_report.py model=mac_168m batch_size=16 \
  'variants=[inductor,inductor_cuda_graph,older_way]' time_limit=280 out="$out/compile_report" > "$out/logs/report.log" 2>&1
did report $?
wait $rest
rm -rf "$caches"
cat "$out/state"
! grep -qv ' 0$' "$out/state"
