# Models in an image: components/model-init copies them out and verifies them before the service starts. BASE is the
# service's own image, whose layers every node has already. From a directory that holds the repository as `models`:
#   docker build --build-arg BASE=REGISTRY/convoy/service-cpu@sha256:... --file model.Dockerfile .
ARG BASE
# hadolint ignore=DL3006  # the argument carries the digest
FROM ${BASE}
COPY models /repository
