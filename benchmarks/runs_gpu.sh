#!/usr/bin/env bash
# What the README says of long texts and of whole runs on a GPU, in one run of about ten minutes on two GPUs:
#
#   bash benchmarks/runs_gpu.sh OUT [COMMIT]
#
# On the last GPU time against length, in training and in decoding; on GPU 0 tests of what feeds a step and saves it, how
# long steps take on real data against steps on one batch, and runs that are killed (with one GPU: first these, then the
# lengths). OUT gets a json each, and state, which says what failed; ends with status 1 if anything did. LENGTHS, KILLS
# and THREADS (of each compiler) may be set.
set -u -o pipefail
out=$1
commit=${2:-$(git rev-parse --short HEAD)}
python=${PYTHON:-python3}
lengths=${LENGTHS:-4096 8192 16384 32768 65536}
mkdir -p "$out/logs"
second=$(($($python -c 'import torch; print(torch.cuda.device_count())') > 1 ? 1 : 0))
export TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-4}

did() { echo "$1 $2 $SECONDS" >> "$out/state"; }
measure() { # NAME GPU SCRIPT ARGUMENTS
  local name=$1 gpu=$2
  shift 2
  CUDA_VISIBLE_DEVICES=$gpu $python "$@" > "$out/logs/$name.log" 2>&1
  did "$name" $?
}
of() { # NAME: where its result goes
  echo --commit "$commit" --out "$out/h200_$1.json"
}

runs() {
  measure tests 0 -m pytest -q -p no:cacheprovider -m gpu tests/train/test_feed.py tests/train/test_saver.py
  # shellcheck disable=SC2046
  measure feeding 0 benchmarks/feeding.py --model mac_168m:kernels=triton --data sotu needle:workers=3 $(of feeding)
  # shellcheck disable=SC2046
  measure killed 0 benchmarks/killed.py --kills "${KILLS:-10}" $(of killed) model=mac_24gb model.kernels=triton \
    model.layers=4 model.layer_code=shared data.batch_size=8 train.steps=300 train.checkpoint_every=20 \
    train.eval_every=100 train.deterministic=true
}

rm -f "$out/state"
runs & rest=$!
[ "$second" = 1 ] || wait $rest
# shellcheck disable=SC2046,SC2086
measure lengths "$second" benchmarks/lengths.py train --profile --jobs 9 --lengths $lengths $(of lengths)
# shellcheck disable=SC2046
measure decode "$second" benchmarks/lengths.py decode --jobs 3 $(of decode)
wait $rest
cat "$out/state"
! grep -qv '^[^ ]* 0 ' "$out/state"
