#!/bin/sh
# Prints the folder of onnxruntime's C++ headers: the installed one, or that of Debian's package libonnxruntime-dev,
# downloaded and unpacked into the folder given. The headers of an older onnxruntime serve newer ones.
set -eu
folder=$1
package=libonnxruntime-dev
suite=trixie  # the first that has the headers of version 1.21

for place in "${ORT_INCLUDE:-}" /usr/include/onnxruntime /usr/local/include/onnxruntime "$folder/usr/include/onnxruntime"; do
  if [ -f "$place/onnxruntime_cxx_api.h" ]; then
    echo "$place"
    exit
  fi
done

fail() {
  echo "onnxruntime's headers are needed: install $package (Debian $suite or newer), or set ORT_INCLUDE: $1" >&2
  exit 1
}

sources=/etc/apt/sources.list.d/debian.sources
[ -f $sources ] || fail "this system has no $sources to download them by"
# shellcheck disable=SC1091
current=$(. /etc/os-release && echo "$VERSION_CODENAME")
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" "$folder/sources"
folder=$(cd "$folder" && pwd)
# The system's own sources, of another suite; security has no part in it.
sed "s/$current/$suite/g" $sources | awk -v RS= -v ORS='\n\n' '!/-security/' > "$folder/sources/debian.sources"
apt() {
  apt-get -qq -o Dir::Etc::sourcelist="$folder/sources/debian.sources" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder/cache" -o APT::Sandbox::User=root "$@"
}
apt update >&2 || fail "apt-get update failed"
(cd "$folder" && apt download $package >&2) || fail "apt-get download failed"
dpkg -x "$folder"/${package}_*.deb "$folder" || fail "the package cannot be unpacked"
rm -rf "$folder/lists" "$folder/cache" "$folder/sources"
echo "$folder/usr/include/onnxruntime"
