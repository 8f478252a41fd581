#!/bin/sh
# Builds the image; `make image` calls this. What it takes, from the environment:
#   ENGINE          auto (default), docker, buildah or podman
#   TARGET          gpu (default) or cpu
#   IMAGE           the name; default znormseg:latest, of cpu znormseg:cpu
#   BASE_IMAGE      default as in Dockerfile; "debootstrap" makes one of Debian 12 with base.sh
#   PIP_CERT        file with the certificates to trust, for a proxy that opens TLS
#   PIP_INDEX_URL   package index instead of PyPI
#   PIP_FIND_LINKS  folder with wheels, or the address of a page of links
#   TORCH_INDEX     index of another torch build, as https://download.pytorch.org/whl/cu126; of cpu PyTorch's own, or
#                   none where PIP_FIND_LINKS is given
#   IMAGE_WORK      folder for temporary files; default TMPDIR or /tmp
# http_proxy, https_proxy and no_proxy are handed on. None of all this is left in the image.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"

TARGET=${TARGET:-gpu}
case "$TARGET" in
    gpu) IMAGE=${IMAGE:-znormseg:latest} base_argument=GPU_BASE ;;
    cpu) IMAGE=${IMAGE:-znormseg:cpu} base_argument=CPU_BASE ;;
    *) fail "TARGET=$TARGET; allowed are gpu and cpu" ;;
esac
[ -z "${PIP_CERT:-}" ] || [ -f "$PIP_CERT" ] || fail "PIP_CERT=$PIP_CERT is not a file"
case "${PIP_FIND_LINKS:-}" in
    '' | http://* | https://*) ;;
    *) [ -d "$PIP_FIND_LINKS" ] || fail "PIP_FIND_LINKS=$PIP_FIND_LINKS is neither a folder nor an http(s) address" ;;
esac
for name in PIP_INDEX_URL TORCH_INDEX; do
    eval "value=\${$name:-}"
    case "$value" in
        '' | http://* | https://*) ;;
        *) fail "$name must be an http(s) address; the build cannot see this host's files" ;;
    esac
done
choose_engine
make_work

# Containers of buildah and podman with their images, and images without a name.
containers() {
    case "$ENGINE" in
        buildah) buildah containers --all --format '{{.ContainerID}} {{.ImageID}}' ;;
        podman) podman ps --all --external --no-trunc --format '{{.ID}} {{.ImageID}}' ;;
    esac
}
nameless() { [ "$ENGINE" = docker ] || "$ENGINE" images --quiet --no-trunc --filter dangling=true; }

# buildah 1.28 leaves a stage's container, mounted, and its image behind where a build fails or is broken off. What is
# new since this build began, and comes from its base or has a step of this Dockerfile in its history, is taken to be
# its own; a second such build at the same time would suffer.
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

# Values go through the environment (`--build-arg NAME` without a value), so that `ps` shows no password.
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
        # Attestations would record the build arguments beside the image.
        export BUILDX_NO_DEFAULT_ATTESTATIONS=1
        docker buildx build --load "$@" "$here/.."
        ;;
    *)
        # buildah hands the proxy variables on by itself. Without layers no step is kept between builds.
        "$ENGINE" build --layers=false --network host --format oci "$@" "$here/.."
        ;;
esac
building=no
say "built $IMAGE"
