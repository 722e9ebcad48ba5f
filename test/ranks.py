#!/usr/bin/env python3
"""Starts a program as several ranks of this machine, with mpirun or, as torchrun does, by RANK and WORLD_SIZE.

    test/ranks.py [--without-mpirun] RANKS PROGRAM [ARGUMENT ...]

Exits with the first code that is not 0.
"""

import argparse
import os
import random
import subprocess
import sys

# More ranks than cores, as root, and in containers that forbid processes to read each other.
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "btl", "self,vader",
          "--mca", "btl_vader_single_copy_mechanism", "none"]
MPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
PORTS = range(20000, 32000)


def with_mpirun(ranks, command):
    """(command, environment) of one process that starts all."""
    return [*MPIRUN, "-n", str(ranks), *command], MPI_ENVIRONMENT


def by_environment(ranks):
    """The environment of each rank."""
    port = random.SystemRandom().choice(PORTS)
    return [{"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
             "LONGHAND_PORT": str(port), "LONGHAND_RUN": f"ranks.py {os.getpid()}"} for rank in range(ranks)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-mpirun", action="store_true")
    parser.add_argument("ranks", type=int, metavar="RANKS")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="PROGRAM")
    args = parser.parse_args()
    if args.ranks == 1 or args.without_mpirun:
        environments = by_environment(args.ranks) if args.ranks > 1 else [{}]
        processes = [subprocess.Popen(args.command, env=os.environ | each) for each in environments]
        codes = [process.wait() for process in processes]
        return next((code if code > 0 else 128 - code for code in codes if code), 0)
    command, environment = with_mpirun(args.ranks, args.command)
    return subprocess.run(command, env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
