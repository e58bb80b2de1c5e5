"""Entry point of the command ``gpuem`` and of ``python -m gpuem``: signals are handled before anything is imported."""

import sys

from gpuem import interrupts


def main() -> None:
    """Run the command line. Interrupted before a command began, it ends like one that was stopped early."""
    interrupts.install()
    try:
        from gpuem import cli

        cli.main()
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{interrupts.describe(error)} before anything was begun\n")
        sys.exit(75)


if __name__ == "__main__":
    main()
