#!/usr/bin/env bash
# What the README says of training steps on a GPU:
#
#   bash benchmarks/steps_gpu.sh OUT [COMMIT [PART...]]
#
# Parts, with the seconds that one takes on an H200 with 16 cores; all of them in this order, if none is named:
#   start   140   how long mac_168m takes to its first step, with empty and then with filled caches; nothing else runs
#   small   100   small steps with and without a CUDA graph
#   peers   185   titans-pytorch's MAC at its own setting (where it is installed), and ours beside it
#   table   300   steps beside transformers, and mac_168m by the reference in place of the kernels
#   report  560   how mac_168m's step compiles, and the older way's, at most: two processes each, without caches and with,
#                 that may take LIMIT (140) seconds
# Where there are several GPUs, parts run at the same time, one on each; with one GPU, one after the other. OUT gets a
# json each and, of the report, a folder, written after each row, and state (see parts.sh); ends with status 1 if
# anything failed. THREADS (4): of each compiler, while several run. Long texts are in runs_gpu.sh.
parts=(start small peers table report) alone=(start)
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/parts.sh"
begin "$@"
caches=$(mktemp -d)
trap 'rm -rf "$caches"' EXIT
fast=kernels=triton
theirs=mac_24gb@4x2048:$fast,layers=6,vocab_size=32000,mac.segment=128,layer_code=shared
tiny=mac_tiny@8x256:$fast,precision=bf16

steps() { # NAME ARGUMENTS of bench_step.py
  local name=steps_$1
  shift
  TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-4} measure "$name" scripts/bench_step.py "$@" --commit "$commit" \
    --out "$out/h200_$name.json"
}
part_start() {
  measure start benchmarks/start.py --caches "$caches/168m" --commit "$commit" --out "$out/h200_start.json" -- \
    model=mac_168m "model.$fast" data.batch_size=16 data.seq_len=1024
}
part_small() {
  steps small --models "$tiny" --steps 50 --caches "$caches/small"
  steps small_launched --models "$tiny" --steps 50 --caches "$caches/small" --no-cuda-graph
}
part_peers() {
  steps peers --models "$theirs" "$theirs,memory.chunk_size=128" "$theirs,memory.chunk_size=128,memory_layers=[1,4]" \
    titans_pytorch_mac "titans_pytorch_mac:memory=[2,5]" titans_pytorch_mac:memory=none --jobs 6 --steps 20
}
part_table() {
  steps table --models "mac_168m:$fast" transformer_168m torch_transformer:transformer_168m "mac_168m@8x2048:$fast" \
    transformer_168m@8x2048 mac_168m:kernels=reference --jobs 6 --steps 50 --profile --caches "$caches/168m"
}
part_report() {
  rm -rf "$out/compile_report"
  measure report scripts/compile_report.py model=mac_168m batch_size=16 'kernels=[triton]' \
    'variants=[inductor_cuda_graph,older_way]' "time_limit=${LIMIT:-140}" "commit='$commit'" \
    "out=$out/compile_report"
}
run_parts
