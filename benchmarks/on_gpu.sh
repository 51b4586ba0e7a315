#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 9 minutes, with no network:
#
#     benchmarks/on_gpu.sh OUTDIR
#     benchmarks/on_gpu.sh OUTDIR STAGE...     # these alone, beside what OUTDIR has; without install, of the package
#                                              # that PYTHON finds
#
# OUTDIR gets at most 7 files, each complete up to the last finished step whenever the script is stopped:
#   results.json   the verdicts of smoke and graph, every stage's status
#   table.json, stages.json, products.json, sweeps.json   what python -m widenet_kernels bench measured
#   summary.txt    all of it as a table, also printed last
#   run.log        what every stage printed, and python -m widenet_kernels info
#
# The most important first; none stops the next; each has its own limit, and 3 s to end once it is reached:
#
#   stage        limit  what
#   install         70  pip install of this checkout, into a temporary folder; CUDA kernels for this device alone
#   install-pure    12  only if that failed: without compiled kernels
#   smoke           80  every op of every backend, forward and backward, against float64
#   compile         30  Triton's kernels for what is measured, side by side
#   table          120  bench --shape gpu: the layer and its peers; it prints what there is when its time is up
#   products        45  bench: each product alone against a dense one, gradients alone, gate and plan many in one graph
#   stages          45  bench: the stages of the layer
#   graph           30  the whole layer as a CUDA graph, replayed on new data, against eager calls
#   memcheck        35  compute-sanitizer over a small set
#   racecheck       20  the same for races, if memcheck could run
#   tests           90  pytest -m gpu in many processes, tests/conformance first, as many as there is time for
#   sweeps          60  bench: tile sizes for every form of GEMM
#
# Whatever happens, no stage runs past second 525.
#
# A status is ok, failed (exit code), timed out, not there (a tool is missing), refused (the sanitizer cannot watch
# this device) or no time. PYTHON names the Python that has torch (python3 otherwise); WIDENET_COMMIT the commit, where
# there is no .git. --cpu-smoke before OUTDIR goes through the same motions without a GPU, at tiny sizes.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
end=525
grace=3
smoke=()
if [ "${1:-}" = --cpu-smoke ]; then
  smoke=(--cpu-smoke)
  shift
fi
if [ $# -eq 0 ]; then
  echo "usage: benchmarks/on_gpu.sh [--cpu-smoke] OUTDIR [STAGE...]" >&2
  exit 64
fi

if [ ${#smoke[@]} -eq 0 ]; then
  # kernels for this device alone compile in time; nvcc has a name of its own for all that compute capability 9.0 can do
  CUDAARCHS=$(timeout -k 1 20 "$python" -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit(1)
name = "%d%d" % torch.cuda.get_device_capability()
print("90a" if name == "90" else name)')
  if [ -z "$CUDAARCHS" ]; then
    echo "on_gpu.sh: there is no GPU that torch can use with $python: nothing was run" >&2
    exit 2
  fi
  export CUDAARCHS
fi

mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
shift
wanted=" $* "
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work" "$out"/.*.partial' EXIT
results=$out/results.json
log=$out/run.log
if [ "$wanted" = "  " ]; then rm -f "$out"/{results,table,stages,products,sweeps}.json "$out"/{summary.txt,run.log}; fi
export PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin # nvcc and compute-sanitizer, where a toolkit is not on it already
export WIDENET_COMMIT=${WIDENET_COMMIT:-$(git -C "$root" rev-parse HEAD 2>/dev/null)}
benchmarks=widenet_kernels.benchmarks
cd "$work" || exit 1 # python -m finds what is installed and not the checkout

report() { # NAME STATUS SECONDS LIMIT
  echo "$1: $2, $3 of $4 s"
  "$python" "$root/benchmarks/gpu_results.py" stage "$out" "$@"
}

refused() { # FROM: what a sanitizer that cannot watch this device says
  tail -c "+$(($1 + 1))" "$log" | grep -qiE 'device not supported|error 999|LibraryNotLoaded|not supported on (this|the) '
}

is_wanted() { [[ $wanted = "  " || $wanted = *" $1 "* ]]; }

status= # of the last stage that was wanted
stage() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2 started=$SECONDS from code
  shift 2
  if ! is_wanted "$name"; then return; fi
  if [ $((end - grace - SECONDS)) -lt "$limit" ]; then limit=$((end - grace - SECONDS)); fi
  if [ "$limit" -lt 5 ]; then
    status="no time"
    report "$name" "$status" 0 0
    return
  fi
  echo "== $name" >>"$log"
  from=$(wc -c <"$log")
  # an interrupt, so that pytest still says what failed; Python heeds it even where it was started with it ignored
  timeout -s INT -k "$grace" "$limit" env --default-signal=INT "$@" >>"$log" 2>&1
  code=$?
  case $code in
    0) status=ok ;;
    124 | 137) status="timed out" ;;
    *) status="failed ($code)" ;;
  esac
  if [[ $name = *check ]] && [ "$status" != ok ] && refused "$from"; then status=refused; fi
  report "$name" "$status" $((SECONDS - started)) "$limit"
}

absent() { # NAME LIMIT
  if ! is_wanted "$1"; then return; fi
  status="not there"
  report "$1" "$status" 0 "$2"
}

versions() { # of what the installation uses, found as setup.py finds it
  local scripts tool
  scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
  "$python" -m pip --version
  "$python" -c 'import setuptools; print("setuptools", setuptools.__version__)'
  for tool in cmake ninja nvcc; do
    echo "$tool: $(PATH=$scripts:$PATH "$tool" --version 2>&1 | tr '\n' ' ')"
  done
  echo "CUDAARCHS: $CUDAARCHS"
}

install() { # into the temporary folder: the machine's Python stays as it is
  local pip=("$python" -m pip --disable-pip-version-check install --no-index --no-build-isolation --no-deps)
  stage install 70 env WIDENET_CUDA=ON "${pip[@]}" --target "$work/site" "$root"
  if [ "$status" != ok ]; then
    rm -rf "$work/site"
    stage install-pure 12 env WIDENET_NATIVE=OFF "${pip[@]}" --target "$work/site" "$root"
  fi
  if [ "$status" != ok ]; then # the packages as they stand in the checkout
    mkdir -p "$work/site"
    cp -r "$root/widenet_kernels" "$work/site"
    cp -r "$root/benchmarks" "$work/site/widenet_kernels"
  fi
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
}

compile() { # BENCHES SHAPES: side by side, so that no bench waits for its kernels
  local bench shape
  for bench in $1; do
    for shape in $2; do
      timeout --foreground 25 "$python" -m widenet_kernels bench --device cuda --bench "$bench" --shape "$shape" --patience 0 &
    done
  done >/dev/null 2>&1
  wait
}

bench() { # NAME LIMIT OPTIONS...: into NAME.json
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" -m widenet_kernels bench --device cuda "$@" --json "$out/$name.json"
}

run_tests() {
  if ! "$python" -c 'import pytest' 2>/dev/null; then
    absent tests 90
    return
  fi
  stage tests 90 "$python" "$root/benchmarks/gpu_tests.py"
}

sanitize() {
  local sanitizer
  sanitizer=$(command -v compute-sanitizer)
  if [ -z "$sanitizer" ]; then
    absent memcheck 35
    absent racecheck 20
    return
  fi
  # without the caching allocator every tensor is an allocation whose ends the sanitizer knows
  local -x PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local options=(--error-exitcode 86 --print-limit 20 --target-processes all)
  stage memcheck 35 "$sanitizer" --tool memcheck "${options[@]}" "$python" -m "$benchmarks.gpu_sanitize"
  if [ "$status" = refused ]; then
    report racecheck refused 0 20
  else
    stage racecheck 20 "$sanitizer" --tool racecheck "${options[@]}" "$python" -m "$benchmarks.gpu_sanitize"
  fi
}

if [ ${#smoke[@]} -gt 0 ]; then
  tiny=(--device cpu --shape host --seconds 0 --patience 0.001)
  stage smoke 50 "$python" -m "$benchmarks.gpu_sanitize" --json "$results" "${smoke[@]}"
  stage graph 60 "$python" -m "$benchmarks.gpu_graph" --json "$results" "${smoke[@]}"
  stage table 60 "$python" -m widenet_kernels bench --bench layer "${tiny[@]}" --json "$out/table.json"
  stage products 120 env TRITON_INTERPRET=1 "$python" -m widenet_kernels bench "${tiny[@]}" \
    --bench products backward launches tiles-first --json "$out/products.json"
  stage fails 5 "$python" -c 'raise SystemExit(3)'
  stage hangs 5 "$python" -c 'import time; time.sleep(60)'
  stage racecheck 5 bash -c 'echo Device not supported; exit 1'
  absent memcheck 40
else
  versions >>"$log" 2>&1
  if is_wanted install; then install; fi
  timeout 20 "$python" -m widenet_kernels info >>"$log" 2>&1 # which backends serve what, and why others do not
  shapes="widenet-b-256 mixtral fine-grained"
  tiles="tiles-first tiles-second tiles-grad_rows tiles-grad_hidden tiles-weight_1 tiles-weight_2"
  stage smoke 80 "$python" -m "$benchmarks.gpu_sanitize" --large --jobs 4 --json "$results"
  stage compile 30 bash -c "python=$python; $(declare -f compile); compile 'layer products' '$shapes small'"
  bench table 120 --bench ceilings layer --shape gpu --seconds 0.3
  bench products 45 --bench products backward launches --shape $shapes --seconds 0.3
  bench stages 45 --bench gate plan route permute grouped_gemm combine --shape $shapes --seconds 0.3
  stage graph 30 "$python" -m "$benchmarks.gpu_graph" --jobs 8 --json "$results"
  sanitize
  run_tests
  bench sweeps 60 --bench $tiles --shape $shapes --seconds 0.3
fi
"$python" -m "$benchmarks.gpu_results" summary "$out" | tee "$out/summary.txt"
! grep -q '"status": "\(failed\|timed out\)' "$results"
