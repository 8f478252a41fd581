# The image of znormseg. `make image` builds it with docker, buildah or podman; docs/docker.md says how to run it.
# There is no "# syntax=" line on purpose: with one, docker fetches a frontend from Docker Hub before anything else.

# CUDA 13.0, as in the torch wheels of constraints.txt. They bring their own CUDA libraries, so "-base" is enough.
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1

# Stand-ins for two folders of the host. `--build-context certs=FOLDER` and `--build-context wheels=FOLDER` replace
# them; either way they are mounted read-only while a step runs and are in no layer of the image.
FROM scratch AS certs
COPY LICENSE /
FROM scratch AS wheels
COPY LICENSE /


# Python: the base's own, else the distribution's (3.11 on Debian 12, 3.12 on Ubuntu 24.04).
FROM ${BASE_IMAGE} AS base
# hadolint ignore=DL3008
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    set -eu; \
    if ! command -v python3 >/dev/null; then \
        command -v apt-get >/dev/null || { echo "BASE_IMAGE has neither python3 nor apt-get" >&2; exit 1; }; \
        ca=/mnt/znormseg-certs/ca.pem; \
        [ -e "$ca" ] || ca=; \
        apt-get ${ca:+-o "Acquire::https::CaInfo=$ca"} update; \
        DEBIAN_FRONTEND=noninteractive apt-get ${ca:+-o "Acquire::https::CaInfo=$ca"} \
            install -y --no-install-recommends python3; \
        rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log; \
    fi; \
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
        { echo "BASE_IMAGE has $(python3 --version); znormseg needs 3.11 or newer, as in Debian 12" >&2; exit 1; }


# What znormseg stands on, in /opt/venv. pip lives beside it, in /opt/pip, and stays behind.
FROM base AS dependencies
# hadolint ignore=DL3008
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    set -eu; \
    if ! python3 -c 'import ensurepip' 2>/dev/null; then \
        command -v apt-get >/dev/null || { echo "BASE_IMAGE's python3 cannot make a venv" >&2; exit 1; }; \
        ca=/mnt/znormseg-certs/ca.pem; \
        [ -e "$ca" ] || ca=; \
        apt-get ${ca:+-o "Acquire::https::CaInfo=$ca"} update; \
        DEBIAN_FRONTEND=noninteractive apt-get ${ca:+-o "Acquire::https::CaInfo=$ca"} \
            install -y --no-install-recommends python3-venv; \
        rm -rf /var/lib/apt/lists/*; \
    fi; \
    python3 -m venv /opt/pip; \
    python3 -m venv --without-pip /opt/venv
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py ./
COPY docker/constraints.txt ./torch-constraints.txt
# Paths in the build container, and addresses that may hold a password: this stage's history is not the image's.
ARG PIP_CERT=
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=
ARG TORCH_INDEX=
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore
# Wheels only: there is no compiler here, and a source package would run code of its own.
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    --mount=type=bind,from=wheels,target=/mnt/znormseg-wheels \
    set -eu; \
    python3 requirements.py build > build.txt; \
    python3 requirements.py run > run.txt; \
    export PIP_ONLY_BINARY=:all:; \
    [ -n "$TORCH_INDEX" ] || export PIP_CONSTRAINT="/src/constraints.txt /src/torch-constraints.txt"; \
    /opt/pip/bin/pip install -r build.txt; \
    if [ -n "$TORCH_INDEX" ]; then \
        /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --index-url "$TORCH_INDEX" torch; \
    fi; \
    /opt/pip/bin/pip --python /opt/venv/bin/python install -r run.txt; \
    /opt/pip/bin/pip --python /opt/venv/bin/python check


# The program alone, so that a change of it is a small layer. Needs no network.
FROM dependencies AS project
COPY README.md LICENSE ./
COPY znorm ./znorm
COPY models ./models
COPY data ./data
COPY app ./app
RUN /opt/pip/bin/pip wheel --no-build-isolation --no-deps --no-index --wheel-dir /wheel . \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --no-index --no-warn-script-location \
        --root /out /wheel/*.whl


FROM base
LABEL org.opencontainers.image.title="znormseg" \
      org.opencontainers.image.description="Brain-tumour MRI segmentation: train, predict, score. Research use only." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=project /out/opt/venv /opt/venv
# Any user may write below HOME, or move it: `docker run --user` names users that /etc/passwd does not know, and
# torch asks for the user's name. Nothing below /tmp/znormseg is in the image; programs make their folders there.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp/znormseg \
    USER=znormseg \
    LOGNAME=znormseg \
    XDG_CACHE_HOME=/tmp/znormseg/cache \
    MPLCONFIGDIR=/tmp/znormseg/matplotlib \
    NILEARN_DATA=/tmp/znormseg/nilearn \
    TRITON_CACHE_DIR=/tmp/znormseg/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/znormseg/inductor \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN mkdir /workspace && chmod 1777 /workspace
WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["znormseg"]
CMD ["--help"]
