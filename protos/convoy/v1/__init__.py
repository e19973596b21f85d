"""Version 1 of the API: `image_classifier_pb2` and `admin_pb2` (messages), `…_pb2_grpc` (stubs)."""
