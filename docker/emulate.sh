#!/bin/sh
# Runs a program in a root folder like `docker run --read-only --network none --cap-drop ALL
# --security-opt no-new-privileges --tmpfs /tmp:exec --shm-size 64m --user U:G -v DATA:/data`, for machines without a
# container runtime. test.sh calls it. Needs root.
#   emulate.sh ROOT DATA UID:GID WORKDIR ENVIRONMENT_FILE TMP PROGRAM ARGUMENTS...
# TMP is tmpfs or as-is. The script re-executes itself inside new namespaces; all mounts are made there and disappear
# with the program.
set -eu
if [ "${1:-}" != --inside ]; then
    exec unshare --mount --net --pid --ipc --uts --fork --kill-child --propagation private -- "$0" --inside "$@"
fi
shift
root=$1 data=$2 user=$3 folder=$4 environment=$5 tmp=$6
shift 6

# Docker's "none" network has a loopback interface that is up; a new namespace has one that is down.
ip link set lo up

mkdir -p "$root/data"
mount --bind "$root" "$root"
mount --bind "$data" "$root/data"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755,size=64k tmpfs "$root/dev"
for device in null zero full random urandom; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=64m,nosuid,nodev,noexec tmpfs "$root/dev/shm"
[ "$tmp" = as-is ] || mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
mount -o remount,bind,ro "$root/dev"
mount -o remount,bind,ro "$root"

set -- -- "$@"
while IFS= read -r variable; do
    set -- "$variable" "$@"
done <"$environment"

# `chroot --userspec` switches to the user; capabilities are lost with uid 0, and no_new_privs prevents regaining them.
# A shell inside changes to WORKDIR and looks the program up on the image's PATH.
# shellcheck disable=SC2016 # expanded by the inner shell
exec setpriv --no-new-privs chroot --userspec="$user" --groups='' "$root" \
    /usr/bin/env -i sh -c '
        cd "$1" && shift
        while [ "$1" != -- ]; do export "${1?}"; shift; done
        shift
        exec "$@"' sh "$folder" "$@"
