"""fastattn info: shows versions, devices and backends, and why one is missing. Needs no training packages."""

import argparse

from fastattn._info import report


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise argparse.ArgumentError(None, message)


def parser():
    return Parser(prog="fastattn info", description="Show versions, devices and backends, and why one is missing.")


def run(_options, _argv):
    print(report())
