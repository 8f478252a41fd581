#!/bin/sh
# Builds the image; `make image` calls this. Environment variables:
#   ENGINE          auto (default), docker, buildah or podman
#   TARGET          gpu (default) or cpu
#   IMAGE           name of the image; default: znormseg:latest, for the cpu target znormseg:cpu
#   BASE_IMAGE      default: that of the Dockerfile; "debootstrap" makes one from Debian 12 with base.sh
#   PIP_CERT        file with the certificates to trust, for a proxy that intercepts TLS
#   PIP_INDEX_URL   package index instead of PyPI
#   PIP_FIND_LINKS  folder with wheels, or the URL of a page of links
#   TORCH_INDEX     index of another torch build, such as https://download.pytorch.org/whl/cu126; default for the cpu
#                   target: PyTorch's CPU index, or none if PIP_FIND_LINKS is given
#   MODELS          names of published models to put into the image, separated by spaces; default: none
#   ZNORMSEG_MODELS_URL  mirror to download them from
#   IMAGE_WORK      folder for temporary files; default: TMPDIR or /tmp
# http_proxy, https_proxy and no_proxy are passed on. None of these settings remains in the image.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"

TARGET=${TARGET:-gpu}
case "$TARGET" in
    gpu) IMAGE=${IMAGE:-znormseg:latest} base_argument=GPU_BASE ;;
    cpu) IMAGE=${IMAGE:-znormseg:cpu} base_argument=CPU_BASE ;;
    *) fail "TARGET=$TARGET: use gpu or cpu" ;;
esac
[ -z "${PIP_CERT:-}" ] || [ -f "$PIP_CERT" ] || fail "PIP_CERT=$PIP_CERT is not a file"
case "${PIP_FIND_LINKS:-}" in
    '' | http://* | https://*) ;;
    *) [ -d "$PIP_FIND_LINKS" ] || fail "PIP_FIND_LINKS=$PIP_FIND_LINKS is neither a folder nor an http(s) address" ;;
esac
case "${MODELS:-}" in
    *[!a-z0-9\ -]*) fail "MODELS=$MODELS; give names from znormseg model list, separated by spaces" ;;
esac
for name in PIP_INDEX_URL TORCH_INDEX ZNORMSEG_MODELS_URL; do
    eval "value=\${$name:-}"
    case "$value" in
        '' | http://* | https://*) ;;
        *) fail "$name must be an http(s) address; the build cannot see this host's files" ;;
    esac
done
choose_engine
make_work

# Lists the containers of buildah and podman with their images; nameless() lists the images without a name.
containers() {
    case "$ENGINE" in
        buildah) buildah containers --all --format '{{.ContainerID}} {{.ImageID}}' ;;
        podman) podman ps --all --external --no-trunc --format '{{.ID}} {{.ImageID}}' ;;
    esac
}
nameless() { [ "$ENGINE" = docker ] || "$ENGINE" images --quiet --no-trunc --filter dangling=true; }

# When a build fails or is interrupted, buildah 1.28 leaves the mounted container of a stage and its image behind. This
# removes all that are newer than the start of this build and come from its base or have a step of this Dockerfile in
# their history. It would break another such build that runs at the same time.
undo() {
    [ "${building:-no}" = yes ] || return 0
    base=${BASE_IMAGE:-$(sed -n "s/^ARG $base_argument=//p" "$here/../Dockerfile")}
    base=$("$ENGINE" images --quiet --no-trunc "$base" 2>/dev/null)
    ours() { "$ENGINE" inspect --type image "$1" 2>/dev/null | grep -q /mnt/znormseg-scripts; }
    containers | while read -r container image; do
        if ! grep -q "^$container" "$work/containers" && { [ "${base#sha256:}" = "$image" ] || ours "$image"; }; then
            "$ENGINE" rm "$container" >/dev/null
        fi
    done
    for image in $(nameless); do
        if ! grep -q "$image" "$work/nameless" && ours "$image"; then
            "$ENGINE" rmi "$image" >/dev/null 2>&1
        fi
    done
}

if [ "${BASE_IMAGE:-}" = debootstrap ]; then
    BASE_IMAGE=$(ENGINE=$ENGINE "$here/base.sh")
fi

# Values are passed through the environment (`--build-arg NAME` without a value), so that `ps` shows no passwords.
set -- --file "$here/../Dockerfile" --target "$TARGET" --tag "$IMAGE"
[ -z "${BASE_IMAGE:-}" ] || set -- "$@" --build-arg "$base_argument=$BASE_IMAGE"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../pyproject.toml")
revision=$(git -C "$here/.." describe --always --dirty --abbrev=40 --match '' 2>/dev/null || :)
set -- "$@" --build-arg "VERSION=$version" --build-arg "REVISION=$revision"
if [ -n "${PIP_CERT:-}" ]; then
    mkdir "$work/certs"
    cp -- "$PIP_CERT" "$work/certs/ca.pem"
    chmod 644 "$work/certs/ca.pem"
    PIP_CERT=/mnt/znormseg-certs/ca.pem
    export PIP_CERT
    set -- "$@" --build-context "certs=$work/certs" --build-arg PIP_CERT
fi
case "${PIP_FIND_LINKS:-}" in
    '') ;;
    http://* | https://*) set -- "$@" --build-arg PIP_FIND_LINKS ;;
    *)
        set -- "$@" --build-context "wheels=$(CDPATH='' cd -- "$PIP_FIND_LINKS" && pwd)" --build-arg PIP_FIND_LINKS
        PIP_FIND_LINKS=/mnt/znormseg-wheels
        export PIP_FIND_LINKS
        ;;
esac
[ -z "${PIP_INDEX_URL:-}" ] || set -- "$@" --build-arg PIP_INDEX_URL
if [ -n "${TORCH_INDEX:-}" ]; then
    set -- "$@" --build-arg TORCH_INDEX
elif [ -n "${PIP_FIND_LINKS:-}" ]; then
    set -- "$@" --build-arg TORCH_INDEX=
fi
[ -z "${MODELS:-}" ] || set -- "$@" --build-arg "MODELS=$MODELS"
[ -z "${ZNORMSEG_MODELS_URL:-}" ] || set -- "$@" --build-arg ZNORMSEG_MODELS_URL

say "building $IMAGE, target $TARGET, with $ENGINE"
containers >"$work/containers"
nameless >"$work/nameless"
building=yes
case "$ENGINE" in
    docker)
        for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
            eval "value=\${$name:-}"
            [ -z "$value" ] || set -- "$@" --build-arg "$name"
        done
        # Attestations would record the build arguments along with the image.
        export BUILDX_NO_DEFAULT_ATTESTATIONS=1
        docker buildx build --load "$@" "$here/.."
        ;;
    *)
        # buildah passes the proxy variables on by itself. Without layers, no step is cached between builds.
        "$ENGINE" build --layers=false --network host --format oci "$@" "$here/.."
        ;;
esac
building=no
say "built $IMAGE"
