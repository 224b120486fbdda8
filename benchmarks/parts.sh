# shellcheck shell=bash
# What steps_gpu.sh and runs_gpu.sh share: parts with names, of which each has a GPU for itself while it runs.
#
# A script sets `parts`, its names in their order, and `alone`, those that want the whole machine; calls `begin` with its
# arguments; defines a function part_NAME for each, which calls `measure`; and calls `run_parts`. OUT/state gets a line
# "PART NAME STATUS SECONDS" when a measurement begins (STATUS is "started") and when it ends, and OUT/logs what it said:
# where everything is killed, what has ended is there. Python is ${PYTHON:-python3}; CUDA_VISIBLE_DEVICES says which
# GPUs there are, or else torch does.
set -u -o pipefail
python=${PYTHON:-python3}

begin() { # OUT [COMMIT [PART...]]: an empty COMMIT is the one that git knows, no PART is all of them
  [ $# -gt 0 ] || { echo "error: wanted OUT [COMMIT [PART...]], each PART one of ${parts[*]}" >&2; exit 2; }
  out=$1 commit=${2:-$(git rev-parse --short HEAD 2>/dev/null)}
  shift $(($# > 1 ? 2 : 1))
  chosen=("$@")
  [ $# -gt 0 ] || chosen=("${parts[@]}")
  for part in "${chosen[@]}"; do
    among "$part" "${parts[@]}" || { echo "error: PART: wanted some of ${parts[*]}, got $part" >&2; exit 2; }
  done
  mkdir -p "$out/logs" || exit 2
  local there=${CUDA_VISIBLE_DEVICES-}
  [ -n "$there" ] || there=$($python -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')
  IFS=, read -ra gpus <<< "$there"
  [ ${#gpus[@]} -gt 0 ] || gpus=("") # without a GPU one part at a time has the CPU
  touch "$out/state"
  local kept
  kept=$(while read -r line; do among "${line%% *}" "${chosen[@]}" || echo "$line"; done < "$out/state")
  echo -n "${kept:+$kept$'\n'}" > "$out/state"
}

run_parts() { # Ends the script: with status 1 if a measurement failed
  local place
  on=()
  trap stop TERM INT
  set -m # a process group for each part, so that it can be ended with all that it runs
  for part in "${chosen[@]}"; do
    place=0
    # shellcheck disable=SC2154
    if among "$part" "${alone[@]}"; then
      wait
    else
      while busy "$place"; do
        place=$(((place + 1) % ${#gpus[@]}))
        [ "$place" != 0 ] || sleep 0.2
      done
    fi
    gpu=${gpus[place]}
    "part_$part" &
    on[place]=$!
    ! among "$part" "${alone[@]}" || wait
  done
  wait
  report
}

measure() { # NAME SCRIPT ARGUMENTS
  local name=$1 status
  shift
  echo "$part $name started $SECONDS" >> "$out/state"
  CUDA_VISIBLE_DEVICES=$gpu $python "$@" > "$out/logs/$name.log" 2>&1
  status=$?
  echo "$part $name $status $SECONDS" >> "$out/state"
}

among() { # WORD WORDS
  local word=$1 each
  shift
  for each; do [ "$each" != "$word" ] || return 0; done
  return 1
}

busy() { [ -n "${on[$1]-}" ] && kill -0 "${on[$1]}" 2>/dev/null; }

stop() {
  trap '' TERM INT
  for place in "${!on[@]}"; do ! busy "$place" || kill -TERM -- "-${on[place]}"; done
  wait
  exit 143
}

report() {
  local -A last=()
  local part name status
  while read -r part name status _; do
    ! among "$part" "${chosen[@]}" || last[$name]=$status
  done < "$out/state"
  cat "$out/state"
  for status in "${last[@]}"; do [ "$status" = 0 ] || exit 1; done
  exit 0
}
