"""What completion files hold, measured: metrics, intervals, comparisons, the trade-off."""
