#!/usr/bin/env bash
# What the README says of training steps on a GPU, in one run of about ten minutes on two GPUs:
#
#   bash benchmarks/steps_gpu.sh OUT [COMMIT]
#
# First how long mac_168m takes to its first step, with empty and with filled caches, while nothing else runs. Then
# titans-pytorch's MAC at its own setting (where it is installed) on the last GPU, and small steps with and without a
# CUDA graph on GPU 0: the host matters to both. Then steps beside transformers, and last how a step compiles by variant.
# OUT gets a json each, and state, which says what failed; ends with status 1 if anything did. THREADS (of each compiler,
# while several run) may be set. Long texts are in runs_gpu.sh.
set -u -o pipefail
out=$1
commit=${2:-$(git rev-parse --short HEAD)}
python=${PYTHON:-python3}
caches=$(mktemp -d)
mkdir -p "$out/logs"
second=$(($($python -c 'import torch; print(torch.cuda.device_count())') > 1 ? 1 : 0))
fast=kernels=triton
theirs=mac_24gb@4x2048:$fast,layers=6,vocab_size=32000,mac.segment=128,layer_code=shared

did() { echo "$1 $2 $SECONDS" >> "$out/state"; }
measure() { # NAME GPU SCRIPT ARGUMENTS
  local name=$1 gpu=$2
  shift 2
  CUDA_VISIBLE_DEVICES=$gpu $python "$@" --commit "$commit" --out "$out/h200_$name.json" > "$out/logs/$name.log" 2>&1
  did "$name" $?
}
steps() { # NAME GPU BENCH_STEP'S ARGUMENTS
  local name=$1 gpu=$2
  shift 2
  measure "steps_$name" "$gpu" scripts/bench_step.py "$@"
}

rm -f "$out/state"
CUDA_VISIBLE_DEVICES=0 $python benchmarks/start.py --caches "$caches/168m" --commit "$commit" --out "$out/h200_start.json" -- \
  model=mac_168m "model.$fast" data.batch_size=16 data.seq_len=1024 > "$out/logs/start.log" 2>&1
did start $?
export TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-4}
( steps small 0 --models "mac_tiny@8x256:$fast,precision=bf16" --steps 50 --caches "$caches/small"
  steps small_launched 0 --models "mac_tiny@8x256:$fast,precision=bf16" --steps 50 --caches "$caches/small" \
    --no-cuda-graph ) &
small=$!
steps peers "$second" --models "$theirs" "$theirs,memory.chunk_size=128" "$theirs,memory.chunk_size=128,memory_layers=[1,4]" \
  titans_pytorch_mac "titans_pytorch_mac:memory=[2,5]" titans_pytorch_mac:memory=none --jobs 6 --steps 20
wait $small
steps table 0 --models "mac_168m:$fast" transformer_168m torch_transformer:transformer_168m "mac_168m@8x2048:$fast" \
  transformer_168m@8x2048 --jobs 5 --steps 50 --profile "$caches/traces" --caches "$caches/168m"
CUDA_VISIBLE_DEVICES=0 $python scripts/compile_report.py model=mac_168m batch_size=16 \
  'variants=[inductor,inductor_cuda_graph,older_way]' time_limit=280 out="$out/compile_report" > "$out/logs/report.log" 2>&1
did report $?
rm -rf "$caches"
cat "$out/state"
! grep -qv '^[^ ]* 0 ' "$out/state"
