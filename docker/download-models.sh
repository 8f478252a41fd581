#!/bin/sh
# During the build of an image: downloads published models into /opt/models, which is ZNORMSEG_MODELS in the image.
# Environment variables: MODELS (the names; may be empty) and ZNORMSEG_MODELS_URL (a mirror).
set -eu
mkdir -p /opt/models
[ -n "${MODELS:-}" ] || exit 0
cp -a /out/opt/venv/. /opt/venv/
ca=/mnt/znormseg-certs/ca.pem
[ ! -e "$ca" ] || export REQUESTS_CA_BUNDLE="$ca"
export ZNORMSEG_MODELS=/opt/models
for name in $MODELS; do
    /opt/venv/bin/znormseg model download "$name"
done
chmod -R a+rX /opt/models
