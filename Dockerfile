# The images of znormseg: `gpu` (the default) and `cpu`. `make image` builds them with docker, buildah or podman;
# docs/docker.md says how to run them.
# There is no "# syntax=" line on purpose: with one, docker fetches a frontend from Docker Hub before anything else.

# CUDA 13.0, as in the torch wheels of constraints.txt. They bring their own CUDA libraries, so "-base" is enough.
ARG GPU_BASE=docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1
ARG CPU_BASE=docker.io/library/debian:12-slim

# Stand-ins for two folders of the host. `--build-context certs=FOLDER` and `--build-context wheels=FOLDER` replace
# them; either way they are mounted read-only while a step runs and are in no layer of the image.
FROM scratch AS certs
COPY LICENSE /
FROM scratch AS wheels
COPY LICENSE /
# Scripts that the steps below run, also mounted.
FROM scratch AS scripts
COPY docker/install-python.sh docker/install-packages.sh docker/download-models.sh /


# ---- cpu: torch without CUDA ------------------------------------------------------------------------------------

FROM ${CPU_BASE} AS cpu-base
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    --mount=type=bind,from=scripts,target=/mnt/znormseg-scripts \
    /mnt/znormseg-scripts/install-python.sh

FROM cpu-base AS cpu-dependencies
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py ./
COPY docker/constraints.txt ./torch-constraints.txt
# Paths in the build container, and addresses that may hold a password: this stage's history is not the image's.
ARG PIP_CERT=
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    --mount=type=bind,from=wheels,target=/mnt/znormseg-wheels \
    --mount=type=bind,from=scripts,target=/mnt/znormseg-scripts \
    /mnt/znormseg-scripts/install-packages.sh

# Only the program, so that changing it gives a small layer. Needs no network.
FROM cpu-dependencies AS cpu-project
COPY README.md LICENSE ./
COPY znorm ./znorm
COPY models ./models
COPY data ./data
COPY app ./app
RUN /opt/pip/bin/pip wheel --no-build-isolation --no-deps --no-index --wheel-dir /wheel . \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --no-index --no-warn-script-location \
        --root /out /wheel/*.whl

# Published models, by name: `--build-arg MODELS="mindgrab monai-brats"`. Without names it needs no network.
FROM cpu-project AS cpu-models
ARG MODELS=
ARG ZNORMSEG_MODELS_URL=
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    --mount=type=bind,from=scripts,target=/mnt/znormseg-scripts \
    /mnt/znormseg-scripts/download-models.sh


FROM cpu-base AS cpu
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="znormseg" \
      org.opencontainers.image.description="Brain-tumour MRI segmentation: train, predict, score. Research use only." \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-4.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=cpu-dependencies /opt/venv /opt/venv
COPY --from=cpu-project /out/opt/venv /opt/venv
COPY --from=cpu-models /opt/models /opt/models
# Any user may write below HOME, or move it: `docker run --user` names users that /etc/passwd does not know, and
# torch asks for the user's name. Nothing below /tmp/znormseg is in the image; programs make their folders there.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp/znormseg \
    USER=znormseg \
    LOGNAME=znormseg \
    XDG_CACHE_HOME=/tmp/znormseg/cache \
    MPLCONFIGDIR=/tmp/znormseg/matplotlib \
    NILEARN_DATA=/tmp/znormseg/nilearn \
    ZNORMSEG_MODELS=/opt/models \
    TRITON_CACHE_DIR=/tmp/znormseg/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/znormseg/inductor \
    PYTHONDONTWRITEBYTECODE=1
RUN mkdir -p /workspace /opt/models && chmod 1777 /workspace /opt/models
WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["znormseg"]
CMD ["--help"]


# ---- gpu: the last stage, so the one that is built where no target is named --------------------------------------

# Triton compiles its launchers with gcc against Python.h when it first uses a GPU.
FROM ${GPU_BASE} AS gpu-base
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    --mount=type=bind,from=scripts,target=/mnt/znormseg-scripts \
    /mnt/znormseg-scripts/install-python.sh gcc libc6-dev python3-dev

FROM gpu-base AS gpu-dependencies
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py ./
COPY docker/constraints.txt ./torch-constraints.txt
# Paths in the build container, and addresses that may hold a password: this stage's history is not the image's.
ARG PIP_CERT=
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    --mount=type=bind,from=wheels,target=/mnt/znormseg-wheels \
    --mount=type=bind,from=scripts,target=/mnt/znormseg-scripts \
    /mnt/znormseg-scripts/install-packages.sh

# Only the program, so that changing it gives a small layer. Needs no network.
FROM gpu-dependencies AS gpu-project
COPY README.md LICENSE ./
COPY znorm ./znorm
COPY models ./models
COPY data ./data
COPY app ./app
RUN /opt/pip/bin/pip wheel --no-build-isolation --no-deps --no-index --wheel-dir /wheel . \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --no-index --no-warn-script-location \
        --root /out /wheel/*.whl

# Published models, by name: `--build-arg MODELS="mindgrab monai-brats"`. Without names it needs no network.
FROM gpu-project AS gpu-models
ARG MODELS=
ARG ZNORMSEG_MODELS_URL=
RUN --mount=type=bind,from=certs,target=/mnt/znormseg-certs \
    --mount=type=bind,from=scripts,target=/mnt/znormseg-scripts \
    /mnt/znormseg-scripts/download-models.sh


FROM gpu-base AS gpu
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="znormseg" \
      org.opencontainers.image.description="Brain-tumour MRI segmentation: train, predict, score. Research use only." \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-4.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=gpu-dependencies /opt/venv /opt/venv
COPY --from=gpu-project /out/opt/venv /opt/venv
COPY --from=gpu-models /opt/models /opt/models
# Any user may write below HOME, or move it: `docker run --user` names users that /etc/passwd does not know, and
# torch asks for the user's name. Nothing below /tmp/znormseg is in the image; programs make their folders there.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp/znormseg \
    USER=znormseg \
    LOGNAME=znormseg \
    XDG_CACHE_HOME=/tmp/znormseg/cache \
    MPLCONFIGDIR=/tmp/znormseg/matplotlib \
    NILEARN_DATA=/tmp/znormseg/nilearn \
    ZNORMSEG_MODELS=/opt/models \
    TRITON_CACHE_DIR=/tmp/znormseg/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/znormseg/inductor \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN mkdir -p /workspace /opt/models && chmod 1777 /workspace /opt/models
WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["znormseg"]
CMD ["--help"]
