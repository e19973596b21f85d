# Training: everything of the service, and PyTorch. From the root of the repository:
#   docker build --build-arg BASE=python:3.13-slim-trixie@sha256:... --file deploy/images/training.Dockerfile .
ARG BASE

# hadolint ignore=DL3006  # the argument carries the digest
FROM ${BASE} AS build
WORKDIR /src
# Debian keeps venv in a package of its own; nothing of it reaches the image, so that the base may decide its version.
# hadolint ignore=DL3008
RUN python3 -m venv /opt/convoy || { \
      apt-get update \
      && apt-get install --yes --no-install-recommends python3-venv \
      && python3 -m venv --clear /opt/convoy \
      && rm -rf /var/lib/apt/lists/*; \
    }
# PyTorch is the build that the index offers: the CUDA one brings NVIDIA's libraries along, in versions that it chooses.
# Dependencies first: they change seldom, and they are nearly all of the image. Wheels only: nothing is compiled.
COPY constraints.txt pyproject.toml deploy/images/requirements.py ./
RUN /opt/convoy/bin/python requirements.py --cpu --extra training --extra postgres --extra openvino > requirements.txt \
    && /opt/convoy/bin/pip install --no-cache-dir --only-binary :all: \
         --constraint constraints.txt --requirement requirements.txt \
    && /opt/convoy/bin/python requirements.py --check --allow nvidia- --allow cuda- --allow triton
COPY LICENSE README.md ./
COPY protos protos
COPY service service
COPY training training
# hadolint ignore=DL3013  # hatchling builds the wheel, in an environment that is thrown away
RUN /opt/convoy/bin/pip install --no-cache-dir --no-deps . \
    && /opt/convoy/bin/pip uninstall --yes setuptools pip

# hadolint ignore=DL3006
FROM ${BASE} AS runtime
COPY --from=build /opt/convoy /opt/convoy
# The root may be read-only: modules are compiled already, and nothing else is written outside volumes.
ENV PATH=/opt/convoy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib
# A number, so that Kubernetes can see that it is not root. It needs no entry in /etc/passwd.
USER 10001:10001
WORKDIR /tmp
# In exec form: SIGTERM reaches the process itself.
ENTRYPOINT ["convoy"]
CMD ["train", "--help"]
