# shellcheck shell=sh
# Functions shared by the scripts in this folder. Sourced with `.`, not run.

say() { printf 'image: %s\n' "$*" >&2; }

fail() {
    printf 'image: error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Whether a docker engine answers; a client without an engine cannot build.
docker_answers() { have docker && docker info >/dev/null 2>&1; }

# Sets ENGINE to docker, buildah or podman, or exits with a message about what to install.
choose_engine() {
    case "${ENGINE:-auto}" in
        auto)
            if docker_answers; then
                ENGINE=docker
            elif have buildah; then
                ENGINE=buildah
            elif have podman; then
                ENGINE=podman
            elif have docker; then
                fail "docker is installed, but no engine answers (see: docker info). Start it, or install buildah" \
                    "(apt install buildah, dnf install buildah)."
            else
                fail "found none of docker, buildah and podman. Install one, for instance: apt install buildah," \
                    "dnf install buildah, or https://docs.docker.com/engine/install"
            fi
            ;;
        docker)
            have docker || fail "ENGINE=docker, but there is no docker on PATH"
            docker_answers || fail "ENGINE=docker, but no engine answers: $(docker info 2>&1 | tail -n 1)"
            ;;
        buildah | podman) have "$ENGINE" || fail "ENGINE=$ENGINE, but there is no $ENGINE on PATH" ;;
        *) fail "ENGINE=$ENGINE; allowed are auto, docker, buildah, podman" ;;
    esac
    if [ "$ENGINE" = docker ]; then
        docker buildx version >/dev/null 2>&1 ||
            fail "docker lacks buildx; install docker-buildx-plugin (or docker-buildx)"
    else
        # Inside another container there is often neither overlayfs nor a cgroup to run build steps in.
        if [ -z "${STORAGE_DRIVER:-}" ] && ! "$ENGINE" info >/dev/null 2>&1; then
            say "$ENGINE's own storage driver does not work here; falling back to vfs, which is slow and uses more disk"
            STORAGE_DRIVER=vfs
            export STORAGE_DRIVER
        fi
        BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
        export BUILDAH_ISOLATION
    fi
}

# image_exists NAME: whether the engine already has the image.
image_exists() {
    case "$ENGINE" in
        buildah) buildah inspect --type image "$1" >/dev/null 2>&1 ;;
        *) "$ENGINE" image inspect "$1" >/dev/null 2>&1 ;;
    esac
}

# Makes the folder $work, which is removed when the script ends, however it ends; `undo` is called first.
make_work() {
    work=$(mktemp -d "${IMAGE_WORK:-${TMPDIR:-/tmp}}/znormseg-image.XXXXXX") || exit 1
    trap 'clean_up $?' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
}

undo() { :; }

clean_up() {
    trap - EXIT
    trap '' INT TERM HUP
    set +eu
    undo
    rm -rf --one-file-system "$work"
    exit "$1"
}
