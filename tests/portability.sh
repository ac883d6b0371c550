#!/usr/bin/env bash
# The numeric tests as other CPUs would run them: bbt's own kernels, libtorch's and oneDNN's lowered to one instruction
# set at a time, with one thread and with two, and once beside processes that keep every core busy.
#
#   make test-portability           all of it
#   make test-portability QUICK=1   each instruction set once, without the tests that train for long
#
# An instruction set that this CPU lacks is named, and counts as not run.
set -euo pipefail
cd "$(dirname "$0")/.."

unit=(libtorch:: kernels:: quantization:: models:: utils:: training::loss training::zero training::layout)
integration=(golden_ops:: golden_training:: original_rule:: adamw8bit:: amp:: resume:: schedules::)
long=(python_training:: internals:: kernels::a_run)
[ -n "${QUICK:-}" ] || integration+=("${long[@]}")

cargo=${CARGO:-cargo}
work=$(mktemp -d)
busy=()
trap 'kill "${busy[@]}" 2>"$work/kill" || true; rm -rf "$work"' EXIT

# The programs, by the name of their target; cargo's own profile flags may be given as arguments.
$cargo test --locked --no-run --lib --test it --message-format json "${@:---release}" >"$work/built"
program() { # name of a test target
  python3 -c 'import json, sys
for message in map(json.loads, open(sys.argv[1])):
    if message.get("executable") and message["target"]["name"] == sys.argv[2] and message["profile"]["test"]:
        print(message["executable"])' "$work/built" "$1"
}
unit_tests=$(program bbt) integration_tests=$(program it)

has() { # features as /proc/cpuinfo has them
  local feature
  for feature in "$@"; do grep -qw "$feature" /proc/cpuinfo || { echo "$feature"; return 1; }; done
}

failed=0 not_run=0
run() { # what, threads, variables
  local tests program summary what="$1, threads: $2"
  local -a filters environment=(OMP_NUM_THREADS="$2" "${@:3}")
  for tests in unit integration; do
    case $tests in
      unit) program=$unit_tests filters=("${unit[@]}") ;;
      integration) program=$integration_tests filters=("${integration[@]}") ;;
    esac
    if env "${environment[@]}" "$program" "${filters[@]}" >"$work/log" 2>&1; then summary=ok; else summary=FAILED; failed=1; fi
    printf '%-44s %-12s %s\n' "$what" "$tests" "$summary, $(sed -n 's/^test result: [a-zA-Z]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$work/log")"
    [ $summary = ok ] || { echo "  with ${environment[*]}"; grep -vE '^test .* ok$' "$work/log" || true; }
  done
}

threads=(1 2)
[ -z "${QUICK:-}" ] || threads=(1)
while read -r kernels aten onednn features; do
  # shellcheck disable=SC2086 # words
  if ! lacks=$(has $features); then
    echo "$kernels: not run: this CPU has no $lacks"
    not_run=$((not_run + 1))
    continue
  fi
  for n in "${threads[@]}"; do
    run "$kernels" "$n" BBT_CPU_KERNELS="$kernels" ATEN_CPU_CAPABILITY="$aten" ONEDNN_MAX_CPU_ISA="$onednn"
  done
done <<'END'
portable default SSE41
avx2 avx2 AVX2 avx2 fma
avx512 avx512 AVX512_CORE avx512f avx512bw avx512dq avx512vl
END

# What this CPU has at best, on a machine that has other things to do.
for ((core = 0; core < $(nproc); core++)); do
  while :; do :; done &
  busy+=($!)
done
run "best, beside busy cores" 2
kill "${busy[@]}"
busy=()
if [ -z "${QUICK:-}" ]; then
  for n in "${threads[@]}"; do run best "$n"; done
fi

[ $not_run = 0 ] || echo "$not_run instruction sets were not run."
exit $failed
