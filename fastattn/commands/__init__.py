"""The commands of the command line, one per module: `parser()` defines the options, `run(options, argv)` runs it.

A module is imported only when its command is called, so a command does not need the packages of the others.
"""
