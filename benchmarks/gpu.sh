#!/usr/bin/env bash
# Builds, tests and measures on a machine with a CUDA device, without network, within ten minutes. Everything goes into
# one folder: $OUT, or benchmarks/results/<device>. A step that fails or takes too long does not stop the others;
# steps.txt has each step's exit status and time. The script fails if a step did.
#
#   benchmarks/gpu.sh                  with the python3 at hand, which needs torch, pytest and pytest-benchmark
#   PYTHON=.venv/bin/python OUT=/tmp/report benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD MAX_JOBS=${MAX_JOBS:-$(nproc)}

facts=$("$PYTHON" - <<'PYTHON'
import re
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("no CUDA device, or no CUDA build of torch")
name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print(name, "{}.{}".format(*torch.cuda.get_device_capability()))
PYTHON
) || exit 2
read -r device capability <<< "$facts"
OUT=${OUT:-benchmarks/results/$device}
mkdir -p "$OUT"
: > "$OUT/steps.txt"
failed=0

# step NAME SECONDS COMMAND...: runs the command within a limit, its output in NAME.txt
step() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.txt" 2>&1
  status=$?
  [[ $status -eq 0 ]] || failed=1
  printf '%-10s  exit %-3d  %4d s\n' "$name" "$status" $((SECONDS - begun)) | tee -a "$OUT/steps.txt"
}
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider)

# One architecture compiles sooner than all of them.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
command -v nvidia-smi > /dev/null && step device 20 nvidia-smi
step build 180 "$PYTHON" setup.py -q build_ext --inplace
step info 30 "$PYTHON" -m wgan_ext
step tests 120 "${pytest[@]}" -k cuda --ignore=tests/cuda_on_cpu --ignore=tests/test_cuda_static.py tests
step benchmarks 120 "${pytest[@]}" -k cuda --benchmark-json="$OUT/benchmarks.json" benchmarks/bench_*.py
[[ -s $OUT/benchmarks.json ]] && step report 20 "$PYTHON" benchmarks/report.py "$OUT/benchmarks.json"

sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2> /dev/null)
if [[ -n $sanitizer ]]; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # or memcheck sees torch's large blocks and not the tensors in them
  for tool in memcheck synccheck racecheck; do
    step "$tool" 45 "$sanitizer" --tool "$tool" --kernel-name kns=wgan_ext --error-exitcode 9 \
      "${pytest[@]}" -k "opcheck and cuda" tests/test_registration.py
  done
else
  echo "compute-sanitizer is not installed" | tee -a "$OUT/steps.txt"
fi
exit "$failed"
