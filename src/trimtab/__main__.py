"""`trimtab` and `python -m trimtab`: the command line, loaded so that an interrupt meanwhile is none of its errors."""

import sys


def main() -> int:
    """Run the command line and return its status; an interrupt before it has begun ends as one does later."""
    try:
        from trimtab import cli

        return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("\ntrimtab: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
