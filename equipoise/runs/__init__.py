"""What every long job needs: files, records, checkpoints, signals, and what a person sees of it."""
