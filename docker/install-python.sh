#!/bin/sh
# During the build of an image: installs the distribution's Python (3.11 on Debian 12, 3.12 on Ubuntu 24.04) unless the
# base image has one, and the distribution's packages that are given as arguments.
set -eu
packages=$*
command -v python3 >/dev/null || packages="python3 $packages"
if [ -n "$packages" ]; then
    command -v apt-get >/dev/null || { echo "the base image has neither apt-get nor all of: $packages" >&2; exit 1; }
    ca=/mnt/znormseg-certs/ca.pem
    [ -e "$ca" ] || ca=
    apt-get ${ca:+-o "Acquire::https::CaInfo=$ca"} update
    # shellcheck disable=SC2086 # several packages
    DEBIAN_FRONTEND=noninteractive apt-get ${ca:+-o "Acquire::https::CaInfo=$ca"} \
        install -y --no-install-recommends $packages
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "the base image has $(python3 --version); znormseg needs 3.11 or newer, as in Debian 12" >&2; exit 1; }
