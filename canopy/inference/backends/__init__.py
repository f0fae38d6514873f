"""Runtimes that can carry a height model: torch, OpenVINO, ONNX Runtime. See `runner.Runner`."""
