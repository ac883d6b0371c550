#!/usr/bin/env bash
# Checks bbt on a CUDA device against the CPU and prints a short table.
#
#   tests/gpu/run.sh                    with target/release/bbt
#   BBT=./bbt DEVICE=cuda:1 tests/gpu/run.sh
#
# A binary built elsewhere runs with that machine's own libtorch 2.11.0:
#   LD_LIBRARY_PATH=$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))')/lib
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
bbt=${BBT:-$root/target/release/bbt}
device=${DEVICE:-cuda}
text=$root/tests/fixtures/bitbyte_tiny/text.bin
init=$root/tests/fixtures/bitbyte_tiny/init.pt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

row() { printf '%-44s %-28s %s\n' "$1" "$2" "$3"; }
check() { # name, what was seen, condition for python
  if python3 -c "import sys; sys.exit(not ($3))"; then row "$1" "$2" ok; else row "$1" "$2" FAILED; failed=1; fi
}
losses() { python3 -c 'import json, sys; print([r["loss"] for r in map(json.loads, open(sys.argv[1])) if "loss" in r])' "$1/metrics.jsonl"; }
last() { python3 -c 'import json, sys; print([r for r in map(json.loads, open(sys.argv[1])) if "loss" in r][-1][sys.argv[2]])' "$1/metrics.jsonl" "$2"; }
train() { # out, device, precision, further flags
  "$bbt" train --data "$text" --init "$init" --out "$1" --device "$2" --set train.precision="$3" \
    --set data.order=sequential --seq_len 64 --batch_size 2 --steps 20 --lr 3e-3 --log_every 1 "${@:4}" 2>"$work/err" \
    || { cat "$work/err"; exit 1; }
}

"$bbt" doctor
echo
row check seen result
train "$work/cpu" cpu fp32
for precision in fp32 bf16 fp16; do
  train "$work/$precision" "$device" "$precision"
  worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/cpu"), $(losses "$work/$precision"))))")
  # Rounding to int8 and ternary makes small differences grow.
  case $precision in fp32) bound=0.01 ;; *) bound=0.15 ;; esac
  check "20 steps $precision against the CPU" "largest difference $worst" "$worst < $bound"
done

for precision in fp32 bf16 fp16; do
  for kernel in reference fused; do
    train "$work/$kernel-$precision" "$device" "$precision" --set quant.kernel=$kernel
  done
  worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/reference-$precision"), $(losses "$work/fused-$precision"))))")
  case $precision in fp32) bound=0.01 ;; *) bound=0.15 ;; esac
  check "fused kernels $precision against libtorch's" "largest difference $worst" "$worst < $bound"
done

train "$work/checkpointed" "$device" fp32 --set train.checkpointing=true
train "$work/plain" "$device" fp32 --no_ckpt
worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/plain"), $(losses "$work/checkpointed"))))")
check "checkpointing on and off" "largest difference $worst" "$worst < 0.01"

# Forward and backward recorded as a CUDA graph, also where the shape changes on the way and micro-batches add up.
for precision in fp32 bf16 fp16; do
  for graph in false true; do
    train "$work/graph-$graph-$precision" "$device" $precision --set train.cuda_graph=$graph --set train.internals_every=0 \
      --set train.grad_accum=2 --set data.seq_len=null --set 'data.curriculum=[[0.0, 32], [0.5, 64]]'
  done
  grep "cannot be recorded" "$work/err" && failed=1
  worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/graph-false-$precision"), $(losses "$work/graph-true-$precision"))))")
  check "train.cuda_graph $precision" "largest difference $worst" "$worst < 0.01"
done

# AdamW of 8 bits by the kernel of each, and its checkpoint gone on with on the CPU. A moment between two codes falls to
# either side: two instruction sets of one CPU differ by 0.005.
adamw8bit=$("$bbt" doctor | grep '^adamw8bit')
train "$work/adamw8bit" cpu fp32 --set optim.name=adamw8bit
for kernel in own bitsandbytes; do
  if [ $kernel = own ]; then
    export BBT_BITSANDBYTES=none
  else
    unset BBT_BITSANDBYTES
    case $adamw8bit in *"by bitsandbytes'"*) ;; *) row "adamw8bit by bitsandbytes" "${adamw8bit#*: }" "not run"; continue ;; esac
  fi
  train "$work/adamw8bit-$kernel" "$device" fp32 --set optim.name=adamw8bit
  worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/adamw8bit"), $(losses "$work/adamw8bit-$kernel"))))")
  # bitsandbytes' rounds and corrects the bias more coarsely, and decays after the step.
  case $kernel in own) bound=0.02 ;; *) bound=0.05 ;; esac
  check "adamw8bit ($kernel) against the CPU" "largest difference $worst" "$worst < $bound"
  train "$work/adamw8bit-$kernel-parts" "$device" fp32 --set optim.name=adamw8bit --set train.stop_at=9
  "$bbt" train --config "$work/adamw8bit-$kernel-parts/config.yaml" --set train.stop_at=null --device cpu --resume auto 2>/dev/null
  worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/adamw8bit-$kernel"), $(losses "$work/adamw8bit-$kernel-parts"))))")
  check "  its checkpoint resumed on the CPU" "largest difference $worst" "$worst < $bound"
done

train "$work/parts" "$device" fp32 --set train.stop_at=9
"$bbt" train --config "$work/parts/config.yaml" --set train.stop_at=null --resume auto 2>/dev/null
worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/fp32"), $(losses "$work/parts"))))")
check "20 steps in two runs" "largest difference $worst" "$worst < 0.01"

for d in cpu "$device"; do
  "$bbt" eval --ckpt "$work/fp32/ckpt.pt" --data "$text" --seq_len 64 --device "$d" --json >"$work/eval-${d%%:*}" 2>/dev/null
done
a=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["loss"])' "$work/eval-cpu")
b=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["loss"])' "$work/eval-${device%%:*}")
check "its checkpoint evaluated on both" "$a $b" "abs($a - $b) < 1e-3"

# One rank goes the whole way of many: store, process group (NCCL on a GPU), Reducer, or shards.
for zero in 0 1; do
  rank() { RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((29600 + zero)) "$@"; }
  rank train "$work/rank$zero" "${device%%:*}" fp32 --ddp --set ddp.zero_stage=$zero
  worst=$(python3 -c "print(max(abs(a - b) for a, b in zip($(losses "$work/fp32"), $(losses "$work/rank$zero"))))")
  check "one rank, ddp.zero_stage $zero" "largest difference $worst" "$worst < 0.01"
done

for graph in false true; do
  "$bbt" train --data "$text" --out "$work/s$graph" --device "$device" --n_layer 6 --d_model 384 --n_head 6 --d_ff 1024 \
    --seq_len 512 --batch_size 4 --steps 60 --log_every 30 --no_ckpt --set train.cuda_graph=$graph --set train.internals_every=0 2>/dev/null
  row "6 x 384, 512, cuda_graph $graph" "$(last "$work/s$graph" peak_memory_bytes) bytes" "$(last "$work/s$graph" bytes_per_second) bytes/s"
done
for kernel in reference fused; do
  for on in true false; do
    "$bbt" train --data "$text" --out "$work/m$kernel$on" --device "$device" --n_layer 12 --d_model 512 --n_head 8 --d_ff 1408 \
      --seq_len 2048 --batch_size 4 --steps 12 --log_every 6 --set quant.kernel=$kernel --set train.checkpointing=$on 2>/dev/null
    row "12 x 512, 2048, $kernel, checkpointing $on" "$(last "$work/m$kernel$on" peak_memory_bytes) bytes" "$(last "$work/m$kernel$on" bytes_per_second) bytes/s"
  done
done
exit $failed
