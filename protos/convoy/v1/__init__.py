"""Version 1 of the API: `image_classifier_pb2` (messages), `image_classifier_pb2_grpc` (stubs)."""
