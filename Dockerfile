# NOT BUILT YET: this file has been written, and no image has been made from it. The next step builds and tests it.
# syntax=docker/dockerfile:1
ARG BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ${BASE_IMAGE}

ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/znormseg
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY znorm ./znorm
COPY models ./models
COPY data ./data
COPY app ./app
RUN python3 -m venv /opt/venv \
    && if [ -n "${TORCH_INDEX}" ]; then \
         /opt/venv/bin/pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" -c constraints.txt torch; \
       fi \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt .

# Caches go where any user may write.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp/home \
    XDG_CACHE_HOME=/tmp/home/.cache \
    MPLCONFIGDIR=/tmp/home/matplotlib \
    PYTHONDONTWRITEBYTECODE=1
RUN mkdir -m 1777 -p /tmp/home /workspace
WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["znormseg"]
CMD ["--help"]
