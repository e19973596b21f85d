"""Convoy's training: from a folder of images to a model version that the service can load."""
