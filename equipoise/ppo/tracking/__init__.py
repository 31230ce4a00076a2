"""A run in Weights & Biases, trackio and MLflow (`--track`): what its files hold, sent once a checkpoint does."""
