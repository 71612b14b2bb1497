#!/bin/bash
# What only a machine with NVIDIA GPUs can try: tests/bench/gpu_all.sh FOLDER [LOAD_GB] [RUN_GB]
# No step begins after 8 minutes, nor lasts longer than that. FOLDER takes about four times RUN_GB. Every step has a time limit and a log in FOLDER/logs, and is
# tried whatever became of those before; the exit code is the number of steps that failed.
set -u
FOLDER=${1:?tests/bench/gpu_all.sh FOLDER}
LOAD_GB=${2:-4}
RUN_GB=${3:-8}
cd "$(dirname "$0")/../.." || exit 99
LOGS=$FOLDER/logs
mkdir -p "$LOGS"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$FOLDER/triton
FAILED=0

step() { # name, seconds, command: runs it, shows its output, and says how it ended
  local name=$1 limit=$2 begun=$SECONDS code
  shift 2
  limit=$((SECONDS + limit < 480 ? limit : 480 - SECONDS))
  if [ "$limit" -lt 1 ]; then
    FAILED=$((FAILED + 1))
    echo "--- $name: not begun, the 8 minutes are over"
    return
  fi
  echo "=== $name: $*"
  timeout -k 10 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  tail -n 60 "$LOGS/$name.log"
  [ $code = 124 ] && echo "--- $name: stopped after $limit s"
  [ $code = 0 ] || FAILED=$((FAILED + 1))
  echo "--- $name: exit code $code after $((SECONDS - begun)) s"
}

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') || GPUS=0
echo "GPUs: $GPUS, cores: $(nproc), free in $FOLDER: $(df -h --output=avail "$FOLDER" | tail -1)"
nvidia-smi --query-gpu=name,memory.total,pcie.link.gen.current,pcie.link.width.current --format=csv,noheader
[ "$GPUS" -gt 0 ] || { echo "torch sees no CUDA device: nothing here can be tried"; exit 99; }

step tests 200 python -m pytest -q -m gpu -p no:cacheprovider \
  tests/runtime/test_reading.py tests/work/test_lanes.py
step write 90 python tests/bench/whole_run.py "$FOLDER" --gb "$LOAD_GB" --cases w4a16-cuda --write
for target in cuda cuda-sm90 triton; do
  step "repack-$target" 60 python -m ctconvert repack "$FOLDER/w4a16-$LOAD_GB" "$FOLDER/$target" \
    --target $target --device cuda --overwrite
  step "load-$target" 60 python -m ctconvert bench "$FOLDER/$target" --load \
    --against "$FOLDER/w4a16-$LOAD_GB" --device cuda
  rm -rf "${FOLDER:?}/$target"
done
rm -rf "${FOLDER:?}/triton-first" # so that the first run compiles
step whole-one 200 env TRITON_CACHE_DIR="$FOLDER/triton-first" python tests/bench/whole_run.py \
  "$FOLDER" --gb "$RUN_GB" --cases w4a16-cuda --device cuda:0 --rounds 2
if [ "$GPUS" -gt 1 ]; then
  step whole-all 150 python tests/bench/whole_run.py "$FOLDER" --gb "$RUN_GB" --cases w4a16-cuda \
    --device cuda --rounds 2
fi
echo "=== $FAILED steps failed, $SECONDS s"
exit $FAILED
