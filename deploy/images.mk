# Images, built and tried out without a registry or a container runtime; as root, with Debian's buildah and debootstrap.
# BASE=<image>@sha256:... takes another base than a freshly bootstrapped Debian.
.PHONY: images
images: $(DEV) ## build the images with buildah, train in one and serve from the other
	@$(BIN)/python deploy/images/build.py $(if $(BASE),--base $(BASE))
