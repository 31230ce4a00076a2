"""The runs of a sweep on a Ray cluster, one GPU each: python ray_sweep.py sweep.yaml --output-dir /shared/sweep

The folder has to be one that all machines share. Started again, it runs what is not finished.
"""

import shlex
import subprocess
import sys

import ray


@ray.remote(num_gpus=1, max_retries=10)
def run(command: str) -> int:
    """The exit code of one run. Where its machine is lost, Ray starts it on another, and it continues."""
    return subprocess.run(shlex.split(command), check=False).returncode


def main() -> int:
    asked = ["equipoise", "sweep", *sys.argv[1:], "--commands"]
    commands = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    ray.init()
    codes = ray.get([run.remote(command) for command in commands])
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
