#!/usr/bin/env bash
# Everything that the kernels' page and the README say of a GPU, in one run of about ten minutes on two GPUs:
#
#   bash benchmarks/kernels_gpu.sh OUT [COMMIT]
#
# GPU 0: all tests of kernels and of the GPU, and mac_24gb trained by both implementations (times there mean nothing);
# then steps. GPU 1 (GPU 0 once it is free, before the steps, where there is but one): rows of kernels and peers.
# OUT gets the test log, h200_kernels.json, h200_peers.json, h200_train_kernels.json and losses.{json,png}. Ends with
# status 1 if anything failed; state says what.
set -u -o pipefail
out=$1
commit=${2:-$(git rev-parse --short HEAD)}
python=${PYTHON:-python3}
mkdir -p "$out" "$out/parts/triton" "$out/parts/reference"
second=$(($($python -c 'import torch; print(torch.cuda.device_count())') > 1 ? 1 : 0))
rows="memory (layer .write|write).*(F 256|F 2048|one matrix)|unrolled.*chunk 256|memory read.*(F 256|one matrix)|single write"
rows="$rows|^(window|segments)( against torch's attention)? B16 H16 T1024.*(P0|P16|context)\$|rms_norm|silu_gate|layer_norm.*1024\$|rotate|adamw|gram|poly"
rows="$rows|ortho.*(24|4x4096)|learned_mlp 4096|fp8|to compare|cross_entropy N16384 D1024 V32000\$|norm_linear.*E4096\$"

did() { echo "$1 $2" >> "$out/state"; }
tests() { # as make test-gpu runs them, whose set-up wants a network, from the files that have any
  # shellcheck disable=SC2046
  set -- -q -m "gpu or kernel" -n "${TEST_JOBS:-16}" --dist worksteal --timeout 300 -p no:cacheprovider -rf --tb=short \
    tests/kernels $(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests | grep -v '^tests/kernels/' | sort)
  $python -c 'import os, sys, torch, triton; print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, triton",
    f"{triton.__version__}, commit {sys.argv[1]}:\n# python -m pytest", *sys.argv[2:])
from titanfunc import caches
caches.have_one_assembler()
print("# Triton assembles by", os.environ.get("TRITON_PTXAS_PATH"))' \
    "$commit" "$@" > "$out/h200_kernel_tests.log"
  CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=1 $python -m pytest "$@" >> "$out/h200_kernel_tests.log" 2>&1
  did tests $?
}
losses() {
  CUDA_VISIBLE_DEVICES=0 $python benchmarks/same_loss.py --kernels "$1" --commit "$commit" --out "$out/parts/$1" \
    > "$out/parts/$1.log" 2>&1
  did "losses_$1" $?
}
times() {
  [ "$second" = 1 ] || while [ "$(grep -c "^tests\|^losses" "$out/state" 2>/dev/null)" != 3 ]; do sleep 2; done
  export CUDA_VISIBLE_DEVICES=$second
  $python scripts/bench_kernels.py --no-eager --rows "$rows" --commit "$commit" --out "$out/h200_kernels.json" \
    > "$out/parts/kernels.log" 2>&1
  did kernels $?
  $python scripts/bench_kernels.py --rows "^peer" --rounds 7 --commit "$commit" --out "$out/h200_peers.json" \
    > "$out/parts/peers.log" 2>&1
  did peers $?
}

rm -f "$out/state"
tests & checks=$!
losses triton & ours=$!
losses reference & plain=$!
times & timed=$!
wait $checks $ours $plain
[ "$second" = 1 ] || wait $timed
CUDA_VISIBLE_DEVICES=0 $python scripts/bench_step.py --models mac_168m:kernels=triton \
  mac_168m:kernels=reference transformer_168m --jobs 3 --steps 50 \
  --profile "$out/parts/traces" --commit "$commit" --out "$out/h200_train_kernels.json" > "$out/parts/steps.log" 2>&1
did steps $?
wait $timed
$python benchmarks/same_loss.py --merge "$out/parts/reference/losses.json" "$out/parts/triton/losses.json" --out "$out" \
  > "$out/parts/merge.log" 2>&1
did merge $?
cat "$out/state"
! grep -qv ' 0$' "$out/state"
