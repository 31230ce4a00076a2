"""A run in Weights & Biases, trackio and MLflow (`--track`): what its files hold, sent when a checkpoint holds it too."""
