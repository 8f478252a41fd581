#!/bin/sh
# Makes a base image with debootstrap, for machines that can reach a Debian mirror but no image registry, and prints its
# name. Needs root. Environment variables:
#   ENGINE       as in build.sh
#   SUITE        bookworm (default), or an Ubuntu suite: noble or jammy
#   MIRROR       default: http://deb.debian.org/debian, for Ubuntu http://archive.ubuntu.com/ubuntu
#   KEYRING      default: that of debian-archive-keyring or ubuntu-keyring
#   REBUILD      1 rebuilds an existing image
#   IMAGE_WORK   folder for temporary files
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"

SUITE=${SUITE:-bookworm}
case "$SUITE" in
    noble | jammy)
        MIRROR=${MIRROR:-http://archive.ubuntu.com/ubuntu}
        KEYRING=${KEYRING:-/usr/share/keyrings/ubuntu-archive-keyring.gpg}
        components=main,universe
        # Debian 12's debootstrap does not know noble by name; all Ubuntu releases since gutsy share one script.
        script=/usr/share/debootstrap/scripts/gutsy
        others="$SUITE-updates $SUITE-security"
        security=$MIRROR
        ;;
    *)
        MIRROR=${MIRROR:-http://deb.debian.org/debian}
        KEYRING=${KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}
        components=main
        script=
        others="$SUITE-updates"
        security=${MIRROR%/}-security
        ;;
esac
name=localhost/znormseg-base:$SUITE
choose_engine
if [ "${REBUILD:-0}" != 1 ] && image_exists "$name"; then
    say "base image $name already exists (REBUILD=1 rebuilds it)"
    echo "$name"
    exit 0
fi
PATH=$PATH:/usr/sbin:/sbin
have debootstrap || fail "debootstrap is not installed: apt install debootstrap debian-archive-keyring"
[ "$(id -u)" = 0 ] || fail "debootstrap needs root: sudo make image BASE_IMAGE=debootstrap"
[ -f "$KEYRING" ] || fail "$KEYRING does not exist: apt install debian-archive-keyring (for Ubuntu: ubuntu-keyring)"

make_work
root=$work/root
undo() {
    for mounted in "$root/proc" "$root/sys"; do
        if mountpoint -q "$mounted"; then umount -l "$mounted"; fi
    done
    [ -z "${container:-}" ] || buildah rm "$container" >/dev/null 2>&1 || :
}

say "debootstrap $SUITE from $MIRROR"
# shellcheck disable=SC2086 # an empty script must be no argument
debootstrap --variant=minbase --keyring="$KEYRING" --components="$components" --include=ca-certificates \
    "$SUITE" "$root" "$MIRROR" $script >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    fail "debootstrap failed; the lines above are its last"
}
{
    echo "deb $MIRROR $SUITE $(echo "$components" | tr , ' ')"
    for suite in $others; do
        echo "deb $MIRROR $suite $(echo "$components" | tr , ' ')"
    done
    [ "$security" = "$MIRROR" ] || echo "deb $security $SUITE-security $components"
} >"$root/etc/apt/sources.list"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
# debootstrap copies this machine's name servers and host name.
: >"$root/etc/resolv.conf"
echo localhost >"$root/etc/hostname"

if [ "$ENGINE" = buildah ]; then
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" / >/dev/null
    buildah config --cmd '["bash"]' --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet --rm "$container" "$name" >/dev/null
    container=
else
    tar -C "$root" --numeric-owner -c . |
        "$ENGINE" import --change 'CMD ["bash"]' - "$name" >/dev/null
fi
say "built base image $name"
echo "$name"
