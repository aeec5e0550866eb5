"""Experiment trackers: metrics sent to TensorBoard, MLflow and Weights & Biases."""
