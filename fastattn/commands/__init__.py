"""What the command line does, one module a command: `parser()` has its options, `run(options, argv)` does it.

A module is imported when its command is called, so none waits for the packages of another.
"""
