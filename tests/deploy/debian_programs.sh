#!/usr/bin/env bash
# Programs out of Debian's packages, laid into a folder and not installed: that would bring services along.
#   debian_programs.sh FOLDER PACKAGE...      then FOLDER/usr/bin has them
set -euo pipefail
mkdir -p "$1"
into=$(cd "$1" && pwd) packages=("${@:2}") fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT
cd "$fetched"
apt-get download -qq "${packages[@]}" >/dev/null 2>&1 || { apt-get update -qq && apt-get download -qq "${packages[@]}"; }
for package in *.deb; do dpkg-deb --fsys-tarfile "$package" | tar x -C "$into" --wildcards './usr/bin/*'; done
