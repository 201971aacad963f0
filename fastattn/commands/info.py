"""fastattn info: versions, devices and backends, and why one is missing. Needs none of the training packages."""

import argparse

from fastattn._info import report


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise argparse.ArgumentError(None, message)


def parser():
    return Parser(prog="fastattn info", description="Versions, devices, backends, and why one is missing.")


def run(_options, _argv):
    print(report())
