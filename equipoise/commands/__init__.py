"""One file for each `equipoise X`: read the options, call, print."""
