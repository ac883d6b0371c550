#!/bin/sh
# collect-libraries.sh BBT DEST: copies bbt to DEST/usr/local/bin, without its debug information, and of libtorch's
# folder those libraries that it loads to DEST/their own absolute path, where the run paths find them.
set -eu

if [ $# -ne 2 ]; then
  echo "usage: collect-libraries.sh BBT DEST" >&2
  exit 2
fi
bbt=$1
dest=$2

# The files of the libraries that the dynamic linker loads for $1.
loaded() {
  ldd "$1" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | xargs -r realpath
}

missing=$(ldd "$bbt" | grep 'not found' || true)
if [ -n "$missing" ]; then
  echo "collect-libraries.sh: $bbt does not find all of its libraries:" >&2
  echo "$missing" >&2
  exit 1
fi
libtorch=$(loaded "$bbt" | sed -n 's|/torch/lib/libtorch_cpu\.so$||p')
if [ -z "$libtorch" ]; then
  echo "collect-libraries.sh: $bbt loads no libtorch out of a folder torch/lib" >&2
  exit 1
fi

# What a GPU needs besides is opened by name while bbt runs: the parts of cuDNN, and the compiler of kernels (NVRTC)
# with libtorch's entry to it. Not among them: what only linear algebra (cuSOLVER), a profiler, or NVSHMEM opens.
opened() {
  if [ -e "$libtorch/torch/lib/libtorch_cuda.so" ]; then
    find "$libtorch" -name 'libcudnn_*.so.*' -o -name 'libnvrtc.so.*' -o -name 'libnvrtc-builtins.so.*' \
      -o -name 'libcaffe2_nvrtc.so'
  fi
}

# The system's own libraries and the driver's are those of the machine that bbt will run on.
{
  loaded "$bbt"
  opened | while read -r library; do
    echo "$library"
    loaded "$library"
  done
} | grep -F "$libtorch/" | sort -u | while read -r library; do
  install -D "$library" "$dest$library"
done
install -D -s "$bbt" "$dest/usr/local/bin/bbt"
