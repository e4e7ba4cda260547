"""``python -m headrace`` is the same as ``headrace``."""

from headrace import early


def main() -> int:
    """Entry point of the console script. Returns the exit code."""
    early.end_cleanly()  # the next line takes a while
    from headrace import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
